"""Which rank computes the polar factor of which matrix, and what that costs."""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Sequence

from .exchange import Run, overlap

# How much more than its even share a rank may compute of the matrices that it already holds.
_TOLERANCE = 1.05
_NEARLY_ALL = 0.9


def assign(costs: Sequence[int], workers: int, homes: Sequence[int | None]) -> list[int]:
    """An owner for every matrix, such that all workers compute about as much.

    The dearest matrix goes first. It stays at home, where moving it costs nothing, unless that worker has
    its share already; then it goes to the one that has least.

    Args:
        costs: One a matrix.
        workers: How many there are.
        homes: The worker that holds most of the matrix, or None.
    """
    share = _TOLERANCE * sum(costs) / workers
    loads = [0] * workers
    idle = [(0, worker) for worker in range(workers)]
    owners = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        while idle[0][0] != loads[idle[0][1]]:  # an entry from before that worker was given more
            heapq.heappop(idle)
        least, owner = idle[0]
        home = homes[i]
        if home is not None and (loads[home] + costs[i] <= share or loads[home] == least):
            owner = home
        owners[i] = owner
        loads[owner] += costs[i]
        heapq.heappush(idle, (loads[owner], owner))
    return owners


def home(unit: Run, holders: Sequence[tuple[Run, int]]) -> int | None:
    """The shard that holds nearly all of a matrix, if there is one.

    Args:
        unit: The elements of the matrix.
        holders: Which elements each shard holds that holds any, in order.
    """
    middle = (unit[0] + unit[1] - 1) // 2
    i = bisect_right(holders, middle, key=lambda holder: holder[0][0]) - 1
    run, shard = holders[i]
    return shard if overlap(unit, run) >= _NEARLY_ALL * (unit[1] - unit[0]) else None
