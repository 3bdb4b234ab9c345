"""Momo: a step size truncated by a model of the loss. Scalars in, scalar out.

The model is the average of the linearisations of the losses that were seen, weighted as the momentum
weights their gradients, and cut off at a lower bound F* of the loss. At the parameters p it is worth
h = f̄ - F* + Σ⟨p, m⟩ above the bound, where f̄ is the running average of f - Σ⟨p, g⟩. A step along the
steepest direction lowers it by τ D (constrained) or τ D² (regularized), so a larger step than h / D or
h / D² would go for a loss that cannot be.

References:
    F. Schaipp, R. Ohana, M. Eickenberg, A. Defazio, R. M. Gower, "MoMo: Momentum Models for Adaptive
    Learning Rates", arXiv 2305.07583, 2024; carried over to any norm in arXiv 2510.09827, 2025.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Descent = Literal["constrained", "regularized"]
DESCENTS: tuple[str, ...] = get_args(Descent)

BOUND_RULES = ("auto", "star")


def model_value(running_loss: Tensor, momentum_inner: Tensor) -> Tensor:
    """What the average of the linearisations says the loss is at the parameters, H.

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


def model_decrease(step_size: Tensor, dual: Tensor, descent: Descent) -> Tensor:
    """By how much a step lowers the model: τ D (constrained) or τ D² (regularized), 0-d."""
    decrease = step_size * dual
    return decrease * dual if descent == "regularized" else decrease


class LowerBound(ABC):
    """F*, a number or a rule that finds one while training. What a rule knows is a number, its memory."""

    initial: float | None = None
    """The memory before the first step, if there is any."""

    @abstractmethod
    def bound(self, memory: Tensor, loss: Tensor, model: Tensor) -> Tensor:
        """F* for this step.

        Args:
            memory: From the step before, 0-d.
            loss: f, 0-d.
            model: H, 0-d.
        """

    def remember(self, memory: Tensor, loss: Tensor, model: Tensor, decrease: Tensor) -> Tensor:
        """The memory after this step, which lowers the model by ``decrease``."""
        return memory


@dataclass(frozen=True, slots=True)
class Fixed(LowerBound):
    """A number that the loss does not go below."""

    value: float

    def bound(self, memory: Tensor, loss: Tensor, model: Tensor) -> Tensor:
        return torch.full_like(model, self.value)


class Star(LowerBound):
    """The largest bound with which the last step would still have been right, by the theory of MoMo.

    It assumes a convex loss that is never negative. Its memory is the bound.

    References:
        F. Schaipp et al., "MoMo: Momentum Models for Adaptive Learning Rates", arXiv 2305.07583, 2024: its
        online lower bound, and the reset of that where the model has come below it.
    """

    initial = 0.0

    def bound(self, memory: Tensor, loss: Tensor, model: Tensor) -> Tensor:
        return torch.where(model < memory, model / 2, memory).clamp(min=0)

    def remember(self, memory: Tensor, loss: Tensor, model: Tensor, decrease: Tensor) -> Tensor:
        return (model - decrease / 2).clamp(min=0)


@dataclass(frozen=True, slots=True)
class Relative(LowerBound):
    """A fraction of a running mean of the loss: no step may lower the model by more than the rest of it.

    It assumes a loss above 0, of any scale, and that scale may change. Its memory is the mean.

    Args:
        fraction: Of the mean, from 0 (where it is the bound 0) to below 1.
        horizon: Steps over which the mean forgets.
    """

    fraction: float
    horizon: float

    initial = math.nan

    def bound(self, memory: Tensor, loss: Tensor, model: Tensor) -> Tensor:
        return self.fraction * self._mean(memory, loss)

    def remember(self, memory: Tensor, loss: Tensor, model: Tensor, decrease: Tensor) -> Tensor:
        return self._mean(memory, loss)

    def _mean(self, memory: Tensor, loss: Tensor) -> Tensor:
        return torch.where(memory.isnan(), loss, memory + (loss - memory) / self.horizon)


def lower_bound(value: float | str, fraction: float, horizon: float) -> LowerBound:
    """The rule of that name, ``star`` or ``auto``, or a number as one.

    Args:
        value: Of the option ``loss_lower_bound``.
        fraction: Of ``Relative``, which ``auto`` is.
        horizon: The same.
    """
    if isinstance(value, str):
        return Star() if value == "star" else Relative(fraction, horizon)
    return Fixed(value)
