"""The Trainer on every engine, with two ranks (gloo on the CPU), against one process on the same batches."""

from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engines import ENGINES
from launching import torchrun
from network import METHODS, RANKS, SLOPE, STEPS, distance, learning_rate, relative, train_alone

pytestmark = pytest.mark.distributed

WORKER = Path(__file__).with_name("engine_worker.py")
MOMO = [method for method in METHODS if method.endswith("momo")]
RESUMED = [*MOMO, "stale", "slope"]
ENGINE_TYPES = {"ddp": "MULTI_CPU", "fsdp2": "FSDP", "zero": "DEEPSPEED"}


@pytest.fixture(scope="module", params=ENGINES)
def engine(request):
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory, engine):
    return tmp_path_factory.mktemp(engine)


@pytest.fixture(scope="module")
def ran(engine, folder):
    """What the two ranks saw with all methods, before one more run killed them."""
    torchrun(WORKER, "run", engine, folder, killed=True, timeout=240)
    return [torch.load(folder / f"run{rank}.pt") for rank in range(RANKS)]


@pytest.fixture(scope="module")
def went_on(engine, folder, ran):
    """What one rank and then two ranks saw, which resumed from checkpoints."""
    torchrun(WORKER, "alone", engine, folder, ranks=1)
    torchrun(WORKER, "resume", engine, folder)
    resumed = [torch.load(folder / f"resume{rank}.pt") for rank in range(RANKS)]
    return SimpleNamespace(alone=torch.load(folder / "alone0.pt"), resumed=resumed)


alone = cache(train_alone)


def same(ours, theirs):
    return all(torch.equal(ours["parameters"][name], x) for name, x in theirs["parameters"].items())


def test_two_ranks_trained_on_that_engine(ran, engine):
    expected = ENGINE_TYPES["zero" if engine.startswith("zero") else engine]
    for seen in ran:
        assert seen["ranks"] == RANKS
        assert {seen[method]["engine"] for method in METHODS} == {f"DistributedType.{expected}"}


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_train_like_one_process(ran, method):
    for seen in ran:
        assert distance(seen[method]["parameters"], alone(method)["parameters"]) < 1e-4
        assert relative(seen[method]["step_size"], alone(method)["step_sizes"]) < 2e-5


def test_the_slope_chooses_the_steps_of_one_process(ran):
    """The last step is in bfloat16, and may round another way."""
    expected = train_alone("muonmax_momo", **SLOPE)
    for seen in ran:
        assert distance(seen["slope"]["parameters"], expected["parameters"]) < 1e-3
        assert relative(seen["slope"]["step_size"], expected["step_sizes"]) < 1e-3
    assert same(ran[0]["slope"], ran[1]["slope"])


@pytest.mark.parametrize("method", METHODS)
def test_ranks_agree_to_the_bit(ran, method):
    first, second = (seen[method] for seen in ran)
    assert same(first, second)
    for key in ("step_size", "loss", "dual_norm"):
        assert first[key] == second[key]
        assert len(first[key]) == STEPS


@pytest.mark.parametrize("method", MOMO)
def test_steps_are_truncated_after_the_checkpoint_and_some_are_not(ran, method):
    """Otherwise the tests here would say little about the loss, and nothing about the saved running loss."""
    truncated = [tau < 0.99 * learning_rate(method) for tau in ran[0][method]["step_size"]]
    assert any(truncated[STEPS // 2 :])
    assert not all(truncated)


def test_a_loss_a_thousand_times_as_large_is_clipped_to_the_same_steps(ran):
    """Momo knows by how much gradients are clipped, wherever the engine does it."""
    for seen in ran:
        small, large = seen["Scaled"], seen["Huge"]
        assert relative(large["loss"], [1000 * loss for loss in small["loss"]]) < 1e-3
        assert large["truncated"] == small["truncated"]
        assert any(small["truncated"])
        assert relative(large["step_size"], small["step_size"]) < 1e-4
        assert distance(large["parameters"], small["parameters"]) < 1e-4


def test_ranks_share_the_polar_factors(ran):
    """No rank computes much more than half."""
    for method in METHODS:
        flops = [seen[method]["polar_flops"] for seen in ran]
        assert max(flops) <= 0.6 * sum(flops)
        assert sum(flops) == sum(seen["muon"]["polar_flops"] for seen in ran)


def test_bfloat16_trains_alike_with_float32_state(ran):
    first, second = (seen["bf16"] for seen in ran)
    assert same(first, second)
    assert first["state_dtypes"] == {"torch.float32"}
    assert relative(first["loss"], ran[0]["muonmax_momo"]["loss"]) < 0.02
    assert not same(first, ran[0]["muonmax_momo"])


def test_offloaded_state_trains_like_one_process(engine, ran):
    if not engine.startswith("zero"):
        pytest.skip("only DeepSpeed offloads the state")
    for seen in ran:
        assert distance(seen["offload"]["parameters"], alone("muonmax_momo")["parameters"]) < 1e-4
        assert relative(seen["offload"]["step_size"], alone("muonmax_momo")["step_sizes"]) < 2e-5


def test_ranks_send_less_than_all_matrices_and_back(engine, ran):
    """Each of two ranks sends half of the momenta and half of the directions, or less."""
    matrices = sum(x.numel() for name, x in ran[0]["muon"]["parameters"].items() if is_matrix(name, x))
    for seen in ran:
        sent = seen["muonmax_momo"]["bytes_sent"]
        assert set(sent) == {"all_reduce", "all_gather" if engine == "ddp" else "all_to_all"}
        assert 0 < sum(sent.values()) < 4 * matrices * STEPS * 0.55


def is_matrix(name, x):
    return x.dim() > 1 and "embedding" not in name and "frozen" not in name


@pytest.mark.parametrize("run", RESUMED)
def test_a_resumed_run_goes_on_to_the_bit(ran, went_on, run):
    for resumed, whole in zip(went_on.resumed, ran, strict=True):
        assert resumed[run]["step_size"] == whole[run]["step_size"][STEPS // 2 :]
        assert same(resumed[run], whole[run])


def test_a_run_that_was_killed_goes_on_to_the_bit(ran, went_on):
    for resumed, whole in zip(went_on.resumed, ran, strict=True):
        assert same(resumed["killed"], whole["muonmax_momo"])


def test_one_rank_goes_on_where_two_stopped(engine, ran, went_on):
    if engine.startswith("zero"):
        assert "was made by DeepSpeed ZeRO with 2 processes, and there are 1 now" in went_on.alone["error"]
        return
    two, one = ran[0]["stale"], went_on.alone["from_two"]
    assert distance(one["parameters"], two["parameters"]) < 1e-4
    assert relative(one["step_size"], two["step_size"][STEPS // 2 :]) < 2e-5


def test_two_ranks_go_on_where_one_stopped(engine, went_on):
    if engine.startswith("zero"):
        pytest.skip("DeepSpeed refuses another world size, which the test before shows")
    one, two = went_on.alone["one"], went_on.resumed[0]["from_one"]
    assert distance(two["parameters"], one["parameters"]) < 1e-4
    assert relative(two["step_size"], one["step_size"][STEPS // 2 :]) < 2e-5
