"""The norm of each batch of parameters, applied to its history: dual norms, then directions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .diagnostics import FATAL_RUN
from .history import History
from .layouts.plan import Batch
from .norms import Spectral, Tensors, VectorNorm, vector_norm


class Polars(NamedTuple):
    """The polar factors of a batch, (matrices, rows, columns), and its nuclear norms, (matrices,)."""

    factors: Tensor
    nuclear_norms: Tensor


class Geometry:
    """Measures batches, then gives their directions; every polar factor is computed once a step.

    Args:
        history: The momenta to measure.
        options: ``polar_method``, ``polar_steps``, ``nuclear_norm`` and ``eps`` of the optimizer.
    """

    def __init__(self, history: History, options: Mapping[str, Any]) -> None:
        self._history = history
        self._spectral = Spectral(options["polar_method"], options["polar_steps"])
        self._mode: str = options["nuclear_norm"]
        self._eps: float = options["eps"]
        self._kept: dict[Batch, Polars] = {}
        # How long a stale norm may be unset still: a bad first step sets none, and ten of them are fatal.
        self._unsettled_steps = FATAL_RUN if self._mode == "stale" else 0

    def dual(self, batch: Batch) -> Tensor:
        """The dual norms d of a batch, unscaled, of shape (units,)."""
        if not batch.is_spectral:
            norm = self._vector_norm(batch)
            return norm.dual(torch.stack(list(norm.partial(*self._moments(batch)))))
        if self._mode == "frobenius":
            frobenius: Tensor = torch.linalg.vector_norm(self._stacked(batch), dim=(-2, -1))
            return frobenius
        stale = self._history.stale_norms(batch.pieces) if self._mode == "stale" else None
        if stale is not None and not self._unsettled_steps:
            return stale
        self._kept[batch] = self._polars(batch)
        exact = self._kept[batch].nuclear_norms
        return exact if stale is None else torch.where(stale < 0, exact, stale)

    def directions(self, batch: Batch, dual: Tensor, ok: Tensor) -> Tensors:
        """The steepest directions u of the pieces of a batch, in the shapes of the parameters.

        Args:
            batch: Of the plan.
            dual: What ``dual`` said of it in this step.
            ok: Whether the step is taken; a bad one leaves the stale norms as they are.
        """
        if not batch.is_spectral:
            return self._vector_norm(batch).direction(*self._moments(batch), dual.unbind())
        polars = self._kept.pop(batch, None) or self._polars(batch)
        if self._mode == "stale":
            self._history.keep_norms(batch.pieces, polars.nuclear_norms, ok)
        factors = torch.split(polars.factors, batch.counts)
        return [piece.from_stack(u) for piece, u in zip(batch.pieces, factors, strict=True)]

    def end_step(self) -> None:
        """To be called when all directions have been taken."""
        self._unsettled_steps = max(0, self._unsettled_steps - 1)

    def _polars(self, batch: Batch) -> Polars:
        m = self._stacked(batch)
        factors = self._spectral.direction(m)
        return Polars(factors, self._spectral.dual(m, factors))

    def _stacked(self, batch: Batch) -> Tensor:
        """The momenta of a batch as one tensor of shape (matrices, rows, columns), rows <= columns."""
        momenta = self._history.momenta(batch.pieces)
        return torch.cat([piece.as_stack(m) for piece, m in zip(batch.pieces, momenta, strict=True)])

    def _moments(self, batch: Batch) -> tuple[Tensors, Tensors]:
        return self._history.momenta(batch.pieces), self._history.second_moments(batch.pieces)

    def _vector_norm(self, batch: Batch) -> VectorNorm:
        return vector_norm(batch.norm, self._eps)
