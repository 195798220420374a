"""Symmetric matrices as objects: apply with ``@``, or look at them with ``dense()``."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from .checks import check_damping, check_type
from .partition import Partition

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

    from .coarse import CoarseSpace


T = TypeVar("T")


class Eigen(NamedTuple):
    """``U diag(d) Uᵀ``: ascending eigenvalues ``d`` (n,), eigenvectors in the columns of ``U`` (n, n)."""

    d: Tensor
    U: Tensor


def flushed(matrix: Tensor) -> Tensor:
    """Numbers so small that their products underflow become zero: LAPACK's eigensolvers fail on some of them."""
    info = torch.finfo(matrix.dtype)
    return hardshrink(matrix, info.tiny / info.eps)


def psd_eigen(matrix: Tensor, what: str) -> Eigen:
    """Eigendecomposition of a positive semi-definite matrix; round-off below zero becomes zero.

    Raises:
        ValueError: NaN, inf, or an eigenvalue below zero by more than round-off; ``what`` names the matrix.
    """
    if not torch.isfinite(matrix).all():
        raise ValueError(f"{what} holds NaN or inf.")
    d, U = torch.linalg.eigh(flushed(matrix))
    smallest, largest = float(d[0]), float(d[-1])
    if smallest < -100 * len(d) * torch.finfo(d.dtype).eps * max(-smallest, largest):
        raise ValueError(
            f"{what} is not positive semi-definite: its eigenvalues run from {smallest:.3g} to {largest:.3g}."
        )
    return Eigen(d.clamp_min(0), U)


class Operator(ABC):
    """A P×P matrix over a :class:`Partition`, with one dtype and one device.

    ``op @ v`` takes ``v`` of shape (P,) or (P, k) and the operator's dtype and device, and returns the
    same shape. A ValueError or TypeError says what came instead.
    """

    partition: Partition
    dtype: torch.dtype
    device: torch.device
    symmetric: bool = True
    semidefinite: bool = False  # positive semi-definite by construction, so that less than zero is round-off

    @abstractmethod
    def _apply(self, v: Tensor) -> Tensor:
        """The product with unchecked ``v`` of shape (P, k)."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.partition.size, self.partition.size

    def __matmul__(self, v: Tensor) -> Tensor:
        self.check(v)
        return self._apply(v) if v.ndim == 2 else self._apply(v[:, None])[:, 0]

    def check(self, v: Tensor) -> None:
        """Refuse a vector that this operator cannot take, in words."""
        self.partition.check(v)
        if v.dtype != self.dtype or v.device != self.device:
            raise ValueError(
                f"{type(self).__name__} holds {self.dtype} on {self.device}; the vector is {v.dtype} on "
                f"{v.device}. Convert one of them."
            )
        self.partition.check_finite(v, "The vector")

    def eye(self) -> Tensor:
        return torch.eye(self.partition.size, dtype=self.dtype, device=self.device)

    def dense(self) -> Tensor:
        """The matrix itself, (P, P)."""
        return self._apply(self.eye())

    def block(self, l: int | str, m: int | str) -> Tensor:
        """The block of layers l and m, (P_l, P_m)."""
        rows, cols = (self.partition.slices[self.partition.index(i)] for i in (l, m))
        return self._apply(self.eye()[:, cols])[rows]

    def diagonal(self) -> Tensor:
        """The diagonal, (P,)."""
        return self.dense().diagonal().clone()

    @cached_property
    def eigen(self) -> Eigen:
        """Dense eigendecomposition, computed once: 9 P³ or so.

        Raises:
            ValueError: the operator is not symmetric positive semi-definite.
        """
        check_symmetric(self, "eigen")
        matrix = self.dense()
        return psd_eigen((matrix + matrix.T) / 2, f"The matrix of {type(self).__name__}")

    def image(self, Z: CoarseSpace) -> Image:
        """The columns of this operator times Z, kept in the cheapest form that can be applied."""
        return Image(Z, self._apply(Z.dense()))

    def damped(self, damping: float) -> Damped:
        """``self + λI``."""
        return Damped(self, damping)

    def to_scipy(self) -> LinearOperator:
        """This operator for SciPy's solvers; numpy vectors in, numpy vectors out."""
        from scipy.sparse.linalg import LinearOperator

        def matmat(x):
            v = torch.as_tensor(x)
            if v.is_complex():
                raise TypeError(f"{type(self).__name__} is real; got a vector of {v.dtype}.")
            return (self @ v.to(self.device, self.dtype)).cpu().numpy()

        def transpose(x):
            check_symmetric(self, "the transposed product")
            return matmat(x)

        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        return LinearOperator(
            self.shape, matvec=matmat, matmat=matmat, rmatvec=transpose, rmatmat=transpose, dtype=dtype
        )

    def _describe(self, *facts: str) -> str:
        where = f"{str(self.dtype).removeprefix('torch.')} on {self.device}"
        return f"{type(self).__name__}({', '.join((str(self.partition), *filter(None, facts), where))})"

    def __repr__(self) -> str:
        return self._describe()


class Dense(Operator):
    """A symmetric matrix that is simply there: ``Dense(matrix, partition)``."""

    def __init__(self, matrix: Tensor, partition: Partition) -> None:
        check_type("matrix", matrix, Tensor)
        check_type("partition", partition, Partition)
        if matrix.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"Expected a float32 or float64 matrix; got {matrix.dtype}.")
        if tuple(matrix.shape) != (partition.size, partition.size):
            raise ValueError(f"Expected shape {(partition.size,) * 2} for {partition}; got {tuple(matrix.shape)}.")
        partition.check_finite(matrix, "The matrix")
        if not torch.allclose(matrix, matrix.T):
            raise ValueError("The matrix is not symmetric; the methods of this package assume that it is.")
        self.partition, self.dtype, self.device = partition, matrix.dtype, matrix.device
        self._matrix = matrix.detach().clone()

    def _apply(self, v: Tensor) -> Tensor:
        return self._matrix @ v

    def dense(self) -> Tensor:
        return self._matrix.clone()

    def block(self, l: int | str, m: int | str) -> Tensor:
        rows, cols = (self.partition.slices[self.partition.index(i)] for i in (l, m))
        return self._matrix[rows, cols].clone()


class Damped(Operator):
    """``A = B + λI``, the matrix of the system, with B positive semi-definite."""

    def __init__(self, operator: Operator, damping: float) -> None:
        self.operator = operator
        self.damping = check_damping(damping)
        self.partition, self.dtype, self.device = operator.partition, operator.dtype, operator.device

    def _apply(self, v: Tensor) -> Tensor:
        return self.operator._apply(v).add_(v, alpha=self.damping)

    def dense(self) -> Tensor:
        matrix = self.operator.dense()
        matrix.diagonal().add_(self.damping)
        return matrix

    def block(self, l: int | str, m: int | str) -> Tensor:
        block = self.operator.block(l, m)
        if self.partition.index(l) == self.partition.index(m):
            block.diagonal().add_(self.damping)
        return block

    def diagonal(self) -> Tensor:
        return self.operator.diagonal() + self.damping

    @cached_property
    def eigen(self) -> Eigen:
        d, U = self.operator.eigen
        return Eigen(d + self.damping, U)

    def solve(self, r: Tensor) -> Tensor:
        """``A⁻¹ r`` through the eigenvectors of B, which every λ shares; r is (P,) or (P, k)."""
        self.check(r)
        d, U = self.operator.eigen
        weights = inverse(d, self.damping, "The matrix")
        return U @ ((weights if r.ndim == 1 else weights[:, None]) * (U.T @ r))

    def with_damping(self, damping: float) -> Damped:
        return Damped(self.operator, damping)

    def __repr__(self) -> str:
        return f"{self.operator!r} + {self.damping:.3g}·I"


class Image:
    """``B Z`` for an operator B and a coarse space Z: prolong ``B Z c``, restrict ``(B Z)ᵀ r``."""

    def __init__(self, Z: CoarseSpace, columns: Tensor) -> None:
        self.Z, self._columns = Z, columns

    def prolong(self, c: Tensor) -> Tensor:
        return self._columns @ c

    def add_(self, v: Tensor, c: Tensor) -> Tensor:
        """``v + B Z c``, in place."""
        return v.add_(self.prolong(c))

    def restrict(self, r: Tensor) -> Tensor:
        return self._columns.T @ r

    def galerkin(self) -> Tensor:
        """``Zᵀ B Z``, (k, k)."""
        return self.Z.restrict(self._columns)


def check_symmetric(operator: Operator, what: str) -> None:
    """Refuse a non-symmetric operator by its name."""
    if not operator.symmetric:
        name = getattr(operator, "correction", type(operator).__name__)
        raise ValueError(f"{what} needs a symmetric operator and {name!r} is not symmetric; take 'balanced'.")


def check_same_space(first: Operator, other: Operator | CoarseSpace) -> None:
    """Refuse two objects that do not live on one partition, dtype and device."""
    for field in ("partition", "dtype", "device"):
        mine, theirs = getattr(first, field), getattr(other, field)
        if mine != theirs:
            raise ValueError(
                f"{type(first).__name__} and {type(other).__name__} differ in {field}: {mine} and {theirs}. "
                "Build both from one capture."
            )


def inverse(d: Tensor, damping: float, what: str) -> Tensor:
    """``1 / (d + λ)`` for eigenvalues d ≥ 0; refuses λ = 0 where the matrix is singular to precision."""
    total = d + damping
    if not total.numel():
        return total
    smallest, largest = (float(x) for x in total.aminmax())
    info = torch.finfo(d.dtype)
    if not smallest > (largest * d.numel() * info.eps if damping == 0 else info.tiny):
        raise ValueError(
            f"{what} is {'singular' if smallest >= 0 else 'indefinite'} in {d.dtype} (smallest eigenvalue "
            f"{float(d.min()):.2g}, largest {float(d.max()):.2g}) and the damping {damping:g} does not mend it; choose "
            "a larger damping."
        )
    if not math.isfinite(largest):
        raise ValueError(f"{what} with damping {damping:g} overflows {d.dtype}; choose a smaller damping.")
    return total.reciprocal()


def replace(obj: T, **changes: object) -> T:
    """A shallow copy with some attributes changed: what was factorised is shared, never redone."""
    twin = copy.copy(obj)
    vars(twin).pop("eigen", None)  # belongs to the old λ
    vars(twin).update(changes)
    return twin
