"""Measures of a curve of final loss against learning rate: basin width, regret, robustness, verdicts.

A curve is given as learning rates in rising order and a loss for each, in nats per token: infinity where a
run diverged, None where no run has finished (a gap).

References:
    M. Crawshaw, C. Modi, M. Liu, R. M. Gower, "An Exploration of Non-Euclidean Gradient Descent: Muon and its
    Many Variants", arXiv:2510.09827, 2025.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean, stdev

from hf_noneuclid.experiments.common import History, series

Losses = Sequence[float | None]
SAME_RATE = 0.1  # decades within which a learning rate of the grid counts as the wanted one
ENOUGH_SEEDS = 3  # with fewer there is no verdict


@dataclass(frozen=True)
class Basin:
    """The learning rates at which a curve is below a threshold.

    Attributes:
        width: Decades, summed over the intervals.
        intervals: First and last learning rate of each.
        at_least: Whether the basin reaches an end of the grid or a gap, so that the true width may be larger.
    """

    width: float
    intervals: tuple[tuple[float, float], ...]
    at_least: bool


def basin(rates: Sequence[float], losses: Losses, threshold: float) -> Basin:
    """The learning rates at which the curve is at or below a threshold.

    The loss is interpolated linearly in the logarithm of the learning rate, but not towards a diverged
    neighbour or a gap: there the basin ends at the grid point.

    Args:
        rates: Learning rates, rising.
        losses: One for each.
        threshold: The highest loss that counts, in nats per token.
    """
    # Nothing is known beyond the ends of the grid, as in a gap.
    values = [math.nan, *(math.nan if loss is None else loss for loss in losses), math.nan]
    places = [math.nan, *(math.log10(rate) for rate in rates), math.nan]

    def edge(good: int, beside: int) -> float:
        """Where the curve crosses the threshold on the way to a neighbour, if it does so."""
        if not math.isfinite(values[beside]):
            return places[good]
        left, right = sorted((good, beside))
        rise = values[right] - values[left]
        return places[left] + (places[right] - places[left]) * (threshold - values[left]) / rise

    width: float = 0
    intervals, at_least = [], False
    for is_good, group in groupby(range(len(values)), key=lambda i: values[i] <= threshold):
        members = list(group)
        if is_good:
            ends = (members[0], members[0] - 1), (members[-1], members[-1] + 1)
            low, high = (edge(*end) for end in ends)
            width += high - low
            # Six digits: the others come from the logarithm.
            intervals.append((float(f"{10**low:.6g}"), float(f"{10**high:.6g}")))
            at_least |= any(math.isnan(values[beside]) for _, beside in ends)
    return Basin(width, tuple(intervals), at_least)


def best_index(losses: Losses) -> int | None:
    """The place of the lowest loss; None if no run ended with a finite loss."""
    finite = [(loss, i) for i, loss in enumerate(losses) if loss is not None and math.isfinite(loss)]
    return min(finite)[1] if finite else None


def regret(losses: Losses, best: int | None) -> list[float | None]:
    """The loss minus the loss at the curve's best place, in nats, for each learning rate."""
    lowest = None if best is None else losses[best]
    return [None if loss is None or lowest is None else loss - lowest for loss in losses]


def robustness(rates: Sequence[float], losses: Losses, best: int | None) -> tuple[float | None, bool]:
    """The largest regret within a decade of the curve's best learning rate, on either side.

    Args:
        rates: Learning rates, rising.
        losses: One for each.
        best: Place of the best one.

    Returns:
        Nats per token (infinity if a run there diverged, None without a best one), and whether it may be
        larger, because the grid has no point a decade away on one side, or a gap before it.
    """
    if best is None:
        return None, False
    offsets = [math.log10(rate / rates[best]) for rate in rates]
    inside = [i for i, offset in enumerate(offsets) if abs(offset) <= 1 + SAME_RATE]
    worst = max(regret(losses, best)[i] or 0.0 for i in inside)
    short = not all(any(abs(offset - side) <= SAME_RATE for offset in offsets) for side in (-1, 1))
    return worst, short or any(losses[i] is None for i in inside)


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and the sample standard deviation, which is None for a single value."""
    return fmean(values), stdev(values) if len(values) > 1 else None


def steps_to(history: History, target: float) -> int | None:
    """The step of the first evaluation with a loss at or below the target; None if there is none."""
    evaluations = zip(*series(history, "eval_loss"), strict=True)
    return next((step for step, loss in evaluations if loss <= target), None)


@dataclass(frozen=True)
class Verdict:
    """Our final losses compared with a published mean, in nats per token.

    Attributes:
        word: reproduced, not reproduced, or not run (under three seeds).
        difference: Our mean minus the published one.
        allowed: The largest difference that counts as reproduced.
    """

    word: str
    difference: float | None = None
    allowed: float | None = None


def verdict(losses: Sequence[float], mean: float, std: float, tolerance: float = 0.0) -> Verdict:
    """Compares our final losses, one for each seed at the best learning rate, with a published mean.

    Args:
        losses: Our losses, in nats per token.
        mean: The published mean.
        std: Its standard deviation over seeds.
        tolerance: Difference that is allowed beyond two standard deviations, in nats per token.
    """
    if not losses:
        return Verdict("not run")
    ours, spread = mean_std(losses)
    difference = ours - mean
    if len(losses) < ENOUGH_SEEDS:
        return Verdict("not run", difference)
    allowed = 2 * math.hypot(spread or 0.0, std) + tolerance
    return Verdict("reproduced" if abs(difference) <= allowed else "not reproduced", difference, allowed)
