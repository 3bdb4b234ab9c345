"""Product norms: one norm for the whole network out of the norms of its parameters.

From the dual norms d_i of the parameters a product norm makes D, the dual norm of everything, and the
share c_i that the steepest direction gives to parameter i, so that Σ c_i d_i = D:

===========  =====================================================  ==========================
name         D                                                      c_i
===========  =====================================================  ==========================
``linf``     Σ d_i                                                  1
``l2``       √(Σ d_i²)                                              d_i / D
``hybrid``   √(D_M² + D_V²),  D_M = Σ_matrices d,                   matrices D_M / D,
             D_V = √(Σ_vectors d²)                                  vectors d_k / D
===========  =====================================================  ==========================

Where D is 0, so are the shares of ``l2`` and ``hybrid``.

References:
    M. Crawshaw, C. Modi, M. Liu, R. M. Gower, "An Exploration of Non-Euclidean Gradient Descent: Muon and
    its Many Variants", arXiv 2510.09827, 2025.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

ProductNormName = Literal["linf", "l2", "hybrid"]
PRODUCT_NORMS: tuple[str, ...] = get_args(ProductNormName)


class Product(NamedTuple):
    """What a product norm makes of the dual norms of the parameters."""

    dual: Tensor
    """D, 0-d."""
    matrix_shares: Tensor
    """c_i of the matrices, of shape (matrices,)."""
    vector_shares: Tensor
    """c_i of the vectors, of shape (vectors,)."""


class ProductNorm(ABC):
    """A norm on the product of all parameter spaces."""

    @abstractmethod
    def compose(self, d_matrices: Tensor, d_vectors: Tensor) -> Product:
        """D and the shares, from the dual norms of the matrices (L,) and of the vectors (K,)."""


class LInfProduct(ProductNorm):
    """The largest norm counts: every parameter takes a full step."""

    def compose(self, d_matrices: Tensor, d_vectors: Tensor) -> Product:
        return Product(
            d_matrices.sum() + d_vectors.sum(), torch.ones_like(d_matrices), torch.ones_like(d_vectors)
        )


class L2Product(ProductNorm):
    """The Euclidean norm of all norms: steps in proportion to the dual norms."""

    def compose(self, d_matrices: Tensor, d_vectors: Tensor) -> Product:
        dual = torch.linalg.vector_norm(torch.cat([d_matrices, d_vectors]))
        return Product(dual, _share(d_matrices, dual), _share(d_vectors, dual))


class HybridProduct(ProductNorm):
    """The largest norm among the matrices, put together with the vectors by the Euclidean norm."""

    def compose(self, d_matrices: Tensor, d_vectors: Tensor) -> Product:
        d_m = d_matrices.sum()
        dual = torch.linalg.vector_norm(torch.cat([d_m.reshape(1), d_vectors]))
        return Product(dual, _share(d_m, dual).expand_as(d_matrices), _share(d_vectors, dual))


def _share(d: Tensor, dual: Tensor) -> Tensor:
    return torch.where(dual == 0, 0, d / dual)


def product_norm(name: ProductNormName) -> ProductNorm:
    """The product norm of that name."""
    return {"linf": LInfProduct(), "l2": L2Product(), "hybrid": HybridProduct()}[name]
