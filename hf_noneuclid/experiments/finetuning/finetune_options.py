"""The options of the fine-tuning recipe, on top of those of training/options.py."""

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_noneuclid.experiments.common import InputError
from hf_noneuclid.experiments.training.base_model import describe_base
from hf_noneuclid.experiments.training.options import RecipeArguments

TASKS = ("causal_lm", "classification")
EMBEDDED_CLASSES = ("library", "domain")
DEFAULT_MODEL = "outputs/pretrain"
ALL_LINEAR = "all-linear"


@dataclass
class FinetuneModelArguments:
    """Which pretrained model goes on, and which of its weights."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": f"Checkpoint (Hub name or folder). Default: {DEFAULT_MODEL}, of pretrain.py."},
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model."})
    model_package: str | None = field(
        default=None, metadata={"help": "Installed Python package whose folder holds the checkpoint."}
    )
    gguf_file: str | None = field(
        default=None, metadata={"help": "GGUF file of the checkpoint; its weights become float32."}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer (Hub name or folder). Default: the checkpoint's."}
    )
    lora_rank: int = field(default=0, metadata={"help": "Rank of LoRA adapters; 0 trains all weights."})
    lora_alpha: float | None = field(
        default=None, metadata={"help": "Adapters count alpha / rank times. Default: twice the rank."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: [ALL_LINEAR],
        metadata={
            "help": "Names of the layers with adapters, as q_proj v_proj. Default: every linear layer."
        },
    )
    lora_merge: bool = field(
        default=False,
        metadata={"help": "Save the whole model, adapters added in. Always so for GGUF checkpoints."},
    )

    def __post_init__(self) -> None:
        if self.model_name_or_path and self.model_package:
            raise InputError("--model_name_or_path and --model_package each name a model: give one of them")
        if self.lora_rank < 0:
            raise InputError(f"--lora_rank must not be negative, not {self.lora_rank}")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise InputError(f"--lora_dropout must lie in [0, 1), not {self.lora_dropout}")
        if self.lora_alpha is not None and self.lora_alpha <= 0:
            raise InputError(f"--lora_alpha must be above 0, not {self.lora_alpha}")
        if not self.lora_target_modules:
            raise InputError("--lora_target_modules names no layer")

    @property
    def path(self) -> str:
        """The folder or Hub name of the checkpoint.

        Raises:
            InputError: there is no such package.
        """
        if not self.model_package:
            return self.model_name_or_path or DEFAULT_MODEL
        package = importlib.util.find_spec(self.model_package)
        if package is None or package.origin is None:
            raise InputError(f"--model_package {self.model_package}: no such package is installed")
        return str(Path(package.origin).parent)

    @property
    def base(self) -> dict[str, Any]:
        """The checkpoint for metrics.json (`describe_base`)."""
        return describe_base(self.path, self.model_revision, self.model_package, self.gguf_file)

    @property
    def merges(self) -> bool:
        """Whether adapters end up in the weights: an adapter does not say which GGUF file it is for."""
        return self.lora_rank > 0 and (self.lora_merge or bool(self.gguf_file))


@dataclass
class FinetuneDataArguments:
    """The task and its data. With neither a dataset nor files: docstrings of torch and transformers."""

    task: str | None = field(
        default=None,
        metadata={"help": "causal_lm or classification. With none, and no data named: first one, then both."},
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Dataset (Hub name or folder)."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    dataset_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the dataset."}
    )
    train_split: str = field(default="train", metadata={"help": "Split trained on; train[:10%%] is allowed."})
    validation_split: str | None = field(default=None, metadata={"help": "Split evaluated on."})
    train_files: list[str] | None = field(
        default=None, metadata={"help": "json, jsonl, csv or txt files (a line is a row) to train on."}
    )
    validation_files: list[str] | None = field(default=None, metadata={"help": "Files to evaluate on."})
    validation_share: float = field(
        default=0.05, metadata={"help": "Part of the rows held out where no validation data is named."}
    )
    max_train_rows: int | None = field(default=None, metadata={"help": "Train on this many rows at most."})
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    prompt_column: str | None = field(
        default=None, metadata={"help": "Column of prompts; only the responses are trained on."}
    )
    response_column: str | None = field(default=None, metadata={"help": "Column of responses."})
    label_column: str = field(default="label", metadata={"help": "Column of classes (classification)."})
    embedded_classes: str = field(
        default="library",
        metadata={
            "help": "Classes of the embedded texts: library (docstrings of torch or transformers) or domain "
            "(docstrings or verses)."
        },
    )
    old_domain_files: list[str] | None = field(
        default=None,
        metadata={"help": "Text files of what the model knew before, to see what it forgets (causal_lm)."},
    )
    block_size: int = field(default=256, metadata={"help": "Tokens in a training sequence, at most."})
    packing: bool = field(
        default=True, metadata={"help": "Fill sequences with several texts or examples (causal_lm)."}
    )
    eval_blocks: int = field(
        default=32, metadata={"help": "Validation sequences, evenly spread, evaluated while training."}
    )
    max_validation_blocks: int | None = field(
        default=None, metadata={"help": "Evaluate on this many sequences at most."}
    )

    def __post_init__(self) -> None:
        if self.task not in (None, *TASKS):
            raise InputError(f"unknown --task {self.task!r}: it is one of {', '.join(TASKS)}")
        if self.task is None and not self.embedded:
            raise InputError(f"--task is missing: one of {', '.join(TASKS)}")
        if self.embedded_classes not in EMBEDDED_CLASSES:
            known = ", ".join(EMBEDDED_CLASSES)
            raise InputError(f"unknown --embedded_classes {self.embedded_classes!r}: it is one of {known}")
        if self.dataset_name and self.train_files:
            raise InputError("--dataset_name and --train_files each name the data: give one of them")
        if self.validation_files and not self.train_files:
            raise InputError("--validation_files needs --train_files")
        if (self.prompt_column is None) != (self.response_column is None):
            raise InputError("--prompt_column and --response_column belong together: give both")
        if self.task == "classification" and (self.prompt_column or self.old_domain_files):
            raise InputError("--prompt_column and --old_domain_files are for --task causal_lm")
        self._check_numbers()

    @property
    def embedded(self) -> bool:
        """Whether the data are the docstrings of the installed packages."""
        return not self.dataset_name and not self.train_files

    @property
    def columns(self) -> dict[str, str]:
        """The columns that the task needs, by the option that names them."""
        if self.task == "classification":
            return {"text_column": self.text_column, "label_column": self.label_column}
        if self.prompt_column and self.response_column:
            return {"prompt_column": self.prompt_column, "response_column": self.response_column}
        return {"text_column": self.text_column}

    def _check_numbers(self) -> None:
        for name in ("block_size", "eval_blocks", "max_validation_blocks", "max_train_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name} must be at least 1, not {value}")
        if self.block_size == 1 and self.task != "classification":
            raise InputError("--block_size 1 leaves nothing to predict: give at least 2, better hundreds")
        if not 0.0 < self.validation_share < 1.0:
            raise InputError(f"--validation_share must lie between 0 and 1, not {self.validation_share}")


@dataclass
class FinetuneArguments(RecipeArguments):
    """The Trainer's own arguments with the recipe's defaults, and what the recipe adds to them."""

    output_dir: str | None = field(
        default="outputs/finetune",
        metadata={"help": "Where checkpoints, the model, metrics.json and curves.png go."},
    )
    learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate. Default: the preset's (finetuning/presets.py)."}
    )
    preset: bool = field(
        default=True,
        metadata={"help": "Take options of our methods that are not given from finetuning/presets.py."},
    )
    max_steps: int = field(default=60, metadata={"help": "Steps; -1 to train for num_train_epochs instead."})
    include_num_input_tokens_seen: str = field(
        default="all", metadata={"help": "Which tokens are counted: all, non_padding, no."}
    )


ARGUMENT_TYPES = (FinetuneModelArguments, FinetuneDataArguments, FinetuneArguments)
