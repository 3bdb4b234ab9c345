"""Every rank holds every parameter whole: one device, or data parallelism (DDP).

DDP leaves the same averaged gradient on every rank, so all keep the same momentum. Each rank computes the
polar factors that it owns and all apply the same gathered ones, rounded alike, which keeps the parameters
bitwise equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from .pieces import Holding
from .ranks import Ranks, world_size


def hold(params: Sequence[Tensor]) -> list[Holding]:
    """All of each parameter."""
    return [Holding(p, tuple(p.shape), (0, prod(p.shape))) for p in params]


def ranks(device: torch.device) -> Ranks:
    """Replicas, in the default process group."""
    if (world := world_size()) == 1:
        return Ranks(device)
    return Ranks(device, replicas=world, replica=dist.get_rank(), replica_group=dist.group.WORLD)
