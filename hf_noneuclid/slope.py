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

The rule needs no loss and no learning rate. A constant factor on all gradients changes no step, except
through the adaptive ℓ2 norm, whose directions themselves depend on the size of the gradients. The learning
rate is an upper bound of the length, and its schedule multiplies the length from its peak on: a warm-up only
bounds it.

*What it rests on.* Experience, not a theorem: it was chosen on the tasks of the suite ``step_size_dev``, and
``step_size_test`` has others. A slope near 0 says that steps are long enough, and only early in a run whether
they are too long. Where a gradient is mostly noise, as with very small batches, it says little at all. After
a change of the data, steps become too long before they come back. A failure looks like this in the log: the
step size grows while the loss jumps or stalls, or it stays tiny while the loss falls slowly.

*What it costs.* The last step per unit of its length is kept, 2 bytes a parameter in bfloat16 (8 in float64),
laid out and sharded as the momentum is. Every step reads it once and writes it once, and reads the gradients
twice more, for a and for ‖g‖. The ranks add four numbers to a sum that they take anyway.

*How it differs.* Hypergradient descent, too, moves the step size by the inner product of a gradient with the
last step, but at a rate that has to be chosen for the size of the gradients. Here the inner product is a part
of the dual norm D, so that it means the same for every model; growth compares it with its own largest value;
and there are two step sizes. D-Adaptation and Prodigy estimate the distance from the start x_0 to a solution
from below. Distance-Aware Muon takes the radius that was explored so far, a certificate of the descent, or
one of the distance and a search. Here is no x_0, no distance and no radius, and in return no guarantee.

References:
    A. G. Baydin, R. Cornish, D. Martínez Rubio, M. Schmidt, F. Wood, "Online Learning Rate Adaptation with
    Hypergradient Descent", arXiv 1703.04782, 2017.
    A. Defazio, K. Mishchenko, "Learning-Rate-Free Learning by D-Adaptation", arXiv 2301.07733, 2023.
    K. Mishchenko, A. Defazio, "Prodigy: An Expeditiously Adaptive Parameter-Free Learner", arXiv 2306.06101,
    2023.
    Y. Demidovich, A. Chakraborty, G. Malinovsky, P. Richtárik, A. Nedić, "Distance-Aware Muon: Adaptive Step
    Scaling for Normalized Optimization", arXiv 2605.18999, 2026.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

GROWTH = 0.7
"""The largest change of the logarithm of the length in a step of growth: a factor of 2."""
FALLEN = 0.5
"""Growth ends where the slope is below this part of its largest value."""
RETREAT = 0.25
"""The part of the length that is kept then."""
TARGET = 0.07
"""The slope that pursuit aims at, as a part of D."""
STEADY = 0.15
"""A mean slope above this is not noise: steps are far too short, as after a change of the data. Corrections
are large again then."""
RESTART = 3
"""As large as they were at this step."""

PARTS = 2
"""Matrices, vectors."""


class Pace(NamedTuple):
    """What the rule remembers, each of shape (2,): for the matrices and for the vectors."""

    log_length: Tensor
    """log of the length, before the schedule; in units of D over ‖g‖ if regularized. NaN at first."""
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
    share: Tensor
    """The part of its length that the last step went; the rest was forbidden by η, its schedule or Momo."""
    gradient_norm: Tensor
    """The running mean of ‖g‖, with the weights that the momentum has."""
    peak: Tensor
    """The highest learning rate so far."""


INITIAL_PACE = [[x] * PARTS for x in (math.nan, 1.0, *[0.0] * 8)]
"""The pace before the first step."""


class Reading(NamedTuple):
    """What the rule sees at a step."""

    slopes: Tensor
    """a = ⟨g, u⟩ with u the step before per unit of its length, of shape (2,)."""
    gradient_norms: Tensor
    """‖g‖, the Euclidean norms, of shape (2,)."""
    duals: Tensor
    """Σ c_i d_i, of shape (2,). Together they are D."""
    lr: Tensor
    """The scheduled learning rate η, 0-d."""
    limit: Tensor
    """The largest length that η and Momo allow, of shape (2,) or 0-d."""


def advance(
    pace: Pace, seen: Reading, *, momentum: float, first_step: float, regularized: bool
) -> tuple[Pace, Tensor]:
    """Chooses the lengths of the steps of the matrices and of the vectors.

    Args:
        pace: What is remembered from the steps before.
        seen: What is seen at this step.
        momentum: β.
        first_step: Length of the first step, in the product norm.
        regularized: The length is in proportion to D, as in regularized descent.

    Returns:
        The pace, and the lengths, of shape (2,).
    """
    tiny = torch.finfo(seen.lr.dtype).tiny
    is_first = pace.log_length.isnan()
    norm = momentum * pace.gradient_norm + (1 - momentum) * seen.gradient_norms
    norm = torch.where(is_first, seen.gradient_norms, norm)
    # The slope is that of one gradient, and D that of an average of many: each is divided by its size. So a
    # loss that becomes ten times as large, or a spike that the momentum still remembers, is not mistaken.
    slopes = seen.slopes / seen.gradient_norms.clamp(min=tiny)
    duals = seen.duals / norm.clamp(min=tiny)
    unit = (seen.duals.sum() / norm.clamp(min=tiny)).clamp(min=tiny) if regularized else torch.ones_like(norm)
    # After a spike, or where gradients vanish, the momentum would go on for many steps without support.
    support = (2 * seen.gradient_norms / norm.clamp(min=tiny)).clamp(max=1)
    peak = torch.maximum(pace.peak, seen.lr)
    factor = support * torch.where(peak > 0, seen.lr / peak.clamp(min=tiny), 1)

    growth, pursuit = _grow(pace, slopes, tiny), _pursue(pace, slopes / duals.clamp(min=tiny))
    known = torch.where(pace.is_growing > 0, torch.stack(growth), torch.stack(pursuit))
    is_known = (seen.gradient_norms > 0) & ~is_first
    later = Pace(*torch.where(is_known, known, torch.stack(pace)))
    # A length that the learning rate bounds does not grow on unseen.
    highest = torch.where(peak > 0, (peak.clamp(min=tiny) / unit).log(), math.inf)
    # Without a gradient there is no unit yet, and the first step is still to come.
    start = torch.where(seen.gradient_norms > 0, math.log(first_step) - unit.log(), math.nan)
    log = torch.where(is_first, start, torch.minimum(later.log_length, highest))
    full = torch.where(log.isnan(), 0, unit * log.exp())
    lengths = torch.minimum(factor * full, seen.limit)
    share = lengths / full.clamp(min=tiny)
    return later._replace(log_length=log, share=share, gradient_norm=norm, peak=peak), lengths


def _grow(pace: Pace, slopes: Tensor, tiny: float) -> Pace:
    """Doubles while the slope stays what it was; keeps a quarter when it has fallen to a half."""
    is_first = pace.steps == 0
    mean = torch.where(is_first, slopes, (pace.mean + slopes) / 2)
    square = (slopes - pace.last).square() / 2
    variance = torch.where(is_first, 0, pace.variance + (square - pace.variance) / pace.steps.clamp(min=1))
    largest, noise = torch.maximum(pace.largest, mean), variance.sqrt()
    has_fallen = ~is_first & (mean + noise < FALLEN * largest)
    rise = pace.share * GROWTH * (slopes / torch.maximum(largest, noise).clamp(min=tiny)).clamp(-1, 1)
    return pace._replace(
        log_length=pace.log_length + torch.where(has_fallen, math.log(RETREAT), rise),
        is_growing=pace.is_growing * ~has_fallen,
        mean=torch.where(has_fallen, 0, mean),
        last=slopes,
        largest=largest,
        variance=variance,
        steps=torch.where(has_fallen, 0, pace.steps + 1),
    )


def _pursue(pace: Pace, ratios: Tensor) -> Pace:
    """Moves towards where the slope is on target, in smaller and smaller corrections."""
    ratios = ratios.clamp(-1, 1)
    # Steps that something else has shortened have large slopes, which say little about the length.
    mean = pace.mean + pace.share * (ratios - pace.mean) / 10
    steps = pace.steps + 1
    steps = torch.where(mean > STEADY, steps.clamp(max=RESTART), steps)
    change = 2 / (1 + steps) * pace.share * (ratios - TARGET)
    return pace._replace(log_length=pace.log_length + change, mean=mean, steps=steps)
