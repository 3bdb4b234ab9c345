"""What one call of a step costs: time in turn with others, polar factors, memory.

Steps are callables without arguments. Times are in seconds, memory is in bytes. A multiplication and an
addition are two operations.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from statistics import median
from time import perf_counter
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from hf_noneuclid.elementwise import Tensors
from hf_noneuclid.norms import Spectral
from hf_noneuclid.polar import compute_dtype, polar_flops

Step = Callable[[], object]

MATMUL_SIZE = {"cuda": 4096, "cpu": 1536}


def clock(device: torch.device) -> float:
    """The time in seconds, once the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def seconds_of(step: Step, device: torch.device) -> float:
    """How long one call takes."""
    start = clock(device)
    step()
    return clock(device) - start


def in_turn(steps: Mapping[str, Step], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """The seconds of each step in each round, timed A B C A B C ..., so that a slow moment slows all."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(seconds_of(step, device))
    return times


def ratio(times: Sequence[float], baseline: Sequence[float]) -> dict[str, float]:
    """``median``, ``lowest`` and ``highest`` of the quotients of two times of one round."""
    quotients = [x / y for x, y in zip(times, baseline, strict=True)]
    return {"median": median(quotients), "lowest": min(quotients), "highest": max(quotients)}


def matmul_rate(device: torch.device, rows: int) -> float:
    """Operations per second of the product of two square matrices, the median of five measurements.

    The dtype is that of the polar factors of matrices whose shorter side is ``rows``.
    """
    size, dtype = MATMUL_SIZE[device.type], compute_dtype(torch.float32, device, rows)
    x, y = torch.randn(2, size, size, device=device).to(dtype).unbind()
    products = 20 if device.type == "cuda" else 2  # so that the launch is not what is measured

    def multiply() -> None:
        for _ in range(products):
            torch.mm(x, y)

    multiply()
    seconds = median(seconds_of(multiply, device) for _ in range(5))
    return products * 2 * size**3 / seconds


def polar_cost(step: Step, device: torch.device, rounds: int = 2) -> tuple[float, int]:
    """The seconds and operations of the polar factors in a step of our optimizers, the mean of the rounds.

    Waiting for the device before and after each makes the whole step slower, so the step is not timed here.
    Operations of the singular value decomposition are not counted. Both are 0 for other optimizers.
    """
    seconds, flops, direction = 0.0, 0, Spectral.direction

    def metered(spectral: Spectral, m: Tensors, *, foreach: bool = False) -> Tensor:
        nonlocal seconds, flops
        start = clock(device)
        polar = direction(spectral, m, foreach=foreach)
        seconds += clock(device) - start
        if spectral.polar_method != "svd":
            flops += len(polar) * polar_flops(polar.shape[-2], polar.shape[-1], spectral.polar_steps)
        return polar

    with mock.patch.object(Spectral, "direction", metered):
        for _ in range(rounds):
            step()
    return seconds / rounds, flops // rounds


def peak_extra_bytes(step: Step, device: torch.device) -> int:
    """The most memory that a step holds at once beyond what was there before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    # On a CPU only the profiler sees allocations.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step()
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes: list[int] = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes, initial=0))
