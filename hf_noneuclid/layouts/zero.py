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

from .exchange import Run
from .pieces import Holding
from .ranks import Ranks, world_size


def is_partitioned(param: Any) -> bool:
    """Whether DeepSpeed keeps only parts of the parameter, or of its state, on each rank."""
    return hasattr(param, "ds_id") or hasattr(param, "_hp_mapping")


def hold(flats: Sequence[Tensor], params: Sequence[Any], names: Sequence[str]) -> list[Holding]:
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
        return _hold_stage3(flat, params)
    return [_hold_fragment(flat, param, name) for param, name in zip(params, names, strict=True)]


def _hold_fragment(flat: Tensor, param: Any, name: str) -> Holding:
    """Of stages 1 and 2, which note where a fragment lies in parameter and partition."""
    shape, mapping = tuple(param.shape), param._hp_mapping
    if mapping is None:
        return Holding(flat, shape, (0, 0), slice(0, 0))
    lp, hp = mapping.lp_fragment_address, mapping.hp_fragment_address
    holding = Holding(flat, shape, (lp.start, lp.start + lp.numel), slice(hp.start, hp.start + hp.numel))
    held = holding.part(flat).to(param.device, param.dtype)
    if not torch.equal(held, param.detach().reshape(-1)[slice(*holding.run)]):
        raise RuntimeError(
            f"the partition of the optimizer does not hold {name} where DeepSpeed says that it does. Set "
            '"round_robin_gradients": false in its zero_optimization section.'
        )
    return holding


def _hold_stage3(flat: Tensor, params: Sequence[Any]) -> list[Holding]:
    """Every parameter is cut into equal runs, the last of them padded; a rank's stand one after another."""
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
    holdings = []
    for param in params:
        shape, size = tuple(param.ds_shape), param.partition_numel()
        run = flat_run(param.ds_numel, size, dist.get_rank() if world_size() > 1 else 0)
        start = starts[param.ds_id]
        holdings.append(Holding(flat, shape, run, slice(start, start + run[1] - run[0])))
    return holdings


def flat_run(elements: int, partition: int, shard: int) -> Run:
    """The elements that a shard holds of a parameter, or of a group, cut into equal partitions."""
    return min(shard * partition, elements), min((shard + 1) * partition, elements)


def ranks() -> Ranks:
    """All processes as shards, and DeepSpeed's device, wherever the partition is."""
    from deepspeed.accelerator import get_accelerator

    device = torch.device(get_accelerator().current_device_name())
    if (world := world_size()) == 1:
        return Ranks(device)
    return Ranks(device, shards=world, shard=dist.get_rank(), shard_group=dist.group.WORLD)
