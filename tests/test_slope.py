"""The slope rule: it finds its step sizes alone, and they depend on nothing that they should not."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_noneuclid import METHODS, create_optimizer
from hf_noneuclid.momo import DESCENTS
from hf_noneuclid.product_norms import PRODUCT_NORMS
from hf_noneuclid.slope import GROWTH, INITIAL_PACE, PARTS, RETREAT, TARGET, Pace, Reading, advance

PLAIN = [name for name in METHODS if not name.endswith("_momo")]

# -------------------------------------------------------------------- the rule alone


def walk(slopes, *, lr=1.0, dual=0.5, norm=1.0, limit=math.inf, first_step=1e-6, regularized=False):
    """The lengths of the steps of the matrices for the slopes of the steps, the first of which has none."""
    pace = Pace(*torch.tensor(INITIAL_PACE, dtype=torch.float64))
    rates = lr if isinstance(lr, list) else [lr] * (len(slopes) + 1)
    lengths = []
    for slope, rate in zip([0.0, *slopes], rates, strict=True):
        values = ([slope, 0.0], [norm] * PARTS, [dual] * PARTS, rate, min(rate, limit))
        reading = Reading(*(torch.tensor(x, dtype=torch.float64) for x in values))
        pace, found = advance(pace, reading, momentum=0.95, first_step=first_step, regularized=regularized)
        lengths.append(found[0].item())
    return lengths, pace


def test_the_first_step_has_the_length_that_was_asked_for():
    for dual, regularized in itertools.product((0.1, 20.0), (False, True)):
        lengths, _ = walk([], dual=dual, first_step=1e-4, regularized=regularized)
        assert lengths == pytest.approx([1e-4])


def test_it_doubles_while_the_slope_stays():
    lengths, _ = walk([3.0] * 10)
    for one, two in itertools.pairwise(lengths):
        assert two / one == pytest.approx(math.exp(GROWTH))


def test_it_keeps_a_quarter_when_the_slope_has_fallen_to_less_than_a_half():
    falling = [1.0] * 5 + [0.99, 0.98, 0.0, 0.0]
    lengths, pace = walk(falling)
    assert lengths[-1] / lengths[-2] == pytest.approx(RETREAT)
    assert pace.is_growing[0] == 0
    assert walk([1.0] * 9)[1].is_growing[0] == 1


def test_noise_does_not_end_the_growth():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(30, generator=generator).tolist()
    assert walk([1 + 0.3 * x for x in noise])[1].is_growing[0] == 1


def test_afterwards_it_stays_where_the_slope_is_on_target():
    grown = [1.0] * 8 + [0.0, 0.0, 0.0]
    lengths, _ = walk([*grown, *[0.5 * TARGET] * 20])
    assert lengths[-1] == pytest.approx(lengths[-20])
    shorter, _ = walk([*grown, *[-0.5] * 20])
    longer, _ = walk([*grown, *[0.5] * 20])
    assert shorter[-1] < lengths[-1] / 3 < lengths[-1] * 3 < longer[-1]


def test_a_steep_slope_later_on_is_followed_at_once_and_what_it_overshoots_is_taken_back():
    grown = [1.0] * 8 + [0.0] * 3 + [0.5 * TARGET] * 500
    lengths, _ = walk([*grown, *[0.9] * 12, *[-0.5] * 12])
    peak = max(lengths[500:])
    assert peak > 30 * lengths[500]
    assert lengths[-1] < peak / 5


def test_the_schedule_multiplies_the_step_size_after_its_peak():
    slopes = [1.0] * 7 + [0.0] * 3 + [0.5 * TARGET] * 10
    warm_up = [0.1 * (i + 1) for i in range(10)]
    constant, _ = walk(slopes, lr=[*warm_up, *[1.0] * 11])
    falling, _ = walk(slopes, lr=[*warm_up, 1.0, *[0.5] * 10])
    assert falling[:11] == constant[:11]  # growth is a warm-up by itself
    assert falling[-1] == pytest.approx(constant[-1] / 2)


def test_it_does_not_grow_beyond_the_learning_rate_unseen():
    lengths, _ = walk([*[1.0] * 40, *[0.0] * 4], lr=0.01)
    assert max(lengths) == pytest.approx(0.01)
    assert lengths[-1] < 0.01


def test_without_a_gradient_at_first_it_starts_later():
    pace = Pace(*torch.tensor(INITIAL_PACE))
    zero, one, options = torch.zeros(2), torch.ones(2), {"momentum": 0.95, "first_step": 1e-3}
    for regularized in (False, True):
        nothing = Reading(zero, zero, zero, one[0], one[0])
        later, lengths = advance(pace, nothing, **options, regularized=regularized)
        assert lengths.tolist() == [0.0, 0.0]
        something = Reading(zero, one, one, one[0], one[0])
        _, lengths = advance(later, something, **options, regularized=regularized)
        assert lengths.tolist() == pytest.approx([1e-3, 1e-3])


# -------------------------------------------------------------------- in the optimizer


class Net(nn.Module):
    """Matrices and vectors, and a loss with a minimum."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(6, 16, dtype=dtype)
        self.down = nn.Linear(16, 3, dtype=dtype)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def batches(count, dtype=torch.float32):
    """Inputs and targets that a small network can learn, with some noise."""
    generator = torch.Generator().manual_seed(1)
    truth = torch.randn(6, 3, generator=generator, dtype=dtype)
    for _ in range(count):
        x = torch.randn(32, 6, generator=generator, dtype=dtype)
        yield x, torch.sin(x @ truth) + 0.1 * torch.randn(32, 3, generator=generator, dtype=dtype)


def train(method, steps=60, *, lr=1.0, times=1.0, dtype=torch.float32, schedule=None, **options):
    """Trains a small network by the slope; returns it with its optimizer and its losses."""
    net = Net(dtype)
    optimizer = create_optimizer(net, method, lr=lr, **{"step_size": "slope", **options})
    losses = []
    for step, (x, y) in enumerate(batches(steps, dtype)):
        for group in optimizer.param_groups:
            group["lr"] = lr * (schedule(step / steps) if schedule else 1.0)
        loss = (net(x) - y).square().mean()
        (times * loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return net, optimizer, losses


def same_bits(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


@pytest.mark.parametrize("method", PLAIN)
def test_the_learning_rate_is_an_upper_bound_and_nothing_else(method):
    """With weight decay, warm-up from 0 and a schedule that falls."""

    def schedule(t):
        return min(1.0, 5 * t, 2 * (1 - t))

    nets = [train(method, lr=lr, weight_decay=0.1, schedule=schedule)[0] for lr in (1.0, 4.0)]
    assert same_bits(*nets)


@pytest.mark.parametrize("offset", [-1e3, 1e3])
@pytest.mark.parametrize("method", PLAIN)
def test_a_constant_in_the_loss_changes_nothing_with_momo_either(method, offset):
    """Below 0 its lower bound is not believed; far above, its model allows longer steps than the slope."""
    plain, _, _ = train(method)
    net = Net()
    optimizer = create_optimizer(net, f"{method}_momo", lr=1.0)
    for x, y in batches(60):
        loss = (net(x) - y).square().mean()
        loss.backward()
        optimizer.step(loss=loss + offset)
        optimizer.zero_grad()
    assert same_bits(plain, net)


@pytest.mark.parametrize("method", PLAIN)
def test_no_step_was_limited_by_a_learning_rate_of_1_and_all_are_by_a_tiny_one(method):
    _, optimizer, losses = train(method, 200)
    assert optimizer.diagnostics()["limited_steps"] == 0
    assert losses[-1] < 0.6 * losses[0]
    _, optimizer, _ = train(method, lr=1e-9)
    assert optimizer.diagnostics()["limited_steps"] == 60


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(DESCENTS),
    st.sampled_from(PRODUCT_NORMS),
    st.sampled_from(["linf", "ada_linf"]),
    st.floats(1e-4, 1e4),
    st.sampled_from(["exact", "stale", "frobenius"]),
)
def test_a_factor_on_all_gradients_changes_no_step(descent, product_norm, vector_norm, factor, nuclear_norm):
    """Clipping, a summed loss, a loss scaler. (The adaptive ℓ2 norm itself changes with the gradients.)"""
    method = {"descent": descent, "product_norm": product_norm, "vector_norm": vector_norm}
    # The ε of adaptive norms is a gradient's size, and would not be scaled.
    options = {"eps": 1e-30, "nuclear_norm": nuclear_norm, "dtype": torch.float64, "polar_method": "svd"}
    plain, scaled = (train("noneuclid", 25, times=times, **method, **options)[0] for times in (1.0, factor))
    for p, q in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", PLAIN)
def test_from_any_first_step_it_comes_to_what_the_best_of_four_learning_rates_comes_to(method):
    def end(**options):
        _, _, losses = train(method, 300, schedule=lambda t: 1 - t, **options)
        return sum(losses[-20:]) / 20

    ends = [end(first_step=first_step) for first_step in (1e-8, 1e-6, 1e-4)]
    control = min(end(lr=lr, step_size="rate") for lr in (1e-3, 3e-3, 1e-2, 3e-2))
    assert max(ends) < 1.5 * control, (ends, control)


@pytest.mark.parametrize("lr", [1.0, 4.0])
@pytest.mark.parametrize("method", PLAIN)
def test_it_goes_on_from_a_checkpoint_with_the_same_bits(method, lr):
    """Also at a higher learning rate than that of the checkpoint."""

    def steps(net, optimizer, data):
        for x, y in data:
            (net(x) - y).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    data = list(batches(30))
    net = Net()
    optimizer = create_optimizer(net, method, lr=1.0, step_size="slope", weight_decay=0.1)
    steps(net, optimizer, data[:14])
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    steps(net, optimizer, data[14:])
    other = Net()
    other.load_state_dict(saved[0])
    resumed = create_optimizer(other, method, lr=1.0, step_size="slope", weight_decay=0.1)
    resumed.load_state_dict(saved[1])
    for group in resumed.param_groups:
        group["lr"] = lr
    steps(other, resumed, data[14:])
    assert same_bits(net, other)


def test_the_last_step_takes_two_bytes_of_a_float32_parameter():
    net, optimizer, _ = train("muon", steps=2)
    for p in net.parameters():
        last = optimizer.state[p]["last_step"]
        assert (last.dtype, last.shape) == (torch.bfloat16, p.shape)


def test_parameters_that_join_freeze_and_come_back_are_stepped():
    net = Net()
    net.down.requires_grad_(False)
    optimizer = create_optimizer(net, "muon", lr=1.0, step_size="slope")
    data = list(batches(40))

    def step(x, y):
        (net(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        now = optimizer.diagnostics()
        assert math.isfinite(now["step_size"] + now["vector_step_size"])

    for x, y in data[:10]:
        step(x, y)
    before = net.down.weight.clone()
    net.down.requires_grad_(True)
    if not any(p is net.down.weight for group in optimizer.param_groups for p in group["params"]):
        optimizer.add_param_group(
            {"params": [("late", net.down.weight)], "norm": "spectral", "lr_scale": 10.0}
        )
    for x, y in data[10:20]:
        step(x, y)
    assert not torch.equal(before, net.down.weight)
    frozen = net.up.weight.requires_grad_(False).clone()
    for x, y in data[20:30]:
        step(x, y)
    assert torch.equal(frozen, net.up.weight)
    net.up.weight.requires_grad_(True)
    for x, y in data[30:]:
        step(x, y)
    assert not torch.equal(frozen, net.up.weight)


# -------------------------------------------------------------------- what goes wrong


def disturbed(method, name, **options):
    """The mean of the last losses under a disturbance."""
    net = Net()
    optimizer = create_optimizer(net, method, **options)
    losses = []
    for step, (x, y) in enumerate(batches(300)):
        factor, target = DISTURBANCES[name](step)
        loss = (net(x) - target * y).square().mean()
        (factor * loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20


DISTURBANCES = {
    "vanishing gradients": lambda step: (0.0 if 100 <= step < 200 else 1.0, 1.0),
    "a loss ten times as large": lambda step: (10.0 if step >= 100 else 1.0, 1.0),
    "a loss ten times as small": lambda step: (0.1 if step >= 100 else 1.0, 1.0),
    "a spike": lambda step: (1e4 if step == 100 else 1.0, 1.0),
    "two tasks that alternate": lambda step: (1.0, 1.0 if step // 50 % 2 else -1.0),
}
"""For each step, the factor of its loss and that of its targets."""


@pytest.mark.parametrize("name", DISTURBANCES)
@pytest.mark.parametrize("method", PLAIN)
def test_what_disturbs_the_gradients_is_survived_as_well_as_by_the_method_alone(method, name):
    """The control is the method at the best of four learning rates, under the same disturbance."""
    ours = disturbed(method, name, lr=1.0, step_size="slope")
    control = min(disturbed(method, name, lr=lr) for lr in (1e-3, 3e-3, 1e-2, 3e-2))
    assert ours < 1.5 * control, (ours, control)
