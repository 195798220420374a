"""The Kronecker model of the whole Fisher, cross-layer blocks included: what the 2020 paper coarsens."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from .checks import check_choice, check_type
from .columns import CoarseSpace, RankOneSpace
from .fisher import Fisher
from .kronecker import CONVENTIONS
from .one_hot import OneHot, Rows, cross
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
    def _pairs(self) -> list[list[tuple[Tensor | None, Tensor]]]:
        """(A, G) of every pair of layers; None for an A that has the size of an embedding."""
        return [[(self._A(a, b), g.mT @ h / self.F.N) for b, h in self._rows] for a, g in self._rows]

    def _A(self, a: Rows, b: Rows) -> Tensor | None:
        return None if isinstance(a, OneHot) or isinstance(b, OneHot) else a.mT @ b / self.F.N

    def _apply(self, v: Tensor) -> Tensor:
        V, inputs = self.partition.matrices(v), [a for a, _ in self._rows]
        rows = [
            sum(self._times(G @ V_m, A, a, b) for (A, G), V_m, b in zip(pairs, V, inputs, strict=True))
            for pairs, a in zip(self._pairs, inputs, strict=True)
        ]
        return torch.cat([X.flatten(-2) for X in rows], dim=-1)

    def _times(self, X: Tensor, A: Tensor | None, a: Rows, b: Rows) -> Tensor:
        """``X Aᵀ`` with ``A = aᵀ b / N``."""
        if A is not None:
            return X @ A.mT
        along = (b @ X.mT).mT / self.F.N
        return a.add_product_(X.new_zeros(*X.shape[:-1], a.features), along) if isinstance(a, OneHot) else along @ a

    def block(self, l: int | str, m: int | str) -> Tensor:
        l, m = self.partition.index(l), self.partition.index(m)
        A, G = self._pairs[l][m]
        return torch.kron(G, cross(self._rows[l][0], self._rows[m][0]) / self.F.N if A is None else A)

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
