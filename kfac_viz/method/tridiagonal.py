"""K-FAC's block-tridiagonal inverse: a chain in which each layer depends on the next alone."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_type
from .decompositions import cholesky
from .fisher import Fisher
from .kfac import shifted
from .preconditioner import Preconditioner


class BlockTridiagonal(Preconditioner):
    """K-FAC's block-tridiagonal inverse (Martens and Grosse 2015, section 4.3 and appendix B), dense.

    A Gaussian chain: layer l depends on layer l+1 alone, through ``Ψ``. With the damped Kronecker model ``K``
    (factored damping on diagonal blocks, cross blocks as they are),

        M = Ξᵀ Λ Ξ,   Ξ = I − superdiag(Ψ),   Λ = diag(Σ_1⁻¹, …, Σ_L⁻¹),
        Ψ_l = K_{l,l+1} K_{l+1,l+1}⁻¹,   Σ_l = K_ll − Ψ_l K_{l+1,l+1} Ψ_lᵀ,   Σ_L = K_LL.

    ``M⁻¹`` agrees with K on the diagonal and next to it, and M is its exact inverse for two layers.
    """

    def __init__(self, F: Fisher, damping: float, convention: str = "expand") -> None:
        check_type("F", F, Fisher)
        F.check_dense()
        self.factors = F.kronecker(convention)
        pairs = [F.factors(l, l + 1, convention) for l in range(len(F.partition) - 1)]
        self._cross = [torch.kron(G, A) for A, G in pairs]
        self._init(F, damping)

    def _damp(self, damping: float) -> None:
        super()._damp(damping)
        f, round_off = self.factors, 10 * torch.finfo(self.dtype).eps
        layers = zip(f.G, f.A, f.shifts(self.damping), strict=True)
        K = [torch.kron(shifted(G, for_G), shifted(A, for_A)) for G, A, (for_G, for_A) in layers]
        Ξ = torch.eye(self.partition.size, dtype=self.dtype, device=self.device)
        slices, inverses = self.partition.slices, []
        for l, (here, name) in enumerate(zip(slices, self.partition.names, strict=True)):
            Σ = K[l]
            if l + 1 < len(slices):
                Ψ = torch.cholesky_solve(self._cross[l].T, cholesky(K[l + 1], "The next layer's block")).T
                Ξ[here, slices[l + 1]] = -Ψ
                Σ = Σ - Ψ @ self._cross[l].T
            L, info = torch.linalg.cholesky_ex(Σ)
            if int(info) or not (L.diagonal().square() > len(L) * round_off * K[l].diagonal()).all():
                raise ValueError(
                    f"Layer {name!r} is determined by the next one at damping {self.damping:g}; "
                    "choose a larger damping."
                )
            inverses.append(torch.cholesky_inverse(L))
        self._matrix = Ξ.T @ torch.block_diag(*inverses) @ Ξ

    def _apply(self, v: Tensor) -> Tensor:
        return v @ self._matrix

    def dense(self) -> Tensor:
        return self._in_range(self._matrix.clone(), "The matrix")
