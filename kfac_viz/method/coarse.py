"""Coarse spaces: a few directions per layer, the columns of Z, through which layers talk to each other.

Every builder takes ``per_layer`` from 0 upwards and is nested in it: a larger space contains the smaller, and
its columns come first within each layer. Columns of the form ``w uᵀ`` within one layer (constants, aggregates,
Kronecker eigenvectors) meet the data through two numbers per example, ``α = a u`` and ``β = g w``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from .checks import check_count, check_type, warn
from .kronecker import KroneckerFactors, directional
from .operator import Operator, check_same_space, check_symmetric
from .partition import Layer, Partition

if TYPE_CHECKING:
    from .fisher import Fisher

SPACES = ("nicolaides", "spectral", "smooth", "krylov", "random", "optimal")


class HasFactors(Protocol):
    """What ``spectral`` and ``smooth`` need: a Fisher, or a K-FAC preconditioner."""

    partition: Partition

    def kronecker(self) -> KroneckerFactors: ...


class CoarseSpace:
    """The span of the columns of Z, given as a dense matrix (P, k) of the reader's own.

    Linearly dependent columns are removed: a warning says which, and ``removed`` keeps their numbers.

    >>> partition = Partition.from_sizes([2, 2])
    >>> Z = CoarseSpace(partition, torch.tensor([[1., 0.], [1., 0.], [0., 1.], [0., 1.]]))
    >>> Z.size, Z.restrict(torch.tensor([1., 2., 3., 4.]))
    (2, tensor([3., 7.]))
    """

    name = "columns"
    removed: tuple[int, ...] = ()

    def __init__(self, partition: Partition, columns: Tensor, *, name: str = "columns") -> None:
        check_type("partition", partition, Partition)
        check_type("columns", columns, Tensor)
        if not columns.is_floating_point():
            raise TypeError(f"columns must be a floating point tensor of shape (P, k); got {columns.dtype}.")
        columns = columns.detach()
        if columns.ndim != 2 or columns.shape[0] != partition.size:
            raise ValueError(f"columns must have shape ({partition.size}, k); got {tuple(columns.shape)}.")
        partition.check_finite(columns, "A coarse column")
        kept, _ = _gram_schmidt(columns)
        self.removed = tuple(j for j in range(columns.shape[1]) if j not in kept)
        _tell_removed(self.removed, name)
        self._init(partition, columns.dtype, columns.device, name)
        self._columns = columns[:, kept].clone()
        self.size = len(kept)

    def _init(self, partition: Partition, dtype: torch.dtype, device: torch.device, name: str) -> None:
        self.partition, self.dtype, self.device, self.name = partition, dtype, device, name

    def dense(self) -> Tensor:
        """Z itself, (P, k)."""
        return self._columns.clone()

    def restrict(self, r: Tensor) -> Tensor:
        """``Zᵀ r`` for r (P,) or (P, k'): one number per column, (k,) or (k, k')."""
        self._check(r, self.partition.size)
        return self._restrict(r)

    def prolong(self, c: Tensor) -> Tensor:
        """``Z c`` for c (k,) or (k, k'): (P,) or (P, k')."""
        self._check(c, self.size)
        return self._prolong(c)

    def _check(self, x: Tensor, rows: int) -> None:
        check_type("The argument", x, Tensor)
        if x.ndim not in (1, 2) or x.shape[0] != rows:
            raise ValueError(f"Expected shape ({rows},) or ({rows}, k) for {self!r}; got {tuple(x.shape)}.")
        if (x.dtype, x.device) != (self.dtype, self.device):
            raise ValueError(
                f"The coarse space holds {self.dtype} on {self.device}; the argument is {x.dtype} on {x.device}."
            )

    def _restrict(self, r: Tensor) -> Tensor:
        return self._columns.T @ r

    def _prolong(self, c: Tensor) -> Tensor:
        return self._columns @ c

    def add_(self, v: Tensor, c: Tensor, alpha: float = 1.0) -> Tensor:
        """``v + alpha Z c``, in place, for v (P, k') and c (k, k')."""
        return v.add_(self._prolong(c), alpha=alpha)

    def gram(self) -> Tensor:
        """``ZᵀZ``, (k, k)."""
        return self._columns.T @ self._columns

    def scores(self, F: Fisher) -> Tensor:
        """``U = J Z``: every score of F times every column, (S, N, k)."""
        return F.scores(self._columns)

    def __repr__(self) -> str:
        removed = f", {len(self.removed)} dependent removed" if self.removed else ""
        where = f"{str(self.dtype).removeprefix('torch.')} on {self.device}"
        return f"{type(self).__name__}({self.name}, {self.size} columns over {self.partition}{removed}, {where})"


class LocalSpace(CoarseSpace):
    """Columns that each live in one layer, kept as one matrix (P_l, k_l) per layer: Z is block diagonal."""

    def __init__(
        self, partition: Partition, blocks: Sequence[Tensor], *, name: str, removed: tuple[int, ...] = ()
    ) -> None:
        self._init(partition, blocks[0].dtype, blocks[0].device, name)
        self.removed = removed
        _tell_removed(removed, name)
        self._blocks = tuple(blocks)
        self.per_layer = tuple(block.shape[1] for block in blocks)
        self.size = sum(self.per_layer)

    def dense(self) -> Tensor:
        return torch.block_diag(*self._blocks)

    def _restrict(self, r: Tensor) -> Tensor:
        pieces = zip(self._blocks, self.partition.slices, strict=True)
        return torch.cat([block.T @ r[s] for block, s in pieces])

    def _prolong(self, c: Tensor) -> Tensor:
        pieces = zip(self._blocks, c.split(self.per_layer), strict=True)
        return torch.cat([block @ part for block, part in pieces])

    def gram(self) -> Tensor:
        return torch.block_diag(*(block.T @ block for block in self._blocks))

    def scores(self, F: Fisher) -> Tensor:
        layers = zip(F.a, F.g, self._blocks, self.partition.layers, strict=True)
        return torch.cat([directional(a, g, Z.unflatten(0, layer.shape)) for a, g, Z, layer in layers], dim=2)


class RankOneSpace(CoarseSpace):
    """Columns ``w uᵀ`` within one layer: ``factors[l] = (W, U)`` of shapes (out, k_l) and (features, k_l)."""

    def __init__(self, partition: Partition, factors: Sequence[tuple[Tensor, Tensor]], *, name: str) -> None:
        self._init(partition, factors[0][0].dtype, factors[0][0].device, name)
        self.factors = tuple(factors)
        self.per_layer = tuple(W.shape[1] for W, _ in factors)
        self.size = sum(self.per_layer)

    def dense(self) -> Tensor:
        return torch.block_diag(*(torch.einsum("ok,ik->oik", W, U).flatten(0, 1) for W, U in self.factors))

    def _restrict(self, r: Tensor) -> Tensor:
        if r.ndim == 2 and r.shape[1] == 1:
            return self._restrict(r[:, 0])[:, None]
        pieces = []
        for (W, U), R in zip(self.factors, self.partition.split(r), strict=True):
            if r.ndim == 1:
                pieces.append(((W.mT @ R) * U.mT).sum(-1))
            else:
                pieces.append(((W.mT @ R.permute(2, 0, 1)) * U.mT).sum(-1).mT)
        return torch.cat(pieces)

    def _prolong(self, c: Tensor) -> Tensor:
        pieces = []
        for (W, U), part in zip(self.factors, c.split(self.per_layer), strict=True):
            if c.ndim == 1:
                pieces.append((W * part) @ U.mT)
            else:
                pieces.append(((W * part.mT[:, None]) @ U.mT).permute(1, 2, 0))
        return self.partition.join(pieces)

    def add_(self, v: Tensor, c: Tensor, alpha: float = 1.0) -> Tensor:
        if c.shape[1:] != (1,) or not v.is_contiguous():
            return super().add_(v, c, alpha)
        pieces = zip(self.factors, c[:, 0].split(self.per_layer), self.partition.split(v[:, 0]), strict=True)
        for (W, U), part, V in pieces:
            V.addmm_(W * part, U.mT, alpha=alpha)
        return v

    def gram(self) -> Tensor:
        return torch.block_diag(*((W.T @ W) * (U.T @ U) for W, U in self.factors))

    def scores(self, F: Fisher) -> Tensor:
        pieces = []
        for a, g, (W, U) in zip(F.a, F.g, self.factors, strict=True):
            alpha, beta = a @ U, g @ W  # (N, T, k), (S, N, T, k)
            pieces.append((alpha * beta).sum(2))
        return torch.cat(pieces, dim=2)


def nicolaides(F: Operator, per_layer: int = 1) -> RankOneSpace:
    """Piecewise constants: one per layer (Nicolaides 1987; the 2020 paper), more by aggregates.

    The matrix of a layer starts as one rectangle; the largest rectangle is halved along its longer side again
    and again, and each cut adds the constant of one half.
    """
    check_size(F.partition, per_layer)
    factors = []
    for layer in F.partition.layers:
        rectangles = _rectangles(layer, per_layer)
        W = torch.zeros((layer.out, per_layer), dtype=F.dtype, device=F.device)
        U = torch.zeros((layer.features, per_layer), dtype=F.dtype, device=F.device)
        for j, (top, bottom, left, right) in enumerate(rectangles):
            W[top:bottom, j] = 1.0
            U[left:right, j] = 1.0
        factors.append((W, U))
    return RankOneSpace(F.partition, factors, name="nicolaides")


def spectral(F: HasFactors | KroneckerFactors, per_layer: int) -> RankOneSpace:
    """The Kronecker eigenvectors of each layer's own block ``G ⊗ A`` with the *largest* eigenvalues."""
    return _kronecker_eigenvectors(F, per_layer, largest=True, name="spectral")


def smooth(F: HasFactors | KroneckerFactors, per_layer: int) -> RankOneSpace:
    """Those with the smallest eigenvalues, the low frequencies that Koroko et al. 2023 chose."""
    return _kronecker_eigenvectors(F, per_layer, largest=False, name="smooth")


def krylov(A: Operator, M: Operator, g: Tensor, per_layer: int) -> LocalSpace:
    """Each layer's pieces of ``M g``, ``M A M g``, ``(M A)² M g``, …, made orthonormal layer by layer.

    Piece j of layer l is column ``l · per_layer + j``. Pieces that depend on earlier ones are removed: a warning
    says which, and ``removed`` keeps their numbers.
    """
    check_same_space(A, M)
    A.partition.check(g, vector=True)
    A.check(g)
    check_size(A.partition, per_layer)
    vectors = []
    v = (M @ g)[:, None] if per_layer else None
    for _ in range(per_layer):
        norm = torch.linalg.vector_norm(v)
        if norm > 0:
            v = v / norm
        vectors.append(v)
        v = M._apply(A._apply(v))
    columns = torch.cat(vectors, dim=1) if vectors else g.new_zeros(len(g), 0)
    blocks: list[Tensor] = []
    removed: list[int] = []
    for l, s in enumerate(A.partition.slices):
        kept, basis = _gram_schmidt(columns[s])
        blocks.append(basis)
        removed += [l * per_layer + j for j in range(per_layer) if j not in kept]
    return LocalSpace(A.partition, blocks, name="krylov", removed=tuple(removed))


def random(F: Operator, per_layer: int, seed: int = 0) -> RankOneSpace:
    """Gaussian rank-one columns, as a control: what any space of this size would do."""
    check_size(F.partition, per_layer)
    factors = []
    for l, layer in enumerate(F.partition.layers):
        generator = torch.Generator().manual_seed(seed * 100_003 + l)
        draws = [torch.randn(sum(layer.shape), generator=generator, dtype=torch.float64) for _ in range(per_layer)]
        both = torch.stack(draws, dim=1) if draws else torch.zeros(sum(layer.shape), 0, dtype=torch.float64)
        W, U = both.to(F.device, F.dtype).split(layer.shape)
        factors.append((W, U))
    return RankOneSpace(F.partition, factors, name="random")


def optimal(A: Operator, M: Operator, per_layer: int) -> CoarseSpace:
    """``per_layer × layers`` generalised eigenvectors of (A, M⁻¹) with the largest eigenvalues; dense.

    In balanced form no space of this size leaves a smaller λ_max. A yardstick, not a bound on the condition
    number or the captured decrease.
    """
    check_same_space(A, M)
    check_symmetric(M, "optimal")
    k = check_size(A.partition, per_layer, whole=True)
    if k == 0:
        return CoarseSpace(A.partition, A.eye()[:, :0], name="optimal")
    L = cholesky(M.dense(), "The preconditioner")
    _, Y = torch.linalg.eigh(L.T @ A.dense() @ L)
    return CoarseSpace(A.partition, L @ Y.flip(1)[:, :k], name="optimal")


def cholesky(matrix: Tensor, what: str) -> Tensor:
    """Lower Cholesky factor, or a sentence where ``matrix`` is not positive definite."""
    L, info = torch.linalg.cholesky_ex((matrix + matrix.T) / 2)
    if int(info) != 0:
        raise ValueError(f"{what} is not positive definite to working precision; choose a larger damping.")
    return L


def _gram_schmidt(columns: Tensor) -> tuple[list[int], Tensor]:
    """Numbers of the columns that do not depend on earlier ones, and an orthonormal basis in their order.

    Gram–Schmidt, twice for stability; a column that vanishes against the earlier ones is dropped.
    """
    tolerance = columns.shape[0] ** 0.5 * torch.finfo(columns.dtype).eps * 100
    kept: list[int] = []
    Q = torch.zeros_like(columns)
    for j in range(columns.shape[1]):
        q = columns[:, j]
        size = torch.linalg.vector_norm(q)
        if size == 0:
            continue
        q = q / size
        basis = Q[:, : len(kept)]
        for _ in range(2):
            q = q - basis @ (basis.T @ q)
        left = torch.linalg.vector_norm(q)
        if left > tolerance:
            Q[:, len(kept)] = q / left
            kept.append(j)
    return kept, Q[:, : len(kept)]


def _kronecker_eigenvectors(
    F: HasFactors | KroneckerFactors, per_layer: int, *, largest: bool, name: str
) -> RankOneSpace:
    check_size(F.partition, per_layer)
    if not isinstance(F, KroneckerFactors) and not hasattr(F, "kronecker"):
        raise TypeError(f"{name} needs a Fisher, a K-FAC preconditioner or KroneckerFactors; got {type(F).__name__}.")
    kronecker = F if isinstance(F, KroneckerFactors) else F.kronecker()
    factors = []
    for (d_A, U_A), (d_G, U_G) in zip(kronecker.eigen_A, kronecker.eigen_G, strict=True):
        order = torch.outer(d_G, d_A).flatten().argsort(descending=largest, stable=True)[:per_layer]
        rows = torch.div(order, len(d_A), rounding_mode="floor")
        factors.append((U_G[:, rows], U_A[:, order % len(d_A)]))
    return RankOneSpace(F.partition, factors, name=name)


def _rectangles(layer: Layer, count: int) -> list[tuple[int, int, int, int]]:
    """The whole matrix of a layer, then one half for each cut of the largest rectangle left."""
    if count == 0:
        return []
    whole = (0, layer.out, 0, layer.features)
    tiles, columns = [whole], [whole]
    while len(columns) < count:
        top, bottom, left, right = tile = max(tiles, key=lambda t: (t[1] - t[0]) * (t[3] - t[2]))
        if bottom - top >= right - left:
            middle = (top + bottom) // 2
            halves = [(top, middle, left, right), (middle, bottom, left, right)]
        else:
            middle = (left + right) // 2
            halves = [(top, bottom, left, middle), (top, bottom, middle, right)]
        tiles.remove(tile)
        tiles.extend(halves)
        columns.append(halves[0])
    return columns


def _tell_removed(removed: tuple[int, ...], name: str) -> None:
    if removed:
        warn(f"Removed linearly dependent columns {list(removed)} of the coarse space {name!r}.")


def check_size(partition: Partition, per_layer: int, *, whole: bool = False) -> int:
    """How many columns ``per_layer`` makes; refused where a layer (or, if ``whole``, the space) has no room."""
    check_count("per_layer", per_layer, least=0)
    total = per_layer * len(partition)
    smallest = min(partition.layers, key=lambda layer: layer.size)
    if whole and total > partition.size:
        raise ValueError(f"per_layer={per_layer} asks for {total} columns in a space of {partition.size}.")
    if not whole and per_layer > smallest.size:
        raise ValueError(
            f"per_layer={per_layer} exceeds layer {smallest.name!r}, which has {smallest.size} parameters; "
            f"choose at most {smallest.size}."
        )
    return total
