"""The models whose parameters benchmark.py steps, and the optimizers that do: all on the same gradients."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

import hf_noneuclid
from hf_noneuclid import METHODS, methods
from hf_noneuclid.diagnostics import FATAL_RUN
from hf_noneuclid.experiments.plan import MODELS

SHAPES = {
    "gpt2": MODELS["gpt2"],
    "gpt2-large": MODELS["gpt2-large"],
    "llama-7b-layers": LlamaConfig(num_hidden_layers=4),
    "moe": MixtralConfig(
        hidden_size=1024,
        intermediate_size=3584,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=4,
    ),
    "tiny": MixtralConfig(
        vocab_size=97,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        max_position_embeddings=32,
    ),
}
GRADIENT_SCALE = 1e-2

TORCH_CONTENDERS = ("adamw", "torch_muon")
DEFAULT_CONTENDERS = (
    *TORCH_CONTENDERS,
    *("muon", "muonmax", "muonmax_momo", "muonmax_momo:nuclear_norm=stale"),
)
LR = 1e-9
"""So small that the parameters stay what they are for all contenders."""
WEIGHT_DECAY = 0.1
"""One for all, so that all of them do the work."""
LOSS = 3.0
WARM_UP_STEPS = 2


@dataclass(frozen=True, slots=True)
class Contender:
    """One optimizer, ready to step.

    Args:
        name: As it was asked for, with options.
        step: Takes one step.
        note: What does not compare.
        polar: Method and number of steps of the polar factors; None if they are not ours.
        warm_up_steps: How many until a step is like all the later ones.
    """

    name: str
    step: Callable[[], object]
    note: str = ""
    polar: tuple[str, int] | None = None
    warm_up_steps: int = WARM_UP_STEPS


def build(shapes: str, device: torch.device) -> nn.Module:
    """Build a model of ``SHAPES`` with random float32 parameters."""
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(SHAPES[shapes], dtype=torch.float32).train()


def fill_gradients(model: nn.Module) -> None:
    """Give every parameter a normally distributed gradient, the same in every run."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(1)
    for p in model.parameters():
        p.grad = torch.empty_like(p).normal_(std=GRADIENT_SCALE, generator=generator)


def check(name: str) -> None:
    """Refuse a contender that cannot be made.

    Raises:
        ValueError: The method or an option is unknown, or a value out of range; the message names the known.
    """
    method, values = _read(name)
    if method not in TORCH_CONTENDERS:
        methods.resolve(method, **values)
    elif values:
        raise ValueError(f"contender {name}: {method} takes no options.")


def make(name: str, model: nn.Module) -> Contender:
    """Make a contender for all parameters of a model, with a state of its own.

    Raises:
        ValueError: As of ``check``.
    """
    check(name)
    if name == "adamw":
        return Contender(name, _adamw(model.parameters()).step)
    return _torch_muon(name, model) if name == "torch_muon" else _ours(name, model)


def matrix_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that the routing takes for matrices or stacks of them."""
    _, table = hf_noneuclid.route_parameters(model)
    named = dict(model.named_parameters())
    return [named[route.name] for route in table.matrices]


def matrices(model: nn.Module) -> list[Tensor]:
    """Return the gradients of all matrices, those of stacks one by one."""
    return [m for p in matrix_parameters(model) for m in p.grad.view(-1, *p.shape[-2:])]


def _read(name: str) -> tuple[str, dict[str, Any]]:
    """Method and options of ``method:option=value,option=value``."""
    method, _, text = name.partition(":")
    if method not in TORCH_CONTENDERS and method not in methods.all_names():
        known = ", ".join([*TORCH_CONTENDERS, *METHODS, methods.FREE_METHOD])
        raise ValueError(f"unknown contender {method!r}; known are {known}.")
    pairs = [option.partition("=") for option in text.split(",") if option]
    return method, methods.parse_options({option: value for option, _, value in pairs})


def _adamw(params: Iterable[Tensor]) -> torch.optim.AdamW:
    return torch.optim.AdamW(params, lr=LR, weight_decay=WEIGHT_DECAY, fused=True)


def _torch_muon(name: str, model: nn.Module) -> Contender:
    routed = matrix_parameters(model)
    taken = [p for p in routed if p.ndim == 2]
    ids = {id(p) for p in taken}
    muon = torch.optim.Muon(taken, lr=LR, weight_decay=WEIGHT_DECAY)
    adamw = _adamw(p for p in model.parameters() if id(p) not in ids)

    def step() -> None:
        muon.step()
        adamw.step()

    return Contender(name, step, _left_to_adamw([p for p in routed if p.ndim != 2]))


def _left_to_adamw(params: list[nn.Parameter]) -> str:
    if not params:
        return ""
    return (
        f"torch.optim.Muon takes matrices only: {len(params)} stacks or convolutions with "
        f"{sum(p.numel() for p in params):,} elements are left to AdamW, so its step does less"
    )


def _ours(name: str, model: nn.Module) -> Contender:
    method, values = _read(name)
    optimizer = hf_noneuclid.create_optimizer(model, method, lr=LR, weight_decay=WEIGHT_DECAY, **values)
    options = optimizer.param_groups[0]
    loss = torch.tensor(LOSS, device=options["params"][0].device)
    # Until a first good step is sure to have been taken, stale norms keep all polar factors in memory.
    settling = FATAL_RUN if options["nuclear_norm"] == "stale" else WARM_UP_STEPS
    return Contender(
        name,
        lambda: optimizer.step(loss=loss),
        polar=(options["polar_method"], options["polar_steps"]),
        warm_up_steps=settling,
    )
