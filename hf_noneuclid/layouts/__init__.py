"""Where the pieces of a parameter live, one module an engine.

The optimizer's four phases are the same everywhere; what an engine says is which part of each parameter is
where (``Holding``) and which ranks there are (``Ranks``). It is asked when the first step is taken, since
engines replace the parameters after construction. A matrix of which ranks hold parts is brought together on
the one that owns it (``exchange``); ownership is even in floating-point operations (``ownership``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from . import dtensor, replicated, zero
from .pieces import Holding
from .ranks import Ranks

__all__ = ["Holding", "Ranks", "bind"]


def bind(
    params: Sequence[Sequence[Tensor]], given: Sequence[Sequence[Any]], names: Sequence[Sequence[str]]
) -> tuple[Ranks, list[list[Holding]]]:
    """The ranks, and what this one holds of the parameters of each group.

    Args:
        params: What the optimizer's groups hold now.
        given: What they held when they were added; None for what does not exist any more.
        names: The names of those.

    Raises:
        RuntimeError: The parameters are sharded in a way that is not supported; the message says what to
            use instead.
    """
    if any(zero.is_partitioned(param) for group in given for param in group):
        _check_one_group(given)
        groups = zip(params, given, names, strict=True)
        return zero.ranks(), [zero.hold(flats, of_group, its) for flats, of_group, its in groups]
    for now, before, its in zip(params, given, names, strict=True):
        _check_known(now, before, its)
    flat = [param for group in params for param in group]
    if (mesh := dtensor.common_mesh(flat)) is not None:
        return dtensor.ranks(mesh), [dtensor.hold(*group, mesh) for group in zip(params, names, strict=True)]
    return replicated.ranks(flat[0].device), [replicated.hold(group) for group in params]


def _check_one_group(given: Sequence[Sequence[Any]]) -> None:
    if len(given) > 1:
        raise RuntimeError(
            f"DeepSpeed steps the {len(given)} groups of this optimizer one after the other, but a step "
            "depends on all parameters. Put them into one group (hf_noneuclid.one_group), with lists of what "
            "differs between them; the Trainer does so."
        )


def _check_known(params: Sequence[Tensor], given: Sequence[Any], names: Sequence[str]) -> None:
    """That every parameter is still one."""
    for param, name in zip(params, names, strict=False):
        if type(param).__name__ == "FlatParameter" or getattr(param, "_is_flat_param", False):
            raise RuntimeError(
                f"{name} is a flat parameter of FSDP version 1, where no matrix exists any more. Use FSDP2 "
                "(fsdp_version: 2)."
            )
    if len(params) != len(given):
        raise RuntimeError(
            f"the optimizer was given {len(given)} parameters, and {len(params)} stand in their place now; "
            "no engine that is known here does this. (DeepSpeed at stage 0 does in half precision: use "
            "stage 1, 2 or 3.)"
        )
