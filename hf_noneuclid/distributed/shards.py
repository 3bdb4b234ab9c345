"""Which elements of a parameter this rank holds, and where they are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from torch import Tensor

Interval = tuple[int, int]
"""Consecutive elements of a flattened parameter: the first one, and the one after the last."""


def overlap(a: Interval, b: Interval) -> int:
    """How many elements two intervals have in common."""
    return max(0, min(a[1], b[1]) - max(a[0], b[0]))


@dataclass(frozen=True, slots=True, eq=False)
class LocalShard:
    """The elements of one parameter that this rank holds."""

    tensor: Tensor
    """What stands in the optimizer's groups: the parameter, or a flat partition of many parameters."""
    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    interval: Interval
    """The elements of the flattened parameter; they may be none."""
    flat: slice | None = None
    """Where they lie in the flat partition, if ``tensor`` is one."""

    @property
    def size(self) -> int:
        return self.interval[1] - self.interval[0]

    @property
    def is_whole(self) -> bool:
        """Whether this rank holds the whole parameter as it is, so that ``local(x)`` is x."""
        return type(self) is LocalShard and self.flat is None

    def local(self, x: Tensor) -> Tensor:
        """This rank's elements of x, which is laid out like ``tensor``, as its gradient and momentum are."""
        return x if self.flat is None else x[self.flat]

    def packed(self, place: slice) -> LocalShard:
        """This shard in another flat tensor, such as the second moment, which leaves out some parameters."""
        return replace(self, flat=place)


class DTensorShard(LocalShard):
    """This rank's rows of a DTensor."""

    __slots__ = ()

    def local(self, x: Tensor) -> Tensor:
        rows: Tensor = x.to_local()  # type: ignore[attr-defined]
        return rows


def whole(tensor: Tensor) -> LocalShard:
    """A parameter of which this rank holds every element."""
    return LocalShard(tensor, tuple(tensor.shape), (0, prod(tensor.shape)))
