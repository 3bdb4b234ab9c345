"""Work that is done entry by entry, on lists of tensors, in few passes over memory.

An accelerator does best with few large calls: lists go to foreach kernels, in lots that keep temporary
copies within a workspace. A CPU does best with one tensor after another in lots that stay in its cache,
and may ask a tensor for its value, for which an accelerator would have to be waited for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Tensors = list[Tensor] | tuple[Tensor, ...]

MIB = 2**20

CPU_WORKSPACE = 4 * MIB
"""Bytes that a CPU finds in its cache again."""


def on_cpu(x: Tensor) -> bool:
    """Whether asking for the value of x is free."""
    return x.device.type == "cpu"


def lots(workspace: int, *columns: Sequence[Tensor]) -> Iterator[tuple[list[int], tuple[list[Tensor], ...]]]:
    """Tensors in lots that fit into a workspace; large ones are cut along their first dimension.

    Args:
        workspace: Bytes of float32 copies of one column. On a CPU the cache may set a lower limit.
        columns: Lists of tensors; those in the same place have the same shape.

    Yields:
        For each lot, the places of its tensors in the lists, and the lists themselves, of views.
    """
    places: list[int] = []
    taken: tuple[list[Tensor], ...] = tuple([] for _ in columns)
    room = limit = _limit(workspace, columns[0])
    for place, row in enumerate(zip(*columns, strict=True)):
        rows = max(1, limit // max(1, 4 * row[0][:1].numel())) if row[0].ndim else 1
        for cut in zip(*(x.split(rows) if x.ndim else (x,) for x in row), strict=True):
            if places and 4 * cut[0].numel() > room:
                yield places, taken
                places, taken, room = [], tuple([] for _ in columns), limit
            places.append(place)
            for column, x in zip(taken, cut, strict=True):
                column.append(x)
            room -= 4 * cut[0].numel()
    if places:
        yield places, taken


def _limit(workspace: int, column: Sequence[Tensor]) -> int:
    return min(workspace, CPU_WORKSPACE) if column and on_cpu(column[0]) else workspace


def widened(x: Tensor) -> Tensor:
    """x in float32 if it is in half precision, else x itself."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def largest_entries(xs: Tensors) -> Tensors:
    """The largest absolute value in each tensor, 0-d; NaN where there is one."""
    if not xs or not on_cpu(xs[0]):
        return torch._foreach_norm(xs, torch.inf) if xs else []
    bounds = [torch.aminmax(x) for x in xs]  # six times as fast as the norm
    return [torch.maximum(bound.max, -bound.min) for bound in bounds]


def dot(x: Tensor, y: Tensor) -> Tensor:
    """The inner product of two tensors of one shape as a 0-d tensor, in the wider of their dtypes."""
    dtype = torch.promote_types(x.dtype, y.dtype)
    return torch.dot(x.reshape(-1).to(dtype), y.reshape(-1).to(dtype))


def dots(xs: Tensor, ys: Tensor) -> Tensor:
    """The inner products of two batches of matrices, of shape (matrices,)."""
    if on_cpu(xs):
        return torch.stack([dot(x, y) for x, y in zip(xs, ys, strict=True)])
    return (xs * ys).sum(dim=(-2, -1))


def where(ok: Tensor, xs: Tensors, others: Tensors) -> list[Tensor]:
    """xs if ok, a 0-d bool tensor, else the others, whatever is in xs: 0 times NaN would be NaN."""
    if on_cpu(ok) and on_cpu(others[0]):
        return list(xs if ok else others)
    here = ok.to(others[0].device)
    return [torch.where(here, x, other) for x, other in zip(xs, others, strict=True)]


def lerp_(starts: Tensors, ends: Tensors, weight: Tensor) -> None:
    """starts += weight (ends - starts), with a 0-d weight. The ends may be overwritten."""
    weight = weight.to(starts[0].device)
    if on_cpu(starts[0]):
        for start, end in zip(starts, ends, strict=True):
            start.lerp_(end, weight.to(start.dtype))
        return
    torch._foreach_sub_(ends, starts)
    torch._foreach_mul_(ends, weight)
    torch._foreach_add_(starts, ends)


def move_(params: Tensors, directions: Tensors, coefficients: Tensors, decay: Tensor | None) -> None:
    """p ← (1 - decay) p + coefficient u, rounded once to the dtype of p.

    Args:
        params: Parts of parameters, of one dtype and device.
        directions: Of their shapes.
        coefficients: Broadcast over them.
        decay: ηλ, 0-d, or None for none.
    """
    device = params[0].device
    wide = [widened(param) for param in params]
    u, c = ([x.to(device) for x in xs] for xs in (directions, coefficients))
    if decay is not None:
        torch._foreach_mul_(wide, (1 - decay).to(device))
    if on_cpu(params[0]):  # where foreach would convert a direction in half precision in a pass of its own
        for p, u_, c_ in zip(wide, u, c, strict=True):
            p.addcmul_(u_, c_)
    else:
        torch._foreach_addcmul_(wide, u, c)
    if wide[0] is not params[0]:
        torch._foreach_copy_(params, wide)
