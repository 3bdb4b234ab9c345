"""What the engines themselves keep and send, as they document it, and the plan of one engine in numbers.

References:
    S. Rajbhandari, J. Rasley, O. Ruwase, Y. He, "ZeRO: Memory Optimizations Toward Training Trillion
    Parameter Models", arXiv 1910.02054, 2019: model state of the stages (section 3), communication (7).
    PyTorch's documentation of DistributedDataParallel (``gradient_as_bucket_view``) and of ``fully_shard``.
"""

from math import prod
from typing import Any

import numpy as np

from hf_noneuclid.experiments.costs.layout_costs import STATE_BYTES, Costs

DTYPES = {
    "bf16": "the Trainer's --bf16: float32 weights under DDP, FSDP2 and HSDP, float32 masters under ZeRO",
    "fp32": "everything in float32",
    "pure_bf16": "weights in bfloat16; only ZeRO keeps float32 masters",
}

MODEL_STATE = {
    "ddp": "weights, gradients and the buckets that they are reduced in: w P + 2 w P",
    "fsdp2": "shards of weights and gradients: (w + w) P/n",
    "hsdp": "shards of weights and gradients: (w + w) P/s",
    "zero1": "weights, gradients, shards of float32 masters: w P + w P + 4 P/n",
    "zero2": "weights, shards of gradients and of float32 masters: w P + (w + 4) P/n",
    "zero3": "shards of weights, gradients and float32 masters: (w + w + 4) P/n",
}

ENGINE_SENT = {
    "ddp": "a ring all-reduce of gradients: 2 g P (n-1)/n",
    "fsdp2": "weights gathered forward and backward, gradients reduce-scattered: (2 x + g) P (n-1)/n",
    "hsdp": "that within the node, and an all-reduce of the shards: (2 x + g) P (s-1)/s + 2 g P/s (r-1)/r",
    "zero1": "gradients reduce-scattered, weights gathered: (g + x) P (n-1)/n",
    "zero2": "gradients reduce-scattered, weights gathered: (g + x) P (n-1)/n",
    "zero3": "weights gathered forward and backward, gradients reduce-scattered: (2 x + g) P (n-1)/n",
}


def widths(engine: str, dtype: str) -> tuple[int, int, int]:
    """Bytes of a weight (and gradient) as it is kept, w; of a weight, x, and a gradient, g, as it is sent."""
    if dtype != "bf16":
        wide = 4 if dtype == "fp32" else 2
        return wide, wide, wide
    if engine == "ddp":
        return 4, 4, 4
    return (2, 2, 2) if engine.startswith("zero") else (4, 2, 2)


def memory(costs: Costs, dtype: str) -> dict[str, np.ndarray]:
    """Bytes on every rank, by purpose, without activations and what an engine gathers for a while."""
    p, engine, (w, _, _) = costs.shapes.parameters, costs.engine, widths(costs.engine, dtype)
    everything = np.full(costs.grid, p)
    shards = costs.flat
    is_zero = engine.startswith("zero")
    gradients = {"ddp": 2 * everything, "zero1": everything}.get(engine, shards)
    return {
        "parameters": w * (everything if engine in ("ddp", "zero1", "zero2") else shards),
        "gradients": w * gradients,
        "master": STATE_BYTES * shards * is_zero,
        "optimizer": costs.state_bytes(),
        "polar_factors": costs.kept_bytes(),
        # ZeRO hands over the gradients of its partition in float32.
        "workspace": costs.workspace_bytes() + STATE_BYTES * shards * is_zero,
    }


def engine_sent_bytes(costs: Costs, dtype: str) -> float:
    """What the engine itself sends from each GPU in a step of one backward pass."""
    (replicas, shards), (_, x, g) = costs.grid, widths(costs.engine, dtype)
    p, sharded = costs.shapes.parameters, (shards - 1) / shards
    replicated = 2 * g * p / shards * (replicas - 1) / replicas
    gathers = {"ddp": 0, "zero1": 1, "zero2": 1}.get(costs.engine, 2)
    return (gathers * x + g) * p * sharded + replicated


def plan_row(costs: Costs, dtype: str) -> dict[str, Any]:
    """All numbers of one engine on one number of GPUs: bytes and floating-point operations of one GPU."""
    held = memory(costs, dtype)
    total = sum(held.values())
    fullest = np.unravel_index(int(total.argmax()), costs.grid)
    sent = costs.sent_bytes()
    engine = engine_sent_bytes(costs, dtype)
    step = sum(sent.values())
    return {
        "engine": costs.engine,
        "gpus": prod(costs.grid),
        "replicas": costs.grid[0],
        "shards": costs.grid[1],
        "memory_bytes": {key: int(value[fullest]) for key, value in held.items()},
        "sent_bytes": {key: _mean_and_max(value) for key, value in {**sent, "sum": step}.items()},
        "engine_sent_bytes": engine,
        "ratio": float(step.mean()) / engine if engine else None,
        "polar_flops": {
            **_mean_and_max(costs.flops),
            "imbalance": float(costs.flops.max() / costs.flops.mean()),
        },
        "idle_ranks": int((costs.owned == 0).sum()),
        "widths": dict(zip("wxg", widths(costs.engine, dtype), strict=True)),
        "at_home": costs.shapes.matrix_elements - int(costs.momentum.sum()),
        "handed_on": _handed_on(costs),
        "direction_bytes": costs.direction_bytes,
    }


def _handed_on(costs: Costs) -> float:
    """L: elements that the replicas of a shard hand on to each other, with what pads them."""
    replicas, sent = costs.grid[0], costs.sent_bytes()["replicas"].mean()
    return float(sent) / costs.direction_bytes * replicas / max(1, replicas - 1)


def _mean_and_max(values: np.ndarray) -> dict[str, float]:
    return {"mean": float(values.mean()), "max": int(values.max())}
