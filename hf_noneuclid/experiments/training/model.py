"""The model and its tokenizer: from scratch, or from a checkpoint."""

import itertools
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from accelerate.logging import get_logger
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from hf_noneuclid.experiments.common import InputError, option_pairs, require
from hf_noneuclid.experiments.training.arguments import DEFAULT_MODEL, ModelArguments, PretrainedArguments

# What from_pretrained raises for files that are missing, broken, truncated or of another kind.
UNREADABLE = (OSError, ValueError, KeyError, ImportError, EOFError, SafetensorError, struct.error)
END_OF_TEXT, MASK = "<|endoftext|>", "<|mask|>"
# 4.3M parameters with 4,096 tokens. No dropout: the default run sees less than half of the corpus, once.
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
SMALL_GPT2 = {"n_embd": 256, "n_layer": 4, "n_head": 4, **NO_DROPOUT}
logger = get_logger(__name__)


# ---------------------------------------------------------------- pre-training


def load_tokenizer(
    args: ModelArguments, documents: Iterable[str], block_size: int
) -> PreTrainedTokenizerBase:
    """Loads the tokenizer that the options name, or trains one on the documents."""
    name = args.tokenizer_name or args.model_name_or_path
    if name is None:
        sample = itertools.islice(documents, args.tokenizer_documents)
        mask = MASK if args.task == "masked_lm" else None
        return train_tokenizer(sample, args.vocab_size, block_size, mask)
    return _read_tokenizer(name, needs_end=True)


def train_tokenizer(
    documents: Iterable[str], vocab_size: int, block_size: int, mask: str | None = None
) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE: it has tokens for any text and gives every text back unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, mask] if mask else [END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        mask_token=mask,
        model_max_length=block_size,
        clean_up_tokenization_spaces=False,
    )


def load_config(
    args: ModelArguments, tokenizer: PreTrainedTokenizerBase, block_size: int
) -> PretrainedConfig:
    """Builds the configuration of a model for pre-training.

    One given by name changes only by the overrides. One of a model type is the library's default with the
    vocabulary of the tokenizer; the recipe's small GPT-2 also takes its positions from the block size.
    """
    overrides = _parse_overrides(args.config_overrides)
    name, model_type = args.model_name_or_path or args.config_name, args.model_type or "gpt2"
    is_known = name or model_type in CONFIG_MAPPING
    require(is_known, f"unknown --model_type {model_type!r}: transformers has no such configuration")
    try:
        config = AutoConfig.from_pretrained(name) if name else CONFIG_MAPPING[model_type]()
        unknown, known = [key for key in overrides if not hasattr(config, key)], sorted(config.to_dict())
        kind = f"a {config.model_type} configuration"
        message = f"--config_overrides: {kind} has no {', '.join(unknown)}; it has {', '.join(known)}"
        require(not unknown, message)
        if not name:
            kinds = ("bos", "eos", "pad")
            fitted = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in kinds}
            small = {} if args.model_type else {**SMALL_GPT2, "n_positions": block_size}
            config = type(config)(**{"vocab_size": len(tokenizer), **fitted, **small, **overrides})
        elif overrides:
            config = type(config).from_dict({**config.to_dict(), **overrides})
    except Exception as error:  # the Hub, the network, and each configuration's own validation
        raise InputError(f"cannot build the configuration {name or model_type}: {error}") from error
    _check_sizes(config, tokenizer, block_size)
    return config


def _parse_overrides(text: str | None) -> dict[str, Any]:
    pairs = option_pairs(text)
    for key, value in pairs.items():
        require(value, f"--config_overrides takes key=value,key=value; {key!r} has no value")
    return {key: yaml.safe_load(value) for key, value in pairs.items()}


def _check_sizes(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, block_size: int) -> None:
    """Checks that there is a row for every token, and a position for every token of a sequence."""
    sizes, count = config.get_text_config(), len(tokenizer)
    if count > sizes.vocab_size:
        raise InputError(
            f"the tokenizer has {count} tokens but the model's embedding only {sizes.vocab_size} rows: use "
            f"the model's own tokenizer, or, from scratch, --config_overrides vocab_size={count}"
        )
    positions = getattr(sizes, "max_position_embeddings", None) or block_size
    too_long = f"--block_size {block_size} is longer than the model's {positions} positions"
    require(block_size <= positions, too_long)


def load_model(args: ModelArguments, config: PretrainedConfig) -> PreTrainedModel:
    """Loads the checkpoint, or initialises a model from the configuration.

    The weights are float32, also with mixed precision (``--bf16``): small steps would be lost in bf16.
    """
    auto = AutoModelForMaskedLM if args.task == "masked_lm" else AutoModelForCausalLM
    try:
        if args.model_name_or_path:
            name, options = args.model_name_or_path, {"config": config, "dtype": torch.float32}
            model = auto.from_pretrained(name, **options)
        else:
            model = auto.from_config(config, dtype=torch.float32)
    except UNREADABLE as error:
        raise InputError(f"cannot build the model: {error}") from error
    model.loss_type = model.loss_type or "ForCausalLM"  # transformers warns where it has to guess
    return model


# ---------------------------------------------------------------- fine-tuning


def load_pretrained_tokenizer(args: PretrainedArguments, classifies: bool) -> PreTrainedTokenizerBase:
    """Loads the tokenizer; one without a padding token pads with its end-of-text token."""
    name = args.tokenizer_name or args.path
    source = {} if args.tokenizer_name else _source(args)
    tokenizer = _read_tokenizer(name, not classifies, **source)
    if tokenizer.pad_token_id is None:
        missing = f"the tokenizer {name} has neither a pad_token nor an eos_token to fill up with"
        require(tokenizer.eos_token_id is not None, missing)
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_pretrained(
    args: PretrainedArguments,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    names: list[str] | None = None,
) -> tuple[PreTrainedModel, list[str]]:
    """Loads a checkpoint in float32: small steps would be lost in bf16 weights.

    Args:
        args: Which checkpoint.
        tokenizer: The model must have a row for each of its tokens.
        block_size: The model must have so many positions.
        names: Classes of a classifier; None for a causal language model.

    Returns:
        The model, and the names of its modules with weights that the checkpoint lacks: they are random.
    """
    is_adapter = (Path(args.path) / "adapter_config.json").is_file()
    require(not is_adapter, f"{args.path} holds an adapter, not a model: make it with --lora_merge true")
    try:
        _check_sizes(AutoConfig.from_pretrained(args.path, **_source(args)), tokenizer, block_size)
        model, report = _load(args, names)
    except UNREADABLE as error:
        raise InputError(f"cannot load the model {args.path}: {error}{_hint(args.path)}") from error
    for config in (model.config, model.config.get_text_config()):
        config.pad_token_id = tokenizer.pad_token_id
    if names is None:
        model.loss_type = model.loss_type or "ForCausalLM"  # transformers warns where it has to guess
    weights = [*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])]
    return model, sorted({name.rpartition(".")[0] for name in weights} - {""})


def _load(args: PretrainedArguments, names: list[str] | None) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and transformers' report of what it found in the checkpoint."""
    options: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True, **_source(args)}
    if args.gguf_file and hasattr(transformers, "GgufConfig"):  # versions without it always unpack
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    if names is None:
        model, report = AutoModelForCausalLM.from_pretrained(args.path, **options)
        return model, report
    numbers = {name: i for i, name in enumerate(names)}
    options |= {"id2label": dict(enumerate(names)), "label2id": numbers, "num_labels": len(names)}
    options["ignore_mismatched_sizes"] = True  # a head for other classes is replaced, and nothing else
    model, report = transformers.AutoModelForSequenceClassification.from_pretrained(args.path, **options)
    for name, found, expected in sorted(report["mismatched_keys"]):
        is_head = expected[0] == len(names) and list(found[1:]) == list(expected[1:])
        shapes = f"is of shape {list(found)}, its config.json says {list(expected)}"
        require(is_head, f"{args.path}: {name} {shapes}")
        kept = f"{args.path} tells {found[0]} classes apart, the data have {len(names)}"
        logger.warning(f"{kept}: {name} starts from random values")
    return model, report


def _read_tokenizer(name: str, needs_end: bool, **source: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **source)
    except UNREADABLE as error:
        raise InputError(f"cannot load the tokenizer {name}: {error}{_hint(name)}") from error
    has_end = tokenizer.eos_token_id is not None
    require(has_end or not needs_end, f"the tokenizer {name} has no eos_token to put at the end of a text")
    return tokenizer


def _source(args: PretrainedArguments) -> dict[str, str]:
    return {"revision": args.model_revision, **({"gguf_file": args.gguf_file} if args.gguf_file else {})}


def _hint(name: str) -> str:
    return "; run recipes/pretrain.py first" if name == DEFAULT_MODEL else ""
