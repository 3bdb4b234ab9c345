"""What one call of a step costs: time in turn with others, polar factors, memory, operators, launches.

Steps are callables without arguments; times are in seconds, memory in bytes, operations in floating-point
operations (a multiplication and an addition are two).
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from statistics import fmean, median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.optim import _muon as torch_muon
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from hf_noneuclid import norms
from hf_noneuclid.polar import compute_dtype, polar_flops

Step = Callable[[], object]

MATMUL_SIZE = {"cuda": 4096, "cpu": 1536}
MOST_ROWS = 768
"""Of a matrix whose polar factor is compared with that of a singular value decomposition."""


# ------------------------------------------------------------------------------------------- time


def clock(device: torch.device) -> float:
    """Return the time in seconds when all that the device was given is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def seconds_of(step: Step, device: torch.device) -> float:
    """Return how long one call takes."""
    start = clock(device)
    step()
    return clock(device) - start


def in_turn(steps: Mapping[str, Step], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Time A B C ... A B C ..., so that a machine that slows down slows all of them.

    Returns:
        The seconds of each, a number for each round.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(seconds_of(step, device))
    return times


def ratio(times: Sequence[float], baseline: Sequence[float]) -> dict[str, float]:
    """Compare two contenders round by round.

    Args:
        times: Seconds of one, by round.
        baseline: Seconds of the other in the same rounds.

    Returns:
        ``median``, ``lowest`` and ``highest`` of the quotients, each of two times of one round.
    """
    quotients = [x / y for x, y in zip(times, baseline, strict=True)]
    return {"median": median(quotients), "lowest": min(quotients), "highest": max(quotients)}


def matmul_rate(device: torch.device, rows: int, size: int | None = None) -> dict[str, Any]:
    """Measure the product of two square matrices in the dtype that the polar factors are computed in.

    Args:
        device: Where.
        rows: The shorter side of the largest matrix of the model, which decides the dtype on a CPU.
        size: Of the square matrices.

    Returns:
        ``size``, ``dtype``, and ``flops_per_second``, the median of five measurements.
    """
    size = size or MATMUL_SIZE[device.type]
    dtype = compute_dtype(torch.float32, device, rows)
    x, y = torch.randn(2, size, size, device=device).to(dtype).unbind()
    products = 20 if device.type == "cuda" else 2  # a launch must not be what is measured

    def multiply() -> None:
        for _ in range(products):
            torch.mm(x, y)

    multiply()
    seconds = median(seconds_of(multiply, device) for _ in range(5))
    rate = products * 2 * size**3 / seconds
    return {"size": size, "dtype": _name(dtype), "flops_per_second": rate}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------------------------- polar factors


@dataclass(slots=True)
class PolarCost:
    """Of the polar factors of one step: seconds, and operations (0 by the singular value decomposition)."""

    seconds: float = 0.0
    flops: int = 0


@contextmanager
def polar_meter(device: torch.device) -> Iterator[PolarCost]:
    """Add up what the polar factors cost that our optimizers ask for in this block.

    Waiting for the device before and after each makes the whole step slower: do not time it here.
    """
    cost, plain = PolarCost(), norms.polar_factors

    def metered(batches: Sequence[Tensor], **options: Any) -> Tensor:
        start = clock(device)
        polar = plain(batches, **options)
        cost.seconds += clock(device) - start
        if options["method"] != "svd":
            cost.flops += len(polar) * polar_flops(*polar.shape[1:], options["steps"])
        return polar

    norms.polar_factors = metered
    try:
        yield cost
    finally:
        norms.polar_factors = plain


def polar_cost(step: Step, device: torch.device, rounds: int = 2) -> PolarCost:
    """Return the operations of one step's polar factors, and the median of their seconds over the rounds."""
    costs = []
    for _ in range(rounds):
        with polar_meter(device) as cost:
            step()
        costs.append(cost)
    return PolarCost(median(cost.seconds for cost in costs), costs[0].flops)


def sample(matrices: Iterable[Tensor]) -> list[Tensor]:
    """Take one matrix of each shape, wide and tall being one, cut in proportion to ``MOST_ROWS``."""
    by_shape = {tuple(sorted(m.shape)): m for m in matrices}
    return [_cut(m) for m in by_shape.values()]


def _cut(m: Tensor) -> Tensor:
    part = min(1.0, MOST_ROWS / min(m.shape))
    rows, columns = (ceil(part * size) for size in m.shape)
    return m[:rows, :columns]


def polar_errors(
    matrices: Sequence[Tensor], methods: Mapping[str, Callable[[Tensor], Tensor]]
) -> dict[str, float]:
    """Compare polar factors with those of torch's singular value decomposition in float32.

    Returns:
        For each method the mean over the matrices of ‖its factor - U Vᵀ‖_F / √n, n the shorter side: the
        root mean square by which it misses the singular value 1.
    """
    errors: dict[str, list[float]] = {name: [] for name in methods}
    for m in matrices:
        u, _, vh = torch.linalg.svd(m.float(), full_matrices=False)
        exact = u @ vh
        for name, method in methods.items():
            missed = torch.linalg.matrix_norm(method(m).float() - exact)
            errors[name].append(missed.item() / min(m.shape) ** 0.5)
    return {name: fmean(values) for name, values in errors.items()}


def torch_polar(m: Tensor) -> Tensor:
    """Return the polar factor as torch.optim.Muon computes it with its defaults."""
    coefficients = (torch_muon.DEFAULT_A, torch_muon.DEFAULT_B, torch_muon.DEFAULT_C)
    # A copy, because it works in place on what is bfloat16 already.
    return torch_muon._zeropower_via_newtonschulz(
        m.clone(), coefficients, torch_muon.DEFAULT_NS_STEPS, torch_muon.EPS
    )


# --------------------------------------------------------------------------- memory and launches


class AllocationTracker(TorchDispatchMode):
    """Counts operators, and the bytes of the storages they make, as long as those live.

    What an operator allocates and frees inside of itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0
        self.bytes = 0
        self.peak_bytes = 0
        self._known: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages((args, kwargs)):  # whoever is met as an argument first was there before
            self._known[storage] = True
        result = func(*args, **(kwargs or {}))
        self.operators += 1
        for storage in _storages(result):
            if storage not in self._known:
                self._known[storage] = True
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes()).atexit = False
        return result

    def _add(self, size: int) -> None:
        self.bytes += size
        self.peak_bytes = max(self.peak_bytes, self.bytes)


def _storages(tree: Any) -> list[Any]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def costs_of_one(step: Step, device: torch.device) -> dict[str, int]:
    """Count what cannot be counted while the time is measured.

    Returns:
        ``peak_extra_bytes`` over what was there before; on the CPU ``operators`` (views are some, too); on
        CUDA ``kernel_launches``, ``synchronisations`` and ``copies_to_host``.
    """
    if device.type == "cuda":
        return {"peak_extra_bytes": _cuda_peak(step, device), **count_calls(_cuda_calls(step, device))}
    with AllocationTracker() as tracker:
        step()
    return {"peak_extra_bytes": tracker.peak_bytes, "operators": tracker.operators}


def _cuda_peak(step: Step, device: torch.device) -> int:
    clock(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    clock(device)
    return torch.cuda.max_memory_allocated(device) - before


def _cuda_calls(step: Step, device: torch.device) -> Counter[str]:
    """By name, without those that profiling makes itself."""
    _profiled(lambda: None, device)  # the first profile of a process also sets itself up
    own, all_ = (_profiled(what, device).key_averages() for what in (lambda: None, step))
    return Counter({event.key: event.count for event in all_}) - Counter({e.key: e.count for e in own})


def count_calls(calls: Mapping[str, int]) -> dict[str, int]:
    """Sum up calls of the CUDA runtime and driver, given by name, by what they are."""
    kinds = {
        "kernel_launches": ("cudaLaunchKernel", "cuLaunchKernel"),
        "synchronisations": ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"),
        "copies_to_host": ("Memcpy DtoH",),
    }
    return {
        kind: sum(count for name, count in calls.items() if name.startswith(names))
        for kind, names in kinds.items()
    }


def write_trace(step: Step, device: torch.device, path: Path) -> None:
    """Write one step as a trace that Chrome and Perfetto show."""
    _profiled(step, device).export_chrome_trace(str(path))


def _profiled(step: Step, device: torch.device) -> profile:
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    clock(device)
    with profile(activities=activities) as trace:
        step()
        clock(device)
    return trace
