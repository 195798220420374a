"""Which Kronecker product stands for a layer's block of F: Shampoo's, the nearest in Frobenius norm, or in KL.

The block is the second moment of ``vec S`` over the scores S, and each of the three is made of the moments
``E[S X Sᵀ]`` and ``E[Sᵀ Y S]``. K-FAC's own product: :func:`kfac_viz.method.fisher.kronecker_factors`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from .checks import check_choice, finite
from .decompositions import eigenpairs
from .kronecker import CONVENTIONS
from .one_hot import Rows, dense
from .partition import Layer

FACTORS = ("kfac", "shampoo", "nearest", "kl")
VOCABULARY = 1024  # columns of an embedding up to which A is written down; K-FAC keeps its diagonal and has no limit
FLOOR = 1e-6  # of the largest eigenvalue of a KL factor, seen against Shampoo's: what it is raised to below that
FLOOR_OF_AVERAGE = 1.0  # the same in a running average of N examples: so many of them, 1/N of the mean eigenvalue
TURNS = 500  # of an alternation, before it is left as it is

_CHUNK = 2**24  # numbers in a temporary: 128 MiB of float64
_STRIP = 96  # columns of a triangle that are multiplied at once; a GPU takes it whole, since it waits for calls


def check_factors(factors: str, convention: str, layers: Iterable[Layer] = ()) -> None:
    """Refuse an unknown rule, a convention that has no meaning for it, and embeddings that are too large for it."""
    check_choice("convention", convention, CONVENTIONS)
    check_choice("factors", factors, FACTORS)
    if factors == "kfac":
        return
    if convention != "expand":
        raise ValueError(
            f"convention={convention!r} says what factors='kfac' does with positions; factors={factors!r} takes each "
            "score as the sum over them, and has no convention."
        )
    for layer in layers:
        if layer.table and layer.features > VOCABULARY:
            raise ValueError(
                f"factors={factors!r} needs A of embedding {layer.name!r} as a matrix, and has it up to {VOCABULARY} "
                f"words; got {layer.features}. Take factors='kfac', whose A is a diagonal, or name other layers."
            )


class Scores:
    """The scores ``S = Σ_t g[s,n,t] a[n,t]ᵀ`` (out, features) of a layer, and their second moments.

    With one position, ``S = g aᵀ`` is never formed: the moments need only the numbers ``aᵀ X a`` and ``gᵀ Y g`` of each
    example. With several, the scores of a bounded number of examples are formed at a time; where moments are asked for
    ``often``, the block of F is formed instead if it is no larger than all scores.

    Args:
        a, g: as in :class:`kfac_viz.Fisher`; groups, or layers of one shape, are axes in front.
        often: whether more than a few moments will be asked for.
    """

    def __init__(self, a: Rows, g: Tensor, *, often: bool = False) -> None:
        self.a, self.g, self.N = a, g, g.shape[-3]
        self.shape = (g.shape[-1], a.shape[-1])
        self.single = a.shape[-2] == 1 and a.ndim < g.ndim
        if self.single:
            self.a = dense(a)
        size, lead = self.shape[0] * self.shape[1], g.shape[:-4].numel()
        small = size <= g.shape[-4] * self.N and lead * size**2 <= _CHUNK
        self._block = self._second_moment() if often and small and not self.single else None

    def left(self, X: Tensor | None = None, *, root: Tensor | None = None, upper: bool = False) -> Tensor:
        """``E[S X Sᵀ]``, (..., out, out), for a symmetric X (..., features, features), or ``root rootᵀ``; None is the
        identity. With a root there is no cancellation, which an inverse suffers from, and all is semi-definite. A root
        that is an ``upper`` triangle takes half of the products, as a symmetric X does."""
        if self.single:
            a, g = self.a[..., 0, :], self.g[..., 0, :]
            weights = _forms(a, X, root, upper) / self.N
            return (g * weights[..., None, :, None]).flatten(-3, -2).mT @ g.flatten(-3, -2)
        if self._block is not None:
            X = _whole(X, root)
            if X is None:
                return torch.einsum("...ojpj->...op", self._block)
            return torch.einsum("...ojpk,...jk->...op", self._block, X)
        return sum(_gram(S.mT, X, root) for S in self._formed()) / self.N

    def right(self, Y: Tensor | None = None, *, root: Tensor | None = None, upper: bool = False) -> Tensor:
        """``E[Sᵀ Y S]``, (..., features, features), for Y (..., out, out), or its root, as in :meth:`left`."""
        if self.single:
            a, g = self.a[..., 0, :], self.g[..., 0, :]
            weights = _forms(g.flatten(-3, -2), Y, root, upper).unflatten(-1, g.shape[-3:-1]).sum(-2) / self.N
            return (a * weights[..., None]).mT @ a
        if self._block is not None:
            Y = _whole(Y, root)
            if Y is None:
                return torch.einsum("...ojok->...jk", self._block)
            return torch.einsum("...ojpk,...op->...jk", self._block, Y)
        return sum(_gram(S, Y, root) for S in self._formed()) / self.N

    def _formed(self) -> Iterator[Tensor]:
        """All scores, (..., S·n, out, features) for n examples at a time."""
        lead, S, T = self.g.shape[:-4].numel(), self.g.shape[-4], self.g.shape[-2]
        step = max(1, _CHUNK // max(1, lead * S * max(self.shape[0] * self.shape[1], T * max(self.shape))))
        for start in range(0, self.N, step):
            n = min(step, self.N - start)
            a, g = dense(self.a.narrow(-3, start, n)), self.g.narrow(-3, start, n)
            yield torch.matmul(g.mT, a if a.ndim == g.ndim else a.unsqueeze(-4)).flatten(-4, -3)

    def _second_moment(self) -> Tensor:
        """The block of F, (..., out, features, out, features)."""
        flat = (S.flatten(-2) for S in self._formed())
        return (sum(S.mT @ S for S in flat) / self.N).unflatten(-1, self.shape).unflatten(-3, self.shape)


def _forms(x: Tensor, X: Tensor | None, root: Tensor | None, upper: bool) -> Tensor:
    """``xᵀ X x`` for rows x (..., n) and a symmetric X (..., n, n), or ``‖rootᵀ x‖²``: (...).

    Of a triangular root, and of X, what lies above the diagonal is enough: ``Σ_j x_j (X_jj x_j + 2 Σ_i<j X_ij x_i)``.
    """
    if X is None and root is None:
        return x.square().sum(-1)
    if root is not None and not upper:
        return (x @ root).square().sum(-1)
    n, forms = x.shape[-1], 0.0
    width = _STRIP if x.device.type == "cpu" else n
    for start in range(0, n, width):
        stop = min(start + width, n)
        strip = x[..., start:stop]
        if root is not None:
            strip = image = x[..., :stop] @ root[..., :stop, start:stop]
        else:
            image = strip @ X[..., start:stop, start:stop]
            if start:
                image.add_(x[..., :start] @ X[..., :start, start:stop], alpha=2)
        forms = forms + torch.linalg.vecdot(image, strip)
    return forms


def _gram(S: Tensor, Y: Tensor | None, root: Tensor | None) -> Tensor:
    """``Σ_r S_rᵀ Y S_r`` for matrices S (..., r, n, m) and Y (..., n, n), (..., m, m)."""
    if root is not None:
        half = (root.mT[..., None, :, :] @ S).flatten(-3, -2)
        return half.mT @ half
    return S.flatten(-3, -2).mT @ (S if Y is None else Y[..., None, :, :] @ S).flatten(-3, -2)


def _whole(X: Tensor | None, root: Tensor | None) -> Tensor | None:
    """The matrix that is asked for by itself or by its root."""
    return X if root is None else root @ root.mT


def product(rule: str, scores: Scores) -> tuple[Tensor, Tensor, Tensor]:
    """A with ``tr A = 1``, and G, whose product ``G ⊗ A`` stands for the block of F by this rule; and for each whether
    its scores leave the product undetermined, (...): only those of ``"kl"`` may.

    - ``"shampoo"``: ``L ⊗ R / tr L`` with ``L = E[S Sᵀ]`` and ``R = E[Sᵀ S]``: one simultaneous turn of both factors
      from the identity towards the next (Morwani et al. 2025, arXiv 2406.17748).
    - ``"nearest"`` in the Frobenius norm (Van Loan and Pitsianis 1993): ``G = E[S A Sᵀ] / ‖A‖²`` and
      ``A = E[Sᵀ G S] / ‖G‖²`` in turn.
    - ``"kl"``: the least ``tr(K⁻¹F) + log det K`` over ``K = G ⊗ A``, by the flip-flop of a matrix normal
      distribution (Dutilleul 1999; Lin et al. 2025, arXiv 2509.03378): ``G = E[S A⁺ Sᵀ] / rank A`` and
      ``A = E[Sᵀ G⁺ S] / rank G`` in turn. K lives on the range of the scores, hence the pseudo-inverses. With too few
      scores there is no least, since a factor would lose rank: its eigenvalues, in a basis in which Shampoo's factor is
      the identity, are kept above FLOOR of the largest.

    Where all scores are 0, G is 0 and A the identity over its size.
    """
    L, R = scores.left(), scores.right()
    A, G, undetermined = unit_trace(R), L, torch.zeros(L.shape[:-2], dtype=torch.bool, device=L.device)
    if not all(finite([L, R])):  # K-FAC refuses it, by the name of the layer
        return A, G, undetermined
    if rule == "nearest":
        A, G = _nearest(scores, A)
    if rule == "kl":
        A, G, undetermined = _flip_flop(scores, L, R)
    return A, G, undetermined


def unit_trace(A: Tensor) -> Tensor:
    """``A / tr A``, (..., n, n); ``I / n`` where A is 0."""
    trace, n = A.diagonal(0, -2, -1).sum(-1)[..., None, None], A.shape[-1]
    unit = A / torch.where(trace == 0, 1.0, trace)
    unit.diagonal(0, -2, -1).add_((trace == 0)[..., 0] / n)
    return unit


def square(A: Tensor) -> Tensor:
    """``‖A‖²``, (..., 1, 1), and no less than the dtype can divide by."""
    return A.square().sum((-2, -1), keepdim=True).clamp_min(torch.finfo(A.dtype).tiny)


def regularised_root(X: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """C with ``C Cᵀ = (X + r I)⁻¹ / rank``, ``r = floor · tr X / n``, ``rank = tr(X (X + r I)⁻¹)``, for X (..., n, n),
    an upper triangle; and ``n − rank`` (...), the number of directions in which r decides.

    What a turn of the flip-flop takes from a running average, to which not every direction has contributed yet. By
    Cholesky in double precision; as if X were its mean eigenvalue where round-off leaves no factor, I if X is 0.
    """
    n, eye = X.shape[-1], torch.eye(X.shape[-1], dtype=torch.float64, device=X.device)
    trace = X.diagonal(0, -2, -1).sum(-1).double()[..., None, None]
    mean = torch.where(trace > 0, trace / n, 1.0)
    L, info = torch.linalg.cholesky_ex(X.double() / mean + floor * eye)
    found = (info == 0)[..., None, None] & (trace > 0)
    root = torch.linalg.solve_triangular(torch.where(found, L, eye), eye, upper=False).mT
    rank = torch.where(found, n - floor * root.square().sum((-2, -1), keepdim=True), n)
    return (root / (mean * rank).sqrt()).to(X), (n - rank)[..., 0, 0]


def _nearest(scores: Scores, A: Tensor) -> tuple[Tensor, Tensor]:
    """The alternation from A on: power iteration for the leading singular pair of the rearranged block."""
    for _ in range(TURNS):
        G = scores.left(A) / square(A)
        A, last = unit_trace(scores.right(G)), A
        if _settled(A, last).all():
            break
    return A, scores.left(A) / square(A)


def _flip_flop(scores: Scores, L: Tensor, R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The alternation from the identity on, in bases in which Shampoo's factors are the identity of their range."""
    (B_G, in_G), (B_A, in_A) = _whitening(L), _whitening(R)
    rank_G, rank_A = (x.sum(-1).clamp_min(1)[..., None, None] for x in (in_G, in_A))
    A, last = unit_trace(R), None
    for _ in range(TURNS):
        root, _ = _inverse_root(A, B_A, in_A)
        root, low_G = _inverse_root(scores.left(root=root) / rank_A, B_G, in_G)
        A = unit_trace(scores.right(root=root) / rank_G)
        seen = B_A.mT @ A @ B_A
        settled = _settled(seen, seen.new_zeros(()) if last is None else last)
        if settled.all():
            break
        last = seen
    root, low_A = _inverse_root(A, B_A, in_A)
    G = scores.left(root=root) / rank_A
    return _semidefinite(A), _semidefinite(G), low_A | low_G | ~settled


def _whitening(X: Tensor) -> tuple[Tensor, Tensor]:
    """B (..., n, n) with ``Bᵀ X B = diag(range)``, and that range: 1 for each eigenvector of X whose eigenvalue is no
    round-off, 0 for others."""
    d, U = eigenpairs(X, "A Kronecker factor")
    within = d > torch.finfo(X.dtype).eps ** (2 / 3) * d[..., -1:]
    scale = torch.where(within, torch.where(within, d, 1.0).rsqrt(), 0.0)
    return U * scale[..., None, :], within.to(X.dtype)


def _inverse_root(X: Tensor, B: Tensor, within: Tensor) -> tuple[Tensor, Tensor]:
    """A root of the pseudo-inverse of X on the range of B, and whether an eigenvalue of ``Bᵀ X B`` had to be raised to
    FLOOR."""
    seen = B.mT @ X @ B
    outside = (1.0 - within) * seen.diagonal(0, -2, -1).amax(-1, keepdim=True)  # which B removes again
    d, U = eigenpairs((seen + seen.mT) / 2 + outside.diag_embed(), "A Kronecker factor")
    least = FLOOR * d[..., -1:].clamp_min(torch.finfo(d.dtype).tiny)
    return B @ (U * d.clamp_min(least).rsqrt()[..., None, :]), (d < least).any(-1)


def _semidefinite(X: Tensor) -> Tensor:
    """X without the round-off of its eigenvalues below zero."""
    d, U = eigenpairs((X + X.mT) / 2, "A Kronecker factor")
    return (U * d.clamp_min(0)[..., None, :]) @ U.mT


def _settled(X: Tensor, last: Tensor) -> Tensor:
    """Which matrices have not moved by more than round-off lets one see."""
    return (X - last).norm(dim=(-2, -1)) <= torch.finfo(X.dtype).eps ** 0.7 * X.norm(dim=(-2, -1))
