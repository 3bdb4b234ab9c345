"""The truncated step size."""

import pytest
import torch

from hf_noneuclid.momo import DESCENTS, model_value, truncated_step_size


def step_size(lr, height, dual, descent):
    return truncated_step_size(*(torch.tensor(x) for x in (lr, height, dual)), descent).item()


def test_the_model_is_what_the_linearisations_say_above_the_bound():
    assert model_value(torch.tensor(2.0), torch.tensor(0.5), 1.0) == 1.5


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
