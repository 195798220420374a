"""Kronecker factors: what K-FAC keeps of every layer, and the small products that they are made of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import inf

import torch
from torch import Tensor

from .operator import Eigen, psd_eigen
from .partition import Partition

CONVENTIONS = ("expand", "reduce")


@dataclass(frozen=True, eq=False)
class KroneckerFactors:
    """``A_l`` (features, features) and ``G_l`` (out, out) of every layer, with block ``G_l ⊗ A_l``."""

    partition: Partition
    A: tuple[Tensor, ...]
    G: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        for what, factors, sizes in (
            ("A", self.A, [layer.features for layer in self.partition.layers]),
            ("G", self.G, [layer.out for layer in self.partition.layers]),
        ):
            shapes, expected = [tuple(X.shape) for X in factors], [(n, n) for n in sizes]
            if shapes != expected:
                raise ValueError(f"Factors {what} must have shapes {expected}, one per layer; got {shapes}.")

    @property
    def dtype(self) -> torch.dtype:
        return self.A[0].dtype

    @property
    def device(self) -> torch.device:
        return self.A[0].device

    @cached_property
    def eigen_A(self) -> tuple[Eigen, ...]:
        return self._eigen("A")

    @cached_property
    def eigen_G(self) -> tuple[Eigen, ...]:
        return self._eigen("G")

    def _eigen(self, which: str) -> tuple[Eigen, ...]:
        factors = zip(getattr(self, which), self.partition.names, strict=True)
        return tuple(psd_eigen(X, f"Factor {which} of layer {name!r}") for X, name in factors)

    @cached_property
    def pi(self) -> tuple[float, ...]:
        """``π = √((tr A / dim A) / (tr G / dim G))`` per layer, 1 where a trace is 0 (Martens and Grosse, 6.3)."""
        means = torch.stack(
            [torch.stack([A.trace() / len(A), G.trace() / len(G)]) for A, G in zip(self.A, self.G, strict=True)]
        )
        return tuple((a / g) ** 0.5 if a > 0 and g > 0 and 0 < a / g < inf else 1.0 for a, g in means.tolist())


def kron_block(left: Tensor, right: Tensor) -> Tensor:
    """Rearrange ``left`` (o·p, n) and ``right`` (n, i·j), contracted over n, into a block (o·i, p·j)."""
    (o, p), (i, j) = left.shape[1:], right.shape[1:]
    product = left.flatten(1).T @ right.flatten(1)
    return product.view(o, p, i, j).transpose(1, 2).reshape(o * i, p * j)


@lru_cache(maxsize=64)
def upper_pairs(n: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and columns of the upper triangle of an n×n matrix, and for each of its n² entries the number in there."""
    rows, cols = torch.triu_indices(n, n, device=device)
    where = torch.empty(n, n, dtype=torch.long, device=device)
    where[rows, cols] = where[cols, rows] = torch.arange(len(rows), device=device)
    return rows, cols, where.flatten()


def sandwich(left: Tensor, V: Tensor, right: Tensor) -> Tensor:
    """``left V rightᵀ = (left ⊗ right) vec V`` for V (out, features, k), column by column."""
    return (left @ V.permute(2, 0, 1) @ right.mT).permute(1, 2, 0)


def directional(a: Tensor, g: Tensor, V: Tensor) -> Tensor:
    """``Σ_t g[s,n,t]ᵀ V a[n,t]`` for one layer's captured vectors and V (out, features, k): (S, N, k)."""
    if V.shape[2] == 1:  # without the batched products that einsum needs
        return (g * (a @ V[..., 0].mT)).sum((2, 3))[..., None]
    return torch.einsum("snto,ntok->snk", g, torch.einsum("nti,oik->ntok", a, V))
