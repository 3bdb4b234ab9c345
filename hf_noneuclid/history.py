"""What the optimizer remembers: m, v, f̄ and the stale nuclear norms, kept as per-parameter state.

Everything lives in the ``state`` of the parameters, as plain tensors, since that is what engines carry
through sharding and checkpoints. What the parameters share (the step count, the running loss) is one
tensor that stands in the state of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .elementwise import lerp_, lots, where
from .layouts.pieces import Piece
from .norms import ADAPTIVE_NORMS

State = MutableMapping[Tensor, dict[str, Any]]
Places = dict[Piece, slice]

_ON_DEVICE = ("step", "running_loss", "lower_bound_memory", "nuclear_norm")

UNSET = -1.0
"""A stale nuclear norm that has not been measured yet."""


class History:
    """The state of the parameters of one plan.

    Parameters that have seen the same number of steps form a *cohort*. Without Momo, a parameter that joins
    later starts from its own first gradient; with Momo it joins the cohort that is there, as if its
    gradient had been zero, because the running loss has been averaged without it.

    Where many parameters lie in one flat partition, its momentum is as long as it is, and its second moment
    and stale norms hold those of its parameters that have any, one after another.
    """

    def __init__(
        self,
        state: State,
        pieces: Sequence[Piece],
        *,
        momo: bool,
        bound_memory: Sequence[float],
        stale: bool,
        dtype: torch.dtype,
        device: torch.device,
        workspace: int,
    ) -> None:
        self._state = state
        self._workspace = workspace
        self._pieces = tuple(pieces)
        self._second = _places((x for x in pieces if x.norm in ADAPTIVE_NORMS), lambda piece: piece.size)
        self._nuclear = _places((x for x in pieces if x.stack), lambda piece: piece.units)
        known = [state[piece.tensor] for piece in pieces if piece.tensor in state]
        for its in known:  # a checkpoint puts everything where the parameter is, which may be offloaded
            its.update({key: its[key].to(device) for key in _ON_DEVICE if key in its})
        shared = known[0] if known and momo else {}
        step = shared.get("step", torch.zeros((), dtype=dtype, device=device))
        for piece in pieces:
            if piece.tensor not in state:
                state[piece.tensor] = {"momentum": _zeros_like(piece.tensor), "step": step}
            its = state[piece.tensor]
            if piece in self._second and "second_moment" not in its:
                its["second_moment"] = self._allocate_second_moment(piece)
            if stale and piece in self._nuclear and "nuclear_norm" not in its:
                length = _length(piece, self._nuclear)
                its["nuclear_norm"] = torch.full((length,), UNSET, dtype=dtype, device=device)
        starts: dict[str, Any] = {"running_loss": 0.0} if momo else {}
        if momo and bound_memory:
            starts["lower_bound_memory"] = bound_memory
        for key, start in starts.items():
            self._share(key, pieces, shared.get(key, torch.tensor(start, dtype=dtype, device=device)))
        self._cohorts = self._by_step() if known and not momo else [self._pieces]

    def _allocate_second_moment(self, piece: Piece) -> Tensor:
        if piece.holding.flat is None:
            return _zeros_like(piece.tensor)
        return _zeros_like(piece.tensor[: _length(piece, self._second)])

    def _by_step(self) -> list[tuple[Piece, ...]]:
        cohorts: dict[int, tuple[Piece, ...]] = {}
        for piece in self._pieces:
            step = int(self._state[piece.tensor]["step"])
            cohorts[step] = (*cohorts.get(step, ()), piece)
        return list(cohorts.values())

    @property
    def running_loss(self) -> Tensor:
        """f̄, 0-d."""
        running: Tensor = self._state[self._pieces[0].tensor]["running_loss"]
        return running

    @property
    def bound_memory(self) -> Tensor:
        """What the rule for the lower bound remembers, 1-D; it may be empty."""
        its, nothing = self._state[self._pieces[0].tensor], self.running_loss.reshape(1)[:0]
        memory: Tensor = its.get("lower_bound_memory", nothing)
        return memory

    def keep_bound_memory(self, memory: Tensor, ok: Tensor) -> None:
        kept = self.bound_memory
        kept.copy_(torch.where(ok, memory, kept))

    def dtype(self, piece: Piece) -> torch.dtype:
        """Of the momentum."""
        momentum: Tensor = self._state[piece.tensor]["momentum"]
        return momentum.dtype

    def momenta(self, pieces: Sequence[Piece]) -> list[Tensor]:
        """m, this rank's part."""
        return [piece.holding.part(self._state[piece.tensor]["momentum"]) for piece in pieces]

    def second_moments(self, pieces: Sequence[Piece]) -> list[Tensor]:
        """v of the pieces that keep one, this rank's part."""
        return [self._second_moment(piece) for piece in pieces if piece in self._second]

    def _second_moment(self, piece: Piece) -> Tensor:
        v: Tensor = self._state[piece.tensor]["second_moment"]
        return piece.holding.part(v) if piece.holding.flat is None else v[self._second[piece]]

    def stale_norms(self, pieces: Sequence[Piece]) -> Tensor:
        """Of shape (units,)."""
        return torch.cat([self._stale(piece) for piece in pieces])

    def _stale(self, piece: Piece) -> Tensor:
        norms: Tensor = self._state[piece.tensor]["nuclear_norm"]
        return norms[self._nuclear[piece]]

    def keep_norms(self, pieces: Sequence[Piece], norms: Tensor, ok: Tensor) -> None:
        """Keeps nuclear norms, of shape (units,), for the next step."""
        stale = [self._stale(piece) for piece in pieces]
        kept = torch.where(ok, norms, torch.cat(stale))
        torch._foreach_copy_(stale, torch.split(kept, [piece.units for piece in pieces]))

    def accumulate(self, grads: Sequence[Tensor], ok: Tensor, *, momentum: float, beta2: float) -> None:
        """m and v take in the gradients, the first ones wholly; nothing changes where ok is False.

        The gradients are those of the pieces of which this rank holds anything.
        """
        here = [piece for piece in self._pieces if piece.size]
        grad_of = dict(zip(here, grads, strict=True))
        for everywhere in self._cohorts:
            step = self._step(everywhere)
            cohort = [piece for piece in everywhere if piece.size]
            adaptive = [piece for piece in cohort if piece in self._second]
            m, v = self.momenta(cohort), self.second_moments(cohort)
            of_adaptive, of_cohort = ([grad_of[x] for x in pieces] for pieces in (adaptive, cohort))
            _average(v, of_adaptive, _weight(step, beta2, ok), ok, self._workspace, square=True)
            _average(m, of_cohort, _weight(step, momentum, ok), ok, self._workspace)

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
        step: Tensor = self._state[cohort[0].tensor]["step"]
        return step

    def _share(self, key: str, pieces: Sequence[Piece], value: Tensor) -> None:
        for piece in pieces:
            self._state[piece.tensor][key] = value


def _places(pieces: Iterable[Piece], length: Callable[[Piece], int]) -> Places:
    """Where each piece stands in the state of its tensor, which other pieces may share."""
    ends: dict[Tensor, int] = {}
    places: Places = {}
    for piece in pieces:
        start = ends.get(piece.tensor, 0)
        places[piece] = slice(start, start + length(piece))
        ends[piece.tensor] = places[piece].stop
    return places


def _length(piece: Piece, places: Places) -> int:
    """How long that state is."""
    ends: list[int] = [place.stop for other, place in places.items() if other.tensor is piece.tensor]
    return max(ends)


def _zeros_like(tensor: Tensor) -> Tensor:
    """In float32 at least: a bfloat16 average stands still at 0.95 of its way."""
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return torch.zeros_like(tensor, dtype=dtype)


def _weight(step: Tensor, beta: float, ok: Tensor) -> Tensor:
    """1 at the first good step, 1 - β after it, 0 at a bad one."""
    return (1 - step).clamp(min=1 - beta) * ok


def _average(
    averages: Sequence[Tensor],
    grads: Sequence[Tensor],
    weight: Tensor,
    ok: Tensor,
    workspace: int,
    *,
    square: bool = False,
) -> None:
    """averages += weight (grads - averages), or with their squares; nothing changes where ok is False."""
    for _, (average, grad) in lots(workspace, averages, grads):
        value = [g.to(a.dtype) for a, g in zip(average, grad, strict=True)]
        if square:
            value = [x * x for x in value]
        lerp_(average, where(ok, value, average), weight)
