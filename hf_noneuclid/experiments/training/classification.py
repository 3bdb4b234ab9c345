"""From rows to tokens and classes, and what is measured of the predictions."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import torch
from sklearn.metrics import accuracy_score, f1_score
from torch.nn.functional import cross_entropy
from transformers import EvalPrediction, PreTrainedTokenizerBase

from hf_noneuclid.experiments.common import InputError, require
from hf_noneuclid.experiments.training.arguments import ClassifyDataArguments
from hf_noneuclid.experiments.training.data import Corpus, warn
from hf_noneuclid.experiments.training.packing import Blocks

# More numbers than MOST_NUMBERS are a score, not classes, if they have fractions or if most are different.
MOST_NUMBERS = 20
MOST_DIFFERENT = 0.9  # of the rows
UNLABELLED = -1  # in the hidden test splits of the Hub


def class_names(rows: Corpus, column: str) -> list[str]:
    """The classes in the training part, in the order of their numbers or else sorted."""
    train, validation = (_labels(part, column) for part in (rows.train, rows.validation))
    known, feature = set(train), rows.train.features[column]
    declared = feature.names if isinstance(feature, datasets.ClassLabel) else None
    if declared is None:
        _check_discrete(known, len(train), f"{rows.name}: column {column!r}")
    unseen = Counter(label for label in validation if label not in known)
    if unseen:
        listed = ", ".join(f"{label!r} ({count} rows)" for label, count in sorted(unseen.items()))
        raise InputError(
            f"{rows.name}: these labels of the validation part never occur in training: {listed}. Leave "
            f"their rows out, or train on some of them: with a larger --max_train_rows, if it is given, or "
            f"with --validation_share instead of --validation_files or --validation_split"
        )
    require(len(known) > 1, f"{rows.name}: column {column!r} holds one class only, {train[0]!r}")
    return declared or sorted(known, key=_number_or_text)


def _check_discrete(labels: set[str], rows: int, column: str) -> None:
    numbers = [number for is_text, number, _ in map(_number_or_text, labels) if not is_text]
    is_score = len(labels) > MOST_DIFFERENT * rows or any(number % 1 for number in numbers)
    if is_score and len(labels) == len(numbers) > MOST_NUMBERS:
        raise InputError(
            f"{column} holds {len(labels)} different numbers in {rows} rows: a score, not classes. "
            f"Round it to a few values, or choose another --label_column"
        )


def _labels(dataset: datasets.Dataset, column: str) -> list[str]:
    """The class of every row as text."""
    values, feature = list(dataset[column]), dataset.features[column]
    if isinstance(feature, datasets.ClassLabel):
        values = [None if value in (None, UNLABELLED) else feature.names[value] for value in values]
    missing = values.count(None)
    require(not missing, f"column {column!r}: {missing} of {len(values)} rows have no label")
    return [str(value) for value in values]


def _number_or_text(label: str) -> tuple[bool, float, str]:
    try:
        return False, float(label), label
    except ValueError:
        return True, 0.0, label


def encode(
    rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, args: ClassifyDataArguments, names: list[str]
) -> Blocks:
    """Makes tokens, cut to ``--block_size``, and numbers of classes."""
    pairs = list(zip(rows[args.text_column], _labels(rows, args.label_column), strict=True))
    kept = [(text, label) for text, label in pairs if text and text.strip()]
    require(kept, f"no row has a text in column {args.text_column!r}")
    texts, labels = [text for text, _ in kept], [names.index(label) for _, label in kept]
    lengths = [len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]]
    warn(len(pairs) - len(kept), "rows have no text and are left out")
    longer = sum(length > args.block_size for length in lengths)
    warn(longer, f"of {len(kept)} texts are longer than --block_size {args.block_size} and are cut")
    encoded = tokenizer(texts, truncation=True, max_length=args.block_size)
    columns = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
    digest = hashlib.sha256(repr(kept).encode()).hexdigest()
    return Blocks(datasets.Dataset.from_dict({**columns, "labels": labels}), sum(lengths), sha256=digest)


class AccuracyAndMacroF1(evaluate.Metric):
    """Accuracy, and the mean of F1 over the classes, those that are never predicted included.

    The metrics of the evaluate library would be downloaded from the Hub.

    Example:
        >>> AccuracyAndMacroF1(keep_in_memory=True).compute(predictions=[0, 1], references=[0, 1])
        {'accuracy': 1.0, 'macro_f1': 1.0}
    """

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(dict.fromkeys(("predictions", "references"), datasets.Value("int64")))
        return evaluate.MetricInfo(description=self.__doc__ or "", citation="", features=features)

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {
            "accuracy": float(accuracy_score(references, predictions)),
            "macro_f1": float(f1_score(references, predictions, average="macro", zero_division=0.0)),
        }


def keep_logits(logits: torch.Tensor | tuple[Any, ...], labels: torch.Tensor) -> torch.Tensor:
    """The logits alone: the classifier of a decoder also returns its cache."""
    kept: torch.Tensor = logits[0] if isinstance(logits, tuple) else logits
    return kept.float()


def summarise(evaluation: EvalPrediction) -> dict[str, float]:
    """The mean loss in nats, accuracy and macro F1."""
    logits, labels = torch.from_numpy(evaluation.predictions), torch.from_numpy(evaluation.label_ids)
    measured = AccuracyAndMacroF1(keep_in_memory=True).compute(
        predictions=logits.argmax(dim=-1).tolist(), references=labels.tolist()
    )
    return {"loss": float(cross_entropy(logits.double(), labels)), **measured}
