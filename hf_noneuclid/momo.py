"""Momo: a step size truncated by a model of the loss. Scalars in, scalar out.

The model is the average of the linearisations of the losses that were seen, weighted as the momentum
weights their gradients, and cut off at a lower bound F* of the loss. At the parameters p it lies
h = f̄ + Σ⟨p, m⟩ - F* above the bound, where f̄ is the running average of f - Σ⟨p, g⟩. A step along the
steepest direction lowers it by τ D (constrained) or τ D² (regularized). A larger step than h / D or h / D²
would aim at a loss below F*, so the step size is truncated there. If F* is not known, a rule estimates it
while training.

*What a truncated step promises.* It takes the model down to F*. The next linearisation, of a loss f, has the
weight 1 - β, so that h is then (1 - β)(f - F*), without weight decay. If all steps are truncated, each but
the first promises to lower the loss by this much; the first promises f - F*. The learning rate plays no part
in it, nor does its schedule (except with the rule ``auto``), but the momentum β is a hidden step size.

*Clipping.* A gradient that was multiplied by c belongs to c f, a linearisation with a weight of c times the
others'. So f̄ averages c f - Σ⟨p, g⟩, the weight C averages c in the same way, and
h = f̄ + Σ⟨p, m⟩ - C F*. Then a constant factor on all gradients changes no truncated step. Without it, a
truncated step would be longer by 1 / c.

References:
    F. Schaipp, R. Ohana, M. Eickenberg, A. Defazio, R. M. Gower, "MoMo: Momentum Models for Adaptive
    Learning Rates", arXiv 2305.07583, 2024; carried over to any norm in arXiv 2510.09827, 2025.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Descent = Literal["constrained", "regularized"]
DESCENTS: tuple[str, ...] = get_args(Descent)

BoundRule = Literal["auto", "relative", "star"]
BOUND_RULES: tuple[str, ...] = get_args(BoundRule)


def model_value(running_loss: Tensor, momentum_inner: Tensor) -> Tensor:
    """H, the loss at the parameters by the average of the linearisations; C H where gradients were clipped.

    Args:
        running_loss: f̄, 0-d, in units of the loss.
        momentum_inner: Σ⟨p, m⟩ over all parameters before the step, 0-d.
    """
    return running_loss + momentum_inner


def truncated_step_size(lr: Tensor, height: Tensor, dual: Tensor, descent: Descent) -> Tensor:
    """The step size τ: the learning rate, or less where the model says so; 0 where D is 0.

    Args:
        lr: The scheduled learning rate η, 0-d.
        height: h = H - F*, the model above the lower bound, 0-d.
        dual: D, the dual norm of the momentum of the whole network, 0-d.
        descent: ``constrained`` divides h by D, ``regularized`` by D².
    """
    bound = height.clamp(min=0) / dual
    if descent == "regularized":
        bound = bound / dual  # not by D², which a tiny or huge D does not survive in float32
    return torch.where(dual == 0, 0, torch.minimum(lr, bound))


NO_BOUND = -1e30
"""Lower than any loss. Infinity would be NaN where the learning rate is 0."""


class Seen(NamedTuple):
    """What a rule for the lower bound gets at a step, all 0-d."""

    loss: Tensor
    """f."""
    model: Tensor
    """H."""
    learning_rate: Tensor
    """η."""


class LowerBound(ABC):
    """F*: a number, or a rule that estimates it while training and keeps what it knows in a vector."""

    initial: tuple[float, ...] = ()
    """The memory before the first step."""

    @abstractmethod
    def bound(self, memory: Tensor, seen: Seen) -> Tensor:
        """F* for this step, 0-d."""

    def part(self, memory: Tensor, seen: Seen) -> Tensor:
        """The part of the height h that a step may use, 0-d."""
        return torch.ones_like(seen.model)

    def remember(self, memory: Tensor, seen: Seen, decrease: Tensor) -> Tensor:
        """The memory after this step, which lowers the model by ``decrease``."""
        return memory


@dataclass(frozen=True, slots=True)
class Fixed(LowerBound):
    """A number that the loss does not go below."""

    value: float

    def bound(self, memory: Tensor, seen: Seen) -> Tensor:
        return torch.full_like(seen.model, self.value)


class Believed(LowerBound):
    """A number that is believed until a loss is below it, and bounds nothing from then on.

    It is for step sizes that something else bounds as well, so that a loss that turns out to be negative does
    not stop the training. Its memory is the bound.

    Args:
        value: The number.
    """

    def __init__(self, value: float) -> None:
        self.initial = (value,)

    def bound(self, memory: Tensor, seen: Seen) -> Tensor:
        return torch.where(seen.loss < memory[0], NO_BOUND, memory[0])

    def remember(self, memory: Tensor, seen: Seen, decrease: Tensor) -> Tensor:
        return self.bound(memory, seen).reshape(1)


class Star(LowerBound):
    """``star``: the online estimate of MoMo, the largest bound for which the last step was right.

    It assumes a convex loss that is never negative. Its memory is the bound.

    References:
        F. Schaipp et al., "MoMo: Momentum Models for Adaptive Learning Rates", arXiv 2305.07583, 2024: its
        online lower bound, and the reset of it when the model falls below it.
    """

    initial = (0.0,)

    def bound(self, memory: Tensor, seen: Seen) -> Tensor:
        return torch.where(seen.model < memory[0], seen.model / 2, memory[0]).clamp(min=0)

    def remember(self, memory: Tensor, seen: Seen, decrease: Tensor) -> Tensor:
        return (seen.model - decrease / 2).clamp(min=0).reshape(1)


@dataclass(frozen=True, slots=True)
class Relative(LowerBound):
    """``relative``: a fraction of a running mean of the loss. A step may lower the model by the rest.

    It assumes a loss above 0, of any scale. If the mean is not above 0 there is no bound, and nothing is
    truncated. Its memory is the mean.

    Args:
        fraction: In [0, 1); 0 gives the bound 0.
        horizon: The number of steps that the mean remembers.
    """

    fraction: float
    horizon: float

    initial = (math.nan,)

    def bound(self, memory: Tensor, seen: Seen) -> Tensor:
        return self._below(self._mean(memory[0], seen.loss))

    def remember(self, memory: Tensor, seen: Seen, decrease: Tensor) -> Tensor:
        return self._mean(memory[0], seen.loss).reshape(1)

    def _below(self, mean: Tensor) -> Tensor:
        return torch.where(mean > 0, self.fraction * mean, NO_BOUND)

    def _mean(self, mean: Tensor, loss: Tensor) -> Tensor:
        return torch.where(mean.isnan(), loss, mean + (loss - mean) / self.horizon)


@dataclass(frozen=True, slots=True)
class Scheduled(Relative):
    """``auto``: like ``relative``, with a slack below the mean, and with steps that follow the schedule.

    Near a loss of zero a fraction of the loss is tiny. The model, an average over other batches, is below it
    most of the time, and no step would be taken. The slack is a decrease that a step may always aim at. It
    also gives a bound if the mean is not above 0.

    A truncated step does not depend on the learning rate, so it would not follow a schedule that decays in
    order to average out the noise of the gradients. When the schedule has fallen to the part s of its peak,
    the height is multiplied by s. What is left of it counts again at the next step, so that steps fall more
    slowly, to s / (1 - β + β s) of what they would promise otherwise. The memory is the mean and the highest
    learning rate so far.

    Args:
        slack: In units of the loss; the default is meant for nats.
    """

    slack: float

    initial = (math.nan, 0.0)  # type: ignore[assignment]

    def part(self, memory: Tensor, seen: Seen) -> Tensor:
        peak = torch.maximum(memory[1], seen.learning_rate)
        return torch.where(peak > 0, seen.learning_rate / peak, 1)

    def remember(self, memory: Tensor, seen: Seen, decrease: Tensor) -> Tensor:
        peak = torch.maximum(memory[1], seen.learning_rate)
        return torch.stack([self._mean(memory[0], seen.loss), peak])

    def _below(self, mean: Tensor) -> Tensor:
        below = torch.where(mean > 0, self.fraction * mean, (2 - self.fraction) * mean)
        # A loss that is NaN makes the step a bad one, whatever the bound.
        return torch.where(mean.isnan(), NO_BOUND, torch.minimum(below, mean - self.slack))


def lower_bound(
    value: float | str, fraction: float, horizon: float, slack: float, *, alone: bool
) -> LowerBound:
    """The lower bound that the option ``loss_lower_bound`` means.

    Args:
        value: A number, or one of ``BOUND_RULES``.
        fraction: Of ``relative`` and ``auto``.
        horizon: The same.
        slack: Of ``auto``.
        alone: Nothing but Momo and the learning rate bounds the step size.
    """
    if isinstance(value, str):
        rules = {
            "auto": Scheduled(fraction, horizon, slack),
            "relative": Relative(fraction, horizon),
            "star": Star(),
        }
        return rules[value]
    return Fixed(value) if alone else Believed(value)
