"""The options of the recipes: where they come from and what makes sense together.

The defaults below hold unless the file given with `--config` overrides them, or the command line either.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser, TrainingArguments

from hf_noneuclid.experiments.common import ExitCode, InputError
from hf_noneuclid.experiments.secrets import scrub
from hf_noneuclid.experiments.training.hub_options import HubArguments
from hf_noneuclid.experiments.training.trackers import check_trackers


@dataclass
class ModelArguments:
    """Which model and tokenizer are trained."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Checkpoint to continue from (Hub name or folder). Weights are kept in float32."},
    )
    config_name: str | None = field(
        default=None,
        metadata={"help": "Train from scratch with this configuration (Hub name or folder)."},
    )
    model_type: str | None = field(
        default=None,
        metadata={
            "help": "Train from scratch with the default configuration of this type: gpt2, llama, ... "
            "With none of the three the model is the recipe's small GPT-2."
        },
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Changes to the configuration of a model from scratch: n_layer=6,n_embd=384"},
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={
            "help": "Tokenizer (Hub name or folder). Without one it is the checkpoint's; from scratch, a "
            "byte-level BPE trained on the training text."
        },
    )
    vocab_size: int = field(
        default=4096, metadata={"help": "Vocabulary of a tokenizer trained here (256 bytes at least)."}
    )
    tokenizer_documents: int = field(
        default=100_000, metadata={"help": "A tokenizer trained here sees this many documents at most."}
    )

    def __post_init__(self) -> None:
        sources = {name: getattr(self, name) for name in ("model_name_or_path", "config_name", "model_type")}
        given = [f"--{name}" for name, value in sources.items() if value]
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)} each name a model: give one of them")
        if self.model_name_or_path and self.config_overrides:
            raise InputError("--config_overrides is for a model from scratch, not for --model_name_or_path")
        if self.vocab_size < 257:
            raise InputError(
                f"--vocab_size {self.vocab_size}: 256 bytes and the end of text need at least 257"
            )


@dataclass
class DataArguments:
    """Which text is trained on. With neither a dataset nor files it is the embedded corpus."""

    dataset_name: str | None = field(default=None, metadata={"help": "Dataset (Hub name or folder)."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    dataset_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the dataset."}
    )
    text_column: str = field(default="text", metadata={"help": "Column of the dataset that holds the text."})
    train_split: str = field(default="train", metadata={"help": "Split trained on; train[:10%%] is allowed."})
    validation_split: str | None = field(
        default=None,
        metadata={
            "help": "Split evaluated on. Default: the first --validation_documents of the train split."
        },
    )
    validation_documents: int = field(
        default=1000,
        metadata={"help": "Documents held out of the train split when there is no validation split."},
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read the dataset while training (no download)."}
    )
    shuffle_buffer: int = field(
        default=10_000, metadata={"help": "Documents shuffled together when streaming; 0 keeps the order."}
    )
    train_files: list[str] | None = field(
        default=None, metadata={"help": "UTF-8 text files to train on; each file is one document."}
    )
    validation_files: list[str] | None = field(
        default=None,
        metadata={"help": "UTF-8 text files to evaluate on. Default: the last 5%% of each training file."},
    )
    block_size: int = field(default=256, metadata={"help": "Tokens in a training sequence."})
    eval_blocks: int = field(
        default=32, metadata={"help": "Validation blocks, evenly spread, evaluated while training."}
    )
    max_validation_blocks: int | None = field(
        default=None, metadata={"help": "Cut the validation part off after this many blocks."}
    )

    def __post_init__(self) -> None:
        if self.dataset_name and self.train_files:
            raise InputError("--dataset_name and --train_files each name a corpus: give one of them")
        if self.validation_files and not self.train_files:
            raise InputError("--validation_files needs --train_files")
        if self.streaming and not self.dataset_name:
            raise InputError("--streaming needs --dataset_name")
        for name in ("validation_documents", "block_size", "eval_blocks", "max_validation_blocks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name} must be at least 1, not {value}")
        if self.shuffle_buffer < 0:
            raise InputError(f"--shuffle_buffer must not be negative, not {self.shuffle_buffer}")


@dataclass
class RecipeArguments(HubArguments, TrainingArguments):
    """The Trainer's own arguments with the recipe's defaults, and what the recipe adds to them."""

    output_dir: str | None = field(
        default="outputs/pretrain",
        metadata={"help": "Where checkpoints, the model, metrics.json and curves.png go."},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Delete what an earlier run left in the output folder."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "true: go on from the last checkpoint of the output folder; or a path."},
    )
    global_batch_size: int | None = field(
        default=None,
        metadata={"help": "Sequences a step on all devices together; an error if the other options differ."},
    )
    decay_fraction: float = field(
        default=0.6,
        metadata={"help": "Last part of the steps over which warmup_stable_decay lowers the learning rate."},
    )
    sample_tokens: int = field(
        default=120, metadata={"help": "Length of the text generated at the end; 0 for none."}
    )
    prompt: str | None = field(
        default=None, metadata={"help": "Start of that text. Default: the start of the validation part."}
    )

    optim: str = field(
        default="muonmax_momo", metadata={"help": "A method of hf_noneuclid or an optimizer of the Trainer."}
    )
    learning_rate: float = field(default=1e-2, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(
        default="warmup_stable_decay",
        metadata={"help": "Without lr_scheduler_kwargs: constant, then linear down to 10%% of the peak."},
    )
    max_grad_norm: float = field(default=1.0, metadata={"help": "Largest norm of the gradient."})
    max_steps: int = field(default=200, metadata={"help": "Steps; -1 to train for num_train_epochs instead."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Sequences a step and device."})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "Sequences an evaluation step."})
    # The Trainer's own default, True, searches the graph in every step; a causal model uses all its weights.
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Look for weights without a gradient under DDP."}
    )
    logging_steps: float = field(default=5, metadata={"help": "Steps between logs; below 1 a part of all."})
    # The filter shows the mean so far in place of a NaN: a diverged run would look healthy.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Leave NaN out of logged losses."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate: no, steps, epoch."})
    eval_steps: float | None = field(
        default=0.2, metadata={"help": "Steps between evaluations; below 1 a part of all steps."}
    )
    save_steps: float = field(
        default=0.5, metadata={"help": "Steps between checkpoints; below 1 a part of all steps."}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data_seed is None:
            self.data_seed = self.seed
        self.dataloader_pin_memory &= self.device.type != "cpu"  # torch warns of it at every evaluation
        if self.max_steps < 1 and self.max_steps != -1:
            raise InputError(
                f"--max_steps must be at least 1, or -1 to train for --num_train_epochs, not {self.max_steps}"
            )
        if not 0.0 <= self.decay_fraction <= 1.0:
            raise InputError(f"--decay_fraction must lie in [0, 1], not {self.decay_fraction}")
        if str(self.resume_from_checkpoint).lower() in ("none", "false", ""):
            self.resume_from_checkpoint = None
        self._check_global_batch_size()
        check_trackers(self.report_to)

    def changed(self) -> dict[str, Any]:
        """Return what differs from the plain Trainer's defaults, and the recipe's own options."""
        plain = {item.name: item.default for item in fields(TrainingArguments)}
        values = {key: value for key, value in self.to_dict().items() if not key.endswith("_token")}
        return {key: value for key, value in values.items() if key not in plain or value != plain[key]}

    @property
    def sequences_per_step(self) -> int:
        """The global batch size: sequences in a step on all devices together."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size

    def _check_global_batch_size(self) -> None:
        if self.global_batch_size not in (None, self.sequences_per_step):
            factors = {
                "per_device_train_batch_size": self.per_device_train_batch_size,
                "gradient_accumulation_steps": self.gradient_accumulation_steps,
                "devices": self.world_size * max(1, self.n_gpu),
            }
            product = " x ".join(f"{value} ({name})" for name, value in factors.items())
            raise InputError(
                f"--global_batch_size {self.global_batch_size} is not {product} = {self.sequences_per_step}: "
                f"change --per_device_train_batch_size or --gradient_accumulation_steps"
            )


ARGUMENT_TYPES = (ModelArguments, DataArguments, RecipeArguments)


class _Parser(HfArgumentParser):
    """The Trainer's usage text is several pages: an error is one message."""

    def error(self, message: str) -> NoReturn:
        self.exit(ExitCode.BAD_INPUT, f"{self.prog}: error: {scrub(message)} (--help lists every option)\n")


def parse(
    argv: Sequence[str], argument_types: Sequence[type] = ARGUMENT_TYPES, recipe: str = "pretrain.py"
) -> tuple[Any, ...]:
    """Parse the command line, on top of the YAML file it may name with `--config`.

    Args:
        argv: the command line.
        argument_types: dataclasses; one instance of each is returned.
        recipe: name of the script, for messages where the process has none.

    Raises:
        SystemExit: an unknown option or a value that cannot be used; the message says which.
    """
    parser = _Parser(argument_types, prog=Path(sys.argv[0]).name or recipe, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE.yaml", help="Defaults that the command line overrides.")
    config = read_config(argv, parser)
    try:
        *parsed, _, unknown = parser.parse_args_into_dataclasses(
            [*_as_arguments(config, parser), *argv], return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, TypeError, ImportError) as error:  # the Trainer's own checks of its arguments
        parser.error(str(error))
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    return tuple(parsed)


def read_config(argv: Sequence[str], parser: argparse.ArgumentParser | None = None) -> dict[str, Any]:
    """Return what the YAML file named by `--config` holds, {} without one."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    path = finder.parse_known_args(argv)[0].config
    if path is None:
        return {}
    parser = parser or finder
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        parser.error(f"--config {path}: {error}")
    if not isinstance(values, dict):
        parser.error(f"--config {path}: expected `option: value` lines, found a {type(values).__name__}")
    return values


def _as_arguments(config: dict[str, Any], parser: argparse.ArgumentParser) -> list[str]:
    """Write YAML values as command-line arguments, so that they are checked in the same way."""
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    unknown = sorted(str(key) for key in config if key not in actions)
    if unknown:
        parser.error(f"unknown keys in the --config file: {', '.join(unknown)}")
    arguments: list[str] = []
    for key, value in config.items():
        if isinstance(value, list) and actions[key].nargs == "+":
            arguments += [f"--{key}", *map(str, value)]
        elif isinstance(value, list):  # has no form on the command line
            parser.set_defaults(**{key: value})
        elif value is not None:
            text = json.dumps(value) if isinstance(value, dict | bool) else str(value)
            arguments.append(f"--{key}={text}")
    return arguments
