"""The benchmark: what it counts, how it compares, and what it refuses. Nothing here depends on the time."""

import json

import pytest
import torch
from torch import nn

from hf_noneuclid.experiments import benchmark
from hf_noneuclid.experiments.costs import contenders, tables, timing
from hf_noneuclid.experiments.costs.models import MODELS, build
from hf_noneuclid.norms import Spectral
from hf_noneuclid.polar import polar_factor, polar_flops

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    model = build(MODELS["tiny-moe"], CPU)
    contenders.fill_gradients(model)
    return model


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The report of a default run, except for the size of the model."""
    path = tmp_path_factory.mktemp("benchmark") / "report.json"
    benchmark.main(["--shapes", "tiny-moe", "--rounds", "3", "--output", str(path)])
    return json.loads(path.read_text(encoding="utf-8"))


def polar_operations(model, steps=5):
    return sum(polar_flops(*m.shape, steps) for m in contenders.matrices(model))


# --------------------------------------------------------------------------------------- the report


def test_the_report_has_every_field_and_contender(report):
    assert set(report) == {
        *("hardware", "shapes", "device", "rounds", "parameters", "matrices", "matrix_elements"),
        *("matmul", "accuracy", "contenders"),
    }
    assert [row["name"] for row in report["contenders"]] == list(contenders.DEFAULT_CONTENDERS)
    for row in report["contenders"]:
        assert set(row) == {
            *("name", "seconds", "median_seconds", "ratios", "polar", "peak_extra_bytes", "operators"),
            "note",
        }
        assert len(row["seconds"]) == 3
        assert set(row["ratios"]) == {"adamw", "torch_muon", "muon"}
        assert (row["polar"] is None) == (row["name"] in contenders.TORCH_CONTENDERS)


def test_the_operations_are_those_of_all_matrices(report, model):
    for row in report["contenders"][2:]:
        polar = row["polar"]
        assert polar["flops"] == polar_operations(model)
        assert polar["flops_per_second"] == pytest.approx(polar["flops"] / polar["seconds"])
        assert polar["share_of_matmul"] == polar["flops_per_second"] / report["matmul"]["flops_per_second"]


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


def test_the_operations_of_a_decomposition_are_not_counted(tmp_path, capsys):
    path = tmp_path / "report.json"
    benchmark.main(
        [
            *("--shapes", "tiny-moe", "--rounds", "1", "--output", str(path)),
            *("--contenders", "muon:polar_method=svd"),
        ]
    )
    found = json.loads(path.read_text(encoding="utf-8"))
    (row,) = found["contenders"]
    assert row["polar"]["flops"] == 0
    assert row["polar"]["flops_per_second"] is row["polar"]["share_of_matmul"] is None
    assert found["accuracy"]["errors"]["svd, 5 steps"] < 1e-4
    assert row["ratios"] == {}
    assert capsys.readouterr().out.strip() == tables.benchmark_text(found)


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
    assert contender.polar == ("newton_schulz", 3)
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

    assert timing.costs_of_one(step, CPU)["peak_extra_bytes"] == 2000 + 6000


def test_operators_are_counted_without_those_that_they_call():
    there = [torch.ones(10), torch.ones(20)]
    assert timing.costs_of_one(lambda: torch._foreach_mul(there, there), CPU) == {
        "peak_extra_bytes": 120,
        "operators": 1,
    }


def test_calls_of_cuda_are_sorted_by_what_they_are():
    calls = {
        **{"cudaLaunchKernel": 3, "cudaLaunchKernelExC": 2, "cuLaunchKernelEx": 1, "cudaMemsetAsync": 9},
        **{"cudaStreamSynchronize": 4, "cudaDeviceSynchronize": 1, "cudaMemcpyAsync": 7},
        **{"Memcpy DtoH (Device -> Pageable)": 5, "Memcpy DtoD (Device -> Device)": 6, "aten::mm": 8},
    }
    assert timing.count_calls(calls) == {"kernel_launches": 6, "synchronisations": 5, "copies_to_host": 5}


def test_the_meter_is_taken_away_again():
    def fail():
        raise RuntimeError("failed")

    plain = Spectral.direction
    with pytest.raises(RuntimeError, match="failed"):
        timing.polar_cost(fail, CPU)
    assert Spectral.direction is plain


def test_the_sample_has_every_shape_once_and_nothing_large():
    chosen = timing.sample([torch.zeros(4, 8), torch.zeros(8, 4), torch.zeros(4, 4), torch.zeros(1536, 3072)])
    assert sorted(tuple(m.shape) for m in chosen) == [(4, 4), (8, 4), (768, 1536)]


def test_errors_are_root_mean_squares_of_singular_values():
    """A factor that is wrong by a tenth in every singular value has the error 0.1, whatever the shape."""
    matrices = [torch.randn(5, 9), torch.randn(9, 5)]
    errors = timing.polar_errors(
        matrices,
        {
            "exact": lambda m: polar_factor(m, method="svd"),
            "long": lambda m: 1.1 * polar_factor(m, method="svd"),
        },
    )
    assert errors["exact"] == pytest.approx(0, abs=1e-5)
    assert errors["long"] == pytest.approx(0.1, abs=1e-5)


# ------------------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contenders", "adam"], "unknown contender 'adam'; known are adamw, torch_muon, muon, scion"),
        (["--contenders", "adamw:eps=1"], "adamw takes no options"),
        (["--contenders", "muon:nuclear_norms=stale"], "nuclear_norm"),
        (["--contenders", "muon:nuclear_norm=old"], "one of exact, stale, frobenius"),
        (["--contenders", "muon:polar_steps=few"], "polar_steps must be an integer"),
        (["--contenders", "muon", "muon"], "a contender is named twice"),
        (["--shapes", "gpt5"], "gpt2-large"),
        (["--rounds", "0"], "--rounds 0: give 1 or more"),
        (["--device", "cuda"], "--device cuda: torch sees no CUDA device"),
    ],
)
def test_what_it_refuses(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
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
