"""The pretrained model and its tokenizer, and LoRA adapters for it."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.logging import get_logger
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from hf_noneuclid.experiments.common import InputError
from hf_noneuclid.experiments.finetuning.finetune_options import (
    ALL_LINEAR,
    DEFAULT_MODEL,
    FinetuneModelArguments,
)
from hf_noneuclid.experiments.training.model import UNREADABLE, check_sizes

ADAPTER = "adapter_config.json"
HEADS = ("classifier", "score")  # peft's names of what is trained whole in a classifier
logger = get_logger(__name__)


def load_tokenizer(args: FinetuneModelArguments, classifies: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer; one without a padding token pads with its end of text.

    Raises:
        InputError: it cannot be loaded, or has no end-of-text token: a classifier needs one only to pad with.
    """
    name = args.tokenizer_name or args.path
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **({} if args.tokenizer_name else _source(args)))
    except UNREADABLE as error:
        raise InputError(f"cannot load the tokenizer {name}: {error}{_hint(args)}") from error
    if tokenizer.eos_token_id is None and not classifies:
        raise InputError(f"the tokenizer {name} has no eos_token, which must stand at the end of a text")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise InputError(f"the tokenizer {name} has neither a pad_token nor an eos_token to fill up with")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    args: FinetuneModelArguments,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    names: list[str] | None = None,
) -> tuple[PreTrainedModel, list[str]]:
    """Load the checkpoint in float32: small steps would be lost in bf16 weights.

    Args:
        args: which.
        tokenizer: whose tokens it must have rows for.
        block_size: tokens for which it must have positions.
        names: classes of a classifier; None for a causal language model.

    Returns:
        The model, and the names of its modules with weights that the checkpoint lacks: they are random.

    Raises:
        InputError: it cannot be loaded, is an adapter, or fits neither tokenizer nor block size.
    """
    if (Path(args.path) / ADAPTER).is_file():
        raise InputError(f"{args.path} holds an adapter, not a model: make it with --lora_merge true")
    try:
        config = AutoConfig.from_pretrained(args.path, **_source(args))
        check_sizes(config, tokenizer, block_size)
        model, report = _load(args, names)
    except InputError:
        raise
    except UNREADABLE as error:
        raise InputError(f"cannot load the model {args.path}: {error}{_hint(args)}") from error
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    if names is None:
        model.loss_type = model.loss_type or "ForCausalLM"  # left open, transformers warns of its guess
    weights = [*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])]
    return model, sorted({name.rpartition(".")[0] for name in weights} - {""})


def _load(args: FinetuneModelArguments, names: list[str] | None) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the model and transformers' report of what it found in the checkpoint."""
    options: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True, **_source(args)}
    if args.gguf_file and hasattr(transformers, "GgufConfig"):  # versions without it always unpack
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    if names is None:
        return AutoModelForCausalLM.from_pretrained(args.path, **options)
    numbers = {name: i for i, name in enumerate(names)}
    classes = {"id2label": dict(enumerate(names)), "label2id": numbers, "num_labels": len(names)}
    options["ignore_mismatched_sizes"] = True  # of a head for other classes, which is checked here
    model, report = AutoModelForSequenceClassification.from_pretrained(args.path, **classes, **options)
    _check_head(args.path, report["mismatched_keys"], len(names))
    return model, report


def _check_head(
    path: str, mismatched: Collection[tuple[str, Sequence[int], Sequence[int]]], count: int
) -> None:
    """Warn of a head that had another number of classes and is new; refuse other weights that do not fit."""
    for name, found, expected in sorted(mismatched):
        if expected[0] != count or list(found[1:]) != list(expected[1:]):
            raise InputError(
                f"{path}: {name} is of shape {list(found)}, its config.json says {list(expected)}"
            )
    if mismatched:
        name, found, _ = min(mismatched)
        logger.warning(
            f"{path} tells {found[0]} classes apart, the data have {count}: "
            f"the head {name.rpartition('.')[0]} is new and starts from random weights"
        )


def _source(args: FinetuneModelArguments) -> dict[str, str]:
    return {"revision": args.model_revision, **({"gguf_file": args.gguf_file} if args.gguf_file else {})}


def _hint(args: FinetuneModelArguments) -> str:
    return "; run recipes/pretrain.py first" if args.path == DEFAULT_MODEL else ""


def add_adapters(
    model: PreTrainedModel, args: FinetuneModelArguments, classifies: bool, new: list[str]
) -> PeftModel:
    """Freeze the model and put LoRA adapters beside its layers; a classifier's head is trained whole.

    Args:
        model: the model.
        args: which layers, and of which rank.
        classifies: whether it has a head.
        new: modules that are not in the checkpoint: trained and saved whole, too, as nobody else has them.

    Raises:
        InputError: a target matches no layer; the message names those that could be meant.
    """
    targets = args.lora_target_modules
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)
    }
    for target in targets:
        if target != ALL_LINEAR and not any(f".{name}".endswith(f".{target}") for name in layers):
            candidates = sorted({name.rpartition(".")[2] for name in layers})
            raise InputError(
                f"--lora_target_modules {target}: the model has no such layer; it has "
                f"{', '.join(candidates)}, and {ALL_LINEAR} means all but the head"
            )
    new = _outermost(new)
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS if classifies else TaskType.CAUSAL_LM,
        r=args.lora_rank,
        lora_alpha=args.lora_alpha or 2 * args.lora_rank,
        lora_dropout=args.lora_dropout,
        target_modules=ALL_LINEAR if ALL_LINEAR in targets else targets,
        modules_to_save=new or None,
        exclude_modules=new or None,
        revision=args.model_revision,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in layers.values()),
    )
    return get_peft_model(model, config)


def _outermost(new: list[str]) -> list[str]:
    """Leave out the head, which peft takes by itself, and parts of others: it cannot take a module twice."""
    alone = [name for name in new if not any(part in HEADS for part in name.split("."))]
    return [name for name in alone if not any(name.startswith(f"{other}.") for other in alone)]


def merge(folder: Path, base: PreTrainedModel) -> None:
    """Replace the adapter saved in a folder by the whole model, `base` with the adapter added in."""
    PeftModel.from_pretrained(base, str(folder)).merge_and_unload().save_pretrained(folder)
    for path in [*folder.glob("adapter_*"), folder / "README.md"]:  # the latter, peft's, is of the adapter
        path.unlink(missing_ok=True)
