"""The Kronecker model of the whole Fisher, cross-layer blocks included: what the 2020 paper coarsens."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from .checks import check_choice, check_type
from .columns import CoarseSpace, RankOneSpace
from .fisher import Fisher
from .kronecker import CONVENTIONS
from .operator import Image, Operator


class KroneckerFisher(Operator):
    """All blocks ``G_lm ⊗ A_lm``, cross-layer ones included.

    Positive semi-definite, as a principal part of a Kronecker product of two Gram matrices.
    """

    semidefinite = True

    def __init__(self, F: Fisher, convention: str = "expand") -> None:
        check_type("F", F, Fisher)
        self.F, self.convention = F, check_choice("convention", convention, CONVENTIONS)
        self.partition, self.dtype, self.device = F.partition, F.dtype, F.device
        self._rows = F.rows(convention)

    @cached_property
    def _pairs(self) -> list[list[tuple[Tensor, Tensor]]]:
        return [[(a.mT @ b / self.F.N, g.mT @ h / self.F.N) for b, h in self._rows] for a, g in self._rows]

    def _apply(self, v: Tensor) -> Tensor:
        V = self.partition.matrices(v)
        rows = [sum(G @ V[m] @ A.mT for m, (A, G) in enumerate(pairs)) for pairs in self._pairs]
        return torch.cat([X.flatten(-2) for X in rows], dim=-1)

    def block(self, l: int | str, m: int | str) -> Tensor:
        A, G = self._pairs[self.partition.index(l)][self.partition.index(m)]
        return torch.kron(G, A)

    def dense(self) -> Tensor:
        self.check_dense()
        layers = range(len(self.partition))
        matrix = torch.cat([torch.cat([self.block(l, m) for m in layers], dim=1) for l in layers])
        return self._in_range(matrix, "The matrix")

    def image(self, Z: CoarseSpace) -> Image:
        return KroneckerImage(self, Z) if isinstance(Z, RankOneSpace) else super().image(Z)

    def __repr__(self) -> str:
        return self._describe("all blocks G ⊗ A", f"{self.F.N} examples × {self.F.S} vectors")


class KroneckerImage(Image):
    """``K Z`` for columns ``w uᵀ``: ``Zᵀ K Z = (αᵀα/N) ∘ (βᵀβ/N)`` with ``α = a u`` and ``β = g w``."""

    operator: KroneckerFisher

    def galerkin(self) -> Tensor:
        both = list(zip(self.operator._rows, self.Z.factors, strict=True))
        alpha = torch.cat([a @ U for (a, _), (_, U) in both], dim=1)
        beta = torch.cat([g @ W for (_, g), (W, _) in both], dim=1)
        N = self.operator.F.N
        return (alpha.T @ alpha / N) * (beta.T @ beta / N)
