"""One-level preconditioners: approximate inverses of ``A = F + λI``, applied with ``@``.

Damping enters after the eigendecompositions, so ``with_damping(λ)`` shares all that was factorised (the
block-tridiagonal inverse excepted, which refactors).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_choice, check_damping, check_type
from .fisher import Fisher
from .kronecker import KroneckerFactors, kron_block, sandwich
from .operator import Operator, inverse, psd_eigen, replace

RULES = ("eigen", "factored")


class Preconditioner(Operator):
    """Applies an approximate inverse of ``F + λI``."""

    damping: float

    def _init(self, operator: Operator | KroneckerFactors, damping: float) -> None:
        self.partition, self.dtype, self.device = operator.partition, operator.dtype, operator.device
        self._damp(damping)

    def _damp(self, damping: float) -> None:
        """Set λ and what depends on it."""
        self.damping = check_damping(damping)

    def with_damping(self, damping: float) -> Preconditioner:
        """The same preconditioner at another λ; what was factorised is shared."""
        twin = replace(self)
        twin._damp(damping)
        return twin

    def __repr__(self) -> str:
        return self._describe(f"λ = {self.damping:.3g}")


class Identity(Preconditioner):
    """``M = I``: plain gradient descent, whatever λ is."""

    def __init__(self, operator: Operator, damping: float = 0.0) -> None:
        check_type("operator", operator, Operator)
        self._init(operator, damping)

    def _apply(self, v: Tensor) -> Tensor:
        return v.clone()


class Diagonal(Preconditioner):
    """``M = (diag F + λ)^-power``: Jacobi for power 1; Adam and Adagrad take ½ of the empirical Fisher.

    >>> from kfac_viz.method.operator import Dense
    >>> from kfac_viz.method.partition import Partition
    >>> F = Dense(torch.tensor([[3., 1.], [1., 0.]]), Partition.from_sizes([1, 1]))
    >>> Diagonal(F, damping=1.0) @ torch.ones(2)
    tensor([0.2500, 1.0000])
    """

    def __init__(self, operator: Operator, damping: float, power: float = 1.0) -> None:
        check_type("operator", operator, Operator)
        if not (isinstance(power, (int, float)) and 0 <= power <= 1):
            raise ValueError(f"power must lie between 0 and 1; got {power!r}.")
        self._d, self.power = operator.diagonal().clamp_min(0), power
        self._init(operator, damping)

    def _damp(self, damping: float) -> None:
        super()._damp(damping)
        self._weights = inverse(self._d, self.damping, "The diagonal of the Fisher") ** self.power

    def _apply(self, v: Tensor) -> Tensor:
        return self._weights[:, None] * v

    def dense(self) -> Tensor:
        return self._weights.diag()

    def diagonal(self) -> Tensor:
        return self._weights.clone()


class BlockDiagonal(Preconditioner):
    """Exact inverses of the damped diagonal blocks: block Jacobi with exact local solves."""

    def __init__(self, operator: Operator, damping: float) -> None:
        check_type("operator", operator, Operator)
        names = operator.partition.names
        self._eigen = [psd_eigen(operator.block(name, name), f"The block of layer {name!r}") for name in names]
        self._init(operator, damping)

    def _damp(self, damping: float) -> None:
        super()._damp(damping)
        self._weights = [
            inverse(d, self.damping, f"The block of layer {name!r}")
            for (d, _), name in zip(self._eigen, self.partition.names, strict=True)
        ]

    def _apply(self, v: Tensor) -> Tensor:
        pieces = zip(self._eigen, self._weights, self.partition.slices, strict=True)
        return torch.cat([U @ (w[:, None] * (U.T @ v[s])) for (_, U), w, s in pieces])

    def dense(self) -> Tensor:
        return torch.block_diag(*((U * w) @ U.T for (_, U), w in zip(self._eigen, self._weights, strict=True)))


class _KroneckerBasis(Preconditioner):
    """``(U_G ⊗ U_A) diag(weights) (U_G ⊗ U_A)ᵀ`` in every layer: four small products to apply."""

    factors: KroneckerFactors
    _weights: list[Tensor]  # one (out, features) per layer

    def kronecker(self) -> KroneckerFactors:
        """The factors, as a Fisher has them: coarse spaces can be built from a preconditioner too."""
        return self.factors

    def _bases(self) -> list[tuple[Tensor, Tensor]]:
        return [(G.U, A.U) for G, A in zip(self.factors.eigen_G, self.factors.eigen_A, strict=True)]

    def _apply(self, v: Tensor) -> Tensor:
        pieces = []
        for (U_G, U_A), weights, V in zip(self._bases(), self._weights, self.partition.split(v), strict=True):
            inner = sandwich(U_G.mT, V, U_A.mT) * weights[..., None]
            pieces.append(sandwich(U_G, inner, U_A))
        return self.partition.join(pieces)

    def layer_block(self, l: int) -> Tensor:
        """The block of layer l, (P_l, P_l): cheaper than Kronecker products of the eigenvectors."""
        (U_G, U_A), weights = self._bases()[l], self._weights[l]
        left = torch.einsum("oa,pa->aop", U_G, U_G)
        right = torch.einsum("ib,jb->bij", U_A, U_A).flatten(1)
        return kron_block(left, (weights @ right).unflatten(1, (len(U_A), len(U_A))))

    def dense(self) -> Tensor:
        return torch.block_diag(*(self.layer_block(l) for l in range(len(self.partition))))


class KFAC(_KroneckerBasis):
    """K-FAC (Martens and Grosse 2015): one Kronecker product ``G_l ⊗ A_l`` per layer, inverted with damping.

    Args:
        F: a :class:`Fisher`, or :class:`KroneckerFactors` such as an optimizer averages.
        damping: λ.
        rule: ``"eigen"`` is exactly ``(G ⊗ A + λI)⁻¹``; ``"factored"`` is
            ``(G + √λ/π I)⁻¹ ⊗ (A + π√λ I)⁻¹``, the paper's section 6.3.
        convention: ``"expand"`` or ``"reduce"`` for layers used at several positions (Eschenhagen et al. 2023).

    Raises:
        ValueError: NaN or an indefinite factor, or λ = 0 where a layer is singular, each naming the layer.
    """

    def __init__(
        self,
        F: Fisher | KroneckerFactors,
        damping: float,
        rule: str = "eigen",
        convention: str = "expand",
    ) -> None:
        check_type("F", F, Fisher, KroneckerFactors)
        self.rule = check_choice("rule", rule, RULES)
        self.factors = F if isinstance(F, KroneckerFactors) else F.kronecker(convention)
        self._init(self.factors, damping)

    def _damp(self, damping: float) -> None:
        super()._damp(damping)
        f = self.factors
        self._weights = [
            self._layer_weights(d_A, d_G, pi, f"Layer {name!r}")
            for (d_A, _), (d_G, _), pi, name in zip(f.eigen_A, f.eigen_G, f.pi, self.partition.names, strict=True)
        ]

    def _layer_weights(self, d_A: Tensor, d_G: Tensor, pi: float, what: str) -> Tensor:
        if self.rule == "eigen":
            return inverse(torch.outer(d_G, d_A), self.damping, what)
        root = self.damping**0.5
        A = inverse(d_A, pi * root, f"{what}, factor A")
        return torch.outer(inverse(d_G, root / pi, f"{what}, factor G"), A)

    def __repr__(self) -> str:
        return self._describe(f"λ = {self.damping:.3g}", f"rule {self.rule}")


class EKFAC(_KroneckerBasis):
    """K-FAC's eigenbasis with the exact variances along it (George et al. 2018): never farther from F_ll."""

    def __init__(self, F: Fisher, damping: float, convention: str = "expand") -> None:
        check_type("F", F, Fisher)
        self.factors = F.kronecker(convention)
        self._d = F.second_moments(self._bases())
        self._init(F, damping)

    def _damp(self, damping: float) -> None:
        super()._damp(damping)
        self._weights = [
            inverse(d, self.damping, f"Layer {name!r}") for d, name in zip(self._d, self.partition.names, strict=True)
        ]


class BlockTridiagonal(Preconditioner):
    """K-FAC's block-tridiagonal inverse (Martens and Grosse 2015, section 4.3 and appendix B).

    A Gaussian chain: layer l depends on layer l+1 alone, through ``Ψ_l = Ψ_G ⊗ Ψ_A``. With the damped Kronecker
    model ``K`` (factored damping on diagonal blocks, cross blocks as they are),

        M = Ξᵀ Λ Ξ,   Ξ = I − superdiag(Ψ),   Λ = diag(Σ_1⁻¹, …, Σ_L⁻¹),
        Ψ_l = K_{l,l+1} K_{l+1,l+1}⁻¹,   Σ_l = K_ll − Ψ_l K_{l+1,l+1} Ψ_lᵀ,   Σ_L = K_LL.

    ``M⁻¹`` agrees with K on the diagonal and next to it, and M is its exact inverse for two layers.
    """

    def __init__(self, F: Fisher, damping: float, convention: str = "expand") -> None:
        check_type("F", F, Fisher)
        layers = range(len(F.partition))
        self.factors = F.kronecker(convention)
        self._cross = [F.factors(l, l + 1, convention) for l in layers[:-1]]
        self._init(F, damping)

    def _damp(self, damping: float) -> None:
        super()._damp(damping)
        root, f = self.damping**0.5, self.factors
        A = [X + pi * root * torch.eye(len(X), dtype=X.dtype, device=X.device) for X, pi in zip(f.A, f.pi, strict=True)]
        G = [X + root / pi * torch.eye(len(X), dtype=X.dtype, device=X.device) for X, pi in zip(f.G, f.pi, strict=True)]
        lower = [[self._cholesky(X, name) for X, name in zip(Y, self.partition.names, strict=True)] for Y in (A, G)]
        self._psi: list[tuple[Tensor, Tensor]] = []
        self._sigma: list[tuple[Tensor, Tensor, Tensor]] = []  # Σ⁻¹ = (K_G ⊗ K_A) diag(w) (K_G ⊗ K_A)ᵀ
        for l in range(len(A)):
            halves = []
            for X, L in zip((self._cross[l] if l + 1 < len(A) else (None, None)), lower, strict=True):
                # X is A_{l,l+1} or G_{l,l+1}; half = L_l⁻¹ X L_{l+1}⁻ᵀ has Ψ K Ψᵀ = L_l (half halfᵀ) L_lᵀ
                half = None
                if X is not None:
                    half = torch.linalg.solve_triangular(L[l], X, upper=False)
                    half = torch.linalg.solve_triangular(L[l + 1].T, half, upper=True, left=False)
                halves.append(half)
            if halves[0] is not None:
                psi_A, psi_G = (
                    L[l] @ torch.linalg.solve_triangular(L[l + 1], half, upper=False, left=False)
                    for L, half in zip(lower, halves, strict=True)
                )
                self._psi.append((psi_G, psi_A))
            (s_A, K_A), (s_G, K_G) = (self._congruence(L[l], half) for L, half in zip(lower, halves, strict=True))
            gap = 1 - torch.outer(s_G, s_A)
            if not float(gap.min()) > 10 * torch.finfo(gap.dtype).eps:
                raise ValueError(
                    f"Layer {self.partition.names[l]!r} is determined by the next one at damping {self.damping:g}; "
                    "choose a larger damping."
                )
            self._sigma.append((K_G, K_A, 1 / gap))

    def _cholesky(self, X: Tensor, name: str) -> Tensor:
        L, info = torch.linalg.cholesky_ex(X)
        if int(info):
            raise ValueError(
                f"A factor of layer {name!r} is singular at damping {self.damping:g}; choose a larger damping."
            )
        return L

    @staticmethod
    def _congruence(L: Tensor, half: Tensor | None) -> tuple[Tensor, Tensor]:
        """s, K with ``X⁻¹ = K Kᵀ`` and ``L (half halfᵀ) Lᵀ = K⁻ᵀ diag(s) K⁻¹`` for ``X = L Lᵀ``."""
        eye = torch.eye(len(L), dtype=L.dtype, device=L.device)
        if half is None:
            return L.new_zeros(len(L)), torch.linalg.solve_triangular(L.T, eye, upper=True)
        s, E = torch.linalg.eigh(half @ half.T)
        return s.clamp_min(0), torch.linalg.solve_triangular(L.T, E, upper=True)

    def _apply(self, v: Tensor) -> Tensor:
        pieces = self.partition.split(v)
        y = list(pieces)
        for l, (psi_G, psi_A) in enumerate(self._psi):
            y[l] = y[l] - sandwich(psi_G, pieces[l + 1], psi_A)
        z = []
        for (K_G, K_A, weights), Y in zip(self._sigma, y, strict=True):
            z.append(sandwich(K_G, sandwich(K_G.mT, Y, K_A.mT) * weights[..., None], K_A))
        x = list(z)
        for l, (psi_G, psi_A) in enumerate(self._psi):
            x[l + 1] = x[l + 1] - sandwich(psi_G.mT, z[l], psi_A.mT)
        return self.partition.join(x)
