"""What `accelerate launch` makes of each file of accelerate_configs, and whether the optimizers take it."""

import json
import os
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed.run
import yaml
from accelerate.commands import launch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedType,
    FullyShardedDataParallelPlugin,
    TorchDynamoPlugin,
)
from deepspeed.runtime.config import DeepSpeedConfig
from torch.distributed.fsdp import ShardedStateDictConfig, StateDictType
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, unset_hf_deepspeed_config

from hf_noneuclid.engine import check_engine

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "accelerate_configs"
YAMLS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
JSONS = sorted(path.stem for path in FOLDER.glob("*.json"))
MESHES = {"hsdp": (2, 4), "multi_node": (2, 8)}
STAGES = {"zero1": 1, "zero2": 2, "zero2_offload": 2, "zero3": 3}
SHARDED = ("fsdp2", "hsdp", "multi_node")
BATCH = {"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}


@pytest.fixture(autouse=True)
def _from_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in list(os.environ):  # what an earlier test, or a launcher, has left
        if name.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")):
            monkeypatch.delenv(name)
    yield
    unset_hf_deepspeed_config()  # later tests make models, which ZeRO-3 would partition


def read_yaml(config):
    return yaml.safe_load((FOLDER / f"{config}.yaml").read_text(encoding="utf-8"))


def read_json(config):
    return json.loads((FOLDER / f"{config}.json").read_text(encoding="utf-8"))


def header(config):
    """The comment that a file begins with."""
    lines = (FOLDER / f"{config}.yaml").read_text(encoding="utf-8").splitlines()
    return lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]


def launched(monkeypatch, path, *flags):
    """What `accelerate launch` would start: the arguments of torchrun, and the environment.

    Machine 1 of several is asked for, since machine 0 wants its port to be free.
    """
    started = []
    command = ["--config_file", str(path), *flags, "recipes/pretrain.py"]
    with monkeypatch.context() as patch:
        patch.setattr(
            torch.distributed.run, "run", lambda arguments: started.append((arguments, dict(os.environ)))
        )
        patch.setattr(launch.subprocess, "Popen", lambda command, env: one_process(started, command, env))
        launch.launch_command(launch.launch_command_parser().parse_args(command))
    ((arguments, environment),) = started
    for name, value in environment.items():
        if os.environ.get(name) != value:
            monkeypatch.setenv(name, value)
    return arguments


def one_process(started, command, env):
    """Stands for the process that is started without torchrun."""
    started.append((SimpleNamespace(nproc_per_node="1", training_script=command[1]), env))
    return SimpleNamespace(wait=lambda: 0, returncode=0)


def launched_by_name(monkeypatch, config):
    flags = ["--machine_rank", "1"] if config == "multi_node" else []
    return launched(monkeypatch, FOLDER / f"{config}.yaml", *flags)


def enter_engine(monkeypatch):
    """Makes the state that the Accelerator of a launched process has, as it makes it."""
    use = {kind for kind in ("DEEPSPEED", "FSDP") if os.environ.get(f"ACCELERATE_USE_{kind}") == "true"}
    monkeypatch.setattr(PartialState, "_shared_state", {})
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    PartialState(cpu=True)
    # accelerate looks at the engines for several processes with GPUs only.
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return AcceleratorState(
        deepspeed_plugin=DeepSpeedPlugin() if "DEEPSPEED" in use else None,
        fsdp_plugin=FullyShardedDataParallelPlugin() if "FSDP" in use else None,
        dynamo_plugin=TorchDynamoPlugin(),
        _from_accelerator=True,
    )


def changed(tmp_path, config, change):
    """A copy of a YAML file, and of a JSON file beside it, which `change` has changed."""
    outer, inner = read_yaml(config), {}
    if config in JSONS:
        inner = read_json(config)
        outer["deepspeed_config"]["deepspeed_config_file"] = str(tmp_path / "inner.json")
    change(outer, inner)
    (tmp_path / "inner.json").write_text(json.dumps(inner), encoding="utf-8")
    (tmp_path / "outer.yaml").write_text(yaml.safe_dump(outer), encoding="utf-8")
    return tmp_path / "outer.yaml"


# ---------------------------------------------------------------- what the files say


def test_every_kind_of_run_has_a_file():
    assert {"single", "ddp", *SHARDED, *STAGES} == set(YAMLS)
    assert {"zero2_offload", "zero3"} == set(JSONS)


@pytest.mark.parametrize("config", YAMLS)
def test_a_file_begins_with_a_comment_that_names_its_command(config):
    (command,) = (line.removeprefix("#   ") for line in header(config) if line.startswith("#   "))
    launcher, name, *flags = shlex.split(command.removeprefix("accelerate launch "))
    assert command.startswith("accelerate launch ")
    assert (launcher, name) == ("--config_file", f"accelerate_configs/{config}.yaml")
    assert "recipes/pretrain.py" in flags
    # The Trainer, not the file, decides on the precision of DeepSpeed.
    assert ("--bf16" in flags) == (config in STAGES)
    assert any(line.startswith("# To change: ") for line in header(config))


@pytest.mark.parametrize("config", YAMLS)
def test_the_files_that_a_comment_names_exist(config):
    for name in re.findall(r"\w+\.yaml|\w+\.json", (FOLDER / f"{config}.yaml").read_text(encoding="utf-8")):
        assert (FOLDER / name).is_file()


@pytest.mark.parametrize("config", YAMLS)
def test_accelerate_knows_every_key(config):
    loaded = load_config_from_file(str(FOLDER / f"{config}.yaml"))
    assert isinstance(loaded, ClusterConfig)
    known = vars(launch.launch_command_parser().parse_args(["script.py"]))
    for section in (loaded.fsdp_config, loaded.deepspeed_config, loaded.parallelism_config):
        assert not set(section) - set(known)  # a wrong one would be set, and read by nobody


# ---------------------------------------------------------------- what they become


@pytest.mark.parametrize("config", YAMLS)
def test_the_processes_of_one_machine_are_started(config, monkeypatch):
    values = read_yaml(config)
    arguments = launched_by_name(monkeypatch, config)
    assert int(arguments.nproc_per_node) * values["num_machines"] == values["num_processes"]
    assert arguments.training_script == "recipes/pretrain.py"


@pytest.mark.parametrize("config", YAMLS)
def test_computing_in_bf16_reaches_the_processes_unless_deepspeed_computes(config, monkeypatch):
    launched_by_name(monkeypatch, config)
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == ("no" if config in STAGES else "bf16")
    assert os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == str(config in STAGES).lower()
    assert os.environ.get("ACCELERATE_USE_FSDP", "false") == str(config in SHARDED).lower()


def test_several_machines_meet_at_the_first(monkeypatch):
    arguments = launched_by_name(monkeypatch, "multi_node")
    assert (arguments.nnodes, arguments.node_rank) == ("2", 1)
    assert (arguments.rdzv_backend, arguments.rdzv_endpoint) == ("static", "10.0.0.1:29500")


@pytest.mark.parametrize("config", SHARDED)
def test_fsdp_is_of_version_2_and_its_checkpoints_are_sharded(config, monkeypatch):
    launched_by_name(monkeypatch, config)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert plugin.cpu_ram_efficient_loading
    assert plugin.reshard_after_forward is True
    assert plugin.state_dict_type == StateDictType.SHARDED_STATE_DICT
    assert isinstance(plugin.state_dict_config, ShardedStateDictConfig)


@pytest.mark.parametrize("config", MESHES)
def test_hybrid_sharding_uses_every_process(config, monkeypatch):
    launched_by_name(monkeypatch, config)
    mesh = ParallelismConfig()
    assert os.environ["ACCELERATE_USE_PARALLELISM_CONFIG"] == "true"
    assert (mesh.dp_replicate_size, mesh.dp_shard_size) == MESHES[config]
    assert mesh.total_size == load_config_from_file(str(FOLDER / f"{config}.yaml")).num_processes


@pytest.mark.parametrize("config", STAGES)
def test_deepspeed_has_the_stage_and_an_optimizer_that_is_not_its_own(config, monkeypatch):
    launched_by_name(monkeypatch, config)
    plugin = DeepSpeedPlugin()
    assert plugin.zero_stage == plugin.deepspeed_config["zero_optimization"]["stage"] == STAGES[config]
    assert plugin.offload_optimizer_device == ("cpu" if config == "zero2_offload" else "none")
    assert "optimizer" not in plugin.deepspeed_config
    assert {plugin.deepspeed_config[key] for key in ("train_batch_size", "gradient_clipping")} == {"auto"}


@pytest.mark.parametrize("config", JSONS)
def test_the_trainer_fills_in_what_is_left_to_it_and_deepspeed_takes_it(config):
    """With values that are nobody's default."""
    args = SimpleNamespace(
        **{"world_size": 1, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 5},
        **{
            "max_grad_norm": 0.7,
            "bf16": True,
            "bf16_full_eval": False,
            "fp16": False,
            "fp16_full_eval": False,
        },
        **dict.fromkeys(("learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay"), 0.1),
        **{"save_on_each_node": False, "get_warmup_steps": lambda steps: 0},
    )
    filled = HfTrainerDeepSpeedConfig(str(FOLDER / f"{config}.json"))
    filled.trainer_config_process(args)
    filled.trainer_config_finalize(args, SimpleNamespace(config=SimpleNamespace(hidden_size=11)), 10)
    assert "auto" not in json.dumps(filled.config)

    read = DeepSpeedConfig(filled.config)
    assert read.zero_optimization_stage == STAGES[config]
    assert read.zero_allow_untested_optimizer
    assert read.bfloat16_config.enabled
    assert (read.train_batch_size, read.gradient_clipping) == (15, 0.7)


def test_zero3_takes_a_model_of_any_size_for_one_sub_group_and_writes_it_whole():
    read = DeepSpeedConfig({**read_json("zero3"), **BATCH}).zero_config
    largest = 100e12  # parameters; none is larger yet
    assert read.sub_group_size > largest > type(read)().sub_group_size
    assert read.gather_16bit_weights_on_model_save


def test_the_offloaded_optimizer_is_not_replaced():
    read = DeepSpeedConfig({**read_json("zero2_offload"), **BATCH})
    assert read.zero_config.offload_optimizer.device == "cpu"
    assert not read.zero_force_ds_cpu_optimizer
    assert DeepSpeedConfig({**BATCH}).zero_force_ds_cpu_optimizer  # else the file need not say it


# ---------------------------------------------------------------- what the optimizers say to them


@pytest.mark.parametrize("config", YAMLS)
def test_the_engine_is_accepted(config, monkeypatch):
    launched_by_name(monkeypatch, config)
    state = enter_engine(monkeypatch)
    kinds = {DistributedType.DEEPSPEED: STAGES, DistributedType.FSDP: SHARDED}
    assert config in kinds.get(state.distributed_type, ("single", "ddp"))
    check_engine()


def test_offloading_without_the_flag_is_refused(tmp_path, monkeypatch):
    path = changed(tmp_path, "zero2_offload", lambda outer, inner: inner.pop("zero_force_ds_cpu_optimizer"))
    launched(monkeypatch, path)
    enter_engine(monkeypatch)
    with pytest.raises(RuntimeError, match=r"DeepSpeedCPUAdam.*\"zero_force_ds_cpu_optimizer\": false"):
        check_engine()


@pytest.mark.parametrize("said", [1, None])
def test_fsdp_of_version_1_is_refused(tmp_path, monkeypatch, said):
    """Also where the version is left out: 1 is accelerate's default."""
    version = {} if said is None else {"fsdp_version": said}

    def change(outer, inner):
        outer["fsdp_config"] = {"fsdp_auto_wrap_policy": "NO_WRAP", **version}
        outer["fsdp_config"]["fsdp_reshard_after_forward"] = "FULL_SHARD"
        outer["fsdp_config"]["fsdp_sync_module_states"] = False
        outer["fsdp_config"]["fsdp_cpu_ram_efficient_loading"] = False

    launched(monkeypatch, changed(tmp_path, "fsdp2", change))
    enter_engine(monkeypatch)
    with pytest.raises(RuntimeError, match=r"FSDP version 1 .*fsdp_version: 2"):
        check_engine()


def test_precision_beside_a_json_file_is_refused_by_accelerate(tmp_path, monkeypatch):
    """Which is why the files for DeepSpeed do not say it."""
    launched(
        monkeypatch, changed(tmp_path, "zero3", lambda outer, inner: outer.update(mixed_precision="bf16"))
    )
    with pytest.raises(ValueError, match="mixed_precision"):
        DeepSpeedPlugin()
