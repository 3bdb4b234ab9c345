"""The table of methods, and the typed reading of their options."""

import logging

import pytest
import torch

from hf_noneuclid import METHODS, create_optimizer
from hf_noneuclid.methods import Method, all_names, canonical_name, parse_options, resolve
from hf_noneuclid.momo import DESCENTS
from hf_noneuclid.norms import VECTOR_NORMS
from hf_noneuclid.options import STEP_SIZES
from hf_noneuclid.product_norms import PRODUCT_NORMS


def model():
    return torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))


def test_the_table_of_the_paper():
    assert METHODS["muon"] == Method("constrained", "linf", "ada_linf", step_size="rate")
    assert METHODS["scion"] == Method("constrained", "linf", "linf", step_size="rate")
    assert METHODS["polargrad"] == Method("regularized", "l2", "ada_l2", step_size="rate")
    assert METHODS["muonmax"] == Method("regularized", "hybrid", "ada_l2", step_size="rate")
    for name in ("muon", "scion", "polargrad", "muonmax"):
        plain, momo = METHODS[name], METHODS[f"{name}_momo"]
        assert momo == Method(plain.descent, plain.product_norm, plain.vector_norm, step_size="momo+slope")


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("muonadam", "muon"),
        ("muonadam-momo", "muon_momo"),
        ("momo_muon", "muon_momo"),
        ("momo-muonmax", "muonmax_momo"),
        ("muonmax-momo", "muonmax_momo"),
        ("momo_scion", "scion_momo"),
        ("noneuclid", "noneuclid"),
    ],
)
def test_aliases_and_hyphens(alias, name):
    assert canonical_name(alias) == name
    assert alias in all_names()


def test_an_unknown_method_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown method 'adam'; known are muon, scion.*noneuclid"):
        create_optimizer(model(), "adam", lr=0.1)


def test_text_becomes_typed_values():
    text = {"momentum": "0.9", "polar_steps": "7", "step_size": "momo", "nuclear_norm": "stale"}
    assert parse_options(text) == {
        "momentum": 0.9,
        "polar_steps": 7,
        "step_size": "momo",
        "nuclear_norm": "stale",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"momentum": "high"}, r"option momentum must be a number in \[0, 1\), not 'high'"),
        ({"polar_steps": "2.5"}, "option polar_steps must be an integer >= 1, not '2.5'"),
        ({"foreach": "maybe"}, "option foreach must be true, false or None, not 'maybe'"),
    ],
)
def test_text_of_another_type_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_options(text)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (
            "muon",
            {"betas": 1},
            "method muon: unknown option 'betas'; known are beta2, decay_at, eps, foreach, matrix_lr_scale",
        ),
        ("muonmax", {"first_step": 1.0}, "unknown option 'first_step'"),
        ("muonmax", {"loss_lower_bound": 1.0}, "unknown option 'loss_lower_bound'"),
        ("muonmax", {"momentum": 2.0}, r"momentum must be a number in \[0, 1\), not 2.0"),
        ("muonmax_momo", {"loss_lower_bound": "low"}, "loss_lower_bound must be a finite number"),
        ("muonmax", {"matrix_lr_scale": -1.0}, "matrix_lr_scale must be a finite number > 0"),
        ("noneuclid", {"descent": "constrained"}, "missing product_norm, vector_norm .*linf, l2, hybrid"),
        (
            "noneuclid",
            {"descent": "down", "product_norm": "l2", "vector_norm": "linf"},
            "descent must be one of constrained, regularized",
        ),
    ],
)
def test_options_that_do_not_fit_the_method_are_refused(method, options, message):
    with pytest.raises(ValueError, match=message):
        resolve(method, **options)


@pytest.mark.parametrize("step_size", STEP_SIZES)
@pytest.mark.parametrize("vector_norm", VECTOR_NORMS)
@pytest.mark.parametrize("product_norm", PRODUCT_NORMS)
@pytest.mark.parametrize("descent", DESCENTS)
def test_every_combination_is_reachable_and_steps(descent, product_norm, vector_norm, step_size):
    options = {"descent": descent, "product_norm": product_norm, "vector_norm": vector_norm}
    net = model()
    optimizer = create_optimizer(net, "noneuclid", lr=1e-3, step_size=step_size, **options)
    before = [p.detach().clone() for p in net.parameters()]
    loss = net(torch.tensor([1, 2])).square().sum()
    loss.backward()
    optimizer.step(loss=loss)
    assert all(p.isfinite().all() for p in net.parameters())
    moved = [not torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True)]
    assert all(moved)
    assert {group["norm"] for group in optimizer.param_groups} == {"spectral", vector_norm}


def test_defaults_are_those_of_the_paper_except_the_slope():
    groups = create_optimizer(model(), lr=1e-2).param_groups
    for group in groups:
        assert (group["step_size"], group["decay_at"]) == ("momo+slope", "step")
        assert (group["momentum"], group["beta2"], group["eps"]) == (0.95, 0.95, 1e-8)
        assert (group["weight_decay"], group["polar_steps"], group["loss_lower_bound"]) == (0.0, 5, 0.0)
    assert {group["norm"]: group["lr_scale"] for group in groups} == {"spectral": 10.0, "ada_l2": 1.0}


def test_what_went_where_is_logged_once(caplog):
    with caplog.at_level(logging.DEBUG, logger="hf_noneuclid"):
        create_optimizer(model(), lr=1e-2)
    summary, table = caplog.records
    assert summary.levelno == logging.INFO
    assert summary.getMessage().startswith("matrices: 2 tensors, 48 elements, such as 1 x *.weight (8, 4), ")
    assert table.levelno == logging.DEBUG
    assert "(8, 4)  x1  matrix  linear map" in table.getMessage()
