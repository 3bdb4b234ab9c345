"""What the optimizer remembers: m, v, f̄ and the stale nuclear norms, kept as per-parameter state.

Everything lives in the ``state`` of the parameters, as plain tensors, since that is what engines carry
through sharding and checkpoints. What the parameters share (the step count, the running loss) is one
tensor that stands in the state of each.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .layouts.plan import Piece
from .norms import ADAPTIVE_NORMS

State = MutableMapping[Tensor, dict[str, Any]]

UNSET = -1.0
"""A stale nuclear norm that has not been measured yet."""


class History:
    """The state of the parameters of one plan.

    Parameters that have seen the same number of steps form a *cohort*. Without Momo, a parameter that joins
    later starts from its own first gradient; with Momo it joins the cohort that is there, as if its
    gradient had been zero, because the running loss has been averaged without it.
    """

    def __init__(
        self,
        state: State,
        pieces: Sequence[Piece],
        *,
        momo: bool,
        stale: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._state = state
        self._pieces = tuple(pieces)
        known = [state[piece.param] for piece in pieces if piece.param in state]
        shared = known[0] if known and momo else {}
        step = shared.get("step", torch.zeros((), dtype=dtype, device=device))
        for piece in pieces:
            if piece.param not in state:
                state[piece.param] = {**_allocate(piece), "step": step}
            if stale and piece.stack and "nuclear_norm" not in state[piece.param]:
                state[piece.param]["nuclear_norm"] = _unset(piece)
        if momo:
            self._share(
                "running_loss",
                pieces,
                shared.get("running_loss", torch.zeros((), dtype=dtype, device=device)),
            )
        self._cohorts = self._by_step() if known and not momo else [self._pieces]

    def _by_step(self) -> list[tuple[Piece, ...]]:
        cohorts: dict[int, tuple[Piece, ...]] = {}
        for piece in self._pieces:
            step = int(self._state[piece.param]["step"])
            cohorts[step] = (*cohorts.get(step, ()), piece)
        return list(cohorts.values())

    @property
    def running_loss(self) -> Tensor:
        """f̄, 0-d."""
        running: Tensor = self._state[self._pieces[0].param]["running_loss"]
        return running

    def momenta(self, pieces: Sequence[Piece]) -> list[Tensor]:
        return [self._state[piece.param]["momentum"] for piece in pieces]

    def second_moments(self, pieces: Sequence[Piece]) -> list[Tensor]:
        """v of the pieces that keep one."""
        return [self._state[piece.param]["second_moment"] for piece in pieces if piece.norm in ADAPTIVE_NORMS]

    def stale_norms(self, pieces: Sequence[Piece]) -> Tensor:
        return torch.cat([self._state[piece.param]["nuclear_norm"] for piece in pieces])

    def keep_norms(self, pieces: Sequence[Piece], norms: Tensor, ok: Tensor) -> None:
        """Keeps nuclear norms, of shape (units,), for the next step."""
        for piece, norm in zip(pieces, torch.split(norms, [piece.units for piece in pieces]), strict=True):
            stale = self._state[piece.param]["nuclear_norm"]
            stale.copy_(torch.where(ok.to(stale.device), norm, stale))

    def accumulate(self, grads: Sequence[Tensor], ok: Tensor, *, momentum: float, beta2: float) -> None:
        """m and v take in the gradients, the first ones wholly; nothing changes where ok is False."""
        grad_of = dict(zip((piece.param for piece in self._pieces), grads, strict=True))
        for cohort in self._cohorts:
            step = self._step(cohort)
            m, v = self.momenta(cohort), self.second_moments(cohort)
            # A bad gradient is replaced by m before its weight 0 meets it: 0 times NaN is NaN.
            g = [
                torch.where(ok.to(x.device), grad_of[piece.param], x).to(x.dtype)
                for piece, x in zip(cohort, m, strict=True)
            ]
            adaptive = [x for piece, x in zip(cohort, g, strict=True) if piece.norm in ADAPTIVE_NORMS]
            _average(v, [x * x for x in adaptive], _weight(step, beta2, ok))
            _average(m, g, _weight(step, momentum, ok))

    def accumulate_loss(self, value: Tensor, ok: Tensor, *, momentum: float) -> None:
        """f̄ takes in f - Σ⟨p, g⟩."""
        running = self.running_loss
        # With Momo there is one cohort: that of the running loss.
        weight = _weight(self._step(self._pieces), momentum, ok)
        running.add_((torch.where(ok, value, running) - running) * weight)
        self._share("running_loss", self._pieces, running)

    def count(self, ok: Tensor) -> None:
        for cohort in self._cohorts:
            self._share("step", cohort, self._step(cohort).add_(ok))

    def _step(self, cohort: Sequence[Piece]) -> Tensor:
        step: Tensor = self._state[cohort[0].param]["step"]
        return step

    def _share(self, key: str, pieces: Sequence[Piece], value: Tensor) -> None:
        for piece in pieces:
            self._state[piece.param][key] = value


def _allocate(piece: Piece) -> dict[str, Any]:
    """Float32 at least: a bfloat16 average stands still at 0.95 of its way."""
    param = piece.param
    dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
    state = {"momentum": torch.zeros_like(param, dtype=dtype)}
    if piece.norm in ADAPTIVE_NORMS:
        state["second_moment"] = torch.zeros_like(param, dtype=dtype)
    return state


def _unset(piece: Piece) -> Tensor:
    dtype = torch.float64 if piece.param.dtype == torch.float64 else torch.float32
    return torch.full((piece.units,), UNSET, dtype=dtype, device=piece.param.device)


def _weight(step: Tensor, beta: float, ok: Tensor) -> Tensor:
    """1 at the first good step, 1 - β after it, 0 at a bad one."""
    return (1 - step).clamp(min=1 - beta) * ok


def _average(averages: list[Tensor], values: Sequence[Tensor], weight: Tensor) -> None:
    """averages += weight (values - averages)."""
    if not averages:
        return
    difference = torch._foreach_sub(list(values), averages)
    torch._foreach_mul_(difference, weight.to(averages[0].device))
    torch._foreach_add_(averages, difference)
