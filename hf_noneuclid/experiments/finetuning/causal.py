"""From rows to sequences of a causal language model, and the loss over the tokens to be learnt."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import EvalPrediction, PreTrainedTokenizerBase

from hf_noneuclid.experiments.common import InputError
from hf_noneuclid.experiments.finetuning.finetune_options import FinetuneDataArguments
from hf_noneuclid.experiments.finetuning.rows import warn
from hf_noneuclid.experiments.training.corpus import Documents
from hf_noneuclid.experiments.training.packing import Blocks, collate, pack
from hf_noneuclid.experiments.training.results import perplexity

IGNORED = -100  # a label that no loss is taken of


@dataclass(frozen=True, slots=True)
class Example:
    """A sequence: its first `given` tokens are not to be learnt.

    Attributes:
        ids: the tokens.
        given: of the prompt, or the first token of a text, which nothing predicts.
    """

    ids: list[int]
    given: int

    def labels(self) -> list[int]:
        """Return the tokens to be learnt, `IGNORED` for the others."""
        return [IGNORED] * self.given + self.ids[self.given :]


def encode(
    rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, args: FinetuneDataArguments, limit: int | None
) -> Blocks:
    """Make sequences of at most `--block_size` tokens of rows.

    Packed texts follow each other and may span sequences, as in pre-training. Packed examples stay whole, and
    none sees another: their positions start from 0, which is how transformers knows. `check_isolation`
    refuses models that do not heed it.

    Args:
        rows: of the columns the options name.
        tokenizer: with an `eos_token`.
        args: which columns, how long, packed or not.
        limit: of the number of sequences.

    Raises:
        InputError: there is nothing to learn in the rows.
    """
    if args.prompt_column is None and args.packing:
        texts = rows[args.text_column]
        _warn_of_missing(texts)
        return pack(Documents(texts), tokenizer, args.block_size, limit)
    columns = [list(rows[column]) for column in args.columns.values()]
    examples = (_of_pairs if args.prompt_column else _of_texts)(*columns, tokenizer)
    examples = _cut(examples, args.block_size)
    if not examples:
        raise InputError("no row is left to train on or to evaluate: see the warnings above")
    make = pack_examples if args.packing else pad_nothing
    sequences = make(examples, args.block_size, tokenizer.eos_token_id)[:limit]
    digest = hashlib.sha256(repr(columns).encode()).hexdigest()
    tokens = sum(len(example.ids) for example in examples)
    return Blocks(datasets.Dataset.from_list(sequences), tokens, sha256=digest)


def _warn_of_missing(texts: Iterable[str | None]) -> None:
    warn(sum(not text for text in texts), "rows have no text and are left out")


def _of_texts(texts: Sequence[str | None], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    _warn_of_missing(texts)
    kept = [text for text in texts if text]
    start, end = opening(tokenizer), [tokenizer.eos_token_id]
    return [Example(start + ids + end, 1) for ids in _tokens(kept, tokenizer)]


def _of_pairs(
    prompts: Sequence[str | None], responses: Sequence[str | None], tokenizer: PreTrainedTokenizerBase
) -> list[Example]:
    pairs = zip(prompts, responses, strict=True)
    kept = [(prompt or "", response) for prompt, response in pairs if response and response.strip()]
    warn(len(prompts) - len(kept), "responses are empty; their rows are left out")
    written = [render(prompt, response, tokenizer) for prompt, response in kept]
    start, end = opening(tokenizer), [tokenizer.eos_token_id]
    if tokenizer.chat_template:  # which writes beginning and end itself
        start, end = [], []
    # Tokenized one by one: no token may span the border, as none does when the model is asked.
    asked = _tokens([prompt for prompt, _ in written], tokenizer)
    answered = _tokens([response for _, response in written], tokenizer)
    if tokenizer.chat_template:
        answered = _ended(answered, tokenizer)
    return [
        Example(start + given + learnt + end, max(1, len(start + given)))
        for given, learnt in zip(asked, answered, strict=True)
    ]


def _ended(responses: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Put the end of text after responses that the chat template ends with no token of its own."""
    marks = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    endless = [marks.isdisjoint(ids) for ids in responses]
    warn(sum(endless), f"responses have no end in the chat template: {tokenizer.eos_token} is put after each")
    end = [tokenizer.eos_token_id]
    return [ids + end if missing else ids for ids, missing in zip(responses, endless, strict=True)]


def _tokens(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def render(prompt: str, response: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Return prompt and response as the model sees them, in the chat template of the tokenizer if it has one.

    Without one, a line break separates them.

    Raises:
        InputError: in the chat template the prompt is not the beginning of prompt and response.
    """
    if not tokenizer.chat_template:
        return prompt + "\n", response
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    asked = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    answered = tokenizer.apply_chat_template(turns, tokenize=False)
    if not answered.startswith(asked):
        raise InputError(
            "the tokenizer's chat template writes a prompt with a response otherwise than one without, so it "
            "cannot be said where the response starts: write the whole texts into one column, --text_column"
        )
    return asked, answered[len(asked) :]


def opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token that the tokenizer puts before every text, [] if it puts none."""
    first = tokenizer("a")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def _cut(examples: list[Example], block_size: int) -> list[Example]:
    """Cut sequences to the block size; those with nothing left to learn are left out."""
    longer = sum(len(example.ids) > block_size for example in examples)
    warn(longer, f"of {len(examples)} sequences are longer than --block_size {block_size} tokens and are cut")
    kept = [Example(example.ids[:block_size], example.given) for example in examples]
    kept = [example for example in kept if len(example.ids) > example.given]
    warn(len(examples) - len(kept), "have no token left to learn and are left out")
    return kept


def pad_nothing(examples: Iterable[Example], block_size: int, filler: int) -> list[dict[str, list[int]]]:
    """Return a sequence for each example; a batch is padded when it is put together."""
    return [{"input_ids": example.ids, "labels": example.labels()} for example in examples]


def pack_examples(examples: Iterable[Example], block_size: int, filler: int) -> list[dict[str, list[int]]]:
    """Put whole examples together, one after the other, into sequences of the block size.

    Args:
        examples: each of at most the block size.
        block_size: tokens in a sequence.
        filler: token at the end of a sequence that nothing fits into.
    """
    sequences: list[list[Example]] = [[]]
    room = block_size
    for example in examples:
        if len(example.ids) > room:
            sequences.append([])
            room = block_size
        sequences[-1].append(example)
        room -= len(example.ids)
    return [_join(sequence, block_size, filler) for sequence in sequences if sequence]


def _join(examples: list[Example], block_size: int, filler: int) -> dict[str, list[int]]:
    rest = block_size - sum(len(example.ids) for example in examples)
    parts = [*examples, Example([filler] * rest, rest)]
    return {
        "input_ids": [token for part in parts for token in part.ids],
        "labels": [label for part in parts for label in part.labels()],
        "position_ids": [position for part in parts for position in range(len(part.ids))],
    }


@dataclass(frozen=True)
class Collator:
    """Makes a batch of sequences; shorter ones are filled up, and the filling is masked.

    Blocks of packed text, which have no labels of their own, are put together as in pre-training.
    """

    filler: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if "labels" not in rows[0]:
            return collate(rows)
        columns = {key: [torch.tensor(row[key]) for row in rows] for key in rows[0]}
        fillers = {"input_ids": self.filler, "labels": IGNORED, "position_ids": 0}
        batch = {
            key: pad_sequence(values, batch_first=True, padding_value=fillers[key])
            for key, values in columns.items()
        }
        if "position_ids" not in batch:  # a mask would hide from transformers that examples are packed
            lengths = [torch.ones(len(ids), dtype=torch.long) for ids in columns["input_ids"]]
            batch["attention_mask"] = pad_sequence(lengths, batch_first=True)
        return batch


def summed_losses(logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
    """Return for each sequence the sum of the losses and the number of tokens learnt, of shape (batch, 2).

    All that the Trainer then keeps of the logits. Its own evaluation loss weighs batches alike, not tokens.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    targets = labels[:, 1:]
    losses = cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, reduction="none")
    return torch.stack([losses.sum(dim=1), (targets != IGNORED).sum(dim=1)], dim=1)


def summarise(evaluation: EvalPrediction) -> dict[str, float]:
    """Return the mean loss in nats per token learnt, and the perplexity, from the `summed_losses`."""
    losses, tokens = evaluation.predictions.sum(axis=0, dtype="float64")
    return {"loss": float(losses / tokens), "perplexity": perplexity(float(losses / tokens))}
