"""The truncated step size."""

import pytest
import torch

from hf_noneuclid.momo import (
    BOUND_RULES,
    DESCENTS,
    Fixed,
    Relative,
    Star,
    lower_bound,
    model_decrease,
    model_value,
    truncated_step_size,
)


def step_size(lr, height, dual, descent):
    return truncated_step_size(*(torch.tensor(x) for x in (lr, height, dual)), descent).item()


def tensors(*values):
    return [torch.tensor(value, dtype=torch.float64) for value in values]


def bounds(rule, steps):
    """F* at each step; a step is (loss, model, how far it lowers the model)."""
    memory, found = torch.tensor(rule.initial, dtype=torch.float64), []
    for step in steps:
        loss, model, decrease = tensors(*step)
        found.append(rule.bound(memory, loss, model).item())
        memory = rule.remember(memory, loss, model, decrease)
    return found


def test_the_model_is_what_the_linearisations_say():
    assert model_value(torch.tensor(2.0), torch.tensor(0.5)) == 2.5


@pytest.mark.parametrize("descent", DESCENTS)
def test_the_truncated_step_brings_the_model_down_to_the_bound_and_no_further(descent):
    height, dual = 3.0, 4.0
    power = 1 if descent == "constrained" else 2
    assert step_size(10.0, height, dual, descent) * dual**power == pytest.approx(height)


@pytest.mark.parametrize("descent", DESCENTS)
def test_a_small_learning_rate_is_left_alone(descent):
    assert step_size(1e-3, 3.0, 4.0, descent) == pytest.approx(1e-3)


@pytest.mark.parametrize("descent", DESCENTS)
@pytest.mark.parametrize("height", [0.0, -2.0])
def test_no_step_is_taken_below_the_bound(descent, height):
    assert step_size(0.1, height, 4.0, descent) == 0


@pytest.mark.parametrize("descent", DESCENTS)
@pytest.mark.parametrize("height", [0.0, 1.0, -1.0])
def test_a_zero_dual_norm_means_no_step(descent, height):
    assert step_size(0.1, height, 0.0, descent) == 0


@pytest.mark.parametrize("descent", DESCENTS)
@pytest.mark.parametrize("dual", [1e-30, 1e30])
@pytest.mark.parametrize("height", [0.0, 1.0])
def test_extreme_dual_norms_stay_finite_in_float32(descent, dual, height):
    tau = step_size(0.1, height, dual, descent)
    assert 0 <= tau <= 0.1 + 1e-8


@pytest.mark.parametrize("descent", DESCENTS)
def test_a_truncated_step_lowers_the_model_to_the_bound(descent):
    height, dual = tensors(3.0, 4.0)
    tau = truncated_step_size(torch.tensor(10.0), height, dual, descent)
    assert model_decrease(tau, dual, descent) == pytest.approx(3.0)


# ------------------------------------------------------------------------------- the lower bound


def test_a_number_is_the_bound_whatever_happens():
    memory, loss, model = tensors(1.0, 2.0, 3.0)
    assert Fixed(0.5).bound(memory, loss, model) == 0.5
    assert lower_bound(-2.0, 0.7, 10) == Fixed(-2.0)


def test_the_names_of_the_rules():
    assert isinstance(lower_bound("star", 0.7, 10), Star)
    assert lower_bound("auto", 0.6, 20) == Relative(0.6, 20)
    assert set(BOUND_RULES) == {"star", "auto"}


def test_star_is_the_model_at_the_last_step_less_half_of_what_that_step_took_from_it():
    """Never below 0; and where the model has come below the bound, half of the model takes its place."""
    steps = [(5.0, 5.0, 2.0), (4.5, 4.6, 0.2), (4.0, 4.0, 1.0), (4.0, 3.0, 9.0), (4.0, 2.0, 1.0)]
    assert bounds(Star(), steps) == pytest.approx([0.0, 4.0, 4.0 / 2, 3.0 / 2, 0.0])


def test_auto_is_a_fraction_of_a_running_mean_of_the_loss_that_starts_at_the_first():
    steps = [(8.0, 7.0, 1.0), (4.0, 7.0, 1.0), (0.0, 7.0, 1.0)]
    assert bounds(Relative(0.5, 4), steps) == pytest.approx([4.0, 3.5, 2.625])


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_auto_has_no_scale_of_its_own(scale):
    steps = [(8.0, 7.0, 1.0), (4.0, 7.0, 1.0), (1.0, 7.0, 1.0)]
    scaled = [tuple(scale * x for x in step) for step in steps]
    assert bounds(Relative(0.7, 10), scaled) == pytest.approx(
        [scale * x for x in bounds(Relative(0.7, 10), steps)]
    )
