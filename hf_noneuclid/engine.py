"""Checks of the engine that accelerate runs, before the training starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType


def steps_group_by_group() -> bool:
    """Whether the engine of this process steps one parameter group after the other: DeepSpeed does."""
    return bool(_engine() == DistributedType.DEEPSPEED)


def schedules_learning_rate() -> bool:
    """Whether the engine's own schedule sets the learning rate: one in DeepSpeed's config does."""
    if _engine() != DistributedType.DEEPSPEED:
        return False
    return "scheduler" in AcceleratorState().deepspeed_plugin.deepspeed_config


def check_engine() -> None:
    """Refuses an engine that would train something else than what was asked for.

    Raises:
        RuntimeError: The engine destroys the shapes of matrices, or replaces the optimizer; the message
            says what to use.
    """
    engine = _engine()
    if engine == DistributedType.FSDP:
        _check_fsdp(AcceleratorState().fsdp_plugin)
    if engine == DistributedType.DEEPSPEED:
        _check_deepspeed(AcceleratorState().deepspeed_plugin.deepspeed_config)
    if engine == DistributedType.MEGATRON_LM:
        raise RuntimeError(
            "Megatron-LM has its own optimizer and tensor parallelism, which are not supported. Use DDP, "
            "FSDP2 or DeepSpeed ZeRO."
        )


def engine_name() -> str:
    """What runs the training, and on how many processes, in words."""
    engine, count = _engine(), AcceleratorState().num_processes
    if engine == DistributedType.NO:
        return "one device"
    names = {DistributedType.FSDP: "FSDP2", DistributedType.DEEPSPEED: "DeepSpeed"}
    name = names.get(engine, "DDP")
    if engine == DistributedType.DEEPSPEED:
        config = AcceleratorState().deepspeed_plugin.deepspeed_config
        name += f" ZeRO-{config.get('zero_optimization', {}).get('stage', 0)}"
    return f"{name} on {count} processes"


def _engine() -> Any:
    return AcceleratorState().distributed_type if AcceleratorState._shared_state else None


def _check_fsdp(plugin: Any) -> None:
    if getattr(plugin, "fsdp_version", 1) == 1:
        raise RuntimeError(
            "FSDP version 1 flattens parameters, which loses the shapes of matrices. Use FSDP2: "
            'fsdp_version: 2 in the accelerate config, or fsdp_config={"version": 2} in TrainingArguments.'
        )


def _check_deepspeed(config: Mapping[str, Any]) -> None:
    zero = config.get("zero_optimization", {})
    offload = (zero.get("offload_optimizer") or {}).get("device", "none")
    if "optimizer" in config:
        raise RuntimeError(
            "the DeepSpeed config has an optimizer section, which would replace the optimizer that was asked "
            'for. Remove "optimizer" from it.'
        )
    if zero.get("stage", 0) == 0 and any(config.get(half, {}).get("enabled") for half in ("bf16", "fp16")):
        raise RuntimeError(
            "DeepSpeed at stage 0 keeps half-precision parameters in flat buffers, which loses the shapes of "
            'matrices. Set "stage" in its zero_optimization section to 1, 2 or 3, or use DDP.'
        )
    if offload == "nvme":
        raise RuntimeError(
            "DeepSpeed swaps the optimizer's state to NVMe piece by piece, but a step depends on all of it. "
            'Set "offload_optimizer": {"device": "cpu"} or leave it out.'
        )
    if offload == "cpu" and config.get("zero_force_ds_cpu_optimizer", True):
        raise RuntimeError(
            "DeepSpeed would replace the optimizer by its own DeepSpeedCPUAdam, since its state is "
            'offloaded. Set "zero_force_ds_cpu_optimizer": false at the top level of the DeepSpeed config '
            "(in a JSON file; accelerate's YAML has no key for it), as accelerate_configs/zero2_offload.yaml "
            "does."
        )


def check_world_size(checkpoint: Any) -> None:
    """Refuses to resume a ZeRO checkpoint with another number of processes, since each saved its part.

    Args:
        checkpoint: A folder, as in ``args.resume_from_checkpoint``; anything else passes.

    Raises:
        RuntimeError: The checkpoint has another number of parts.
    """
    if _engine() != DistributedType.DEEPSPEED or not isinstance(checkpoint, str):
        return
    files = Path(checkpoint).glob("global_step*/*zero_pp_rank_*_optim_states.pt")
    parts, world = len({file.name for file in files}), AcceleratorState().num_processes
    if parts not in (0, world):
        raise RuntimeError(
            f"{checkpoint} was made by DeepSpeed ZeRO with {parts} processes, and there are {world} now. "
            f"Resume with {parts}, or start from its model alone."
        )


def check_innermost(optimizer: Any, ours: Any, method: str) -> None:
    """Refuses to start if the engine has replaced the optimizer that was asked for.

    Args:
        optimizer: The optimizer that the Trainer will use, with its wrappers.
        ours: The optimizer of this package that was found in it, or None.
        method: The name that was asked for.

    Raises:
        RuntimeError: There is none.
    """
    if ours is None:
        inner = optimizer
        while getattr(inner, "optimizer", None) is not None:
            inner = inner.optimizer
        raise RuntimeError(
            f"optim={method!r} was asked for, but {type(inner).__name__} is what would train. It came from "
            "an overridden create_optimizer, the argument optimizers of the Trainer, or the engine. "
            "Remove it, or ask for another optim."
        )
