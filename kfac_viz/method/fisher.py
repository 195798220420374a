"""The Fisher information matrix as an operator, from the vectors captured in one pass."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from .checks import check_choice
from .coarse import CoarseSpace, RankOneSpace
from .kronecker import CONVENTIONS, KroneckerFactors, directional, sandwich, upper_pairs
from .operator import Image, Operator
from .partition import Partition

_CHUNK = 2**24  # numbers in a temporary: 128 MiB of float64


class Fisher(Operator):
    """``F = (1/N) Σ_{s,n} score scoreᵀ``, with the score ``Σ_t g[s,n,t] a[n,t]ᵀ`` in each layer.

    Positive semi-definite; equal to the generalised Gauss–Newton matrix when exact. Made by
    :func:`kfac_viz.capture`; the captured vectors are never changed afterwards.

    Attributes:
        a: layer inputs, one (N, T, features) per layer.
        g: output-side vectors, one (S, N, T, out) per layer.
    """

    semidefinite = True

    def __init__(
        self,
        partition: Partition,
        a: list[Tensor],
        g: list[Tensor],
        *,
        likelihood: str | None = None,
        flavour: str = "exact",
    ) -> None:
        self.partition, self.a, self.g = partition, tuple(a), tuple(g)
        self.likelihood, self.flavour = likelihood, flavour
        self.S, self.N = self.g[0].shape[:2]
        self.dtype, self.device = self.a[0].dtype, self.a[0].device
        self._factors: dict[str, KroneckerFactors] = {}

    def _apply(self, v: Tensor) -> Tensor:
        width = max(layer.out for layer in self.partition.layers) * max(a.shape[1] for a in self.a)
        columns = max(1, _CHUNK // (self.N * max(width, self.S)))
        pieces = [self.pull(self.scores(piece)) for piece in v.split(columns, dim=1)]
        return torch.cat(pieces, dim=1) / self.N if pieces else v.clone()

    def scores(self, v: Tensor) -> Tensor:
        """``J v``: every score times every column of v (P, k), shape (S, N, k); two matrix products a layer."""
        return sum(directional(a, g, V) for a, g, V in zip(self.a, self.g, self.partition.split(v), strict=True))

    def pull(self, s: Tensor) -> Tensor:
        """``Jᵀ s``: the scores summed with weights s (S, N, k), shape (P, k)."""
        if s.shape[2] == 1:
            return self.add_pulled_(s.new_zeros(self.partition.size, 1), s, alpha=1.0)
        pieces = []
        for a, g in zip(self.a, self.g, strict=True):
            w = torch.einsum("snto,snk->ntok", g, s)
            pieces.append(torch.einsum("ntok,nti->oik", w, a))
        return self.partition.join(pieces)

    def add_pulled_(self, v: Tensor, s: Tensor, alpha: float) -> Tensor:
        """``v + alpha Jᵀ s`` in place, for v (P, 1) and s (S, N, 1): one product a layer and no temporary."""
        for a, g, V in zip(self.a, self.g, self.partition.split(v[:, 0]), strict=True):
            V.addmm_((g * s[..., None]).sum(0).flatten(0, 1).mT, a.flatten(0, 1), alpha=alpha)
        return v

    def dense(self) -> Tensor:
        """The matrix (P, P), from the blocks on and above the diagonal: N P² products, not S N P²."""
        slices = self.partition.slices
        matrix = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for l in range(len(slices)):
            for m in range(l, len(slices)):
                block = self._fill(matrix[slices[l], slices[m]], l, m)
                if l != m:
                    matrix[slices[m], slices[l]] = block.T
        return matrix

    def block(self, l: int | str, m: int | str) -> Tensor:
        """The exact block of layers l and m, (P_l, P_m).

        ``(1/N) Σ_n Σ_{t,t'} (Σ_s g_l g_mᵀ) ⊗ (a_l a_mᵀ)`` contracts over examples alone, S times cheaper than
        scores against scores (and four times cheaper again on the diagonal, by symmetry); with many positions and
        few vectors the scores are formed instead.
        """
        l, m = self.partition.index(l), self.partition.index(m)
        sizes = self.partition.layers[l].size, self.partition.layers[m].size
        return self._fill(torch.empty(sizes, dtype=self.dtype, device=self.device), l, m)

    def _fill(self, block: Tensor, l: int, m: int) -> Tensor:
        """Write the block of layers l and m into ``block``, and return it."""
        (o, i), (p, j) = self.partition.layers[l].shape, self.partition.layers[m].shape
        positions = self.a[l].shape[1] * self.a[m].shape[1]
        if positions > self.S:
            factors, per_example = _scores, self.S * max(o * i, p * j)
        else:
            factors, per_example = (
                _one_layer if l == m and positions == 1 else _two_layers,
                max(o * p, i * j) * positions,
            )
        product: Tensor | None = None
        for chunk in self._chunks((self.a[l], self.a[m], self.g[l], self.g[m]), per_example):
            left, right = factors(*chunk)
            product = left.T @ right if product is None else product.addmm_(left.T, right)
        if factors is _scores:
            block.copy_(product)
        else:
            if factors is _one_layer:
                (_, _, where_o), (_, _, where_i) = (upper_pairs(n, self.device) for n in (o, i))
                product = product.index_select(1, where_i).index_select(0, where_o)
            block.view(o, i, p, j).copy_(product.view(o, p, i, j).transpose(1, 2))
        if l == m and factors is not _one_layer:
            block.add_(block.T.clone()).div_(2)  # the products round differently on the two sides
        return block.div_(self.N)

    def diagonal(self) -> Tensor:
        """The diagonal (P,), without any P×P matrix: what Adam and Adagrad estimate."""
        return self.partition.join(self.second_moments())

    def second_moments(self, bases: list[tuple[Tensor, Tensor]] | None = None) -> list[Tensor]:
        """``diag(F_ll)`` in a Kronecker basis (U_G, U_A) per layer (EKFAC), one (out, features) per layer."""
        moments = []
        for l, (a, g) in enumerate(zip(self.a, self.g, strict=True)):
            if bases is not None:
                g, a = g @ bases[l][0], a @ bases[l][1]
            if a.shape[1] == 1:
                total = g[:, :, 0].square().sum(0).T @ a[:, 0].square()
            else:
                total = 0.0
                for a_, g_ in self._chunks((a, g), self.S * self.partition.layers[l].size):
                    total = total + _layer_scores(a_, g_).square().sum(0).view(g.shape[3], a.shape[2])
            moments.append(total / self.N)
        return moments

    def factors(self, l: int | str, m: int | str, convention: str = "expand") -> tuple[Tensor, Tensor]:
        """K-FAC's factors of layers l and m: ``A_lm`` (features_l, features_m), ``G_lm`` (out_l, out_m).

        ``A_lm = (1/N) Σ_n a_l a_mᵀ`` and ``G_lm = (1/N) Σ_{s,n} g_l g_mᵀ``, with block ``≈ G_lm ⊗ A_lm``. Where
        a layer has positions, Eschenhagen et al. 2023: ``expand`` takes each for an example of its own,
        ``reduce`` averages a and sums g over them first.
        """
        l, m = self.partition.index(l), self.partition.index(m)
        (a, g), (b, h) = self._examples(l, convention), self._examples(m, convention)
        if a.shape[0] != b.shape[0]:
            raise ValueError(
                f"Layers {self.partition.names[l]!r} and {self.partition.names[m]!r} are used at different numbers "
                "of positions; their cross factors need convention='reduce'."
            )
        return a.T @ b / self.N, g.flatten(0, 1).T @ h.flatten(0, 1) / self.N

    def kronecker(self, convention: str = "expand") -> KroneckerFactors:
        """The factors of every diagonal block, computed once and shared by all that is built from them."""
        if convention not in self._factors:
            pairs = [self.factors(l, l, convention) for l in range(len(self.partition))]
            A, G = zip(*pairs, strict=True)
            self._factors[convention] = KroneckerFactors(self.partition, A, G)
        return self._factors[convention]

    def image(self, Z: CoarseSpace) -> ScoreImage:
        return ScoreImage(self, Z)

    def _examples(self, l: int, convention: str) -> tuple[Tensor, Tensor]:
        """Inputs (N', features) and vectors (S, N', out) that K-FAC takes for independent examples."""
        check_choice("convention", convention, CONVENTIONS)
        a, g = self.a[l], self.g[l]
        if convention == "reduce":
            return a.mean(1), g.sum(2)
        return (a[:, 0] if a.shape[1] == 1 else a.flatten(0, 1) / a.shape[1] ** 0.5), g.flatten(1, 2)

    def _chunks(self, tensors: tuple[Tensor, ...], per_example: int) -> Iterator[list[Tensor]]:
        """The examples of inputs (N, T, …) and vectors (S, N, T, …), a bounded number at a time."""
        size = max(1, _CHUNK // per_example)
        for start in range(0, self.N, size):
            yield [x[start : start + size] if x.ndim == 3 else x[:, start : start + size] for x in tensors]

    def __repr__(self) -> str:
        what = " ".join(filter(None, (self.flavour, self.likelihood)))
        return self._describe(what, f"{self.N} examples × {self.S} vectors")


def _layer_scores(a: Tensor, g: Tensor) -> Tensor:
    """Scores of one layer, (S·N, out·features)."""
    return torch.einsum("snto,nti->snoi", g, a).flatten(0, 1).flatten(1)


def _scores(a: Tensor, b: Tensor, g: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Two tables whose product is a block, contracted over examples and vectors."""
    return _layer_scores(a, g), _layer_scores(b, h)


def _two_layers(a: Tensor, b: Tensor, g: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Two tables, contracted over examples and pairs of positions: (·, out·out') and (·, features·features')."""
    (_, N, t, o), (u, p) = g.shape, h.shape[2:]
    left = torch.bmm(g.permute(1, 2, 3, 0).flatten(1, 2), h.transpose(0, 1).flatten(2))
    right = a[:, :, None, :, None] * b[:, None, :, None, :]
    return left.view(N, t, o, u, p).transpose(2, 3).reshape(-1, o * p), right.flatten(0, 2).flatten(1)


def _one_layer(a: Tensor, _b: Tensor, g: Tensor, _h: Tensor) -> tuple[Tensor, Tensor]:
    """As before for a layer with itself: each pair of rows and each pair of columns once, a quarter of the work."""
    g, a = g[:, :, 0], a[:, 0].T.contiguous()
    first, second, _ = upper_pairs(g.shape[2], g.device)
    left = torch.bmm(g.permute(1, 2, 0), g.transpose(0, 1)).flatten(1).T.index_select(0, first * g.shape[2] + second)
    first, second, _ = upper_pairs(len(a), a.device)
    return left.T, a.index_select(0, first).mul_(a.index_select(0, second)).T


class ScoreImage(Image):
    """``F Z`` through ``U = J Z`` (S·N, k): no P×k matrix, and ``Zᵀ F Z = UᵀU/N``."""

    def __init__(self, F: Fisher, Z: CoarseSpace) -> None:
        self.F, self.Z = F, Z
        self.U = Z.scores(F)

    def prolong(self, c: Tensor) -> Tensor:
        return self.F.pull(self.U @ c) / self.F.N

    def add_(self, v: Tensor, c: Tensor) -> Tensor:
        if c.shape[1] != 1 or not v.is_contiguous():
            return super().add_(v, c)
        return self.F.add_pulled_(v, self.U @ c, 1 / self.F.N)

    def restrict(self, r: Tensor) -> Tensor:
        return self.U.flatten(0, 1).T @ self.F.scores(r).flatten(0, 1) / self.F.N

    def galerkin(self) -> Tensor:
        U = self.U.flatten(0, 1)
        return U.T @ U / self.F.N


class KroneckerFisher(Operator):
    """All blocks ``G_lm ⊗ A_lm``, cross-layer ones included: the model that the 2020 paper coarsens.

    Positive semi-definite, as a principal part of a Kronecker product of two Gram matrices.
    """

    semidefinite = True

    def __init__(self, F: Fisher, convention: str = "expand") -> None:
        self.F, self.convention = F, check_choice("convention", convention, CONVENTIONS)
        self.partition, self.dtype, self.device = F.partition, F.dtype, F.device
        if convention == "expand" and len({a.shape[1] for a in F.a}) > 1:
            raise ValueError("The layers are used at different numbers of positions; use convention='reduce'.")

    @cached_property
    def _pairs(self) -> list[list[tuple[Tensor, Tensor]]]:
        layers = range(len(self.partition))
        return [[self.F.factors(l, m, self.convention) for m in layers] for l in layers]

    def _apply(self, v: Tensor) -> Tensor:
        V = self.partition.split(v)
        return self.partition.join([sum(sandwich(G, V[m], A) for m, (A, G) in enumerate(row)) for row in self._pairs])

    def block(self, l: int | str, m: int | str) -> Tensor:
        A, G = self._pairs[self.partition.index(l)][self.partition.index(m)]
        return torch.kron(G, A)

    def dense(self) -> Tensor:
        layers = range(len(self.partition))
        return torch.cat([torch.cat([self.block(l, m) for m in layers], dim=1) for l in layers])

    def image(self, Z: CoarseSpace) -> Image:
        return KroneckerImage(self, Z) if isinstance(Z, RankOneSpace) else super().image(Z)

    def __repr__(self) -> str:
        return self._describe("all blocks G ⊗ A", f"{self.F.N} examples × {self.F.S} vectors")


class KroneckerImage(Image):
    """``K Z`` for columns ``w uᵀ``: ``Zᵀ K Z = (αᵀα/N) ∘ (βᵀβ/N)`` with ``α = a u`` and ``β = g w``."""

    def __init__(self, K: KroneckerFisher, Z: RankOneSpace) -> None:
        self.K, self.Z = K, Z

    def prolong(self, c: Tensor) -> Tensor:
        return self.K._apply(self.Z.prolong(c))

    def restrict(self, r: Tensor) -> Tensor:
        return self.Z.restrict(self.K._apply(r))

    def galerkin(self) -> Tensor:
        F, alphas, betas = self.K.F, [], []
        for l, (W, U) in enumerate(self.Z.factors):
            a, g = F._examples(l, self.K.convention)
            alphas.append(a @ U)
            betas.append(g.flatten(0, 1) @ W)
        alpha, beta = torch.cat(alphas, dim=1), torch.cat(betas, dim=1)
        return (alpha.T @ alpha / F.N) * (beta.T @ beta / F.N)
