"""The plan of a step: which parameter is what, and which are worked on as one batch.

It is made when the first step is taken and made anew when parameters are added, frozen or replaced; every
other step only executes it. A *unit* is one vector parameter or one matrix (a stack of n expert matrices is
n units). Tensors over units hold all matrices first, then all vectors, in the order of the batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..norms import ADAPTIVE_NORMS, Tensors, dot
from ..options import PARAMETER_OPTIONS, check_gradient, parameter_names, per_parameter

# The matrices of a batch are copied together for their polar factors; this bounds the copy.
_BATCH_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """One parameter and its options."""

    param: Tensor
    name: str
    norm: str
    weight_decay: float
    scale: float
    """s: the norm is divided by it, the dual norm and the direction multiplied."""
    stack: tuple[int, int, int] | None
    """(matrices, rows, columns) if the norm is spectral."""

    def as_stack(self, x: Tensor) -> Tensor:
        """x, of the parameter's shape, as its matrices with the wide side last."""
        x = x.reshape(self.stack or ())
        return x.mT if self._is_tall else x

    def from_stack(self, x: Tensor) -> Tensor:
        """The inverse of ``as_stack``."""
        return (x.mT if self._is_tall else x).reshape(self.param.shape)

    def gradient(self) -> Tensor:
        """p.grad; a missing one counts as zero, as it is on engines that cannot tell the two apart."""
        grad = self.param.grad if self.param.requires_grad else None
        if grad is None:
            return torch.zeros_like(self.param)
        check_gradient(grad, self.name)
        return grad

    @property
    def _is_tall(self) -> bool:
        return self.stack is not None and self.stack[1] > self.stack[2]

    @property
    def units(self) -> int:
        return self.stack[0] if self.stack else 1

    def unit_names(self) -> list[str]:
        return [self.name] if self.units == 1 else [f"{self.name}[{i}]" for i in range(self.units)]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Pieces worked on together: one norm, decay, dtype and device, and for matrices one shape."""

    pieces: tuple[Piece, ...]

    @property
    def norm(self) -> str:
        return self.pieces[0].norm

    @property
    def is_spectral(self) -> bool:
        return self.norm == "spectral"

    @property
    def weight_decay(self) -> float:
        return self.pieces[0].weight_decay

    @property
    def counts(self) -> list[int]:
        return [piece.units for piece in self.pieces]

    @property
    def units(self) -> int:
        return sum(self.counts)

    def move(self, directions: Tensors, coefficients: Tensor, decay_rate: Tensor) -> None:
        """p ← (1 - ηλ) p + coefficient u, rounded once to the dtype of p; coefficients are (units,)."""
        params = [piece.param for piece in self.pieces]
        wide = [widened(param) for param in params]
        if self.weight_decay:
            torch._foreach_mul_(wide, (1 - decay_rate * self.weight_decay).to(params[0].device))
        parts = [
            c.reshape(()) if piece.units == 1 else c.reshape(-1, 1, 1)
            for piece, c in zip(
                self.pieces, torch.split(coefficients.to(params[0].device), self.counts), strict=True
            )
        ]
        torch._foreach_addcmul_(wide, list(directions), parts)
        if wide[0] is not params[0]:
            torch._foreach_copy_(params, wide)


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What one step does, for all parameters of the optimizer.

    ``pieces`` holds every parameter that takes part, frozen ones with a history included (their momentum
    decays, and the model of the loss knows them); ``matrices`` and ``vectors`` hold those that move.
    """

    pieces: tuple[Piece, ...]
    matrices: tuple[Batch, ...]
    vectors: tuple[Batch, ...]
    scales: Tensor
    """s of every unit, of shape (units,)."""
    gradient_limits: Tensor
    """The largest finite gradient entry of every piece, of shape (pieces,)."""

    @property
    def device(self) -> torch.device:
        """Where the scalars are."""
        return self.scales.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the scalars: float64 if a parameter is, else float32."""
        return self.scales.dtype

    @property
    def batches(self) -> tuple[Batch, ...]:
        """In the order of the units."""
        return (*self.matrices, *self.vectors)

    @property
    def matrix_units(self) -> int:
        return sum(batch.units for batch in self.matrices)

    def matrix_names(self) -> list[str]:
        return [name for batch in self.matrices for piece in batch.pieces for name in piece.unit_names()]

    def scalar(self, value: Tensor | float) -> Tensor:
        """A number as a 0-d tensor. A fill, where a copy from the host would wait for the device."""
        if isinstance(value, Tensor):
            return value.detach().reshape(()).to(self.device, self.dtype, non_blocking=True)
        return torch.full((), value, dtype=self.dtype, device=self.device)

    def stack(self, scalars: Iterable[Tensor]) -> Tensor:
        """0-d tensors as one of shape (n,)."""
        return torch.stack([x.to(self.device, self.dtype) for x in scalars])

    def over_units(self, by_batch: Mapping[Batch, Tensor], batches: Sequence[Batch]) -> Tensor:
        """Tensors of shape (units of the batch,) as one of shape (units,)."""
        parts = [by_batch[batch].to(self.device, self.dtype) for batch in batches]
        return torch.cat(parts) if parts else self.scales[:0]

    def inner(self, others: Sequence[Tensor]) -> Tensor:
        """Σ⟨p, x⟩ over all pieces, accumulated in float32 at least."""
        pairs = zip(self.pieces, others, strict=True)
        return self.stack(dot(widened(piece.param), widened(x)) for piece, x in pairs).sum()


def widened(x: Tensor) -> Tensor:
    """x in float32 if it is in half precision, else x itself."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def make_pieces(groups: Sequence[Mapping[str, Any]], descent: str) -> list[Piece]:
    """The parameters of the optimizer's groups, each with its own options."""
    pieces = []
    for i, group in enumerate(groups):
        names = parameter_names(group, i)
        columns = zip(*(per_parameter(group, option) for option in PARAMETER_OPTIONS), strict=True)
        for param, name, values in zip(group["params"], names, columns, strict=True):
            pieces.append(_piece(param, name, dict(zip(PARAMETER_OPTIONS, values, strict=True)), descent))
    return pieces


def _piece(param: Tensor, name: str, row: Mapping[str, Any], descent: str) -> Piece:
    is_matrix = row["norm"] == "spectral"
    # lr_scale multiplies the step, which s enters once when constrained (u) and twice when not (D u).
    scale = row["lr_scale"] if descent == "constrained" else row["lr_scale"] ** 0.5
    return Piece(
        param=param,
        name=name,
        norm=row["norm"],
        weight_decay=row["weight_decay"],
        scale=scale * (row["spectral_scale"] if is_matrix else 1.0),
        stack=_matrix_stack(param.shape, row["flatten"], name) if is_matrix else None,
    )


def _matrix_stack(shape: Sequence[int], flatten: bool, name: str) -> tuple[int, int, int]:
    if len(shape) < 2:
        raise ValueError(
            f"{name} has shape {tuple(shape)} and is in a group with norm 'spectral', which is for matrices. "
            "Put it into a group with norm 'ada_l2', 'ada_linf' or 'linf'."
        )
    if flatten or len(shape) != 3:
        return (1, shape[0], prod(shape[1:]))
    return (shape[0], shape[1], shape[2])


def make_plan(pieces: Sequence[Piece]) -> Plan:
    """Batches the pieces that move; scalars live where the first piece lives."""
    moving = [piece for piece in pieces if piece.param.requires_grad]
    matrices = [batch for group in _grouped(x for x in moving if x.stack) for batch in _capped(group)]
    vectors = [Batch(tuple(group)) for group in _grouped(x for x in moving if not x.stack)]
    scales = [x.scale for batch in (*matrices, *vectors) for x in batch.pieces for _ in range(x.units)]
    wide = any(piece.param.dtype == torch.float64 for piece in pieces)
    dtype, device = torch.float64 if wide else torch.float32, pieces[0].param.device
    # A second moment holds the square of the gradient, which must be finite too.
    powers = [0.5 if piece.norm in ADAPTIVE_NORMS else 1.0 for piece in pieces]
    return Plan(
        pieces=tuple(pieces),
        matrices=tuple(matrices),
        vectors=tuple(vectors),
        scales=torch.tensor(scales, dtype=dtype, device=device),
        gradient_limits=torch.finfo(torch.float32).max ** torch.tensor(powers, dtype=dtype, device=device),
    )


def _grouped(pieces: Iterable[Piece]) -> list[list[Piece]]:
    groups: dict[Any, list[Piece]] = {}
    for piece in pieces:
        shape = tuple(sorted(piece.stack[1:])) if piece.stack else None
        key = (piece.norm, shape, piece.weight_decay, piece.param.dtype, piece.param.device)
        groups.setdefault(key, []).append(piece)
    return list(groups.values())


def _capped(pieces: Sequence[Piece]) -> list[Batch]:
    """Consecutive pieces that together fit into the copy; one piece alone may exceed it."""
    batches: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        size += 4 * piece.param.numel()
        if batches[-1] and size > _BATCH_BYTES:
            batches.append([])
            size = 4 * piece.param.numel()
        batches[-1].append(piece)
    return [Batch(tuple(batch)) for batch in batches]
