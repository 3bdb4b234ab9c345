"""Which tokenizer and which model are trained."""

import itertools
import struct
from collections.abc import Iterable
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from hf_noneuclid.experiments.training.options import InputError, ModelArguments

# What from_pretrained raises of files that are missing, broken, truncated or of another kind.
UNREADABLE = (OSError, ValueError, KeyError, ImportError, EOFError, SafetensorError, struct.error)
END_OF_TEXT = "<|endoftext|>"
# 4.3M parameters with 4,096 tokens. No dropout: the default run sees less than half of the corpus, once.
SMALL_GPT2 = {
    "n_embd": 256,
    "n_layer": 4,
    "n_head": 4,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}


def load_tokenizer(
    args: ModelArguments, documents: Iterable[str], block_size: int
) -> PreTrainedTokenizerBase:
    """Load the tokenizer the options name, or train one on the documents.

    Raises:
        InputError: it cannot be loaded, or has no end-of-text token to put between documents.
    """
    name = args.tokenizer_name or args.model_name_or_path
    if name is None:
        sample = itertools.islice(documents, args.tokenizer_documents)
        return train_tokenizer(sample, args.vocab_size, block_size)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except UNREADABLE as error:
        raise InputError(f"cannot load the tokenizer {name}: {error}") from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer {name} has no eos_token, which must stand between documents")
    return tokenizer


def train_tokenizer(documents: Iterable[str], vocab_size: int, block_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: it has tokens for any text and gives every text back unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=block_size,
        clean_up_tokenization_spaces=False,
    )


def load_config(
    args: ModelArguments, tokenizer: PreTrainedTokenizerBase, block_size: int
) -> PretrainedConfig:
    """Build the configuration of the model.

    One given by name stays as it is, up to the overrides. One of a model type is the library's default with
    the vocabulary of the tokenizer; the recipe's small GPT-2 takes its positions from the block size, too.

    Raises:
        InputError: it cannot be loaded, an override is unknown, or it fits neither tokenizer nor block size.
    """
    overrides = _parse_overrides(args.config_overrides)
    name = args.model_name_or_path or args.config_name
    try:
        if name:
            config = _with_overrides(AutoConfig.from_pretrained(name), overrides)
        else:
            config = _from_scratch(args.model_type, overrides, tokenizer, block_size)
    except InputError:
        raise
    except Exception as error:  # the Hub, the network, and each configuration's own validation
        raise InputError(f"cannot build the configuration {name or args.model_type}: {error}") from error
    check_sizes(config, tokenizer, block_size)
    return config


def load_model(args: ModelArguments, config: PretrainedConfig) -> PreTrainedModel:
    """Load the checkpoint, or initialise a model from the configuration; float32 in either case.

    Mixed precision (`--bf16`) keeps float32 weights; small steps would be lost in bf16 ones.

    Raises:
        InputError: the checkpoint cannot be loaded, or the configuration is no causal language model's.
    """
    try:
        if args.model_name_or_path:
            name, options = args.model_name_or_path, {"config": config, "dtype": torch.float32}
            model = AutoModelForCausalLM.from_pretrained(name, **options)
        else:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except UNREADABLE as error:
        raise InputError(f"cannot build the model: {error}") from error
    model.loss_type = (
        model.loss_type or "ForCausalLM"
    )  # left open, as for GPT-2, transformers warns of its guess
    return model


def _from_scratch(
    model_type: str | None, overrides: dict[str, Any], tokenizer: PreTrainedTokenizerBase, block_size: int
) -> PretrainedConfig:
    small = {**SMALL_GPT2, "n_positions": block_size} if model_type is None else {}
    model_type = model_type or "gpt2"
    if model_type not in CONFIG_MAPPING:
        raise InputError(f"unknown --model_type {model_type!r}: transformers has no such configuration")
    config_class = CONFIG_MAPPING[model_type]
    _check_known(config_class(), overrides)
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    return config_class(**{"vocab_size": len(tokenizer), **ids, **small, **overrides})


def _with_overrides(config: PretrainedConfig, overrides: dict[str, Any]) -> PretrainedConfig:
    _check_known(config, overrides)
    return type(config).from_dict({**config.to_dict(), **overrides}) if overrides else config


def _parse_overrides(text: str | None) -> dict[str, Any]:
    pairs = [pair.partition("=") for pair in (text or "").split(",") if pair.strip()]
    wrong = [key for key, sign, _ in pairs if not sign]
    if wrong:
        raise InputError(f"--config_overrides takes key=value,key=value; {wrong[0]!r} has no value")
    return {key.strip(): yaml.safe_load(value) for key, _, value in pairs}


def _check_known(config: PretrainedConfig, overrides: dict[str, Any]) -> None:
    unknown = [key for key in overrides if not hasattr(config, key)]
    if unknown:
        raise InputError(
            f"--config_overrides: a {config.model_type} configuration has no {', '.join(unknown)}; "
            f"it has {', '.join(sorted(config.to_dict()))}"
        )


def check_sizes(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, block_size: int) -> None:
    """Check that the model has a row for every token, and a position for every token of a sequence.

    Raises:
        InputError: it has not.
    """
    text_config = config.get_text_config()
    if len(tokenizer) > text_config.vocab_size:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} tokens but the model's embedding only "
            f"{text_config.vocab_size} rows: use the model's own tokenizer, or, from scratch, "
            f"--config_overrides vocab_size={len(tokenizer)}"
        )
    positions = getattr(text_config, "max_position_embeddings", None)
    if positions is not None and block_size > positions:
        raise InputError(f"--block_size {block_size} is longer than the model's {positions} positions")
