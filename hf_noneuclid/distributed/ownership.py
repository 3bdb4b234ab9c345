"""Which rank computes the polar factor of which matrix, so that all ranks compute about as much."""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Sequence
from itertools import groupby

from ..polar import polar_flops
from .exchange import OwnedBlock
from .grid import Coordinate
from .shards import Interval, overlap

Stack = tuple[int, int, int]
"""(matrices, rows, columns) of a parameter."""

# A rank may compute this much more than its even share of the matrices that it already holds.
_TOLERANCE = 1.05
_NEARLY_ALL = 0.9


def own_matrices(
    stacks: Sequence[Stack], held: Sequence[Sequence[Interval]], replicas: int, shards: int, polar_steps: int
) -> list[list[Coordinate]]:
    """The owner of every matrix of every parameter.

    Args:
        stacks: The shape of each parameter.
        held: The elements of each parameter that each shard holds: ``held[parameter][shard]``.
        replicas: Rows of the grid of processes.
        shards: Its columns.
        polar_steps: Iterations of the polar factor, which decide the cost of a matrix.
    """
    costs: list[int] = []
    homes: list[int | None] = []
    for (count, rows, columns), intervals in zip(stacks, held, strict=True):
        holders = [(interval, s) for s, interval in enumerate(intervals) if interval[1] > interval[0]]
        costs += [polar_flops(rows, columns, polar_steps)] * count
        for i in range(count):
            matrix = (i * rows * columns, (i + 1) * rows * columns)
            homes.append(find_home(matrix, holders) if replicas == 1 else None)
    owners = iter([divmod(worker, shards) for worker in assign(costs, replicas * shards, homes)])
    return [[next(owners) for _ in range(count)] for count, _, _ in stacks]


def make_blocks(stacks: Sequence[Stack], owners: Sequence[Sequence[Coordinate]]) -> list[OwnedBlock]:
    """The blocks of a bucket: neighbouring matrices with the same owner are one block.

    Args:
        stacks: (matrices, rows, columns) of each parameter of the bucket.
        owners: The owner of each matrix of each parameter.
    """
    blocks: list[OwnedBlock] = []
    unit = 0
    for parameter, ((_, rows, columns), its_owners) in enumerate(zip(stacks, owners, strict=True)):
        first = 0
        for owner, same in groupby(its_owners):
            n = len(list(same))
            interval = (first * rows * columns, (first + n) * rows * columns)
            blocks.append(OwnedBlock(parameter, unit + first, (n, rows, columns), interval, owner))
            first += n
        unit += first
    return blocks


def assign(costs: Sequence[int], workers: int, homes: Sequence[int | None]) -> list[int]:
    """A worker for every matrix; all workers compute about as much.

    The most expensive matrix comes first. It stays at home, where moving it costs nothing, unless that
    worker has its share already; then it goes to the worker with the least work.

    Args:
        costs: One for each matrix.
        workers: How many there are.
        homes: The worker that holds most of each matrix, or None.
    """
    share = _TOLERANCE * sum(costs) / workers
    loads = [0] * workers
    idle = [(0, worker) for worker in range(workers)]
    chosen = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        while idle[0][0] != loads[idle[0][1]]:  # an entry from before that worker got more
            heapq.heappop(idle)
        least, worker = idle[0]
        home = homes[i]
        if home is not None and (loads[home] + costs[i] <= share or loads[home] == least):
            worker = home
        chosen[i] = worker
        loads[worker] += costs[i]
        heapq.heappush(idle, (loads[worker], worker))
    return chosen


def find_home(matrix: Interval, holders: Sequence[tuple[Interval, int]]) -> int | None:
    """The shard that holds nearly all of a matrix, if there is one.

    Args:
        matrix: Its elements.
        holders: The shards that hold any elements of the parameter, with these, in order.
    """
    middle = (matrix[0] + matrix[1] - 1) // 2
    i = bisect_right(holders, middle, key=lambda holder: holder[0][0]) - 1
    interval, shard = holders[i]
    return shard if overlap(matrix, interval) >= _NEARLY_ALL * (matrix[1] - matrix[0]) else None
