"""The norms of the paper, each known through its dual norm and its steepest direction.

For a momentum m, the dual norm d = ‖m‖_* and the steepest direction u satisfy ⟨m, u⟩ = d with ‖u‖ = 1.
With a = ε + √v:

==============  ==================  =============
norm            d                   u
==============  ==================  =============
``spectral``    ‖m‖_nuclear         polar(m)
``linf``        ‖m‖₁                sign(m)
``ada_linf``    Σ m²/a              m / a
``ada_l2``      √(Σ m²/a)           m / (a d)
==============  ==================  =============

A norm scaled by 1/s has d and u both multiplied by s; that scaling is the optimizer's.

The vector norms work on lists of tensors, so that the elementwise work of a whole model is a few foreach
calls. A parameter may be sharded over several ranks: the ``partial`` of its shards add up, and ``dual`` of
the sum is the dual norm. ``hf_noneuclid.reference`` has the same formulas for one tensor.

References:
    M. Crawshaw, C. Modi, M. Liu, R. M. Gower, "An Exploration of Non-Euclidean Gradient Descent: Muon and
    its Many Variants", arXiv 2510.09827, 2025.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from .elementwise import Tensors, inner_products
from .polar import PolarMethod, compute_dtype, polar_factors

VectorNormName = Literal["linf", "ada_linf", "ada_l2"]
NormName = Literal["spectral", VectorNormName]
VECTOR_NORMS: tuple[str, ...] = get_args(VectorNormName)
NORMS: tuple[str, ...] = get_args(NormName)
ADAPTIVE_NORMS = frozenset({"ada_linf", "ada_l2"})
"""The norms that need the second moment v."""


class VectorNorm(ABC):
    """A norm that is computed entry by entry.

    Every method takes several parameters as lists of tensors of any shape, float32 or float64: the momenta
    m, the second moments v (where the norm is adaptive), and directions.
    """

    @abstractmethod
    def direction(self, m: Tensors, v: Tensors) -> Tensors:
        """New tensors that point in the steepest directions; ``length`` says how long they are."""

    @abstractmethod
    def partial(self, m: Tensors, direction: Tensors) -> Tensors:
        """One 0-d tensor for each parameter or shard of one; shards of a parameter add up."""

    def dual(self, partial: Tensor) -> Tensor:
        """The dual norms d, from the sums of the partials, of shape (parameters,)."""
        return partial

    def length(self, d: Tensor) -> Tensor | None:
        """The lengths of the directions, from the dual norms d of shape (parameters,); None for 1."""
        return None


class LInf(VectorNorm):
    """ℓ∞: the direction of sign descent."""

    def direction(self, m: Tensors, v: Tensors) -> Tensors:
        return torch._foreach_sign(m)

    def partial(self, m: Tensors, direction: Tensors) -> Tensors:
        return torch._foreach_norm(m, 1)


@dataclass(frozen=True, slots=True)
class AdaLInf(VectorNorm):
    """Adaptive ℓ∞: the direction of Adam."""

    eps: float = 1e-8

    def direction(self, m: Tensors, v: Tensors) -> Tensors:
        """m / a."""
        a = torch._foreach_sqrt(v)
        torch._foreach_add_(a, self.eps)
        return torch._foreach_div(m, a)

    def partial(self, m: Tensors, direction: Tensors) -> Tensors:
        return inner_products(m, direction)


class AdaL2(AdaLInf):
    """Adaptive ℓ2: Adam's direction, scaled to unit length in the norm √(Σ a u²)."""

    def dual(self, partial: Tensor) -> Tensor:
        return partial.sqrt()

    def length(self, d: Tensor) -> Tensor:
        # Where d is 0, so is m: any divisor but 0 gives the direction 0.
        return torch.where(d == 0, 1, d)


@dataclass(frozen=True, slots=True)
class Spectral:
    """The spectral norm of every matrix of batches of shape (matrices, rows, columns), all of one shape."""

    polar_method: PolarMethod = "polar_express"
    polar_steps: int = 5

    def direction(self, m: Tensors, *, foreach: bool | None = None) -> Tensor:
        """The polar factors of all of them in one batch, in the dtype that ``polar_factors`` computes in."""
        return polar_factors(m, method=self.polar_method, steps=self.polar_steps, foreach=foreach)

    def dtype(self, momentum: torch.dtype, device: torch.device) -> torch.dtype:
        """A dtype that holds every direction."""
        return momentum if self.polar_method == "svd" else compute_dtype(momentum, device)

    def dual(self, m: Tensors, direction: Tensor, *, foreach: bool | None = None) -> Tensor:
        """The nuclear norms ⟨m, polar(m)⟩, of shape (matrices,)."""
        if direction.device.type != "cpu" if foreach is None else foreach:
            batches = torch.split(direction, [len(x) for x in m])
            return torch.cat([(x * polar).sum(dim=(-2, -1)) for x, polar in zip(m, batches, strict=True)])
        matrices = itertools.chain.from_iterable(m)
        return torch.stack(inner_products(list(matrices), list(direction)))


def vector_norm(name: str, eps: float = 1e-8) -> VectorNorm:
    """The vector norm of that name.

    Args:
        name: One of ``VECTOR_NORMS``.
        eps: ε of a = ε + √v, where the norm is adaptive.
    """
    norms: dict[str, VectorNorm] = {"linf": LInf(), "ada_linf": AdaLInf(eps), "ada_l2": AdaL2(eps)}
    return norms[name]
