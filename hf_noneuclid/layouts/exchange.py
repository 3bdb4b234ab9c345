"""How the matrices of a batch come together on the ranks that own them, and their directions go back.

A rank holds a run of consecutive elements of every parameter (all of it, some rows, or a piece that begins
and ends within a row). Momentum goes to the owner of a matrix by an all-to-all over the shards; the polar
factor comes back the same way, and an all-gather hands it on to the replicas, for which the owner has
computed, too. Who sends what to whom is worked out once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
from torch import Tensor

from .ranks import Place, Ranks

Run = tuple[int, int]
"""Consecutive elements of a flattened parameter: the first one, and the one after the last."""


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive matrices of one parameter that have one owner."""

    piece: int
    """Index of the parameter in the batch."""
    first_unit: int
    """Index of the first matrix in the batch."""
    shape: tuple[int, int, int]
    """(matrices, rows, columns)."""
    run: Run
    """Where they lie in the flattened parameter."""
    owner: Place

    @property
    def units(self) -> range:
        return range(self.first_unit, self.first_unit + self.shape[0])


def make_blocks(stacks: Sequence[tuple[int, int, int]], owners: Sequence[Place]) -> list[Block]:
    """The blocks of a batch.

    Args:
        stacks: (matrices, rows, columns) of each parameter.
        owners: Who owns each matrix of all of them, in order.
    """
    blocks: list[Block] = []
    unit = 0
    for piece, (count, rows, columns) in enumerate(stacks):
        first = 0
        for owner, same in groupby(owners[unit : unit + count]):
            n = len(list(same))
            run = (first * rows * columns, (first + n) * rows * columns)
            blocks.append(Block(piece, unit + first, (n, rows, columns), run, owner))
            first += n
        unit += count
    return blocks


def overlap(a: Run, b: Run) -> int:
    """How many elements two runs have in common."""
    return max(0, min(a[1], b[1]) - max(a[0], b[0]))


class Exchange:
    """Moves the matrices of one batch.

    Args:
        blocks: Of the batch.
        held: The run of each parameter of the batch that each shard holds: ``held[shard][piece]``.
        ranks: The processes.
    """

    def __init__(self, blocks: Sequence[Block], held: Sequence[Sequence[Run]], ranks: Ranks) -> None:
        self._blocks, self._held, self._ranks = blocks, held, ranks
        self._of: dict[Place, list[Block]] = {}
        for block in blocks:
            self._of.setdefault(block.owner, []).append(block)
        self.owned = self._of.get(ranks.place, [])
        shards = range(ranks.shards)
        # Of each replica's blocks, by owner: how much of them lies on this rank.
        self._mine = [
            [self._size(self._of.get((replica, s), ()), ranks.shard) for s in shards]
            for replica in range(ranks.replicas)
        ]
        # Of the blocks that this rank owns: how much of them lies on each shard.
        self._owned = [self._size(self.owned, s) for s in shards]
        self._places = self._place_fragments()

    def _size(self, blocks: Iterable[Block], shard: int) -> int:
        return sum(overlap(block.run, self._held[shard][block.piece]) for block in blocks)

    def _by_owner(self, replica: int) -> Iterator[Block]:
        """The blocks of a replica, in the order in which their owners send their factors."""
        for shard in range(self._ranks.shards):
            yield from self._of.get((replica, shard), ())

    def _place_fragments(self) -> list[list[tuple[int, slice]]]:
        """For each parameter, where the fragments of its direction arrive: (replica, slice)."""
        places: dict[Block, tuple[int, slice]] = {}
        for replica in range(self._ranks.replicas):
            offset = 0
            for block in self._by_owner(replica):
                size = overlap(block.run, self._held[self._ranks.shard][block.piece])
                places[block] = (replica, slice(offset, offset + size))
                offset += size
        pieces: list[list[tuple[int, slice]]] = [[] for _ in self._held[0]]
        for block in self._blocks:
            pieces[block.piece].append(places[block])
        return pieces

    def gather(self, momenta: Sequence[Tensor]) -> list[Tensor]:
        """Brings together the matrices that this rank owns.

        Args:
            momenta: This rank's part of each parameter of the batch, of any shape.

        Returns:
            One tensor of shape (matrices, rows, columns) for each of ``owned``, on the ranks' device.
        """
        device = self._ranks.device
        flat = [m.reshape(-1) for m in momenta]
        if self._ranks.shards == 1:
            return [flat[b.piece][slice(*b.run)].view(b.shape).to(device) for b in self.owned]
        held, sends = self._held[self._ranks.shard], self._mine[self._ranks.replica]
        parts = [self._fragment(flat[b.piece], b, held[b.piece]) for b in self._by_owner(self._ranks.replica)]
        mine = _join(parts, momenta[0].dtype, device)
        return self._assemble(self._ranks.all_to_all(mine, sends, self._owned))

    @staticmethod
    def _fragment(flat: Tensor, block: Block, held: Run) -> Tensor:
        """The part of a block that lies in what is held of its parameter."""
        start = max(block.run[0], held[0])
        return flat[start - held[0] : start - held[0] + overlap(block.run, held)]

    def _assemble(self, received: Tensor) -> list[Tensor]:
        """The owned blocks, from their fragments shard by shard."""
        cursors = [0, *accumulate(self._owned)]
        fragments: Mapping[Block, list[Tensor]] = {block: [] for block in self.owned}
        for shard, held in enumerate(self._held):
            for block in self.owned:
                size = overlap(block.run, held[block.piece])
                fragments[block].append(received[cursors[shard] : cursors[shard] + size])
                cursors[shard] += size
        return [torch.cat(fragments[block]).view(block.shape) for block in self.owned]

    def scatter(self, factors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """Hands out what the owners computed; on one rank, as it is.

        Args:
            factors: One tensor of shape (matrices, rows, columns) for each of ``owned``.
            dtype: What they are sent in.

        Returns:
            This rank's part of each parameter's direction, of any shape.
        """
        if self._ranks.replicas == self._ranks.shards == 1:
            return list(factors)
        flat = [factor.to(dtype).reshape(-1) for factor in factors]
        if self._ranks.shards > 1:
            flat = [
                x[max(held[b.piece][0], b.run[0]) - b.run[0] :][: overlap(b.run, held[b.piece])]
                for held in self._held
                for b, x in zip(self.owned, flat, strict=True)
            ]
        mine = _join(flat, dtype, self._ranks.device)
        mine = self._ranks.all_to_all(mine, self._owned, self._mine[self._ranks.replica])
        by_replica = self._ranks.all_gather(mine, [sum(sizes) for sizes in self._mine])
        directions = []
        for places in self._places:
            parts = [by_replica[replica][where] for replica, where in places]
            directions.append(parts[0] if len(parts) == 1 else torch.cat(parts))
        return directions


def _join(parts: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    """1-D tensors end to end; there may be none."""
    return torch.cat(list(parts)).to(device) if parts else torch.empty(0, dtype=dtype, device=device)
