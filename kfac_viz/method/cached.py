"""K-FAC for training: inverses are formed when factors change, and layers of one shape go through one product."""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional

from .kronecker import KroneckerFactors
from .operator import Eigen, inverse, psd_eigen
from .partition import Partition
from .preconditioner import KFAC, Preconditioner


class CachedKFAC(KFAC):
    """The same matrix as :class:`KFAC`, laid out for many applications to one vector.

    With rule ``factored`` the two damped factors of a layer are inverted by Cholesky when λ or the factors
    change, and applied with two products per layer; eigenvectors are formed only if somebody asks for them.
    With rule ``eigen`` there are four products. Neighbouring layers of one shape are one batched product.

    Attributes:
        fallbacks: factors whose Cholesky failed by round-off and that were inverted through eigenvalues.
    """

    def _damp(self, damping: float) -> None:
        self.fallbacks = 0
        if self.rule == "eigen":
            super()._damp(damping)
            U_G, U_A = zip(*self._bases(), strict=True)
            self._runs = [(s, _stack(U_G[i]), _stack(U_A[i]), _stack(self._weights[i])) for s, i in self._layout()]
            return
        Preconditioner._damp(self, damping)
        root, f = self.damping**0.5, self.factors
        pi = torch.tensor(f.pi, dtype=self.dtype, device=self.device)
        self._runs = [
            (
                s,
                self._inverses(f.G[i], root / pi[i], i, "G"),
                _padded(self._inverses(f.A[i], root * pi[i], i, "A")),
                None,
            )
            for s, i in self._layout()
        ]

    def _layout(self) -> list[tuple[slice, slice]]:
        """Slices of the flat vector, and of the layers, over which the shape stays the same."""
        layers, start, runs = self.partition.layers, 0, []
        for _, group in groupby(layers, key=lambda layer: layer.shape):
            stop = start + len(list(group))
            runs.append((slice(self.partition.offsets[start], self.partition.offsets[stop]), slice(start, stop)))
            start = stop
        return runs

    def _inverses(self, factors: tuple[Tensor, ...], shifts: Tensor, layers: slice, which: str) -> Tensor:
        """``(X + shift I)⁻¹`` of a run of layers, (layers, n, n): a third of the work of LU."""
        X = torch.stack(factors)
        X.diagonal(dim1=1, dim2=2).add_(shifts[:, None])
        L, info = torch.linalg.cholesky_ex(X)
        if self.damping > 0 and not info.any():
            return torch.cholesky_inverse(L)
        self.fallbacks += len(factors) if self.damping > 0 else 0
        names = [f"Layer {name!r}, factor {which}" for name in self.partition.names[layers]]
        pieces = []
        for factor, shift, what in zip(factors, shifts.tolist(), names, strict=True):
            d, U = psd_eigen(factor, what)
            pieces.append((U * inverse(d, shift, what)) @ U.T)
        return torch.stack(pieces)

    def _apply(self, v: Tensor) -> Tensor:
        if v.shape[1] != 1:
            return torch.cat([self._apply(column[:, None]) for column in v.unbind(1)], dim=1) if v.shape[1] else v
        applied = torch.empty_like(v)
        for s, G, A, weights in self._runs:
            V, out = (x[s].view(len(G), G.shape[-1], -1) for x in (v, applied))
            if len(G) == 1:  # one product without a batch axis is faster on some processors
                G, A, V, out, weights = G[0], A[0], V[0], out[0], weights if weights is None else weights[0]
            if weights is None:
                out.copy_((G @ (V @ A))[..., : V.shape[-1]])
            else:
                out.copy_(G @ ((G.mT @ V @ A) * weights) @ A.mT)
        return applied

    def layer_block(self, l: int) -> Tensor:
        if self.rule == "eigen":
            return super().layer_block(l)
        for (_, G, A, _), (_, layers) in zip(self._runs, self._layout(), strict=True):
            if layers.start <= l < layers.stop:
                return torch.kron(G[l - layers.start], A[l - layers.start][:, : A.shape[1]])
        raise IndexError(l)


class LeadingEigenvectors:
    """The leading eigenpairs of every factor, all that a ``spectral`` space of ``count`` columns per layer can use.

    Factors up to ``full`` rows are decomposed; larger ones go through block power iteration with Rayleigh–Ritz
    (Halko, Martinsson and Tropp 2011), from a fixed start. A coarse space needs good directions, not exact ones:
    its coarse operator is built from what comes out.
    """

    def __init__(self, factors: KroneckerFactors, count: int, *, full: int = 200, iterations: int = 8) -> None:
        self.partition: Partition = factors.partition
        self.count, self.full, self.iterations = count, full, iterations
        self.eigen_A, self.eigen_G = ([self._leading(X) for X in side] for side in (factors.A, factors.G))

    def kronecker(self) -> LeadingEigenvectors:
        return self

    def _leading(self, X: Tensor) -> Eigen:
        if len(X) <= max(self.full, 4 * self.count):
            return psd_eigen(X, "A factor")
        generator = torch.Generator().manual_seed(0)
        Q = torch.randn(len(X), self.count + 8, generator=generator, dtype=torch.float64).to(X)
        for _ in range(self.iterations):
            Q = torch.linalg.qr(X @ Q).Q
        d, V = torch.linalg.eigh(Q.T @ X @ Q)
        return Eigen(d.clamp_min(0), Q @ V)


def _padded(A: Tensor) -> Tensor:
    """Zero columns up to a multiple of 16: products with rows of odd length, as a bias makes them, take up to half
    as long again."""
    return functional.pad(A, (0, -A.shape[-1] % 16)) if A.shape[-1] > 128 else A


def _stack(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tuple(tensors))
