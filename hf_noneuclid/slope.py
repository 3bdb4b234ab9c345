"""The slope rule: a step size that nobody chooses. Scalars in, scalars out.

The gradient of every step also tells how well the step before was chosen. With u the direction of that step,
of length 1 in the product norm, the slope a = ⟨g, u⟩ is how fast the loss still falls along it. Compared
with D, what the momentum promises, it lies near 1 after a step that was far too short, at 0 after one that
reached the lowest point along its line, and below 0 after one that went past it. In runs whose learning rate
was tuned it lies a little above 0, whatever the model, its width, its text and its state of training.

So the step size starts tiny and doubles while the slope stays what it was (*growth*). When the slope has
fallen to a half of its largest value, the steps have become long enough to matter, and a quarter of the
length is kept. From then on the step size follows the slope towards its target, in smaller and smaller
corrections (*pursuit*). Matrices and vectors have a step size each: what is right for the one is often far
too long or too short for the other.

The rule needs no loss and no learning rate. A constant factor on all gradients changes no step. The learning
rate is an upper bound, and its schedule multiplies the step size from its peak on.

It rests on experience, not on a theorem: see recipes/results for the tasks on which it was chosen, and for
those on which it was only tested.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

GROWTH = 0.7
"""The largest change of log τ in a step of growth: a factor of 2."""
FALLEN = 0.5
"""Growth ends where the slope is below this part of its largest value."""
RETREAT = 0.25
"""The part of the step size that is kept then."""
TARGET = 0.07
"""The slope that pursuit aims at, as a part of D."""
STEADY = 0.15
"""A mean slope beyond this is no noise, and is followed at full speed."""

PARTS = 2
"""Matrices, vectors."""


class Pace(NamedTuple):
    """What the rule remembers, each of shape (2,): for the matrices and for the vectors."""

    log_step_size: Tensor
    """log τ, before the schedule; NaN before the first step."""
    is_growing: Tensor
    """1 or 0."""
    mean: Tensor
    """In growth, of the last slopes; in pursuit, of the last slopes as parts of D."""
    last: Tensor
    """The last slope in growth."""
    largest: Tensor
    """The largest mean in growth."""
    variance: Tensor
    """Of the slopes in growth: half the mean square of their differences, which a trend hardly changes."""
    steps: Tensor
    """The steps in growth, or in pursuit."""
    peak: Tensor
    """The highest learning rate so far."""


INITIAL_PACE = [[x] * PARTS for x in (math.nan, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)]
"""The pace before the first step."""


def advance(
    pace: Pace, slopes: Tensor, duals: Tensor, lr: Tensor, unit: Tensor, first_step: float
) -> tuple[Pace, Tensor]:
    """Chooses the step sizes τ of the matrices and of the vectors for this step.

    Args:
        pace: What is remembered from the steps before.
        slopes: a = ⟨g, u⟩ over the matrices and over the vectors, with u the step before per unit of its
            length, of shape (2,).
        duals: Σ c_i d_i over the matrices and over the vectors, of shape (2,). Together they are D.
        lr: The scheduled learning rate η, 0-d.
        unit: The length of a step with τ = 1, 0-d: 1 if constrained, D if regularized.
        first_step: Length of the first step, in the product norm.

    Returns:
        The pace, and τ before it is bounded by η, of shape (2,).
    """
    tiny = torch.finfo(slopes.dtype).tiny
    peak = torch.maximum(pace.peak, lr)
    schedule = torch.where(peak > 0, lr / peak.clamp(min=tiny), 1)
    growth, pursuit = _grow(pace, slopes, tiny), _pursue(pace, slopes / duals.clamp(min=tiny), schedule)
    is_growing = pace.is_growing > 0
    later = Pace(*(torch.where(is_growing, x, y) for x, y in zip(growth, pursuit, strict=True)))
    # A step size that the learning rate bounds does not grow on unseen.
    log = torch.where(
        peak > 0, torch.minimum(later.log_step_size, peak.clamp(min=tiny).log()), later.log_step_size
    )
    # Without a gradient there is no unit yet, and the first step is still to come.
    start = torch.where(unit > 0, math.log(first_step) - unit.clamp(min=tiny).log(), math.nan)
    is_first = pace.log_step_size.isnan()
    later = Pace(*(torch.where(is_first, x, y) for x, y in zip(pace, later, strict=True)))
    log = torch.where(is_first, start, log)
    step_size = torch.where(log.isnan(), 0, schedule * log.exp())
    return later._replace(log_step_size=log, peak=peak), step_size


def _grow(pace: Pace, slopes: Tensor, tiny: float) -> Pace:
    """Doubles τ while the slope stays what it was; keeps a quarter of it when it has fallen to a half."""
    is_first = pace.steps == 0
    mean = torch.where(is_first, slopes, (pace.mean + slopes) / 2)
    square = (slopes - pace.last).square() / 2
    variance = torch.where(is_first, 0, pace.variance + (square - pace.variance) / pace.steps.clamp(min=1))
    largest, noise = torch.maximum(pace.largest, mean), variance.sqrt()
    has_fallen = ~is_first & (mean + noise < FALLEN * largest)
    rise = GROWTH * (slopes / torch.maximum(largest, noise).clamp(min=tiny)).clamp(-1, 1)
    return Pace(
        log_step_size=pace.log_step_size + torch.where(has_fallen, math.log(RETREAT), rise),
        is_growing=pace.is_growing * ~has_fallen,
        mean=torch.where(has_fallen, 0, mean),
        last=slopes,
        largest=largest,
        variance=variance,
        steps=torch.where(has_fallen, 0, pace.steps + 1),
        peak=pace.peak,
    )


def _pursue(pace: Pace, ratios: Tensor, schedule: Tensor) -> Pace:
    """Moves τ towards where the slope is on target, in smaller and smaller corrections."""
    ratios = ratios.clamp(-1, 1)
    mean = pace.mean + (ratios - pace.mean) / 10
    gain = torch.where(mean > STEADY, 1, 2 / (2 + pace.steps))
    # Steps that the schedule has shortened have large slopes, which are its choice.
    change = gain * schedule**4 * (ratios - TARGET)
    return pace._replace(log_step_size=pace.log_step_size + change, mean=mean, steps=pace.steps + 1)
