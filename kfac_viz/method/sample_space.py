"""The exact step at any size: ``F = JᵀJ/N`` solved through the inner products of its S·N scores, the rows of J.

``K = J Jᵀ / N`` has the non-zero eigenvalues of F, so that one decomposition of S·N numbers a side serves every λ
(natural gradients by Woodbury's identity: arXiv 2505.12149, where it is called ENGD-W; Rende et al. 2024, minSR).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from .checks import check_room, warn
from .decompositions import Eigen, check_invertible, cholesky, eigvalsh, psd_eigen
from .one_hot import OneHot, Rows, inner

REFINEMENTS = 5  # of a solution whose residual still comes down
ACCURATE = 1e-6  # warn if the relative residual exceeds this
ENOUGH = 1e-9  # relative residual of a step that no refinement makes better
_CHUNK = 2**24  # numbers in a temporary
_SUM = 160  # multiplications in a matrix product that take as long as one sum out of it


class HasScores(Protocol):
    """What is needed of a Fisher."""

    N: int
    S: int
    a: Sequence[Rows]
    g: Sequence[Tensor]

    def scores(self, v: Tensor) -> Tensor: ...
    def pull(self, s: Tensor) -> Tensor: ...


class SampleSpace:
    """A Fisher F as seen by its S·N scores, with solutions of ``(F + λI) v = r`` and no P×P matrix.

    Attributes:
        F: a :class:`kfac_viz.Fisher`.
        size: S·N.
        residual: ``‖r − (F + λI) v‖ / ‖r‖`` of the last solution, the largest of several; None before the first.
    """

    def __init__(self, F: HasScores) -> None:
        self.F, self.size = F, F.S * F.N
        self.residual: float | None = None

    # ---- the matrix ------------------------------------------------------------------------------------

    def kernel(self, l: int) -> Tensor:
        """``K_l = J_l J_lᵀ / N`` of layer l, (S·N, S·N), with rows and columns in the order of (s, n)."""
        return self._add_kernel_(self._zeros(), l)

    @cached_property
    def matrix(self) -> Tensor:
        """``K = Σ_l K_l``, (S·N, S·N)."""
        K = self._zeros()
        for l in range(len(self.F.a)):
            self._add_kernel_(K, l)
        return K

    @cached_property
    def eigen(self) -> Eigen:
        """The eigenvalues of K in ascending order, which are those of F but for zeros, and its eigenvectors."""
        return psd_eigen(self.matrix, "The matrix of inner products")

    def _zeros(self) -> Tensor:
        what = f"A matrix of {self.size} × {self.size} inner products"
        check_room(what, 3 * self.size**2, self.F.g[0], "take fewer examples, or one label for each: fisher='mc'")
        return self.F.g[0].new_zeros(self.size, self.size)

    def _add_kernel_(self, K: Tensor, l: int) -> Tensor:
        """K_l added to K, some rows at a time: by inner products of inputs and of vectors, ``T² (in / S + out)``
        multiplications for a pair of scores and T² sums, or of the scores themselves, ``in · out``: the cheaper way."""
        a, g = self.F.a[l], self.F.g[l]
        T, features, out = g.shape[-2], a.shape[-1], g.shape[-1] * (len(g) if g.ndim > 4 else 1)
        cheaper = T == 1 or T * T * (features / self.F.S + out + _SUM) <= features * out
        if isinstance(a, OneHot) or (a.ndim == 3 and cheaper):
            return self._add_inner_products_(K, a, g)
        size = max(1, min(_CHUNK // (features * out), -(-self.size // 4)))  # by symmetry ten products of sixteen
        starts = range(0, self.size, size)
        few = len(starts) <= 4  # then the scores are kept
        chunks = [_scores(a, g, i, size) for i in starts] if few else []
        for i in starts:
            mine = chunks[i // size] if few else _scores(a, g, i, size)
            for j in starts[i // size :]:
                block = mine @ (chunks[j // size] if few else _scores(a, g, j, size)).T / self.F.N
                K[i : i + size, j : j + size] += block
                if i != j:
                    K[j : j + size, i : i + size] += block.T
        return K

    def _add_inner_products_(self, K: Tensor, a: Rows, g: Tensor) -> Tensor:
        S, N, T = g.shape[:3]
        size = max(1, _CHUNK // (S * N * T * T))
        for n in range(0, N, size):
            few = min(size, N - n)
            inputs = inner(a.narrow(-3, n, few).flatten(0, 1), a.flatten(0, 1)) / N  # (n T, N T)
            for s in range(S):
                pairs = (g[s, n : n + size].flatten(0, 1) @ g.flatten(0, 2).T).unflatten(1, (S, -1))  # (n T, S, N T)
                rows = pairs.mul_(inputs[:, None]).unflatten(0, (-1, T)).sum(1).unflatten(-1, (N, T)).sum(-1)
                K[s * N + n : s * N + n + len(rows)] += rows.flatten(1)
        return K

    # ---- what follows from it --------------------------------------------------------------------------

    @property
    def eigenvalues(self) -> Tensor:
        """All eigenvalues of F that are not zero, ascending, (S·N,)."""
        return self.eigen.d

    def leading(self, k: int) -> Eigen:
        """The k largest eigenvalues of F, descending, and its eigenvectors (P, k): ``Jᵀ u / √(N d)``."""
        d, U = (x.flip(-1)[..., :k] for x in self.eigen)
        rows = self.F.pull(U.mT.unflatten(-1, (self.F.S, self.F.N)))
        return Eigen(d, (rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True)).mT)

    def norms(self) -> Tensor:
        """``‖F_lm‖`` in the Frobenius norm, (L, L): the root of ``⟨K_l, K_m⟩``, exact to half the digits of the dtype
        beside ``(‖F_ll‖ ‖F_mm‖)^½``."""
        L = len(self.F.a)
        total = self.F.g[0].new_zeros(L, L)
        tiny = torch.finfo(total.dtype).tiny
        if L * self.size**2 <= _CHUNK:
            K = torch.stack([self.kernel(l).flatten() for l in range(L)])
            scale = K.abs().max().clamp_min(tiny)  # so that no square overflows
            total = (K / scale) @ (K / scale).T
        else:
            scale = self.matrix.abs().max().clamp_min(tiny)
            for l in range(L):
                mine = self.kernel(l).flatten() / scale
                total[l, l] = mine @ mine
                for m in range(l + 1, L):
                    total[l, m] = total[m, l] = mine @ self.kernel(m).flatten() / scale
        return total.clamp_min(0).sqrt() * scale

    def layer_overlap(self, damping: float) -> float:
        """The largest eigenvalue of ``Σ_l K_l (K_l + λ)⁻¹``; see :meth:`kfac_viz.Damped.layer_overlap`."""
        total = self._zeros()
        for l in range(len(self.F.a)):
            d, U = psd_eigen(self.kernel(l), f"The matrix of layer {l}")
            total.addmm_(U * (d / (d + damping)), U.T)
        return float(eigvalsh(total, "The sum over layers")[-1])

    def solve(self, r: Tensor, damping: float, *, enough: float | None = None) -> Tensor:
        """``(F + λI)⁻¹ r`` for r (P,) or (P, k).

        What of r is ``Jᵀ s / N`` for some s, as a gradient of a loss is whole, is solved as :meth:`solve_pulled` does.
        The rest is ``(r − Jᵀ (K + λ)⁻¹ J r / N) / λ``: this difference loses the digits of λ_max / λ, which refinement
        finds again; a warning says where it does not. Refinement ends at the relative residual ``enough``, or where
        precision does.
        """
        rows = r.mT if r.ndim == 2 else r[None]
        inverse = self._inverse(damping)
        x = self._pulled(inverse(self._weights(rows)))
        x = self._refined(x, rows, inverse, damping, 4 * torch.finfo(r.dtype).eps if enough is None else enough)
        return x.mT if r.ndim == 2 else x[0]

    def solve_pulled(self, s: Tensor, damping: float) -> Tensor:
        """``(F + λI)⁻¹ Jᵀ s / N = Jᵀ (K + λ)⁻¹ s / N``, (P,), for s (S, N), to a relative residual of 1e-9.

        It loses half as many digits as the difference in :meth:`solve`. The gradient of a loss is such a vector: for
        squares, with exact vectors, s is ``output − target``.
        """
        inverse = self._inverse(damping)
        x, r = (self._pulled(y) for y in (inverse(s.reshape(1, -1)), s))
        return self._refined(x, r, inverse, damping, ENOUGH)[0]

    def _pulled(self, s: Tensor) -> Tensor:
        """``Jᵀ s / N`` for the rows of s, (k, P)."""
        return self.F.pull(s.view(-1, self.F.S, self.F.N) / self.F.N)

    def _weights(self, rows: Tensor) -> Tensor:
        """s (k, S·N) with ``Jᵀ s / N`` near the rows (k, P), as near as precision allows: ``(K + δI)⁻¹ J rows``, with δ
        at the round-off in K. Zeros where K + δI is not positive definite in it."""
        δ = self.size**0.5 * torch.finfo(rows.dtype).eps * torch.linalg.matrix_norm(self.matrix)
        L, info = torch.linalg.cholesky_ex(self.matrix + δ * torch.eye(self.size, dtype=δ.dtype, device=δ.device))
        s = self.F.scores(rows).flatten(-2)
        return torch.zeros_like(s) if int(info) else torch.cholesky_solve(s.mT, L).mT

    def _refined(
        self, x: Tensor, r: Tensor, inverse: Callable[[Tensor], Tensor], damping: float, enough: float
    ) -> Tensor:
        """x (k, P) with its residual solved for until that is ``enough``, and for as long as it makes it smaller."""
        N = self.F.N
        norm = torch.linalg.vector_norm(r, dim=-1).clamp_min(torch.finfo(r.dtype).tiny)

        def left(x: Tensor) -> tuple[Tensor, float]:
            remaining = r - self.F.pull(self.F.scores(x) / N) - damping * x
            return remaining, float((torch.linalg.vector_norm(remaining, dim=-1) / norm).max())

        remaining, self.residual = left(x)
        for _ in range(REFINEMENTS):
            if self.residual < enough:
                break
            s = inverse(self.F.scores(remaining).flatten(-2))
            new = x + (remaining - self._pulled(s)) / damping
            remaining, residual = left(new)
            if not residual < self.residual:
                break
            slow = residual > self.residual / 2
            x, self.residual = new, residual
            if slow:
                break
        if not self.residual < ACCURATE:
            warn(
                f"The exact step is not accurate, with a relative residual of {self.residual:.2g}: λ = {damping:g} is "
                f"too small for {str(r.dtype).removeprefix('torch.')}. Take a larger λ, or double precision."
            )
        return x

    def _inverse(self, damping: float) -> Callable[[Tensor], Tensor]:
        """The product with ``(K + λI)⁻¹``, from the eigenvectors where they are there, else by Cholesky."""
        if "eigen" in vars(self):
            d, U = self.eigen
            check_invertible((0.0, float(d[-1])), self.size + 1, damping, d.dtype, "The matrix")
            return lambda s: ((s @ U) / (d + damping)) @ U.T
        K = self.matrix
        largest = float(torch.linalg.matrix_norm(K))
        check_invertible((0.0, largest), self.size + 1, damping, K.dtype, "The matrix")
        L = cholesky(K + damping * torch.eye(self.size, dtype=K.dtype, device=K.device), "The matrix")
        return lambda s: torch.cholesky_solve(s.mT, L).mT

    def __repr__(self) -> str:
        last = "" if self.residual is None else f", relative residual of the last solution {self.residual:.1g}"
        return f"sample space, {self.size} × {self.size} inner products of scores{last}"


def _scores(a: Tensor, g: Tensor, start: int, size: int) -> Tensor:
    """Some scores of one layer, (≤ size, out · features), counted through (s, n)."""
    S, N = g.shape[-4:-2]
    rows = torch.arange(start, min(start + size, S * N), device=g.device)
    s, n = rows.div(N, rounding_mode="floor"), rows % N
    if g.ndim == 4:
        return torch.einsum("rto,rti->roi", g[s, n], a[n] if a.ndim == 3 else a[s, n]).flatten(1)
    return torch.einsum("hrto,hrti->rhoi", g[:, s, n], a[:, n] if a.ndim == 4 else a[:, s, n]).flatten(1)
