"""FSDP2 (``fully_shard``): every rank holds some rows of every parameter, as a DTensor.

Under HSDP the mesh has a second dimension, along which these shards are replicated.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from .grid import ProcessGrid, world_size
from .shards import DTensorShard, Interval, LocalShard

_WAY_OUT = (
    "Supported are FSDP2 (rows sharded over all ranks) and HSDP (a second mesh dimension that replicates "
    "them); tensor parallelism is not. Use a mesh of data-parallel dimensions alone, or DeepSpeed ZeRO."
)


def common_mesh(params: Iterable[Any]) -> Any:
    """The mesh of the first parameter that has one; None if none is sharded."""
    return next((param.device_mesh for param in params if hasattr(param, "device_mesh")), None)


def shard(params: Sequence[Tensor], names: Sequence[str], mesh: Any) -> list[LocalShard]:
    """This rank's rows of each parameter.

    Raises:
        RuntimeError: A parameter is sharded in a way that is not supported, or not sharded at all.
    """
    shards = mesh.ndim - 1  # the last dimension of the mesh
    held: list[LocalShard] = []
    for param, name in zip(params, names, strict=True):
        if not hasattr(param, "device_mesh"):
            raise RuntimeError(
                f"{name} is not sharded, though other parameters are: its gradient is not averaged over the "
                "ranks. Leave no parameter out of fully_shard, or freeze it."
            )
        _check(param, name, mesh)
        shape = tuple(param.shape)
        rows = row_interval(shape, mesh.get_local_rank(shards), mesh.size(shards))
        local = DTensorShard(param, shape, rows)
        if (size := local.local(param).numel()) != local.size:
            raise RuntimeError(f"{name} of shape {shape} has {size} elements on this rank. {_WAY_OUT}")
        held.append(local)
    return held


def _check(param: Any, name: str, mesh: Any) -> None:
    """That rows are sharded along the last mesh dimension, and replicated along the one before."""
    kinds = [type(placement).__name__ for placement in param.placements]
    names = param.device_mesh.mesh_dim_names or ()
    if kinds not in (["Shard"], ["Replicate", "Shard"]) or param.placements[-1].dim != 0 or "tp" in names:
        raise RuntimeError(
            f"{name} is sharded as {param.placements} over a mesh {names or tuple(param.device_mesh.shape)}. "
            + _WAY_OUT
        )
    if param.device_mesh != mesh:
        raise RuntimeError(f"{name} is sharded over another mesh than other parameters. {_WAY_OUT}")


def row_interval(shape: tuple[int, ...], shard: int, shards: int) -> Interval:
    """The elements of a parameter that a shard holds: as many rows as ``torch.chunk`` gives it."""
    rows, row = (shape[0], prod(shape[1:])) if shape else (1, 1)
    most = -(-rows // shards)
    return min(shard * most, rows) * row, min((shard + 1) * most, rows) * row


def grid(mesh: Any) -> ProcessGrid:
    """The grid of a mesh.

    Raises:
        RuntimeError: It does not hold all processes.
    """
    if mesh.size() != world_size():
        raise RuntimeError(
            f"the parameters are sharded over {mesh.size()} of {world_size()} processes. {_WAY_OUT}"
        )
    device = torch.device(mesh.device_type)
    if device.type != "cpu":
        device = torch.device(device.type, torch.accelerator.current_device_index())
    if mesh.ndim == 1:
        return ProcessGrid(
            device, shards=mesh.size(), shard=mesh.get_local_rank(), shard_group=mesh.get_group()
        )
    return ProcessGrid(
        device,
        replicas=mesh.size(0),
        shards=mesh.size(1),
        replica=mesh.get_local_rank(0),
        shard=mesh.get_local_rank(1),
        replica_group=mesh.get_group(0),
        shard_group=mesh.get_group(1),
    )
