"""The truncated step size."""

import math

import pytest
import torch

from hf_noneuclid.momo import (
    BOUND_RULES,
    DESCENTS,
    NO_BOUND,
    Believed,
    Fixed,
    Relative,
    Scheduled,
    Seen,
    Star,
    lower_bound,
    model_value,
    truncated_step_size,
)


def step_size(lr, height, dual, descent):
    return truncated_step_size(*(torch.tensor(x) for x in (lr, height, dual)), descent).item()


def tensors(*values):
    return [torch.tensor(value, dtype=torch.float64) for value in values]


def follow(rule, steps):
    """F*, and the part of the way to it, at each step; a step is (loss, model, learning rate, decrease)."""
    memory, found = torch.tensor(rule.initial, dtype=torch.float64), []
    for step in steps:
        *seen, decrease = tensors(*step)
        found.append((rule.bound(memory, Seen(*seen)).item(), rule.part(memory, Seen(*seen)).item()))
        memory = rule.remember(memory, Seen(*seen), decrease)
    return found


def bounds(rule, steps):
    return [bound for bound, _ in follow(rule, steps)]


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
    decrease = tau * dual * (dual if descent == "regularized" else 1)
    assert decrease == pytest.approx(3.0)


# ------------------------------------------------------------------------------- the lower bound


def test_a_number_is_the_bound_whatever_happens():
    assert follow(Fixed(0.5), [(2.0, 3.0, 1.0, 0.1), (0.1, 0.2, 0.5, 9.0)]) == [(0.5, 1.0)] * 2
    assert lower_bound(-2.0, 0.7, 10, 0.5, alone=True) == Fixed(-2.0)
    believed = lower_bound(-2.0, 0.7, 10, 0.5, alone=False)
    assert isinstance(believed, Believed)
    assert believed.initial == (-2.0,)


def test_the_names_of_the_rules():
    assert isinstance(lower_bound("star", 0.7, 10, 0.5, alone=True), Star)
    assert lower_bound("relative", 0.6, 20, 0.5, alone=True) == Relative(0.6, 20)
    assert lower_bound("auto", 0.6, 20, 0.5, alone=True) == Scheduled(0.6, 20, 0.5)
    assert set(BOUND_RULES) == {"star", "relative", "auto"}


def test_star_is_the_model_at_the_last_step_less_half_of_what_that_step_took_from_it():
    """Never below 0; and where the model has come below the bound, half of the model takes its place."""
    models_and_decreases = [(5.0, 2.0), (4.6, 0.2), (4.0, 1.0), (3.0, 9.0), (2.0, 1.0)]
    steps = [(4.0, model, 1.0, decrease) for model, decrease in models_and_decreases]
    assert bounds(Star(), steps) == pytest.approx([0.0, 4.0, 4.0 / 2, 3.0 / 2, 0.0])


STEPS = [(8.0, 7.0, 0.2, 1.0), (4.0, 7.0, 0.4, 1.0), (0.0, 7.0, 0.1, 1.0), (0.0, 7.0, 0.0, 1.0)]


@pytest.mark.parametrize("rule", [Relative(0.5, 4), Scheduled(0.5, 4, 0.5)])
def test_a_fraction_of_a_running_mean_of_the_loss_that_starts_at_the_first(rule):
    assert bounds(rule, STEPS) == pytest.approx([4.0, 3.5, 2.625, 1.96875])


@pytest.mark.parametrize("rule", [Relative(0.7, 10), Scheduled(0.7, 10, 0.0)])
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_without_a_slack_it_has_no_scale_of_its_own(rule, scale):
    scaled = [(scale * loss, scale * model, lr, scale * decrease) for loss, model, lr, decrease in STEPS]
    assert bounds(rule, scaled) == pytest.approx([scale * x for x in bounds(rule, STEPS)])


def test_auto_stays_a_slack_below_the_mean_also_where_a_fraction_of_it_is_less():
    losses = [10.0, 2.0, 0.25, -2.0, -10.0]  # with a horizon of one step the mean is the last loss
    steps = [(loss, 7.0, 0.1, 1.0) for loss in losses]
    assert bounds(Scheduled(0.8, 1, 0.5), steps) == pytest.approx([8.0, 1.5, -0.25, -2.5, -12.0])
    assert bounds(Scheduled(0.8, 1, 0.0), steps) == pytest.approx([8.0, 1.6, 0.2, -2.4, -12.0])


@pytest.mark.parametrize("rule", [Relative(0.5, 4), Scheduled(0.5, 4, 0.5)])
def test_a_loss_that_is_nan_has_no_bound(rule):
    assert bounds(rule, [(8.0, 7.0, 0.1, 1.0), (math.nan, 7.0, 0.1, 1.0)]) == pytest.approx([4.0, NO_BOUND])


def test_auto_goes_as_much_less_far_as_the_schedule_has_come_down_from_its_peak():
    assert [part for _, part in follow(Scheduled(0.5, 4, 0.5), STEPS)] == pytest.approx([1.0, 1.0, 0.25, 0.0])
    assert [part for _, part in follow(Relative(0.5, 4), STEPS)] == [1.0] * 4


def test_a_schedule_that_starts_at_zero_is_no_nan():
    warming_up = [(8.0, 7.0, 0.0, 0.0), (8.0, 7.0, 0.1, 0.0)]
    assert [part for _, part in follow(Scheduled(0.5, 4, 0.5), warming_up)] == [1.0, 1.0]


def test_a_number_is_believed_until_a_loss_is_below_it():
    rule = Believed(1.0)
    memory = torch.tensor(rule.initial)
    bounds = []
    for loss in (2.0, 1.0, 0.5, 2.0):
        seen = Seen(torch.tensor(loss), torch.tensor(3.0), torch.tensor(0.1))
        bounds.append(rule.bound(memory, seen).item())
        memory = rule.remember(memory, seen, torch.tensor(0.0))
    assert bounds == [1.0, 1.0, pytest.approx(NO_BOUND), pytest.approx(NO_BOUND)]
