"""From rows to tokens and classes, and what is measured of the predicted ones."""

import hashlib
from collections import Counter
from typing import Any

import datasets
import torch
from torch.nn.functional import cross_entropy
from transformers import EvalPrediction, PreTrainedTokenizerBase

from hf_noneuclid.experiments.common import InputError
from hf_noneuclid.experiments.finetuning.class_metrics import AccuracyAndMacroF1
from hf_noneuclid.experiments.finetuning.finetune_options import FinetuneDataArguments
from hf_noneuclid.experiments.finetuning.rows import Rows, warn
from hf_noneuclid.experiments.training.packing import Blocks

MOST_NUMBERS = 20  # more of them than that are a score if they have fractions, or if most occur only once:
MOST_ONCE = 0.9  # different ones a row
UNLABELLED = -1  # what the Hub's hidden test splits hold


def class_names(rows: Rows, column: str) -> list[str]:
    """Return the classes in the training part, in the order of their numbers or else sorted.

    Raises:
        InputError: a row has no class, a class of the validation part was never trained on, there is only
            one, or the classes are a score.
    """
    train, validation = (_labels(part, column) for part in (rows.train, rows.validation))
    known = set(train)
    if _declared(rows.train, column) is None:
        _check_discrete(known, len(train), f"{rows.name}: column {column!r}")
    unseen = Counter(label for label in validation if label not in known)
    if unseen:
        listed = ", ".join(f"{label!r} ({count} rows)" for label, count in sorted(unseen.items()))
        raise InputError(
            f"{rows.name}: these labels of the validation part never occur in training: {listed}. Leave "
            f"their rows out, or train on some: with a larger --max_train_rows, if it is given, or with "
            f"--validation_share, of every class, in place of --validation_files or --validation_split"
        )
    names = _declared(rows.train, column) or sorted(known, key=_number_or_text)
    if len(known) < 2:
        raise InputError(f"{rows.name}: column {column!r} holds one class only, {train[0]!r}")
    return names


def _check_discrete(labels: set[str], rows: int, column: str) -> None:
    if len(labels) <= MOST_NUMBERS:
        return
    try:
        numbers = [float(label) for label in labels]
    except ValueError:
        return
    if len(labels) > MOST_ONCE * rows or any(number % 1 for number in numbers):
        raise InputError(
            f"{column} holds {len(labels)} different numbers in {rows} rows, as {max(labels, key=len)}: "
            f"a score, not classes. Round it to a few of them, or choose another --label_column"
        )


def _declared(dataset: datasets.Dataset, column: str) -> list[str] | None:
    feature = dataset.features[column]
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def _labels(dataset: datasets.Dataset, column: str) -> list[str]:
    """Return the class of every row as text."""
    values, names = dataset[column], _declared(dataset, column)
    missing = sum(value is None or (names is not None and value == UNLABELLED) for value in values)
    if missing:
        raise InputError(f"column {column!r}: {missing} of {len(values)} rows have no label")
    return [names[value] if names else str(value) for value in values]


def _number_or_text(label: str) -> tuple[bool, float, str]:
    try:
        return False, float(label), label
    except ValueError:
        return True, 0.0, label


def encode(
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    args: FinetuneDataArguments,
    names: list[str],
) -> Blocks:
    """Make tokens, cut to `--block_size`, and numbers of classes of rows.

    Raises:
        InputError: no row has a text.
    """
    pairs = list(zip(rows[args.text_column], _labels(rows, args.label_column), strict=True))
    kept = [(text, label) for text, label in pairs if text and text.strip()]
    texts, labels = [text for text, _ in kept], [names.index(label) for _, label in kept]
    if not kept:
        raise InputError(f"no row has a text in column {args.text_column!r}")
    lengths = [len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]]
    longer = sum(length > args.block_size for length in lengths)
    warn(len(pairs) - len(kept), "rows have no text and are left out")
    warn(longer, f"of {len(kept)} texts are longer than --block_size {args.block_size} and are cut")
    encoded = tokenizer(texts, truncation=True, max_length=args.block_size)
    columns = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
    digest = hashlib.sha256(repr(kept).encode()).hexdigest()
    return Blocks(datasets.Dataset.from_dict({**columns, "labels": labels}), sum(lengths), sha256=digest)


def keep_logits(logits: torch.Tensor | tuple[Any, ...], labels: torch.Tensor) -> torch.Tensor:
    """Return the logits alone: a decoder's classifier hands out its cache, too."""
    return (logits[0] if isinstance(logits, tuple) else logits).float()


def summarise(evaluation: EvalPrediction) -> dict[str, float]:
    """Return the mean loss in nats, accuracy and macro F1."""
    logits, labels = torch.from_numpy(evaluation.predictions), torch.from_numpy(evaluation.label_ids)
    measured = AccuracyAndMacroF1(keep_in_memory=True).compute(
        predictions=logits.argmax(dim=-1).tolist(), references=labels.tolist()
    )
    return {"loss": float(cross_entropy(logits.double(), labels)), **measured}
