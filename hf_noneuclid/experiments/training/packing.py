"""From documents to blocks of tokens of one length."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from hf_noneuclid.experiments.common import require
from hf_noneuclid.experiments.training.data import Documents

IGNORED = -100  # the label of a token that no loss is taken of
PIECE = 1 << 20  # characters tokenized at once: a large file in one piece needs a hundred times its size
BATCH = 256  # pieces handed over together: the tokenizer spreads them over the cores


@dataclass(frozen=True, slots=True)
class Blocks:
    """Sequences of tokens, and what the results say of them where the text is held in memory.

    That is the number of tokens, with the last partial block, the length of the text, and its hash.
    """

    dataset: Any
    tokens: int | None = None
    utf8_bytes: int | None = None
    sha256: str | None = None


def pack(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, block_size: int, limit: int | None = None
) -> Blocks:
    """Packs documents into blocks held in memory.

    Documents follow each other with the tokenizer's ``eos_token`` after each, and may span blocks. Only the
    tokens of the last partial block are lost, and those after ``limit`` blocks.
    """
    digest, utf8_bytes, tokens, chunks = hashlib.sha256(), 0, 0, []
    for text, is_last, ids in _encode(documents, tokenizer):
        content = text.encode()
        digest.update(content + b"\0" * is_last)
        utf8_bytes += len(content)
        tokens += len(ids)
        chunks.append(np.asarray(ids, dtype=np.int32))
        if limit is not None and tokens >= limit * block_size:
            break
    count = tokens // block_size if limit is None else min(limit, tokens // block_size)
    require(count, f"{tokens} tokens do not fill one block of --block_size {block_size}: give more text")
    rows = np.concatenate(chunks)[: count * block_size].reshape(count, block_size)
    dataset = datasets.Dataset.from_dict({"input_ids": rows}).with_format("numpy")
    return Blocks(dataset, tokens, utf8_bytes, digest.hexdigest())


def pack_lazily(documents: Documents, tokenizer: PreTrainedTokenizerBase, block_size: int) -> Blocks:
    """Packs a stream as it is read, another dataset into a cache on disk, and other text as ``pack`` does."""
    if documents.column is None:
        return pack(documents, tokenizer, block_size)
    options = {"documents": documents, "tokenizer": tokenizer, "block_size": block_size}
    has_block = next(_blocks(documents, tokenizer, block_size), None) is not None
    require(has_block, f"the training text does not fill one block of --block_size {block_size}")
    if isinstance(documents.rows, datasets.IterableDataset):
        return Blocks(BlockStream(documents, tokenizer, block_size))
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"), length=block_size)})
    packed = datasets.Dataset.from_generator(_blocks, features=features, gen_kwargs=options)
    return Blocks(packed.with_format("numpy"))


@dataclass(frozen=True, eq=False)
class BlockStream(torch.utils.data.IterableDataset[dict[str, list[int]]]):
    """Blocks of a stream; with several loader processes, each packs shards of its own."""

    documents: Documents
    tokenizer: PreTrainedTokenizerBase
    block_size: int

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        return _blocks(self.documents, self.tokenizer, self.block_size)

    def set_epoch(self, epoch: int) -> None:
        """Shuffles in another order from now on; the Trainer calls it."""
        self.documents.rows.set_epoch(epoch)  # type: ignore[attr-defined]


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Makes a batch of blocks: all tokens are labels but the first, which nothing predicts.

    Unmarked, the Trainer would count it, and its losses would be too small by one part in the block size.
    """
    input_ids = torch.from_numpy(np.stack([np.asarray(row["input_ids"]) for row in rows])).long()
    labels = input_ids.clone()
    labels[:, 0] = IGNORED
    return {"input_ids": input_ids, "labels": labels}


def spread(dataset: datasets.Dataset, count: int) -> datasets.Dataset:
    """At most ``count`` rows, evenly spread: the same ones in every run."""
    count = min(count, len(dataset))
    return dataset.select([i * len(dataset) // count for i in range(count)])


def _blocks(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, block_size: int
) -> Iterator[dict[str, list[int]]]:
    buffer: list[int] = []
    for _, _, ids in _encode(documents, tokenizer):
        buffer += ids
        whole = len(buffer) // block_size * block_size
        yield from ({"input_ids": buffer[i : i + block_size]} for i in range(0, whole, block_size))
        del buffer[:whole]


def _encode(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[str, bool, list[int]]]:
    """Pieces of documents, whether each is its document's last, and its tokens with the end-of-text token."""
    pieces = ((piece, is_last) for text in documents for piece, is_last in _pieces(text))
    while batch := list(itertools.islice(pieces, BATCH)):
        encoded = tokenizer([text for text, _ in batch], add_special_tokens=False, verbose=False)["input_ids"]
        for (text, is_last), ids in zip(batch, encoded, strict=True):
            yield text, is_last, ids + [tokenizer.eos_token_id] * is_last


def _pieces(text: str) -> Iterator[tuple[str, bool]]:
    """Cuts a text at line ends into pieces of about ``PIECE`` characters; the flag marks the last one."""
    start, is_last = 0, False
    while not is_last:
        end = text.find("\n", start + PIECE) + 1 or len(text)
        is_last = end == len(text)
        yield text[start:end], is_last
        start = end
