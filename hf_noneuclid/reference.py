"""The algorithm of the paper on one device, in the paper's order and symbols. Read this file first.

Non-Euclidean gradient descent gives every parameter a norm, puts these norms together in a product norm,
and steps along the steepest direction in it. Muon, Scion, PolarGrad and MuonMax are choices of three settings
(``hf_noneuclid.METHODS``). The step size is the learning rate, bounded by Momo, a model of the loss, or by
the slope, which is not in the paper (``hf_noneuclid.slope`` says why it is what it is).

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
from math import exp, log, sqrt

import torch
from torch import Tensor

TINY = 1e-300  # 0 / TINY is 0


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
    last: Tensor = field(init=False)  # the last step, per unit of its length


class ReferenceDescent:
    """One rule with 36 settings: descent, product norm, vector norm, Momo; and three nuclear norms.

    Args:
        parameters: Matrices (2-D) and vectors (any shape); ``p`` is changed in place.
        descent: ``constrained`` or ``regularized``.
        product_norm: ``linf``, ``l2`` or ``hybrid``.
        step_size: What bounds it, ``rate``, ``momo``, ``slope`` or ``momo+slope``.
        decay_at: Weights decay at τ (``step``) or, as in the paper, at η (``rate``).
        F_star: F*, a lower bound of the loss.
        first_step: Length of the first step by the slope.
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
        step_size: str = "rate",
        decay_at: str = "step",
        F_star: float = 0.0,
        first_step: float = 1e-5,
        beta: float = 0.95,
        beta2: float = 0.95,
        eps: float = 1e-8,
        nuclear_norm: str = "exact",
    ) -> None:
        self.parameters, self.descent, self.product_norm = parameters, descent, product_norm
        self.bounds, self.decay_at, self.F_star = step_size.split("+"), decay_at, F_star
        self.beta, self.beta2, self.eps, self.nuclear_norm = beta, beta2, eps, nuclear_norm
        self.f_bar: Tensor | None = None  # the running loss f̄; None before the first step
        self.weight = 1.0  # C, of f in f̄
        self.paces = Pace(first_step), Pace(first_step)  # of the matrices and of the vectors

    @torch.no_grad()
    def step(
        self, gradients: Sequence[Tensor | None], eta: float, f: float = 0.0, clipping: float = 1.0
    ) -> tuple[float, float]:
        """Takes a step with learning rate η; returns the step sizes τ of the matrices and of the vectors.

        Args:
            gradients: Of the loss f, multiplied by ``clipping``.
            eta: Learning rate η.
            f: The loss.
            clipping: In (0, 1].
        """
        for x, g in zip(self.parameters, gradients, strict=True):
            x.g = torch.zeros_like(x.p) if g is None else g

        # Averages of gradients, squared gradients and linearised losses, which start at the first value.
        is_first = self.f_bar is None
        linear = clipping * f - self._sum((x.p, x.g) for x in self.parameters)
        self.f_bar = linear if self.f_bar is None else self.beta * self.f_bar + (1 - self.beta) * linear
        self.weight = clipping if is_first else self.beta * self.weight + (1 - self.beta) * clipping
        for x in self.parameters:
            x.m = x.g.clone() if is_first else self.beta * x.m + (1 - self.beta) * x.g
            x.v = x.g.square() if is_first else self.beta2 * x.v + (1 - self.beta2) * x.g.square()

        # Of each parameter: the dual norm d of its momentum and its steepest direction u.
        for x in self.parameters:
            d, x.u = self._measure(x, is_first)
            x.d = x.s * d

        # Of all parameters: the dual norm D of everything, and the share c of each.
        D, shares = self._compose()

        # The step size τ: η, or less where the slope says so, or where the model of the loss would fall
        # below F*.
        unit = D if self.descent == "regularized" else torch.ones_like(D)  # the length of a step with τ = 1
        limit = eta / unit if "slope" in self.bounds else torch.full_like(D, eta)
        if "momo" in self.bounds:
            if f < self.F_star and "slope" in self.bounds:
                self.F_star = -1e30  # it was not a lower bound; the slope is enough
            h = self.f_bar + self._sum((x.p, x.m) for x in self.parameters) - self.weight * self.F_star
            limit = torch.minimum(limit, h.clamp(min=0) / (D * unit))
        limit = torch.where(D > 0, limit, 0)
        tau = [limit.item()] * 2
        if "slope" in self.bounds:
            lengths = self._follow_slope(shares, eta, D.item(), (limit * unit).item(), is_first)
            tau = [length / max(unit.item(), TINY) for length in lengths]

        for x, c in zip(self.parameters, shares, strict=True):
            t = tau[x.norm != "spectral"]
            x.last = c * x.s * x.u
            x.p.mul_(1 - (t if self.decay_at == "step" else eta) * x.weight_decay).sub_(t * unit * x.last)
        return tau[0], tau[1]

    def _follow_slope(
        self, shares: Tensor, eta: float, D: float, limit: float, is_first: bool
    ) -> list[float]:
        """The lengths of the steps of the matrices and of the vectors by the slope along the last step."""
        lengths = []
        for is_vector, pace in enumerate(self.paces):
            pairs = zip(self.parameters, shares, strict=True)
            part = [(x, c) for x, c in pairs if (x.norm != "spectral") == is_vector]
            slope = 0.0 if is_first else sum((x.g * x.last).sum().item() for x, _ in part)
            norm = sqrt(sum(x.g.square().sum().item() for x, _ in part))
            d = sum((c * x.d).item() for x, c in part)
            unit = D if self.descent == "regularized" else None
            lengths.append(pace.length(slope, norm, d, unit, eta, self.beta, limit))
        return lengths

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


class Pace:
    """How far the matrices, or the vectors, go by the slope along their last step.

    Args:
        first_step: Length of the first step.
    """

    def __init__(self, first_step: float) -> None:
        self.first_step, self.peak, self.norm, self.share = first_step, 0.0, 0.0, 0.0
        self.log_length: float | None = None
        self.is_growing, self.steps = True, 0
        self.mean = self.last = self.largest = self.variance = 0.0

    def length(
        self,
        slope: float,
        norm: float,
        d: float,
        D: float | None,
        eta: float,
        beta: float,
        limit: float,
    ) -> float:
        """The length of the step.

        Args:
            slope: ⟨g, u⟩ with the last step u per unit of its length.
            norm: ‖g‖ of the part.
            d: Σ c_i d_i over the part.
            D: The same over everything where the length is in proportion to it: in regularized descent.
            eta: Learning rate η.
            beta: β.
            limit: The largest length that η and Momo allow.
        """
        is_first, self.peak = self.log_length is None, max(self.peak, eta)
        self.norm = norm if is_first else beta * self.norm + (1 - beta) * norm
        unit = 1.0 if D is None else max(D / max(self.norm, TINY), TINY)
        if self.log_length is None:
            if norm == 0:
                return 0.0
            self.log_length = log(self.first_step / unit)
        elif norm > 0:
            q = slope / norm / max(d / max(self.norm, TINY), TINY)
            self.log_length += self._grow(slope / norm) if self.is_growing else self._pursue(q)
        if not is_first and self.peak > 0:
            self.log_length = min(self.log_length, log(self.peak / unit))
        full = unit * exp(self.log_length)
        support = min(1.0, 2 * norm / max(self.norm, TINY))
        length = min(support * (eta / self.peak if self.peak > 0 else 1.0) * full, limit)
        self.share = length / full
        return length

    def _grow(self, slope: float) -> float:
        """The change of the logarithm: 0.7 while the slope is what it was, a quarter when it has halved."""
        if self.steps == 0:
            self.mean = slope
        else:
            self.variance += ((slope - self.last) ** 2 / 2 - self.variance) / self.steps
            self.mean = (self.mean + slope) / 2
        self.last, self.steps = slope, self.steps + 1
        self.largest = max(self.largest, self.mean)
        noise = sqrt(self.variance)
        if self.steps > 1 and self.mean + noise < self.largest / 2:
            self.is_growing, self.mean, self.steps = False, 0.0, 0
            return log(0.25)
        return self.share * 0.7 * clip(slope / max(self.largest, noise, TINY))

    def _pursue(self, q: float) -> float:
        """The change of the logarithm towards where the slope is 0.07 D."""
        q = clip(q)
        self.mean += self.share * (q - self.mean) / 10
        self.steps += 1
        if self.mean > 0.15:
            self.steps = min(self.steps, 3)
        return 2 / (1 + self.steps) * self.share * (q - 0.07)


def clip(x: float) -> float:
    """x, at least -1 and at most 1."""
    return max(-1.0, min(1.0, x))


def polar_factor(m: Tensor) -> Tensor:
    """U Vᵀ of m = U S Vᵀ, without the directions of singular value 0."""
    u, s, vh = torch.linalg.svd(m, full_matrices=False)
    is_positive = s > s.max() * max(m.shape) * torch.finfo(m.dtype).eps
    polar: Tensor = (u * is_positive) @ vh
    return polar
