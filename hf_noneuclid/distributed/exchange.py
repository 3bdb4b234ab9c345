"""How matrices become whole on the ranks that own them, and how their directions travel back.

A rank holds consecutive elements of every parameter: all of it, some rows, or an interval that begins and
ends within a row. An all-to-all over the shards brings the momentum of a matrix to its owner, which computes
the polar factor. A second all-to-all brings that back to the shards, and an all-gather passes it on to the
replicas that did not compute it. Which elements go where is worked out once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from .grid import Coordinate, ProcessGrid
from .shards import Interval, overlap


@dataclass(frozen=True, slots=True)
class OwnedBlock:
    """Consecutive matrices of one parameter that have the same owner."""

    parameter: int
    """Index of the parameter in its bucket."""
    first_unit: int
    """Index of the first matrix among all matrices of the bucket."""
    shape: tuple[int, int, int]
    """(matrices, rows, columns)."""
    interval: Interval
    """Their elements in the flattened parameter."""
    owner: Coordinate

    @property
    def units(self) -> range:
        return range(self.first_unit, self.first_unit + self.shape[0])


class Exchange:
    """Moves the matrices of one bucket between the ranks.

    Args:
        blocks: All blocks of the bucket, in order.
        held: The elements of each parameter that each shard holds: ``held[shard][parameter]``.
        grid: The processes.
        dtype: What directions are sent in.
    """

    def __init__(
        self,
        blocks: Sequence[OwnedBlock],
        held: Sequence[Sequence[Interval]],
        grid: ProcessGrid,
        dtype: torch.dtype,
    ) -> None:
        self._blocks, self._held, self._grid, self._dtype = blocks, held, grid, dtype
        self._by_owner: dict[Coordinate, list[OwnedBlock]] = {}
        for block in blocks:
            self._by_owner.setdefault(block.owner, []).append(block)
        self.owned: Sequence[OwnedBlock] = self._by_owner.get(grid.coordinate, [])
        shards = range(grid.shards)
        # Sizes of the messages. _mine[replica][shard]: the elements on this rank of matrices that rank owns.
        self._mine = [
            [self._count(self._by_owner.get((replica, s), ()), grid.shard) for s in shards]
            for replica in range(grid.replicas)
        ]
        # The elements that this rank owns, by the shard that holds them.
        self._owned = [self._count(self.owned, s) for s in shards]
        self._arrivals = self._place_fragments()

    def _count(self, blocks: Iterable[OwnedBlock], shard: int) -> int:
        return sum(overlap(block.interval, self._held[shard][block.parameter]) for block in blocks)

    def _in_order_of_owners(self, replica: int) -> Iterator[OwnedBlock]:
        """The blocks of a replica, in the order in which their owners send the factors."""
        for shard in range(self._grid.shards):
            yield from self._by_owner.get((replica, shard), ())

    def _place_fragments(self) -> list[list[tuple[int, slice]]]:
        """For each parameter, where the fragments of its direction arrive: (replica, slice)."""
        places: dict[OwnedBlock, tuple[int, slice]] = {}
        for replica in range(self._grid.replicas):
            offset = 0
            for block in self._in_order_of_owners(replica):
                size = overlap(block.interval, self._held[self._grid.shard][block.parameter])
                places[block] = (replica, slice(offset, offset + size))
                offset += size
        by_parameter: list[list[tuple[int, slice]]] = [[] for _ in self._held[0]]
        for block in self._blocks:
            by_parameter[block.parameter].append(places[block])
        return by_parameter

    def gather(self, momenta: Sequence[Tensor]) -> list[Tensor]:
        """Makes the matrices that this rank owns whole.

        Args:
            momenta: This rank's elements of each parameter of the bucket, of any shape.

        Returns:
            One tensor of shape (matrices, rows, columns) for each of ``owned``, on the grid's device.
        """
        grid = self._grid
        flat = [m.reshape(-1) for m in momenta]
        if grid.shards == 1:  # replicas hold every matrix whole
            return [flat[b.parameter][slice(*b.interval)].view(b.shape).to(grid.device) for b in self.owned]
        held, sends = self._held[grid.shard], self._mine[grid.replica]
        parts = [
            self._fragment(flat[b.parameter], b, held[b.parameter])
            for b in self._in_order_of_owners(grid.replica)
        ]
        mine = _join(parts, momenta[0].dtype, grid.device)
        return self._assemble(grid.all_to_all(mine, sends, self._owned))

    @staticmethod
    def _fragment(flat: Tensor, block: OwnedBlock, held: Interval) -> Tensor:
        """The elements of a block among those that are held of its parameter."""
        start = max(block.interval[0], held[0])
        return flat[start - held[0] : start - held[0] + overlap(block.interval, held)]

    def _assemble(self, received: Tensor) -> list[Tensor]:
        """The owned blocks, from their fragments shard by shard."""
        cursors = [0, *accumulate(self._owned)]
        fragments: dict[OwnedBlock, list[Tensor]] = {block: [] for block in self.owned}
        for shard, held in enumerate(self._held):
            for block in self.owned:
                size = overlap(block.interval, held[block.parameter])
                fragments[block].append(received[cursors[shard] : cursors[shard] + size])
                cursors[shard] += size
        return [torch.cat(fragments[block]).view(block.shape) for block in self.owned]

    def scatter(self, factors: Sequence[Tensor]) -> list[Tensor]:
        """Brings the directions that the owners computed to the ranks that hold the parameters.

        Args:
            factors: One tensor of shape (matrices, rows, columns) for each of ``owned``.

        Returns:
            This rank's elements of each parameter's direction, 1-D.
        """
        grid = self._grid
        flat = [factor.to(self._dtype).reshape(-1) for factor in factors]
        if grid.shards > 1:
            flat = [
                x[max(held[b.parameter][0] - b.interval[0], 0) :][: overlap(b.interval, held[b.parameter])]
                for held in self._held
                for b, x in zip(self.owned, flat, strict=True)
            ]
        mine = _join(flat, self._dtype, grid.device)
        mine = grid.all_to_all(mine, self._owned, self._mine[grid.replica])
        # Now this rank has its elements of all directions that its replica computed; others have the rest.
        by_replica = grid.all_gather(mine, [sum(sizes) for sizes in self._mine])
        directions = []
        for arrivals in self._arrivals:
            parts = [by_replica[replica][where] for replica, where in arrivals]
            directions.append(parts[0] if len(parts) == 1 else torch.cat(parts))
        return directions


def _join(parts: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    """1-D tensors end to end; there may be none."""
    return torch.cat(list(parts)).to(device) if parts else torch.empty(0, dtype=dtype, device=device)
