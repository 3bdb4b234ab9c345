"""What the log says about the loss, its lower bound and the nuclear norms."""

import logging

import pytest
import torch

from hf_noneuclid import NonEuclideanDescent
from hf_noneuclid.log import StepLog


def log_of(losses, caplog, step_size="momo", **options):
    """What is logged after each of several steps with these losses, and the warnings."""
    weight = torch.nn.Parameter(torch.eye(2, 3))
    optimizer = NonEuclideanDescent(
        [{"params": [weight], "norm": "spectral"}],
        0.1,
        descent="regularized",
        product_norm="hybrid",
        step_size=step_size,
        **options,
    )
    log, metrics = StepLog(optimizer), []
    with caplog.at_level(logging.WARNING, "hf_noneuclid.log"):
        for step, loss in enumerate(losses):
            weight.grad = torch.eye(2, 3)
            optimizer.step(loss=loss)
            metrics.append(log.read(step))
    return metrics, [record.getMessage() for record in caplog.records]


def test_a_loss_below_the_given_number_is_warned_about_once(caplog):
    metrics, warnings = log_of([3.0, 0.5, 0.4], caplog, loss_lower_bound=1.0)
    assert [row["loss_lower_bound"] for row in metrics] == [1.0] * 3
    assert len(warnings) == 1
    assert "the loss, 0.5, is below loss_lower_bound=1.0" in warnings[0]


def test_with_the_slope_a_number_is_dropped_below_which_a_loss_was_and_a_warning_says_so_once(caplog):
    options = {"step_size": "momo+slope", "loss_lower_bound": 1.0}
    metrics, warnings = log_of([3.0, 0.5, 0.4, 3.0], caplog, **options)
    assert [row.get("loss_lower_bound") for row in metrics] == [1.0, None, None, None]
    assert len(warnings) == 1
    assert "a loss was below loss_lower_bound=1.0" in warnings[0]
    assert "is not used any more" in warnings[0]


@pytest.mark.parametrize("step_size", ["momo", "momo+slope"])
def test_losses_that_are_not_below_the_number_cause_no_warning(caplog, step_size):
    _, warnings = log_of([3.0, 1.0, 2.0], caplog, step_size=step_size, loss_lower_bound=1.0)
    assert warnings == []


def nuclear_norms_in_the_log(grad, norm):
    """The nuclear norms in the log after one step of a parameter with this gradient."""
    weight = torch.nn.Parameter(torch.zeros_like(grad))
    group = {"params": [weight], "norm": norm}
    optimizer = NonEuclideanDescent([group], 0.1, descent="regularized", product_norm="hybrid")
    log = StepLog(optimizer)
    weight.grad = grad
    optimizer.step()
    return {key: value for key, value in log.read(1).items() if key.startswith("nuclear_norm")}


def test_the_largest_the_median_and_the_smallest_nuclear_norm_of_a_stack_are_logged():
    stack = torch.tensor([2.0, 6.0, 1.0, 3.0]).view(4, 1, 1) * torch.eye(2, 3)
    norms = nuclear_norms_in_the_log(stack, "spectral")
    assert list(norms) == ["nuclear_norm_max", "nuclear_norm_median", "nuclear_norm_min"]
    smallest = norms["nuclear_norm_min"]
    assert [norm / smallest for norm in norms.values()] == pytest.approx([6.0, 2.5, 1.0], rel=1e-3)


def test_without_a_matrix_no_nuclear_norm_is_logged():
    assert nuclear_norms_in_the_log(torch.ones(6), "ada_l2") == {}


def run_of(steps, caplog, grad=1.0, lr=0.1, loss=1.0, **options):
    """What is logged after each step of a matrix and a vector, and the warnings."""
    matrix, vector = torch.nn.Parameter(torch.eye(2, 3)), torch.nn.Parameter(torch.ones(3))
    groups = [{"params": [matrix], "norm": "spectral"}, {"params": [vector], "norm": "ada_l2"}]
    optimizer = NonEuclideanDescent(groups, lr, descent="constrained", product_norm="linf", **options)
    log, metrics = StepLog(optimizer), []
    with caplog.at_level(logging.WARNING, "hf_noneuclid.log"):
        for step in range(steps):
            for p in (matrix, vector):
                p.grad = torch.full_like(p, grad)
            optimizer.step(loss=loss)
            metrics.append(log.read(step))
    return metrics, [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_size": "momo", "loss": 0.0}, "the last 10 steps were 0: by Momo's model"),
        ({"step_size": "slope", "grad": 0.0}, "the last 10 steps were 0, because all gradients were"),
    ],
)
def test_ten_zero_steps_are_counted_and_warned_of_once(caplog, options, message):
    metrics, warnings = run_of(25, caplog, **options)
    assert [row["zero_steps"] for row in metrics] == [1] * 25
    assert len(warnings) == 1
    assert message in warnings[0]


def test_nine_zero_steps_and_those_of_a_learning_rate_of_zero_are_no_fault(caplog):
    metrics, warnings = run_of(9, caplog, step_size="momo", loss=0.0)
    assert warnings == []
    metrics, warnings = run_of(20, caplog, step_size="slope", lr=0.0)
    assert [row["zero_steps"] for row in metrics] == [1] * 20
    assert warnings == []


def test_steps_that_move_are_no_zero_steps(caplog):
    metrics, _ = run_of(3, caplog, step_size="momo")
    assert all("zero_steps" not in row for row in metrics)


def test_the_share_of_limited_steps_is_that_since_the_last_log(caplog):
    metrics, _ = run_of(3, caplog, step_size="momo", lr=1e-3)
    assert [(row["limited_rate"], row["truncation_rate"]) for row in metrics] == [(1.0, 0.0)] * 3
    metrics, _ = run_of(3, caplog, step_size="momo", lr=1e3)
    assert [(row["limited_rate"], row["truncation_rate"]) for row in metrics] == [(0.0, 1.0)] * 3


def test_only_the_slope_has_a_step_size_of_its_own_for_the_vectors(caplog):
    metrics, _ = run_of(3, caplog, step_size="slope")
    assert all("vector_step_size" in row for row in metrics)
    metrics, _ = run_of(3, caplog, step_size="momo")
    assert all("vector_step_size" not in row for row in metrics)
