"""Coarse spaces: a few directions per layer, the columns of Z, through which layers talk to each other.

Every builder takes ``per_layer`` from 0 upwards and means at most so many: a layer with fewer parameters gives what
it has. A larger space contains the smaller, whose columns come first within each layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_count, check_seed, check_type
from .columns import CoarseSpace, LocalSpace, RankOneSpace, gram_schmidt
from .decompositions import Eigen, cholesky, eigh
from .fisher import Fisher
from .kfac import KFAC
from .kronecker import KroneckerFactors
from .operator import Operator, check_same_space, check_symmetric
from .partition import Layer

SPACES = ("nicolaides", "spectral", "smooth", "krylov", "random", "optimal")


def nicolaides(F: Operator, per_layer: int = 1) -> RankOneSpace:
    """Piecewise constants: one per layer (Nicolaides 1987; the 2020 paper), more by aggregates.

    The matrix of a layer starts as one rectangle; the largest rectangle is halved along its longer side again
    and again, and each cut adds the constant of one half.

    >>> from kfac_viz.method.operator import Dense
    >>> from kfac_viz.method.partition import Partition
    >>> nicolaides(Dense(torch.eye(4), Partition.from_sizes([2, 2]))).dense()
    tensor([[1., 0.],
            [1., 0.],
            [0., 1.],
            [0., 1.]])
    """
    check_type("F", F, Operator)
    check_count("per_layer", per_layer, least=0)
    factors = []
    for layer in F.partition.layers:
        rectangles = _rectangles(layer, min(per_layer, layer.size))
        W = torch.zeros((layer.out, len(rectangles)), dtype=F.dtype, device=F.device)
        U = torch.zeros((layer.features, len(rectangles)), dtype=F.dtype, device=F.device)
        for j, (top, bottom, left, right) in enumerate(rectangles):
            W[top:bottom, j] = 1.0
            U[left:right, j] = 1.0
        factors.append((W, U))
    return RankOneSpace(F.partition, factors, name="nicolaides")


def spectral(
    F: Fisher | KFAC | KroneckerFactors, per_layer: int | None = None, *, total: int | None = None
) -> RankOneSpace:
    """The Kronecker eigenvectors of each layer's own block ``G ⊗ A`` with the *largest* eigenvalues.

    Either so many of each layer, or ``total`` of all layers together, which go where the eigenvalues are largest: a
    small layer then gives what matters, not what it has.

    >>> import kfac_viz as kv
    >>> F = kv.problems.digits((4,), 20, side=4).capture()
    >>> Z = spectral(F, total=10)
    >>> Z.size, [W.shape[1] for W, U in Z.factors]
    (10, [6, 4])
    """
    if (per_layer is None) == (total is None):
        raise ValueError("spectral takes either per_layer or total, the columns of each layer or of all together.")
    return _kronecker_eigenvectors(F, per_layer, largest=True, name="spectral", total=total)


def smooth(F: Fisher | KFAC | KroneckerFactors, per_layer: int) -> RankOneSpace:
    """The Kronecker eigenvectors with the smallest eigenvalues, the low frequencies that Koroko et al. 2023 chose.

    >>> import kfac_viz as kv
    >>> F = kv.problems.digits((4,), 20, side=4).capture()
    >>> smooth(F, per_layer=2)
    RankOneSpace(smooth, 4 columns over 118 parameters in 2 layers (68 + 50), float64 on cpu)
    """
    return _kronecker_eigenvectors(F, per_layer, largest=False, name="smooth")


def krylov(A: Operator, M: Operator, g: Tensor, per_layer: int) -> LocalSpace:
    """Each layer's pieces of ``M g``, ``M A M g``, ``(M A)² M g``, …, made orthonormal layer by layer.

    Piece j of layer l is column ``l · per_layer + j``. Pieces that depend on earlier ones are removed: a warning
    says which, and ``removed`` keeps their numbers.

    >>> import kfac_viz as kv
    >>> problem = kv.problems.digits((4,), 20, side=4)
    >>> F = problem.capture()
    >>> Z = krylov(F.damped(0.1), kv.KFAC(F, 0.1), problem.gradient(), per_layer=3)
    >>> Z.size, torch.allclose(Z.gram(), torch.eye(6, dtype=torch.float64))
    (6, True)
    """
    blocks, removed = krylov_pieces(A, M, g, per_layer)
    return LocalSpace(A.partition, blocks, name="krylov", removed=removed)


def krylov_pieces(A: Operator, M: Operator, g: Tensor, per_layer: int) -> tuple[list[Tensor], tuple[int, ...]]:
    """The columns of :func:`krylov` in each layer, (P_l, k_l), and the numbers of those that were removed."""
    check_type("M", M, Operator)
    check_same_space(A, M)
    A.check(g, vector=True)
    check_count("per_layer", per_layer, least=0)
    vectors, v = [], g
    for j in range(min(per_layer, max(layer.size for layer in A.partition.layers))):
        v = M._apply(A._apply(v) if j else v)
        norm = torch.linalg.vector_norm(v)
        if norm > 0:
            v = v / norm
        vectors.append(v)
    columns = torch.stack(vectors, dim=1) if vectors else g.new_zeros(len(g), 0)
    blocks: list[Tensor] = []
    removed: list[int] = []
    for l, s in enumerate(A.partition.slices):
        pieces = columns[s, : s.stop - s.start]
        kept, basis = gram_schmidt(pieces)
        blocks.append(basis)
        removed += [l * per_layer + j for j in range(pieces.shape[1]) if j not in kept]
    return blocks, tuple(removed)


def random(F: Operator, per_layer: int, seed: int = 0) -> RankOneSpace:
    """Gaussian rank-one columns, as a control: what any space of this size would do.

    >>> import kfac_viz as kv
    >>> F = kv.problems.digits((4,), 20, side=4).capture()
    >>> small, large = random(F, 1).dense(), random(F, 2).dense()
    >>> torch.equal(small, large[:, ::2])  # a larger space contains the smaller
    True
    """
    check_type("F", F, Operator)
    check_count("per_layer", per_layer, least=0)
    check_seed(seed)
    factors = []
    for l, layer in enumerate(F.partition.layers):
        generator = torch.Generator().manual_seed((seed * 100_003 + l) % 2**63)
        both = torch.empty(sum(layer.shape), min(per_layer, layer.size), dtype=torch.float64, device="cpu")
        for column in both.unbind(1):  # one after another, so that a larger space contains the smaller
            column.copy_(torch.randn(len(both), generator=generator, dtype=both.dtype, device=both.device))
        W, U = both.to(F.device, F.dtype).split(layer.shape)
        factors.append((W, U))
    return RankOneSpace(F.partition, factors, name="random")


def optimal(A: Operator, M: Operator, per_layer: int) -> CoarseSpace:
    """As many generalised eigenvectors of (A, M⁻¹) with the largest eigenvalues as ``per_layer`` gives; dense.

    In balanced form no space of this size leaves a smaller λ_max. A yardstick, not a bound on the condition
    number or the captured decrease.

    >>> from kfac_viz.method.operator import Dense
    >>> from kfac_viz.method.partition import Partition
    >>> from kfac_viz.method.preconditioner import Identity
    >>> A = Dense(torch.tensor([[1.0, 0.0], [0.0, 9.0]]), Partition.from_sizes([1, 1]))
    >>> optimal(A, Identity(A), per_layer=1).size  # one for each layer
    2

    Raises:
        ValueError: M is not symmetric positive definite.
    """
    check_symmetric(M, "optimal")
    check_same_space(A, M)
    check_count("per_layer", per_layer, least=0)
    k = sum(min(per_layer, layer.size) for layer in A.partition.layers)
    if k == 0:
        return CoarseSpace(A.partition, A.eye()[:, :0], name="optimal")
    L = cholesky(M.dense(), "The preconditioner")
    _, Y = eigh(L.T @ A.dense() @ L, "The preconditioned matrix")
    return CoarseSpace(A.partition, L @ Y.flip(1)[:, :k], name="optimal")


def _kronecker_eigenvectors(
    F: Fisher | KFAC | KroneckerFactors, per_layer: int | None, *, largest: bool, name: str, total: int | None = None
) -> RankOneSpace:
    limit = check_count("per_layer", per_layer, least=0) if total is None else check_count("total", total, least=0)
    if not isinstance(F, (Fisher, KFAC, KroneckerFactors)):
        raise TypeError(f"{name} needs a Fisher, a K-FAC preconditioner or KroneckerFactors; got {type(F).__name__}.")
    kronecker = F if isinstance(F, KroneckerFactors) else F.kronecker()
    eigens = [(G, _ends(A, limit, largest)) for G, A in zip(kronecker.eigen_G, kronecker.eigen_A, strict=True)]
    products = [(G.d[..., :, None] * A.d[..., None, :]).flatten() for G, A in eigens]
    found = [d.sort(descending=largest, stable=True) for d in products]
    counts = [min(limit, d.numel()) for d, _ in found]
    if total is not None:
        d = torch.cat([d[:n] for (d, _), n in zip(found, counts, strict=True)])
        numbers, repeats = torch.arange(len(counts), device="cpu"), torch.tensor(counts, device="cpu")
        layers = numbers.repeat_interleave(repeats).to(d.device)
        best = d.argsort(descending=True, stable=True)[:total]
        counts = torch.bincount(layers[best], minlength=len(found)).tolist()
    factors = []
    for (G, A), (_, order), n in zip(eigens, found, counts, strict=True):
        rows, columns = torch.div(order[:n], A.d.shape[-1], rounding_mode="floor"), order[:n] % A.d.shape[-1]
        factors.append((G.U[:, rows], A.U[:, columns]) if G.d.ndim == 1 else _in_one_group(G, A, rows, columns))
    return RankOneSpace(kronecker.partition, factors, name=name)


def _in_one_group(G: Eigen, A: Eigen, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """(W, U) of eigenvectors of the groups of a layer, counted through the groups: W is zero in all other groups."""
    groups, out = G.d.shape
    group, rows = torch.div(rows, out, rounding_mode="floor"), rows % out
    W = G.U.new_zeros(len(rows), groups, out)
    W[torch.arange(len(rows), device=W.device), group] = G.U[group, :, rows]
    return W.flatten(1).mT.contiguous(), A.U[group, :, columns].mT.contiguous()


def _ends(A: Eigen, count: int, largest: bool) -> Eigen:
    """Of a diagonal matrix the eigenpairs at the one end of which a space of ``count`` columns is made."""
    if A.U is not None:
        return A
    best = A.d.sort(descending=largest, stable=True)[1][:count]
    return Eigen(A.d[best], A.vectors(best))


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
