"""From rows to sequences of a causal language model, and the loss over the tokens to be learnt."""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    DataCollatorForSeq2Seq,
    EvalPrediction,
    PreTrainedTokenizerBase,
    default_data_collator,
)

from hf_noneuclid.experiments.common import InputError, require
from hf_noneuclid.experiments.training.arguments import DataArguments, FinetuneDataArguments
from hf_noneuclid.experiments.training.data import Corpus, Documents, load_corpus, warn
from hf_noneuclid.experiments.training.packing import IGNORED, Blocks, collate, pack

OLD_DOMAIN_BLOCKS = 128  # of what the model knew before, where --max_validation_blocks is not given


@dataclass(frozen=True, slots=True)
class Example:
    """A sequence of tokens. Those of a prompt, or the first of a text, are given and not learnt."""

    ids: list[int]
    given: int

    def labels(self) -> list[int]:
        """The tokens to be learnt, ``IGNORED`` for the others."""
        return [IGNORED] * self.given + self.ids[self.given :]


def encode(
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    args: FinetuneDataArguments,
    limit: int | None = None,
) -> Blocks:
    """Makes sequences of at most ``--block_size`` tokens, and at most ``limit`` of them.

    Packed texts follow each other and may span sequences, as in pre-training. Packed examples stay whole, and
    none sees another: the positions of each start from 0, which tells transformers where it begins.
    """
    columns = [list(rows[column]) for column in args.columns.values()]
    if args.prompt_column is None:
        texts = [text for text in columns[0] if text]
        warn(len(columns[0]) - len(texts), "rows have no text and are left out")
        if args.packing:
            return pack(Documents(texts), tokenizer, args.block_size, limit)
        start, end = opening(tokenizer), [tokenizer.eos_token_id]
        examples = [Example(start + ids + end, 1) for ids in _tokens(texts, tokenizer)]
    else:
        examples = _of_pairs(columns[0], columns[1], tokenizer)
    longer = sum(len(example.ids) > args.block_size for example in examples)
    cut = f"longer than --block_size {args.block_size} tokens and are cut"
    warn(longer, f"of {len(examples)} sequences are {cut}")
    kept = [Example(example.ids[: args.block_size], example.given) for example in examples]
    kept = [example for example in kept if len(example.ids) > example.given]
    warn(len(examples) - len(kept), "have no token left to learn and are left out")
    require(kept, "no row is left to train on or to evaluate: see the warnings above")
    if args.packing:
        sequences = pack_examples(kept, args.block_size, tokenizer.eos_token_id)
    else:
        sequences = [{"input_ids": example.ids, "labels": example.labels()} for example in kept]
    digest = hashlib.sha256(repr(columns).encode()).hexdigest()
    tokens = sum(len(example.ids) for example in kept)
    return Blocks(datasets.Dataset.from_list(sequences[:limit]), tokens, sha256=digest)


def encode_old_domain(args: FinetuneDataArguments, tokenizer: PreTrainedTokenizerBase) -> Blocks | None:
    """Packs what the model knew before: the files named, or what pretrain.py holds out of its own corpus."""
    files = args.old_domain_files
    if not files and not args.embedded:
        return None
    texts = DataArguments(train_files=files, validation_files=files, text_column=args.text_column)
    corpus = load_corpus(texts, seed=0)
    return pack(
        corpus.validation, tokenizer, args.block_size, args.max_validation_blocks or OLD_DOMAIN_BLOCKS
    )


def first_prompt(rows: Corpus, args: FinetuneDataArguments, tokenizer: PreTrainedTokenizerBase) -> str:
    """The first prompt of the validation part, or the beginning of its first text."""
    if args.prompt_column is None:
        text = next(filter(None, rows.validation[args.text_column]), "")
        return str(tokenizer.decode(_tokens([text], tokenizer)[0][:8]))
    prompt = render(rows.validation[0][args.prompt_column] or "", "", tokenizer)[0]
    # A chat template may write what the tokenizer puts before every text by itself.
    return prompt.removeprefix(tokenizer.bos_token) if opening(tokenizer) else prompt


# ---------------------------------------------------------------- examples


def _of_pairs(
    prompts: Sequence[str | None], responses: Sequence[str | None], tokenizer: PreTrainedTokenizerBase
) -> list[Example]:
    pairs = zip(prompts, responses, strict=True)
    kept = [(prompt or "", response) for prompt, response in pairs if response and response.strip()]
    warn(len(prompts) - len(kept), "responses are empty; their rows are left out")
    written = [render(prompt, response, tokenizer) for prompt, response in kept]
    # Tokenized one by one: no token may span the border, as none does when the model is asked.
    asked = _tokens([prompt for prompt, _ in written], tokenizer)
    answered = _tokens([response for _, response in written], tokenizer)
    if tokenizer.chat_template:  # which writes the beginning itself, and mostly the end
        start, marks = [], {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        endless = [marks.isdisjoint(ids) for ids in answered]
        added = f"{tokenizer.eos_token} is put after each"
        warn(sum(endless), f"responses have no end in the chat template: {added}")
        end = [tokenizer.eos_token_id]
        answered = [ids + end * is_open for ids, is_open in zip(answered, endless, strict=True)]
    else:
        start, answered = opening(tokenizer), [[*ids, tokenizer.eos_token_id] for ids in answered]
    return [
        Example(start + given + learnt, max(1, len(start + given)))
        for given, learnt in zip(asked, answered, strict=True)
    ]


def _tokens(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def render(prompt: str, response: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Prompt and response in the tokenizer's chat template; without one, with a line break between them."""
    if not tokenizer.chat_template:
        return prompt + "\n", response
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    asked = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    answered = tokenizer.apply_chat_template(turns, tokenize=False)
    if not answered.startswith(asked):
        raise InputError(
            "the tokenizer's chat template writes a prompt differently when a response follows, so it is not "
            "known where the response starts: write the whole texts into one column, --text_column"
        )
    return asked, answered[len(asked) :]


def opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that the tokenizer puts before every text, if it puts one."""
    first: list[int] = tokenizer("a")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


# ---------------------------------------------------------------- batches


def pack_examples(examples: Iterable[Example], block_size: int, filler: int) -> list[dict[str, list[int]]]:
    """Puts whole examples into sequences, one after the other, and the filler where no further one fits."""
    sequences: list[list[Example]] = [[]]
    room = block_size
    for example in examples:
        if len(example.ids) > room:
            sequences[-1].append(Example([filler] * room, room))
            sequences.append([])
            room = block_size
        sequences[-1].append(example)
        room -= len(example.ids)
    sequences[-1].append(Example([filler] * room, room))
    return [
        {
            "input_ids": [token for example in sequence for token in example.ids],
            "labels": [label for example in sequence for label in example.labels()],
            "position_ids": [position for example in sequence for position in range(len(example.ids))],
        }
        for sequence in sequences
    ]


@dataclass(frozen=True)
class Collator:
    """Makes a batch of sequences; shorter ones are filled up, and the filling is masked."""

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        if "labels" not in rows[0]:  # packed texts
            return collate(rows)
        if "position_ids" in rows[0]:  # a mask would hide from transformers that examples are packed
            return default_data_collator(rows)
        return DataCollatorForSeq2Seq(self.tokenizer)(rows)


# ---------------------------------------------------------------- the loss


def summed_losses(
    logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor, ahead: int = 1
) -> torch.Tensor:
    """The sum of the losses and the number of tokens learnt of each sequence, of shape (batch, 2).

    The Trainer's own evaluation loss is a mean over batches, so that it depends on the number of devices. The
    logits of a token are for the one that is so many ahead.
    """
    logits, targets = logits[0] if isinstance(logits, tuple) else logits, labels[:, ahead:]
    losses = cross_entropy(logits[:, : targets.shape[1]].float().transpose(1, 2), targets, reduction="none")
    return torch.stack([losses.sum(dim=1), (targets != IGNORED).sum(dim=1)], dim=1)


def summed_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """The training loss summed over the tokens of a batch, in place of the mean; for the Trainer."""
    logits = outputs.logits[:, :-1].float().transpose(1, 2)
    return cross_entropy(logits, labels[:, 1:], reduction="sum")


def summarise(evaluation: EvalPrediction) -> dict[str, float]:
    """The mean loss in nats per token learnt, and the perplexity, from the ``summed_losses``."""
    losses, tokens = evaluation.predictions.sum(axis=0, dtype="float64")
    loss = float(losses / tokens)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}  # finite for any finite loss
