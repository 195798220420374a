"""Symmetric matrices as objects: apply with ``@``, or look at them with ``dense()``."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from contextlib import nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from .checks import check_count, check_damping, check_room, check_type, finite, own_precision
from .columns import CoarseSpace
from .decompositions import Eigen, cholesky, eigvalsh, inverse, psd_eigen
from .partition import Partition

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator


T = TypeVar("T")


class Operator(ABC):
    """A P×P matrix over a :class:`Partition`, with one dtype and one device.

    ``op @ v`` takes ``v`` of shape (P,) or (P, k) and the operator's dtype and device, and returns the same shape.
    A ValueError or TypeError says what came instead, or that the product overflows. Inside, several vectors are rows,
    (..., P), so that every product broadcasts and one vector is no special case.
    """

    partition: Partition
    dtype: torch.dtype
    device: torch.device
    symmetric: bool = True
    semidefinite: bool = False  # positive semi-definite by construction, so that less than zero is round-off

    @abstractmethod
    def _apply(self, v: Tensor) -> Tensor:
        """The product with unchecked vectors ``v`` of shape (..., P)."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.partition.size, self.partition.size

    def __matmul__(self, v: Tensor) -> Tensor:
        with own_precision(self.device) if self._lowered else nullcontext():
            self.check(v)
            product = self._apply(v.mT).mT if v.ndim == 2 else self._apply(v)
            return self._in_range(product, "The product")

    def _in_range(self, result: Tensor, what: str) -> Tensor:
        """The result, or a sentence where numbers that were finite have overflowed in it."""
        if not finite([result])[0]:
            raise ValueError(f"{what} of {type(self).__name__} overflows {self.dtype}; scale what goes into it.")
        return result

    def check(self, v: Tensor, *, vector: bool = False) -> None:
        """Refuse vectors that this operator cannot take: one for each column of v, or with ``vector`` a single one."""
        self.partition.check(v, vector=vector)
        if v.requires_grad and torch.is_grad_enabled():
            raise ValueError("The vector requires grad, and products here are not differentiated; pass v.detach().")
        self._check_precision()
        if v.dtype != self.dtype or v.device != self.device:
            raise ValueError(
                f"{type(self).__name__} holds {self.dtype} on {self.device}; the vector is {v.dtype} on "
                f"{v.device}. Convert one of them."
            )
        self.partition.check_finite(v, "The vector")

    def eye(self) -> Tensor:
        """The identity (P, P); a ValueError says how much memory that needs where it is not there."""
        self.check_dense()
        return torch.eye(self.partition.size, dtype=self.dtype, device=self.device)

    @property
    def _lowered(self) -> bool:
        """Whether an autocast of the caller would compute in another precision than the operator's own."""
        return self.device.type != "meta" and torch.is_autocast_enabled(self.device.type)

    def _check_precision(self) -> None:
        if self._lowered:
            raise ValueError(
                f"{type(self).__name__} computes in {self.dtype}, and an autocast around this call would lower that; "
                f"leave it, or write torch.autocast({self.device.type!r}, enabled=False) around the call."
            )

    def check_dense(self) -> None:
        """Refuse to write down P² numbers where there is no room for them."""
        self._check_precision()
        P, like = self.partition.size, torch.empty(0, dtype=self.dtype, device=self.device)
        check_room(f"A dense matrix of {P} parameters", 2 * P * P, like, "apply it with @, or take fewer parameters")

    def dense(self) -> Tensor:
        """The matrix itself, (P, P); a ValueError says how much memory it needs where that is not there."""
        return self._in_range(self._apply(self.eye()).mT, "The matrix")

    def block(self, l: int | str, m: int | str) -> Tensor:
        """The block of layers l and m, (P_l, P_m)."""
        rows, cols = (self.partition.slices[self.partition.index(i)] for i in (l, m))
        return self._apply(self.eye()[cols])[:, rows].mT

    def diagonal(self) -> Tensor:
        """The diagonal, (P,)."""
        return self.dense().diagonal().clone()

    @cached_property
    def eigen(self) -> Eigen:
        """Eigenvalues ``d`` (P,), ascending, and eigenvectors ``U`` (P, P), computed once in about 9 P³ operations.

        Raises:
            ValueError: the operator is not symmetric positive semi-definite.
        """
        check_symmetric(self, "eigen")
        matrix = self.dense()
        return psd_eigen((matrix + matrix.T) / 2, f"The matrix of {type(self).__name__}")

    @cached_property
    def solver(self) -> ParameterSpace:
        """The object that finds exact solutions with this matrix, in the space of parameters, or for a Fisher of fewer
        scores than parameters in that of the scores. Its repr says which, and how accurate the last one was."""
        return ParameterSpace(self)

    def norms(self) -> Tensor:
        """``‖B_lm‖``, the Frobenius norm of the block of each pair of layers, (L, L)."""
        return self._in_range(self.solver.norms(), "The norm of a block")

    def leading(self, k: int) -> Eigen:
        """The k largest eigenvalues, descending, and their eigenvectors (P, k); fewer where others are zero."""
        check_count("k", k, least=0)
        return self.solver.leading(k)

    def galerkin(self, Z: CoarseSpace) -> Tensor:
        """``Zᵀ B Z``, this operator as the coarse space sees it, (k, k)."""
        return self.image(Z).galerkin()

    def image(self, Z: CoarseSpace) -> Image:
        """This operator times Z, kept in the cheapest form that can be applied."""
        check_type("Z", Z, CoarseSpace)
        return Image(self, Z)

    def damped(self, damping: float) -> Damped:
        """``self + λI``."""
        return Damped(self, damping)

    def to_scipy(self) -> LinearOperator:
        """This operator for SciPy's solvers; numpy vectors in, numpy vectors out."""
        from scipy.sparse.linalg import LinearOperator

        def matmat(x):
            v = torch.as_tensor(x, device="cpu")
            if v.is_complex():
                raise TypeError(f"{type(self).__name__} is real; got a vector of {v.dtype}.")
            return (self @ v.to(self.device, self.dtype)).cpu().numpy()

        def transpose(x):
            check_symmetric(self, "the transposed product")
            return matmat(x)

        dtype = torch.empty(0, dtype=self.dtype, device="cpu").numpy().dtype
        return LinearOperator(
            self.shape, matvec=matmat, matmat=matmat, rmatvec=transpose, rmatmat=transpose, dtype=dtype
        )

    def _describe(self, *facts: str) -> str:
        where = f"{str(self.dtype).removeprefix('torch.')} on {self.device}"
        return f"{type(self).__name__}({', '.join((str(self.partition), *filter(None, facts), where))})"

    def __repr__(self) -> str:
        return self._describe()


class ParameterSpace:
    """Solutions of ``(B + λI) v = r`` for a symmetric positive semi-definite B that can be written down: 9 P³ once,
    then 4 P² for each.
    """

    def __init__(self, operator: Operator) -> None:
        self.operator, self.size = operator, operator.partition.size

    @property
    def eigenvalues(self) -> Tensor:
        """Ascending, (P,)."""
        return self.operator.eigen.d

    def leading(self, k: int) -> Eigen:
        """The k largest eigenvalues, descending, and their eigenvectors (P, k)."""
        d, U = self.operator.eigen
        return Eigen(d.flip(0)[:k], U.flip(1)[:, :k])

    def norms(self) -> Tensor:
        """The Frobenius norm of each block, (L, L)."""
        return self.operator.partition.norms(self.operator.dense())

    def layer_overlap(self, damping: float) -> float:
        """The largest eigenvalue of ``M B`` with M the inverses of the damped diagonal blocks."""
        matrix = self.operator.dense()
        for l, s in enumerate(self.operator.partition.slices):
            block = matrix[s, s] + damping * torch.eye(s.stop - s.start, dtype=matrix.dtype, device=matrix.device)
            L = cholesky(block, f"The block of layer {self.operator.partition.names[l]!r}")
            matrix[s] = torch.linalg.solve_triangular(L, matrix[s], upper=False)
            matrix[:, s] = torch.linalg.solve_triangular(L, matrix[:, s].T, upper=False).T
        return float(eigvalsh((matrix + matrix.T) / 2, "The preconditioned matrix")[-1])

    def solve(self, r: Tensor, damping: float) -> Tensor:
        """``(B + λI)⁻¹ r`` for r (P,) or (P, k)."""
        d, U = self.operator.eigen
        weights = inverse(d, damping, "The matrix")
        return U @ ((weights if r.ndim == 1 else weights[:, None]) * (U.T @ r))

    def __repr__(self) -> str:
        return f"parameter space, a matrix of {self.size} × {self.size}"


class Dense(Operator):
    """A symmetric matrix (P, P) in float32 or float64 that is given entry by entry.

    >>> B = Dense(torch.tensor([[2.0, 1.0], [1.0, 3.0]]), Partition.from_sizes([1, 1]))
    >>> B @ torch.tensor([1.0, 1.0])
    tensor([3., 4.])

    Raises:
        ValueError: another shape, NaN or inf, or a matrix that is not symmetric.
        TypeError: another dtype or layout.
    """

    def __init__(self, matrix: Tensor, partition: Partition) -> None:
        check_type("matrix", matrix, Tensor)
        check_type("partition", partition, Partition)
        if matrix.layout != torch.strided or matrix.is_meta:
            raise TypeError(f"Expected a dense tensor with numbers; got {matrix.layout} on {matrix.device}.")
        if matrix.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"Expected a float32 or float64 matrix; got {matrix.dtype}.")
        if tuple(matrix.shape) != (partition.size, partition.size):
            raise ValueError(f"Expected shape {(partition.size,) * 2} for {partition}; got {tuple(matrix.shape)}.")
        partition.check_finite(matrix, "The matrix")
        matrix = matrix.detach()
        if not (matrix - matrix.T).abs().max() <= 1e-5 * matrix.abs().max():
            raise ValueError("The matrix is not symmetric; the methods of this package assume that it is.")
        self.partition, self.dtype, self.device = partition, matrix.dtype, matrix.device
        self._matrix = matrix.clone()

    def _apply(self, v: Tensor) -> Tensor:
        return v @ self._matrix

    def dense(self) -> Tensor:
        return self._matrix.clone()

    def block(self, l: int | str, m: int | str) -> Tensor:
        rows, cols = (self.partition.slices[self.partition.index(i)] for i in (l, m))
        return self._matrix[rows, cols].clone()


class Damped(Operator):
    """``A = B + λI``, the matrix of the system, with B positive semi-definite. Of an indefinite B, as a Hessian is, the
    system is solved where λ exceeds the modulus of its smallest eigenvalue, and refused elsewhere.

    >>> A = Dense(torch.tensor([[3.0, 0.0], [0.0, 0.0]]), Partition.from_sizes([1, 1])).damped(1.0)
    >>> A.dense(), A.solve(torch.tensor([4.0, 1.0]))
    (tensor([[4., 0.],
            [0., 1.]]), tensor([1., 1.]))
    >>> A.effective_dimension()  # 3/4 of the first direction, nothing of the second
    0.75
    """

    def __init__(self, operator: Operator, damping: float) -> None:
        check_type("operator", operator, Operator)
        self.operator = operator
        self.damping = check_damping(damping, operator.dtype)
        self.partition, self.dtype, self.device = operator.partition, operator.dtype, operator.device

    def _apply(self, v: Tensor) -> Tensor:
        return self.operator._apply(v).add_(v, alpha=self.damping)

    def dense(self) -> Tensor:
        matrix = self.operator.dense()
        matrix.diagonal().add_(self.damping)
        return self._in_range(matrix, "The matrix")

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
        """``A⁻¹ r``, in the space of ``self.operator.solver``; r is (P,) or (P, k)."""
        self.check(r)
        return self._in_range(self.operator.solver.solve(r, self.damping), "The solution")

    def effective_dimension(self) -> float:
        """``Σ d / (d + λ)`` over the eigenvalues d of B: how many directions the data decide, not λ."""
        self._check_above_zero("The effective dimension")
        d = self.operator.solver.eigenvalues
        if d.min() < 0:
            raise ValueError(f"{type(self.operator).__name__} is indefinite: no count of directions that data decide.")
        return float((d / (d + self.damping)).sum())

    def layer_overlap(self) -> float:
        """How many layers take the same step: the largest eigenvalue of ``Σ_l H_l``, from below 1 to L.

        ``H_l = J_l (B_ll + λ)⁻¹ J_lᵀ / N`` is what an exact step of layer l alone does to the outputs. Where several
        layers take the same step, their sum is that many times too long: why block methods overshoot.
        """
        self._check_above_zero("The overlap of layers")
        return self.operator.solver.layer_overlap(self.damping)

    def _check_above_zero(self, what: str) -> None:
        if not self.damping > 0:
            raise ValueError(f"{what} is asked for at a damping above 0; got 0.")

    def with_damping(self, damping: float) -> Damped:
        """The same operator at another λ."""
        return uncached_copy(self, damping=check_damping(damping, self.dtype))

    def __repr__(self) -> str:
        return f"{self.operator!r} + {self.damping:.3g}·I"


class Image:
    """``B Z`` for an operator B and a coarse space Z: dense here, in cheaper forms where an operator has one."""

    def __init__(self, operator: Operator, Z: CoarseSpace) -> None:
        self.operator, self.Z = operator, Z

    @cached_property
    def _rows(self) -> Tensor:
        """``(B Z)ᵀ``, (k, P)."""
        return self.operator._apply(self.Z.dense().mT)

    def add_(self, v: Tensor, c: Tensor, alpha: float = 1.0) -> Tensor:
        """``v + alpha B Z c``, in place, for v (..., P) and c (..., k)."""
        return v.add_(c @ self._rows, alpha=alpha)

    def restrict(self, r: Tensor) -> Tensor:
        """``(B Z)ᵀ r`` for r (..., P): (..., k)."""
        return r @ self._rows.mT

    def galerkin(self) -> Tensor:
        """``Zᵀ B Z``, (k, k)."""
        return self.Z.restrict(self._rows)


def check_symmetric(operator: Operator, what: str) -> None:
    """Refuse a non-symmetric operator by its name."""
    check_type(what, operator, Operator)
    if not operator.symmetric:
        name = getattr(operator, "correction", type(operator).__name__)
        raise ValueError(f"{what} needs a symmetric operator and {name!r} is not symmetric; take 'balanced'.")


def check_same_space(first: Operator, other: Operator | CoarseSpace) -> None:
    """Refuse two objects that do not live on one partition, dtype and device."""
    check_type("The first argument", first, Operator)
    check_type("The second argument", other, Operator, CoarseSpace)
    for field in ("partition", "dtype", "device"):
        mine, theirs = getattr(first, field), getattr(other, field)
        if mine != theirs:
            raise ValueError(
                f"{type(first).__name__} and {type(other).__name__} differ in {field}: {mine} and {theirs}. "
                "Build both from one capture."
            )


def uncached_copy(obj: T, **changes: object) -> T:
    """A shallow copy with some attributes changed and without the cached ``eigen`` and ``solver``, which belong to the
    old λ. All other factorisations are shared."""
    twin = copy.copy(obj)
    for name in ("eigen", "solver"):
        vars(twin).pop(name, None)
    vars(twin).update(changes)
    return twin
