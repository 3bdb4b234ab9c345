"""What the phases of a step hand on to one another."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .layouts.plan import Batch


class Checked(NamedTuple):
    """Phase 0: whether this step may be taken at all."""

    ok: Tensor
    grads: list[Tensor]
    loss: Tensor | None
    """f, the mean over the ranks."""
    inner: Tensor | None
    """Σ⟨p, g⟩."""


class Measured(NamedTuple):
    """Phase 2: what the momenta amount to."""

    duals: dict[Batch, Tensor]
    """d of every unit, before it is scaled."""
    inner: Tensor | None
    """Σ⟨p, m⟩."""


class Decided(NamedTuple):
    """Phase 3: what multiplies each unit's direction, and whether anything may move."""

    ok: Tensor
    step_size: Tensor
    truncated: Tensor
    lower_bound: Tensor | None
    bound_memory: Tensor | None
    """What the rule for F* remembers for the next step."""
    dual: Tensor
    decay_rate: Tensor
    """η, or 0 if nothing may move."""
    coefficients: Tensor
