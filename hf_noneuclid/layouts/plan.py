"""The plan of a step: which parameter is what, what is worked on as one batch, and who owns which matrix.

It is made when the first step is taken and made anew when parameters are added, frozen or replaced; every
other step only executes it. A *unit* is one vector parameter or one matrix (a stack of n expert matrices is
n units). Tensors over units hold all matrices first, then all vectors, in the order of the batches; they are
the same on every rank, however little of a unit a rank holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from math import prod
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..elementwise import MIB, dot, widened
from ..norms import ADAPTIVE_NORMS
from ..polar import polar_flops
from .exchange import Block, Exchange, Run, make_blocks
from .ownership import assign, home
from .pieces import Piece
from .ranks import Place, Ranks

T = TypeVar("T")

CPU_BATCH = 20 * MIB
"""Bytes of matrices whose polar factors a CPU computes at once: enough for all of its cores."""


class Alike(NamedTuple):
    """Blocks of one shape, whose polar factors are computed together."""

    blocks: list[Block]
    units: Tensor
    """Their matrices' indices in the batch."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Pieces worked on together: one norm, decay, dtype and device."""

    pieces: tuple[Piece, ...]
    exchange: Exchange | None = None
    """Of matrices."""
    alike: tuple[Alike, ...] = ()
    """The matrices that this rank owns."""

    @property
    def norm(self) -> str:
        return self.pieces[0].norm

    @property
    def counts(self) -> list[int]:
        return [piece.units for piece in self.pieces]

    @property
    def units(self) -> int:
        return sum(self.counts)

    @cached_property
    def here(self) -> tuple[Piece, ...]:
        """The pieces of which this rank holds anything."""
        return tuple(piece for piece in self.pieces if piece.size)

    def spread(self, by_unit: Tensor) -> list[Tensor]:
        """Numbers of shape (units,) in shapes that broadcast over the pieces that are here."""
        by_piece = zip(self.pieces, torch.split(by_unit, self.counts), strict=True)
        return [piece.spread(x) for piece, x in by_piece if piece.size]


@dataclass(frozen=True, eq=False)
class Plan:
    """What one step does, for all parameters of the optimizer.

    ``pieces`` holds every parameter that takes part, frozen ones with a history included (their momentum
    decays, and the model of the loss knows them); ``matrices`` and ``vectors`` hold those that move.
    """

    pieces: tuple[Piece, ...]
    matrices: tuple[Batch, ...]
    vectors: tuple[Batch, ...]
    ranks: Ranks
    scales: Tensor
    """s of every unit, of shape (units,)."""
    gradient_limits: Tensor
    """The largest finite gradient entry of every piece ``here``, of shape (pieces here,)."""
    workspace: int
    """Bytes of temporary copies that a rank may make at once."""

    @property
    def device(self) -> torch.device:
        """Where the scalars are."""
        return self.scales.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the scalars: float64 if a parameter is, else float32."""
        return self.scales.dtype

    @property
    def batches(self) -> tuple[Batch, ...]:
        """In the order of the units."""
        return (*self.matrices, *self.vectors)

    @cached_property
    def here(self) -> tuple[Piece, ...]:
        """The pieces of which this rank holds anything."""
        return tuple(piece for piece in self.pieces if piece.size)

    @property
    def matrix_units(self) -> int:
        return sum(batch.units for batch in self.matrices)

    def matrix_names(self) -> list[str]:
        return [name for batch in self.matrices for piece in batch.pieces for name in piece.unit_names()]

    def scalar(self, value: Tensor | float) -> Tensor:
        """A number as a 0-d tensor. A fill, where a copy from the host would wait for the device."""
        if isinstance(value, Tensor):
            return value.detach().reshape(()).to(self.device, self.dtype, non_blocking=True)
        return torch.full((), value, dtype=self.dtype, device=self.device)

    def stack(self, scalars: Iterable[Tensor]) -> Tensor:
        """0-d tensors as one of shape (n,)."""
        scalars = list(scalars)
        if not scalars:
            return self.scales[:0]
        return torch.stack([x.to(scalars[0].device, self.dtype) for x in scalars]).to(self.device)

    def inner(self, others: Sequence[Tensor]) -> Tensor:
        """Σ⟨p, x⟩ over the pieces here, accumulated in float32 at least."""
        pairs = zip(self.here, others, strict=True)
        return self.stack(dot(widened(piece.value), widened(x)) for piece, x in pairs).sum()


def make_plan(pieces: Sequence[Piece], ranks: Ranks, polar_steps: int, workspace: int) -> Plan:
    """Batches the pieces that move, and gives every matrix an owner. All ranks make it together."""
    held = _held(pieces, ranks)
    moving = [piece for piece in pieces if piece.moves]
    matrices = _matrix_batches([x for x in moving if x.stack], held, ranks, polar_steps, workspace)
    vectors = [Batch(tuple(group)) for group in _grouped(x for x in moving if not x.stack)]
    scales = [x.scale for batch in (*matrices, *vectors) for x in batch.pieces for _ in range(x.units)]
    wide = any(piece.tensor.dtype == torch.float64 for piece in pieces)
    dtype = torch.float64 if wide else torch.float32
    # A second moment holds the square of the gradient, which must be finite too.
    powers = [0.5 if piece.norm in ADAPTIVE_NORMS else 1.0 for piece in pieces if piece.size]
    largest = torch.finfo(torch.float32).max
    return Plan(
        pieces=tuple(pieces),
        matrices=tuple(matrices),
        vectors=tuple(vectors),
        ranks=ranks,
        scales=torch.tensor(scales, dtype=dtype, device=ranks.device),
        gradient_limits=largest ** torch.tensor(powers, dtype=dtype, device=ranks.device),
        workspace=workspace,
    )


def _held(pieces: Sequence[Piece], ranks: Ranks) -> dict[Piece, list[Run]]:
    """Which run of each parameter each shard holds.

    Raises:
        RuntimeError: The ranks do not hold the same parameters, or a part of one is nowhere.
    """
    mine = [(piece.name, piece.holding.shape, piece.holding.run) for piece in pieces]
    checksum = _checksum(pieces) if ranks.replicas > 1 else 0.0
    said = ranks.agree((ranks.place, mine, checksum))
    whole = [(name, shape) for name, shape, _ in mine]
    for place, theirs, checksum in said:
        if [(name, shape) for name, shape, _ in theirs] != whole:
            raise RuntimeError(
                f"rank {place} and this one, {ranks.place}, step different parameters: {len(theirs)} and "
                f"{len(mine)}. All processes must train the same model, with the same parameters frozen."
            )
        replica = next(x for other, _, x in said if other[1] == place[1])
        if abs(checksum - replica) > 1e-6 * abs(replica):
            raise RuntimeError(
                "the parameters differ between ranks that should hold copies. Wrap the model in "
                "DistributedDataParallel (accelerate and the Trainer do) before the first step."
            )
    rows = {place[1]: [run for _, _, run in theirs] for place, theirs, _ in said}
    held = {piece: [rows[s][i] for s in range(ranks.shards)] for i, piece in enumerate(pieces)}
    for piece, runs in held.items():
        _check_cover(piece, runs)
    return held


def _checksum(pieces: Sequence[Piece]) -> float:
    return sum(piece.value.double().abs().sum().item() for piece in pieces)


def _check_cover(piece: Piece, runs: Sequence[Run]) -> None:
    end = 0
    for start, stop in (run for run in runs if run[1] > run[0]):
        if start != end:
            break
        end = stop
    if end != prod(piece.holding.shape):
        raise RuntimeError(
            f"the ranks together hold {list(runs)} of the {prod(piece.holding.shape)} elements of "
            f"{piece.name}: parts are missing, twice there or out of order. This engine is not supported."
        )


def _matrix_batches(
    pieces: Sequence[Piece], held: dict[Piece, list[Run]], ranks: Ranks, steps: int, workspace: int
) -> list[Batch]:
    batches = [batch for group in _grouped(pieces) for batch in _cut(group, ranks.shards, workspace)]
    limit = polar_batch(ranks.device, workspace)
    owners = iter(_owners([piece for batch in batches for piece in batch], held, ranks, steps))
    made = []
    for batch in batches:
        stacks = [piece.stack for piece in batch if piece.stack]
        blocks = make_blocks(stacks, [next(owners) for stack in stacks for _ in range(stack[0])])
        shards = [[held[piece][shard] for piece in batch] for shard in range(ranks.shards)]
        exchange = Exchange(blocks, shards, ranks)
        made.append(Batch(tuple(batch), exchange, tuple(_alike(exchange.owned, ranks.device, limit))))
    return made


def polar_batch(device: torch.device, workspace: int) -> int:
    """Bytes of float32 matrices whose polar factors are computed at once, unless a single one has more."""
    return min(workspace, CPU_BATCH) if device.type == "cpu" else workspace


def _alike(blocks: Iterable[Block], device: torch.device, limit: int) -> Iterator[Alike]:
    def shape(block: Block) -> tuple[int, ...]:
        return block.shape[1:]

    for _, same in groupby(sorted(blocks, key=shape), shape):
        for capped in _capped(((block, 4 * prod(block.shape)) for block in same), limit):
            units = [unit for block in capped for unit in block.units]
            yield Alike(capped, torch.tensor(units, device=device))


def _owners(
    pieces: Sequence[Piece], held: dict[Piece, list[Run]], ranks: Ranks, steps: int
) -> Iterator[Place]:
    """Who owns each matrix of all pieces."""
    costs, homes = [], []
    for piece in pieces:
        count, rows, columns = piece.stack or (0, 0, 0)
        holders = [(run, shard) for shard, run in enumerate(held[piece]) if run[1] > run[0]]
        for i in range(count):
            costs.append(polar_flops(rows, columns, steps))
            unit = (i * rows * columns, (i + 1) * rows * columns)
            homes.append(home(unit, holders) if ranks.replicas == 1 else None)
    workers = assign(costs, ranks.count, homes)
    return (divmod(worker, ranks.shards) for worker in workers)


def _grouped(pieces: Iterable[Piece]) -> list[list[Piece]]:
    groups: dict[Any, list[Piece]] = {}
    for piece in pieces:
        key = (piece.norm, piece.weight_decay, piece.tensor.dtype, piece.tensor.device)
        groups.setdefault(key, []).append(piece)
    return list(groups.values())


def _cut(pieces: Iterable[Piece], shards: int, workspace: int) -> Iterator[list[Piece]]:
    """Batches of which a rank receives no more than the workspace."""

    def shape(piece: Piece) -> list[int]:
        return sorted(piece.stack[1:] if piece.stack else ())

    sizes = ((x, 4 * prod(x.stack or ()) // shards) for x in sorted(pieces, key=shape))
    return _capped(sizes, workspace)


def _capped(sizes: Iterable[tuple[T, int]], limit: int) -> Iterator[list[T]]:
    """Items, each given with its bytes, in lists that stay within a limit; one alone may exceed it."""
    items: list[T] = []
    total = 0
    for item, size in sizes:
        total += size
        if items and total > limit:
            yield items
            items, total = [], size
        items.append(item)
    yield items
