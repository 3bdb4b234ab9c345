"""What a suite would run and cost. Nothing is run or written."""

import shlex
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from hf_noneuclid.experiments.common import option_pairs
from hf_noneuclid.experiments.costs.engines import ENGINES, grid_of
from hf_noneuclid.experiments.costs.step import Costs, plan_row, shapes_of
from hf_noneuclid.experiments.sweeping.commands import Launch, as_arguments, launcher, recipe_flags
from hf_noneuclid.experiments.sweeping.execution import run_folder
from hf_noneuclid.experiments.sweeping.suite import Run, Suite
from hf_noneuclid.experiments.sweeping.suite_checks import check_suite, parser_of
from hf_noneuclid.experiments.training.model import load_config
from hf_noneuclid.experiments.training.options import ARGUMENT_TYPES
from hf_noneuclid.methods import all_names, parse_options

FLOPS = 6  # per parameter and token: forward 2, backward 4; without attention and polar factors
COUNTED = "pretrain"  # the recipe whose models are known before anything is loaded
ADAM_BYTES = 8  # per parameter: two float32 moments


@dataclass(frozen=True)
class Vocabulary:
    """Replaces a tokenizer that is not loaded; only its size and token ids are needed."""

    size: int
    bos_token_id: int = 0
    eos_token_id: int = 0
    pad_token_id: None = None

    def __len__(self) -> int:
        return self.size


@dataclass(frozen=True)
class Cost:
    """The cost of one run. The number of steps is None where it depends on the length of the text."""

    steps: int | None
    tokens_per_step: int
    parameters: int
    bytes_per_gpu: int  # of the fullest GPU, without activations
    flops: float  # per second of a GPU

    @property
    def tokens(self) -> int:
        """Tokens trained on, 0 where they are not known."""
        return self.tokens_per_step * (self.steps or 0)

    @property
    def gpu_hours(self) -> float:
        """Hours of one GPU."""
        return FLOPS * self.parameters * self.tokens / self.flops / 3600

    def __str__(self) -> str:
        steps = "as many steps as the text has" if self.steps is None else f"{self.steps:,} steps"
        total = "" if self.steps is None else f"{self.tokens:,} tokens, "
        hours = "" if self.steps is None else f", {self.gpu_hours:.3g} GPU hours"
        size = f"{self.parameters:,} parameters, {self.bytes_per_gpu / 1e9:.3g} GB per GPU"
        return f"{steps} of {self.tokens_per_step:,} tokens, {total}{size}{hours}"


def show(suite: Suite, launch: Launch, folder: Path, flops: float) -> None:
    """Prints the command and the cost of every run, on GPUs of so many operations per second.

    Raises:
        InputError: Something that the suite names does not exist.
    """
    check_suite(suite, launch.processes)
    first, possible = suite.runs(), suite.possible_runs()
    costs: dict[str, Cost] = {}
    for run in possible:
        flags = recipe_flags(suite, run, launch.processes)
        if suite.recipe == COUNTED and run.curve not in costs:  # rate and seed do not change the cost
            costs[run.curve] = cost_of(flags, launch, flops)
        print(f"# {run}" + (f": {costs[run.curve]}" if costs else ""))
        command = [*launcher(suite, launch), *as_arguments(flags), f"--output_dir={run_folder(folder, run)}"]
        print(shlex.join(command))
    more = f"; with the further seeds near the best learning rates, at most {len(possible)}"
    print(f"# {len(first)} runs in the first pass" + (more if len(possible) > len(first) else ""))
    print(f"# {_total(first, costs, flops)}")


def _total(runs: list[Run], costs: Mapping[str, Cost], flops: float) -> str:
    if not costs:
        return f"Costs are known for {COUNTED} only."
    found = [costs[run.curve] for run in runs]
    if any(cost.steps is None for cost in found):
        return "GPU hours depend on the length of the text: give max_steps"
    tokens, hours = sum(cost.tokens for cost in found), sum(cost.gpu_hours for cost in found)
    return (
        f"{tokens:,} tokens, expected {hours:.3g} GPU hours in the first pass\n# Assumed: {flops:.3g} FLOP/s "
        f"of a GPU, {FLOPS} operations per parameter and token. Memory is without activations and the "
        "weights that an engine gathers."
    )


def cost_of(flags: Mapping[str, Any], launch: Launch, flops: float) -> Cost:
    """The cost of a run of pretrain. Only a configuration is loaded.

    Raises:
        InputError: The model cannot be configured.
    """
    args = parser_of(COUNTED).parse_args(as_arguments(flags))
    model_type: Any = ARGUMENT_TYPES[COUNTED][0]
    model_args = model_type(**{name: getattr(args, name) for name in model_type.__dataclass_fields__})
    config = load_config(model_args, _vocabulary(args), args.block_size)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    sequences = args.per_device_train_batch_size * args.gradient_accumulation_steps * launch.processes
    return Cost(
        steps=args.max_steps if args.max_steps > 0 else None,
        tokens_per_step=sequences * args.block_size,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        bytes_per_gpu=_memory(model, args, launch),
        flops=flops,
    )


def _vocabulary(args: Namespace) -> Vocabulary:
    """The vocabulary of a run. A named tokenizer is assumed to be the model type's own."""
    if args.tokenizer_name and args.model_type in CONFIG_MAPPING:
        return Vocabulary(CONFIG_MAPPING[args.model_type]().vocab_size)
    known = args.model_name_or_path or args.config_name  # then the configuration has the size
    return Vocabulary(1 if known else args.vocab_size)


def _memory(model: torch.nn.Module, args: Namespace, launch: Launch) -> int:
    """Bytes of weights, gradients and optimizer state on the fullest GPU."""
    stem = Path(launch.accelerate_config or "").stem  # the configurations bear the name of their engine
    engine = next((engine for engine in ENGINES if stem.startswith(engine)), "ddp")
    if args.optim not in all_names():
        shards = 1 if engine == "ddp" else launch.processes
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return (4 + 4 + ADAM_BYTES) * parameters // shards
    shapes = shapes_of(model, args.optim, **parse_options(option_pairs(args.optim_args)))
    grid = grid_of(engine, launch.processes, gpus_per_node=min(8, launch.processes))
    device = "cuda" if launch.gpus or args.bf16 else "cpu"
    held = plan_row(Costs(shapes, engine, grid, device), "bf16" if args.bf16 else "fp32")["memory_bytes"]
    return int(sum(held.values()))
