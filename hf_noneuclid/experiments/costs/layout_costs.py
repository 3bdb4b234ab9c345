"""What a step costs each GPU under each engine, from the shapes of the parameters alone.

The layout, the batches and the owners are worked out by the package's own functions, as every rank does at
its first step; here it is done for all ranks at once. Sizes are numbers of elements, arrays are indexed by
(replica, shard).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod
from typing import Any

import numpy as np
import torch
from torch import nn

import hf_noneuclid
from hf_noneuclid.elementwise import MIB
from hf_noneuclid.layouts import replicated
from hf_noneuclid.layouts.dtensor import row_run
from hf_noneuclid.layouts.exchange import Block, Run
from hf_noneuclid.layouts.pieces import Piece, make_pieces
from hf_noneuclid.layouts.plan import _alike, _matrix_batches, polar_batch
from hf_noneuclid.layouts.ranks import Ranks, pads
from hf_noneuclid.layouts.zero import flat_run
from hf_noneuclid.momo import lower_bound
from hf_noneuclid.norms import ADAPTIVE_NORMS
from hf_noneuclid.options import LOWER_BOUND_OPTIONS, parameter_names
from hf_noneuclid.polar import compute_dtype, polar_flops

ENGINES = ("ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3")
STATE_BYTES = 4  # momentum, second moment and scalars are float32, whatever the weights are
_ZERO_ALIGNMENT = 2  # DeepSpeed's nccl_start_alignment_factor, elements a rank
_CPU = torch.device("cpu")

Grid = tuple[int, int]
"""(replicas, shards)."""


@dataclass(frozen=True)
class Shapes:
    """What is stepped, and how."""

    pieces: tuple[Piece, ...]
    options: Mapping[str, Any]
    """Of the optimizer."""

    @cached_property
    def parameters(self) -> int:
        return sum(_elements(piece) for piece in self.pieces)

    @property
    def matrices(self) -> tuple[Piece, ...]:
        return tuple(piece for piece in self.pieces if piece.stack)

    @cached_property
    def units(self) -> int:
        """Matrices and vectors."""
        return sum(piece.units for piece in self.pieces)

    @cached_property
    def matrix_units(self) -> int:
        return sum(piece.units for piece in self.matrices)

    @cached_property
    def matrix_elements(self) -> int:
        return sum(_elements(piece) for piece in self.matrices)

    @cached_property
    def adaptive_elements(self) -> int:
        """Of the parameters that keep a second moment."""
        return sum(_elements(piece) for piece in self.pieces if piece.norm in ADAPTIVE_NORMS)


def shapes_of(model: nn.Module, method: str, **options: Any) -> Shapes:
    """Routes the parameters of a model, which may be on the meta device.

    Raises:
        ValueError: The method or an option is unknown, or the model has no matrices.
    """
    groups = hf_noneuclid.create_optimizer(model, method, lr=0.0, **options).param_groups
    names = [parameter_names(group, i, len(group["params"])) for i, group in enumerate(groups)]
    holdings = [replicated.hold(group["params"]) for group in groups]
    return Shapes(tuple(make_pieces(groups, names, holdings, groups[0]["descent"])), groups[0])


def grid_of(engine: str, gpus: int, gpus_per_node: int) -> Grid:
    """How an engine arranges the GPUs.

    Raises:
        ValueError: The nodes of HSDP are not all full.
    """
    if engine == "ddp":
        return gpus, 1
    if engine != "hsdp":
        return 1, gpus
    if gpus % gpus_per_node:
        raise ValueError(f"hsdp needs full nodes: {gpus} GPUs are no multiple of {gpus_per_node} per node")
    return gpus // gpus_per_node, gpus_per_node


class Costs:
    """What every rank holds, sends and computes in one step.

    Args:
        shapes: Of the model.
        engine: One of ``ENGINES``.
        grid: (replicas, shards).
        device: Where the polar factors are computed, ``cuda`` or ``cpu``; decides their dtype.
    """

    def __init__(self, shapes: Shapes, engine: str, grid: Grid, device: str = "cuda") -> None:
        self.shapes, self.engine, self.grid = shapes, engine, grid
        self._workspace = MIB * shapes.options["workspace"]
        self._at_once = polar_batch(torch.device(device), self._workspace)
        self.direction_bytes: int = compute_dtype(torch.float32, torch.device(device)).itemsize
        runs = _runs(shapes.pieces, engine, grid[1])
        sizes = np.array([[stop - start for start, stop in runs[piece]] for piece in shapes.pieces])
        adaptive = [piece.norm in ADAPTIVE_NORMS for piece in shapes.pieces]
        self.held = np.broadcast_to(sizes.sum(0), grid)
        """Of all parameters."""
        self.second_moment = np.broadcast_to(sizes[adaptive].sum(0), grid)
        self.flat = self.held + _padding(shapes.pieces, engine, grid, sizes)
        """The tensors that a rank steps; flat partitions are padded at their end."""
        self._zeros = np.zeros(grid, dtype=np.int64)
        self.owned, self.flops, self._batch = (self._zeros.copy() for _ in range(3))
        self.momentum, self.directions = self._zeros.copy(), self._zeros.copy()
        self.gathered, self.broadcast = self._zeros.copy(), self._zeros.copy()
        ranks = Ranks(_CPU, replicas=grid[0], shards=grid[1])
        steps = shapes.options["polar_steps"]
        for batch in _matrix_batches(shapes.matrices, runs, ranks, steps, self._workspace):
            assert batch.exchange is not None
            self._add(batch.exchange._blocks, [np.array(runs[piece]) for piece in batch.pieces])

    def _add(self, blocks: Sequence[Block], runs: Sequence[np.ndarray]) -> None:
        """Counts a batch, of whose parameters each shard holds runs, of shape (shards, 2)."""
        owned, here = self._zeros.copy(), self._zeros.copy()
        by_owner: dict[tuple[int, int], list[Block]] = {}
        for block in blocks:
            parts = _overlaps(block.run, runs[block.piece])
            replica, shard = block.owner
            here[replica] += parts
            owned[block.owner] += prod(block.shape)
            self.flops[block.owner] += block.shape[0] * polar_flops(
                *block.shape[1:], self.shapes.options["polar_steps"]
            )
            self.momentum[replica] += parts
            self.momentum[block.owner] -= parts[shard]  # what stays where it is
            self.directions[block.owner] += parts.sum() - parts[shard]
            by_owner.setdefault(block.owner, []).append(block)
        shared = self._share(here)
        self.owned += owned
        self._batch = np.maximum(self._batch, self._of_batch(by_owner, owned, here, shared))

    def _share(self, here: np.ndarray) -> np.ndarray:
        """Counts what replicas hand on to each other; what it needs on each rank, in elements."""
        replicas, total, longest = self.grid[0], here.sum(axis=0), here.max(axis=0)
        padded = np.array([pads(sizes) for sizes in here.T.tolist()])
        self.gathered += np.where(padded, longest * (replicas - 1), 0)
        self.broadcast += np.where(padded, 0, self.direction_bytes * total * (replicas - 1) // replicas)
        return np.where(padded, (replicas + 1) * longest, total) * (replicas > 1)

    def _of_batch(
        self, by_owner: Mapping[Grid, list[Block]], owned: np.ndarray, here: np.ndarray, shared: np.ndarray
    ) -> np.ndarray:
        """Bytes that a batch needs at its worst moment, the polar factors that are kept not counted."""
        iterating, c = self._zeros.copy(), self.direction_bytes
        for owner, blocks in by_owner.items():
            iterating[owner] = max(
                self._iterating(group.blocks) for group in _alike(blocks, _CPU, self._at_once)
            )
        copies = self.grid[1] > 1  # of momenta; where nothing is sharded, they are used where they are
        factors = c * owned * (self.shapes.options["nuclear_norm"] != "exact")
        gathering = STATE_BYTES * copies * (here + 2 * owned)
        polar = factors + STATE_BYTES * copies * owned + iterating
        scattering = factors + c * (2 * owned + copies * here + shared + here.sum(axis=0))
        return np.maximum(np.maximum(gathering, polar), scattering)

    def _iterating(self, blocks: Sequence[Block]) -> int:
        """Of the momenta, put together and normalised, X and its successor, and two Gram matrices."""
        c = self.direction_bytes
        elements = sum(prod(block.shape) for block in blocks)
        gram = sum(block.shape[0] * min(block.shape[1:]) ** 2 for block in blocks)
        return (2 * STATE_BYTES + 2 * c) * elements + 2 * c * gram

    def state_bytes(self) -> np.ndarray:
        """The optimizer's state, of every rank."""
        options = self.shapes.options
        stale = self.shapes.matrix_units if options["nuclear_norm"] == "stale" else 0
        rule = lower_bound(*(options[name] for name in LOWER_BOUND_OPTIONS))
        momo = (1 + len(rule.initial)) * bool(options["momo"])  # running loss, what the bound remembers
        scalars = 1 + momo + stale  # step, nuclear norms
        return STATE_BYTES * (self.flat + self.second_moment + scalars)

    def kept_bytes(self) -> np.ndarray:
        """The polar factors between measuring and moving; stale norms need none after ten steps."""
        exact = self.shapes.options["nuclear_norm"] == "exact"
        return self.direction_bytes * self.owned * exact

    def workspace_bytes(self) -> np.ndarray:
        """What the worst moment of a step needs beyond the polar factors that are kept; an estimate.

        While the averages take in the gradients, a float32 copy of these and the differences, a workspace at
        a time; there are no polar factors then. Later, what a batch needs.
        """
        largest = max(_elements(piece) for piece in self.shapes.pieces)
        at_once = np.minimum(self.held, max(self._workspace // STATE_BYTES, largest))
        averaging = 2 * STATE_BYTES * at_once
        return np.maximum(self._batch, averaging - self.kept_bytes())

    def all_reduce_bytes(self) -> int:
        """Sent by each rank for the scalars of a step: a ring sends them twice, but for one share."""
        numbers = [4, self.shapes.units + 1]  # phase 0; the dual norms and ⟨p, m⟩
        if self.shapes.options["nuclear_norm"] == "stale":
            numbers.append(self.shapes.matrix_units)
        count = prod(self.grid)
        return sum(2 * STATE_BYTES * n * (count - 1) // count for n in numbers)

    def sent_bytes(self) -> dict[str, np.ndarray]:
        """What each rank sends in a step, by purpose."""
        return {
            "momentum": STATE_BYTES * self.momentum,
            "directions": self.direction_bytes * self.directions,
            "replicas": self.direction_bytes * self.gathered + self.broadcast,
            "scalars": np.full(self.grid, self.all_reduce_bytes()),
        }


def _overlaps(a: Run, runs: np.ndarray) -> np.ndarray:
    """``exchange.overlap`` with many runs at once: there are thousands of ranks times thousands of blocks."""
    return np.maximum(0, np.minimum(a[1], runs[:, 1]) - np.maximum(a[0], runs[:, 0]))


def _elements(piece: Piece) -> int:
    return prod(piece.holding.shape)


def _runs(pieces: Sequence[Piece], engine: str, shards: int) -> dict[Piece, list[Run]]:
    """The elements of each parameter that each shard holds."""
    if engine in ("zero1", "zero2"):
        return _partition(pieces, shards)
    if engine == "zero3":
        return {
            x: [flat_run(_elements(x), -(-_elements(x) // shards), s) for s in range(shards)] for x in pieces
        }
    if engine == "ddp":
        return {piece: [piece.holding.run] for piece in pieces}
    return {piece: [row_run(piece.holding.shape, s, shards) for s in range(shards)] for piece in pieces}


def _partition(pieces: Sequence[Piece], shards: int) -> dict[Piece, list[Run]]:
    """Stages 1 and 2: the parameters end to end, in the order of ``one_group``, in equal parts."""
    ends = list(accumulate(_elements(piece) for piece in pieces))
    size = _partition_size(ends[-1], shards)
    parts = [flat_run(ends[-1], size, s) for s in range(shards)]
    runs = {}
    for piece, end in zip(pieces, ends, strict=True):
        n = _elements(piece)
        within = np.clip(np.array(parts) - (end - n), 0, n)
        runs[piece] = [(int(start), int(stop)) for start, stop in within]
    return runs


def _partition_size(elements: int, shards: int) -> int:
    return -(-elements // (_ZERO_ALIGNMENT * shards)) * _ZERO_ALIGNMENT


def _padding(pieces: Sequence[Piece], engine: str, grid: Grid, sizes: np.ndarray) -> np.ndarray:
    """Elements of DeepSpeed's flat partitions that belong to no parameter."""
    elements = [_elements(piece) for piece in pieces]
    if engine in ("zero1", "zero2"):
        return np.broadcast_to(_partition_size(sum(elements), grid[1]) - sizes.sum(0), grid)
    if engine == "zero3":
        return np.broadcast_to(sum(-(-n // grid[1]) for n in elements) - sizes.sum(0), grid)
    return np.zeros(grid, dtype=np.int64)
