"""The truncated step size."""

import pytest
import torch

from hf_noneuclid.momo import DESCENTS, NO_BOUND, believed_bound, model_height, truncated_step_size


def step_size(lr, height, dual, descent):
    return truncated_step_size(*(torch.as_tensor(x) for x in (lr, height, dual)), descent).item()


def tensors(*values):
    return [torch.tensor(value, dtype=torch.float64) for value in values]


def test_the_height_is_what_the_linearisations_say_less_the_bound_times_their_weight():
    assert model_height(*tensors(2.0, 0.5, 1.0, -1.5)) == 4.0
    assert model_height(*tensors(2.0, 0.5, 0.25, -2.0)) == 3.0


def test_gradients_that_were_all_clipped_by_a_factor_have_a_height_by_the_same_factor():
    height, clipped = model_height(*tensors(2.0, 0.5, 1.0, 0.3)), model_height(*tensors(0.2, 0.05, 0.1, 0.3))
    assert clipped == pytest.approx(0.1 * height)


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


def test_a_number_is_believed_until_a_loss_is_below_it():
    bound, bounds = torch.tensor(1.0), []
    for loss in (2.0, 1.0, 0.5, 2.0):
        bound = believed_bound(bound, torch.tensor(loss))
        bounds.append(bound.item())
    assert bounds == [1.0, 1.0, pytest.approx(NO_BOUND), pytest.approx(NO_BOUND)]


def test_a_loss_that_is_nan_says_nothing_of_the_bound():
    assert believed_bound(torch.tensor(1.0), torch.tensor(float("nan"))) == 1.0


@pytest.mark.parametrize("descent", DESCENTS)
@pytest.mark.parametrize("lr", [0.0, 0.1])
def test_without_a_bound_no_step_is_truncated(descent, lr):
    height = model_height(*(torch.tensor(x) for x in (2.0, 0.5, 1.0, NO_BOUND)))
    assert step_size(lr, height, 4.0, descent) == pytest.approx(lr)
