"""What a step costs each GPU under each engine, from the shapes of the parameters alone.

Buckets and owners are worked out by the package's own functions, as every rank does at its first step; here
it is done for all ranks at once. Sizes are numbers of elements, arrays are indexed by (replica, shard).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import hf_noneuclid
from hf_noneuclid.distributed.exchange import OwnedBlock
from hf_noneuclid.distributed.grid import pads
from hf_noneuclid.distributed.shards import whole
from hf_noneuclid.elementwise import MIB, narrow_dtype
from hf_noneuclid.experiments.costs.engines import (
    Grid,
    engine_sent_bytes,
    flat_partition,
    held_intervals,
    widths,
)
from hf_noneuclid.groups import parameter_names
from hf_noneuclid.norms import ADAPTIVE_NORMS
from hf_noneuclid.options import Options
from hf_noneuclid.parameters import LocalParameter, make_parameters
from hf_noneuclid.plan import bucket_matrices, first_memory, polar_batch_bytes, polar_batches
from hf_noneuclid.polar import compute_dtype, polar_flops

STATE_BYTES = 4  # momentum, second moment and scalars are float32, whatever the weights are
LAST_STEP_BYTES = narrow_dtype(torch.float32).itemsize

Array = NDArray[np.int64]


@dataclass(frozen=True)
class Shapes:
    """What is stepped, and how."""

    parameters: tuple[LocalParameter, ...]
    options: Options

    @property
    def matrices(self) -> list[LocalParameter]:
        return [x for x in self.parameters if x.stack]

    @property
    def adaptive(self) -> list[LocalParameter]:
        """The parameters that have a second moment."""
        return [x for x in self.parameters if x.norm in ADAPTIVE_NORMS]


def elements(parameters: Sequence[LocalParameter]) -> int:
    """The number of elements of some parameters."""
    return sum(x.elements for x in parameters)


def units(parameters: Sequence[LocalParameter]) -> int:
    """The number of matrices and vectors in some parameters."""
    return sum(x.units for x in parameters)


def shapes_of(model: nn.Module, method: str, **options: Any) -> Shapes:
    """Routes the parameters of a model, which may be on the device ``meta``.

    Raises:
        ValueError: The method or an option is unknown, or the model has no matrices.
    """
    groups = hf_noneuclid.create_optimizer(model, method, lr=0.0, **options).param_groups
    names = [parameter_names(group, i, len(group["params"])) for i, group in enumerate(groups)]
    shards = [[whole(param) for param in group["params"]] for group in groups]
    chosen = Options.of(groups[0])
    return Shapes(tuple(make_parameters(groups, names, shards, chosen.descent)), chosen)


class Costs:
    """What every rank holds, sends and computes in one step.

    Args:
        shapes: Of the model.
        engine: One of ``ENGINES``.
        grid: (replicas, shards).
        device: Where polar factors are computed, ``cuda`` or ``cpu``; it decides their dtype.
    """

    def __init__(self, shapes: Shapes, engine: str, grid: Grid, device: str = "cuda") -> None:
        self.shapes, self.engine, self.grid = shapes, engine, grid
        self._workspace = int(shapes.options.workspace * MIB)
        self._polar_batch = polar_batch_bytes(torch.device(device), self._workspace)
        self.direction_bytes: int = compute_dtype(torch.float32, torch.device(device)).itemsize
        held = held_intervals(shapes.parameters, engine, grid[1])
        self._intervals = {x: np.array(by_shard) for x, by_shard in held.items()}
        self.held = self._count_held(shapes.parameters)
        """Of all parameters."""
        self.second_moment = self._count_held(shapes.adaptive)
        partition = flat_partition(shapes.parameters, engine, grid[1])
        self.flat = self.held if partition is None else np.full(grid, partition)
        """Of the tensors that a rank steps, with the padding of flat partitions."""
        self.owned, self.flops, self._bucket_bytes = (self._zeros() for _ in range(3))
        self.momentum, self.directions, self.gathered, self.broadcast = (self._zeros() for _ in range(4))
        steps = shapes.options.polar_steps
        for parameters, blocks in bucket_matrices(shapes.matrices, held, *grid, steps, self._workspace):
            self._add_bucket([self._intervals[x] for x in parameters], blocks)

    def _zeros(self) -> Array:
        return np.zeros(self.grid, dtype=np.int64)

    def _count_held(self, parameters: Sequence[LocalParameter]) -> Array:
        sizes = [self._intervals[x][:, 1] - self._intervals[x][:, 0] for x in parameters]
        return np.broadcast_to(np.sum(sizes, axis=0, dtype=np.int64), self.grid)

    def _add_bucket(self, intervals: Sequence[Array], blocks: Sequence[OwnedBlock]) -> None:
        """Counts a bucket. ``intervals`` holds those of each parameter's shards, of shape (shards, 2)."""
        owned, here = self._zeros(), self._zeros()
        by_owner: dict[Grid, list[OwnedBlock]] = {}
        for block in blocks:
            held, (first, last) = intervals[block.parameter], block.interval
            # ``shards.overlap`` for all shards at once: there are thousands of ranks and of blocks.
            parts = np.maximum(0, np.minimum(last, held[:, 1]) - np.maximum(first, held[:, 0]))
            replica, shard = block.owner
            here[replica] += parts
            owned[block.owner] += prod(block.shape)
            count, rows, columns = block.shape
            self.flops[block.owner] += count * polar_flops(rows, columns, self.shapes.options.polar_steps)
            self.momentum[replica] += parts
            self.momentum[block.owner] -= parts[shard]  # what stays where it is
            self.directions[block.owner] += parts.sum() - parts[shard]
            by_owner.setdefault(block.owner, []).append(block)
        self.owned += owned
        iterating = self._zeros()
        for owner, its in by_owner.items():
            iterating[owner] = max(
                self._iterating([its[i] for i in batch]) for batch in polar_batches(its, self._polar_batch)
            )
        bytes_now = self._bytes_of_bucket(owned, here, iterating, self._add_replicas(here))
        self._bucket_bytes = np.maximum(self._bucket_bytes, bytes_now)

    def _add_replicas(self, here: Array) -> Array:
        """Counts what replicas pass on to each other; returns the elements that each rank needs for it."""
        replicas, total, longest = self.grid[0], here.sum(axis=0), here.max(axis=0)
        padded = np.array([pads(sizes) for sizes in here.T.tolist()])
        self.gathered += np.where(padded, longest * (replicas - 1), 0)
        self.broadcast += np.where(padded, 0, self.direction_bytes * total * (replicas - 1) // replicas)
        needed: Array = np.where(padded, (replicas + 1) * longest, total) * (replicas > 1)
        return needed

    def _iterating(self, blocks: Sequence[OwnedBlock]) -> int:
        """Bytes of a batch of polar factors: momenta as they are and normalised, X, the next X, two Grams."""
        c = self.direction_bytes
        size = sum(prod(block.shape) for block in blocks)
        gram = sum(block.shape[0] * min(block.shape[1:]) ** 2 for block in blocks)
        return (2 * STATE_BYTES + 2 * c) * size + 2 * c * gram

    def _bytes_of_bucket(self, owned: Array, here: Array, iterating: Array, shared: Array) -> Any:
        """Bytes that a bucket needs at its worst moment, without the polar factors that are kept."""
        c = self.direction_bytes
        copies = self.grid[1] > 1  # where nothing is sharded, momenta are used where they are
        factors = c * owned * (self.shapes.options.nuclear_norm != "exact")
        gathering = STATE_BYTES * copies * (here + 2 * owned)
        polar = factors + STATE_BYTES * copies * owned + iterating
        scattering = factors + c * (2 * owned + copies * here + shared + here.sum(axis=0))
        return np.maximum(np.maximum(gathering, polar), scattering)

    def state_bytes(self) -> Array:
        """The optimizer's state."""
        options = self.shapes.options
        stale = units(self.shapes.matrices) if options.nuclear_norm == "stale" else 0
        of_step_size = sum(x.numel() for x in first_memory(options, torch.zeros(())).values())
        scalars = 1 + of_step_size + stale  # 1 is the step
        last_step = LAST_STEP_BYTES * self.flat * options.slope
        return STATE_BYTES * (self.flat + self.second_moment + scalars) + last_step

    def kept_bytes(self) -> Array:
        """The polar factors between measuring and moving; with stale norms none are kept after ten steps."""
        return self.direction_bytes * self.owned * (self.shapes.options.nuclear_norm == "exact")

    def workspace_bytes(self) -> Array:
        """What the worst moment of a step needs beyond the polar factors that are kept; an estimate.

        While the averages take in the gradients, there is a float32 copy of these and one of the
        differences, a workspace at a time, and no polar factors. Later there is what a bucket needs.
        """
        largest = max(x.elements for x in self.shapes.parameters)
        at_once = np.minimum(self.held, max(self._workspace // STATE_BYTES, largest))
        return np.maximum(self._bucket_bytes, 2 * STATE_BYTES * at_once - self.kept_bytes())

    def sent_bytes(self) -> dict[str, Array]:
        """What each rank sends in a step, by purpose."""
        # Phase 0: bad entries, the largest, ⟨p, g⟩, the loss, two slopes and two squares. Phase 2: the dual
        # norms and ⟨p, m⟩.
        scalars = [8, units(self.shapes.parameters) + 1]
        if self.shapes.options.nuclear_norm == "stale":
            scalars.append(units(self.shapes.matrices))
        ranks = prod(self.grid)  # a ring sends everything twice, except one share
        reduced = sum(2 * STATE_BYTES * n * (ranks - 1) // ranks for n in scalars)
        return {
            "momentum": STATE_BYTES * self.momentum,
            "directions": self.direction_bytes * self.directions,
            "replicas": self.direction_bytes * self.gathered + self.broadcast,
            "scalars": np.full(self.grid, reduced),
        }


def memory(costs: Costs, dtype: str) -> dict[str, Array]:
    """Bytes on every rank, by purpose, without activations and what an engine gathers for a while."""
    engine, (w, _, _) = costs.engine, widths(costs.engine, dtype)
    everything = np.full(costs.grid, elements(costs.shapes.parameters))
    master = STATE_BYTES * costs.flat * engine.startswith("zero")
    gradients = {"ddp": 2 * everything, "zero1": everything}.get(engine, costs.flat)
    return {
        "parameters": w * (everything if engine in ("ddp", "zero1", "zero2") else costs.flat),
        "gradients": w * gradients,
        "master": master,
        "optimizer": costs.state_bytes(),
        "polar_factors": costs.kept_bytes(),
        # ZeRO hands over the gradients of its partition in float32, as large as the masters.
        "workspace": costs.workspace_bytes() + master,
    }


def plan_row(costs: Costs, dtype: str) -> dict[str, Any]:
    """All numbers of one engine on one number of GPUs: bytes and floating-point operations of one GPU."""
    held, sent, (replicas, shards) = memory(costs, dtype), costs.sent_bytes(), costs.grid
    fullest = np.unravel_index(int(np.sum(list(held.values()), axis=0).argmax()), costs.grid)
    engine = engine_sent_bytes(costs.engine, costs.grid, elements(costs.shapes.parameters), dtype)
    step = np.sum(list(sent.values()), axis=0)
    return {
        "engine": costs.engine,
        "gpus": replicas * shards,
        "memory_bytes": {key: int(value[fullest]) for key, value in held.items()},
        "sent_bytes": {key: _mean_and_max(value) for key, value in {**sent, "sum": step}.items()},
        "engine_sent_bytes": engine,
        "ratio": float(step.mean()) / engine if engine else None,
        "polar_flops": {
            **_mean_and_max(costs.flops),
            "imbalance": float(costs.flops.max() / costs.flops.mean()),
        },
        "idle_ranks": int((costs.owned == 0).sum()),
    }


def _mean_and_max(values: Array) -> dict[str, float]:
    return {"mean": float(values.mean()), "max": int(values.max())}
