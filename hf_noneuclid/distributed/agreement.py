"""What every shard holds of every parameter, and whether all ranks train the same model."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from .grid import ProcessGrid
from .shards import Interval, LocalShard


def gather_intervals(
    names: Sequence[str], local: Sequence[LocalShard], grid: ProcessGrid
) -> list[list[Interval]]:
    """The elements of each parameter that each shard holds: ``[parameter][shard]``. All ranks call it.

    Args:
        names: Of the parameters.
        local: This rank's shards of them.
        grid: The processes.

    Raises:
        RuntimeError: The ranks do not train the same parameters, replicas differ, or elements are missing.
    """
    mine = [(name, x.shape, x.interval) for name, x in zip(names, local, strict=True)]
    # Shards of one replica differ anyway; only copies can be compared.
    copies = local if grid.replicas > 1 else []
    my_checksum = sum(x.local(x.tensor).double().abs().sum().item() for x in copies)
    gathered = grid.gather_objects((grid.coordinate, mine, my_checksum))
    expected = [(name, shape) for name, shape, _ in mine]
    for coordinate, theirs, checksum in gathered:
        if [(name, shape) for name, shape, _ in theirs] != expected:
            raise RuntimeError(
                f"rank {coordinate} and this one, {grid.coordinate}, step different parameters: "
                f"{len(theirs)} and {len(mine)}. All processes must train the same model, with the same "
                "parameters frozen."
            )
        replica = next(x for other, _, x in gathered if other[1] == coordinate[1])
        if abs(checksum - replica) > 1e-6 * abs(replica):
            raise RuntimeError(
                "the parameters differ between ranks that should hold copies. Wrap the model in "
                "DistributedDataParallel (accelerate and the Trainer do) before the first step."
            )
    by_shard = {coordinate[1]: [interval for *_, interval in theirs] for coordinate, theirs, _ in gathered}
    held = [[by_shard[s][i] for s in range(grid.shards)] for i in range(len(mine))]
    for name, shard, intervals in zip(names, local, held, strict=True):
        _check_cover(name, prod(shard.shape), intervals)
    return held


def _check_cover(name: str, elements: int, intervals: Sequence[Interval]) -> None:
    end = 0
    for start, stop in [x for x in intervals if x[1] > x[0]]:
        if start != end:
            break
        end = stop
    if end != elements:
        raise RuntimeError(
            f"the ranks together hold {list(intervals)} of the {elements} elements of {name}: elements are "
            "missing, held twice or out of order. This engine is not supported."
        )
