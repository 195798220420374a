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
TURNS = 500  # of an alternation, before it is left as it is

_CHUNK = 2**24  # numbers in a temporary: 128 MiB of float64


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

    def left(self, X: Tensor | None = None) -> Tensor:
        """``E[S X Sᵀ]``, (..., out, out), for a symmetric X (..., features, features); None is the identity."""
        if self.single:
            a, g = self.a[..., 0, :], self.g[..., 0, :]
            weights = ((a if X is None else a @ X) * a).sum(-1)
            return _gram(g * weights[..., None, :, None], g, self.N)
        if self._block is not None:
            if X is None:
                return torch.einsum("...ojpj->...op", self._block)
            return torch.einsum("...ojpk,...jk->...op", self._block, X)
        total = 0.0
        for S in self._formed():
            rows = (S if X is None else S @ X[..., None, :, :]).transpose(-3, -2).flatten(-2)
            total = total + rows @ S.transpose(-3, -2).flatten(-2).mT
        return total / self.N

    def right(self, Y: Tensor | None = None) -> Tensor:
        """``E[Sᵀ Y S]``, (..., features, features), for a symmetric Y (..., out, out); None is the identity."""
        if self.single:
            a, g = self.a[..., 0, :], self.g[..., 0, :]
            weights = ((g if Y is None else g @ Y[..., None, :, :]) * g).sum((-3, -1))
            return (a * weights[..., None]).mT @ a / self.N
        if self._block is not None:
            if Y is None:
                return torch.einsum("...ojok->...jk", self._block)
            return torch.einsum("...ojpk,...op->...jk", self._block, Y)
        total = 0.0
        for S in self._formed():
            total = total + S.flatten(-3, -2).mT @ (S if Y is None else Y[..., None, :, :] @ S).flatten(-3, -2)
        return total / self.N

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


def _gram(left: Tensor, right: Tensor, N: int) -> Tensor:
    """``Σ_{s,n} left rightᵀ / N`` for rows (..., S, N, out)."""
    return left.flatten(-3, -2).mT @ right.flatten(-3, -2) / N


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
    alive = trace > 0
    return torch.where(alive, A / torch.where(alive, trace, 1.0), torch.eye(n, dtype=A.dtype, device=A.device) / n)


def square(A: Tensor) -> Tensor:
    """``‖A‖²``, (..., 1, 1), and no less than the dtype can divide by."""
    return A.square().sum((-2, -1), keepdim=True).clamp_min(torch.finfo(A.dtype).tiny)


def regularised_inverse(X: Tensor, floor: float) -> Tensor:
    """``(X + r I)⁻¹ / rank`` with ``r = floor · tr X / n`` and ``rank = tr(X (X + r I)⁻¹)``, for X (..., n, n).

    What a turn of the flip-flop takes from a running average, to which not every direction has contributed yet. By
    Cholesky in double precision; the identity over ``tr X`` where round-off leaves none, and ``I / n`` where X is 0.
    """
    n, eye = X.shape[-1], torch.eye(X.shape[-1], dtype=torch.float64, device=X.device)
    trace = X.diagonal(0, -2, -1).sum(-1).double()[..., None, None]
    alive = trace > 0
    mean = torch.where(alive, trace / n, 1.0)
    L, info = torch.linalg.cholesky_ex(X.double() / mean + floor * eye)
    found = (info == 0)[..., None, None] & alive
    inverse = torch.cholesky_inverse(torch.where(found, L, eye))
    rank = torch.where(found, n - floor * inverse.diagonal(0, -2, -1).sum(-1)[..., None, None], n)
    return (inverse / (mean * rank)).to(X)


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
    (B_G, in_G), (B_A, in_A) = whitening(L), whitening(R)
    rank_G, rank_A = (x.sum(-1).clamp_min(1)[..., None, None] for x in (in_G, in_A))
    A, last = unit_trace(R), None
    for _ in range(TURNS):
        X, _ = _inverse(A, B_A, in_A)
        G = scores.left(X) / rank_A
        Y, low_G = _inverse(G, B_G, in_G)
        A = unit_trace(scores.right(Y) / rank_G)
        seen = B_A.mT @ A @ B_A
        settled = _settled(seen, seen.new_zeros(()) if last is None else last)
        if settled.all():
            break
        last = seen
    X, low_A = _inverse(A, B_A, in_A)
    return A, scores.left(X) / rank_A, low_A | low_G | ~settled


def whitening(X: Tensor) -> tuple[Tensor, Tensor]:
    """B (..., n, n) with ``Bᵀ X B = diag(range)``, and that range: 1 for each eigenvector that X has, 0 for others."""
    d, U = eigenpairs(X, "A Kronecker factor")
    within = d > 10 * X.shape[-1] * torch.finfo(X.dtype).eps * d[..., -1:]
    scale = torch.where(within, torch.where(within, d, 1.0).rsqrt(), 0.0)
    return U * scale[..., None, :], within.to(X.dtype)


def _inverse(X: Tensor, B: Tensor, within: Tensor) -> tuple[Tensor, Tensor]:
    """The pseudo-inverse of X on the range of B, and whether an eigenvalue of ``Bᵀ X B`` had to be raised to FLOOR."""
    seen = B.mT @ X @ B
    outside = (1.0 - within) * seen.diagonal(0, -2, -1).amax(-1, keepdim=True)  # which B removes again
    d, U = eigenpairs((seen + seen.mT) / 2 + outside.diag_embed(), "A Kronecker factor")
    least = FLOOR * d[..., -1:].clamp_min(torch.finfo(d.dtype).tiny)
    C = B @ U
    return (C / d.clamp_min(least)[..., None, :]) @ C.mT, (d < least).any(-1)


def _settled(X: Tensor, last: Tensor) -> Tensor:
    """Which matrices have not moved by more than round-off lets one see."""
    return (X - last).norm(dim=(-2, -1)) <= torch.finfo(X.dtype).eps ** 0.7 * X.norm(dim=(-2, -1))
