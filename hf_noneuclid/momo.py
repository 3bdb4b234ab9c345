"""Momo: a step size truncated by a model of the loss. Scalars in, scalar out.

The model is the average of the linearisations of the losses that were seen, weighted as the momentum
weights their gradients, and cut off at a lower bound F* of the loss. At the parameters p it lies
h = f̄ + Σ⟨p, m⟩ - F* above the bound, where f̄ is the running average of f - Σ⟨p, g⟩. A step along the
steepest direction lowers it by τ D (constrained) or τ D² (regularized). A larger step than h / D or h / D²
would aim at a loss below F*, so the step size is truncated there.

F* is a number. If nothing else bounds the steps but the learning rate, it is used always, as in the paper.
With the slope, a loss below it shows that it was no lower bound, and Momo truncates nothing from then on.

*What a truncated step promises.* It takes the model down to F*. The next linearisation, of a loss f, has the
weight 1 - β, so that h is then (1 - β)(f - F*), without weight decay. If all steps are truncated, each but
the first promises to lower the loss by this much; the first promises f - F*. The learning rate plays no part
in it, nor does its schedule, but the momentum β is a hidden step size.

*Clipping.* A gradient that was multiplied by c belongs to c f, a linearisation with a weight of c times the
others'. So f̄ averages c f - Σ⟨p, g⟩, the weight C averages c in the same way, and
h = f̄ + Σ⟨p, m⟩ - C F*. Then a constant factor on all gradients changes no truncated step. Without it, a
truncated step would be longer by 1 / c.

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

NO_BOUND = -1e30
"""Lower than any loss. It is finite, so that its product with 0 is not NaN."""


def model_height(running_loss: Tensor, momentum_inner: Tensor, weight: Tensor, lower_bound: Tensor) -> Tensor:
    """h, how far the average of the linearisations lies above the lower bound, 0-d.

    Args:
        running_loss: f̄, 0-d, in units of the loss.
        momentum_inner: Σ⟨p, m⟩ over all parameters before the step, 0-d.
        weight: C, the average of what gradients were multiplied by when they were clipped, 0-d.
        lower_bound: F*, 0-d.
    """
    return running_loss + momentum_inner - weight * lower_bound


def truncated_step_size(lr: Tensor, height: Tensor, dual: Tensor, descent: Descent) -> Tensor:
    """The step size τ: the learning rate, or less where the model says so; 0 where D is 0.

    Args:
        lr: The scheduled learning rate η, 0-d.
        height: h, the model above the lower bound, 0-d.
        dual: D, the dual norm of the momentum of the whole network, 0-d.
        descent: ``constrained`` divides h by D, ``regularized`` by D².
    """
    bound = height.clamp(min=0) / dual
    if descent == "regularized":
        bound = bound / dual  # not by D², which a tiny or huge D does not survive in float32
    return torch.where(dual == 0, 0, torch.minimum(lr, bound))


def believed_bound(lower_bound: Tensor, loss: Tensor) -> Tensor:
    """F* for this step and those after it: the same, or ``NO_BOUND`` if the loss is below it, 0-d."""
    return torch.where(loss < lower_bound, NO_BOUND, lower_bound)
