"""K-FAC, EKFAC and the block-tridiagonal K-FAC: a block of F is taken for a Kronecker product, and damped."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from .checks import check_choice, check_type
from .decompositions import Eigenvalues, cholesky, inverse
from .fisher import Fisher
from .kronecker import KroneckerFactors, shifted
from .kronecker_fisher import KroneckerFisher
from .preconditioner import Preconditioner

RULES = ("eigen", "factored")


class KFAC(Preconditioner):
    """K-FAC (Martens and Grosse 2015): the block of layer l in F is taken for ``G_l ⊗ A_l``.

    For the matrix R of a layer, with ``G = U_G diag(d_G) U_Gᵀ`` and A alike, the two rules of damping give

    - ``"eigen"``: ``U_G ((U_Gᵀ R U_A) / (d_G d_Aᵀ + λ)) U_Aᵀ``, exactly ``(G ⊗ A + λI)⁻¹``;
    - ``"factored"``: ``(G + √λ/π I)⁻¹ R (A + π√λ I)⁻¹``, the paper's section 6.3, which needs no eigenvectors.

    A vector layer, such as the scale and shift of a norm, has its exact block for G and A = 1; λ is added to it whole
    under either rule. The rule for a tied weight: :func:`kfac_viz.method.fisher.kronecker_factors`.
    Layers of one shape, wherever they are in the network, go through one batched product. The A of an embedding is
    diagonal and stays so. A layer of several groups, such as a depthwise convolution, has a pair of factors for each,
    and what lies between them in its block is left out.

    Args:
        F: a :class:`Fisher`, or :class:`KroneckerFactors` such as an optimizer averages.
        damping: λ.
        rule: ``"eigen"`` or ``"factored"``.
        convention: ``"expand"`` or ``"reduce"`` for layers used at several positions (Eschenhagen et al. 2023).
        factors: which product stands for a block of F: ``"kfac"``, or ``"shampoo"``, ``"nearest"`` or ``"kl"``, see
            :func:`kfac_viz.method.products.product`. λ enters after it, by either rule.

    Attributes:
        fallbacks: factors whose Cholesky failed by round-off, upon which all went through their eigenvectors.

    Raises:
        ValueError: NaN or an indefinite factor, or λ = 0 where a layer is singular, each naming the layer; ``factors``
            that do not fit (:meth:`Fisher.kronecker`), or that are asked for beside factors that are there already.

    In a linear network with Gaussian outputs the blocks are Kronecker products. Of one layer K-FAC is then exact:

    >>> import kfac_viz as kv
    >>> F = kv.problems.deep_linear((3, 2)).capture()
    >>> M, exact = KFAC(F, damping=0.1), torch.linalg.inv(F.damped(0.1).dense())
    >>> torch.allclose(M.dense(), exact)
    True
    """

    fallbacks = 0

    def __init__(
        self,
        F: Fisher | KroneckerFactors,
        damping: float,
        rule: str = "eigen",
        convention: str = "expand",
        factors: str = "kfac",
    ) -> None:
        check_type("F", F, Fisher, KroneckerFactors)
        self.rule = check_choice("rule", rule, RULES)
        if isinstance(F, KroneckerFactors) and factors != "kfac":
            raise ValueError(f"factors={factors!r} are made of a Fisher; these Kronecker factors are there already.")
        self.factors = F if isinstance(F, KroneckerFactors) else F.kronecker(convention, factors)
        self._init(self.factors, damping)

    def kronecker(self) -> KroneckerFactors:
        """The factors, as a Fisher has them: coarse spaces can be built from a preconditioner too."""
        return self.factors

    def _damp(self, damping: float) -> None:
        super()._damp(damping)
        if self.rule == "eigen":
            self._weights = self._eigenvalues.inverse(self.damping)
        else:
            self._inverses = self._inverted_factors()

    def _apply(self, v: Tensor) -> Tensor:
        stacks = self.factors.stacks
        if self.rule == "eigen":
            layers = zip(self.factors.eigen, self._weights, stacks.split(v), strict=True)
            return stacks.join([A.back(G.U @ (A.onto(G.U.mT @ R) * w)) for (G, A), w, R in layers])
        layers = zip(self._inverses, stacks.split(v), strict=True)
        return stacks.join([G_inv @ _right(R, A_inv, G_inv) for (G_inv, A_inv), R in layers])

    @cached_property
    def _eigenvalues(self) -> Eigenvalues:
        """``d_G d_Aᵀ``, stacked: the same for every λ."""
        f = self.factors
        names = [name for members in f.stacks.groups for l in members for name in f.called(l)]
        order = [name[0].upper() + name[1:] for name in names]
        return Eigenvalues(self._moments(), order)

    def _moments(self) -> list[Tensor]:
        return [G.d[..., :, None] * A.d[..., None, :] for G, A in self.factors.eigen]

    def _inverted_factors(self) -> list[tuple[Tensor, Tensor]]:
        """``(G + √λ/π I)⁻¹`` and ``(A + π√λ I)⁻¹``, stacked: by Cholesky, a third of the work of LU."""
        f = self.factors
        damped = [
            (shifted(G, for_G), shifted(A, for_A) if A.ndim == G.ndim else A + for_A[..., None])
            for (G, A), (for_G, for_A) in zip(f.stacked, f.stacked_shifts(self.damping), strict=True)
        ]
        lower = [[_cholesky(X, pair[0]) for X in pair] for pair in damped]
        failed = sum(torch.cat([info.view(-1) for pair in lower for _, info in pair]).ne(0).tolist())
        if self.damping > 0 and not failed:
            return [tuple(_inverse(L, pair[0][0]) for L, _ in pair) for pair in lower]
        self.fallbacks = failed if self.damping > 0 else 0
        inverses = [
            [w if e.U is None else (e.U * w[..., None, :]) @ e.U.mT for e, w in zip(side, weights, strict=True)]
            for side, weights in zip((f.eigen_G, f.eigen_A), zip(*self._factor_weights(), strict=True), strict=True)
        ]
        return list(zip(*map(f.stacks.gather, inverses), strict=True))

    def _factor_weights(self) -> list[tuple[Tensor, Tensor]]:
        """``1/(d_G + √λ/π)`` and ``1/(d_A + π√λ)`` of every layer."""
        f = self.factors
        layers = zip(f.eigen_G, f.eigen_A, f.shifts(self.damping), self.partition.names, strict=True)
        return [
            (
                _damped_inverse(G.d, for_G, f"Layer {name!r}, factor G"),
                _damped_inverse(A.d, for_A, f"Layer {name!r}, factor A"),
            )
            for G, A, (for_G, for_A), name in layers
        ]

    def eigenvalues(self) -> list[Tensor]:
        """The eigenvalues of M, one (out, features) per layer, in the order of the Kronecker eigenvectors."""
        if self.rule == "eigen":
            found = self.factors.stacks.scatter(self._weights, 2)
        else:
            found = [G[..., :, None] * A[..., None, :] for G, A in self._factor_weights()]
        return [w.reshape(layer.shape) for w, layer in zip(found, self.partition.layers, strict=True)]

    def dense(self) -> Tensor:
        self.check_dense()
        f, units = self.factors, self.factors.stacks.units
        if self.rule == "factored":
            pairs = [(G, A if A.ndim == G.ndim else A.diag_embed()) for G, A in self._inverses]
            G, A = (units(side, 2) for side in zip(*pairs, strict=True))
            blocks = (torch.kron(g.contiguous(), a.contiguous()) for g, a in zip(G, A, strict=True))
        else:
            G, A = ([pair[side].vectors() for pair in f.eigen] for side in (0, 1))
            blocks = map(_from_eigenvectors, *(units(side, 2) for side in (G, A, self._weights)))
        return self._in_range(torch.block_diag(*blocks), "The matrix")

    def __repr__(self) -> str:
        return self._describe(f"λ = {self.damping:.3g}", f"rule {self.rule}")


class EKFAC(KFAC):
    """K-FAC's eigenbasis with the exact variances along it (George et al. 2018): never farther from F_ll.

    With other ``factors`` the eigenbasis is theirs. SOAP takes that of ``"shampoo"`` (Vyas et al. 2025).

    >>> import kfac_viz as kv
    >>> F = kv.problems.digits((4,), 20, side=4).capture()
    >>> blocks = kv.BlockDiagonal(F, 1.0).dense().inverse()
    >>> errors = [float((M.dense().inverse() - blocks).norm()) for M in (EKFAC(F, 1.0), KFAC(F, 1.0))]
    >>> errors[0] < errors[1]
    True

    Raises:
        TypeError: F is no Fisher: the variances need its vectors.
        ValueError: as :class:`KFAC`.
    """

    def __init__(self, F: Fisher, damping: float, convention: str = "expand", factors: str = "kfac") -> None:
        check_type("F", F, Fisher)
        self._F = F
        super().__init__(F, damping, "eigen", convention, factors)

    def _moments(self) -> list[Tensor]:
        f = self.factors
        bases = [(G.U, A.U) for G, A in zip(f.eigen_G, f.eigen_A, strict=True)]
        moments = zip(self._F.second_moments(bases), self.partition.layers, strict=True)
        return f.stacks.gather([x.view(*layer.axis, *layer.unit) for x, layer in moments])

    def __repr__(self) -> str:
        return self._describe(f"λ = {self.damping:.3g}")


class BlockTridiagonal(Preconditioner):
    """K-FAC's block-tridiagonal inverse (Martens and Grosse 2015, section 4.3 and appendix B), dense.

    A Gaussian chain: layer l depends on layer l+1 alone, through ``Ψ``. With the damped Kronecker model ``K``
    (factored damping on diagonal blocks, cross blocks as they are),

        M = Ξᵀ Λ Ξ,   Ξ = I − superdiag(Ψ),   Λ = diag(Σ_1⁻¹, …, Σ_L⁻¹),
        Ψ_l = K_{l,l+1} K_{l+1,l+1}⁻¹,   Σ_l = K_ll − Ψ_l K_{l+1,l+1} Ψ_lᵀ,   Σ_L = K_LL.

    ``M⁻¹`` agrees with K on the diagonal and next to it, and M is its exact inverse for two layers. K has what lies
    between the groups of a layer.

    >>> import kfac_viz as kv
    >>> F = kv.problems.digits((3, 3), 20, side=4).capture()  # three layers
    >>> inverse = BlockTridiagonal(F, damping=0.1).dense().inverse()
    >>> first, second, third = F.partition.slices
    >>> torch.allclose(inverse[first, second], kv.KroneckerFisher(F).block(0, 1), atol=1e-10)
    True
    """

    def __init__(self, F: Fisher, damping: float, convention: str = "expand") -> None:
        check_type("F", F, Fisher)
        F.check_dense()
        self.factors = F.kronecker(convention)
        K, f = KroneckerFisher(F, convention), self.factors
        self._cross = [K.block(l, l + 1) for l in range(len(F.partition) - 1)]
        grouped = [l for l, layer in enumerate(F.partition.layers) if layer.groups > 1]
        plain = f.blocks() if grouped else []
        self._within = {l: K.block(l, l) - plain[l] for l in grouped}  # what lies between the groups
        self._init(F, damping)

    def _damp(self, damping: float) -> None:
        super()._damp(damping)
        round_off, K = 10 * torch.finfo(self.dtype).eps, self.factors.blocks(self.damping)
        for l, block in self._within.items():
            K[l] += block
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


def _right(R: Tensor, A: Tensor, G: Tensor) -> Tensor:
    """``R A``, for a factor A that is a matrix as G is, or a diagonal."""
    return R @ A if A.ndim == G.ndim else R * A[..., None, :]


def _cholesky(X: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """The Cholesky factor of X, and where there is none a number that is not 0; of a diagonal X the diagonal itself."""
    if X.ndim == G.ndim:
        return torch.linalg.cholesky_ex(X)
    return X, (~(X > 0)).any(-1).int()


def _inverse(L: Tensor, G: Tensor) -> Tensor:
    """The inverse from what :func:`_cholesky` found."""
    return torch.cholesky_inverse(L) if L.ndim == G.ndim else L.reciprocal()


def _damped_inverse(d: Tensor, shift: Tensor, what: str) -> Tensor:
    """``1 / (d + shift)`` of a layer, or of each of its groups."""
    if d.ndim == 1:
        return inverse(d, float(shift), what)
    return torch.stack([_damped_inverse(*group, what) for group in zip(d, shift, strict=True)])


def _from_eigenvectors(U_G: Tensor, U_A: Tensor, w: Tensor) -> Tensor:
    """``Σ_ab w_ab u_a u_aᵀ ⊗ u_b u_bᵀ`` with the columns u_a of U_G and u_b of U_A, (P_l, P_l).

    Contracted over b and then over a: cheaper than a product of Kronecker products.
    """
    (o, i), right = w.shape, w @ torch.einsum("ib,jb->bij", U_A, U_A).flatten(1)
    left = torch.einsum("oa,pa->aop", U_G, U_G).flatten(1)
    return (left.T @ right).view(o, o, i, i).transpose(1, 2).reshape(o * i, o * i)
