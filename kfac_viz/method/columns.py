"""What the columns of Z can be: dense, one block per layer, or rank one within a layer. Vectors are rows here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import check_type, warn
from .partition import Partition
from .stacks import Stacks


class CoarseSpace:
    """The span of the columns of Z, given as a dense matrix (P, k) of the reader's own.

    Linearly dependent columns are removed: a warning says which, and ``removed`` keeps their numbers.

    >>> partition = Partition.from_sizes([2, 2])
    >>> Z = CoarseSpace(partition, torch.tensor([[1., 0.], [1., 0.], [0., 1.], [0., 1.]]))
    >>> Z.size, Z.restrict(torch.tensor([1., 2., 3., 4.]))
    (2, tensor([3., 7.]))
    """

    def __init__(self, partition: Partition, columns: Tensor, *, name: str = "columns") -> None:
        check_type("partition", partition, Partition)
        check_type("columns", columns, Tensor)
        if columns.dtype not in (torch.float32, torch.float64) or columns.layout != torch.strided:
            raise TypeError(
                "columns must be a dense floating point tensor of shape (P, k), float32 or float64; got "
                f"{columns.dtype}, {columns.layout}."
            )
        if columns.is_meta:
            raise ValueError("columns on the meta device have no numbers; whether they are independent cannot be seen.")
        columns = columns.detach()
        if columns.ndim != 2 or columns.shape[0] != partition.size:
            raise ValueError(f"columns must have shape ({partition.size}, k); got {tuple(columns.shape)}.")
        partition.check_finite(columns, "A coarse column")
        kept, _ = gram_schmidt(columns)
        self._init(partition, columns, name, tuple(j for j in range(columns.shape[1]) if j not in kept))
        self.rows = columns.mT[kept].contiguous()
        self.size = len(kept)

    def _init(self, partition: Partition, like: Tensor, name: str, removed: tuple[int, ...] = ()) -> None:
        self.partition, self.dtype, self.device, self.name = partition, like.dtype, like.device, name
        self.removed = removed
        if removed:
            warn(f"Removed linearly dependent columns {list(removed)} of the coarse space {name!r}.")

    def dense(self) -> Tensor:
        """Z itself, (P, k)."""
        return self.prolong(torch.eye(self.size, dtype=self.dtype, device=self.device)).mT.contiguous()

    def restrict(self, r: Tensor) -> Tensor:
        """``Zᵀ r`` for r (..., P): one number per column, (..., k)."""
        self._check(r, self.partition.size)
        return self._restrict(r)

    def prolong(self, c: Tensor) -> Tensor:
        """``Z c`` for c (..., k): (..., P)."""
        self._check(c, self.size)
        return self.add_(c.new_zeros(*c.shape[:-1], self.partition.size), c)

    def _check(self, x: Tensor, length: int) -> None:
        check_type("The argument", x, Tensor)
        if x.layout != torch.strided:
            raise TypeError(f"Expected a dense tensor; got one of layout {x.layout}. Call .to_dense() first.")
        if x.ndim < 1 or x.shape[-1] != length:
            raise ValueError(f"Expected shape (…, {length}) for {self!r}; got {tuple(x.shape)}.")
        if (x.dtype, x.device) != (self.dtype, self.device):
            raise ValueError(
                f"The coarse space holds {self.dtype} on {self.device}; the argument is {x.dtype} on {x.device}."
            )

    def _restrict(self, r: Tensor) -> Tensor:
        return r @ self.rows.mT

    def add_(self, v: Tensor, c: Tensor, alpha: float = 1.0) -> Tensor:
        """``v + alpha Z c``, in place, for v (..., P) and c (..., k)."""
        return v.add_(c @ self.rows, alpha=alpha)

    def gram(self) -> Tensor:
        """``ZᵀZ``, (k, k)."""
        return self.rows @ self.rows.mT

    def __repr__(self) -> str:
        removed = f", {len(self.removed)} dependent removed" if self.removed else ""
        where = f"{str(self.dtype).removeprefix('torch.')} on {self.device}"
        return f"{type(self).__name__}({self.name}, {self.size} columns over {self.partition}{removed}, {where})"


class LocalSpace(CoarseSpace):
    """Columns that each live in one layer: ``blocks[l]`` is (P_l, k_l), and Z is block diagonal."""

    def __init__(
        self, partition: Partition, blocks: Sequence[Tensor], *, name: str, removed: tuple[int, ...] = ()
    ) -> None:
        self._init(partition, blocks[0], name, removed)
        self.blocks = tuple(blocks)
        self.per_layer = tuple(block.shape[1] for block in blocks)
        self.size = sum(self.per_layer)

    def _restrict(self, r: Tensor) -> Tensor:
        return torch.cat([r[..., s] @ Z for s, Z in zip(self.partition.slices, self.blocks, strict=True)], dim=-1)

    def add_(self, v: Tensor, c: Tensor, alpha: float = 1.0) -> Tensor:
        parts = zip(c.split(self.per_layer, dim=-1), self.blocks, strict=True)
        return v.add_(torch.cat([part @ Z.mT for part, Z in parts], dim=-1), alpha=alpha)

    def gram(self) -> Tensor:
        return torch.block_diag(*(Z.mT @ Z for Z in self.blocks))


class RankOneSpace(CoarseSpace):
    """Columns ``w uᵀ`` within one layer: ``factors[l] = (W, U)`` of shapes (out, k_l) and (features, k_l).

    ``Zᵀ r`` takes ``wᵀ R u`` of each layer's matrix R, and ``Z c`` adds ``W diag(c) Uᵀ`` to it.
    """

    def __init__(self, partition: Partition, factors: Sequence[tuple[Tensor, Tensor]], *, name: str) -> None:
        self._init(partition, factors[0][0], name)
        self.factors = tuple(factors)
        self.per_layer = tuple(W.shape[1] for W, _ in factors)
        self.size = sum(self.per_layer)
        self._pieces = Stacks([layer.shape for layer in partition.layers], self.per_layer)
        self._numbers = Stacks([(k,) for k in self.per_layer], [layer.shape for layer in partition.layers])
        self._stacked = list(zip(*map(self._pieces.gather, zip(*factors, strict=True)), strict=True))

    def _restrict(self, r: Tensor) -> Tensor:
        layers = zip(self._stacked, self._pieces.split(r), strict=True)
        return self._numbers.join([((W.mT @ R) * U.mT).sum(-1) for (W, U), R in layers])

    def add_(self, v: Tensor, c: Tensor, alpha: float = 1.0) -> Tensor:
        layers = zip(self._stacked, self._numbers.split(c), strict=True)
        return self._pieces.add_products_(v, [(W * part[..., None, :], U.mT) for (W, U), part in layers], alpha)

    def gram(self) -> Tensor:
        return torch.block_diag(*((W.mT @ W) * (U.mT @ U) for W, U in self.factors))


def gram_schmidt(columns: Tensor) -> tuple[list[int], Tensor]:
    """Numbers of the columns that do not depend on earlier ones, and an orthonormal basis in their order.

    Gram–Schmidt, twice for stability; a column that vanishes against the earlier ones is dropped.
    """
    tolerance = columns.shape[0] ** 0.5 * torch.finfo(columns.dtype).eps * 100
    kept: list[int] = []
    Q = torch.zeros_like(columns)
    for j, q in enumerate(columns.unbind(1)):
        size = torch.linalg.vector_norm(q)
        if size == 0:
            continue
        q, basis = q / size, Q[:, : len(kept)]
        for _ in range(2):
            q = q - basis @ (basis.T @ q)
        left = torch.linalg.vector_norm(q)
        if left > tolerance:
            Q[:, len(kept)] = q / left
            kept.append(j)
    return kept, Q[:, : len(kept)]
