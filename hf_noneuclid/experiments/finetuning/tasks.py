"""What a task makes of the data: sequences, a collator, and what is measured."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import DataCollatorWithPadding, EvalPrediction, PreTrainedTokenizerBase

from hf_noneuclid.experiments.finetuning import causal, classification
from hf_noneuclid.experiments.finetuning.finetune_options import FinetuneDataArguments
from hf_noneuclid.experiments.finetuning.rows import Rows, load_rows
from hf_noneuclid.experiments.training.corpus import load_corpus
from hf_noneuclid.experiments.training.options import DataArguments
from hf_noneuclid.experiments.training.packing import Blocks, Data, pack, spread

OLD_DOMAIN_BLOCKS = 128  # enough to see what is forgotten, where nobody says how many


@dataclass(frozen=True, slots=True)
class Task:
    """What the Trainer is given for a task.

    Attributes:
        data: sequences to train and to evaluate on.
        names: classes of a classifier; None for a causal language model.
        old_domain: sequences of what the model knew before, None if nobody asks.
        collator: makes a batch of sequences.
        reduce: what is kept of the logits of a batch.
        summarise: metrics from what was kept.
        prompt: the beginning of a text of the validation part; None for a classifier.
    """

    data: Data
    names: list[str] | None
    old_domain: Blocks | None
    collator: Callable[..., dict[str, torch.Tensor]]
    reduce: Callable[[Any, torch.Tensor], torch.Tensor]
    summarise: Callable[[EvalPrediction], dict[str, float]]
    prompt: str | None


def prepare(args: FinetuneDataArguments, tokenizer: PreTrainedTokenizerBase) -> Task:
    """Load the data and make sequences of them.

    Raises:
        InputError: the data cannot be used for the task.
    """
    rows = load_rows(args)
    return (_classification if args.task == "classification" else _causal_lm)(rows, args, tokenizer)


def _classification(rows: Rows, args: FinetuneDataArguments, tokenizer: PreTrainedTokenizerBase) -> Task:
    names = classification.class_names(rows, args.label_column)
    encode = partial(classification.encode, tokenizer=tokenizer, args=args, names=names)
    limit = args.max_validation_blocks or len(rows.validation)
    validation = encode(spread(rows.validation, limit))
    return Task(
        data=Data(rows.name, tokenizer, encode(rows.train), validation, rows.license),
        names=names,
        old_domain=None,
        collator=DataCollatorWithPadding(tokenizer),
        reduce=classification.keep_logits,
        summarise=classification.summarise,
        prompt=None,
    )


def _causal_lm(rows: Rows, args: FinetuneDataArguments, tokenizer: PreTrainedTokenizerBase) -> Task:
    encode = partial(causal.encode, tokenizer=tokenizer, args=args)
    train = encode(rows.train, limit=None)
    validation = encode(rows.validation, limit=args.max_validation_blocks)
    return Task(
        data=Data(rows.name, tokenizer, train, validation, rows.license),
        names=None,
        old_domain=_old_domain(args, tokenizer),
        collator=causal.Collator(tokenizer.pad_token_id),
        reduce=causal.summed_losses,
        summarise=causal.summarise,
        prompt=_prompt(rows, args, tokenizer),
    )


def _old_domain(args: FinetuneDataArguments, tokenizer: PreTrainedTokenizerBase) -> Blocks | None:
    """Pack what the model knew before: the files named, or what pretrain.py holds out of its own corpus."""
    files = args.old_domain_files
    if not files and not args.embedded:
        return None
    corpus = load_corpus(DataArguments(train_files=files, validation_files=files), seed=0)
    limit = args.max_validation_blocks or OLD_DOMAIN_BLOCKS
    return pack(corpus.validation, tokenizer, args.block_size, limit)


def _prompt(rows: Rows, args: FinetuneDataArguments, tokenizer: PreTrainedTokenizerBase) -> str:
    if args.prompt_column is None:
        text = next((text for text in rows.validation[args.text_column] if text), "")
        return tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"][:8])
    prompt = causal.render(rows.validation[0][args.prompt_column] or "", "", tokenizer)[0]
    # A chat template may write what the tokenizer puts before every text by itself.
    return prompt.removeprefix(tokenizer.bos_token) if causal.opening(tokenizer) else prompt
