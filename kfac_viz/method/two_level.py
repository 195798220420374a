"""Two-level preconditioners: a one-level M and a coarse correction Q, combined in four ways."""

from __future__ import annotations

import copy
from functools import cached_property

import torch
from torch import Tensor

from .checks import check_choice, check_damping, check_type
from .columns import CoarseSpace
from .decompositions import Eigenvalues, eigenpairs
from .operator import Damped, Image, Operator, check_same_space, check_symmetric, uncached_copy
from .preconditioner import Preconditioner

CORRECTIONS = ("additive", "a-def1", "a-def2", "balanced")


class CoarseOperator:
    """``E = Zᵀ A Z``, the system as the coarse space sees it (k, k), and its inverse.

    With ``A = B + λI``, ``E = ZᵀBZ + λ ZᵀZ``: the coarse damping is consistent, so that nothing changes when columns
    are rescaled or mixed. In a basis C of the coarse space that is orthonormal and in which ZᵀBZ is diagonal λ
    enters last: ``E⁻¹ = C (σ + λ)⁻¹ Cᵀ``.

    Attributes:
        ZBZ, gram: ZᵀBZ and ZᵀZ, both (k, k).
        basis, weights: C, (k, k), and ``(σ + λ)⁻¹``, (k,).
    """

    def __init__(self, Z: CoarseSpace, ZBZ: Tensor, damping: float, *, semidefinite: bool) -> None:
        self.gram, self.ZBZ = Z.gram(), ZBZ
        L, info = torch.linalg.cholesky_ex(self.gram)
        whole = (self.ZBZ.isfinite() & self.gram.isfinite()).all()
        dependent, whole = torch.stack([info, whole.to(info)]).tolist()
        if not whole:
            raise ValueError(f"The coarse operator of {Z.name!r} overflows {Z.dtype}; scale the columns of Z.")
        if dependent:
            raise ValueError(
                f"The {Z.size} columns of the coarse space {Z.name!r} are linearly dependent in {Z.dtype}; take fewer."
            )
        half = torch.linalg.solve_triangular(L, self.ZBZ, upper=False)
        reduced = torch.linalg.solve_triangular(L, half.T, upper=False)
        σ, V = eigenpairs((reduced + reduced.T) / 2, "The coarse operator")
        self._eigenvalues = Eigenvalues([σ.clamp_min(0) if semidefinite else σ], ["The coarse operator"], dims=1)
        self.basis = torch.linalg.solve_triangular(L.T, V, upper=True)
        self._damp(damping)

    def _damp(self, damping: float) -> None:
        self.damping = damping
        (self.weights,) = self._eigenvalues.inverse(self.damping)

    def with_damping(self, damping: float) -> CoarseOperator:
        """At another λ; what was factorised is shared."""
        twin = copy.copy(self)
        twin._damp(damping)
        return twin

    def dense(self) -> Tensor:
        """E itself, (k, k)."""
        return self.ZBZ + self.damping * self.gram

    def solve(self, c: Tensor) -> Tensor:
        """``E⁻¹ c`` for c (..., k)."""
        return ((c @ self.basis) * self.weights) @ self.basis.mT


class CoarseCorrection(Operator):
    """The coarse correction ``Q = Z E⁻¹ Zᵀ`` with ``E = Zᵀ A Z``: what the coarse space solves by itself.

    >>> from kfac_viz.method.operator import Dense
    >>> from kfac_viz.method.partition import Partition
    >>> partition = Partition.from_sizes([1, 1])
    >>> A = Dense(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), partition)
    >>> Z = CoarseSpace(partition, torch.tensor([[1.0], [1.0]]))  # E = 6
    >>> CoarseCorrection(A, Z) @ torch.tensor([6.0, 0.0])
    tensor([1.0000, 1.0000])

    Args:
        A: the matrix of the system, symmetric.
        Z: the coarse space.
        image: B Z, with ``A = B + λI``, where it is known already.

    Raises:
        ValueError: columns that depend on each other, an E that is not positive definite, or an overflow.
    """

    def __init__(self, A: Operator, Z: CoarseSpace, *, image: Image | None = None) -> None:
        check_type("A", A, Operator)
        check_type("Z", Z, CoarseSpace)
        check_same_space(A, Z)
        check_symmetric(A, "The coarse operator")
        self.partition, self.dtype, self.device = A.partition, A.dtype, A.device
        B, damping = _parts(A)
        self.Z = Z
        ZBZ = B.galerkin(Z) if image is None else image.galerkin()
        self.E = CoarseOperator(Z, ZBZ, damping, semidefinite=B.semidefinite)

    @property
    def damping(self) -> float:
        return self.E.damping

    def with_damping(self, damping: float) -> CoarseCorrection:
        """The same coarse space at another λ: neither Z nor its factorisation changes."""
        return uncached_copy(self, E=self.E.with_damping(check_damping(damping, self.dtype)))

    def _apply(self, v: Tensor) -> Tensor:
        return self.Z.prolong(self.E.solve(self.Z.restrict(v)))

    @cached_property
    def columns(self) -> Tensor:
        """``Z C``, an orthonormal basis of the coarse space, dense (P, k); the same for every λ."""
        return self.Z.prolong(self.E.basis.mT).mT

    def dense(self) -> Tensor:
        return self._in_range((self.columns * self.E.weights) @ self.columns.T, "The matrix")

    def __repr__(self) -> str:
        return self._describe(f"{self.Z.name}, {self.Z.size} columns", f"λ = {self.damping:.3g}")


class TwoLevel(Operator):
    """Two-level K-FAC: a one-level preconditioner M with a coarse correction (Tang et al. 2009, table 1).

    With ``P = I − A Q``, for a residual r:

    - ``additive``: ``M r + Q r`` (Tselepidis et al. 2020);
    - ``a-def1``: ``Q r + M (r − A Q r)``, coarse then fine;
    - ``a-def2``: ``M r + Q (r − A M r)``, fine then coarse: the new residual is orthogonal to Z;
    - ``balanced``: ``Q r + Pᵀ M P r``, symmetric.

    Args:
        A: the matrix of the system, normally ``F.damped(λ)``.
        M: a one-level preconditioner on the same partition.
        Z: a coarse space; an empty one gives M back.
        correction: one of the four names.
        coarse_operator: another operator to coarsen in place of A, such as ``KroneckerFisher(F).damped(λ)``
            in the 2020 paper. The exactness of the deflated forms is then lost.

    >>> import kfac_viz as kv
    >>> problem = kv.problems.digits((4, 4), 50, side=4)
    >>> F, g = problem.capture(), problem.gradient()
    >>> A, M, Z = F.damped(0.01), kv.KFAC(F, 0.01), kv.coarse.spectral(F, per_layer=2)
    >>> v = TwoLevel(A, M, Z, correction="a-def2") @ g
    >>> bool(Z.restrict(g - A @ v).abs().max() < 1e-12)  # the coarse space is solved
    True

    Raises:
        ValueError: an unknown correction; partitions, dtypes or devices that differ; columns of Z that depend on each
            other; a coarse operator that is singular or indefinite at this λ.
        TypeError: an argument of another kind, by name.
    """

    def __init__(
        self,
        A: Operator,
        M: Preconditioner,
        Z: CoarseSpace,
        correction: str = "balanced",
        *,
        coarse_operator: Operator | None = None,
    ) -> None:
        check_type("A", A, Operator)
        check_type("M", M, Preconditioner)
        check_type("Z", Z, CoarseSpace)
        check_choice("correction", correction, CORRECTIONS)
        check_same_space(A, M)
        check_same_space(A, Z)
        self.partition, self.dtype, self.device = A.partition, A.dtype, A.device
        self.A, self.M, self.Z, self.correction = A, M, Z, correction
        self.coarsens_A = coarse_operator is None  # whether E is built from A itself
        self.coarse_operator = A if coarse_operator is None else coarse_operator
        self.Q = CoarseCorrection(self.coarse_operator, Z, image=self.BZ if self.coarsens_A else None)

    @cached_property
    def BZ(self) -> Image:
        """The columns of B Z, with ``A = B + λI``; the same for every λ."""
        return _parts(self.A)[0].image(self.Z)

    @property
    def symmetric(self) -> bool:
        """Whether plain conjugate gradients may use it."""
        return self.M.symmetric and (self.Z.size == 0 or self.correction in ("additive", "balanced"))

    @property
    def damping(self) -> float:
        return self.M.damping

    def with_damping(self, damping: float) -> TwoLevel:
        """A, M and E at another λ together; nothing is factorised again. The columns of Z stay as they are."""
        for what, operator in (("A", self.A), ("The coarse operator", self.coarse_operator)):
            if not isinstance(operator, Damped):
                raise ValueError(f"{what} ({type(operator).__name__}) has no damping to move; build it as F.damped(λ).")
        A, M, Q = (part.with_damping(damping) for part in (self.A, self.M, self.Q))
        coarse_operator = A if self.coarsens_A else self.coarse_operator.with_damping(damping)
        return uncached_copy(self, A=A, M=M, Q=Q, coarse_operator=coarse_operator)

    def with_correction(self, correction: str) -> TwoLevel:
        """The same levels, combined in another way."""
        return uncached_copy(self, correction=check_choice("correction", correction, CORRECTIONS))

    def _subtract_AZ(self, r: Tensor, c: Tensor) -> Tensor:
        """``r − A Z c`` for r (..., P) and c (..., k), with ``A Z = B Z + λ Z``."""
        left = self.BZ.add_(r.clone(), c, alpha=-1.0)
        return self.Z.add_(left, c, alpha=-_parts(self.A)[1])

    def _restrict_A(self, v: Tensor) -> Tensor:
        """``(A Z)ᵀ v`` for v (..., P): (..., k)."""
        return self.BZ.restrict(v).add_(self.Z.restrict(v), alpha=_parts(self.A)[1])

    def _apply(self, r: Tensor) -> Tensor:
        M, Z, E = self.M._apply, self.Z, self.Q.E
        if Z.size == 0:
            return M(r)
        if self.correction == "a-def2":
            v = M(r)
            return Z.add_(v, E.solve(Z.restrict(r) - self._restrict_A(v)))  # v + Q (r − A v)
        c = E.solve(Z.restrict(r))  # Z c = Q r
        if self.correction == "additive":
            return Z.add_(M(r), c)
        v = M(self._subtract_AZ(r, c))  # the fine level on what the coarse one has left, r − A Z c
        if self.correction == "balanced":
            c = c - E.solve(self._restrict_A(v))  # Pᵀ v = v − Q A v
        return Z.add_(v, c)

    def dense(self) -> Tensor:
        """The matrix (P, P): M plus a product of rank at most twice the coarse dimension."""
        return self._in_range(self.M.dense() + self.contribution(), "The matrix")

    def contribution(self) -> Tensor:
        """What the coarse level adds to M, dense (P, P)."""
        C, w = self.Q.columns, self.Q.E.weights
        if self.correction == "additive" or self.Z.size == 0:
            return (C * w) @ C.T
        AC = self.image_columns + _parts(self.A)[1] * C
        Y = self.M._apply(AC.mT).mT
        if self.correction == "a-def1":
            return ((C - Y) * w) @ C.T
        if self.correction == "a-def2":
            return (C * w) @ (C - Y).T
        w, middle = w[:, None], AC.T @ Y * w  # Q − (C w Yᵀ + its transpose) + C w (ACᵀ Y) w Cᵀ
        return torch.cat([C, Y], 1) @ torch.cat([w * (C.T + middle @ C.T - Y.T), -w * C.T])

    @cached_property
    def image_columns(self) -> Tensor:
        """``F Z C``, dense (P, k), the same for every λ."""
        C = self.Q.E.basis
        return self.BZ.add_(C.new_zeros(C.shape[1], self.partition.size), C.mT).mT

    def __repr__(self) -> str:
        dampings = {"A": _parts(self.A)[1], "M": self.M.damping, "E": self.Q.damping}
        one = len(set(dampings.values())) == 1
        return self._describe(
            f"{type(self.M).__name__} + {self.Z.name}",
            self.correction,
            f"coarse dimension {self.Z.size}",
            f"λ = {self.damping:.3g}" if one else ", ".join(f"λ of {k} = {v:.3g}" for k, v in dampings.items()),
            "" if self.coarsens_A else "coarsens another operator than A",
        )


def _parts(A: Operator) -> tuple[Operator, float]:
    """B and λ of ``A = B + λI``."""
    return (A.operator, A.damping) if isinstance(A, Damped) else (A, 0.0)
