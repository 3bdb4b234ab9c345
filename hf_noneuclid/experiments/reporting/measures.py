"""What a curve of final loss against learning rate says: basin width, regret, robustness; and verdicts.

A curve is given as learning rates in rising order and a loss for each, in nats per token: infinity where a
run diverged, None where no run has finished (a hole).

References:
    M. Crawshaw, C. Modi, M. Liu, R. M. Gower, "An Exploration of Non-Euclidean Gradient Descent: Muon and its
    Many Variants", arXiv:2510.09827, 2025.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any

from hf_noneuclid.experiments.common import History, series

Losses = Sequence[float | None]
SAME_RATE = 0.1  # decades within which a learning rate of the grid stands for the one asked for
ENOUGH_SEEDS = 3  # fewer say nothing about the paper's figures


@dataclass(frozen=True)
class Basin:
    """The learning rates at which a curve is below a threshold.

    Attributes:
        width: decades, summed over the intervals.
        intervals: first and last learning rate of each.
        at_least: the basin reaches an end of the grid or a hole, so the true width may be larger.
    """

    width: float
    intervals: tuple[tuple[float, float], ...]
    at_least: bool


def basin(rates: Sequence[float], losses: Losses, threshold: float) -> Basin:
    """Return where the curve, interpolated linearly in the logarithm of the learning rate, is low enough.

    Nothing is interpolated towards a diverged neighbour or a hole: there the basin ends at the grid point.

    Args:
        rates: learning rates, rising.
        losses: one for each.
        threshold: the highest loss that counts, in nats per token.
    """
    places = [math.log10(rate) for rate in rates]
    merged: list[tuple[float, float]] = []
    for low, high in sorted(_low_pieces(places, losses, threshold)):
        if merged and low <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], high))
        else:
            merged.append((low, high))
    width = sum(high - low for low, high in merged)
    intervals = tuple((_rate(low), _rate(high)) for low, high in merged)
    return Basin(width, intervals, _is_cut_off(losses, threshold))


def _low_pieces(places: Sequence[float], losses: Losses, threshold: float) -> Iterator[tuple[float, float]]:
    for place, loss in zip(places, losses, strict=True):
        if loss is not None and loss <= threshold:
            yield place, place
    for (left, first), (right, second) in pairwise(zip(places, losses, strict=True)):
        if first is None or second is None or (first > threshold and second > threshold):
            continue
        if first <= threshold and second <= threshold:
            yield left, right
        elif math.isfinite(first) and math.isfinite(second):
            crossing = left + (right - left) * (threshold - first) / (second - first)
            yield (left, crossing) if first <= threshold else (crossing, right)


def _is_cut_off(losses: Losses, threshold: float) -> bool:
    padded = [None, *losses, None]
    return any(
        loss is not None and loss <= threshold and None in (padded[i], padded[i + 2])
        for i, loss in enumerate(losses)
    )


def _rate(place: float) -> float:
    """Return the learning rate without the digits that taking the logarithm made."""
    return float(f"{10**place:.6g}")


def best_index(losses: Losses) -> int | None:
    """Return where the loss is lowest, None if no run ended with a finite loss."""
    finite = [i for i, loss in enumerate(losses) if loss is not None and math.isfinite(loss)]
    return min(finite, key=lambda i: losses[i], default=None)


def regret(losses: Losses, best: int | None) -> list[float | None]:
    """Return the loss minus that at the curve's best place, in nats, for each learning rate."""
    if best is None:
        return [None] * len(losses)
    return [None if loss is None else loss - losses[best] for loss in losses]


def robustness(rates: Sequence[float], losses: Losses, best: int | None) -> tuple[float | None, bool]:
    """Return the largest regret within a decade of the curve's best learning rate, on either side.

    Args:
        rates: learning rates, rising.
        losses: one for each.
        best: place of the best one.

    Returns:
        Nats per token (infinity if a run there diverged, None without a best), and whether it may be larger:
        the grid has no point a decade away on one of the sides, or a hole before.
    """
    if best is None:
        return None, False
    offsets = [math.log10(rate / rates[best]) for rate in rates]
    inside = [i for i, offset in enumerate(offsets) if abs(offset) <= 1 + SAME_RATE]
    worst = max(regret(losses, best)[i] or 0.0 for i in inside)
    short = any(nearest(rates, factor * rates[best]) is None for factor in (0.1, 10))
    return worst, short or any(losses[i] is None for i in inside)


def nearest(rates: Sequence[float], wanted: float) -> int | None:
    """Return which learning rate of the grid is the wanted one, None if all are too far from it."""
    distances = [abs(math.log10(rate / wanted)) for rate in rates]
    closest = min(range(len(rates)), key=distances.__getitem__, default=None)
    return None if closest is None or distances[closest] > SAME_RATE else closest


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and the sample standard deviation, None of a single value."""
    return fmean(values), stdev(values) if len(values) > 1 else None


def within(best: float, fraction: float) -> float:
    """Return the loss that is worse than the best by a fraction of it."""
    return best + fraction * abs(best)


def steps_to(history: History, target: float) -> int | None:
    """Return the step of the first evaluation with a loss at or below the target, None without one."""
    evaluations = zip(*series(history, "eval_loss"), strict=True)
    return next((step for step, loss in evaluations if loss <= target), None)


def verdict(losses: Sequence[float], mean: float, std: float, tolerance: float = 0.0) -> dict[str, Any]:
    """Hold our final losses against a published mean.

    Args:
        losses: one for each seed, at the best learning rate, in nats per token.
        mean: the published mean.
        std: its standard deviation over seeds.
        tolerance: difference allowed on top of two standard deviations, in nats per token.

    Returns:
        `difference`, `allowed`, and `verdict`: reproduced, not reproduced, or not run (under three seeds).
    """
    ours, spread = mean_std(losses) if losses else (None, None)
    difference = None if ours is None else ours - mean
    if ours is None or len(losses) < ENOUGH_SEEDS:
        return {"difference": difference, "allowed": None, "verdict": "not run"}
    allowed = 2 * math.hypot(spread or 0.0, std) + tolerance
    word = "reproduced" if abs(difference) <= allowed else "not reproduced"
    return {"difference": difference, "allowed": allowed, "verdict": word}
