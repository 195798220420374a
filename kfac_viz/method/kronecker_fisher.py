"""The Kronecker model of the whole Fisher, cross-layer blocks included: what the 2020 paper coarsens."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from .checks import check_choice, check_type
from .columns import CoarseSpace, RankOneSpace
from .fisher import Fisher, between
from .kronecker import CONVENTIONS
from .one_hot import OneHot, Rows
from .operator import Operator


class KroneckerFisher(Operator):
    """All blocks ``G_lm ⊗ A_lm``, cross-layer ones included, with each group of a layer for a layer of its own.

    Positive semi-definite, as a principal part of a Kronecker product of two Gram matrices. Its diagonal blocks are
    those that K-FAC inverts.

    >>> import kfac_viz as kv
    >>> F = kv.problems.digits((3,), 20, side=4).capture()
    >>> K, (A, G) = KroneckerFisher(F), F.factors(0, 0)
    >>> torch.allclose(K.block(0, 0), torch.kron(G, A))
    True
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
        return [[(self._A(a, b), between(g, h) / self.F.N) for b, h in self._rows] for a, g in self._rows]

    def _A(self, a: Rows, b: Rows) -> Tensor | None:
        through_rows = a.ndim == b.ndim and (isinstance(a, OneHot) or isinstance(b, OneHot))
        return None if through_rows else between(a, b) / self.F.N

    def _apply(self, v: Tensor) -> Tensor:
        V = self.partition.matrices(v)
        rows = [
            sum(self._product(*factors, V_m, a, b) for factors, V_m, (b, _) in zip(pairs, V, self._rows, strict=True))
            for pairs, (a, _) in zip(self._pairs, self._rows, strict=True)
        ]
        return torch.cat([X.flatten(-2) for X in rows], dim=-1)

    def _product(self, A: Tensor | None, G: Tensor, V: Tensor, a: Rows, b: Rows) -> Tensor:
        """``G V Aᵀ``, with ``A = aᵀ b / N``; between groups the sum over those of the second layer."""
        if G.ndim == 4:
            X = torch.einsum("xyop,...ypj->...xyoj", G, V.unflatten(-2, (G.shape[1], -1)))
            return torch.einsum("...xyoj,xyij->...xoi", X, A).flatten(-3, -2)
        if A is not None:
            return G @ V @ A.mT
        along = (b @ (G @ V).mT).mT / self.F.N
        return a.add_product_(V.new_zeros(*along.shape[:-1], a.features), along) if isinstance(a, OneHot) else along @ a

    def block(self, l: int | str, m: int | str) -> Tensor:
        l, m = self.partition.index(l), self.partition.index(m)
        A, G = self._pairs[l][m]
        A = between(self._rows[l][0], self._rows[m][0]) / self.F.N if A is None else A
        if G.ndim == 2:
            return torch.kron(G, A)
        return torch.einsum("xyop,xyij->xoiypj", G, A).flatten(3).flatten(0, 2)

    def dense(self) -> Tensor:
        self.check_dense()
        layers = range(len(self.partition))
        matrix = torch.cat([torch.cat([self.block(l, m) for m in layers], dim=1) for l in layers])
        return self._in_range(matrix, "The matrix")

    def galerkin(self, Z: CoarseSpace) -> Tensor:
        """``Zᵀ K Z``; for columns ``w uᵀ`` it is ``(αᵀα/N) ∘ (βᵀβ/N)`` with ``α = a u`` and ``β = g w``."""
        if not isinstance(Z, RankOneSpace):
            return super().galerkin(Z)
        both = list(zip(self._rows, Z.factors, strict=True))
        alpha = torch.cat([_by_group(a @ U) for (a, _), (_, U) in both], dim=1)
        beta = torch.cat([_by_group(g @ W.unflatten(0, (*g.shape[:-2], -1))) for (_, g), (W, _) in both], dim=1)
        N = self.F.N
        product = (alpha.T @ alpha / N) * (beta.T @ beta / N)
        if product.shape[0] == Z.size:
            return product
        groups, column = [layer.groups for layer in self.partition.layers], 0
        of = []  # the column of Z that each share of a group belongs to
        for n, k in zip(groups, Z.per_layer, strict=True):
            of += [column + j for j in range(k)] * n
            column += k
        of = torch.tensor(of, device=product.device)
        rows = product.new_zeros(Z.size, len(of)).index_add_(0, of, product)
        return rows.new_zeros(Z.size, Z.size).index_add_(1, of, rows)

    def __repr__(self) -> str:
        return self._describe("all blocks G ⊗ A", f"{self.F.N} examples × {self.F.S} vectors")


def _by_group(x: Tensor) -> Tensor:
    """x (rows, k), or (groups, rows, k) as (rows, groups · k)."""
    return x if x.ndim == 2 else x.movedim(0, 1).flatten(1)
