"""Accuracy and macro F1 as a metric of the evaluate library, which would download its own from the Hub."""

from collections.abc import Sequence

import datasets
import evaluate
from sklearn.metrics import accuracy_score, f1_score


class AccuracyAndMacroF1(evaluate.Metric):
    """Share of right predictions, and the mean over the classes of F1, classes nobody predicts included.

    Example:
        >>> AccuracyAndMacroF1(keep_in_memory=True).compute(predictions=[0, 1], references=[0, 1])
        {'accuracy': 1.0, 'macro_f1': 1.0}
    """

    def _info(self) -> evaluate.MetricInfo:
        integer = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation="",
            features=datasets.Features({"predictions": integer, "references": integer}),
        )

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {
            "accuracy": float(accuracy_score(references, predictions)),
            "macro_f1": float(f1_score(references, predictions, average="macro", zero_division=0.0)),
        }
