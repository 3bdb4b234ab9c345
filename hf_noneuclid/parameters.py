"""What the optimizer steps: every parameter with its options, and this rank's shard of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from .distributed.ownership import Stack
from .distributed.shards import LocalShard, overlap
from .groups import PARAMETER_OPTIONS, per_parameter


@dataclass(frozen=True, slots=True, eq=False)
class LocalParameter:
    """One parameter with its options, and this rank's shard of it."""

    name: str
    shard: LocalShard
    norm: str
    weight_decay: float
    scale: float
    """s: the norm is divided by it, the dual norm and the direction multiplied."""
    stack: Stack | None
    """(matrices, rows, columns) of the whole parameter if its norm is spectral."""

    @property
    def is_trained(self) -> bool:
        return self.shard.tensor.requires_grad

    @property
    def units(self) -> int:
        """The number of matrices, or 1 for a vector."""
        return self.stack[0] if self.stack else 1

    @property
    def elements(self) -> int:
        """The number of elements on all ranks together."""
        return prod(self.shard.shape)

    def unit_names(self) -> list[str]:
        return [self.name] if self.units == 1 else [f"{self.name}[{i}]" for i in range(self.units)]

    def unit_sizes(self) -> list[int]:
        """How many elements of each unit this rank holds."""
        n = self.elements // self.units
        return [overlap((i * n, (i + 1) * n), self.shard.interval) for i in range(self.units)]


def make_parameters(
    groups: Sequence[Mapping[str, Any]],
    names: Sequence[Sequence[str]],
    shards: Sequence[Sequence[LocalShard]],
    descent: str,
) -> list[LocalParameter]:
    """The parameters of the optimizer's groups, each with its own options.

    Args:
        groups: As the optimizer has them.
        names: Of the parameters of each group.
        shards: What this rank holds of them.
        descent: ``constrained`` or ``regularized``.

    Raises:
        ValueError: A parameter with fewer than two dimensions is in a group with norm ``spectral``.
    """
    parameters = []
    for group, its_names, its_shards in zip(groups, names, shards, strict=True):
        count = len(its_shards)
        columns = {key: per_parameter(group, key, count) for key in PARAMETER_OPTIONS}
        for i, (name, shard) in enumerate(zip(its_names, its_shards, strict=True)):
            row = {key: values[i] for key, values in columns.items()}
            is_matrix = row["norm"] == "spectral"
            # lr_scale multiplies the step, which s enters once when constrained (u) and twice when not (D u).
            scale = row["lr_scale"] if descent == "constrained" else row["lr_scale"] ** 0.5
            parameters.append(
                LocalParameter(
                    name=name,
                    shard=shard,
                    norm=row["norm"],
                    weight_decay=row["weight_decay"],
                    scale=scale * (row["spectral_scale"] if is_matrix else 1.0),
                    stack=_matrix_stack(shard.shape, row["flatten"], name) if is_matrix else None,
                )
            )
    return parameters


def _matrix_stack(shape: Sequence[int], flatten: bool, name: str) -> Stack:
    if len(shape) < 2:
        raise ValueError(
            f"{name} has shape {tuple(shape)} and is in a group with norm 'spectral', which is for matrices. "
            "Put it into a group with norm 'ada_l2', 'ada_linf' or 'linf'."
        )
    if flatten or len(shape) != 3:
        return (1, shape[0], prod(shape[1:]))
    return (shape[0], shape[1], shape[2])
