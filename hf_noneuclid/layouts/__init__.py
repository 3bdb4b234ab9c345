"""Where the pieces of a parameter live, one module an engine.

The optimizer's four phases are the same everywhere; a layout sums scalars over the ranks. ``bind`` chooses
the layout when the first step is taken, since engines replace the parameters after construction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from .replicated import Replicated

__all__ = ["Layout", "Replicated", "bind"]


class Layout(Protocol):
    """What the optimizer's phases ask of an engine."""

    def mean_loss(self, loss: Tensor) -> Tensor:
        """The loss averaged over the ranks: one all-reduce of a 0-d tensor."""


def bind(params: Sequence[Tensor], names: Sequence[str]) -> Layout:
    """The layout of these parameters.

    Args:
        params: All parameters of the optimizer.
        names: Their names, for the errors.

    Raises:
        RuntimeError: The parameters are sharded in a way that is not supported; the message says what to
            use instead.
    """
    for param, name in zip(params, names, strict=True):
        if hasattr(param, "device_mesh"):
            raise RuntimeError(
                f"{name} is a DTensor of shape {tuple(param.shape)}: parameters sharded by FSDP2 or tensor "
                "parallelism are not supported yet. Train on one device or with DDP."
            )
        if type(param).__name__ == "FlatParameter" or getattr(param, "_is_flat_param", False):
            raise RuntimeError(
                f"{name} is a flat parameter of FSDP version 1, where no matrix exists any more. "
                "Train on one device or with DDP."
            )
        if hasattr(param, "ds_id") or hasattr(param, "_hp_mapping"):
            raise RuntimeError(
                f"{name} is partitioned by DeepSpeed ZeRO, which is not supported yet. "
                "Train on one device or with DDP."
            )
    return Replicated()
