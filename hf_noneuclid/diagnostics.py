"""What a step reports: tensors on the device until they are read, since reading waits for the device."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .momo import NO_BOUND

FATAL_RUN = 10
"""The number of bad steps in a row after which the training has diverged."""

_STREAK, _FATAL = 0, 1
_COUNTED = ("steps", "bad_steps", "truncated_steps", "limited_steps", "zero_steps")


class DivergedError(RuntimeError):
    """The training cannot go on: ten steps in a row had a NaN or infinite loss or gradient.

    Args:
        first_step: The first of them, counted from the start of the run.
    """

    def __init__(self, first_step: int) -> None:
        super().__init__(
            "ten steps in a row had a NaN or infinite loss or gradient, the first of them step "
            f"{first_step}; none of them changed a parameter. Look for the cause in the data of that step, "
            "lower the learning rate, or train in a wider number format; the last checkpoint is sound."
        )
        self.first_step = first_step

    def __reduce__(self) -> tuple[type[DivergedError], tuple[int]]:
        return type(self), (self.first_step,)  # by default the message would be the argument


class StepCounter:
    """Counts steps by what happened to them, on the device, since the optimizer was made."""

    def __init__(self, device: torch.device) -> None:
        self._counts = torch.zeros(len(_COUNTED), dtype=torch.int64, device=device)
        self._bad = torch.zeros(2, dtype=torch.int64, device=device)

    def count(self, ok: Tensor, record: StepRecord) -> None:
        """Adds one step; ok is a 0-d bool tensor."""
        is_zero = (record.step_sizes == 0).all()
        good = torch.stack([record.truncated, record.limited, is_zero]) & ok
        self._counts += torch.cat([torch.stack([torch.ones_like(ok), ~ok]), good])
        streak = torch.where(ok, 0, self._bad[_STREAK] + 1)
        started = self._counts[0] - streak + 1
        self._bad = torch.stack([streak, torch.where(streak == FATAL_RUN, started, self._bad[_FATAL])])

    def read(self) -> dict[str, int]:
        streak, fatal = self._bad.tolist()
        counts = dict(zip(_COUNTED, self._counts.tolist(), strict=True))
        return {**counts, "consecutive_bad_steps": streak, "first_fatal_step": fatal}


@dataclass(frozen=True, slots=True)
class StepRecord:
    """The scalars of one step, and its nuclear norms, as they stood on the device."""

    lr: float
    step_sizes: Tensor
    """τ of the matrices and of the vectors, of shape (2,)."""
    truncated: Tensor
    limited: Tensor
    dual_norm: Tensor
    loss: Tensor | None
    running_loss: Tensor | None
    lower_bound: Tensor | None
    nuclear_norms: Tensor
    matrix_names: Sequence[str]

    def _read_bound(self) -> float | None:
        bound = None if self.lower_bound is None else self.lower_bound.item()
        return None if bound is None or bound <= NO_BOUND else bound

    def read(self) -> dict[str, Any]:
        nuclear = self.nuclear_norms.tolist()
        step_size, vector_step_size = self.step_sizes.tolist()
        return {
            "lr": self.lr,
            "step_size": step_size,
            "vector_step_size": vector_step_size,
            "truncated": bool(self.truncated),
            "limited": bool(self.limited),
            "dual_norm": self.dual_norm.item(),
            "loss": None if self.loss is None else self.loss.item(),
            "running_loss": None if self.running_loss is None else self.running_loss.item(),
            "loss_lower_bound": self._read_bound(),
            "nuclear_norms": dict(zip(self.matrix_names, nuclear, strict=True)),
        }


class Diagnostics:
    """What the steps so far report.

    Args:
        resumed: The run went on from a checkpoint.
    """

    def __init__(self, *, resumed: bool) -> None:
        self._record: StepRecord | None = None
        self._counter: StepCounter | None = None
        self._first: StepRecord | None = None
        self._first_is_known = resumed

    def note(self, record: StepRecord, ok: Tensor) -> None:
        """Notes one step; ok says whether it was taken."""
        if self._counter is None:
            self._counter = StepCounter(ok.device)
        self._counter.count(ok, record)
        self._record = record
        if not self._first_is_known:
            self._first, self._first_is_known = record, True

    def renew_lr(self, lr: float) -> None:
        """Replaces the learning rate of the last step."""
        if self._record is not None:
            self._record = replace(self._record, lr=lr)

    def read(self) -> dict[str, Any]:
        """The last step and all counts; empty before the first step."""
        if self._record is None or self._counter is None:
            return {}
        self._warn_of_high_bound()
        return {**self._record.read(), **self._counter.read()}

    def _warn_of_high_bound(self) -> None:
        """Warns once if the first loss was below the lower bound: then no step is ever taken."""
        first, self._first = self._first, None
        if first is None or first.loss is None or first.lower_bound is None:
            return
        loss, bound = first.loss.item(), first.lower_bound.item()
        if bound > loss:
            warnings.warn(
                f"loss_lower_bound is {bound:g}, above the first loss, {loss:g}: by this bound the loss "
                "cannot fall, so Momo takes no step. Give a bound below every loss, such as 0.0 for "
                "cross-entropy.",
                stacklevel=4,
            )
