"""The plan of a step: which parameters are worked on together, and which rank owns which matrix.

It is made at the first step, and made anew when parameters are added, frozen or replaced; every other step
only carries it out. ``bucket_matrices`` and ``polar_batches`` need no processes: what every rank of any grid
would hold, send and compute follows from them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor

from .buckets import Bucket, MatrixBucket, PolarBatch, Remembered, Unsharded, VectorBucket, Workplace
from .distributed import ProcessGrid, find_shards
from .distributed.agreement import gather_intervals
from .distributed.exchange import Exchange, OwnedBlock
from .distributed.ownership import make_blocks, own_matrices
from .distributed.shards import Interval
from .elementwise import CPU_CACHE, MIB, wide_dtype
from .groups import parameter_names
from .norms import ADAPTIVE_NORMS, Spectral, vector_norm
from .nuclear_norms import ExactNuclearNorm, FrobeniusNuclearNorm, NuclearNorm, StaleNuclearNorm
from .options import Options
from .parameters import LocalParameter, make_parameters
from .product_norms import ProductNorm, product_norm
from .slope import INITIAL_PACE
from .state import Memory, State

T = TypeVar("T")

CPU_POLAR_BATCH = 20 * MIB
"""Bytes of matrices whose polar factors a CPU computes at once: enough for all of its cores."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What a step needs to know."""

    options: Options
    momo: bool
    """Whether a model of the loss bounds the step size."""
    slope: bool
    """Whether the slope along the last step does."""
    grid: ProcessGrid
    ranks: int
    """The number of processes."""
    buckets: list[Bucket]
    """All buckets: matrices, vectors, and last those of frozen parameters."""
    moving: list[MatrixBucket | VectorBucket]
    """The buckets that are measured and moved."""
    units: list[int]
    """The number of units of each of these."""
    matrix_units: int
    """The number of units of all matrices, which come first."""
    matrix_names: list[str]
    """The name of each of these."""
    steps: list[Tensor]
    """The step count of each cohort, 0-d, in the state of its parameters."""
    like: Tensor
    """0, 0-d, of the dtype and device of all scalars: float64 if a parameter is, else float32."""
    eta: Tensor
    """η on the device, 0-d, the same tensor in every step."""
    scales: Tensor
    """s of every unit, of shape (units,)."""
    gradient_limits: Tensor
    """The largest entry that the gradient of each local parameter may have, of shape (local parameters,)."""
    parts: Tensor
    """The step size that every unit takes, 0 for matrices and 1 for vectors, of shape (units,)."""
    shared: dict[str, Tensor]
    """What the step size remembers, in the state of all parameters: with Momo ``running_loss`` f̄ and
    ``running_weight`` C, 0-d; with the slope ``pace``; with both also ``lower_bound_memory``, F* as far as it
    is believed; these two are 1-D."""
    product_norm: ProductNorm
    stale_norms: list[Tensor]
    """The nuclear norms of each matrix parameter, views of the state; empty unless they are stale."""


def make_plan(
    groups: Sequence[Mapping[str, Any]], given: Sequence[Sequence[Tensor | None]], state: State
) -> Plan:
    """Makes the plan of an optimizer. All ranks do it together.

    Args:
        groups: Its parameter groups.
        given: The parameters that were added to each group; engines may have replaced them since then.
        state: Its state; what is missing in it is made.

    Raises:
        RuntimeError: The parameters are sharded in a way that is not supported, differ between ranks, or
            none of them requires a gradient.
    """
    options = Options.of(groups[0])
    grid, held = _find_parameters(groups, given, options, state)
    parameters = list(held)
    is_wide = any(x.shard.tensor.dtype == torch.float64 for x in parameters)
    like = torch.zeros((), dtype=torch.float64 if is_wide else torch.float32, device=grid.device)
    memory = Memory(
        state,
        parameters,
        momo=options.momo,
        start=first_memory(options, like),
        slope=options.slope,
        stale=options.nuclear_norm == "stale",
        like=like,
    )
    matrices, vectors, frozen = _BucketMaker(options, grid, held, memory, like).make()
    buckets: list[Bucket] = [*matrices, *vectors, *frozen]
    in_matrices = [x for bucket in matrices for x in bucket.parameters]
    moving = [*in_matrices, *(x for bucket in vectors for x in bucket.parameters)]
    scales = [x.scale for x in moving for _ in range(x.units)]
    return Plan(
        options=options,
        momo=options.momo,
        slope=options.slope,
        grid=grid,
        ranks=grid.size,
        buckets=buckets,
        moving=[*matrices, *vectors],
        units=[bucket.units for bucket in (*matrices, *vectors)],
        matrix_units=sum(bucket.units for bucket in matrices),
        matrix_names=[name for x in in_matrices for name in x.unit_names()],
        steps=[step for step, _ in memory.cohorts],
        like=like,
        eta=torch.zeros_like(like),
        scales=torch.tensor(scales, dtype=like.dtype, device=like.device),
        gradient_limits=_gradient_limits([x for bucket in buckets for x in bucket.local], like),
        parts=torch.tensor([0 if x.stack else 1 for x in moving for _ in range(x.units)], device=like.device),
        shared=memory.shared,
        product_norm=product_norm(options.product_norm),
        stale_norms=[memory.nuclear_norms(x) for x in in_matrices] if options.nuclear_norm == "stale" else [],
    )


def first_memory(options: Options, like: Tensor) -> dict[str, Tensor]:
    """What the step size remembers before the first step, in tensors of the dtype and device of ``like``."""
    start = {}
    if options.momo:
        start = {"running_loss": torch.zeros_like(like), "running_weight": torch.zeros_like(like)}
    if options.momo and options.slope:
        start["lower_bound_memory"] = like.new_tensor([options.loss_lower_bound])
    if options.slope:
        start["pace"] = like.new_tensor(INITIAL_PACE).reshape(-1)
    return start


def _find_parameters(
    groups: Sequence[Mapping[str, Any]],
    given: Sequence[Sequence[Tensor | None]],
    options: Options,
    state: State,
) -> tuple[ProcessGrid, dict[LocalParameter, list[Interval]]]:
    """The processes, and the parameters of the plan with the elements that each shard holds of them."""
    names = [parameter_names(group, i, len(given[i])) for i, group in enumerate(groups)]
    grid, shards = find_shards([group["params"] for group in groups], given, names)
    parameters = [
        x
        for x in make_parameters(groups, names, shards, options.descent)
        # A frozen parameter with a history counts: its momentum decays, and the model of the loss knows it.
        if x.elements and (x.is_trained or x.shard.tensor in state)
    ]
    if not any(x.is_trained for x in parameters):
        raise RuntimeError("no parameter of the optimizer requires a gradient: there is nothing to step.")
    intervals = gather_intervals([x.name for x in parameters], [x.shard for x in parameters], grid)
    return grid, dict(zip(parameters, intervals, strict=True))


def _gradient_limits(local: Sequence[LocalParameter], like: Tensor) -> Tensor:
    # A second moment holds the square of the gradient, which must be finite, too.
    powers = [0.5 if x.norm in ADAPTIVE_NORMS else 1.0 for x in local]
    largest = torch.finfo(torch.float32).max
    return largest ** torch.tensor(powers, dtype=like.dtype, device=like.device)


class _BucketMaker:
    """Makes the buckets of one plan."""

    def __init__(
        self,
        options: Options,
        grid: ProcessGrid,
        held: Mapping[LocalParameter, Sequence[Interval]],
        memory: Memory,
        like: Tensor,
    ) -> None:
        self._options, self._grid, self._held, self._memory = options, grid, held, memory
        self._like = like
        self._workspace = int(options.workspace * MIB)
        self._spectral = Spectral(options.polar_method, options.polar_steps)

    def make(self) -> tuple[list[MatrixBucket], list[VectorBucket], list[Bucket]]:
        """The buckets of matrices, of vectors, and of frozen parameters: the order of units everywhere."""
        cohort_of = {x: i for i, (_, its) in enumerate(self._memory.cohorts) for x in its}
        trained = [x for x in cohort_of if x.is_trained]
        matrices = list(self._make_matrices([x for x in trained if x.stack], cohort_of))
        vectors: list[VectorBucket] = []
        frozen: list[Bucket] = []
        for its in _group((x for x in trained if not x.stack), cohort_of):
            norm = vector_norm(its[0].norm, self._options.eps)
            vectors.append(VectorBucket(its, *self._common(its, cohort_of[its[0]]), norm))
        for its in _group((x for x in cohort_of if not x.is_trained), cohort_of):
            frozen.append(Bucket(its, *self._common(its, cohort_of[its[0]])))
        return matrices, vectors, frozen

    def _common(self, parameters: Sequence[LocalParameter], cohort: int) -> tuple[int, Remembered, Workplace]:
        """What every bucket needs."""
        device = parameters[0].shard.tensor.device
        foreach = self._options.foreach
        is_cpu = device.type == "cpu"
        workplace = Workplace(
            like=self._like,
            chunk=min(self._workspace, CPU_CACHE) if is_cpu else self._workspace,
            foreach=not is_cpu if foreach is None else foreach,
            replica=self._grid.replica,
        )
        local = [x for x in parameters if x.shard.size]
        shards = [self._memory.second_moment_shard(x) for x in local if x.norm in ADAPTIVE_NORMS]
        states = [self._memory.of(x) for x in local]
        return cohort, Remembered(states, shards, self._options.slope), workplace

    def _make_matrices(
        self, parameters: Sequence[LocalParameter], cohort_of: Mapping[LocalParameter, int]
    ) -> Iterable[MatrixBucket]:
        grid, options = self._grid, self._options
        by_bucket = bucket_matrices(
            parameters,
            self._held,
            grid.replicas,
            grid.shards,
            options.polar_steps,
            self._workspace,
            cohort_of,
        )
        for its, blocks in by_bucket:
            dtype = wide_dtype(its[0].shard.tensor.dtype)
            exchange: Exchange | Unsharded
            if grid.size == 1:
                exchange = Unsharded(blocks, grid.device)
            else:
                held = [[self._held[x][shard] for x in its] for shard in range(grid.shards)]
                exchange = Exchange(blocks, held, grid, self._spectral.dtype(dtype, grid.device))
            polar = []
            for same in polar_batches(exchange.owned, polar_batch_bytes(grid.device, self._workspace)):
                units = [unit for i in same for unit in exchange.owned[i].units]
                polar.append(PolarBatch(same, torch.tensor(units, device=grid.device)))
            yield MatrixBucket(
                its,
                *self._common(its, cohort_of[its[0]]),
                norm=self._nuclear_norm(its),
                spectral=self._spectral,
                exchange=exchange,
                polar_batches=polar,
                reuse_gradients=options.reuse_gradients,
            )

    def _nuclear_norm(self, parameters: Sequence[LocalParameter]) -> NuclearNorm:
        grid = self._grid
        if self._options.nuclear_norm == "exact":
            return ExactNuclearNorm()
        if self._options.nuclear_norm == "frobenius":
            return FrobeniusNuclearNorm(is_counted=grid.replica == 0)
        stored = [self._memory.nuclear_norms(x) for x in parameters]
        is_missing = any(self._memory.lacks_nuclear_norms(x) for x in parameters)
        return StaleNuclearNorm(stored, is_counted=grid.coordinate == (0, 0), is_missing=is_missing)


# ---------------------------------------------------------------- what follows from shapes alone


def bucket_matrices(
    parameters: Sequence[LocalParameter],
    held: Mapping[LocalParameter, Sequence[Interval]],
    replicas: int,
    shards: int,
    polar_steps: int,
    workspace: int,
    cohort_of: Mapping[LocalParameter, int] | None = None,
) -> list[tuple[list[LocalParameter], list[OwnedBlock]]]:
    """Matrices in buckets of which a rank receives no more than the workspace, and who owns them.

    Args:
        parameters: All with the norm ``spectral``.
        held: The elements of each parameter that each shard holds.
        replicas: Rows of the grid of processes.
        shards: Its columns.
        polar_steps: Iterations of the polar factor.
        workspace: Bytes.
        cohort_of: The cohort of each parameter, if there are several; a bucket has only one.
    """
    buckets = []
    for group in _group(parameters, cohort_of or {}):
        # Sorted, so that matrices of one shape end up in one bucket and their polar factors in one batch.
        by_shape = sorted(group, key=lambda x: sorted(_stack(x)[1:]))
        # Each owner receives about one part in ``shards`` of a bucket.
        buckets += _capped(by_shape, lambda x: 4 * x.elements // shards, workspace)
    # Owners are chosen for all buckets together: the work of a step is to be even, not that of a bucket.
    flat = [x for bucket in buckets for x in bucket]
    intervals = [held[x] for x in flat]
    owners = own_matrices([_stack(x) for x in flat], intervals, replicas, shards, polar_steps)
    owners_of = dict(zip(flat, owners, strict=True))
    return [
        (bucket, make_blocks([_stack(x) for x in bucket], [owners_of[x] for x in bucket]))
        for bucket in buckets
    ]


def polar_batches(blocks: Sequence[OwnedBlock], limit: int) -> list[list[int]]:
    """The indices of a rank's blocks in batches of one shape and at most ``limit`` bytes in float32."""
    by_shape: dict[tuple[int, int], list[int]] = {}
    for i, block in enumerate(blocks):
        by_shape.setdefault(block.shape[1:], []).append(i)
    batches = []
    for _, same in sorted(by_shape.items()):
        batches += _capped(same, lambda i: 4 * prod(blocks[i].shape), limit)
    return batches


def polar_batch_bytes(device: torch.device, workspace: int) -> int:
    """Bytes of float32 matrices whose polar factors are computed at once; a larger one is alone."""
    return min(workspace, CPU_POLAR_BATCH) if device.type == "cpu" else workspace


def _stack(x: LocalParameter) -> tuple[int, int, int]:
    assert x.stack is not None
    return x.stack


def _group(
    parameters: Iterable[LocalParameter], cohort_of: Mapping[LocalParameter, int]
) -> list[list[LocalParameter]]:
    """Parameters by norm, weight decay, dtype, device and cohort."""
    groups: dict[Hashable, list[LocalParameter]] = {}
    for x in parameters:
        key = (x.norm, x.weight_decay, x.shard.tensor.dtype, x.shard.tensor.device, cohort_of.get(x))
        groups.setdefault(key, []).append(x)
    return list(groups.values())


def _capped(items: Iterable[T], size: Callable[[T], int], limit: int) -> list[list[T]]:
    """Items in lists whose sizes add up to at most the limit; an item that exceeds it is alone."""
    lists: list[list[T]] = []
    total = 0
    for item in items:
        total += size(item)
        if not lists or total > limit:
            lists.append([])
            total = size(item)
        lists[-1].append(item)
    return lists
