"""What the log says of the loss and its lower bound."""

import logging

import pytest
import torch

from hf_noneuclid import NonEuclideanDescent
from hf_noneuclid.log import StepLog


def log_of(losses, caplog, **options):
    """Steps with these losses; returns what is logged after each, and the warnings."""
    weight = torch.nn.Parameter(torch.eye(2, 3))
    optimizer = NonEuclideanDescent(
        [{"params": [weight], "norm": "spectral"}],
        0.1,
        descent="regularized",
        product_norm="hybrid",
        momo=True,
        **options,
    )
    log, metrics = StepLog(optimizer), []
    with caplog.at_level(logging.WARNING, "hf_noneuclid.log"):
        for step, loss in enumerate(losses):
            weight.grad = torch.eye(2, 3)
            optimizer.step(loss=loss)
            metrics.append(log.read(step))
    return metrics, [record.getMessage() for record in caplog.records]


def test_a_loss_below_the_number_that_was_given_is_warned_of_once(caplog):
    metrics, warnings = log_of([3.0, 0.5, 0.4], caplog, loss_lower_bound=1.0)
    assert [row["loss_lower_bound"] for row in metrics] == [1.0] * 3
    assert len(warnings) == 1
    assert "the loss, 0.5, is below loss_lower_bound=1.0" in warnings[0]


@pytest.mark.parametrize("rule", ["auto", "relative"])
def test_a_loss_below_the_bound_of_a_rule_is_nothing_to_warn_of(caplog, rule):
    options = {"loss_lower_bound": rule, "lower_bound_fraction": 0.7}
    metrics, warnings = log_of([4.0, 1.0], caplog, **options)
    assert [row["loss_lower_bound"] for row in metrics] == pytest.approx([2.8, 2.59])
    assert warnings == []


@pytest.mark.parametrize("losses", [[0.0, -1.0], [-2.0, -1.0]])
def test_where_a_rule_knows_no_bound_nothing_is_truncated_and_that_is_said(caplog, losses):
    metrics, warnings = log_of(losses, caplog, loss_lower_bound="relative")
    assert [row["step_size"] for row in metrics] == pytest.approx([0.1, 0.1])
    assert all("loss_lower_bound" not in row and row["truncation_rate"] == 0 for row in metrics)
    assert len(warnings) == 1
    assert "loss_lower_bound=relative knows no bound" in warnings[0]


def test_auto_has_a_bound_below_a_loss_that_is_not_above_zero(caplog):
    metrics, warnings = log_of([-2.0, -1.0], caplog, loss_lower_bound="auto")
    assert [row["loss_lower_bound"] for row in metrics] == pytest.approx([-2.5, -2.4])
    assert warnings == []


def test_a_negative_loss_is_below_what_star_assumes(caplog):
    _, warnings = log_of([1.0, -1.0], caplog, loss_lower_bound="star")
    assert len(warnings) == 1
    assert "is below loss_lower_bound=star" in warnings[0]
