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

from typing import Literal, get_args

import torch
from torch import Tensor

Descent = Literal["constrained", "regularized"]
DESCENTS: tuple[str, ...] = get_args(Descent)


def model_value(running_loss: Tensor, momentum_inner: Tensor, lower_bound: Tensor | float) -> Tensor:
    """The height h of the model above the lower bound.

    Args:
        running_loss: f̄, 0-d, in units of the loss.
        momentum_inner: Σ⟨p, m⟩ over all parameters before the step, 0-d.
        lower_bound: F*, in units of the loss.
    """
    return running_loss - lower_bound + momentum_inner


def truncated_step_size(lr: Tensor, height: Tensor, dual: Tensor, descent: Descent) -> Tensor:
    """The step size τ: the learning rate, or less where the model says so; 0 where D is 0.

    Args:
        lr: The scheduled learning rate η, 0-d.
        height: h, as of ``model_value``, 0-d.
        dual: D, the dual norm of the momentum of the whole network, 0-d.
        descent: ``constrained`` divides h by D, ``regularized`` by D².
    """
    bound = height.clamp(min=0) / dual
    if descent == "regularized":
        bound = bound / dual  # not by D², which a tiny or huge D does not survive in float32
    return torch.where(dual == 0, 0, torch.minimum(lr, bound))
