"""The arguments of the recipes that name a model and its data."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from hf_noneuclid.experiments.common import InputError, package_folder, require

DEFAULT_MODEL = "outputs/pretrain"
COUNTS = ("block_size", "eval_blocks", "max_validation_blocks", "max_train_rows", "validation_documents")


def option(default: Any, text: str) -> Any:
    """A field of the classes below; ``--help`` shows the text."""
    return field(default=default, metadata={"help": text})


# ---------------------------------------------------------------- models


@dataclass
class ModelArguments:
    """The model and tokenizer for pre-training. With none named: the recipe's small GPT-2 from scratch."""

    _argument_group_name: ClassVar[str] = "model"

    model_name_or_path: str | None = option(None, "Checkpoint to continue from (Hub name or folder).")
    config_name: str | None = option(None, "Configuration of a model from scratch (Hub name or folder).")
    model_type: str | None = option(None, "Type of a model from scratch, by its defaults: gpt2, llama, ...")
    config_overrides: str | None = option(None, "Changes to the configuration: n_layer=6,n_embd=384")
    tokenizer_name: str | None = option(
        None,
        "Tokenizer (Hub name or folder). Default: the checkpoint's; from scratch, a byte-level BPE trained "
        "on the training text.",
    )
    task: Literal["causal_lm", "masked_lm"] = option(
        "causal_lm", "What is learnt: the next token, or hidden tokens (BERT and its kind)."
    )
    vocab_size: int = option(4096, "Vocabulary of a tokenizer trained here (at least 257).")
    tokenizer_documents: int = option(100_000, "A tokenizer trained here sees at most this many documents.")

    def __post_init__(self) -> None:
        sources = ("model_name_or_path", "config_name", "model_type")
        given = [f"--{name}" for name in sources if getattr(self, name)]
        require(len(given) < 2, f"{' and '.join(given)} each name a model: give one of them")
        if self.model_name_or_path and self.config_overrides:
            raise InputError("--config_overrides is for a model from scratch, not for --model_name_or_path")
        too_small = f"--vocab_size {self.vocab_size}: 256 bytes and the end of text need at least 257"
        require(self.vocab_size > 256, too_small)

    @property
    def base(self) -> dict[str, Any] | None:
        """The checkpoint for metrics.json, None from scratch."""
        return describe_base(self.model_name_or_path) if self.model_name_or_path else None


@dataclass
class VisionArguments:
    """A vision transformer from scratch for the images of digits in scikit-learn, 8 x 8 pixels."""

    _argument_group_name: ClassVar[str] = "model"

    hidden_size: int = option(64, "Width.")
    layers: int = option(4, "Layers.")
    patch_size: int = option(2, "Side of a patch, in pixels.")


@dataclass
class PretrainedArguments:
    """The pretrained model that is fine-tuned, and which of its weights are trained."""

    _argument_group_name: ClassVar[str] = "model"

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
    lora_target_modules: list[str] | None = option(
        None, "Layers with adapters, such as q_proj v_proj. Default: every linear layer."
    )
    lora_merge: bool = option(False, "Save the whole model with merged adapters. Always so for a GGUF file.")

    def __post_init__(self) -> None:
        if self.model_name_or_path and self.model_package:
            raise InputError("--model_name_or_path and --model_package each name a model: give one of them")
        require(self.lora_rank >= 0, f"--lora_rank must not be negative, not {self.lora_rank}")
        require(0 <= self.lora_dropout < 1, f"--lora_dropout must lie in [0, 1), not {self.lora_dropout}")
        is_scale = self.lora_alpha is None or self.lora_alpha > 0
        require(is_scale, f"--lora_alpha must be above 0, not {self.lora_alpha}")

    @property
    def path(self) -> str:
        """The folder or Hub name of the checkpoint."""
        if not self.model_package:
            return self.model_name_or_path or DEFAULT_MODEL
        return str(package_folder(self.model_package, "install it, or give another --model_package"))

    @property
    def base(self) -> dict[str, Any]:
        """The checkpoint for metrics.json."""
        return describe_base(self.path, self.model_revision, self.model_package, self.gguf_file)

    @property
    def merges(self) -> bool:
        """Whether adapters are merged: an adapter cannot say which GGUF file it belongs to."""
        return self.lora_rank > 0 and (self.lora_merge or bool(self.gguf_file))


def describe_base(
    name: str, revision: str | None = None, package: str | None = None, gguf_file: str | None = None
) -> dict[str, Any]:
    """What a training starts from, and whether others can load it from the Hub by its name."""
    on_hub = package is None and not Path(name).exists()
    known = {"revision": revision if on_hub else None, "package": package, "gguf_file": gguf_file}
    return {"name": package or name, "on_hub": on_hub, **known}


# ---------------------------------------------------------------- data


@dataclass
class SourceArguments:
    """Where the data comes from, and how long its sequences are. By default it is embedded."""

    _argument_group_name: ClassVar[str] = "data"

    dataset_name: str | None = option(None, "Dataset (Hub name or folder).")
    dataset_config_name: str | None = option(None, "Configuration of the dataset.")
    dataset_revision: str | None = option(None, "Branch, tag or commit of the dataset.")
    train_split: str = option("train", "Split to train on; train[:10%%] is allowed.")
    validation_split: str | None = option(None, "Split to evaluate on. Default: a part of the train split.")
    text_column: str = option("text", "Column that holds the text.")
    train_files: list[str] | None = option(None, "Files: json, jsonl, csv or parquet; txt or md in UTF-8.")
    validation_files: list[str] | None = option(None, "Files to evaluate on.")
    block_size: int = option(256, "Largest number of tokens in a sequence.")
    eval_blocks: int = option(32, "Validation sequences, evenly spread, evaluated while training.")
    max_validation_blocks: int | None = option(None, "Evaluate on at most this many sequences.")

    def __post_init__(self) -> None:
        if self.dataset_name and self.train_files:
            raise InputError("--dataset_name and --train_files each name a corpus: give one of them")
        require(self.train_files or not self.validation_files, "--validation_files needs --train_files")
        for name in COUNTS:
            value = getattr(self, name, None)
            require(value is None or value >= 1, f"--{name} must be at least 1, not {value}")

    @property
    def embedded(self) -> bool:
        """Whether the data comes from installed packages, since no other is named."""
        return not self.dataset_name and not self.train_files

    @property
    def columns(self) -> dict[str, str]:
        """The columns that are needed, by the option that names them."""
        return {"text_column": self.text_column}

    @property
    def title(self) -> str:
        """What the results call a dataset of the Hub."""
        return " ".join(filter(None, (self.dataset_name, self.dataset_config_name, self.dataset_revision)))


@dataclass
class DataArguments(SourceArguments):
    """The text for pre-training: files or a dataset; by default the embedded corpus.

    A txt or md file is a document; of other files, each row is one. Where no validation files are given, the
    last 5 % of each txt or md file are held out, and of other files every 20th row.
    """

    embedded_text: Literal["bible", "docstrings"] = option(
        "bible", "The embedded corpus: the King James Bible, or docstrings of torch and transformers."
    )
    validation_documents: int = option(1000, "Documents of a dataset held out without a validation split.")
    streaming: bool = option(False, "Read the dataset while training (no download).")
    shuffle_buffer: int = option(10_000, "Documents shuffled together when streaming; 0 keeps the order.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.dataset_name or not self.streaming, "--streaming needs --dataset_name")
        require(self.shuffle_buffer >= 0, f"--shuffle_buffer must not be negative, not {self.shuffle_buffer}")


@dataclass
class RowArguments(SourceArguments):
    """The rows for fine-tuning: files (in txt and md, a line is a row), or a dataset."""

    validation_share: float = option(0.05, "Share of the rows held out where no validation data is named.")
    max_train_rows: int | None = option(None, "Train on at most this many rows.")

    def __post_init__(self) -> None:
        super().__post_init__()
        is_share = 0.0 < self.validation_share < 1.0
        require(is_share, f"--validation_share must lie between 0 and 1, not {self.validation_share}")


@dataclass
class FinetuneDataArguments(RowArguments):
    """The rows for a language model; by default docstrings of torch and transformers."""

    task: Literal["causal_lm"] | None = option(
        None, "With neither task nor data: the default run, both steps. For classes run classify.py."
    )
    prompt_column: str | None = option(None, "Column of prompts; only the responses are trained on.")
    response_column: str | None = option(None, "Column of responses.")
    old_domain_files: list[str] | None = option(None, "Texts of what the model knew, to see what it forgets.")
    packing: bool = option(True, "Fill sequences with several texts or examples.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.prompt_column is None) != (self.response_column is None):
            raise InputError("--prompt_column and --response_column belong together: give both")
        require(self.block_size > 1, "--block_size 1 leaves nothing to predict: give hundreds of tokens")

    @property
    def columns(self) -> dict[str, str]:
        """The columns of texts, or of prompts and responses."""
        if self.prompt_column and self.response_column:
            return {"prompt_column": self.prompt_column, "response_column": self.response_column}
        return super().columns


@dataclass
class ClassifyDataArguments(RowArguments):
    """The rows for a classifier; by default docstrings of torch and transformers.

    The embedded classes are the library of a docstring, or the domain of a text: docstring or Bible verse.
    """

    label_column: str = option("label", "Column of classes.")
    embedded_classes: Literal["library", "domain"] = option("library", "Of the embedded texts.")

    @property
    def columns(self) -> dict[str, str]:
        """The columns of texts and of classes."""
        return {**super().columns, "label_column": self.label_column}
