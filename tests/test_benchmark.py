"""The benchmark: what it counts, how it compares, and what it refuses. Nothing here depends on the time."""

import json
from contextlib import redirect_stdout
from io import StringIO

import pytest
import torch
from torch import nn

from hf_noneuclid.experiments import benchmark
from hf_noneuclid.experiments.costs import contenders, tables, timing
from hf_noneuclid.experiments.costs.models import MODELS, build
from hf_noneuclid.norms import Spectral
from hf_noneuclid.polar import polar_flops

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    model = build(MODELS["tiny-moe"], CPU)
    contenders.fill_gradients(model)
    return model


@pytest.fixture(scope="module")
def report():
    """The report of a default run, except for the size of the model."""
    return reported("--rounds", "3")


def reported(*arguments):
    with redirect_stdout(StringIO()) as printed:
        benchmark.main(["--shapes", "tiny-moe", "--json", *arguments])
    return json.loads(printed.getvalue())


def polar_operations(model, steps=5):
    parameters = contenders.matrix_parameters(model)
    return sum(p.shape[:-2].numel() * polar_flops(*p.shape[-2:], steps) for p in parameters)


# --------------------------------------------------------------------------------------- the report


def test_the_report_has_every_field_and_contender(report):
    assert set(report) == {
        *("hardware", "shapes", "rounds", "parameters", "matrix_elements"),
        *("matmul_flops_per_second", "contenders"),
    }
    assert [row["name"] for row in report["contenders"]] == list(contenders.DEFAULT_CONTENDERS)
    for row in report["contenders"]:
        assert set(row) == {
            *("name", "seconds", "median_seconds", "ratios", "polar_seconds", "polar_flops"),
            *("share_of_matmul", "peak_extra_bytes", "note"),
        }
        assert len(row["seconds"]) == 3
        assert set(row["ratios"]) == {"adamw", "torch_muon", "muon"}
        assert (row["polar_seconds"] == 0) == (row["name"] in contenders.TORCH_CONTENDERS)


def test_the_operations_are_those_of_all_matrices(report, model):
    for row in report["contenders"][2:]:
        assert row["polar_flops"] == polar_operations(model)
        rate = row["polar_flops"] / row["polar_seconds"]
        assert row["share_of_matmul"] == rate / report["matmul_flops_per_second"]


def test_what_torch_muon_cannot_take_is_said(report, model):
    stacks = [p for p in contenders.matrix_parameters(model) if p.ndim == 3]
    notes = {row["name"]: row["note"] for row in report["contenders"]}
    assert f"{len(stacks)} stacks or convolutions" in notes.pop("torch_muon")
    assert not any(notes.values())


def test_the_text_states_hardware_contenders_and_notes(report):
    text = tables.benchmark_text(report)
    assert f"torch {torch.__version__}" in text
    assert report["hardware"]["cpu"] in text
    assert "left to AdamW" in text
    for name in contenders.DEFAULT_CONTENDERS:
        assert f"| {name} |" in text


def test_the_operations_of_a_decomposition_are_not_counted():
    found = reported("--rounds", "1", "--contenders", "muon:polar_method=svd")
    (row,) = found["contenders"]
    assert row["polar_seconds"] > 0
    assert row["polar_flops"] == 0
    assert row["share_of_matmul"] is None
    assert row["ratios"] == {}
    assert "| muon:polar_method=svd |" in tables.benchmark_text(found)


# ------------------------------------------------------------------------------------- the contenders


def test_all_contenders_leave_parameters_and_gradients_as_they_are(model):
    before = [(p.detach().clone(), p.grad.clone()) for p in model.parameters()]
    for name in contenders.DEFAULT_CONTENDERS:
        contenders.make(name, model).step()
    for p, (value, grad) in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), value, rtol=0, atol=1e-6)
        assert torch.equal(p.grad, grad)


def test_gradients_are_the_same_in_every_run(model):
    again = build(MODELS["tiny-moe"], CPU)
    contenders.fill_gradients(again)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_options_reach_the_optimizer(model):
    contender = contenders.make("muonmax_momo:polar_method=newton_schulz,polar_steps=3", model)
    assert timing.polar_cost(contender.step, CPU)[1] == polar_operations(model, steps=3)


# ---------------------------------------------------------------------------------- the measurements


def test_ratios_are_taken_round_by_round():
    """The machine is three times slower in the second round: the ratios do not notice."""
    assert timing.ratio([2.0, 6.0, 5.0], [1.0, 3.0, 2.0]) == {"median": 2.0, "lowest": 2.0, "highest": 2.5}
    with pytest.raises(ValueError, match="shorter"):
        timing.ratio([1.0, 2.0], [1.0])


def test_contenders_step_in_turn():
    steps = []
    times = timing.in_turn({name: lambda name=name: steps.append(name) for name in "abc"}, 2, CPU)
    assert steps == list("abcabc")
    assert [len(seconds) for seconds in times.values()] == [2, 2, 2]


def test_memory_counts_as_long_as_it_lives():
    there = torch.zeros(1000)

    def step():
        x = there + torch.ones(1000)  # 8000 bytes while both live
        view = x.view(10, 100)
        del x  # the view keeps it
        y = torch.empty(500)
        del view
        z = torch.empty(1500)
        there.mul_(z[:1000])
        del y, z

    assert timing.peak_extra_bytes(step, CPU) == 2000 + 6000


def test_the_meter_is_taken_away_again():
    def fail():
        raise RuntimeError("failed")

    plain = Spectral.direction
    with pytest.raises(RuntimeError, match="failed"):
        timing.polar_cost(fail, CPU)
    assert Spectral.direction is plain


# ------------------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contenders", "adam"], "unknown contender 'adam'; known are adamw, torch_muon, muon, scion"),
        (["--contenders", "adamw:eps=1"], "adamw and torch_muon take no options"),
        (["--contenders", "muon:nuclear_norms=stale"], "nuclear_norm"),
        (["--contenders", "muon:nuclear_norm=old"], "one of exact, stale, frobenius"),
        (["--contenders", "muon:polar_steps=few"], "polar_steps must be an integer"),
        (["--contenders", "muon", "muon"], "a contender is named twice"),
        (["--shapes", "gpt5"], "gpt2-large"),
        (["--rounds", "0"], "--rounds 0: give 1 or more"),
    ],
)
def test_what_it_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        benchmark.main(["--shapes", "tiny-moe", *arguments])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "noneuclid benchmark: error: " in error


def test_the_convolutions_are_left_to_adamw_as_well():
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(3, 2))
    contenders.fill_gradients(model)
    contender = contenders.make("torch_muon", model)
    assert "1 stacks or convolutions with 24 elements" in contender.note
    contender.step()
