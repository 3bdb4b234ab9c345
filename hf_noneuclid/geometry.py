"""The norm of each batch of parameters, applied to its history: dual norms, then directions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .diagnostics import FATAL_RUN
from .elementwise import Tensors, lots, move_, on_cpu
from .history import History
from .layouts.exchange import Block
from .layouts.pieces import Piece
from .layouts.plan import Batch, Plan
from .norms import Spectral, VectorNorm, vector_norm


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
        options: ``polar_method``, ``polar_steps``, ``nuclear_norm``, ``eps`` and ``reuse_gradients`` of the
            optimizer.
    """

    def __init__(self, plan: Plan, history: History, options: Mapping[str, Any]) -> None:
        self._plan = plan
        self._history = history
        self._spectral = Spectral(options["polar_method"], options["polar_steps"])
        self._mode: str = options["nuclear_norm"]
        self._reuses_gradients: bool = options["reuse_gradients"]
        self._eps: float = options["eps"]
        self._kept: dict[Batch, Polars] = {}
        self._next_norms: list[tuple[Batch, Tensor]] = []
        # How long a stale norm may be unset still: a bad first step sets none, and ten of them are fatal.
        self._unsettled_steps = FATAL_RUN if self._mode == "stale" else 0

    def partial(self, batch: Batch) -> Tensor:
        """What this rank knows of the dual norms of a batch, of shape (units,).

        Added up over the ranks, it is what ``dual`` takes.
        """
        if not batch.exchange:
            return self._plan.ranks.once(self._vector_partial(batch))
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

    def move(self, batch: Batch, dual: Tensor, coefficients: Tensor, decay_rate: Tensor) -> None:
        """p ← (1 - ηλ) p + coefficient u.

        Args:
            batch: Of the plan.
            dual: What the method of that name said of it in this step.
            coefficients: Of shape (units,).
            decay_rate: η, 0-d, or 0 if nothing may move.
        """
        rate = batch.pieces[0].weight_decay
        decay = decay_rate * rate if rate else None
        values = [piece.value for piece in batch.here]
        if batch.exchange:
            directions = self._directions(batch)  # all ranks take part, even if nothing of it is here
            if values:
                move_(values, directions, batch.spread(coefficients), decay)
            return
        norm, m, v = self._vector_norm(batch), *self._moments(batch)
        spread = batch.spread(coefficients / norm.length(dual))
        for places, (params, m_, v_) in lots(self._plan.workspace, values, m, v):
            move_(params, norm.ray(m_, v_), [spread[i] for i in places], decay)

    def _directions(self, batch: Batch) -> Tensors:
        """Of matrices, in the shapes of this rank's parts."""
        assert batch.exchange is not None
        polars = self._kept.pop(batch, None) or self._polars(batch)
        if self._mode == "stale":
            self._next_norms.append((batch, polars.nuclear_norms))
        dtype = self._spectral.dtype(self._history.dtype(batch.pieces[0]), self._plan.device)
        runs = zip(batch.pieces, batch.exchange.scatter(polars.factors, dtype), strict=True)
        return [run.reshape(piece.value.shape) for piece, run in runs if piece.size]

    def end_step(self, ok: Tensor) -> None:
        """To be called when all batches have moved.

        Args:
            ok: Whether the step was taken; a bad one leaves the stale norms as they are.
        """
        self._unsettled_steps = max(0, self._unsettled_steps - 1)
        if self._next_norms:
            norms = self._plan.ranks.sum(torch.cat([norms for _, norms in self._next_norms]))
            pieces = [piece for batch, _ in self._next_norms for piece in batch.pieces]
            self._history.keep_norms(pieces, norms, ok)
            self._next_norms = []

    def _polars(self, batch: Batch) -> Polars:
        """The polar factors of the matrices that this rank owns."""
        assert batch.exchange is not None
        owned = batch.exchange.owned
        momenta = dict(zip(owned, batch.exchange.gather(self._history.momenta(batch.pieces)), strict=True))
        factors: dict[Block, Tensor] = {}
        norms = self._plan.scales.new_zeros(batch.units)
        for blocks, units in batch.alike:
            m = [momenta[block] for block in blocks]
            together = m if on_cpu(m[0]) else [torch.cat(m)]
            polar = self._spectral.direction(together)
            norms.index_copy_(0, units, self._spectral.dual(together, polar).to(norms.dtype))
            for block, factor in zip(blocks, torch.split(polar, [len(x) for x in m]), strict=True):
                factors[block] = self._stored(batch.pieces[block.piece], block, factor)
        return Polars([factors[block] for block in owned], norms)

    def _stored(self, piece: Piece, block: Block, factor: Tensor) -> Tensor:
        """The factors of a block, in place of its gradients if these may be overwritten and are here."""
        first, last = piece.holding.run
        is_here = first <= block.run[0] and block.run[1] <= last and piece.tensor.grad is not None
        if not (self._reuses_gradients and self._mode == "exact" and is_here):
            return factor
        grad = piece.gradient()
        if not grad.is_contiguous() or grad.itemsize < factor.itemsize:
            return factor
        place = grad.view(-1)[block.run[0] - first : block.run[1] - first].view(factor.dtype)
        return place[: factor.numel()].view(factor.shape).copy_(factor)

    def _squares(self, batch: Batch) -> Tensor:
        """‖m‖_F² of this rank's part of each matrix, of shape (units,)."""
        momenta = zip(batch.pieces, self._history.momenta(batch.pieces), strict=True)
        parts = [part for piece, m in momenta for part in torch.split(m.reshape(-1), piece.unit_sizes())]
        return self._plan.stack(torch._foreach_norm(parts)).square()

    def _vector_partial(self, batch: Batch) -> Tensor:
        norm, m, v = self._vector_norm(batch), *self._moments(batch)
        sums: dict[Piece, Tensor] = {}
        for places, (m_, v_) in lots(self._plan.workspace, m, v):
            for i, partial in zip(places, norm.partial(m_, norm.ray(m_, v_)), strict=True):
                piece = batch.here[i]
                sums[piece] = sums[piece] + partial if piece in sums else partial
        zero = self._plan.scalar(0.0)
        return self._plan.stack(sums.get(piece, zero) for piece in batch.pieces)

    def _moments(self, batch: Batch) -> tuple[Tensors, Tensors]:
        """m and v of the pieces here; a norm that needs no v is given m again, and does not look at it."""
        m, v = self._history.momenta(batch.here), self._history.second_moments(batch.here)
        return m, v or m

    def _vector_norm(self, batch: Batch) -> VectorNorm:
        return vector_norm(batch.norm, self._eps)
