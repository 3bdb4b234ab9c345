"""Polar factors of batches of matrices, and nothing else.

The polar factor of a matrix ``m = U S Vᵀ`` is ``U Vᵀ``: the steepest direction in the spectral norm. The
iterations below apply an odd polynomial to the singular values a few times, which drives them towards 1
by matrix products alone. What five steps leave, for singular values between 1e-3 and 1 times the
Frobenius norm (``tests/test_polar.py`` measures it):

=================  ===============  ===================
method             float32          bfloat16
=================  ===============  ===================
``polar_express``  0.876 to 1.124   0.838 to 1.138
``newton_schulz``  0.470 to 1.203   0.460 to 1.207
``svd``            1                (computes in fp32)
=================  ===============  ===================
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import chain, islice
from typing import Literal, get_args

import torch
from torch import Tensor

from .elementwise import Tensors, wide_dtype

PolarMethod = Literal["polar_express", "newton_schulz", "svd"]
POLAR_METHODS: tuple[str, ...] = get_args(PolarMethod)

Form = Literal["direct", "gram"]

Quintic = tuple[float, float, float]
"""Coefficients (a, b, c) of p(x) = a x + b x³ + c x⁵."""

# N. Amsel, D. Persson, C. Musco, R. M. Gower, "The Polar Express", arXiv 2505.16932, Algorithm 1: the
# minimax composition for singular values in [1e-3, 1]; the last one is the limit, used from there on.
_POLAR_EXPRESS: tuple[Quintic, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)

_STEEP = 3
"""How many of these, from the first on, multiply errors of singular values by more than a few."""

# K. Jordan, "Muon: an optimizer for hidden layers in neural networks", 2024,
# kellerjordan.github.io/posts/muon.
_NEWTON_SCHULZ: Quintic = (3.4445, -4.7750, 2.0315)

# A Frobenius norm above this one and below its inverse is as precise as any.
_SMALLEST = 1e-12

# From how many rows on a CPU computes in bfloat16, if it has instructions for that.
_BF16_ROWS = 512


# Rounding to half precision can lift a singular value over 1, where the first polynomials grow steeply.
_HALF_PRECISION_MARGIN = 1.01


def polar_factor(
    m: Tensor,
    *,
    method: PolarMethod = "polar_express",
    steps: int = 5,
    dtype: torch.dtype | None = None,
    form: Form | None = None,
) -> Tensor:
    """The polar factor of every matrix of a batch.

    A zero matrix has polar factor 0, a rank-deficient one a partial isometry, and a matrix of one row (or
    one column) is divided by its length, exactly, by every method.

    Args:
        m: Matrices of shape (..., rows, columns), of any floating dtype and any finite magnitude.
        method: ``polar_express``, ``newton_schulz`` or ``svd`` (exact; for reference, not for speed).
        steps: Iterations of the first two.
        dtype: What to compute in. By default float64 stays, CUDA computes in bfloat16, all else in float32.
        form: ``direct`` multiplies X at every step, ``gram`` its Gram matrix and X only now and then. By
            default the one that needs fewer operations. Both compute the same, up to rounding.

    Returns:
        The polar factors, of the shape of ``m`` and the dtype that was computed in (by ``svd`` never less
        than float32).

    References:
        N. Amsel et al., "The Polar Express: Optimal Matrix Sign Methods and Their Application to the Muon
        Algorithm", arXiv 2505.16932, 2025.
    """
    batch = m.reshape(-1, *m.shape[-2:])
    return polar_factors([batch], method=method, steps=steps, dtype=dtype, form=form).reshape(m.shape)


def polar_factors(
    batches: Tensors,
    *,
    method: PolarMethod = "polar_express",
    steps: int = 5,
    dtype: torch.dtype | None = None,
    form: Form | None = None,
    foreach: bool | None = None,
) -> Tensor:
    """The polar factors of several batches of matrices of one shape, in one batch of shape (matrices, ...).

    Args:
        batches: Tensors of shape (matrices, rows, columns).
        method: As in ``polar_factor``, like ``steps``, ``dtype`` and ``form``.
        steps: Iterations.
        dtype: What to compute in.
        form: ``direct`` or ``gram``.
        foreach: Read no value, since reading waits for the device. By default on all devices but the CPU.
    """
    rows, columns = batches[0].shape[-2:]
    device = batches[0].device
    dtype = dtype or compute_dtype(batches[0].dtype, device, min(rows, columns))
    if method == "svd":
        dtype = wide_dtype(dtype)
    x = _normalise(batches, dtype, device.type != "cpu" if foreach is None else foreach)
    if min(rows, columns) == 1:
        return x
    if method == "svd":
        return _svd_polar(x)
    return _iterate(x, _coefficients(method, steps, dtype), form or cheaper_form(rows, columns, steps))


@cache
def cheaper_form(rows: int, columns: int, steps: int) -> Form:
    """The form of the iteration that needs fewer operations: ``gram`` for wide and tall matrices."""
    by_form = form_flops(rows, columns, steps)
    return "gram" if by_form["gram"] < by_form["direct"] else "direct"


def form_flops(rows: int, columns: int, steps: int) -> dict[Form, int]:
    """Floating-point operations of the iterative polar factor of one matrix in each form."""
    n, m = sorted((rows, columns))
    return {
        "direct": steps * (4 * n * n * m + 2 * n**3),
        "gram": sum(4 * n * n * m + (8 * run - 6) * n**3 for run in _gram_runs(steps)),
    }


@cache
def _gram_runs(steps: int) -> tuple[int, ...]:
    """The number of polynomials after which the Gram form starts again from X: one three times, then two.

    In a run of several the Gram matrix is no longer exactly that of X. Where the polynomials are steep, the
    next ones lift the difference: the momentum of a pretrained model, which one direction dominates, got a
    singular value of 382 from runs of two in bfloat16, where the direct form has 1.12.
    """
    steep, flat = min(steps, _STEEP), max(steps - _STEEP, 0)
    return (1,) * steep + (2,) * (flat // 2) + (1,) * (flat % 2)


def polar_flops(rows: int, columns: int, steps: int = 5) -> int:
    """Floating-point operations of the iterative polar factor of one matrix."""
    if min(rows, columns) == 1:
        return 3 * max(rows, columns)
    return form_flops(rows, columns, steps)[cheaper_form(rows, columns, steps)]


def compute_dtype(dtype: torch.dtype, device: torch.device, rows: int = 1) -> torch.dtype:
    """What polar factors are computed in, if nothing else is said.

    Args:
        dtype: Of the matrices.
        device: Where they are.
        rows: The shorter side of a matrix. On a CPU small matrices gain nothing by bfloat16.
    """
    if dtype == torch.float64:
        return torch.float64
    is_fast = device.type == "cuda" or (rows >= _BF16_ROWS and _cpu_multiplies_bf16())
    return torch.bfloat16 if is_fast else torch.float32


@cache
def _cpu_multiplies_bf16() -> bool:
    """Whether the CPU has instructions for products of bfloat16."""
    return any(getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("avx512_bf16", "amx_tile"))


def _normalise(batches: Sequence[Tensor], dtype: torch.dtype, foreach: bool) -> Tensor:
    """``m / ‖m‖_F`` of every matrix, computed in float32 or better, 0 where m is 0, whatever its size."""
    x = torch.empty(sum(map(len, batches)), *batches[0].shape[1:], dtype=dtype, device=batches[0].device)
    if foreach:
        for some, m in zip(torch.split(x, [len(m) for m in batches]), batches, strict=True):
            some.copy_(_unit(m))
        return x
    # One matrix after another, which the CPU then still has in its cache.
    wide = wide_dtype(batches[0].dtype)
    for to, m in zip(x, chain.from_iterable(batches), strict=True):
        m = m.to(wide)
        length: Tensor = torch.linalg.vector_norm(m)
        to.copy_(m / length if _SMALLEST < length < 1 / _SMALLEST else _unit(m))
    return x


def _unit(m: Tensor) -> Tensor:
    """Matrices divided by their Frobenius norms; 0 stays 0."""
    m = m.to(wide_dtype(m.dtype))
    # By the largest entry first: the squares of 1e-30 or 1e30 do not exist in float32.
    largest = torch.maximum(m.amax(dim=(-2, -1), keepdim=True), -m.amin(dim=(-2, -1), keepdim=True))
    x = m / torch.where(largest == 0, 1, largest)
    length = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    x /= torch.where(length == 0, 1, length)
    return x


@cache
def _coefficients(method: PolarMethod, steps: int, dtype: torch.dtype) -> tuple[Quintic, ...]:
    """The polynomials of an iteration."""
    if method == "newton_schulz":
        return (_NEWTON_SCHULZ,) * steps
    margin = _HALF_PRECISION_MARGIN if dtype in (torch.bfloat16, torch.float16) else 1.0
    growing = tuple((a / margin, b / margin**3, c / margin**5) for a, b, c in _POLAR_EXPRESS[:-1])
    return (growing + (_POLAR_EXPRESS[-1],) * steps)[:steps]


def _iterate(x: Tensor, polynomials: Sequence[Quintic], form: Form) -> Tensor:
    """Applies the polynomials one after another."""
    is_tall = x.shape[-2] > x.shape[-1]
    if form == "direct":
        for polynomial in polynomials:
            x = _apply(x, polynomial, is_tall)
        return x
    remaining = iter(polynomials)
    for run in _gram_runs(len(polynomials)):
        some = list(islice(remaining, run))
        x = _apply(x, some[0], is_tall) if run == 1 else _apply_by_gram(x, some, is_tall)
    return x


def _apply(x: Tensor, polynomial: Quintic, is_tall: bool) -> Tensor:
    """X ← a X + (b A + c A²) X with A = X Xᵀ; of a tall X, X ← a X + X (b A + c A²) with A = Xᵀ X."""
    a, b, c = polynomial
    gram = x.mT @ x if is_tall else x @ x.mT
    p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    return torch.baddbmm(x, x, p, beta=a) if is_tall else torch.baddbmm(x, p, x, beta=a)


def _apply_by_gram(x: Tensor, polynomials: Sequence[Quintic], is_tall: bool) -> Tensor:
    """The same for several polynomials: P = a I + b A + c A² and A ← P A P for each, then X ← P ... P X.

    All of these matrices are polynomials of the first A, so they commute.
    """
    gram, product = x.mT @ x if is_tall else x @ x.mT, None
    for i, (a, b, c) in enumerate(polynomials):
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        p.diagonal(dim1=-2, dim2=-1).add_(a)
        product = p if product is None else p @ product
        if i + 1 < len(polynomials):
            gram = p @ gram @ p
    if product is None:
        return x
    return x @ product if is_tall else product @ x


def _svd_polar(x: Tensor) -> Tensor:
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    rank_tolerance = s[..., :1] * max(x.shape[-2:]) * torch.finfo(x.dtype).eps
    polar: Tensor = (u * (s > rank_tolerance).to(x.dtype).unsqueeze(-2)) @ vh
    return polar
