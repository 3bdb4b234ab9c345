"""Every engine against one process, from the same gradients: parameters, τ, D and nuclear norms to 1e-6.

There is no Trainer here, and the gradients do not depend on the parameters, so nothing but the optimizer can
make a difference, and what it makes is not multiplied from step to step.
"""

import math
import sys
from pathlib import Path

import pytest
import torch
from exact_cases import BROKEN, CASES, LOWER_BOUND, SLOPED, STEPS, Case, make_model
from exact_engines import Replicated
from exact_run import run
from launching import torchrun

from hf_noneuclid import METHODS
from hf_noneuclid.norms import ADAPTIVE_NORMS

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-6
SLOPE_TOLERANCE = 1e-5  # the last step is in bfloat16, which may round another way
RANKS = {"replicated": 2, "fsdp2": 2, "hsdp": 4, "zero1": 2, "zero2": 2, "zero3": 2}
REPLICAS = {**dict.fromkeys(RANKS, 1), "replicated": 2, "hsdp": 2}


def launch(engine, ranks, folder):
    """Runs the worker, and returns what each rank saw."""
    torchrun(Path(__file__).with_name("exact_worker.py"), engine, folder, ranks=ranks)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(ranks)]


@pytest.fixture(scope="module")
def alone():
    """What one process sees with the averaged gradients."""
    return {case: run(Replicated, case) for case in CASES}


@pytest.fixture(scope="module", params=RANKS)
def engine(request):
    return request.param


@pytest.fixture(scope="module")
def ranks(engine, tmp_path_factory):
    """What each rank of the engine saw."""
    return launch(engine, RANKS[engine], tmp_path_factory.mktemp(engine))


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    return launch("refusals", 2, tmp_path_factory.mktemp("refusals"))


def bad_steps(case):
    return (case.bad_gradient, case.bad_loss)


def relative(x, y):
    difference = abs(x - y) / max(abs(x), abs(y), sys.float_info.min)
    return difference if math.isfinite(difference) else math.inf


def distance(ours, theirs, case):
    """The largest relative difference of a parameter at the end, or of a number of a good step."""
    assert ours["parameters"].keys() == theirs["parameters"].keys()
    differences = [
        ((ours["parameters"][name] - x).norm() / x.norm()).item() for name, x in theirs["parameters"].items()
    ]
    for step in set(range(STEPS)) - set(bad_steps(case)):
        one, other = ours["diagnostics"][step], theirs["diagnostics"][step]
        assert one["nuclear_norms"].keys() == other["nuclear_norms"].keys()
        assert one["loss_lower_bound"] == other["loss_lower_bound"]
        pairs = [(one[key], other[key]) for key in ("step_size", "vector_step_size", "dual_norm")]
        pairs += [(one["nuclear_norms"][name], x) for name, x in other["nuclear_norms"].items()]
        differences += [relative(x, y) for x, y in pairs]
    return max(x if math.isfinite(x) else math.inf for x in differences)


def tolerance(case):
    return SLOPE_TOLERANCE if "slope" in case.bounded_by else TOLERANCE


def test_as_many_ranks_run_as_were_asked_for(ranks, engine):
    assert [seen["ranks"] for seen in ranks] == [RANKS[engine]] * RANKS[engine]


def test_momo_truncates_some_of_the_steps_and_not_others(alone):
    """Otherwise the parameters would not show the loss, or show nothing else."""
    truncated = {
        case: [
            taken["truncated"]
            for step, taken in enumerate(seen["diagnostics"])
            if step not in bad_steps(case)
        ]
        for case, seen in alone.items()
    }
    momo = [case for case in CASES if "momo" in case.bounded_by]
    full = [case for case in momo if case.model == "full" and case.scale == 1 and not case.step_size]
    assert sum(any(truncated[case]) and not all(truncated[case]) for case in full) > len(full) / 2
    assert not any(any(truncated[case]) for case in CASES if case not in momo)


def test_parameters_step_sizes_and_norms_are_those_of_one_process(ranks, alone):
    far = {case: distance(seen[case], alone[case], case) for seen in ranks for case in CASES}
    assert {case: x for case, x in far.items() if x > tolerance(case)} == {}


def test_every_rank_ends_with_the_same_bits(ranks):
    first = ranks[0]
    for other in ranks[1:]:
        for case in CASES:
            for name, x in first[case]["parameters"].items():
                assert torch.equal(x, other[case]["parameters"][name]), (case, name)
            for one, two in zip(first[case]["diagnostics"], other[case]["diagnostics"], strict=True):
                for key in ("step_size", "vector_step_size", "dual_norm", "nuclear_norms", "bad_steps"):
                    assert one.get(key) == two.get(key), (case, key)


def test_a_number_is_dropped_when_the_mean_of_the_losses_is_below_it_and_by_no_bad_step(ranks, alone):
    (case,) = [case for case in CASES if case.lower_bound != LOWER_BOUND]
    for seen in (alone, *ranks):
        bounds = [step.get("loss_lower_bound") for step in seen[case]["diagnostics"]]
        assert bounds[1:] == [10.0, *[None] * (STEPS - 2)]


def test_below_the_learning_rate_no_bit_depends_on_it(ranks):
    """With weight decay, too."""
    for seen in ranks:
        for method in SLOPED:
            one, other = (seen[Case(method, step_size="slope", rate=rate)] for rate in (1.0, 4.0))
            assert one["diagnostics"][-1]["limited_steps"] == 0
            for name, x in one["parameters"].items():
                assert torch.equal(x, other["parameters"][name]), (method, name)


def test_what_is_nan_on_one_rank_changes_nothing_on_any(ranks):
    """Bad steps change neither parameters nor state, and all other steps do."""
    for seen in ranks:
        for case in CASES:
            assert seen[case]["unchanged"] == [step in bad_steps(case) for step in range(STEPS)], case


def test_bad_steps_are_counted_on_every_rank(ranks, engine):
    """Where DeepSpeed sees a NaN in the gradient, it does not call the optimizer."""
    counted = 1 if engine.startswith("zero") else 2
    assert {seen[case]["diagnostics"][-1]["bad_steps"] for seen in ranks for case in CASES} == {counted}


def test_a_matrix_costs_one_float32_momentum_and_nothing_else_as_large(ranks):
    """A rank keeps a momentum of its shard, and no copy of the matrices that it owns."""
    for seen in ranks:
        for case in CASES:
            sizes = seen[case]["bytes"]
            assert sizes["momenta"] == sizes["float32"], case
            # The slope keeps the last step in bfloat16.
            has_slope = "slope" in case.bounded_by
            assert sizes["last_steps"] == (sizes["float32"] / 2 if has_slope else 0), case
            scalars = sizes["all"] - sizes["momenta"] - sizes["second_moments"] - sizes["last_steps"]
            # A stale norm for each matrix, the step count, f̄ and C, what the lower bound and the slope know.
            matrices = len(seen[case]["diagnostics"][-1]["nuclear_norms"])
            assert 0 < scalars <= 4 * (matrices + 5 + 16 * has_slope), case


def test_only_vectors_of_adaptive_norms_keep_second_moments_and_each_shard_its_own(ranks, engine):
    for case in CASES:
        vectors = [p for p in make_model(case).parameters() if p.requires_grad and p.ndim == 1]
        is_adaptive = METHODS[case.method].vector_norm in ADAPTIVE_NORMS
        expected = 4 * sum(p.numel() for p in vectors) if is_adaptive else 0
        assert sum(seen[case]["bytes"]["second_moments"] for seen in ranks) == REPLICAS[engine] * expected


def test_every_polar_factor_is_computed_once_and_no_rank_computes_most_of_them(ranks, alone):
    """No rank computes more than 0.6 of the operations of one process. Half would be even."""
    for case in CASES:
        whole = alone[case]["flops"] / alone[case]["diagnostics"][-1]["steps"]
        shares = [seen[case]["flops"] / seen[case]["diagnostics"][-1]["steps"] for seen in ranks]
        assert sum(shares) == pytest.approx(whole), case
        if case.model == "full":
            assert max(shares) <= 0.6 * whole, case


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_step_is_seen(ranks, alone, engine, fault):
    """Otherwise the agreement above would say nothing.

    The faults: the loss is that of one rank, not the mean; D is not summed over the ranks; and the owner of
    a matrix that lies on a border between ranks sees only the beginning of it.
    """
    if (engine, fault) == ("replicated", "fragment"):
        pytest.skip("no matrix lies on a border where every rank holds all")
    case = BROKEN[fault]
    assert max(distance(seen[fault], alone[case], case) for seen in ranks) > 1e3 * TOLERANCE


MESSAGES = {
    "FrozenOnOne": "step different parameters: .* with the same parameters frozen",
    "OtherModel": "step different parameters: .* must train the same model",
    "WithoutDdp": "the parameters differ between ranks .* DistributedDataParallel",
    "ByColumns": r"narrow.weight is sharded as .*Shard\(dim=1\).* tensor parallelism is not",
    "TensorParallel": r"narrow.weight is sharded as .*\('tp',\).* tensor parallelism is not",
    "NormLeftOut": r"norm\.\w+ is not sharded, though .* Leave no parameter out of fully_shard",
    **dict.fromkeys(
        ("Groups1", "Groups2", "Groups3"), "DeepSpeed steps the 3 groups .* Put them into one group"
    ),
    "SubGroups": 'in 3 sub-groups.* set "sub_group_size" to [0-9]+ or more',
}


@pytest.mark.parametrize("name", MESSAGES)
def test_what_cannot_be_right_is_refused_on_every_rank(refusals, name):
    for seen in refusals:
        with pytest.raises(RuntimeError, match=MESSAGES[name]):
            raise RuntimeError(seen[name])


def test_the_sub_group_size_that_the_message_names_is_enough(refusals, alone):
    case = BROKEN["loss"]
    for seen in refusals:
        assert distance(seen["as_told"], alone[case], case) <= TOLERANCE
