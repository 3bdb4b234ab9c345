"""What each engine holds and sends by itself, as it documents that.

References:
    S. Rajbhandari, J. Rasley, O. Ruwase, Y. He, "ZeRO: Memory Optimizations Toward Training Trillion
    Parameter Models", arXiv 1910.02054, 2019: model state of the stages (section 3), communication (7).
    PyTorch's documentation of DistributedDataParallel (``gradient_as_bucket_view``) and of ``fully_shard``.
"""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from hf_noneuclid.distributed.fsdp2 import row_interval
from hf_noneuclid.distributed.shards import Interval
from hf_noneuclid.distributed.zero import flat_interval
from hf_noneuclid.parameters import LocalParameter

ENGINES = ("ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3")

DTYPES = {
    "bf16": "the Trainer's --bf16: float32 weights under DDP, FSDP2 and HSDP, float32 masters under ZeRO",
    "fp32": "everything in float32",
    "pure_bf16": "weights in bfloat16; only ZeRO keeps float32 masters",
}

_ZERO_ALIGNMENT = 2  # DeepSpeed's nccl_start_alignment_factor, in elements of each rank

Grid = tuple[int, int]
"""(replicas, shards)."""


def widths(engine: str, dtype: str) -> tuple[int, int, int]:
    """Bytes of a weight or gradient that is kept, a weight that is sent, and a gradient that is sent."""
    if dtype != "bf16":
        width = 4 if dtype == "fp32" else 2
        return width, width, width
    if engine == "ddp":
        return 4, 4, 4
    return (2, 2, 2) if engine.startswith("zero") else (4, 2, 2)


def grid_of(engine: str, gpus: int, gpus_per_node: int) -> Grid:
    """How an engine arranges the GPUs.

    Raises:
        ValueError: HSDP does not fill its nodes.
    """
    if engine == "ddp":
        return gpus, 1
    if engine != "hsdp":
        return 1, gpus
    if gpus % gpus_per_node:
        raise ValueError(
            f"hsdp needs full nodes, and {gpus} GPUs are not a multiple of {gpus_per_node} per node. Change "
            "--gpus or --gpus_per_node."
        )
    return gpus // gpus_per_node, gpus_per_node


def flat_partition(parameters: Sequence[LocalParameter], engine: str, shards: int) -> int | None:
    """Elements of the flat tensor that a rank steps, padding included; None if the engine makes none."""
    if engine in ("zero1", "zero2"):
        return -(-sum(x.elements for x in parameters) // (_ZERO_ALIGNMENT * shards)) * _ZERO_ALIGNMENT
    return sum(-(-x.elements // shards) for x in parameters) if engine == "zero3" else None


def held_intervals(
    parameters: Sequence[LocalParameter], engine: str, shards: int
) -> dict[LocalParameter, list[Interval]]:
    """The elements of each parameter that each shard holds; parameters are in the optimizer's order."""
    if engine == "zero3":
        return {
            x: [flat_interval(x.elements, -(-x.elements // shards), s) for s in range(shards)]
            for x in parameters
        }
    partition = flat_partition(parameters, engine, shards)
    if partition is None:
        return {x: [row_interval(x.shard.shape, s, shards) for s in range(shards)] for x in parameters}
    ends = list(accumulate(x.elements for x in parameters))
    parts = np.array([flat_interval(ends[-1], partition, s) for s in range(shards)])
    held = {}
    for x, end in zip(parameters, ends, strict=True):
        within = np.clip(parts - (end - x.elements), 0, x.elements).tolist()
        held[x] = [(first, last) for first, last in within]
    return held


def engine_sent_bytes(engine: str, grid: Grid, elements: int, dtype: str) -> float:
    """What the engine itself sends from each GPU in a step of one backward pass."""
    (replicas, shards), (_, x, g) = grid, widths(engine, dtype)
    gathers = {"ddp": 0, "zero1": 1, "zero2": 1}.get(engine, 2)
    replicated = 2 * g * elements / shards * (replicas - 1) / replicas
    return (gathers * x + g) * elements * ((shards - 1) / shards) + replicated
