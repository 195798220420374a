"""Symmetric matrices as objects: apply with ``@``, or look at them with ``dense()``."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from .checks import check_damping, check_room, check_type, finite, own_precision
from .columns import CoarseSpace
from .partition import Partition

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator


T = TypeVar("T")


class Eigen(NamedTuple):
    """``U diag(d) Uᵀ``: ascending eigenvalues ``d`` (n,), eigenvectors in the columns of ``U`` (n, n)."""

    d: Tensor
    U: Tensor


def flushed(matrix: Tensor) -> Tensor:
    """Numbers so small that their products underflow become zero: LAPACK's eigensolvers fail on some of them."""
    info = torch.finfo(matrix.dtype)
    return hardshrink(matrix, info.tiny / info.eps)


def eigh(matrix: Tensor, what: str) -> Eigen:
    """Eigendecomposition of a symmetric matrix, or a sentence where it holds NaN or inf, or none is found."""
    _check_range(matrix, what)
    return eigenpairs(matrix, what)


def eigvalsh(matrix: Tensor, what: str) -> Tensor:
    """Ascending eigenvalues of a symmetric matrix, or a sentence as from :func:`eigh`."""
    _check_range(matrix, what)
    return _found(torch.linalg.eigvalsh, matrix, what)


def eigenpairs(matrix: Tensor, what: str) -> Eigen:
    """As :func:`eigh`, for one matrix or a stack of them that are known to be finite: LAPACK may crash on others."""
    return Eigen(*_found(torch.linalg.eigh, matrix, what))


def _found(routine: Callable, matrix: Tensor, what: str) -> Any:
    """What LAPACK finds. On the CPU it gives up, or answers NaN, on some matrices of low rank with rows of zeros; then
    once more in double precision, shifted by a multiple of the identity so that no row is empty."""
    with suppress(torch.linalg.LinAlgError):
        found = routine(flushed(matrix))
        d = found if isinstance(found, Tensor) else found[0]
        if d.device.type != "cpu" or not np.isnan(d.detach().numpy()).any():  # numpy: nothing is read from a device
            return found
    shift = matrix.abs().max().double()
    try:
        found = routine(
            matrix.double() + shift * torch.eye(matrix.shape[-1], dtype=torch.float64, device=matrix.device)
        )
    except torch.linalg.LinAlgError:
        raise ValueError(f"No eigenvalues were found of: {what}. Scale what goes into it.") from None
    d, *U = (found,) if isinstance(found, Tensor) else found
    d = (d - shift).to(matrix)
    return (d, U[0].to(matrix)) if U else d


def _check_range(matrix: Tensor, what: str) -> None:
    if not finite([matrix])[0]:
        raise ValueError(f"{what} overflows {matrix.dtype}; choose another damping, or scale what goes into it.")


def psd_eigens(matrices: Sequence[Tensor], names: Sequence[str]) -> list[Eigen]:
    """Eigendecompositions of positive semi-definite matrices (n, n) or stacks of them (m, n, n), checked in one look
    at the device; round-off below zero becomes zero.

    Raises:
        ValueError: NaN, inf, or an eigenvalue below zero by more than round-off. ``names`` has one for each matrix,
            those of a stack in turn.
    """
    pairs, facts = [], []
    for X in matrices:
        whole = X.isfinite().all(-1).all(-1)
        d, U = eigenpairs(torch.where(whole[..., None, None], X, 0.0), names[len(pairs)])  # LAPACK fails on NaN
        pairs.append(Eigen(d.clamp_min(0), U))
        facts.append(torch.stack([whole.to(d), d[..., 0], d[..., -1]], dim=-1).view(-1, 3))
    read = torch.cat(facts).tolist() if facts else []
    sizes = [X.shape[-1] for X in matrices for _ in range(X[..., 0, 0].numel())]
    for name, n, (whole, smallest, largest) in zip(names, sizes, read, strict=True):
        if not whole:
            raise ValueError(f"{name} holds NaN or inf.")
        info = torch.finfo(matrices[0].dtype)
        round_off = 100 * n * info.eps * max(-smallest, largest) + n * info.tiny / info.eps  # and what was flushed
        if smallest < -round_off:
            raise ValueError(
                f"{name} is not positive semi-definite: its eigenvalues run from {smallest:.3g} to {largest:.3g}."
            )
    return pairs


def psd_eigen(matrix: Tensor, what: str) -> Eigen:
    """As :func:`psd_eigens`, for one matrix."""
    return psd_eigens([matrix], [what])[0]


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

    def check(self, v: Tensor) -> None:
        """Refuse a vector that this operator cannot take, in words."""
        self.partition.check(v)
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
        """Dense eigendecomposition, computed once: 9 P³ or so.

        Raises:
            ValueError: the operator is not symmetric positive semi-definite.
        """
        check_symmetric(self, "eigen")
        matrix = self.dense()
        return psd_eigen((matrix + matrix.T) / 2, f"The matrix of {type(self).__name__}")

    def image(self, Z: CoarseSpace) -> Image:
        """This operator times Z, kept in the cheapest form that can be applied."""
        check_type("Z", Z, CoarseSpace)
        return Image(Z, self._apply(Z.dense().mT))

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
    """``A = B + λI``, the matrix of the system, with B positive semi-definite."""

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
        """``A⁻¹ r`` through the eigenvectors of B, which every λ shares; r is (P,) or (P, k)."""
        self.check(r)
        d, U = self.operator.eigen
        weights = inverse(d, self.damping, "The matrix")
        solution = U @ ((weights if r.ndim == 1 else weights[:, None]) * (U.T @ r))
        return self._in_range(solution, "The solution")

    def with_damping(self, damping: float) -> Damped:
        """The same operator at another λ."""
        return self.at(check_damping(damping, self.dtype))

    def at(self, damping: float) -> Damped:
        """As :meth:`with_damping`, for a λ that has been checked."""
        return replace(self, damping=damping)

    def __repr__(self) -> str:
        return f"{self.operator!r} + {self.damping:.3g}·I"


class Image:
    """``B Z`` for an operator B and a coarse space Z, in whatever form it can be applied."""

    def __init__(self, Z: CoarseSpace, rows: Tensor) -> None:
        self.Z, self._rows = Z, rows

    def add_(self, v: Tensor, c: Tensor, alpha: float = 1.0) -> Tensor:
        """``v + alpha B Z c``, in place, for v (..., P) and c (..., k)."""
        return v.add_(c @ self._rows, alpha=alpha)

    def restrict(self, r: Tensor) -> Tensor:
        """``(B Z)ᵀ r`` for r (..., P): (..., k)."""
        return r @ self._rows.mT

    def galerkin(self) -> Tensor:
        """``Zᵀ B Z``, (k, k)."""
        return self.Z.restrict(self._rows)


class DampedImage:
    """``A Z = B Z + λ Z``, the columns of the system ``A = B + λI`` that a coarse level needs."""

    def __init__(self, image: Image, damping: float) -> None:
        self.image, self.damping = image, damping

    def residual(self, r: Tensor, c: Tensor) -> Tensor:
        """``r − A Z c`` for r (..., P) and c (..., k)."""
        left = self.image.add_(r.clone(), c, alpha=-1.0)
        return self.image.Z.add_(left, c, alpha=-self.damping)

    def restrict(self, r: Tensor) -> Tensor:
        """``(A Z)ᵀ r`` for r (..., P): (..., k)."""
        return self.image.restrict(r).add_(self.image.Z.restrict(r), alpha=self.damping)


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


def check_invertible(ends: tuple[float, float], count: int, damping: float, dtype: torch.dtype, what: str) -> None:
    """Refuse λ where the ``count`` eigenvalues between these ends, plus λ, cannot be inverted to precision."""
    smallest, largest = (end + damping for end in ends)
    info = torch.finfo(dtype)
    if not smallest > max(info.tiny, largest * count * info.eps if damping == 0 else 0.0):
        raise ValueError(
            f"{what} is {'singular' if smallest >= 0 else 'indefinite'} in {dtype} (smallest eigenvalue "
            f"{ends[0]:.2g}, largest {ends[1]:.2g}) and the damping {damping:g} does not mend it; choose "
            "a larger damping."
        )
    if not largest <= info.max:
        raise ValueError(f"{what} with damping {damping:g} overflows {dtype}; choose a smaller damping.")


def inverse(d: Tensor, damping: float, what: str) -> Tensor:
    """``1 / (d + λ)`` for eigenvalues d ≥ 0; refuses λ = 0 where the matrix is singular to precision."""
    return Eigenvalues([d], [what], dims=d.ndim).inverse(damping)[0]


class Eigenvalues:
    """Eigenvalues of named matrices. Their ends are read once, so that any λ can be judged without the device.

    Args:
        stacks: tensors whose last ``dims`` axes belong to one matrix; axes before them count matrices.
        names: one for each matrix, in their order.
    """

    def __init__(self, stacks: Sequence[Tensor], names: Sequence[str], dims: int = 2) -> None:
        self._stacks = [d for d in stacks]
        flat = [d.flatten(-dims) for d in stacks if d.numel()]
        ends = [torch.stack([d.amin(-1), d.amax(-1)], -1).view(-1, 2) for d in flat]
        counts = [d.shape[-1] for d in flat for _ in range(d[..., 0].numel())]
        self._facts = list(zip(torch.cat(ends).tolist() if ends else [], counts, names, strict=False))

    def inverse(self, damping: float) -> list[Tensor]:
        """``1 / (d + λ)``; a sentence names the matrix that is singular, indefinite or too large for that."""
        for ends, count, name in self._facts:
            check_invertible(ends, count, damping, self._stacks[0].dtype, name)
        return [(d + damping).reciprocal() for d in self._stacks]


def cholesky(matrix: Tensor, what: str) -> Tensor:
    """Lower Cholesky factor, or a sentence where ``matrix`` is not positive definite."""
    L, info = torch.linalg.cholesky_ex((matrix + matrix.T) / 2)
    if int(info) != 0:
        raise ValueError(f"{what} is not positive definite to working precision; choose a larger damping.")
    return L


def replace(obj: T, **changes: object) -> T:
    """A shallow copy with some attributes changed: what was factorised is shared, never redone."""
    twin = copy.copy(obj)
    vars(twin).pop("eigen", None)  # belongs to the old λ
    vars(twin).update(changes)
    return twin
