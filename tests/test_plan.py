"""``noneuclid plan``: numbers worked out by hand, what the ranks' exchanges send, and what it refuses."""

import dataclasses
import json
from math import prod
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from hf_noneuclid.distributed import ProcessGrid
from hf_noneuclid.distributed.exchange import Exchange
from hf_noneuclid.elementwise import MIB
from hf_noneuclid.experiments import plan
from hf_noneuclid.experiments.costs.engines import ENGINES, held_intervals
from hf_noneuclid.experiments.costs.models import build, load_config
from hf_noneuclid.experiments.costs.step import Costs, plan_row, shapes_of
from hf_noneuclid.plan import bucket_matrices

GRIDS = {
    "ddp": (4, 1),
    "fsdp2": (1, 4),
    "hsdp": (2, 2),
    **dict.fromkeys(("zero1", "zero2", "zero3"), (1, 4)),
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def two_matrices(**options):
    """Two matrices of 4 x 8 and a vector of 6: P = 70, M = 64, V = 6."""
    with torch.device("meta"):
        model = nn.ModuleDict(
            {
                "a": nn.Linear(8, 4, bias=False),
                "b": nn.Linear(8, 4, bias=False),
                "c": nn.LayerNorm(6, bias=False),
            }
        )
    return shapes_of(model, "muonmax_momo", **options)


def costs_of(engine, grid, **options):
    return Costs(two_matrices(**options), engine, grid)


def printed(capsys, *arguments):
    plan.main(["--json", *arguments])
    return json.loads(capsys.readouterr().out)


# ------------------------------------------------------------------------------ worked out by hand


def test_ddp_on_two_gpus():
    """Each owns a matrix of 32 elements, and hands its direction (2 bytes) to the other."""
    costs = costs_of("ddp", (2, 1))
    assert costs.owned.tolist() == [[32], [32]]
    assert costs.flops.tolist() == [[16 * 4 * 4 * 8 + 16 * 4**3]] * 2  # by the Gram matrix: 4 x 8 is wide
    sent = {name: by_rank.tolist() for name, by_rank in costs.sent_bytes().items()}
    assert sent == {
        "momentum": [[0], [0]],
        "directions": [[0], [0]],
        "replicas": [[64], [64]],
        "scalars": [[2 * 4 * (8 + 4) // 2]] * 2,  # 8 scalars; 3 dual norms and ⟨p, m⟩
    }
    # The step, the running loss, its weight, what the bound remembers, and the pace; the last step.
    assert costs.state_bytes().tolist() == [[4 * (70 + 6 + 4 + 20) + 2 * 70]] * 2
    assert costs.kept_bytes().tolist() == [[64], [64]]


def test_fsdp2_on_two_gpus():
    """Each holds half the rows of both: 16 elements of momentum go out (4 bytes), 16 of a direction back."""
    costs = costs_of("fsdp2", (1, 2), nuclear_norm="stale")
    sent = {name: by_rank.tolist() for name, by_rank in costs.sent_bytes().items()}
    assert sent == {
        "momentum": [[64, 64]],
        "directions": [[32, 32]],
        "replicas": [[0, 0]],
        "scalars": [[2 * 4 * (8 + 4 + 2) // 2] * 2],
    }
    assert costs.state_bytes().tolist() == [[4 * (35 + 3 + 4 + 20 + 2) + 2 * 35] * 2]
    assert costs.kept_bytes().tolist() == [[0, 0]]


def test_zero1_on_two_gpus():
    """70 elements in parts of 36 (an even number): the second matrix has 4 elements on the first GPU."""
    costs = costs_of("zero1", (1, 2))
    assert costs.held.tolist() == [[36, 34]]
    assert costs.flat.tolist() == [[36, 36]]
    assert costs.second_moment.tolist() == [[0, 6]]
    assert costs.owned.tolist() == [[32, 32]]
    assert costs.sent_bytes()["momentum"].tolist() == [[4 * 4, 0]]
    assert costs.sent_bytes()["directions"].tolist() == [[0, 2 * 4]]
    assert costs.state_bytes().tolist() == [[x + 4 * 24 + 2 * 36 for x in (4 * (36 + 0), 4 * (36 + 6))]]


def test_zero3_on_four_gpus_pads_every_parameter():
    costs = costs_of("zero3", (1, 4))
    assert costs.held.tolist() == [[18, 18, 18, 16]]
    assert costs.flat.tolist() == [[18] * 4]


@pytest.mark.parametrize(
    ("step_size", "scalars", "last_step"),
    [("rate", 1, 0), ("momo", 3, 0), ("slope", 1 + 20, 2 * 70), ("momo+slope", 4 + 20, 2 * 70)],
)
def test_what_each_step_size_remembers(step_size, scalars, last_step):
    """A number as the bound is remembered only beside the slope."""
    shapes = two_matrices(step_size=step_size)
    assert Costs(shapes, "ddp", (1, 1)).state_bytes().item() == 4 * (70 + 6 + scalars) + last_step


def test_two_matrices_leave_two_of_four_gpus_without_any():
    row = plan_row(costs_of("fsdp2", (1, 4)), "bf16")
    assert row["idle_ranks"] == 2
    assert row["polar_flops"]["imbalance"] == 2


@pytest.mark.parametrize(
    ("engine", "dtype", "parameters", "gradients", "master", "sent"),
    [
        ("ddp", "bf16", 4 * 70, 8 * 70, 0, 2 * 4 * 70 / 2),
        ("ddp", "pure_bf16", 2 * 70, 4 * 70, 0, 2 * 2 * 70 / 2),
        ("fsdp2", "bf16", 4 * 35, 4 * 35, 0, (2 * 2 + 2) * 70 / 2),
        ("fsdp2", "fp32", 4 * 35, 4 * 35, 0, (2 * 4 + 4) * 70 / 2),
        ("zero1", "bf16", 2 * 70, 2 * 70, 4 * 36, (2 + 2) * 70 / 2),
        ("zero2", "bf16", 2 * 70, 2 * 36, 4 * 36, (2 + 2) * 70 / 2),
        ("zero3", "bf16", 2 * 35, 2 * 35, 4 * 35, (2 * 2 + 2) * 70 / 2),
    ],
)
def test_what_the_engines_keep_and_send(engine, dtype, parameters, gradients, master, sent):
    row = plan_row(costs_of(engine, (2, 1) if engine == "ddp" else (1, 2)), dtype)
    held = row["memory_bytes"]
    assert [held[key] for key in ("parameters", "gradients", "master")] == [parameters, gradients, master]
    assert row["engine_sent_bytes"] == sent


# ------------------------------------------------------------------------- the same as the optimizer's


@pytest.fixture
def _no_collectives(monkeypatch):
    """The ranks count what they would send, and send nothing."""
    for name in ("all_to_all_single", "all_gather", "broadcast"):
        monkeypatch.setattr(dist, name, lambda *_, **__: SimpleNamespace(wait=lambda: None))


@pytest.mark.usefixtures("_no_collectives")
@pytest.mark.parametrize("engine", ENGINES)
def test_it_counts_what_the_exchanges_of_all_ranks_send(engine):
    """With buckets so small that there are several."""
    shape = GRIDS[engine]
    shapes = shapes_of(build(load_config("tiny"), torch.device("meta")), "muonmax_momo")
    shapes = dataclasses.replace(shapes, options=dataclasses.replace(shapes.options, workspace=10_000 / MIB))
    costs = Costs(shapes, engine, shape, "cpu")
    held = held_intervals(shapes.parameters, engine, shape[1])
    buckets = bucket_matrices(shapes.matrices, held, *shape, polar_steps=5, workspace=10_000)
    assert len(buckets) > 1
    for place in np.ndindex(shape):
        grid, owned = ProcessGrid(torch.device("cpu"), *shape, *place), 0
        for parameters, blocks in buckets:
            by_shard = [[held[x][shard] for x in parameters] for shard in range(shape[1])]
            exchange = Exchange(blocks, by_shard, grid, torch.float32)
            exchange.gather([torch.zeros(last - first) for first, last in by_shard[place[1]]])
            exchange.scatter([torch.zeros(block.shape) for block in exchange.owned])
            owned += sum(prod(block.shape) for block in exchange.owned)
        assert costs.owned[place] == owned
        sent = {name: int(by_rank[place]) for name, by_rank in costs.sent_bytes().items()}
        assert grid.sent["all_to_all"] == sent["momentum"] + sent["directions"]
        assert grid.sent["all_gather"] + grid.sent["broadcast"] == sent["replicas"]
        assert grid.sent["broadcast"] == costs.broadcast[place]
        assert sum(grid.sent.values()) > 0
        assert sent["scalars"] > 0


@pytest.mark.parametrize("engine", ENGINES)
def test_every_element_is_held_by_each_replica_once_and_owned_once(engine):
    costs = costs_of(engine, GRIDS[engine])
    assert (costs.held.sum(axis=1) == 70).all()
    assert costs.owned.sum() == 64
    assert (costs.flat >= costs.held).all()


# ------------------------------------------------------------------------------------ the command


def test_llama_7b_on_1024_gpus(capsys):
    said = printed(capsys, "--model", "llama-7b", "--gpus", "8", "1024")
    assert said["parameters"] == 6_738_415_616
    assert said["matrix_elements"] == 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert len(said["rows"]) == 2 * 6
    square, wide = 30 * 4096**3, 16 * 4096**2 * 11008 + 16 * 4096**3
    total = 32 * (4 * square + 3 * wide)
    for row in said["rows"]:
        flops, gpus = row["polar_flops"], row["gpus"]
        assert flops["mean"] * gpus == pytest.approx(total)
        assert 1 <= flops["imbalance"] == flops["max"] / flops["mean"]
        assert row["idle_ranks"] == max(0, gpus - 224)
        assert sum(row["memory_bytes"].values()) > 0


def test_the_text_states_the_model_and_every_engine(capsys):
    plan.main(["--model", "gpt2", "--engine", "fsdp2", "zero1", "--gpus", "8", "64"])
    text = capsys.readouterr().out
    assert "124,439,808 parameters, 84,934,656 of them in 48 matrices; 148 matrices and vectors" in text
    assert "39,505,152 parameters with a second moment" in text
    assert text.count("| fsdp2 | 64 |") == 3  # memory, communication, operations
    assert "ddp" not in text


def test_a_configuration_file_is_a_model(tmp_path, capsys):
    load_config("tiny").save_pretrained(tmp_path)
    layer = 4 * 26 + 27 * 78 + 27 * 26 + 27 * 51 + 52 * 26  # norms, attention, then the MLP
    for name in (tmp_path, tmp_path / "config.json"):
        assert printed(capsys, "--model", str(name))["parameters"] == (97 + 16 + 2) * 26 + 3 * layer


def test_one_gpu_sends_nothing(capsys):
    said = printed(capsys, "--model", "tiny", "--engine", "ddp", "fsdp2", "zero3", "--gpus", "1")
    for row in said["rows"]:
        assert row["sent_bytes"]["sum"]["max"] == row["engine_sent_bytes"] == 0
        assert row["ratio"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no_such_model"], "--model no_such_model is not one of gpt2, gpt2-large, llama-7b"),
        (["--model", "tiny", "--engine", "zero4"], "invalid choice: 'zero4'"),
        (["--model", "tiny", "--gpus", "0"], "--gpus 0: give 1 or more"),
        (["--model", "tiny", "--gpus", "many"], "invalid int value: 'many'"),
        (["--model", "tiny", "--engine", "hsdp", "--gpus", "12"], "12 GPUs are not a multiple of 8 per node"),
        (["--model", "tiny", "--optim", "adam"], "unknown method 'adam'"),
    ],
)
def test_what_it_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        plan.main(arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "noneuclid plan: error: " in error
