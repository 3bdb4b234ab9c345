"""The processes that train together, and the only four collectives of a step.

They stand in a grid of ``replicas`` x ``shards``: along a row each rank holds another shard of every
parameter, along a column all hold the same one. One device is 1 x 1, DDP n x 1, FSDP2 and ZeRO 1 x n, and
HSDP is both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Place = tuple[int, int]
"""Where a rank stands in the grid: (replica, shard)."""


@dataclass(frozen=True, eq=False)
class Ranks:
    """A grid of processes, seen from one of them; every process of the job is in it."""

    device: torch.device
    """Where the collectives and the polar factors are computed."""
    replicas: int = 1
    shards: int = 1
    replica: int = 0
    shard: int = 0
    replica_group: Any = None
    """The ranks that hold the same shard as this one, ordered by replica."""
    shard_group: Any = None
    """The ranks that hold the other shards of this replica, ordered by shard."""
    sent: Counter[str] = field(default_factory=Counter)
    """Bytes that this rank has sent to others, by collective."""

    @property
    def count(self) -> int:
        return self.replicas * self.shards

    @property
    def place(self) -> Place:
        return self.replica, self.shard

    def once(self, x: Tensor) -> Tensor:
        """x, to be summed over the ranks, where replicas all hold it: zeros on all replicas but the first."""
        return x if self.replica == 0 else torch.zeros_like(x)

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all ranks of a tensor of any shape, the same bits on every rank."""
        if self.count == 1:
            return x
        x = x.clone()
        dist.all_reduce(x)
        # A ring sends every byte twice, but for the share of one rank.
        self.sent["all_reduce"] += 2 * x.nbytes * (self.count - 1) // self.count
        return x

    def all_to_all(self, x: Tensor, sends: Sequence[int], receives: Sequence[int]) -> Tensor:
        """Sends consecutive runs of a 1-D tensor to the shards, and returns what they send, in their order.

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
        longest = max(sizes)  # collectives of equal sizes are what every backend has
        padded = torch.nn.functional.pad(x, (0, longest - x.numel()))
        gathered = x.new_empty(self.replicas, longest)
        dist.all_gather_into_tensor(gathered.view(-1), padded, group=self.replica_group)
        self.sent["all_gather"] += padded.nbytes * (self.replicas - 1)
        return [row[:size] for row, size in zip(gathered, sizes, strict=True)]

    def agree(self, mine: Any) -> list[Any]:
        """What every rank says, by global rank; while planning only, since it waits for all of them."""
        if self.count == 1:
            return [mine]
        said: list[Any] = [None] * self.count
        dist.all_gather_object(said, mine)
        return said


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
