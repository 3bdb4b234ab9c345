"""Which elements of a parameter are on which rank, and how a matrix becomes whole.

The phases of a step are the same on every engine. An engine only says which processes there are
(``ProcessGrid``) and which elements of each parameter this one holds (``LocalShard``): ``ddp``, ``fsdp2`` and
``zero`` find out. They look when the first step is taken, because engines replace the parameters after the
optimizer was made. ``ownership`` decides which rank computes which polar factor, ``exchange`` moves momenta
there and directions back, and ``agreement`` checks that all ranks train the same model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from . import ddp, fsdp2, zero
from .grid import ProcessGrid
from .shards import LocalShard, whole

__all__ = ["LocalShard", "ProcessGrid", "find_shards"]


def find_shards(
    params: Sequence[Sequence[Tensor]], given: Sequence[Sequence[Any]], names: Sequence[Sequence[str]]
) -> tuple[ProcessGrid, list[list[LocalShard]]]:
    """The processes, and what this one holds of the parameters of each group.

    Args:
        params: What the optimizer's groups hold now.
        given: What they held when they were added; None for a parameter that no longer exists.
        names: The names of the parameters that were given.

    Raises:
        RuntimeError: The parameters are sharded in a way that is not supported; the message says what to
            use.
    """
    if any(zero.is_partitioned(param) for group in given for param in group):
        _check_one_group(given)
        return zero.grid(), [zero.shard(*group) for group in zip(params, given, names, strict=True)]
    for group in zip(params, given, names, strict=True):
        _check_known(*group)
    flat = [param for group in params for param in group]
    if (mesh := fsdp2.common_mesh(flat)) is not None:
        return fsdp2.grid(mesh), [fsdp2.shard(*group, mesh) for group in zip(params, names, strict=True)]
    return ddp.grid(flat[0].device), [[whole(param) for param in group] for group in params]


def _check_one_group(given: Sequence[Sequence[Any]]) -> None:
    if len(given) > 1:
        raise RuntimeError(
            f"DeepSpeed steps the {len(given)} groups of this optimizer one after the other, but a step "
            "depends on all parameters. Put them into one group (hf_noneuclid.one_group), with lists of what "
            "differs between them; the Trainer does so."
        )


def _check_known(params: Sequence[Tensor], given: Sequence[Any], names: Sequence[str]) -> None:
    """Raises RuntimeError if an engine has merged parameters."""
    for param, name in zip(params, names, strict=False):
        if type(param).__name__ == "FlatParameter" or getattr(param, "_is_flat_param", False):
            raise RuntimeError(
                f"{name} is a flat parameter of FSDP version 1, which has lost the shapes of its matrices. "
                "Use FSDP2 (fsdp_version: 2)."
            )
    if len(params) != len(given):
        raise RuntimeError(
            f"the optimizer was given {len(given)} parameters, and an engine has replaced them by "
            f"{len(params)}. This engine is not supported. (DeepSpeed does this at stage 0 in half "
            "precision: use stage 1, 2 or 3.)"
        )
