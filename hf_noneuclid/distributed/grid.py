"""The processes that train together, and the collectives of a step.

They form a grid of ``replicas`` x ``shards``: the ranks of a row hold different shards of every parameter,
those of a column hold the same one. One device is 1 x 1, DDP n x 1, FSDP2 and ZeRO 1 x n; HSDP is both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# An all-gather pads its parts to one size. It may move this much more than the parts together.
_PADDING = 1.25

Coordinate = tuple[int, int]
"""A rank's place in the grid: (replica, shard)."""


@dataclass(frozen=True, eq=False)
class ProcessGrid:
    """A grid of processes, seen from one of them; every process of the job is in it."""

    device: torch.device
    """Where the collectives and the polar factors are computed."""
    replicas: int = 1
    shards: int = 1
    replica: int = 0
    shard: int = 0
    replica_group: Any = None
    """Process group of the ranks that hold the same shard as this one, ordered by replica."""
    shard_group: Any = None
    """Process group of the ranks that hold the other shards of this replica, ordered by shard."""
    sent: Counter[str] = field(default_factory=Counter)
    """Bytes that this rank has sent to others, by collective."""

    @property
    def size(self) -> int:
        return self.replicas * self.shards

    @property
    def coordinate(self) -> Coordinate:
        return self.replica, self.shard

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all ranks of a tensor of any shape, the same bits on every rank."""
        if self.replicas * self.shards == 1:
            return x
        x = x.clone()
        dist.all_reduce(x)
        # A ring sends every byte twice, except the share of one rank.
        self.sent["all_reduce"] += 2 * x.nbytes * (self.size - 1) // self.size
        return x

    def all_to_all(self, x: Tensor, sends: Sequence[int], receives: Sequence[int]) -> Tensor:
        """Sends consecutive parts of a 1-D tensor to the shards; returns what they send, in their order.

        Args:
            x: 1-D, on ``device``.
            sends: How many elements go to each shard.
            receives: How many come from each.
        """
        if self.shards == 1:
            return x
        received = x.new_empty(sum(receives))
        dist.all_to_all_single(received, x, list(receives), list(sends), group=self.shard_group)
        self.sent["all_to_all"] += (sum(sends) - sends[self.shard]) * x.itemsize
        return received

    def all_gather(self, x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """What each replica holds, as 1-D tensors of the given sizes; x is this replica's."""
        if self.replicas == 1:
            return [x]
        if pads(sizes):
            return self._all_gather_padded(x, sizes)
        return self._broadcast_each(x, sizes)

    def _all_gather_padded(self, x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        padded = torch.nn.functional.pad(x, (0, max(sizes) - x.numel()))
        gathered = list(x.new_empty(self.replicas, max(sizes)))
        dist.all_gather(gathered, padded, group=self.replica_group)
        self.sent["all_gather"] += padded.nbytes * (self.replicas - 1)
        return [row[:size] for row, size in zip(gathered, sizes, strict=True)]

    def _broadcast_each(self, x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        held = [x if r == self.replica else x.new_empty(size) for r, size in enumerate(sizes)]
        pending = [
            dist.broadcast(part, group=self.replica_group, group_src=r, async_op=True)
            for r, part in enumerate(held)
            if part.numel()
        ]
        for work in pending:
            work.wait()
        # In a ring every rank except the last passes a part on.
        self.sent["broadcast"] += sum(sizes) * x.itemsize * (self.replicas - 1) // self.replicas
        return held

    def gather_objects(self, mine: Any) -> list[Any]:
        """One object of every rank, by global rank. It waits for all of them: for planning only."""
        if self.size == 1:
            return [mine]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, mine)
        return gathered


def pads(sizes: Sequence[int]) -> bool:
    """Whether parts of these sizes are gathered in one collective, padded to the largest.

    One collective is fastest, unless it moves mostly padding; then each part is broadcast.
    """
    return len(sizes) * max(sizes) <= _PADDING * sum(sizes)


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
