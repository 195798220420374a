"""Two-level preconditioners: a one-level M and a coarse correction Q, combined in four ways."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from .checks import check_choice, check_damping, check_type
from .columns import CoarseSpace
from .decompositions import Eigenvalues, eigenpairs
from .operator import Damped, DampedImage, Image, Operator, check_same_space, check_symmetric, replace
from .preconditioner import Preconditioner

CORRECTIONS = ("additive", "a-def1", "a-def2", "balanced")


class CoarseOperator:
    """``E = Zᵀ A Z``, the system as the coarse space sees it (k, k), and its inverse.

    With ``A = B + λI``, ``E = ZᵀBZ + λ ZᵀZ``: the coarse damping is consistent, so that nothing changes when columns
    are rescaled or mixed. In a basis C of the coarse space that is orthonormal and in which ZᵀBZ is diagonal λ
    enters last: ``E⁻¹ = C (σ + λ)⁻¹ Cᵀ``.

    Attributes:
        galerkin, gram: ZᵀBZ and ZᵀZ, both (k, k).
        basis, weights: C, (k, k), and ``(σ + λ)⁻¹``, (k,).
    """

    def __init__(self, image: Image, damping: float, *, semidefinite: bool) -> None:
        Z = image.Z
        self.gram, self.galerkin = Z.gram(), image.galerkin()
        L, info = torch.linalg.cholesky_ex(self.gram)
        whole = (self.galerkin.isfinite() & self.gram.isfinite()).all()
        dependent, whole = torch.stack([info, whole.to(info)]).tolist()
        if not whole:
            raise ValueError(f"The coarse operator of {Z.name!r} overflows {Z.dtype}; scale the columns of Z.")
        if dependent:
            raise ValueError(
                f"The {Z.size} columns of the coarse space {Z.name!r} are linearly dependent in {Z.dtype}; take fewer."
            )
        half = torch.linalg.solve_triangular(L, self.galerkin, upper=False)
        reduced = torch.linalg.solve_triangular(L, half.T, upper=False)
        σ, V = eigenpairs((reduced + reduced.T) / 2, "The coarse operator")
        self._eigenvalues = Eigenvalues([σ.clamp_min(0) if semidefinite else σ], ["The coarse operator"], dims=1)
        self.basis = torch.linalg.solve_triangular(L.T, V, upper=True)
        self._damp(damping)

    def _damp(self, damping: float) -> None:
        self.damping = damping
        (self.weights,) = self._eigenvalues.inverse(self.damping)

    def at(self, damping: float) -> CoarseOperator:
        """At another λ, which has been checked; what was factorised is shared."""
        twin = replace(self)
        twin._damp(damping)
        return twin

    def dense(self) -> Tensor:
        """E itself, (k, k)."""
        return self.galerkin + self.damping * self.gram

    def solve(self, c: Tensor) -> Tensor:
        """``E⁻¹ c`` for c (..., k)."""
        return ((c @ self.basis) * self.weights) @ self.basis.mT


class CoarseCorrection(Operator):
    """``Q = Z E⁻¹ Zᵀ``. Attributes: ``E``, the :class:`CoarseOperator`; ``image``, the columns of B Z."""

    def __init__(self, A: Operator, Z: CoarseSpace) -> None:
        check_type("A", A, Operator)
        check_type("Z", Z, CoarseSpace)
        check_same_space(A, Z)
        check_symmetric(A, "The coarse operator")
        self.partition, self.dtype, self.device = A.partition, A.dtype, A.device
        base, damping = (A.operator, A.damping) if isinstance(A, Damped) else (A, 0.0)
        self.Z, self.image = Z, base.image(Z)
        self.E = CoarseOperator(self.image, damping, semidefinite=base.semidefinite)

    @property
    def damping(self) -> float:
        return self.E.damping

    def with_damping(self, damping: float) -> CoarseCorrection:
        """The same coarse space at another λ: neither Z nor its factorisation changes."""
        return self.at(check_damping(damping, self.dtype))

    def at(self, damping: float) -> CoarseCorrection:
        """As :meth:`with_damping`, for a λ that has been checked."""
        return replace(self, E=self.E.at(damping))

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
        self.galerkin = coarse_operator is None  # whether E is built from A itself
        self.coarse_operator = A if coarse_operator is None else coarse_operator
        self.Q = CoarseCorrection(self.coarse_operator, Z)

    @cached_property
    def AZ(self) -> DampedImage:
        """The columns of A Z."""
        base, damping = (self.A.operator, self.A.damping) if isinstance(self.A, Damped) else (self.A, 0.0)
        return DampedImage(self.Q.image if self.galerkin else base.image(self.Z), damping)

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
        damping = check_damping(damping, self.dtype)
        A, M, Q = (part.at(damping) for part in (self.A, self.M, self.Q))
        coarse_operator = A if self.galerkin else self.coarse_operator.at(damping)
        return replace(self, A=A, M=M, Q=Q, coarse_operator=coarse_operator, AZ=DampedImage(self.AZ.image, A.damping))

    def with_correction(self, correction: str) -> TwoLevel:
        """The same levels, combined in another way."""
        return replace(self, correction=check_choice("correction", correction, CORRECTIONS))

    def _apply(self, r: Tensor) -> Tensor:
        M, Z, AZ, E = self.M._apply, self.Z, self.AZ, self.Q.E
        if Z.size == 0:
            return M(r)
        if self.correction == "a-def2":
            v = M(r)
            return Z.add_(v, E.solve(Z.restrict(r) - AZ.restrict(v)))  # v + Q (r − A v)
        c = E.solve(Z.restrict(r))  # Z c = Q r
        if self.correction == "additive":
            return Z.add_(M(r), c)
        v = M(AZ.residual(r, c))  # the fine level on what the coarse one has left, r − A Z c
        if self.correction == "balanced":
            c = c - E.solve(AZ.restrict(v))  # Pᵀ v = v − Q A v
        return Z.add_(v, c)

    def dense(self) -> Tensor:
        """The matrix (P, P): M plus a product of rank at most twice the coarse dimension."""
        return self._in_range(self.M.dense() + self.contribution(), "The matrix")

    def contribution(self) -> Tensor:
        """What the coarse level adds to M, dense (P, P)."""
        C, w = self.Q.columns, self.Q.E.weights
        if self.correction == "additive" or self.Z.size == 0:
            return (C * w) @ C.T
        AC = self.image_columns + self.AZ.damping * C
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
        return self.AZ.image.add_(C.new_zeros(C.shape[1], self.partition.size), C.mT).mT

    def __repr__(self) -> str:
        dampings = {"A": self.AZ.damping, "M": self.M.damping, "E": self.Q.damping}
        one = len(set(dampings.values())) == 1
        return self._describe(
            f"{type(self.M).__name__} + {self.Z.name}",
            self.correction,
            f"coarse dimension {self.Z.size}",
            f"λ = {self.damping:.3g}" if one else ", ".join(f"λ of {k} = {v:.3g}" for k, v in dampings.items()),
            "" if self.galerkin else "coarsens another operator than A",
        )
