"""Polar factors of matrices of every kind, by every method."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_noneuclid.polar import POLAR_METHODS, cheaper_form, form_flops, polar_factor

FORMS = ("direct", "gram")

# Where five steps leave singular values that lie between 1e-3 and 1 times the Frobenius norm.
SPREAD = {
    ("polar_express", torch.float32): (0.876, 1.124),
    ("polar_express", torch.bfloat16): (0.838, 1.138),
    ("newton_schulz", torch.float32): (0.470, 1.203),
    ("newton_schulz", torch.bfloat16): (0.460, 1.207),
    ("svd", torch.float32): (1.0, 1.0),
}
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-3}


def matrix_with(singular_values, columns):
    generator = torch.Generator().manual_seed(0)
    n = len(singular_values)
    u = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(columns, n, generator=generator, dtype=torch.float64)).Q
    return (u * singular_values.double()) @ v.mT


def exact_polar(m):
    u, _, vh = torch.linalg.svd(m.double(), full_matrices=False)
    return u @ vh


@pytest.mark.parametrize("columns", [200, 800])
@pytest.mark.parametrize(("method", "dtype"), SPREAD)
def test_spread_of_singular_values(method, dtype, columns):
    values = torch.logspace(-3, 0, 200)
    values = values / values.norm()  # so the smallest is below 1e-3 of the Frobenius norm
    values = values[values >= 1e-3]
    low, high = SPREAD[method, dtype]
    got = torch.linalg.svdvals(
        polar_factor(matrix_with(values, columns).float(), method=method, dtype=dtype).double()
    )
    assert got.min() >= low - TOLERANCE[dtype]
    assert got.max() <= high + TOLERANCE[dtype]


def test_the_stated_spread_is_attained_not_only_a_bound():
    x = torch.logspace(-3, 0, 4000, dtype=torch.float64)
    # On a 2 x 2 diagonal matrix of unit Frobenius norm the small singular value is free.
    m = torch.zeros(len(x), 2, 2, dtype=torch.float64)
    m[:, 0, 0], m[:, 1, 1] = x, (1 - x**2).clamp(min=0).sqrt()
    values = polar_factor(m)[:, 0, 0]
    assert values.min().item() == pytest.approx(0.8764, abs=1e-4)
    assert values.max().item() == pytest.approx(1.1236, abs=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 6, 8, 12])
def test_the_number_of_steps_counts(steps):
    m = torch.randn(20, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    errors = [(polar_factor(m, steps=k) - exact_polar(m)).norm() for k in (steps, steps + 1)]
    assert errors[1] < errors[0] or errors[1] < 1e-12
    if steps >= 8:
        assert errors[0] < 1e-12


@pytest.mark.parametrize("method", POLAR_METHODS)
@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4), (2, 3, 7), (2, 7, 3), (2, 2, 3, 4)])
def test_shape_transposition_and_batch(method, shape):
    m = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    polar = polar_factor(m, method=method)
    assert polar.shape == m.shape
    torch.testing.assert_close(polar_factor(m.mT, method=method), polar.mT)
    if len(shape) > 2:
        torch.testing.assert_close(polar[-1], polar_factor(m[-1], method=method))


@pytest.mark.parametrize("method", POLAR_METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1.0, 1e10, 1e30])
def test_magnitude_does_not_matter(method, dtype, scale):
    m = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))
    reference = polar_factor(m.to(dtype), method=method, dtype=torch.float32)
    scaled = polar_factor((m.to(dtype).double() * scale).float(), method=method)
    torch.testing.assert_close(scaled, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", POLAR_METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_matrices_have_polar_factor_zero_and_spoil_no_other(method, dtype):
    m = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(4))
    alone = polar_factor(m[2], method=method, dtype=dtype)
    m[1] = 0
    polar = polar_factor(m, method=method, dtype=dtype)
    assert torch.equal(polar[1], torch.zeros_like(polar[1]))
    torch.testing.assert_close(polar[2], alone)


@pytest.mark.parametrize("method", POLAR_METHODS)
@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1), (3, 1, 7)])
def test_one_row_is_divided_by_its_length(method, shape):
    m = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    length = m.square().sum(dim=(-2, -1), keepdim=True).sqrt()
    torch.testing.assert_close(polar_factor(m, method=method), m / length)


@pytest.mark.parametrize("method", POLAR_METHODS)
def test_rank_deficient_matrices_become_partial_isometries(method):
    m = matrix_with(torch.tensor([3.0, 1.0, 0.0, 0.0]), 9)
    polar = polar_factor(m, method=method)
    values = torch.linalg.svdvals(polar)
    assert values[2:].max() < 1e-9
    low, high = SPREAD[method, torch.float32]
    assert values[:2].min() > low - 1e-3
    assert values[:2].max() < high + 1e-3


ILL = torch.logspace(0, -5, 24)
KINDS = {
    "random": lambda: torch.randn(24, 96, generator=torch.Generator().manual_seed(7)),
    "square": lambda: torch.randn(24, 24, generator=torch.Generator().manual_seed(7)),
    "ill-conditioned": lambda: matrix_with(ILL, 96).float(),
    "ill-conditioned, square": lambda: matrix_with(ILL, 24).float(),
    "of low rank": lambda: matrix_with(torch.where(torch.arange(24) < 5, 1.0, 0.0), 96).float(),
    "with a few large values": lambda: matrix_with(torch.arange(1, 25) ** -1.5, 96).float(),
    "zero": lambda: torch.zeros(24, 96),
    "tiny": lambda: 1e-30 * torch.randn(24, 96, generator=torch.Generator().manual_seed(7)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["polar_express", "newton_schulz"])
@pytest.mark.parametrize("steps", [1, 3, 5, 8])
def test_both_forms_are_the_same_in_float64(method, steps, kind):
    m = KINDS[kind]().double()
    direct, gram = (polar_factor(m, method=method, steps=steps, form=form) for form in FORMS)
    torch.testing.assert_close(gram, direct, rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["polar_express", "newton_schulz"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gram_form_is_as_accurate_as_the_direct_one(method, dtype, kind):
    """Squaring loses small singular values, but makes up none."""
    m = KINDS[kind]()
    exact = polar_factor(m.double(), method="svd")
    error = {
        form: (polar_factor(m, method=method, dtype=dtype, form=form).double() - exact).norm() / 24**0.5
        for form in FORMS
    }
    assert error["gram"] <= 1.08 * error["direct"] + 1e-3
    values = torch.linalg.svdvals(polar_factor(m, method=method, dtype=dtype, form="gram").float())
    assert values.max() < SPREAD[method, dtype][1] + 0.02


def dominated(count, rows, columns):
    """Matrices that one direction of few entries dominates, as in the momenta of pretrained models."""
    g = torch.Generator().manual_seed(100)
    share = 0.2 + 0.8 * torch.rand(count, 1, 1, generator=g)
    pair = []
    for n in (rows, columns):
        power = 10 ** (1.5 * torch.rand(count, 1, generator=g)) - 1
        entries = torch.randn(count, n, generator=g) * torch.rand(count, n, generator=g) ** power
        pair.append(entries / entries.norm(dim=1, keepdim=True))
    rest = torch.randn(count, rows, columns, generator=g)
    rest *= (1 - share**2).sqrt() / rest.norm(dim=(1, 2), keepdim=True)
    return share * pair[0].unsqueeze(2) * pair[1].unsqueeze(1) + rest


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", ["polar_express", "newton_schulz"])
@pytest.mark.parametrize("steps", [5, 6, 7, 8])
def test_one_dominating_direction_is_not_lifted(method, form, steps):
    """A Gram matrix that has parted from its X by rounding sent singular values to 1e12 here."""
    got = polar_factor(dominated(3000, 8, 24), method=method, form=form, steps=steps, dtype=torch.bfloat16)
    assert torch.linalg.matrix_norm(got.float(), ord=2).max() < 1.25


def test_the_cheaper_form_is_the_default():
    assert cheaper_form(768, 768, 5) == "direct"
    assert cheaper_form(768, 3072, 5) == cheaper_form(3072, 768, 5) == "gram"
    m = torch.randn(8, 64, generator=torch.Generator().manual_seed(8))
    assert torch.equal(polar_factor(m), polar_factor(m, form="gram"))
    assert not torch.equal(polar_factor(m), polar_factor(m, form="direct"))


@pytest.mark.parametrize("steps", [1, 4, 5, 6])
@pytest.mark.parametrize("form", FORMS)
def test_the_operations_of_a_form_are_those_of_its_products(form, steps):
    with FlopCounterMode(display=False) as counter:
        polar_factor(torch.randn(12, 50), steps=steps, form=form)
    assert counter.get_total_flops() == form_flops(12, 50, steps)[form]


def test_the_input_is_left_alone():
    for method in POLAR_METHODS:
        m = torch.randn(4, 6)
        before = m.clone()
        polar_factor(m, method=method)
        assert torch.equal(m, before)


def test_compute_dtype_on_cpu():
    assert polar_factor(torch.randn(2, 3)).dtype == torch.float32
    assert polar_factor(torch.randn(2, 3).bfloat16()).dtype == torch.float32
    assert polar_factor(torch.randn(2, 3).double()).dtype == torch.float64


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["polar_express", "newton_schulz"])
def test_cuda_computes_in_bfloat16_as_accurately_as_the_cpu_does(method):
    m = torch.randn(3, 64, 96, generator=torch.Generator().manual_seed(6))
    polar = polar_factor(m.cuda(), method=method)
    assert polar.dtype == torch.bfloat16
    torch.testing.assert_close(polar.cpu().float(), polar_factor(m, method=method), rtol=0, atol=0.05)
