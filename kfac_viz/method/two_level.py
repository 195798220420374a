"""Two-level preconditioners: a one-level M and a coarse correction Q, combined in four ways."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from .checks import check_choice, check_damping, check_type
from .coarse import CoarseSpace
from .operator import Damped, Image, Operator, check_same_space, check_symmetric, flushed, inverse, replace
from .preconditioner import Preconditioner

CORRECTIONS = ("additive", "a-def1", "a-def2", "balanced")


class CoarseCorrection(Operator):
    """``Q = Z E⁻¹ Zᵀ`` with the Galerkin operator ``E = Zᵀ A Z``.

    With ``A = B + λI``, ``E = ZᵀBZ + λ ZᵀZ``: the coarse damping is consistent, so Q does not change when columns
    are rescaled or mixed. A basis C of the coarse space that is orthonormal and in which ZᵀBZ is diagonal
    lets λ enter last: ``Q = Z C (σ + λ)⁻¹ Cᵀ Zᵀ``. Attributes: ``galerkin`` is ZᵀBZ and ``gram`` ZᵀZ, both (k, k).
    """

    def __init__(self, A: Operator, Z: CoarseSpace, image: Image | None = None) -> None:
        check_type("A", A, Operator)
        check_type("Z", Z, CoarseSpace)
        check_same_space(A, Z)
        check_symmetric(A, "The coarse operator")
        self.partition, self.dtype, self.device = A.partition, A.dtype, A.device
        base, self.damping = (A.operator, A.damping) if isinstance(A, Damped) else (A, 0.0)
        self.Z, self.image = Z, image if image is not None else base.image(Z)
        self.gram, self.galerkin = Z.gram(), self.image.galerkin()
        if not torch.isfinite(self.galerkin).all():
            raise ValueError("The coarse operator holds NaN or inf.")
        L, info = torch.linalg.cholesky_ex(self.gram)
        if int(info):
            raise ValueError(
                f"The {Z.size} columns of the coarse space {Z.name!r} are linearly dependent in {Z.dtype}; take fewer."
            )
        half = torch.linalg.solve_triangular(L, self.galerkin, upper=False)
        reduced = torch.linalg.solve_triangular(L, half.T, upper=False)
        sigma, V = torch.linalg.eigh(flushed((reduced + reduced.T) / 2))
        self._sigma = sigma.clamp_min(0) if base.semidefinite else sigma
        self._basis = torch.linalg.solve_triangular(L.T, V, upper=True)  # C, (k, k)
        self._damp(self.damping)

    def _damp(self, damping: float) -> None:
        self.damping = check_damping(damping)
        self._weights = inverse(self._sigma, self.damping, "The coarse operator")

    def with_damping(self, damping: float) -> CoarseCorrection:
        """The same coarse space at another λ: neither Z nor its factorisation changes."""
        twin = replace(self)
        twin._damp(damping)
        return twin

    @property
    def E(self) -> Tensor:
        """``Zᵀ A Z``, (k, k)."""
        return self.galerkin + self.damping * self.gram

    def solve(self, c: Tensor) -> Tensor:
        """``E⁻¹ c`` for c (k,) or (k, k')."""
        weights = self._weights if c.ndim == 1 else self._weights[:, None]
        return self._basis @ (weights * (self._basis.T @ c))

    def _apply(self, v: Tensor) -> Tensor:
        return self.Z.prolong(self.solve(self.Z.restrict(v)))

    @cached_property
    def columns(self) -> Tensor:
        """``Z C``, an orthonormal basis of the coarse space, dense (P, k); the same for every λ."""
        return self.Z.prolong(self._basis)

    def dense(self) -> Tensor:
        return (self.columns * self._weights) @ self.columns.T

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
        if self.galerkin:
            self.image = self.Q.image

    @cached_property
    def image(self) -> Image:
        """The columns of A Z, undamped."""
        base = self.A.operator if isinstance(self.A, Damped) else self.A
        return base.image(self.Z)

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
        return replace(self, A=A, M=M, Q=Q, coarse_operator=self.coarse_operator.with_damping(damping))

    def with_correction(self, correction: str) -> TwoLevel:
        """The same levels, combined in another way."""
        return replace(self, correction=check_choice("correction", correction, CORRECTIONS))

    def _apply(self, r: Tensor) -> Tensor:
        M, Q, Z = self.M, self.Q, self.Z
        if Z.size == 0:
            return M._apply(r)
        if self.correction == "additive":
            return Z.add_(M._apply(r), Q.solve(Z.restrict(r)))
        if self.correction == "a-def2":
            v = M._apply(r)
            return Z.add_(v, Q.solve(Z.restrict(r) - self._restrict_A(v)))
        c = Q.solve(Z.restrict(r))
        v = M._apply(self._add_AZ_(r.clone(), -c))
        if self.correction == "balanced":
            c = c - Q.solve(self._restrict_A(v))
        return Z.add_(v, c)

    def _add_AZ_(self, v: Tensor, c: Tensor) -> Tensor:
        """``v + A Z c``, in place."""
        return self.Z.add_(self.image.add_(v, c), c, alpha=getattr(self.A, "damping", 0.0))

    def _restrict_A(self, v: Tensor) -> Tensor:
        """``Zᵀ A v``."""
        damping = getattr(self.A, "damping", 0.0)
        return self.image.restrict(v) + damping * self.Z.restrict(v)

    def dense(self) -> Tensor:
        """The matrix (P, P): M plus a product of rank at most twice the coarse dimension."""
        return self.M.dense() + self.contribution()

    def contribution(self) -> Tensor:
        """What the coarse level adds to M, dense (P, P)."""
        C, w = self.Q.columns, self.Q._weights
        if self.correction == "additive" or self.Z.size == 0:
            return (C * w) @ C.T
        AC = self.image_columns + getattr(self.A, "damping", 0.0) * C
        Y = self.M @ AC
        if self.correction == "a-def1":
            return ((C - Y) * w) @ C.T
        if self.correction == "a-def2":
            return (C * w) @ (C - Y).T
        w, middle = w[:, None], AC.T @ Y * self.Q._weights  # Q − (C w Yᵀ + its transpose) + C w (ACᵀ Y) w Cᵀ
        return torch.cat([C, Y], 1) @ torch.cat([w * (C.T + middle @ C.T - Y.T), -w * C.T])

    @cached_property
    def image_columns(self) -> Tensor:
        """``F Z C``, the same for every λ."""
        return self.image.prolong(self.Q._basis)

    def __repr__(self) -> str:
        dampings = {"A": getattr(self.A, "damping", 0.0), "M": self.M.damping, "E": self.Q.damping}
        one = len(set(dampings.values())) == 1
        return self._describe(
            f"{type(self.M).__name__} + {self.Z.name}",
            self.correction,
            f"coarse dimension {self.Z.size}",
            f"λ = {self.damping:.3g}" if one else ", ".join(f"λ of {k} = {v:.3g}" for k, v in dampings.items()),
            "" if self.galerkin else "coarsens another operator than A",
        )
