"""The options of the recipes: the defaults, then the file of ``--config``, then the command line."""

import argparse
import inspect
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn

import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from hf_noneuclid.experiments import common, secrets
from hf_noneuclid.experiments.common import ExitCode, InputError, require
from hf_noneuclid.experiments.training import arguments
from hf_noneuclid.experiments.training.arguments import DEFAULT_MODEL as DEFAULT_MODEL
from hf_noneuclid.experiments.training.arguments import option
from hf_noneuclid.methods import all_names, default_learning_rate, step_size_of

MORE = "Options of the Trainer, such as --seed, --bf16, --warmup_steps and --push_to_hub: see --help_all."
OUTPUT = "Where checkpoints, the model, metrics.json and curves.png go."


@dataclass
class RecipeArguments(TrainingArguments):
    """The Trainer's own arguments with the defaults of the recipes, and what they add to them."""

    _argument_group_name: ClassVar[str] = "training"
    plain_learning_rate: ClassVar[float | None] = 1e-2
    """Where the learning rate alone decides how long steps are; None: the preset's."""

    output_dir: str = option(DEFAULT_MODEL, OUTPUT)
    overwrite_output_dir: bool = option(False, "Delete what an earlier run left in the output folder.")
    resume_from_checkpoint: str | None = option(None, "true: from the last checkpoint there; or a path.")
    global_batch_size: int | None = option(None, "Sequences in a step on all devices together; only checked.")
    decay_fraction: float = option(0.6, "Last part of the steps, in which the learning rate goes down.")
    peer: Literal["prodigy", "momo_adam"] | None = option(
        None, "Optimizer to compare with, used instead of --optim; from the extra peers."
    )
    overwrite_hub_model: bool = option(False, "Replace another model that the repository on the Hub holds.")
    hub_license: str | None = option(None, "Licence of the weights for the model card: apache-2.0, mit, ...")
    data_license: str | None = option(None, "Licence of the data for the model card, where it is not known.")

    optim: str = option("muonmax_momo", "A method of hf_noneuclid or an optimizer of the Trainer.")
    optim_args: str | None = option(None, "Options of the method: nuclear_norm=stale,momentum=0.9")
    learning_rate: float | None = option(
        None, "Peak learning rate. Default: 1.0 where it only bounds the step size, otherwise 0.01."
    )
    lr_scheduler_type: str = option(
        "warmup_stable_decay", "Without lr_scheduler_kwargs: constant, then linear down to 10%% of the peak."
    )
    max_grad_norm: float = option(1.0, "Largest norm of the gradient.")
    max_steps: int = option(200, "Steps; -1 to train for num_train_epochs instead.")
    per_device_train_batch_size: int = option(8, "Sequences in a step on each device.")
    per_device_eval_batch_size: int = option(8, "Sequences in an evaluation step on each device.")
    data_seed: int | None = option(None, "Seed of the order of the data. Default: --seed.")
    # The Trainer's own default, True, searches the graph in every step; these models use all their weights.
    ddp_find_unused_parameters: bool | None = option(False, "Look for weights without a gradient under DDP.")
    logging_steps: float = option(5, "Steps between logs; below 1 a part of all.")
    # The filter replaces a NaN by the mean so far: a diverged run would look healthy.
    logging_nan_inf_filter: bool = option(False, "Leave NaN out of logged losses.")
    eval_strategy: str = option("steps", "When to evaluate: no, steps, epoch.")
    eval_steps: float | None = option(0.2, "Steps between evaluations; below 1 a part of all steps.")
    save_steps: float = option(0.5, "Steps between checkpoints; below 1 a part of all steps.")
    save_total_limit: int | None = option(2, "Checkpoints kept.")

    def __post_init__(self) -> None:
        secrets.keep_token(self)
        if self.peer:
            self.optim = "adamw_torch"  # so that no method of ours is prepared
        if self.learning_rate is None:
            ours = default_learning_rate(self.step_size or "rate")
            self.learning_rate = self.plain_learning_rate if ours is None else ours
        super().__post_init__()
        if self.max_steps > 0:  # Schedule-Free reads the warm-up as a number of steps
            self.warmup_steps = self.get_warmup_steps(self.max_steps)
        self.data_seed = self.seed if self.data_seed is None else self.data_seed
        self.dataloader_pin_memory &= self.device.type != "cpu"  # torch warns of it at every evaluation
        if str(self.resume_from_checkpoint).lower() in ("none", "false", ""):
            self.resume_from_checkpoint = None
        needed = (
            f"--max_steps must be at least 1, or -1 to train for --num_train_epochs, not {self.max_steps}"
        )
        require(self.max_steps >= 1 or self.max_steps == -1, needed)
        in_range = 0.0 <= self.decay_fraction <= 1.0
        require(in_range, f"--decay_fraction must lie in [0, 1], not {self.decay_fraction}")
        if self.global_batch_size not in (None, self.sequences_per_step):
            raise InputError(
                f"--global_batch_size {self.global_batch_size} is not {self.per_device_train_batch_size} "
                f"(per_device_train_batch_size) x {self.gradient_accumulation_steps} "
                f"(gradient_accumulation_steps) x {self.world_size * max(1, self.n_gpu)} (devices) = "
                f"{self.sequences_per_step}: change one of the first two"
            )
        try:  # the Trainer would complain only after model and data are loaded
            get_reporting_integration_callbacks(self.report_to)
        except ValueError as error:
            raise InputError(f"--report_to: {error}") from error

    def changed(self) -> dict[str, Any]:
        """The options that differ from the plain Trainer's defaults, and those that recipes add."""
        plain = {item.name: item.default for item in fields(TrainingArguments)}
        values = {key: value for key, value in self.to_dict().items() if not key.endswith("_token")}
        return {key: value for key, value in values.items() if key not in plain or value != plain[key]}

    @property
    def method(self) -> str:
        """The name given with --optim, which the Trainer makes a member of an enumeration."""
        return self.peer or str(getattr(self.optim, "value", self.optim))

    @property
    def step_size(self) -> str | None:
        """What bounds the step size; None for an optimizer that is not of this package."""
        given = common.option_pairs(self.optim_args)
        return step_size_of(self.method, given) if self.method in all_names() else None

    @property
    def sequences_per_step(self) -> int:
        """The global batch size: sequences in a step on all devices together."""
        return int(self.train_batch_size * self.gradient_accumulation_steps * self.world_size)


@dataclass
class SampleArguments:
    """The text that a language model writes at the end."""

    sample_tokens: int = option(120, "Length of the text generated at the end; 0 for none.")
    prompt: str | None = option(None, "Start of that text. Default: the start of the validation part.")


@dataclass
class PretrainArguments(SampleArguments, RecipeArguments):
    """How pretrain.py trains."""

    loss_reduction: Literal["mean", "sum"] = option("mean", "Over the tokens of a step, when training.")


@dataclass
class ClassifyArguments(RecipeArguments):
    """How classify.py trains."""

    plain_learning_rate: ClassVar[float | None] = None

    output_dir: str = option("outputs/classify", OUTPUT)
    learning_rate: float | None = option(
        None, "Peak learning rate. Default: 1.0 where it only bounds the step size, otherwise the preset's."
    )
    preset: bool = option(True, "Take options of our methods that are not given from training/presets.py.")
    max_steps: int = option(60, "Steps; -1 to train for num_train_epochs instead.")
    include_num_input_tokens_seen: str = option("all", "Which tokens are counted: all, non_padding, no.")


@dataclass
class FinetuneArguments(SampleArguments, ClassifyArguments):
    """How finetune.py trains: as classify.py, and it writes a text."""

    output_dir: str = option("outputs/finetune", OUTPUT)


@dataclass
class DigitsArguments(RecipeArguments):
    """How digits.py trains."""

    output_dir: str = option("outputs/digits", OUTPUT)
    max_steps: int = option(300, "Steps; -1 to train for num_train_epochs instead.")
    per_device_train_batch_size: int = option(32, "Images in a step on each device.")


ARGUMENT_TYPES: dict[str, tuple[type, ...]] = {
    "pretrain": (arguments.ModelArguments, arguments.DataArguments, PretrainArguments),
    "finetune": (arguments.PretrainedArguments, arguments.FinetuneDataArguments, FinetuneArguments),
    "classify": (arguments.PretrainedArguments, arguments.ClassifyDataArguments, ClassifyArguments),
    "digits": (arguments.VisionArguments, DigitsArguments),
}
"""The arguments of each recipe: of the model, of the data, and of the Trainer."""


# ---------------------------------------------------------------- parsing


class _Parser(HfArgumentParser):
    """A parser whose help has the recipe's own options in groups, and the Trainer's only where it is told to.

    It prints errors without its usage text, which has several pages.
    """

    def __init__(self, types: Sequence[type], shows_all: bool = False) -> None:
        texts = {"prog": Path(sys.argv[0]).name, "usage": "%(prog)s [--option value ...]", "epilog": MORE}
        super().__init__(types, allow_abbrev=False, formatter_class=argparse.HelpFormatter, **texts)
        for action in self._actions[1:]:  # the first one is --help
            action.option_strings = action.option_strings[:1]  # only the help reads them: hyphens still work
            if action.nargs == 0:  # --no_packing for --packing false
                action.help = argparse.SUPPRESS
            elif action.default is not None:
                action.help = f"{action.help} (default: %(default)s)"
        self.add_argument("--help_all", action="help", help="show the options of the Trainer, too, and exit")
        self.add_argument("--config", metavar="FILE.yaml", help="defaults that the command line overrides")
        classes = [base for base in types[-1].__mro__ if base not in TrainingArguments.__mro__]
        own = {name for base in classes for name in inspect.get_annotations(base)}
        group = self._action_groups[-1]
        actions, group._group_actions = group._group_actions, []
        others = self.add_argument_group("all others, of the Trainer")
        for action in actions:
            if action.dest in own or shows_all:
                (group if action.dest in own else others)._group_actions.append(action)

    def error(self, message: str) -> NoReturn:
        print(
            f"{self.prog}: error: {secrets.scrub(message)} (--help_all lists every option)", file=sys.stderr
        )
        raise SystemExit(ExitCode.BAD_INPUT)


def parse(argv: Sequence[str], types: Sequence[type]) -> tuple[Any, ...]:
    """Parses a command line, on top of the YAML file of ``--config``: an instance of each type.

    Raises:
        SystemExit: An option is unknown, or its value cannot be used; the message says which.
    """
    parser = _Parser(types, shows_all="--help_all" in argv)
    try:
        _set_defaults(parser, read_config(argv))
        *parsed, _, unknown = parser.parse_args_into_dataclasses(
            list(argv), return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, TypeError, ImportError) as error:  # the Trainer's own checks of its arguments
        parser.error(str(error))
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    return tuple(parsed)


def read_config(argv: Sequence[str]) -> dict[str, Any]:
    """What the YAML file of ``--config`` holds; empty without one."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    path = finder.parse_known_args(argv)[0].config
    if path is None:
        return {}
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--config {path}: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"--config {path}: expected `option: value` lines, found a {type(values).__name__}")
    return values


def _set_defaults(parser: argparse.ArgumentParser, config: dict[str, Any]) -> None:
    """Makes YAML values the defaults, as texts: argparse checks those as it checks the command line."""
    known = {action.dest for action in parser._actions} - {"help", "help_all", "config"}
    unknown = ", ".join(sorted(str(key) for key in config if key not in known))
    require(not unknown, f"unknown keys in the --config file: {unknown}")
    for key, value in config.items():
        if value is not None:
            text = json.dumps(value) if isinstance(value, dict | bool) else str(value)
            parser.set_defaults(**{key: value if isinstance(value, list) else text})


def given(argv: Sequence[str], recipe: str, other: str) -> dict[str, Any]:
    """The options that a command line of one recipe gives, without secrets, as far as another knows them."""
    parser = _Parser(ARGUMENT_TYPES[recipe])
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    values = {**read_config(argv), **vars(parser.parse_args(list(argv)))}
    known = {item.name for kind in ARGUMENT_TYPES[other] for item in fields(kind)}
    return {
        name: value
        for name, value in values.items()
        if name in known and not secrets.holds_secret(name, value)
    }


def describe_call(recipe: str, argv: Sequence[str]) -> dict[str, Any]:
    """How a recipe was called, for metrics.json, without any secret."""
    command, config = secrets.redact_arguments(argv), secrets.scrub(read_config(argv))
    return {"recipe": recipe, "command": command, "config": config, **common.describe_commit()}
