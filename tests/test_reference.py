"""The optimizer takes the steps of the reference, and the reference reproduces stored trajectories."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_noneuclid import NonEuclideanDescent
from hf_noneuclid.momo import DESCENTS
from hf_noneuclid.norms import VECTOR_NORMS
from hf_noneuclid.options import DECAYS, NUCLEAR_NORMS, STEP_SIZES
from hf_noneuclid.product_norms import PRODUCT_NORMS
from hf_noneuclid.reference import Parameter, ReferenceDescent

STEPS = 20

# -------------------------------------------------------------------- the optimizer and the reference


class Group(NamedTuple):
    """A parameter group with one parameter."""

    shape: tuple[int, ...]
    norm: str
    flatten: bool
    weight_decay: float
    lr_scale: float
    spectral_scale: float

    @property
    def units(self):
        """A stack of matrices is several parameters of the reference."""
        return len(self.split(torch.empty(self.shape)))

    def scale(self, descent):
        scale = self.lr_scale if descent == "constrained" else self.lr_scale**0.5
        return scale * (self.spectral_scale if self.norm == "spectral" else 1.0)

    def split(self, x):
        """A tensor of the parameter as tensors of the parameters of the reference."""
        if self.norm != "spectral":
            return [x]
        is_stack = len(self.shape) == 3 and not self.flatten
        return list(x) if is_stack else [x.reshape(self.shape[0], -1)]


SIDES = st.integers(1, 5)
SCALES = st.sampled_from([0.3, 1.0, 4.0])
WEIGHT_DECAYS = st.sampled_from([0.0, 0.1, 2.0])
MATRICES = st.one_of(
    st.tuples(SIDES, SIDES), st.tuples(SIDES, SIDES, SIDES), st.tuples(SIDES, SIDES, st.just(2), st.just(2))
)
MATRIX_GROUPS = st.builds(Group, MATRICES, st.just("spectral"), st.booleans(), WEIGHT_DECAYS, SCALES, SCALES)
VECTOR_GROUPS = st.builds(
    Group,
    st.one_of(st.tuples(SIDES), st.tuples(SIDES, SIDES)),
    st.sampled_from(VECTOR_NORMS),
    st.just(False),
    WEIGHT_DECAYS,
    SCALES,
    st.just(1.0),
)
OPTIONS = st.fixed_dictionaries(
    {
        "descent": st.sampled_from(DESCENTS),
        "product_norm": st.sampled_from(PRODUCT_NORMS),
        "step_size": st.sampled_from(STEP_SIZES),
        "decay_at": st.sampled_from(DECAYS),
        "momentum": st.sampled_from([0.0, 0.5, 0.95]),
        "beta2": st.sampled_from([0.0, 0.5, 0.95]),
        "eps": st.sampled_from([1e-8, 1e-2]),
        "nuclear_norm": st.sampled_from(NUCLEAR_NORMS),
    }
)


def reference_of(groups, params, options, lower_bound):
    parameters = [
        Parameter(p.clone(), group.norm, s=group.scale(options["descent"]), weight_decay=group.weight_decay)
        for group, param in zip(groups, params, strict=True)
        for p in group.split(param.detach())
    ]
    names = {"momentum": "beta"}
    return ReferenceDescent(
        parameters, F_star=lower_bound, **{names.get(key, key): value for key, value in options.items()}
    )


def height_terms(reference):
    """What the height of the model is the difference of, in absolute values."""
    inner = sum((x.p * x.m).sum().abs() for x in reference.parameters)
    return abs(reference.f_bar.item()) + abs(reference.F_star) + inner.item()


@pytest.mark.filterwarnings("ignore:loss_lower_bound is")  # some problems have a bound above the loss
@settings(max_examples=100)
@given(
    groups=st.tuples(st.lists(MATRIX_GROUPS, max_size=3), st.lists(VECTOR_GROUPS, max_size=3))
    .map(lambda pair: pair[0] + pair[1])
    .filter(bool),
    options=OPTIONS,
    lower_bound=st.sampled_from([-1.0, 0.0, 2.5]),
    lr=st.sampled_from([1e-3, 3e-2, 1.0]),
    clipping=st.sampled_from([1.0, 0.3]),
    foreach=st.booleans(),
    workspace=st.sampled_from([1e-4, 256]),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_optimizer_takes_the_steps_of_the_reference(
    groups, options, lower_bound, lr, clipping, foreach, workspace, seed
):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    params = [torch.nn.Parameter(randn(*group.shape)) for group in groups]
    reference = reference_of(groups, params, options, lower_bound)
    optimizer = NonEuclideanDescent(
        [
            {"params": [param], **{key: value for key, value in group._asdict().items() if key != "shape"}}
            for group, param in zip(groups, params, strict=True)
        ],
        lr=lr,
        polar_method="svd",
        foreach=foreach,
        workspace=workspace,
        **options,
        loss_lower_bound=lower_bound,
    )
    unit_power = 2 if options["descent"] == "regularized" else 1
    for step in range(STEPS):
        rate = lr * (1 - step / STEPS)
        loss = 3 + randn(1).item()
        gradients: list[torch.Tensor | None] = []
        for group, param in zip(groups, params, strict=True):
            is_missing = torch.rand((), generator=generator) < 0.2
            param.grad = None if is_missing else randn(*group.shape)
            parts = [None] * group.units if is_missing else group.split(param.grad)
            gradients += parts
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.observe_clipping(clipping)
        optimizer.step(loss=loss)
        step_sizes = reference.step(gradients, rate, loss, clipping)
        now = optimizer.diagnostics()
        # Where h is a small difference of large numbers, its digits are those of the large ones.
        digits = 1e-13 * height_terms(reference) / max(now["dual_norm"], 1e-30) ** unit_power
        found = now["step_size"], now["vector_step_size"]
        assert found == pytest.approx(step_sizes, rel=1e-10, abs=max(digits, 1e-300))
    expected = iter(reference.parameters)
    for group, param in zip(groups, params, strict=True):
        for p in group.split(param.detach()):
            torch.testing.assert_close(p, next(expected).p, rtol=1e-10, atol=1e-10)


# -------------------------------------------------------------------- the reference and stored trajectories

STORED = json.loads((Path(__file__).parent / "data" / "trajectories.json").read_text())
PROBLEM = STORED["problem"]


def tensors(values):
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def case_name(case):
    words = [case["descent"], case["product_norm"], case["vector_norm"], case["nuclear_norm"]]
    return "-".join([*words, f"s={case['spectral_scale']:g}", "momo" if case["momo"] else "plain"])


@pytest.mark.parametrize("case", STORED["cases"], ids=case_name)
def test_the_reference_reproduces_a_trajectory(case):
    targets = tensors(PROBLEM["target"])
    params = {}
    for name, p in tensors(PROBLEM["init"]).items():
        is_matrix = name in PROBLEM["matrices"]
        norm, s = ("spectral", case["spectral_scale"]) if is_matrix else (case["vector_norm"], 1.0)
        params[name] = Parameter(p, norm, s=s, weight_decay=case["weight_decay"])
    reference = ReferenceDescent(
        list(params.values()),
        F_star=case["loss_lower_bound"] if case["momo"] else 0.0,
        beta=case["momentum"],
        step_size="momo" if case["momo"] else "rate",
        decay_at="rate",
        **{key: case[key] for key in ("descent", "product_norm", "beta2", "eps", "nuclear_norm")},
    )
    step_sizes = []
    for factor, noise in zip(PROBLEM["lr_schedule"], PROBLEM["noise"], strict=True):
        noise, loss, gradients = tensors(noise), PROBLEM["offset"], []
        for name, x in params.items():
            difference = x.p - targets[name]
            loss += 0.5 * PROBLEM["curvature"] * difference.square().sum().item()
            gradients.append(PROBLEM["curvature"] * difference + noise[name])
        step_sizes.append(reference.step(gradients, case["lr"] * factor, loss)[0])
    assert step_sizes == pytest.approx(case["step_sizes"], rel=1e-12)
    for name, final in tensors(case["final"]).items():
        torch.testing.assert_close(params[name].p, final, rtol=1e-12, atol=1e-12)
