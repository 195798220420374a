"""What others train such networks with: one function for each direction, by their papers' own equations.

J (N, P) and r (N,) are those of :mod:`.terms`: rows and residuals are divided by the root of the number of points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from ...problems.equations import Equation
from ...train.search import line_search
from ...train.update import best_coefficients
from .terms import Term, along, both_terms, gradient, jacobian, loss

SHIFT = 1e-7  # of the sketch, so that it has a Cholesky factor (arXiv 2505.12149, algorithm 2)
FIRST_LENGTH = 1e-6  # of K-FAC for PINNs, whose rule for the length needs a step before


class Rival(NamedTuple):
    """A direction of others, with its settings.

    Attributes:
        kind: ``"engd-w"``, ``"engd"`` (the same step by a P × P matrix), ``"spring"``, ``"nystrom"`` or
            ``"kfac-pinns"``.
        damping: λ; of K-FAC what each factor has on its diagonal.
        momentum: μ of SPRING.
        rank: columns of the Nyström sketch.
        average: weight of the old factors in K-FAC's running averages.
    """

    kind: str
    damping: float
    momentum: float = 0.0
    rank: int = 0
    average: float = 0.0


# ---- directions, to be subtracted ---------------------------------------------------------------------


def engd_w(J: Tensor, r: Tensor, damping: float) -> Tensor:
    """ENGD-W, ``Jᵀ (J Jᵀ + λI)⁻¹ r``, (P,) (arXiv 2505.12149, section 3.1)."""
    K = _gram(J)
    K.diagonal().add_(damping)
    return J.T @ torch.cholesky_solve(r[:, None], torch.linalg.cholesky(K))[:, 0]


def engd(J: Tensor, r: Tensor, damping: float) -> Tensor:
    """ENGD, ``(JᵀJ + λI)⁻¹ Jᵀr`` by a P × P matrix, (P,) (Müller and Zeinhofer 2023, arXiv 2302.13163)."""
    G = J.T @ J
    G.diagonal().add_(damping)
    return torch.cholesky_solve((J.T @ r)[:, None], torch.linalg.cholesky(G))[:, 0]


def spring(J: Tensor, r: Tensor, damping: float, momentum: float, φ: Tensor) -> Tensor:
    """SPRING's next φ (P,): ``μφ + Jᵀ (J Jᵀ + λI)⁻¹ (r − μJφ)``, of the points nearest to μφ the one that solves the
    system (arXiv 2505.12149, algorithm 1; Goldshlager et al. 2024, arXiv 2401.10190)."""
    return momentum * φ + engd_w(J, r - momentum * (J @ φ), damping)


def nystrom(J: Tensor, r: Tensor, damping: float, Ω: Tensor) -> Tensor:
    """ENGD-W with ``J Jᵀ`` replaced by its Nyström approximation B Bᵀ from a sketch Ω (N, rank), (P,)
    (arXiv 2505.12149, algorithm 2)."""
    Y = J @ (J.T @ Ω) + SHIFT * Ω
    C = torch.linalg.cholesky(Ω.T @ Y, upper=True)
    B = torch.linalg.solve_triangular(C, Y, upper=True, left=False)
    inner = B.T @ B
    inner.diagonal().add_(damping)
    seen = torch.cholesky_solve((B.T @ r)[:, None], torch.linalg.cholesky(inner))[:, 0]
    return J.T @ (r - B @ seen) / damping


def _gram(J: Tensor) -> Tensor:
    """``J Jᵀ``, its lower triangle's blocks alone multiplied out."""
    K, size = J.new_zeros(len(J), len(J)), -(-len(J) // 4)
    for i in range(0, len(J), size):
        for j in range(0, i + 1, size):
            K[i : i + size, j : j + size] = J[i : i + size] @ J[j : j + size].T
            K[j : j + size, i : i + size] = K[i : i + size, j : j + size].T
    return K


class KroneckerSum:
    """``(A₁ ⊗ B₁ + A₂ ⊗ B₂)⁻¹`` of positive definite factors, applied to a matrix X (a, b) whose rows are counted by A
    (Martens and Grosse 2015, appendix B).

    With ``A₁ = LLᵀ`` and ``L⁻¹ A₂ L⁻ᵀ = U s Uᵀ``, ``K = L⁻ᵀ U`` turns A₁ into the identity and A₂ into the diagonal s;
    the same is done for B.

    >>> I = torch.eye(2)
    >>> KroneckerSum((I, I), (2 * I, I)) @ torch.ones(2, 2)
    tensor([[0.3333, 0.3333],
            [0.3333, 0.3333]])
    """

    def __init__(self, one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> None:
        (self.K, s), (self.H, t) = (_both_diagonal(*pair) for pair in zip(one, other, strict=True))
        self.d = 1 + torch.outer(s, t)

    def __matmul__(self, X: Tensor) -> Tensor:
        return self.K @ ((self.K.T @ X @ self.H) / self.d) @ self.H.T


def _both_diagonal(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """K and s with ``Kᵀ A K = I`` and ``Kᵀ B K = diag s``."""
    L = torch.linalg.cholesky(A)
    half = torch.linalg.solve_triangular(L, B, upper=False)
    s, U = torch.linalg.eigh(torch.linalg.solve_triangular(L, half.T, upper=False))
    return torch.linalg.solve_triangular(L.T, U, upper=True), s


def factors(term: Term) -> list[tuple[Tensor, Tensor]]:
    """K-FAC's G (out, out) and A (in + 1, in + 1) of each layer for one term: every position counts as an example
    (arXiv 2405.15603, section 3.2)."""
    pairs = [(a.flatten(0, 1), g.flatten(0, 1)) for a, g in zip(term.inputs, term.slopes, strict=True)]
    return [(g.T @ g, a.T @ a / len(a)) for a, g in pairs]


def kfac_pinns(pairs: Sequence[list[tuple[Tensor, Tensor]]], g: Tensor, damping: float) -> Tensor:
    """K-FAC for PINNs, (P,): the gradient g (P,) by the inverse of a pair of Kronecker factors for each of the two
    terms, added up, with λ on the diagonal of every factor (arXiv 2405.15603, section 3.4)."""
    parts, start = [], 0
    for inside, boundary in zip(*pairs, strict=True):
        one, other = (
            tuple(X + damping * torch.eye(len(X), dtype=X.dtype) for X in pair) for pair in (inside, boundary)
        )
        shape = len(one[0]), len(one[1])
        own = g[start : start + shape[0] * shape[1]].view(shape)
        parts.append((KroneckerSum(one, other) @ own).flatten())
        start += own.numel()
    return torch.cat(parts)


# ---- training -----------------------------------------------------------------------------------------


def training(problem: Equation, rival: Rival, points: Callable[[int], Tensor], seed: int = 0) -> Iterator[float]:
    """Train ``problem.model`` in place on the points (N, d + 1) of each step; the length of each step.

    All kinds but K-FAC search along their direction for the least loss on a grid; K-FAC takes length and momentum from
    the quadratic model (Martens and Grosse 2015, section 7), the first step of length 10⁻⁶.

    Args:
        points: those of the step that is counted from 0.
        seed: of the Nyström sketches.
    """
    if rival.kind == "kfac-pinns":
        yield from _with_averages(problem, rival, points)
        return
    P, φ = problem.partition, torch.zeros(problem.partition.size, dtype=problem.inputs.dtype)
    for step in count():
        inputs = points(step)
        J, r = jacobian(both_terms(problem, inputs))
        if rival.kind == "spring":
            φ = spring(J, r, rival.damping, rival.momentum, φ)
            v = φ / (1 - rival.momentum ** (2 * step + 2)) ** 0.5
        elif rival.kind == "nystrom":
            v = nystrom(J, r, rival.damping, _sketch(J, rival.rank, seed + step))
        else:
            v = {"engd-w": engd_w, "engd": engd}[rival.kind](J, r, rival.damping)
        start = P.pack(problem.model)

        def at(length: float) -> float:
            _stand(problem, start - length * v)  # noqa: B023
            return loss(problem, inputs)  # noqa: B023

        length, _ = line_search(at, 0.5 * float(r @ r), "least")
        _stand(problem, start - length * v)
        yield length


def _with_averages(problem: Equation, rival: Rival, points: Callable[[int], Tensor]) -> Iterator[float]:
    """K-FAC for PINNs: running averages of the factors of each term, and the best combination with the last step."""
    last, averages = torch.zeros(problem.partition.size, dtype=problem.inputs.dtype), None
    for step in count():
        terms = both_terms(problem, points(step))
        averages = averaged(averages, [factors(term) for term in terms], rival.average)
        g = gradient(terms)
        D = torch.stack([-kfac_pinns(averages, g, rival.damping), last])
        s = along(terms, D)
        c = best_coefficients(D @ g, s @ s.T + rival.damping * D @ D.T) if step else D.new_tensor([FIRST_LENGTH, 0.0])
        last = c @ D
        problem.partition.add_(problem.model, last)
        yield float(c[0])


def _stand(problem: Equation, x: Tensor) -> None:
    """Move the parameters to x (P,)."""
    problem.partition.add_(problem.model, x - problem.partition.pack(problem.model))


def averaged(
    old: list[list[tuple[Tensor, Tensor]]] | None, new: list[list[tuple[Tensor, Tensor]]], weight: float
) -> list[list[tuple[Tensor, Tensor]]]:
    """Running averages of all factors, which start from the identity (arXiv 2405.15603, section 3.4)."""
    before = [[tuple(torch.eye(len(X), dtype=X.dtype) for X in pair) for pair in term] for term in new]
    return [[tuple(weight * X + (1 - weight) * Y for X, Y in zip(*both, strict=True))
             for both in zip(*terms, strict=True)]
            for terms in zip(old or before, new, strict=True)]  # fmt: skip


def _sketch(J: Tensor, rank: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(J), rank, generator=generator, dtype=J.dtype)
