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
calls. A parameter may lie in pieces on several ranks: ``partial`` of the pieces add up, and ``dual`` of
the sum is the dual norm.

References:
    M. Crawshaw, C. Modi, M. Liu, R. M. Gower, "An Exploration of Non-Euclidean Gradient Descent: Muon and
    its Many Variants", arXiv 2510.09827, 2025.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from .elementwise import Tensors, dot, dots
from .polar import PolarMethod, compute_dtype, polar_factors

VectorNormName = Literal["linf", "ada_linf", "ada_l2"]
NormName = Literal["spectral", "linf", "ada_linf", "ada_l2"]
VECTOR_NORMS: tuple[str, ...] = get_args(VectorNormName)
NORMS: tuple[str, ...] = get_args(NormName)
ADAPTIVE_NORMS = frozenset({"ada_linf", "ada_l2"})
"""The norms that need the second moment v."""


class VectorNorm(ABC):
    """A norm that is computed entry by entry.

    Every method takes several parameters as lists of tensors of any shape, float32 or float64: the momenta
    m, the second moments v (where the norm is adaptive), and rays.
    """

    @abstractmethod
    def ray(self, m: Tensors, v: Tensors) -> Tensors:
        """New tensors that point in the steepest directions, not yet of unit length."""

    @abstractmethod
    def partial(self, m: Tensors, ray: Tensors) -> Tensors:
        """One 0-d tensor per parameter; what this adds up to over a parameter's pieces, ``dual`` takes."""

    def dual(self, partial: Tensor) -> Tensor:
        """The dual norms d, from the (summed) partials stacked in one tensor of shape (parameters,)."""
        return partial

    def length(self, d: Tensor) -> Tensor:
        """How long the rays are, by the dual norms d of shape (parameters,): u is the ray divided by it."""
        return torch.ones_like(d)


class LInf(VectorNorm):
    """ℓ∞: the direction of sign descent."""

    def ray(self, m: Tensors, v: Tensors) -> Tensors:
        return torch._foreach_sign(m)

    def partial(self, m: Tensors, ray: Tensors) -> Tensors:
        return torch._foreach_norm(m, 1)


@dataclass(frozen=True, slots=True)
class AdaLInf(VectorNorm):
    """Adaptive ℓ∞: the direction of Adam."""

    eps: float = 1e-8

    def ray(self, m: Tensors, v: Tensors) -> Tensors:
        """m / a."""
        a = torch._foreach_sqrt(v)
        torch._foreach_add_(a, self.eps)
        return torch._foreach_div(m, a)

    def partial(self, m: Tensors, ray: Tensors) -> Tensors:
        return [dot(*pair) for pair in zip(m, ray, strict=True)]


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

    def direction(self, batches: Tensors) -> Tensor:
        """The polar factors of all of them in one batch, in the dtype that ``polar_factors`` computes in."""
        return polar_factors(batches, method=self.polar_method, steps=self.polar_steps)

    def dtype(self, momentum: torch.dtype, device: torch.device) -> torch.dtype:
        """The dtype that holds every direction."""
        return momentum if self.polar_method == "svd" else compute_dtype(momentum, device)

    def dual(self, batches: Tensors, direction: Tensor) -> Tensor:
        """The nuclear norms ⟨m, polar(m)⟩, of shape (matrices,)."""
        of_batches = torch.split(direction, [len(m) for m in batches])
        return torch.cat([dots(m, polar) for m, polar in zip(batches, of_batches, strict=True)])


def vector_norm(name: str, eps: float = 1e-8) -> VectorNorm:
    """The vector norm of that name; eps is the ε of a = ε + √v."""
    norms: dict[str, VectorNorm] = {"linf": LInf(), "ada_linf": AdaLInf(eps), "ada_l2": AdaL2(eps)}
    return norms[name]
