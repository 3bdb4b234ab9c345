"""Product norms: the shares attain D, maximise it, and D is a norm."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_noneuclid.product_norms import PRODUCT_NORMS, product_norm

dual_norms = st.just(0.0) | st.floats(1e-6, 1e3)  # the square of a subnormal number is 0
duals = st.lists(dual_norms, min_size=0, max_size=5)
pairs = st.tuples(duals, duals).filter(lambda pair: any(pair[0]) or any(pair[1]))


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def primal(name, matrices, vectors):
    """The product norm of parameters whose norms are given, written down from the paper."""
    largest = matrices.max() if len(matrices) else torch.zeros((), dtype=torch.float64)
    if name == "linf":
        return torch.cat([matrices, vectors]).max()
    if name == "l2":
        return torch.cat([matrices, vectors]).norm()
    return (largest.square() + vectors.square().sum()).sqrt()


@pytest.mark.parametrize("name", PRODUCT_NORMS)
@given(pair=pairs)
@settings(max_examples=100)
def test_the_shares_have_unit_norm_and_attain_the_dual_norm(name, pair):
    d_m, d_v = map(tensor, pair)
    product = product_norm(name).compose(d_m, d_v)
    attained = (product.matrix_shares * d_m).sum() + (product.vector_shares * d_v).sum()
    torch.testing.assert_close(attained, product.dual)
    norm = primal(name, product.matrix_shares, product.vector_shares)
    torch.testing.assert_close(norm, torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize("name", PRODUCT_NORMS)
@given(pair=pairs, seed=st.integers(0, 10**6))
@settings(max_examples=100)
def test_no_other_shares_of_unit_norm_attain_more(name, pair, seed):
    d_m, d_v = map(tensor, pair)
    generator = torch.Generator().manual_seed(seed)
    other = torch.rand(len(d_m) + len(d_v), generator=generator, dtype=torch.float64) + 1e-3
    matrices, vectors = other[: len(d_m)], other[len(d_m) :]
    attained = ((matrices * d_m).sum() + (vectors * d_v).sum()) / primal(name, matrices, vectors)
    assert attained <= product_norm(name).compose(d_m, d_v).dual * (1 + 1e-9)


@pytest.mark.parametrize("name", PRODUCT_NORMS)
@given(values=st.lists(st.tuples(dual_norms, dual_norms), min_size=2, max_size=6), scale=dual_norms)
@settings(max_examples=100)
def test_the_dual_norm_is_homogeneous_and_obeys_the_triangle_inequality(name, values, scale):
    norm, (x, y) = product_norm(name), tensor(values).unbind(-1)
    dual = lambda d: norm.compose(d[:1], d[1:]).dual  # noqa: E731
    torch.testing.assert_close(dual(scale * x), scale * dual(x))
    assert dual(x + y) <= (dual(x) + dual(y)) * (1 + 1e-9)


@pytest.mark.parametrize("name", PRODUCT_NORMS)
@pytest.mark.parametrize("counts", [(2, 2), (2, 0), (0, 2)])
def test_zero_gives_zero_and_never_nan(name, counts):
    d_m, d_v = torch.zeros(counts[0]), torch.zeros(counts[1])
    product = product_norm(name).compose(d_m, d_v)
    assert product.dual == 0
    assert torch.cat([product.matrix_shares, product.vector_shares]).isfinite().all()


def test_the_formulas_on_numbers():
    d_m, d_v = tensor([1.0, 2.0]), tensor([6.0, 2.0])
    hybrid = product_norm("hybrid").compose(d_m, d_v)
    assert hybrid.dual == 7  # sqrt((1 + 2)² + 6² + 2²)
    torch.testing.assert_close(hybrid.matrix_shares, tensor([3 / 7, 3 / 7]))
    torch.testing.assert_close(hybrid.vector_shares, tensor([6 / 7, 2 / 7]))
    assert product_norm("linf").compose(d_m, d_v).dual == 11
    assert product_norm("l2").compose(d_m, d_v).dual == pytest.approx(45**0.5)
