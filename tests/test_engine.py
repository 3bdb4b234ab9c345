"""Which engines are refused before training starts, and what the message tells the user to do."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from transformers import Trainer, TrainingArguments

from hf_noneuclid import engine as engines

OFFLOADED = {"stage": 2, "offload_optimizer": {"device": "cpu"}}


@pytest.fixture
def engine(monkeypatch):
    """Makes accelerate's state that of an engine."""

    def be(kind, **plugins):
        stub = SimpleNamespace(distributed_type=kind, num_processes=2, **plugins)
        state = type("State", (), {"_shared_state": {"set": True}, "__new__": lambda cls: stub})
        monkeypatch.setattr(engines, "AcceleratorState", state)

    return be


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"optimizer": {"type": "AdamW"}}, 'optimizer section.*Remove "optimizer"'),
        ({"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}}, "stage 0 .*DDP"),
        ({"fp16": {"enabled": True}}, "stage 0 .*DDP"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, "NVMe.*cpu"),
        ({"zero_optimization": OFFLOADED}, 'DeepSpeedCPUAdam.*"zero_force_ds_cpu_optimizer": false'),
    ],
    ids=["optimizer", "stage 0 bf16", "no stage fp16", "nvme", "offloaded"],
)
def test_a_deepspeed_config_that_would_train_something_else_is_refused(engine, config, message):
    engine(DistributedType.DEEPSPEED, deepspeed_plugin=SimpleNamespace(deepspeed_config=config))
    with pytest.raises(RuntimeError, match=message):
        engines.check_engine()


@pytest.mark.parametrize(
    "config",
    [
        {"zero_optimization": {"stage": 1}, "bf16": {"enabled": "auto"}},
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}}},
        {"zero_optimization": OFFLOADED, "zero_force_ds_cpu_optimizer": False},
        {"zero_optimization": {"stage": 0}, "bf16": {"enabled": False}},
    ],
)
def test_a_deepspeed_config_that_keeps_the_optimizer_is_accepted(engine, config):
    engine(DistributedType.DEEPSPEED, deepspeed_plugin=SimpleNamespace(deepspeed_config=config))
    engines.check_engine()
    assert engines.steps_group_by_group()


@pytest.mark.parametrize(
    ("kind", "config", "expected"),
    [
        (DistributedType.DEEPSPEED, {"scheduler": {"type": "WarmupLR"}}, True),
        (DistributedType.DEEPSPEED, {"zero_optimization": {"stage": 2}}, False),
        (DistributedType.MULTI_GPU, {}, False),
    ],
)
def test_a_schedule_in_the_deepspeed_config_is_known(engine, kind, config, expected):
    engine(kind, deepspeed_plugin=SimpleNamespace(deepspeed_config=config))
    assert engines.schedules_learning_rate() is expected


def test_megatron_is_refused(engine):
    engine(DistributedType.MEGATRON_LM)
    with pytest.raises(RuntimeError, match=r"Megatron-LM .*FSDP2"):
        engines.check_engine()
    assert not engines.steps_group_by_group()


def test_a_zero_checkpoint_of_another_number_of_processes_is_refused(engine, tmp_path):
    engine(DistributedType.DEEPSPEED)
    folder = tmp_path / "global_step10"
    folder.mkdir()
    for rank in range(4):
        (folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    with pytest.raises(RuntimeError, match="with 4 processes, and there are 2 now"):
        engines.check_world_size(str(tmp_path))
    for rank in (2, 3):
        (folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").unlink()
    engines.check_world_size(str(tmp_path))
    engines.check_world_size(True)


def test_another_optimizer_than_the_one_asked_for_is_refused(tmp_path):
    """An engine may replace the optimizer. Here another one is passed to the Trainer."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    adam = torch.optim.AdamW(model.parameters())
    args = TrainingArguments(str(tmp_path), optim="muonmax_momo", use_cpu=True, report_to="none")
    trainer = Trainer(model, args, train_dataset=[{"input": torch.zeros(2)}], optimizers=(adam, None))
    message = r"'muonmax_momo' was asked for, but AdamW is what would train\. It came from"
    with pytest.raises(RuntimeError, match=message):
        trainer.train()
