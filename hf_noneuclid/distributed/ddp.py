"""Every rank holds every parameter whole: one device, or data parallelism (DDP).

DDP leaves the same averaged gradient on every rank, so all ranks have the same momentum. Each rank computes
the polar factors of the matrices that it owns. All ranks apply the same gathered factors, rounded alike,
which keeps the parameters bitwise equal.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from .grid import ProcessGrid, world_size


def grid(device: torch.device) -> ProcessGrid:
    """Replicas, in the default process group."""
    if (world := world_size()) == 1:
        return ProcessGrid(device)
    return ProcessGrid(device, replicas=world, replica=dist.get_rank(), replica_group=dist.group.WORLD)
