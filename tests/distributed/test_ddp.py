"""Two ranks under DDP (gloo on the CPU): they stay equal, and they see the loss of both."""

import json
import sys
from pathlib import Path

import pytest
import torch
from launching import launch, torchrun

pytestmark = pytest.mark.distributed

METHODS = ("muonmax_momo", "muon_momo", "polargrad")
BY_METHOD_AND_AVERAGE = [(method, average) for method in METHODS for average in (True, False)]

SCRIPT = """
import json, os, sys
import torch
import torch.distributed as dist
from torch import nn
from transformers import HfArgumentParser, Trainer, TrainingArguments

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))

    def forward(self, x, labels=None):
        return {"loss": (self.layers(x) - labels).square().mean()}

(args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
torch.manual_seed(0)
rows = [{"x": torch.randn(4), "labels": torch.randn(1)} for _ in range(8)]
trainer = Trainer(Model(), args, train_dataset=rows)
trainer.train()
seen = {
    "ranks": dist.get_world_size(),
    "wrapped": type(trainer.model_wrapped).__name__,
    "optimizer": type(trainer.optimizer.optimizer).__name__,
    "sum": sum(p.sum().item() for p in trainer.model.parameters()),
    "step_sizes": [entry["step_size"] for entry in trainer.state.log_history if "step_size" in entry],
}
with open(os.path.join(args.output_dir, f"rank{dist.get_rank()}.json"), "w") as file:
    json.dump(seen, file)
dist.barrier()
sys.stdout.flush()
os._exit(0)
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What the two ranks of one run of the worker saw."""
    folder = tmp_path_factory.mktemp("ddp")
    worker = Path(__file__).with_name("ddp_worker.py")
    torchrun(worker, folder)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def test_there_are_two_ranks_and_ddp(ranks):
    for seen in ranks:
        assert seen["ranks"] == 2
        assert {seen[run]["wrapped"] for run in [*BY_METHOD_AND_AVERAGE, "nan"]} == {
            "DistributedDataParallel"
        }


@pytest.mark.parametrize("run", [*BY_METHOD_AND_AVERAGE, "nan"], ids=str)
def test_parameters_are_bitwise_equal_on_both_ranks_after_every_step(ranks, run):
    first, second = (seen[run] for seen in ranks)
    assert len(first["after"]) == 4
    for x, y in zip(first["after"], second["after"], strict=True):
        assert torch.equal(x, y)
    assert first["step_sizes"] == second["step_sizes"]


@pytest.mark.parametrize("run", BY_METHOD_AND_AVERAGE, ids=str)
def test_the_loss_that_momo_observes_is_the_objective_of_the_global_batch(ranks, run):
    for seen in ranks:
        if run[0].endswith("momo"):
            assert seen[run]["losses"] == pytest.approx(seen[run]["objectives"], rel=1e-6)
        else:
            assert seen[run]["losses"] == [None] * 4


def test_averaging_tokens_across_devices_is_another_objective(ranks):
    """Otherwise the test above could not tell the two apart."""
    averaged, apart = (ranks[0]["muonmax_momo", average]["objectives"][0] for average in (True, False))
    assert abs(averaged - apart) > 1e-3


@pytest.mark.parametrize("run", BY_METHOD_AND_AVERAGE, ids=str)
def test_two_ranks_train_like_one_process_on_the_global_batches(ranks, run):
    for two, one in zip(ranks[0][run]["after"], ranks[0][run]["alone"], strict=True):
        assert (two - one).norm() < 5e-5 * one.norm()


@pytest.mark.parametrize("method", ["muonmax_momo", "muon_momo"])
def test_the_loss_decided_a_step_size(ranks, method):
    """Otherwise equal parameters would say nothing about the loss."""
    assert min(ranks[0][method, True]["step_sizes"]) < 0.3


def test_a_nan_loss_on_one_rank_is_a_bad_step_on_both(ranks):
    for seen in ranks:
        assert seen["nan"]["bad_steps"] == [0, 0, 1, 1]
        changed = [
            not torch.equal(before, after)
            for before, after in zip(seen["nan"]["before"], seen["nan"]["after"], strict=True)
        ]
        assert changed == [True, True, False, True]


def test_accelerate_launch_runs_a_script_on_two_ranks(tmp_path):
    """With ``-m hf_noneuclid``, the script itself needs nothing but the name of the method."""
    script, folder = tmp_path / "script.py", tmp_path / "run"
    script.write_text(SCRIPT)
    launch(
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
        *(
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "--main_process_port",
            "0",
        ),
        *("-m", "hf_noneuclid", str(script), "--optim", "muonmax_momo", "--output_dir", str(folder)),
        *("--use_cpu", "--max_steps", "2", "--logging_steps", "1", "--save_strategy", "no"),
        *("--per_device_train_batch_size", "2", "--report_to", "none", "--learning_rate", "0.01"),
    )
    first, second = (json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first["ranks"] == 2
    assert first["wrapped"] == "DistributedDataParallel"
    assert first["optimizer"] == "NonEuclideanDescent"
    assert len(first["step_sizes"]) == 2
