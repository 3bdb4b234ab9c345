"""What a suite would run and cost, without running it or writing anything."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from hf_noneuclid.experiments.common import option_pairs
from hf_noneuclid.experiments.costs.engine_costs import plan_row
from hf_noneuclid.experiments.costs.layout_costs import ENGINES, Costs, grid_of, shapes_of
from hf_noneuclid.experiments.sweeping.execution import Launch, as_arguments, launcher, recipe_flags
from hf_noneuclid.experiments.sweeping.suite import Suite
from hf_noneuclid.experiments.sweeping.suite_checks import check_suite
from hf_noneuclid.experiments.sweeping.sweep_folder import run_folder
from hf_noneuclid.experiments.training.model import load_config
from hf_noneuclid.experiments.training.options import DataArguments, ModelArguments, RecipeArguments
from hf_noneuclid.methods import all_names, parse_options

FLOPS = 6  # a parameter and token: forward 2, backward 4; attention and polar factors are left out
COUNTED = "pretrain"  # the recipe whose models are known before anything is loaded
ADAM_BYTES = 8  # a parameter: two float32 moments


@dataclass(frozen=True)
class Vocabulary:
    """Stands in for a tokenizer that is not loaded: only its size and token ids are asked for."""

    size: int
    bos_token_id: int = 0
    eos_token_id: int = 0
    pad_token_id: None = None

    def __len__(self) -> int:
        return self.size


@dataclass(frozen=True)
class Cost:
    """Of one run: its length, the size of the model, and what a GPU holds without activations."""

    tokens_per_step: int
    steps: int | None
    parameters: int
    bytes_per_gpu: int

    @property
    def tokens(self) -> int | None:
        """Tokens trained on; None where that depends on the length of the text."""
        return None if self.steps is None else self.tokens_per_step * self.steps

    def gpu_hours(self, flops: float) -> float | None:
        """Hours of one GPU that does so many operations a second."""
        return None if self.tokens is None else FLOPS * self.parameters * self.tokens / flops / 3600


def show(suite: Suite, launch: Launch, folder: Path, flops: float) -> None:
    """Print every command, and what the runs cost.

    Args:
        suite: what would be run.
        launch: how.
        folder: of the output.
        flops: operations a second that a GPU is assumed to do.

    Raises:
        InputError: something the suite names does not exist.
    """
    check_suite(suite, launch.processes)
    first, possible = suite.runs(), suite.possible_runs()
    costs = {
        run: cost_of(recipe_flags(suite, run, launch.processes), launch)
        for run in possible
        if suite.recipe == COUNTED
    }
    for run in possible:
        flags = as_arguments(recipe_flags(suite, run, launch.processes))
        command = [*launcher(suite, launch), *flags, f"--output_dir={run_folder(folder, run)}"]
        where = f"{run.label}, learning rate {run.learning_rate:g}, seed {run.seed}"
        print(f"# {where}" + (f": {_words(costs[run], flops)}" if costs else ""))
        print(shlex.join(command))
    later = (
        ""
        if len(first) == len(possible)
        else (f" in the first pass; with further seeds near the best learning rates at most {len(possible)}")
    )
    print(f"# {len(first)} runs{later}")
    if not costs:
        print(f"# Costs are worked out for {COUNTED} only.")
        return
    print(f"# {_total([costs[run] for run in first], flops)}")
    print(
        f"# Assumed: {flops:.3g} FLOP/s of a GPU, {FLOPS} operations a parameter and token. Memory is "
        "without activations and the weights that an engine gathers."
    )


def cost_of(flags: Mapping[str, Any], launch: Launch) -> Cost:
    """Return what a run costs by its flags; nothing is loaded but a configuration.

    Raises:
        InputError: the model cannot be configured.
    """
    config = load_config(
        _model_arguments(flags), _vocabulary(flags), _value(flags, DataArguments, "block_size")
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    batch = _value(flags, RecipeArguments, "per_device_train_batch_size")
    accumulation = int(flags.get("gradient_accumulation_steps") or 1)
    steps = _value(flags, RecipeArguments, "max_steps")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Cost(
        batch * accumulation * launch.processes * _value(flags, DataArguments, "block_size"),
        steps if steps > 0 else None,
        parameters,
        _memory(model, flags, launch, parameters),
    )


def _memory(model: torch.nn.Module, flags: Mapping[str, Any], launch: Launch, parameters: int) -> int:
    """Return bytes of weights, gradients and optimizer state on the fullest GPU."""
    method, engine = flags["optim"], _engine(launch)
    if method not in all_names():
        shards = 1 if engine == "ddp" else launch.processes
        return (4 + 4 + ADAM_BYTES) * parameters // shards
    options = parse_options(option_pairs(flags.get("optim_args")))
    shapes = shapes_of(model, method, **options)
    grid = grid_of(engine, launch.processes, gpus_per_node=min(8, launch.processes))
    dtype = "bf16" if flags.get("bf16") else "fp32"
    device = "cuda" if launch.gpus or flags.get("bf16") else "cpu"
    held = plan_row(Costs(shapes, engine, grid, device), dtype)["memory_bytes"]
    return sum(held.values())


def _engine(launch: Launch) -> str:
    """Return the engine whose name the accelerate configuration bears; plain data parallelism otherwise."""
    stem = Path(launch.accelerate_config or "").stem
    return next((engine for engine in ENGINES if stem.startswith(engine)), "ddp")


def _model_arguments(flags: Mapping[str, Any]) -> ModelArguments:
    known = ModelArguments.__dataclass_fields__
    return ModelArguments(**{name: value for name, value in flags.items() if name in known})


def _vocabulary(flags: Mapping[str, Any]) -> Vocabulary:
    """Return the size of the vocabulary: a named tokenizer is taken to be the model type's own."""
    if flags.get("tokenizer_name") and flags.get("model_type") in CONFIG_MAPPING:
        return Vocabulary(CONFIG_MAPPING[flags["model_type"]]().vocab_size)
    if flags.get("model_name_or_path") or flags.get("config_name"):
        return Vocabulary(1)  # the configuration knows
    return Vocabulary(_value(flags, ModelArguments, "vocab_size"))


def _value(flags: Mapping[str, Any], kind: Any, name: str) -> int:
    value = flags.get(name)
    return int(kind.__dataclass_fields__[name].default if value is None else value)


def _words(cost: Cost, flops: float) -> str:
    tokens = "tokens by the length of the text" if cost.tokens is None else f"{cost.tokens:,} tokens"
    hours, steps = cost.gpu_hours(flops), "all" if cost.steps is None else f"{cost.steps:,}"
    return (
        f"{steps} steps of {cost.tokens_per_step:,} tokens, "
        f"{tokens}, {cost.parameters:,} parameters, {cost.bytes_per_gpu / 1e9:.3g} GB per GPU"
        + ("" if hours is None else f", {hours:.3g} GPU hours")
    )


def _total(costs: Sequence[Cost], flops: float) -> str:
    hours = [cost.gpu_hours(flops) for cost in costs]
    if any(value is None for value in hours):
        return "GPU hours depend on the length of the text: give max_steps"
    tokens = sum(cost.tokens or 0 for cost in costs)
    return f"{tokens:,} tokens, expected {sum(value or 0 for value in hours):.3g} GPU hours in the first pass"
