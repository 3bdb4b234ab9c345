"""How the nuclear norms of the momenta are found. The step size needs them before the matrices move.

The nuclear norm comes free with the polar factor, ‖m‖_nuclear = ⟨m, polar(m)⟩. ``exact`` keeps every polar
factor until the matrix moves; ``stale`` uses the norm of the step before, and ``frobenius`` another norm, so
that each polar factor is computed only when its matrix moves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .diagnostics import FATAL_RUN
from .elementwise import Tensors

if TYPE_CHECKING:
    from .buckets import MatrixBucket

UNSET = -1.0
"""A stale nuclear norm that has not been measured yet."""


class Polar(NamedTuple):
    """What a rank has computed of the matrices that it owns."""

    factors: list[Tensor]
    """The polar factors, (matrices, rows, columns), of each owned block."""
    nuclear_norms: Tensor
    """Of shape (units,), 0 where another rank owns the matrix."""


class Measured(NamedTuple):
    """What ``measure`` gives."""

    partial: Tensor
    """Of shape (units,). Summed over the ranks, it is what ``dual`` of the bucket's norm takes."""
    polar: Polar | None = None
    """The polar factors, if they were needed already."""


class NuclearNorm(ABC):
    """How the nuclear norms of the momenta of a bucket are found, which the step size needs."""

    @abstractmethod
    def measure(self, bucket: MatrixBucket, grads: Tensors) -> Measured:
        """This rank's part of what ``dual`` takes."""

    def dual(self, partial: Tensor) -> Tensor:
        """The nuclear norms, of shape (units,), from the sum of ``measure`` over the ranks."""
        return partial


class ExactNuclearNorm(NuclearNorm):
    """``exact``: ⟨m, polar(m)⟩. The polar factors are kept until the matrices move."""

    def measure(self, bucket: MatrixBucket, grads: Tensors) -> Measured:
        polar = bucket.polar(grads)
        return Measured(polar.nuclear_norms, polar)


class FrobeniusNuclearNorm(NuclearNorm):
    """``frobenius``: ‖m‖_F.

    Args:
        is_counted: Whether this rank measures. Replicas hold the same, so that one of them does.
    """

    def __init__(self, is_counted: bool) -> None:
        self._is_counted = is_counted

    def measure(self, bucket: MatrixBucket, grads: Tensors) -> Measured:
        return Measured(bucket.squares() if self._is_counted else bucket.zeros())

    def dual(self, partial: Tensor) -> Tensor:
        return partial.sqrt()


class StaleNuclearNorm(NuclearNorm):
    """``stale``: the nuclear norms of the step before, so that no polar factor is kept.

    Args:
        stored: The nuclear norms of each parameter in the state, which every rank has whole.
        is_counted: Whether this rank contributes them to the sum over all ranks.
        is_missing: Whether some of them were not measured yet.
    """

    def __init__(self, stored: Sequence[Tensor], is_counted: bool, is_missing: bool) -> None:
        self._stored, self._is_counted = stored, is_counted
        # A norm that is missing is measured, and every good step stores all norms. But a step cannot see
        # without waiting for the device whether the one before was good, so the next steps all measure. If
        # all of them were bad, the training has diverged.
        self._steps_to_measure = FATAL_RUN if is_missing else 0

    def measure(self, bucket: MatrixBucket, grads: Tensors) -> Measured:
        stale = torch.cat(list(self._stored))
        partial = stale.clamp(min=0) if self._is_counted else bucket.zeros()
        if not self._steps_to_measure:
            return Measured(partial)
        self._steps_to_measure -= 1
        polar = bucket.polar()
        return Measured(torch.where(stale == UNSET, polar.nuclear_norms, partial), polar)
