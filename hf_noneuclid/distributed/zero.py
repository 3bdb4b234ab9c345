"""DeepSpeed ZeRO: every rank holds a flat partition of all parameters (stages 1, 2) or of each (stage 3).

DeepSpeed puts the partition into the optimizer's group in place of the parameters; which part of it belongs
to which parameter it keeps at the parameters themselves, which the optimizer was given first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .grid import ProcessGrid, world_size
from .shards import Interval, LocalShard


def is_partitioned(param: Any) -> bool:
    """Whether DeepSpeed keeps only parts of the parameter, or of its state, on each rank."""
    return hasattr(param, "ds_id") or hasattr(param, "_hp_mapping")


def shard(flats: Sequence[Tensor], params: Sequence[Any], names: Sequence[str]) -> list[LocalShard]:
    """This rank's part of each parameter of the one group.

    Args:
        flats: What DeepSpeed has put into the group.
        params: What the optimizer was given.
        names: Of those.

    Raises:
        RuntimeError: The partition is not one, or its mapping is not what it should be.
    """
    if len(flats) != 1:
        raise RuntimeError(
            f"DeepSpeed has put {len(flats)} tensors into a group in place of {len(params)} parameters; one "
            "flat partition was expected. Use ZeRO stage 1, 2 or 3, with all parameters in one group."
        )
    (flat,) = flats
    if hasattr(params[0], "ds_id"):
        return _shard_stage3(flat, params)
    return [_shard_fragment(flat, param, name) for param, name in zip(params, names, strict=True)]


def _shard_fragment(flat: Tensor, param: Any, name: str) -> LocalShard:
    """Of stages 1 and 2, which note where a fragment lies in parameter and partition."""
    shape, mapping = tuple(param.shape), param._hp_mapping
    if mapping is None:
        return LocalShard(flat, shape, (0, 0), slice(0, 0))
    lp, hp = mapping.lp_fragment_address, mapping.hp_fragment_address
    fragment = LocalShard(flat, shape, (lp.start, lp.start + lp.numel), slice(hp.start, hp.start + hp.numel))
    # A wrong mapping would train on mixed-up parameters without a word: compare the values once.
    held = fragment.local(flat).to(param.device, param.dtype)
    if not torch.equal(held, param.detach().reshape(-1)[slice(*fragment.interval)]):
        raise RuntimeError(
            f"the partition of the optimizer does not hold {name} where DeepSpeed says that it does. Set "
            '"round_robin_gradients": false in its zero_optimization section.'
        )
    return fragment


def _shard_stage3(flat: Tensor, params: Sequence[Any]) -> list[LocalShard]:
    """Every parameter is cut into equal parts, the last one padded; a rank's parts lie end to end."""
    groups = params[0]._z3_optimizer.fp16_groups
    if len(groups) != 1:
        needed = sum(param.partition_numel() for group in groups for param in group)
        raise RuntimeError(
            f"ZeRO-3 steps these parameters in {len(groups)} sub-groups, one after the other, but a step "
            f'depends on all of them. In its zero_optimization section, set "sub_group_size" to {needed} or '
            "more."
        )
    starts, offset = {}, 0
    for param in groups[0]:
        starts[param.ds_id] = offset
        offset += param.partition_numel()
    shards = []
    for param in params:
        shape, size = tuple(param.ds_shape), param.partition_numel()
        held = flat_interval(param.ds_numel, size, dist.get_rank() if world_size() > 1 else 0)
        start = starts[param.ds_id]
        shards.append(LocalShard(flat, shape, held, slice(start, start + held[1] - held[0])))
    return shards


def flat_interval(elements: int, partition: int, shard: int) -> Interval:
    """The elements that a shard holds of a parameter, or of a group, cut into equal partitions."""
    return min(shard * partition, elements), min((shard + 1) * partition, elements)


def grid() -> ProcessGrid:
    """All processes as shards, and DeepSpeed's device, wherever the partition is."""
    from deepspeed.accelerator import get_accelerator

    device = torch.device(get_accelerator().current_device_name())
    if (world := world_size()) == 1:
        return ProcessGrid(device)
    return ProcessGrid(device, shards=world, shard=dist.get_rank(), shard_group=dist.group.WORLD)
