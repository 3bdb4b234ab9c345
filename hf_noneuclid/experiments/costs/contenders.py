"""The optimizers that ``noneuclid benchmark`` compares, all on the same parameters and gradients."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import hf_noneuclid
from hf_noneuclid import METHODS, methods
from hf_noneuclid.diagnostics import FATAL_RUN
from hf_noneuclid.experiments.common import option_pairs

TORCH_CONTENDERS = ("adamw", "torch_muon")
DEFAULT_CONTENDERS = (
    *TORCH_CONTENDERS,
    *("muon", "muonmax", "muonmax_momo", "muonmax_momo:nuclear_norm=stale"),
)
LR = 1e-9  # so small that the parameters stay the same for all contenders
WEIGHT_DECAY = 0.1  # the same for all, so that all do the same work
WARM_UP_STEPS = 2


@dataclass(frozen=True, slots=True)
class Contender:
    """One optimizer, ready to step."""

    name: str
    """With its options, as the user gave it."""
    step: Callable[[], object]
    note: str = ""
    """Says where the comparison is not fair."""
    warm_up_steps: int = WARM_UP_STEPS
    """The number of steps before a step costs what all later ones cost."""


def fill_gradients(model: nn.Module) -> None:
    """Gives every parameter a normally distributed gradient, the same in every run."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(1)
    for p in model.parameters():
        p.grad = torch.empty_like(p).normal_(std=1e-2, generator=generator)


def matrix_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that the routing takes as matrices or stacks of matrices."""
    _, table = hf_noneuclid.route_parameters(model)
    named = dict(model.named_parameters())
    return [named[route.name] for route in table.matrices]


def make(name: str, model: nn.Module) -> Contender:
    """Makes a contender for all parameters of a model, with a state of its own.

    Args:
        name: ``adamw``, ``torch_muon``, or a method as ``method:option=value,option=value``.
        model: With gradients.

    Raises:
        ValueError: The method or an option is unknown (the message lists the known ones), or a value is out
            of range.
    """
    method, _, options = name.partition(":")
    if name == "adamw":
        return Contender(name, _adamw(model.parameters()).step)
    if name == "torch_muon":
        return _torch_muon(name, model)
    if method not in methods.all_names():
        known = ", ".join([*TORCH_CONTENDERS, *METHODS, methods.FREE_METHOD])
        raise ValueError(
            f"unknown contender {name!r}; known are {known}. {' and '.join(TORCH_CONTENDERS)} take no "
            "options."
        )
    return _ours(name, model, method, options)


def _adamw(params: Iterable[Tensor]) -> torch.optim.AdamW:
    return torch.optim.AdamW(params, lr=LR, weight_decay=WEIGHT_DECAY, fused=True)


def _torch_muon(name: str, model: nn.Module) -> Contender:
    routed = matrix_parameters(model)
    taken, left = [p for p in routed if p.ndim == 2], [p for p in routed if p.ndim != 2]
    ids = {id(p) for p in taken}
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(taken, lr=LR, weight_decay=WEIGHT_DECAY),
        _adamw(p for p in model.parameters() if id(p) not in ids),
    ]
    note = (
        f"torch.optim.Muon takes matrices only: {len(left)} stacks or convolutions with "
        f"{sum(p.numel() for p in left):,} elements are left to AdamW, so its step does less"
    )
    return Contender(name, lambda: [optimizer.step() for optimizer in optimizers], note if left else "")


def _ours(name: str, model: nn.Module, method: str, options: str) -> Contender:
    values = methods.parse_options(option_pairs(options))
    optimizer = hf_noneuclid.create_optimizer(model, method, lr=LR, weight_decay=WEIGHT_DECAY, **values)
    loss = torch.tensor(3.0, device=next(model.parameters()).device)
    # Stale norms keep all polar factors in memory until a first good step is sure to have been taken.
    is_stale = optimizer.param_groups[0]["nuclear_norm"] == "stale"
    return Contender(
        name, lambda: optimizer.step(loss=loss), warm_up_steps=FATAL_RUN if is_stale else WARM_UP_STEPS
    )
