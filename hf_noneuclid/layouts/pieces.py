"""What the optimizer steps on one rank: its part of each parameter, with the options of that parameter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..options import PARAMETER_OPTIONS, check_gradient, per_parameter
from .exchange import Run, overlap

WORKSPACE = 256 * 2**20
"""Bytes of temporary copies of parameters that a rank may make at once."""

CPU_WORKSPACE = 32 * 2**20
"""The same on a CPU, which finds in its cache again what it has just written, if that is not much."""


def workspace(device: torch.device) -> int:
    """Bytes of temporary copies to make at once on a device; a single parameter may need more."""
    return CPU_WORKSPACE if device.type == "cpu" else WORKSPACE


def lots(*columns: Sequence[Tensor]) -> Iterator[tuple[list[int], tuple[list[Tensor], ...]]]:
    """Tensors in lots that fit into the workspace; large ones are cut along their first dimension.

    Args:
        columns: Lists of tensors; those in the same place have the same shape.

    Yields:
        For each lot, the places of its tensors in the lists, and the lists themselves, of views.
    """
    places: list[int] = []
    taken: tuple[list[Tensor], ...] = tuple([] for _ in columns)
    room = limit = workspace(columns[0][0].device) if columns[0] else 0
    for place, row in enumerate(zip(*columns, strict=True)):
        rows = max(1, limit // max(1, 4 * row[0][:1].numel())) if row[0].ndim else 1
        for cut in zip(*(x.split(rows) if x.ndim else (x,) for x in row), strict=True):
            if places and 4 * cut[0].numel() > room:
                yield places, taken
                places, taken, room = [], tuple([] for _ in columns), limit
            places.append(place)
            for column, x in zip(taken, cut, strict=True):
                column.append(x)
            room -= 4 * cut[0].numel()
    if places:
        yield places, taken


@dataclass(frozen=True, eq=False)
class Holding:
    """Which part of a parameter this rank holds, and in which tensor of the optimizer's groups."""

    tensor: Tensor
    """The parameter itself, or the flat partition of a whole group."""
    shape: tuple[int, ...]
    """Of the whole parameter."""
    run: Run
    """The elements of the flattened parameter that this rank holds; they may be none."""
    flat: slice | None = None
    """Where they lie in the flat partition, if it is one."""

    def part(self, x: Tensor) -> Tensor:
        """This rank's part of x, which is like ``tensor``: itself, its gradient, or its momentum."""
        return x if self.flat is None else x[self.flat]


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """This rank's part of one parameter, and the parameter's options."""

    holding: Holding
    name: str
    norm: str
    weight_decay: float
    scale: float
    """s: the norm is divided by it, the dual norm and the direction multiplied."""
    stack: tuple[int, int, int] | None
    """(matrices, rows, columns) of the whole parameter if the norm is spectral."""

    @property
    def tensor(self) -> Tensor:
        """Of the optimizer's groups: the key of the state."""
        return self.holding.tensor

    @property
    def value(self) -> Tensor:
        """This rank's part of the parameter."""
        return self.holding.part(self.tensor)

    @property
    def size(self) -> int:
        """How many elements this rank holds."""
        return self.holding.run[1] - self.holding.run[0]

    @property
    def moves(self) -> bool:
        return self.tensor.requires_grad

    @property
    def units(self) -> int:
        return self.stack[0] if self.stack else 1

    def unit_names(self) -> list[str]:
        return [self.name] if self.units == 1 else [f"{self.name}[{i}]" for i in range(self.units)]

    def unit_sizes(self) -> list[int]:
        """How many elements of each matrix this rank holds."""
        if self.units == 1:
            return [self.size]
        n = prod(self.stack[1:]) if self.stack else 0
        return [overlap((i * n, (i + 1) * n), self.holding.run) for i in range(self.units)]

    def gradient(self) -> Tensor:
        """A missing one counts as zero, as it is on engines that cannot tell the two apart."""
        grad = self.tensor.grad if self.moves else None
        if grad is None:
            return torch.zeros_like(self.value)
        check_gradient(grad, self.name)
        return self.holding.part(grad)

    def spread(self, by_unit: Tensor) -> Tensor:
        """Numbers of shape (units,) in a shape that broadcasts over this rank's part."""
        if self.units == 1:
            return by_unit.reshape(())
        sizes = self.unit_sizes()
        if self.holding.flat is None:
            held = [i for i, size in enumerate(sizes) if size]
            return by_unit[held[0] : held[-1] + 1].reshape(-1, 1, 1)
        return torch.cat([x.expand(size) for x, size in zip(by_unit.unbind(), sizes, strict=True)])


def make_pieces(
    groups: Sequence[Mapping[str, Any]],
    names: Sequence[Sequence[str]],
    holdings: Sequence[Sequence[Holding]],
    descent: str,
) -> list[Piece]:
    """The parameters of the optimizer's groups, each with its own options.

    Args:
        groups: As the optimizer has them.
        names: Of the parameters of each group.
        holdings: What this rank holds of them.
        descent: ``constrained`` or ``regularized``.
    """
    pieces = []
    for group, of_group, held in zip(groups, names, holdings, strict=True):
        columns = zip(*(per_parameter(group, key, len(held)) for key in PARAMETER_OPTIONS), strict=True)
        for holding, name, values in zip(held, of_group, columns, strict=True):
            row = dict(zip(PARAMETER_OPTIONS, values, strict=True))
            pieces.append(_piece(holding, name, row, descent))
    return pieces


def _piece(holding: Holding, name: str, row: Mapping[str, Any], descent: str) -> Piece:
    is_matrix = row["norm"] == "spectral"
    # lr_scale multiplies the step, which s enters once when constrained (u) and twice when not (D u).
    scale = row["lr_scale"] if descent == "constrained" else row["lr_scale"] ** 0.5
    return Piece(
        holding=holding,
        name=name,
        norm=row["norm"],
        weight_decay=row["weight_decay"],
        scale=scale * (row["spectral_scale"] if is_matrix else 1.0),
        stack=matrix_stack(holding.shape, row["flatten"], name) if is_matrix else None,
    )


def matrix_stack(shape: Sequence[int], flatten: bool, name: str) -> tuple[int, int, int]:
    """(matrices, rows, columns) of a parameter whose norm is spectral.

    Raises:
        ValueError: It has fewer than two dimensions.
    """
    if len(shape) < 2:
        raise ValueError(
            f"{name} has shape {tuple(shape)} and is in a group with norm 'spectral', which is for matrices. "
            "Put it into a group with norm 'ada_l2', 'ada_linf' or 'linf'."
        )
    if flatten or len(shape) != 3:
        return (1, shape[0], prod(shape[1:]))
    return (shape[0], shape[1], shape[2])
