"""What a suite would run and cost. Nothing is run or written."""

import shlex
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from hf_noneuclid.experiments.sweeping.commands import Launch, as_arguments, command_of, recipe_flags
from hf_noneuclid.experiments.sweeping.execution import START, run_folder
from hf_noneuclid.experiments.sweeping.suite import Result, Suite
from hf_noneuclid.experiments.sweeping.suite_checks import check_suite, parser_of
from hf_noneuclid.experiments.training.model import load_config
from hf_noneuclid.experiments.training.options import ARGUMENT_TYPES

OF_MODEL = ("model_name_or_path", "model_type", "config_overrides")
FLOPS = 6  # per parameter and token: forward 2, backward 4; without attention and polar factors


def show(suite: Suite, launch: Launch, folder: Path, flops: float, found: Iterable[Result]) -> None:
    """Prints the command and the cost of every run, on GPUs of so many operations per second.

    Tokens are known for pretraining only: the models of the other recipes have to be loaded first. The hours
    on a CPU are told from the results that were found.

    Raises:
        InputError: Something that the suite names does not exist.
    """
    check_suite(suite, launch.processes)
    first, possible = suite.runs(), suite.possible_runs()
    on_cpu = suite.options.get("use_cpu")
    costs: dict[str, tuple[str, int, float]] = {}
    if suite.start:
        print("# First, the model that every run starts from")
        print(shlex.join([*command_of("pretrain", launch, suite.start), f"--output_dir={folder / START}"]))
    for run in possible:
        flags = recipe_flags(suite, run, launch.processes)
        if suite.recipe == "pretrain" and run.curve not in costs:  # rate and seed do not change the cost
            model = {name: suite.start.get(name) for name in OF_MODEL if suite.start}  # is not there yet
            costs[run.curve] = cost_of({**flags, **model}, launch.processes, None if on_cpu else flops)
        print(f"# {run}" + (f": {costs[run.curve][0]}" if costs else ""))
        command = [*command_of(suite.recipe, launch, flags), f"--output_dir={run_folder(folder, run)}"]
        print(shlex.join(command))
    more = f"; with what the best learning rates call for, at most {len(possible)}"
    print(f"# {len(first)} runs in the first pass" + (more if len(possible) > len(first) else ""))
    if costs:
        tokens = sum(costs[run.curve][1] for run in first)
        print(f"# {tokens:,} tokens in the first pass, without runs that have no max_steps")
    if on_cpu:
        print(f"# {cpu_hours(suite, launch, found)}")
    elif costs:
        hours = sum(costs[run.curve][2] for run in first)
        print(f"# Expected {hours:.3g} GPU hours in the first pass")
        print(f"# Assumed: {flops:.3g} FLOP/s of a GPU, {FLOPS} operations per parameter and token")


def cpu_hours(suite: Suite, launch: Launch, found: Iterable[Result]) -> str:
    """What the first pass takes, in words: by the finished runs of a curve, or by all where it has none."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for result in found:
        if result.state == "done" and result.seconds is not None:
            seconds[result.run.curve].append(result.seconds)
    if not seconds:
        return "CPU hours are not known until a first run has finished"
    measured = [value for values in seconds.values() for value in values]
    total = sum(fmean(seconds.get(run.curve, measured)) for run in suite.runs())
    hours = total * launch.processes * launch.threads / 3600
    return f"Expected {hours:.3g} CPU hours in the first pass, as {len(measured)} finished runs took"


def cost_of(flags: Mapping[str, Any], processes: int, flops: float | None) -> tuple[str, int, float]:
    """The cost of a run of pretrain: in words, its tokens, and its GPU hours, 0 without a speed of the GPU.

    Only a configuration is loaded.

    Raises:
        InputError: The model cannot be configured.
    """
    args = parser_of("pretrain").parse_args(as_arguments(flags))
    model_type: Any = ARGUMENT_TYPES["pretrain"][0]
    model_args = model_type(**{item.name: getattr(args, item.name) for item in fields(model_type)})
    if args.tokenizer_name and args.model_type in CONFIG_MAPPING:
        size = CONFIG_MAPPING[args.model_type]().vocab_size  # assumed: the tokenizer of this model type
    else:  # a named configuration has the size
        size = 1 if args.model_name_or_path or args.config_name else args.vocab_size
    words = Tokenizer(WordLevel({str(token): token for token in range(size)}))
    config = load_config(model_args, PreTrainedTokenizerFast(tokenizer_object=words), args.block_size)
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    sequences = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    batch = sequences * args.block_size
    if args.max_steps < 1:
        return f"{batch:,} tokens a step, {parameters:,} parameters", 0, 0.0
    tokens = args.max_steps * batch
    cost = f"{args.max_steps:,} steps of {batch:,} tokens, {tokens:,} tokens, {parameters:,} parameters"
    if flops is None:
        return cost, tokens, 0.0
    hours = FLOPS * parameters * tokens / flops / 3600
    return f"{cost}, {hours:.3g} GPU hours", tokens, hours
