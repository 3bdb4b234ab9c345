"""Every norm: its steepest direction has unit norm and attains the dual norm, which is a norm."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hf_noneuclid.norms import VECTOR_NORMS, Spectral, vector_norm

EPS = 1e-8
SPECTRAL = Spectral("svd")
seeds = st.integers(0, 2**31 - 1)
scales = st.floats(1e-6, 1e6)


def draw(seed, shape=(3, 5), zeros=0.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x * (torch.rand(shape, generator=generator, dtype=torch.float64) >= zeros)


def primal(name, u, v):
    """The norm itself, written down independently of its dual."""
    a = EPS + v.sqrt()
    if name == "spectral":
        return torch.linalg.matrix_norm(u, 2)
    if name == "ada_l2":
        return (a * u.square()).sum().sqrt()
    return u.abs().max() if name == "linf" else (a * u.abs()).max()


def dual(name, m, v):
    if name == "spectral":
        return SPECTRAL.dual([m[None]], SPECTRAL.direction([m[None]]))[0]
    norm = vector_norm(name, EPS)
    return norm.dual(torch.stack(list(norm.partial([m], norm.direction([m], [v])))))[0]


def direction(name, m, v):
    if name == "spectral":
        return SPECTRAL.direction([m[None]])[0]
    norm = vector_norm(name, EPS)
    length = norm.length(dual(name, m, v).reshape(1))
    (unscaled,) = norm.direction([m], [v])
    return unscaled if length is None else unscaled / length


ALL = ["spectral", *VECTOR_NORMS]


@pytest.mark.parametrize("name", ALL)
@given(seed=seeds, zeros=st.sampled_from([0.0, 0.5]))
@settings(max_examples=50)
def test_the_direction_attains_the_dual_norm(name, seed, zeros):
    m, v = draw(seed, zeros=zeros), draw(seed + 1).square()
    assume(bool(m.any()))
    torch.testing.assert_close((m * direction(name, m, v)).sum(), dual(name, m, v))


@pytest.mark.parametrize("name", ["spectral", "linf", "ada_l2"])
@given(seed=seeds)
@settings(max_examples=50)
def test_the_direction_has_unit_norm(name, seed):
    m, v = draw(seed), draw(seed + 1).square()
    one = torch.ones((), dtype=torch.float64)
    torch.testing.assert_close(primal(name, direction(name, m, v), v), one)


@given(seed=seeds)
@settings(max_examples=50)
def test_the_direction_of_ada_linf_has_unit_norm_where_the_norm_is_weighted_by_m(seed):
    # Its direction is the steepest in the ℓ∞ norm of a u / |m|.
    m, v = draw(seed), draw(seed + 1).square()
    weighted = (EPS + v.sqrt()) * direction("ada_linf", m, v).abs() / m.abs()
    torch.testing.assert_close(weighted, torch.ones_like(m))


@pytest.mark.parametrize("name", ["spectral", "linf", "ada_l2"])
@given(seed=seeds)
@settings(max_examples=50)
def test_no_unit_direction_does_better(name, seed):
    m, v, other = draw(seed), draw(seed + 1).square(), draw(seed + 2)
    unit = other / primal(name, other, v)
    assert (m * unit).sum() <= dual(name, m, v) * (1 + 1e-9)


@pytest.mark.parametrize("name", ["spectral", "linf", "ada_l2"])
@given(seed=seeds, scale=scales)
@settings(max_examples=50)
def test_the_dual_norm_is_homogeneous(name, seed, scale):
    m, v = draw(seed), draw(seed + 1).square()
    torch.testing.assert_close(dual(name, scale * m, v), scale * dual(name, m, v))
    torch.testing.assert_close(dual(name, -m, v), dual(name, m, v))


@pytest.mark.parametrize("name", ["spectral", "linf", "ada_l2"])
@given(seed=seeds)
@settings(max_examples=50)
def test_the_dual_norm_obeys_the_triangle_inequality(name, seed):
    m, n, v = draw(seed), draw(seed + 1), draw(seed + 2).square()
    assert dual(name, m + n, v) <= (dual(name, m, v) + dual(name, n, v)) * (1 + 1e-9)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_has_dual_norm_zero_and_direction_zero(name, dtype):
    zero = torch.zeros(3, 5, dtype=dtype)
    assert dual(name, zero, zero) == 0
    assert torch.equal(direction(name, zero, zero), zero)


@pytest.mark.parametrize("name", VECTOR_NORMS)
def test_partials_add_up_over_the_shards_of_a_parameter(name):
    m, v = draw(1, (12,)), draw(2, (12,)).square()
    norm = vector_norm(name, EPS)
    shards = list(m.split([5, 7]))
    partials = torch.stack(list(norm.partial(shards, norm.direction(shards, list(v.split([5, 7]))))))
    torch.testing.assert_close(norm.dual(partials.sum()), dual(name, m, v))


@pytest.mark.parametrize("name", VECTOR_NORMS)
def test_the_inputs_are_left_alone(name):
    m, v = draw(1), draw(2).square()
    m0, v0 = m.clone(), v.clone()
    direction(name, m, v)
    assert torch.equal(m, m0)
    assert torch.equal(v, v0)
