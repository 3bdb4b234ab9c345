"""What is remembered between steps: m, v, the last step, f̄ and the like, as state of the parameters.

Everything is a plain tensor in the ``state`` of a parameter, because engines carry that through sharding and
checkpoints. What all parameters share (the step count, the running loss) is one tensor in the state of each.

Where many parameters lie in one flat partition, its momentum is as long as the partition; its second moment
and its stale norms hold only the parameters that need one, one after another.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .distributed.shards import LocalShard
from .elementwise import narrow_dtype, wide_dtype
from .norms import ADAPTIVE_NORMS
from .nuclear_norms import UNSET
from .parameters import LocalParameter

State = MutableMapping[Tensor, dict[str, Any]]


class Memory:
    """The state of the parameters: found or made, once for each plan.

    Parameters that have seen the same number of steps form a *cohort*. Without Momo, a parameter that joins
    later starts from its own first gradient. With Momo it joins the only cohort, as if its gradient had been
    zero until then, because the running loss was averaged without it.

    Args:
        state: Of the optimizer; changed in place.
        parameters: Of the plan.
        momo: All parameters belong to one cohort.
        start: What all parameters share beside the step count, by key, before the first step.
        slope: Keep the last step.
        stale: Keep nuclear norms.
        like: 0-d, of the dtype and device of all scalars.
    """

    def __init__(
        self,
        state: State,
        parameters: Sequence[LocalParameter],
        *,
        momo: bool,
        start: Mapping[str, Tensor],
        slope: bool,
        stale: bool,
        like: Tensor,
    ) -> None:
        self._state = state
        self._second = _pack((x for x in parameters if x.norm in ADAPTIVE_NORMS), use_units=False)
        self._nuclear = _pack((x for x in parameters if x.stack), use_units=True)
        self._without_norms: set[Tensor] = set()
        known = [state[x.shard.tensor] for x in parameters if x.shard.tensor in state]
        for its in known:  # a checkpoint puts scalars where the parameter is, which may be offloaded
            keys = its.keys() & {"step", "nuclear_norm", *start}
            its.update({key: its[key].to(like.device) for key in keys})
        shared = known[0] if known else {}
        step = shared["step"] if shared and momo else torch.zeros_like(like)
        for x in parameters:
            self._make(x, step, slope, stale, like)
        self.cohorts = self._by_step(parameters, apart=bool(known) and not momo)
        self.shared: dict[str, Tensor] = {}
        for key, value in start.items():
            self.shared[key] = shared.get(key, value)
            for x in parameters:
                self._state[x.shard.tensor][key] = self.shared[key]

    def _make(self, x: LocalParameter, step: Tensor, slope: bool, stale: bool, like: Tensor) -> None:
        """Makes what is missing in the state of a parameter."""
        tensor = x.shard.tensor
        dtype = wide_dtype(tensor.dtype)  # in bfloat16 the change (1 - β)(g - m) soon rounds to nothing
        if tensor not in self._state:
            self._state[tensor] = {"momentum": torch.zeros_like(tensor, dtype=dtype), "step": step}
        its = self._state[tensor]
        if x in self._second and "second_moment" not in its:
            is_flat = x.shard.flat is not None
            part = tensor[: _packed_length(x, self._second)] if is_flat else tensor
            its["second_moment"] = torch.zeros_like(part, dtype=dtype)
        if slope and "last_step" not in its:
            its["last_step"] = torch.zeros_like(tensor, dtype=narrow_dtype(tensor.dtype))
        if stale and x in self._nuclear and "nuclear_norm" not in its:
            its["nuclear_norm"] = like.new_full((_packed_length(x, self._nuclear),), UNSET)
            self._without_norms.add(tensor)

    def _by_step(
        self, parameters: Sequence[LocalParameter], apart: bool
    ) -> list[tuple[Tensor, list[LocalParameter]]]:
        """The cohorts: the step count of each, a tensor that its parameters share, and the parameters."""
        members: dict[int, list[LocalParameter]] = {}
        for x in parameters:
            members.setdefault(int(self._state[x.shard.tensor]["step"]) if apart else 0, []).append(x)
        cohorts = []
        for its in members.values():
            step: Tensor = self._state[its[0].shard.tensor]["step"]
            for x in its:
                self._state[x.shard.tensor]["step"] = step
            cohorts.append((step, its))
        return cohorts

    def of(self, x: LocalParameter) -> dict[str, Any]:
        """The state of the tensor of a parameter, which other parameters may share."""
        return self._state[x.shard.tensor]

    def second_moment_shard(self, x: LocalParameter) -> LocalShard:
        """The shard of a parameter in the second moment, which holds only parameters that need one."""
        return x.shard if x.shard.flat is None else x.shard.packed(self._second[x])

    def nuclear_norms(self, x: LocalParameter) -> Tensor:
        """The stale nuclear norms of a parameter, of shape (units,), a view of the state."""
        norms: Tensor = self._state[x.shard.tensor]["nuclear_norm"]
        return norms[self._nuclear[x]]

    def lacks_nuclear_norms(self, x: LocalParameter) -> bool:
        """Whether a stale nuclear norm was not measured yet. Norms that are not new are read."""
        return x.shard.tensor in self._without_norms or bool((self.nuclear_norms(x) == UNSET).any())


def _pack(parameters: Iterable[LocalParameter], use_units: bool) -> dict[LocalParameter, slice]:
    """Where each parameter lies in a state that holds these parameters of its tensor end to end."""
    ends: dict[Tensor, int] = {}
    places: dict[LocalParameter, slice] = {}
    for x in parameters:
        start = ends.get(x.shard.tensor, 0)
        places[x] = slice(start, start + (x.units if use_units else x.shard.size))
        ends[x.shard.tensor] = places[x].stop
    return places


def _packed_length(x: LocalParameter, places: dict[LocalParameter, slice]) -> int:
    ends: list[int] = [place.stop for y, place in places.items() if y.shard.tensor is x.shard.tensor]
    return max(ends)
