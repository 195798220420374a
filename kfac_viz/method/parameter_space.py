"""The exact step through the eigenvectors of a P×P matrix, which every λ shares."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from .decompositions import Eigen, cholesky, eigvalsh, inverse

if TYPE_CHECKING:
    from .partition import Partition


class HasMatrix(Protocol):
    """What is needed of an operator."""

    partition: Partition
    eigen: Eigen

    def dense(self) -> Tensor: ...


class ParameterSpace:
    """Solutions of ``(B + λI) v = r`` for a symmetric positive semi-definite B that can be written down: 9 P³ once,
    then 4 P² for each.
    """

    def __init__(self, operator: HasMatrix) -> None:
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
        slices, matrix = self.operator.partition.slices, self.operator.dense()
        scale = matrix.abs().max().clamp_min(torch.finfo(matrix.dtype).tiny)  # so that no square over- or underflows
        matrix = matrix / scale
        return scale * torch.stack([torch.stack([matrix[rows, cols].norm() for cols in slices]) for rows in slices])

    def claims(self, damping: float) -> float:
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
