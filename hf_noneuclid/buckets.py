"""Buckets: parameters that are worked on together, because they share norm, weight decay, dtype and device.

Matrices and vectors are two kinds of bucket with the same two methods. ``measure`` gives the dual norm d of
every *unit*, a unit being a vector or one matrix of a parameter (a stack of n expert matrices has n units).
``apply`` moves the parameters along their directions. Between the two, the optimizer sums over the ranks
what each has measured, and decides how far every unit moves.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .distributed.exchange import OwnedBlock
from .distributed.shards import LocalShard
from .elementwise import (
    Tensors,
    average_,
    chunks,
    inner_product,
    largest_entries,
    move_,
    scale_,
    stack_scalars,
    wide_dtype,
)
from .norms import Spectral, VectorNorm
from .nuclear_norms import Measured, NuclearNorm, Polar
from .parameters import LocalParameter


class Workplace(NamedTuple):
    """How this rank works on the parameters of a bucket."""

    like: Tensor
    """0-d, of the dtype and device of all scalars."""
    chunk: int
    """Bytes of a chunk of elementwise work."""
    foreach: bool
    """Use few large calls and read no value."""
    replica: int
    """Row of the grid. What replicas have in common is measured by the first one."""


class Remembered(NamedTuple):
    """The state of the local parameters of a bucket.

    The dicts are read at every step, and no large tensor is held: offloading the state must free its memory.
    """

    states: list[dict[str, Tensor]]
    second_moment_shards: list[LocalShard]
    """The shards in the second moments; empty if the norm needs none."""
    slope: bool
    """Whether the last step is remembered."""


_momentum, _second_moment, _last_step = map(operator.itemgetter, ("momentum", "second_moment", "last_step"))


class MatrixExchange(Protocol):
    """Brings the matrices of a bucket to their owners, and the directions back."""

    @property
    def owned(self) -> Sequence[OwnedBlock]:
        """The blocks that this rank owns."""

    def gather(self, momenta: Sequence[Tensor]) -> list[Tensor]:
        """The owned matrices, (matrices, rows, columns) each, from the momenta of all parameters."""

    def scatter(self, factors: Sequence[Tensor]) -> Sequence[Tensor]:
        """This rank's elements of all parameters' directions, from the polar factors of owned matrices."""


class Unsharded:
    """On one device every matrix is whole, and nothing moves."""

    def __init__(self, blocks: Sequence[OwnedBlock], device: torch.device) -> None:
        self.owned, self._device = blocks, device

    def gather(self, momenta: Sequence[Tensor]) -> list[Tensor]:
        return [m.reshape(x.shape).to(self._device) for m, x in zip(momenta, self.owned, strict=True)]

    def scatter(self, factors: Sequence[Tensor]) -> Sequence[Tensor]:
        return factors


class PolarBatch(NamedTuple):
    """Owned blocks of one shape, whose polar factors are computed together."""

    blocks: list[int]
    """Indices of the owned blocks."""
    units: Tensor
    """Indices of their matrices among the units of the bucket."""


class Bucket:
    """Parameters with the same norm, weight decay, dtype and device that have seen the same number of steps.

    It is used without a subclass for frozen parameters, whose momentum still counts in the model of the loss.

    Args:
        parameters: On all ranks the same, in the same order.
        cohort: Index of the cohort that they all belong to.
        remembered: Their state.
        workplace: Where and how this rank works.
    """

    def __init__(
        self,
        parameters: Sequence[LocalParameter],
        cohort: int,
        remembered: Remembered,
        workplace: Workplace,
    ) -> None:
        self.parameters = tuple(parameters)
        self.cohort = cohort
        self.units = sum(x.units for x in parameters)
        self.weight_decay = parameters[0].weight_decay
        self._workplace, self._remembered = workplace, remembered
        # Scalars and directions are made where the collectives are; offloaded parameters are elsewhere.
        self._to_parameters = operator.methodcaller("to", parameters[0].shard.tensor.device)
        self._counts = [x.units for x in parameters]
        # The parameters of which this rank holds anything; everything below is about these.
        self.local = [x for x in parameters if x.shard.size]
        self._shards = [x.shard for x in self.local]
        self._tensors = [x.shard.tensor for x in self.local]
        self._is_whole = all(x.is_whole for x in self._shards)
        self._positions = [i for i, x in enumerate(parameters) if x.shard.size]
        self._indices = torch.tensor(self._positions, dtype=torch.int64, device=workplace.like.device)

    def _local(self, tensors: list[Tensor], shards: Sequence[LocalShard] | None = None) -> list[Tensor]:
        """This rank's elements of tensors that are laid out like the parameters."""
        if self._is_whole:
            return tensors
        return [x.local(tensor) for x, tensor in zip(shards or self._shards, tensors, strict=True)]

    def values(self) -> list[Tensor]:
        """p."""
        return self._local(self._tensors)

    def momenta(self) -> list[Tensor]:
        """m."""
        return self._local(list(map(_momentum, self._remembered.states)))

    def second_moments(self) -> list[Tensor]:
        """v; empty if the norm needs none."""
        states, shards, _ = self._remembered
        return self._local(list(map(_second_moment, states)), shards) if shards else []

    def last_steps(self) -> list[Tensor]:
        """The last step per unit of its length, up to its sign; empty if it is not remembered."""
        states, _, slope = self._remembered
        return self._local(list(map(_last_step, states))) if slope else []

    def zeros(self) -> Tensor:
        """What a rank measures that must not count, of shape (units,)."""
        return self._workplace.like.new_zeros(self.units)

    def gradients(self) -> list[Tensor]:
        """g. A missing gradient counts as zero, as it does on engines that cannot tell the two apart.

        Raises:
            RuntimeError: A gradient is sparse.
        """
        grads = []
        for parameter, tensor in zip(self.local, self._tensors, strict=True):
            grad = tensor.grad if tensor.requires_grad else None
            if grad is None:
                grads.append(torch.zeros_like(parameter.shard.local(tensor)))
                continue
            if grad.layout != torch.strided:
                raise RuntimeError(
                    f"the gradient of {parameter.name} is sparse ({grad.layout}), and no norm here is "
                    "defined for sparse gradients. Use sparse=False in its nn.Embedding."
                )
            grads.append(grad if self._is_whole else parameter.shard.local(grad))
        return grads

    def largest(self, grads: Tensors) -> Tensor:
        """The largest absolute entry of each gradient, NaN where there is one, of shape (local,)."""
        return stack_scalars(largest_entries(grads, self._workplace.foreach), self._workplace.like)

    def inner(self, others: Tensors) -> Tensor:
        """Σ⟨p, x⟩ over the parameters, 0-d."""
        return inner_product(self.values(), others, self._workplace.like, self._workplace.chunk)

    def slope(self, grads: Tensors) -> Tensor:
        """⟨g, u⟩ with the last step u, how fast the loss still falls along it, and ‖g‖², of shape (2,)."""
        like, chunk = self._workplace.like, self._workplace.chunk
        last = self.last_steps()
        return torch.stack(
            [inner_product(grads, last, like, chunk), inner_product(grads, grads, like, chunk)]
        )

    def accumulate(self, grads: Tensors, ok: Tensor, weight: Tensor, second_weight: Tensor) -> None:
        """Averages gradients into m and their squares into v.

        Args:
            grads: From ``gradients``.
            ok: 0-d, bool; nothing changes where it is False.
            weight: Of the gradients in m, 0-d.
            second_weight: Of their squares in v, 0-d.
        """
        chunk, foreach = self._workplace.chunk, self._workplace.foreach
        second_moments = self.second_moments()
        if second_moments:
            average_(second_moments, grads, second_weight, ok, limit=chunk, foreach=foreach, square=True)
        average_(self.momenta(), grads, weight, ok, limit=chunk, foreach=foreach, square=False)


class Motion(NamedTuple):
    """How the units of a bucket move."""

    coefficients: Tensor
    """What multiplies the directions, of shape (units,)."""
    per_length: Tensor
    """The same without its sign and per unit of the step's length, of shape (units,)."""
    decay_rate: Tensor
    """What multiplies the weight decay λ, 0-d."""
    ok: Tensor
    """Whether to move at all, 0-d."""


class VectorBucket(Bucket):
    """Parameters whose norm is computed entry by entry.

    Args:
        norm: Their norm; the other arguments are those of ``Bucket``.
    """

    part = 1
    """Index of the step size."""

    def __init__(
        self,
        parameters: Sequence[LocalParameter],
        cohort: int,
        remembered: Remembered,
        workplace: Workplace,
        norm: VectorNorm,
    ) -> None:
        super().__init__(parameters, cohort, remembered, workplace)
        self.norm = norm

    def measure(self, grads: Tensors) -> Measured:
        """The dual norms of the momenta."""
        if self._workplace.replica:
            return Measured(self.zeros())
        m, v = self.momenta(), self.second_moments()
        sums: dict[int, Tensor] = {}
        for indices, (m_chunk, v_chunk) in chunks(self._workplace.chunk, m, v or m):
            partials = self.norm.partial(m_chunk, self.norm.direction(m_chunk, v_chunk))
            for i, partial in zip(indices, partials, strict=True):
                sums[i] = sums[i] + partial if i in sums else partial
        partial = stack_scalars(list(sums.values()), self._workplace.like)
        if len(partial) < self.units:  # this rank holds nothing of some parameters
            partial = self.zeros().index_copy_(0, self._indices, partial)
        return Measured(partial)

    def apply(self, measured: Measured, dual: Tensor, motion: Motion) -> None:
        """p ← (1 - λ decay_rate) p + coefficient u.

        Args:
            measured: From ``measure``.
            dual: d, of shape (units,).
            motion: How far.
        """
        coefficients, per_length, decay_rate, ok = map(self._to_parameters, motion)
        if (length := self.norm.length(dual)) is not None:
            length = self._to_parameters(length)
            coefficients, per_length = coefficients / length, per_length / length
        decay = decay_rate * self.weight_decay if self.weight_decay else None
        m, v, last = self.momenta(), self.second_moments(), self.last_steps()
        columns = (self.values(), m, v or m, last or m)
        for indices, (p, m_chunk, v_chunk, last_chunk) in chunks(self._workplace.chunk, *columns):
            # The directions are computed again, since keeping them would take as much memory as m.
            directions = self.norm.direction(m_chunk, v_chunk)
            positions = [self._positions[i] for i in indices]
            move_(p, directions, [coefficients[i] for i in positions], decay, self._workplace.foreach)
            if last:
                shares = [per_length[i] for i in positions]
                scale_(last_chunk, directions, shares, ok, self._workplace.foreach)


class MatrixBucket(Bucket):
    """Matrices and stacks of matrices, measured by the spectral norm.

    Args:
        norm: How their nuclear norms are found; the first four arguments are those of ``Bucket``.
        spectral: The spectral norm.
        exchange: Makes the matrices whole on their owners.
        polar_batches: The owned matrices, by shape.
        reuse_gradients: Keep polar factors in the memory of the gradients.
    """

    part = 0
    """Index of the step size."""

    def __init__(
        self,
        parameters: Sequence[LocalParameter],
        cohort: int,
        remembered: Remembered,
        workplace: Workplace,
        *,
        norm: NuclearNorm,
        spectral: Spectral,
        exchange: MatrixExchange,
        polar_batches: Sequence[PolarBatch],
        reuse_gradients: bool,
    ) -> None:
        super().__init__(parameters, cohort, remembered, workplace)
        self.norm, self.polar_batches = norm, polar_batches
        self._spectral, self._exchange, self._reuse_gradients = spectral, exchange, reuse_gradients
        # Polar factors are computed where the scalars are, which is not where offloaded parameters are.
        self._foreach = workplace.foreach or workplace.like.device.type != "cpu"
        tensor = parameters[0].shard.tensor
        self._empty = torch.empty(0, dtype=wide_dtype(tensor.dtype), device=tensor.device)

    def measure(self, grads: Tensors) -> Measured:
        """The dual norms of the momenta: nuclear norms, or what stands for them."""
        return self.norm.measure(self, grads)

    def apply(self, measured: Measured, dual: Tensor, motion: Motion) -> Tensor:
        """p ← (1 - λ decay_rate) p + coefficient u.

        Args:
            measured: From ``measure``.
            dual: d, of shape (units,).
            motion: How far.

        Returns:
            This rank's part of the nuclear norms, of shape (units,).
        """
        polar = measured.polar or self.polar()
        directions = self._exchange.scatter(polar.factors)  # all ranks take part
        values = self.values()
        coefficients, per_length, decay_rate, ok = map(self._to_parameters, motion)
        local = [
            self._to_parameters(directions[i]).reshape(p.shape)
            for i, p in zip(self._positions, values, strict=True)
        ]
        decay = decay_rate * self.weight_decay if self.weight_decay else None
        move_(values, local, self._spread(coefficients), decay, self._workplace.foreach)
        if last := self.last_steps():
            scale_(last, local, self._spread(per_length), ok, self._workplace.foreach)
        return polar.nuclear_norms

    def polar(self, grads: Tensors | None = None) -> Polar:
        """The polar factors and nuclear norms of the matrices that this rank owns.

        Args:
            grads: The gradients, if the factors may be kept in their place.
        """
        foreach = self._foreach
        matrices = self._exchange.gather(self._for_all(self.momenta()))
        factors = list(matrices)
        norms = self._workplace.like.new_zeros(self.units)
        for blocks, units in self.polar_batches:
            m = [matrices[i] for i in blocks]
            if foreach and len(m) > 1:
                m = [torch.cat(m)]
            polar = self._spectral.direction(m, foreach=foreach)
            norms.index_copy_(0, units, self._spectral.dual(m, polar, foreach=foreach).to(norms.dtype))
            for i, factor in zip(blocks, torch.split(polar, [len(matrices[i]) for i in blocks]), strict=True):
                factors[i] = factor
        if self._reuse_gradients and grads:
            factors = self._move_into(self._for_all(list(grads)), factors)
        return Polar(factors, norms)

    def squares(self) -> Tensor:
        """‖m‖_F² of this rank's elements of each matrix, of shape (units,)."""
        momenta = zip(self.parameters, self._for_all(self.momenta()), strict=True)
        parts = [part for x, m in momenta for part in torch.split(m.reshape(-1), x.unit_sizes())]
        return stack_scalars(torch._foreach_norm(parts), self._workplace.like).square()

    def _for_all(self, tensors: list[Tensor]) -> list[Tensor]:
        """Adds an empty tensor for each parameter that this rank holds nothing of."""
        if len(tensors) == len(self.parameters):
            return tensors
        rest = iter(tensors)
        return [next(rest) if x.shard.size else self._empty for x in self.parameters]

    def _spread(self, by_unit: Tensor) -> list[Tensor]:
        """Numbers of shape (units,) in shapes that broadcast over the local parameters."""
        spread = []
        by_parameter = torch.split(by_unit, self._counts)
        for i in self._positions:
            c, x = by_parameter[i], self.parameters[i]
            if self._counts[i] == 1:
                spread.append(c.reshape(()))
            elif x.shard.flat is None:  # whole matrices of a stack
                held = [k for k, size in enumerate(x.unit_sizes()) if size]
                spread.append(c[held[0] : held[-1] + 1].reshape(-1, 1, 1))
            else:
                spread.append(torch.cat([c_k.expand(n) for c_k, n in zip(c, x.unit_sizes(), strict=True)]))
        return spread

    def _move_into(self, grads: list[Tensor], factors: list[Tensor]) -> list[Tensor]:
        """Copies polar factors into the memory of the same matrices' gradients, where it is on this rank."""
        moved = []
        for block, factor in zip(self._exchange.owned, factors, strict=True):
            grad, (first, last) = grads[block.parameter], self.parameters[block.parameter].shard.interval
            is_here = first <= block.interval[0] and block.interval[1] <= last
            is_wide = grad.is_contiguous() and grad.itemsize >= factor.itemsize
            if is_here and is_wide and grad.device == factor.device:
                memory = grad.view(-1)[block.interval[0] - first : block.interval[1] - first]
                memory = memory.view(factor.dtype)[: factor.numel()].view(factor.shape)
                factor = memory.copy_(factor)
            moved.append(factor)
        return moved
