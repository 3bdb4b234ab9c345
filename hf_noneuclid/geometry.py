"""The norm of each batch of parameters, applied to its history: dual norms, then directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .diagnostics import FATAL_RUN
from .history import History
from .layouts.exchange import Block
from .layouts.plan import Batch, Plan
from .norms import Spectral, Tensors, VectorNorm, vector_norm


class Polars(NamedTuple):
    """What a rank computed of a batch: of each matrix that it owns."""

    factors: list[Tensor]
    """The polar factors, (matrices, rows, columns), of each of the exchange's ``owned``."""
    nuclear_norms: Tensor
    """Of shape (units,), 0 where another rank owns the matrix."""


class Geometry:
    """Measures batches, then gives their directions; every polar factor is computed once a step.

    Args:
        plan: What is measured.
        history: The momenta.
        options: ``polar_method``, ``polar_steps``, ``nuclear_norm`` and ``eps`` of the optimizer.
    """

    def __init__(self, plan: Plan, history: History, options: Mapping[str, Any]) -> None:
        self._plan = plan
        self._history = history
        self._spectral = Spectral(options["polar_method"], options["polar_steps"])
        self._mode: str = options["nuclear_norm"]
        self._eps: float = options["eps"]
        self._kept: dict[Batch, Polars] = {}
        # How long a stale norm may be unset still: a bad first step sets none, and ten of them are fatal.
        self._unsettled_steps = FATAL_RUN if self._mode == "stale" else 0

    def partial(self, batch: Batch) -> Tensor:
        """What this rank knows of the dual norms of a batch, of shape (units,).

        Added up over the ranks, it is what ``dual`` takes.
        """
        if not batch.exchange:
            partials = iter(self._vector_norm(batch).partial(*self._moments(batch)) if batch.here else ())
            zero = self._plan.scalar(0.0)
            partial = self._plan.stack(next(partials) if piece.size else zero for piece in batch.pieces)
            return self._plan.ranks.once(partial)
        if self._mode == "frobenius":
            return self._plan.ranks.once(self._squares(batch))
        if self._mode == "exact" or self._unsettled_steps:
            self._kept[batch] = self._polars(batch)
            return self._kept[batch].nuclear_norms
        return self._plan.scales.new_zeros(batch.units)

    def dual(self, batch: Batch, partial: Tensor) -> Tensor:
        """The dual norms d of a batch, unscaled, of shape (units,)."""
        if not batch.exchange:
            return self._vector_norm(batch).dual(partial)
        if self._mode == "frobenius":
            return partial.sqrt()
        if self._mode == "exact":
            return partial
        stale = self._history.stale_norms(batch.pieces)
        return torch.where(stale < 0, partial, stale)

    def directions(self, batch: Batch, dual: Tensor) -> tuple[Tensors, Tensor | None]:
        """The steepest directions u of the pieces of a batch that are here.

        Args:
            batch: Of the plan.
            dual: What ``dual`` said of it in this step.

        Returns:
            The directions, in the shapes of the parameters' parts, and, where they will be needed in the
            next step, this rank's share of the nuclear norms, of shape (units,).
        """
        if not batch.exchange:
            if not batch.here:
                return [], None
            by_piece = zip(batch.pieces, dual.unbind(), strict=True)
            d = [x for piece, x in by_piece if piece.size]
            return self._vector_norm(batch).direction(*self._moments(batch), d), None
        polars = self._kept.pop(batch, None) or self._polars(batch)
        dtype = self._spectral.dtype(self._history.dtype(batch.pieces[0]), self._plan.device)
        runs = batch.exchange.scatter(polars.factors, dtype)
        by_run = zip(batch.pieces, runs, strict=True)
        directions = [run.view(piece.value.shape) for piece, run in by_run if piece.size]
        return directions, polars.nuclear_norms if self._mode == "stale" else None

    def end_step(self, nuclear_norms: Sequence[tuple[Batch, Tensor]], ok: Tensor) -> None:
        """To be called when all directions have been taken.

        Args:
            nuclear_norms: Of the batches of matrices, this rank's shares.
            ok: Whether the step was taken; a bad one leaves the stale norms as they are.
        """
        self._unsettled_steps = max(0, self._unsettled_steps - 1)
        if nuclear_norms:
            norms = self._plan.ranks.sum(torch.cat([norms for _, norms in nuclear_norms]))
            pieces = [piece for batch, _ in nuclear_norms for piece in batch.pieces]
            self._history.keep_norms(pieces, norms, ok)

    def _polars(self, batch: Batch) -> Polars:
        """The polar factors of the matrices that this rank owns."""
        assert batch.exchange is not None
        owned = batch.exchange.owned
        momenta = dict(zip(owned, batch.exchange.gather(self._history.momenta(batch.pieces)), strict=True))
        factors: dict[Block, Tensor] = {}
        norms = self._plan.scales.new_zeros(batch.units)
        for blocks, units in batch.alike:
            m = torch.cat([momenta[block].mT if block.is_tall else momenta[block] for block in blocks])
            polar = self._spectral.direction(m)
            norms.index_copy_(0, units, self._spectral.dual(m, polar).to(norms.dtype))
            split = torch.split(polar, [block.shape[0] for block in blocks])
            for block, factor in zip(blocks, split, strict=True):
                factors[block] = factor.mT if block.is_tall else factor
        return Polars([factors[block] for block in owned], norms)

    def _squares(self, batch: Batch) -> Tensor:
        """‖m‖_F² of this rank's part of each matrix, of shape (units,)."""
        momenta = zip(batch.pieces, self._history.momenta(batch.pieces), strict=True)
        parts = [part for piece, m in momenta for part in torch.split(m.reshape(-1), piece.unit_sizes())]
        return self._plan.stack(torch._foreach_norm(parts)).square()

    def _moments(self, batch: Batch) -> tuple[Tensors, Tensors]:
        return self._history.momenta(batch.here), self._history.second_moments(batch.here)

    def _vector_norm(self, batch: Batch) -> VectorNorm:
        return vector_norm(batch.norm, self._eps)
