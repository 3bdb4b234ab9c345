"""Work on lists of tensors, entry by entry, in few passes over memory.

An accelerator is fastest with few large calls: lists go to foreach kernels, in chunks that keep temporary
copies within a workspace, and no value is read, because reading waits for the device (``foreach=True``).
A CPU is fastest with one tensor after another, in chunks that stay in its cache, and reads values for free.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Tensors = list[Tensor] | tuple[Tensor, ...]

MIB = 2**20

CPU_CACHE = 4 * MIB
"""Bytes that a CPU still finds in its cache."""


def chunks(
    limit: int, *columns: Sequence[Tensor]
) -> Iterator[tuple[list[int], tuple[tuple[Tensor, ...], ...]]]:
    """Views of tensors in chunks of a limited size; a large tensor is cut along its first dimension.

    Args:
        limit: Bytes of a chunk, counting float32 copies of one column.
        columns: Lists of tensors; those at the same index have the same shape.

    Yields:
        The index of every tensor of the chunk in the columns, and the chunk of every column.
    """
    indices: list[int] = []
    rows: list[tuple[Tensor, ...]] = []
    room = limit
    for i, row in enumerate(zip(*columns, strict=True)):
        size = 4 * row[0].numel()
        # Only a tensor that is too large is split, since a split makes a view for every column.
        cuts = [row]
        if size > limit and row[0].ndim:
            length = max(1, limit * row[0].shape[0] // size)
            cuts = list(zip(*[x.split(length) for x in row], strict=True))
        for cut in cuts:
            size = 4 * cut[0].numel()
            if indices and size > room:
                yield indices, tuple(zip(*rows, strict=True))
                indices, rows, room = [], [], limit
            indices.append(i)
            rows.append(cut)
            room -= size
    if indices:
        yield indices, tuple(zip(*rows, strict=True))


_HALF = (torch.bfloat16, torch.float16)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for half precision, else the dtype itself."""
    return torch.float32 if dtype in _HALF else dtype


def narrow_dtype(dtype: torch.dtype) -> torch.dtype:
    """bfloat16, which has the range of float32; float64 for itself."""
    return dtype if dtype == torch.float64 else torch.bfloat16


def as_scalar(value: Tensor | float, like: Tensor) -> Tensor:
    """A number as a 0-d tensor of the dtype and device of ``like``.

    A Python number is filled in, because copying it from the host would wait for the device.
    """
    if isinstance(value, Tensor):
        return value.detach().reshape(()).to(like.device, like.dtype, non_blocking=True)
    return torch.full((), value, dtype=like.dtype, device=like.device)


def stack_scalars(scalars: Tensors, like: Tensor) -> Tensor:
    """0-d tensors of one dtype and device as a tensor of shape (n,), of the dtype and device of ``like``."""
    return torch.stack(scalars).to(like) if scalars else like.new_empty(0)


def largest_entries(xs: Tensors, foreach: bool) -> Tensors:
    """The largest absolute value in each tensor, 0-d; NaN where there is one."""
    if foreach:
        return torch._foreach_norm(xs, torch.inf) if xs else []
    largest = []
    for x in xs:
        low, high = torch.aminmax(x)  # six times as fast as the norm
        largest.append(torch.maximum(high, -low))
    return largest


def inner_product(xs: Sequence[Tensor], ys: Sequence[Tensor], like: Tensor, limit: int) -> Tensor:
    """Σ⟨x, y⟩ over pairs of tensors, 0-d, of the dtype and device of ``like``.

    It is taken in chunks: a sum of many products in float32 loses digits, and a copy in float32 takes memory.

    Args:
        xs: Of the same shapes as ``ys``.
        ys: Of any dtypes.
        like: 0-d.
        limit: Bytes of a chunk, counted in float32.
    """
    products: list[Tensor] = []
    for _, (x, y) in chunks(limit, xs, ys):
        products += inner_products(x, y)
    return stack_scalars(products, like).sum()


def inner_products(xs: Tensors, ys: Tensors) -> list[Tensor]:
    """⟨x, y⟩ of each pair of tensors of one shape, 0-d, in float32 at least."""
    products = []
    for x, y in zip(xs, ys, strict=True):
        if x.dtype != y.dtype or x.dtype in _HALF:
            dtype = wide_dtype(torch.promote_types(x.dtype, y.dtype))
            x, y = x.to(dtype), y.to(dtype)
        products.append(torch.dot(x.reshape(-1), y.reshape(-1)))
    return products


def average_(
    averages: Tensors, values: Tensors, weight: Tensor, ok: Tensor, *, limit: int, foreach: bool, square: bool
) -> None:
    """averages += weight (values - averages), or with the squares of the values.

    Args:
        averages: Changed in place.
        values: Of the same shapes; they are left alone.
        weight: 0-d.
        ok: 0-d, bool; where it is False nothing changes, even if a value is NaN.
        limit: Bytes of a chunk.
        foreach: Use few large calls and read no value.
        square: Average the squares.
    """
    if not averages or not (foreach or ok):
        return
    ok, weight = ok.to(averages[0].device), weight.to(averages[0].device, averages[0].dtype)
    for _, (average, value) in chunks(limit, averages, values):
        if not foreach:
            for a, x in zip(average, value, strict=True):
                x = x.to(a.dtype)
                a.lerp_(x * x if square else x, weight)
            continue
        change: Tensors = [x.to(average[0].dtype) for x in value]
        if square:
            change = torch._foreach_mul(change, change)
        # A weight of 0 does not protect from a bad step: 0 times NaN is NaN.
        change = [torch.where(ok, x, a) for x, a in zip(change, average, strict=True)]
        torch._foreach_sub_(change, average)
        torch._foreach_mul_(change, weight)
        torch._foreach_add_(average, change)


def move_(
    params: Tensors, directions: Tensors, coefficients: Tensors, decay: Tensor | None, foreach: bool
) -> None:
    """p ← (1 - decay) p + coefficient u, rounded once to the dtype of p.

    Args:
        params: Local shards of parameters of one dtype and device, changed in place.
        directions: Of their shapes.
        coefficients: They broadcast over the shapes.
        decay: λ times the rate of decay, 0-d, or None for none.
        foreach: Use few large calls.
    """
    if not params:
        return
    is_half = params[0].dtype in _HALF
    p: Tensors = [x.float() for x in params] if is_half else params
    if decay is not None:
        torch._foreach_mul_(p, 1 - decay)
    if foreach:
        torch._foreach_addcmul_(p, directions, coefficients)
    else:  # foreach would convert a direction in half precision in a pass of its own
        for p_i, u, c in zip(p, directions, coefficients, strict=True):
            p_i.addcmul_(u, c)
    if is_half:
        torch._foreach_copy_(params, p)


def scale_(targets: Tensors, xs: Tensors, coefficients: Tensors, ok: Tensor, foreach: bool) -> None:
    """target ← coefficient x, rounded to the dtype of the target.

    Args:
        targets: Changed in place.
        xs: Of their shapes.
        coefficients: They broadcast over the shapes.
        ok: 0-d, bool; where it is False nothing changes.
        foreach: Read no value.
    """
    if not targets or not (foreach or ok):
        return
    for target, x, c in zip(targets, xs, coefficients, strict=True):
        target.copy_(torch.where(ok, x * c, target) if foreach else x * c)
