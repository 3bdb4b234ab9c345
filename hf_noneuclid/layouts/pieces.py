"""What the optimizer steps on one rank: its part of each parameter, with the options of that parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..options import PARAMETER_OPTIONS, check_gradient, per_parameter
from .exchange import Run, overlap


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
