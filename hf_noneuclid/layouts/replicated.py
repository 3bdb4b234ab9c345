"""Every rank holds every parameter whole: one device, or data parallelism (DDP)."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


class Replicated:
    """One device, or DDP, which leaves the same averaged gradient on every rank.

    All ranks do the same work on the same numbers, so their parameters stay bitwise equal; the one number
    that differs between them is the loss.
    """

    def mean_loss(self, loss: Tensor) -> Tensor:
        """The loss averaged over the ranks, a 0-d tensor; NaN or infinite if it is so on any rank."""
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return loss
        loss = loss / dist.get_world_size()  # a new tensor: the caller's loss is not reduced in place
        dist.all_reduce(loss)
        return loss
