"""What one call of a step costs: time in turn with others, polar factors, memory, operators, launches.

Steps are callables without arguments. Times are in seconds, memory is in bytes. A multiplication and an
addition are two operations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from math import ceil
from operator import itemgetter
from statistics import fmean, median
from time import perf_counter
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.optim import _muon as torch_muon
from torch.profiler import ProfilerActivity, profile

from hf_noneuclid.elementwise import Tensors
from hf_noneuclid.norms import Spectral
from hf_noneuclid.polar import compute_dtype, polar_flops

Step = Callable[[], object]

MATMUL_SIZE = {"cuda": 4096, "cpu": 1536}
MOST_ROWS = 768
"""Of a matrix whose polar factor is compared with that of a singular value decomposition."""
CUDA_CALLS = {
    "kernel_launches": ("cudaLaunchKernel", "cuLaunchKernel"),
    "synchronisations": ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"),
    "copies_to_host": ("Memcpy DtoH",),
}
"""How the names of calls begin in a profile."""

# ---------------------------------------------------------------- time


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
    """Times A B C ... A B C ..., so that a machine that slows down slows all of them.

    Returns:
        The seconds of each, a number for each round.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(seconds_of(step, device))
    return times


def ratio(times: Sequence[float], baseline: Sequence[float]) -> dict[str, float]:
    """Compares the seconds of two contenders round by round.

    Returns:
        ``median``, ``lowest`` and ``highest`` of the quotients, each of two times of one round.
    """
    quotients = [x / y for x, y in zip(times, baseline, strict=True)]
    return {"median": median(quotients), "lowest": min(quotients), "highest": max(quotients)}


def matmul_rate(device: torch.device, rows: int) -> dict[str, Any]:
    """Measures the product of two square matrices in the dtype that polar factors are computed in.

    Args:
        device: Where.
        rows: The shorter side of the largest matrix of the model, which decides the dtype on a CPU.

    Returns:
        ``size``, ``dtype``, and ``flops_per_second``, the median of five measurements.
    """
    size, dtype = MATMUL_SIZE[device.type], compute_dtype(torch.float32, device, rows)
    x, y = torch.randn(2, size, size, device=device).to(dtype).unbind()
    products = 20 if device.type == "cuda" else 2  # so that the launch is not what is measured

    def multiply() -> None:
        for _ in range(products):
            torch.mm(x, y)

    multiply()
    seconds = median(seconds_of(multiply, device) for _ in range(5))
    name = str(dtype).removeprefix("torch.")
    return {"size": size, "dtype": name, "flops_per_second": products * 2 * size**3 / seconds}


# ---------------------------------------------------------------- polar factors


def polar_cost(step: Step, device: torch.device, rounds: int = 2) -> tuple[float, int]:
    """The seconds and operations of the polar factors in a step of our optimizers, the mean of the rounds.

    Waiting for the device before and after each makes the whole step slower, so the step is not timed here.
    Operations of the singular value decomposition are not counted.
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


def sample(matrices: Iterable[Tensor]) -> list[Tensor]:
    """One matrix of each shape, not larger than ``MOST_ROWS``; wide and tall count as the same shape."""
    chosen = []
    for m in {tuple(sorted(m.shape)): m for m in matrices}.values():
        part = min(1.0, MOST_ROWS / min(m.shape))
        chosen.append(m[: ceil(part * m.shape[0]), : ceil(part * m.shape[1])])
    return chosen


def polar_errors(
    matrices: Sequence[Tensor], methods: Mapping[str, Callable[[Tensor], Tensor]]
) -> dict[str, float]:
    """Compares polar factors with those of torch's singular value decomposition in float32.

    Returns:
        For each method the mean over the matrices of ‖its factor - U Vᵀ‖_F / √n, n the shorter side: the
        root mean square by which it misses the singular value 1.
    """
    errors: dict[str, list[float]] = {name: [] for name in methods}
    for m in matrices:
        u, _, vh = torch.linalg.svd(m.float(), full_matrices=False)
        for name, method in methods.items():
            missed = torch.linalg.matrix_norm(method(m).float() - u @ vh)
            errors[name].append(missed.item() / min(m.shape) ** 0.5)
    return {name: fmean(values) for name, values in errors.items()}


def torch_polar(m: Tensor) -> Tensor:
    """The polar factor as torch.optim.Muon computes it with its defaults."""
    coefficients = (torch_muon.DEFAULT_A, torch_muon.DEFAULT_B, torch_muon.DEFAULT_C)
    # A copy, because it works in place on what is bfloat16 already.
    return torch_muon._zeropower_via_newtonschulz(
        m.clone(), coefficients, torch_muon.DEFAULT_NS_STEPS, torch_muon.EPS
    )


# ---------------------------------------------------------------- memory and launches


def costs_of_one(step: Step, device: torch.device) -> dict[str, int]:
    """Counts what cannot be counted while the time is measured.

    Returns:
        ``peak_extra_bytes`` over what was there before; on the CPU ``operators``, views included; on CUDA
        ``kernel_launches``, ``synchronisations`` and ``copies_to_host``.
    """
    if device.type != "cuda":
        trace = _profiled(step, device)
        events = trace.profiler.kineto_results.events()
        changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
        changes.sort(key=itemgetter(0))
        return {
            "peak_extra_bytes": max(accumulate((size for _, size in changes), initial=0)),
            "operators": sum(map(_is_operator, trace.events())),
        }
    clock(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    clock(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    # The first profile of a process also sets itself up; the second has only the calls of profiling itself.
    traces = [_profiled(what, device) for what in (lambda: None, lambda: None, step)]
    _, own, calls = (Counter({e.key: e.count for e in trace.key_averages()}) for trace in traces)
    return {"peak_extra_bytes": peak, **count_calls(calls - own)}


def _is_operator(event: Any) -> bool:
    """Whether an event of a profile is an operator that no other operator has called."""
    parent = event.cpu_parent
    return event.key.startswith("aten::") and not (parent and parent.key.startswith("aten::"))


def count_calls(calls: Mapping[str, int]) -> dict[str, int]:
    """Sums calls of the CUDA runtime and driver, given by name, by what they are."""
    return {
        kind: sum(count for name, count in calls.items() if name.startswith(beginnings))
        for kind, beginnings in CUDA_CALLS.items()
    }


def _profiled(step: Step, device: torch.device) -> Any:
    is_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    clock(device)
    with profile(activities=activities, profile_memory=not is_cuda) as trace:
        step()
        clock(device)
    return trace
