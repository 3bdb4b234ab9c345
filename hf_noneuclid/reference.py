"""The algorithm of the paper on one device, in the paper's order and symbols. Read this file first.

Non-Euclidean gradient descent gives every parameter a norm, puts these norms together in a product norm,
and steps along the steepest direction in it. Momo truncates the step size by a model of the loss. Muon,
Scion, PolarGrad and MuonMax are choices of three settings (``hf_noneuclid.METHODS``).

Nothing here is fast, sharded or safe: ``hf_noneuclid.NonEuclideanDescent`` is, and is tested against this.

References:
    M. Crawshaw, C. Modi, M. Liu, R. M. Gower, "An Exploration of Non-Euclidean Gradient Descent: Muon and
    its Many Variants", arXiv 2510.09827, 2025.
    F. Schaipp, R. Ohana, M. Eickenberg, A. Defazio, R. M. Gower, "MoMo: Momentum Models for Adaptive
    Learning Rates", arXiv 2305.07583, 2024.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Parameter:
    """A matrix W (its norm is ``spectral``) or a vector θ, and what the algorithm knows of it."""

    p: Tensor
    norm: str
    s: float = 1.0  # the norm is divided by s
    weight_decay: float = 0.0  # λ
    g: Tensor = field(init=False)  # gradient
    m: Tensor = field(init=False)  # momentum
    v: Tensor = field(init=False)  # second moment
    d: Tensor = field(init=False)  # dual norm of m
    u: Tensor = field(init=False)  # steepest direction
    nuclear: Tensor = field(init=False)  # nuclear norm of m, kept for the next step


class ReferenceDescent:
    """One rule with 36 settings: descent, product norm, vector norm, Momo; and three nuclear norms.

    Args:
        parameters: Matrices (2-D) and vectors (any shape); ``p`` is changed in place.
        descent: ``constrained`` or ``regularized``.
        product_norm: ``linf``, ``l2`` or ``hybrid``.
        momo: Truncate the step size.
        F_star: F*, a lower bound of the loss.
        beta: β, of the momentum m and of the running loss f̄.
        beta2: β₂, of the second moment v.
        eps: ε in a = ε + √v.
        nuclear_norm: ``exact``, ``stale`` or ``frobenius``.
    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        *,
        descent: str,
        product_norm: str,
        momo: bool = False,
        F_star: float = 0.0,
        beta: float = 0.95,
        beta2: float = 0.95,
        eps: float = 1e-8,
        nuclear_norm: str = "exact",
    ) -> None:
        self.parameters, self.descent, self.product_norm = parameters, descent, product_norm
        self.momo, self.F_star, self.nuclear_norm = momo, F_star, nuclear_norm
        self.beta, self.beta2, self.eps = beta, beta2, eps
        self.f_bar: Tensor | None = None  # the running loss f̄; None before the first step

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor | None], eta: float, f: float = 0.0) -> float:
        """Takes a step with learning rate η from gradients of the loss f; returns the step size τ."""
        for x, g in zip(self.parameters, gradients, strict=True):
            x.g = torch.zeros_like(x.p) if g is None else g

        # Averages of gradients, squared gradients and linearised losses, which start at the first value.
        is_first = self.f_bar is None
        linear = f - self._sum((x.p, x.g) for x in self.parameters)
        self.f_bar = linear if self.f_bar is None else self.beta * self.f_bar + (1 - self.beta) * linear
        for x in self.parameters:
            x.m = x.g.clone() if is_first else self.beta * x.m + (1 - self.beta) * x.g
            x.v = x.g.square() if is_first else self.beta2 * x.v + (1 - self.beta2) * x.g.square()

        # Of each parameter: the dual norm d of its momentum and its steepest direction u.
        for x in self.parameters:
            d, x.u = self._measure(x, is_first)
            x.d = x.s * d

        # Of all parameters: the dual norm D of everything, and the share c of each.
        D, shares = self._compose()

        # The step size τ: η, or less where the model of the loss would fall below F*.
        length = D if self.descent == "regularized" else torch.ones_like(D)
        tau = torch.full_like(D, eta)
        if self.momo:
            h = self.f_bar - self.F_star + self._sum((x.p, x.m) for x in self.parameters)
            tau = torch.minimum(tau, h.clamp(min=0) / (D * length))
        tau = torch.where(D == 0, 0, tau)

        for x, c in zip(self.parameters, shares, strict=True):
            x.p.mul_(1 - eta * x.weight_decay).sub_(tau * length * c * x.s * x.u)
        return tau.item()

    def _measure(self, x: Parameter, is_first: bool) -> tuple[Tensor, Tensor]:
        """The dual norm and the steepest direction of the momentum of a parameter, where s = 1."""
        m, a = x.m, self.eps + x.v.sqrt()
        if x.norm == "linf":
            return m.abs().sum(), m.sign()
        if x.norm == "ada_linf":
            return (m.square() / a).sum(), m / a
        if x.norm == "ada_l2":
            d = (m.square() / a).sum().sqrt()
            return d, torch.where(d == 0, 0, m / (a * d))
        polar = polar_factor(m)
        now = (m * polar).sum()
        before, x.nuclear = now if is_first else x.nuclear, now
        return {"exact": now, "stale": before, "frobenius": m.norm()}[self.nuclear_norm], polar

    def _compose(self) -> tuple[Tensor, Tensor]:
        """D and the shares c_i from the dual norms d_i."""
        d = torch.stack([x.d for x in self.parameters])
        is_matrix = torch.tensor([x.norm == "spectral" for x in self.parameters])
        if self.product_norm == "linf":
            return d.sum(), torch.ones_like(d)
        if self.product_norm == "l2":
            D = d.norm()
            return D, torch.where(D == 0, 0, d / D)
        D_matrices = d[is_matrix].sum()
        D = torch.hypot(D_matrices, d[~is_matrix].norm())
        return D, torch.where(D == 0, 0, torch.where(is_matrix, D_matrices, d) / D)

    def _sum(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """Σ⟨x, y⟩."""
        return torch.stack([(x * y).sum() for x, y in pairs]).sum()


def polar_factor(m: Tensor) -> Tensor:
    """U Vᵀ of m = U S Vᵀ, without the directions of singular value 0."""
    u, s, vh = torch.linalg.svd(m, full_matrices=False)
    is_positive = s > s.max() * max(m.shape) * torch.finfo(m.dtype).eps
    polar: Tensor = (u * is_positive) @ vh
    return polar
