"""The arguments of the three recipes that name a model and its data."""

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_noneuclid.experiments.common import InputError

DEFAULT_MODEL = "outputs/pretrain"
ALL_LINEAR = "all-linear"
EMBEDDED_CLASSES = ("library", "domain")


def option(default: Any, text: str) -> Any:
    """A field of the classes below; the text is what ``--help`` says of it."""
    return field(default=default, metadata={"help": text})


# ---------------------------------------------------------------- models


@dataclass
class ModelArguments:
    """The model and tokenizer that pretrain.py trains."""

    model_name_or_path: str | None = option(
        None, "Checkpoint to continue from (Hub name or folder). Weights are kept in float32."
    )
    config_name: str | None = option(None, "Train from scratch with this configuration (Hub name or folder).")
    model_type: str | None = option(
        None,
        "Train from scratch with the default configuration of this type: gpt2, llama, ... "
        "With none of the three the model is the recipe's small GPT-2.",
    )
    config_overrides: str | None = option(
        None, "Changes to the configuration of a model from scratch: n_layer=6,n_embd=384"
    )
    tokenizer_name: str | None = option(
        None,
        "Tokenizer (Hub name or folder). Default: the checkpoint's; from scratch, a byte-level BPE trained "
        "here on the training text.",
    )
    vocab_size: int = option(4096, "Vocabulary of a tokenizer trained here (at least 257).")
    tokenizer_documents: int = option(100_000, "A tokenizer trained here sees at most this many documents.")

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
class PretrainedArguments:
    """The pretrained model that is fine-tuned, and which of its weights are trained."""

    model_name_or_path: str | None = option(
        None, f"Checkpoint (Hub name or folder). Default: {DEFAULT_MODEL}, which pretrain.py makes."
    )
    model_revision: str = option("main", "Branch, tag or commit of the model.")
    model_package: str | None = option(None, "Installed Python package whose folder holds the checkpoint.")
    gguf_file: str | None = option(None, "GGUF file of the checkpoint; its weights become float32.")
    tokenizer_name: str | None = option(None, "Tokenizer (Hub name or folder). Default: the checkpoint's.")
    lora_rank: int = option(0, "Rank of LoRA adapters; 0 trains all weights.")
    lora_alpha: float | None = option(None, "Adapters are scaled by alpha / rank. Default: twice the rank.")
    lora_dropout: float = option(0.0, "Dropout before the adapters.")
    lora_target_modules: list[str] = field(
        default_factory=lambda: [ALL_LINEAR],
        metadata={"help": "Layers with adapters, such as q_proj v_proj. Default: every linear layer."},
    )
    lora_merge: bool = option(
        False, "Save the whole model with the adapters merged. Always so for GGUF checkpoints."
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
            InputError: The package of --model_package is not installed.
        """
        if not self.model_package:
            return self.model_name_or_path or DEFAULT_MODEL
        package = importlib.util.find_spec(self.model_package)
        if package is None or package.origin is None:
            raise InputError(f"--model_package {self.model_package}: no such package is installed")
        return str(Path(package.origin).parent)

    @property
    def base(self) -> dict[str, Any]:
        """The checkpoint for metrics.json; see ``describe_base``."""
        return describe_base(self.path, self.model_revision, self.model_package, self.gguf_file)

    @property
    def merges(self) -> bool:
        """Whether adapters are merged: an adapter cannot say which GGUF file it belongs to."""
        return self.lora_rank > 0 and (self.lora_merge or bool(self.gguf_file))


def describe_base(
    name: str, revision: str | None = None, package: str | None = None, gguf_file: str | None = None
) -> dict[str, Any]:
    """What a training starts from, for metrics.json; later the folders may hold something else.

    Args:
        name: Hub name or folder of the checkpoint.
        revision: Branch, tag or commit of a model on the Hub.
        package: The Python package that holds the checkpoint, which then is its name.
        gguf_file: The GGUF file of the checkpoint.

    Returns:
        The same, and ``on_hub``: whether others can load it by its name.
    """
    on_hub = package is None and not Path(name).exists()
    return {
        "name": package or name,
        "on_hub": on_hub,
        "revision": revision if on_hub else None,
        "package": package,
        "gguf_file": gguf_file,
    }


# ---------------------------------------------------------------- data


@dataclass
class SourceArguments:
    """Where the data comes from, and how long its sequences are."""

    dataset_name: str | None = option(None, "Dataset (Hub name or folder).")
    dataset_config_name: str | None = option(None, "Configuration of the dataset.")
    dataset_revision: str | None = option(None, "Branch, tag or commit of the dataset.")
    train_split: str = option("train", "Split to train on; train[:10%%] is allowed.")
    validation_split: str | None = option(
        None, "Split to evaluate on. Default: documents or rows held out of the train split."
    )
    text_column: str = option("text", "Column that holds the text.")
    train_files: list[str] | None = field(
        default=None, metadata={"help": "Files to train on: json, jsonl, csv or txt (a line is a row)."}
    )
    validation_files: list[str] | None = field(default=None, metadata={"help": "Files to evaluate on."})
    block_size: int = option(256, "Largest number of tokens in a sequence.")
    eval_blocks: int = option(32, "Validation sequences, evenly spread, evaluated while training.")
    max_validation_blocks: int | None = option(None, "Evaluate on at most this many sequences.")

    def __post_init__(self) -> None:
        if self.dataset_name and self.train_files:
            raise InputError("--dataset_name and --train_files each name a corpus: give one of them")
        if self.validation_files and not self.train_files:
            raise InputError("--validation_files needs --train_files")
        counts = (
            "block_size",
            "eval_blocks",
            "max_validation_blocks",
            "max_train_rows",
            "validation_documents",
        )
        for name in counts:
            value = getattr(self, name, None)
            if value is not None and value < 1:
                raise InputError(f"--{name} must be at least 1, not {value}")

    @property
    def embedded(self) -> bool:
        """Whether the data comes from installed packages, since no other is named."""
        return not self.dataset_name and not self.train_files

    @property
    def title(self) -> str:
        """What the results call a dataset of the Hub."""
        return " ".join(filter(None, (self.dataset_name, self.dataset_config_name, self.dataset_revision)))


@dataclass
class DataArguments(SourceArguments):
    """The text for pre-training. With neither a dataset nor files it is the embedded corpus."""

    train_files: list[str] | None = field(
        default=None, metadata={"help": "UTF-8 text files to train on; each file is one document."}
    )
    validation_files: list[str] | None = field(
        default=None,
        metadata={"help": "UTF-8 text files to evaluate on. Default: the last 5%% of each training file."},
    )
    validation_documents: int = option(
        1000, "Documents held out of the train split when there is no validation split."
    )
    streaming: bool = option(False, "Read the dataset while training (no download).")
    shuffle_buffer: int = option(10_000, "Documents shuffled together when streaming; 0 keeps the order.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.streaming and not self.dataset_name:
            raise InputError("--streaming needs --dataset_name")
        if self.shuffle_buffer < 0:
            raise InputError(f"--shuffle_buffer must not be negative, not {self.shuffle_buffer}")


@dataclass
class RowArguments(SourceArguments):
    """The rows for fine-tuning. With neither a dataset nor files: docstrings of torch and transformers."""

    validation_share: float = option(0.05, "Share of the rows held out where no validation data is named.")
    max_train_rows: int | None = option(None, "Train on at most this many rows.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.validation_share < 1.0:
            raise InputError(f"--validation_share must lie between 0 and 1, not {self.validation_share}")

    @property
    def columns(self) -> dict[str, str]:
        """The columns that are needed, by the option that names them."""
        return {"text_column": self.text_column}


@dataclass
class FinetuneDataArguments(RowArguments):
    """The rows for a language model."""

    task: str | None = option(
        None, "causal_lm, the only one. With no task and no data: both steps of the default run."
    )
    prompt_column: str | None = option(None, "Column of prompts; only the responses are trained on.")
    response_column: str | None = option(None, "Column of responses.")
    old_domain_files: list[str] | None = field(
        default=None, metadata={"help": "Text files of what the model knew before, to see what it forgets."}
    )
    packing: bool = option(True, "Fill sequences with several texts or examples.")

    def __post_init__(self) -> None:
        if self.task == "classification":
            raise InputError(
                "--task classification has a recipe of its own: run recipes/classify.py, without --task"
            )
        if self.task not in (None, "causal_lm"):
            raise InputError(
                f"unknown --task {self.task!r}: it is causal_lm; for classes run recipes/classify.py"
            )
        super().__post_init__()
        if (self.prompt_column is None) != (self.response_column is None):
            raise InputError("--prompt_column and --response_column belong together: give both")
        if self.block_size == 1:
            raise InputError("--block_size 1 leaves nothing to predict: give at least 2, better hundreds")

    @property
    def columns(self) -> dict[str, str]:
        """The columns of texts, or of prompts and responses."""
        if self.prompt_column and self.response_column:
            return {"prompt_column": self.prompt_column, "response_column": self.response_column}
        return super().columns


@dataclass
class ClassifyDataArguments(RowArguments):
    """The rows for a classifier."""

    label_column: str = option("label", "Column of classes.")
    embedded_classes: str = option(
        "library",
        "Classes of the embedded texts: library (docstrings of torch or transformers) or domain (docstrings "
        "or verses).",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.embedded_classes not in EMBEDDED_CLASSES:
            known = ", ".join(EMBEDDED_CLASSES)
            raise InputError(f"unknown --embedded_classes {self.embedded_classes!r}: it is one of {known}")

    @property
    def columns(self) -> dict[str, str]:
        """The columns of texts and of classes."""
        return {**super().columns, "label_column": self.label_column}
