"""What several studies share: a network at a stage of its training, and what is measured there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ... import KFAC, CoarseSpace, Damped, Dense, Fisher, Operator, coarse, exact_direction, pcg, problems
from ...method.columns import LocalSpace
from ...parameters import Range
from ...problems import Problem
from .result import rounded

Data = Annotated[
    Literal["digits4", "digits8", "autoencoder4", "planted", "attention"],
    "digits (4×4 or 8×8 pixels) as classifier or autoencoder, seen by a transformer, or the planted toy problem.",
]
Flavour = Annotated[
    Literal["exact", "mc", "empirical"],
    "which Fisher; mc and empirical are drawn as they are, and A is built from them.",
]
Rule = Annotated[Literal["eigen", "factored"], "how K-FAC is damped."]
KFAC_BY_RULE = {"eigen": "kfac", "factored": "factored"}  # its names among METHODS: each is shown beside two levels
Damping = Annotated[float, Range(1e-6, 10, log=True, steps=71), "λ of A = F + λI, and of all that is made of it."]
DAMPINGS = Range(1e-4, 1e2, log=True, steps=61)  # the slider of the first studies, and where their curves lie
OVER_DAMPINGS = {"x": "damping λ", "xlim": (DAMPINGS.low, DAMPINGS.high)}
MOST_PARAMETERS = 2500  # parameters: the matrices are dense


@dataclass(frozen=True, eq=False)
class Setting:
    """A problem with its Fisher and gradient; everything that is independent of λ and Z is computed once."""

    problem: Problem
    fisher: str = "exact"
    seed: int = 0

    @cached_property
    def F(self) -> Fisher:
        return self.problem.capture(self.fisher)

    @cached_property
    def g(self) -> Tensor:
        return self.problem.gradient()

    @cached_property
    def dense(self) -> Tensor:
        """The Fisher, (P, P)."""
        return self.F.dense()

    @cached_property
    def matrix(self) -> Dense:
        """The same as an operator: quicker to apply to a few columns than the captured vectors."""
        return Dense(self.dense, self.F.partition)

    @cached_property
    def blocks(self) -> Tensor:
        """K-FAC's approximation of it, (P, P)."""
        return kronecker_blocks(self.F)


def small_enough(problem: Problem) -> Problem:
    """The problem as it is; ValueError where it has more than MOST_PARAMETERS parameters."""
    if (size := problem.partition.size) > MOST_PARAMETERS:
        raise ValueError(
            f"The network has {size} parameters, and matrices of that size are dense here; at most {MOST_PARAMETERS} "
            "are possible. Take narrower layers."
        )
    return problem


@lru_cache(maxsize=8)
def setting(
    data: str, widths: tuple[int, ...], n: int, seed: int, steps: int, fisher: str = "exact", device: str = "cpu"
) -> Setting:
    """The network ``data`` with hidden ``widths`` after ``steps`` full-batch Adam steps; cached.

    Raises:
        ValueError: too many parameters (see :func:`small_enough`), or no hidden layer where ``data`` is planted.
    """
    if data == "planted":
        if not widths:
            raise ValueError("The planted problem takes its width from the hidden layers; give at least one.")
        problem = problems.planted(len(widths) + 1, widths[0], n, seed, device=device)
    elif data == "attention":
        problem = problems.attention(max(2, 2 * (widths[0] // 2)) if widths else 8, n, seed, device=device)
    else:
        build = problems.autoencoder if data.startswith("auto") else problems.digits
        problem = build(widths, n, seed, side=int(data[-1]), device=device)
    return Setting(small_enough(problem).trained(steps), fisher, seed)


def chosen(p: Mapping[str, Any], **other: Any) -> tuple:
    """Hashable arguments for :func:`setting`, taken from the parameters p; ``other`` replaces some of them."""
    p = {"fisher": "exact", **p, **other}
    return p["data"], tuple(p["widths"]), p["n"], p["seed"], p["steps"], p["fisher"], p["device"]


def first_network(steps: int = 100) -> Setting:
    """The network of the first studies, as published."""
    return setting("digits4", (12, 12, 12), 500, 0, steps)


def kronecker_blocks(F: Fisher, damping: float = 0.0) -> Tensor:
    """K-FAC as a matrix (P, P): ``G ⊗ A`` in each layer; with damping, what its factored rule inverts."""
    return torch.block_diag(*F.kronecker().blocks(damping))


class Shares(NamedTuple):
    """What a direction captures of the best decrease, by how its length is chosen."""

    captured: float  # as it is
    at_best_length: float  # with one best length for all of it
    at_layer_lengths: float  # with the best length for each layer's piece, all chosen together

    def rounded(self) -> Shares:
        """The three as they are drawn."""
        return Shares(*rounded(self).tolist())


def all_shares(
    A: Damped, g: Tensor, directions: Mapping[str, Tensor], exact: Tensor | None = None
) -> dict[str, Shares]:
    """Captured decrease of each direction v (P,), as it is and at its best lengths.

    All three are formulas in the pieces of v, one for each layer: with the pieces, of length 1, as columns of Z,
    ``E = ZᵀAZ``, ``b = Zᵀg`` and their lengths c, they are ``2 bᵀc − cᵀEc``, ``(bᵀc)² / cᵀEc`` and ``bᵀE⁻¹b``, over
    ``gᵀA⁻¹g``. With one length it is the squared cosine, in the metric A, of the angle between v and the exact
    direction; with one for each layer, that between the exact direction and the space of the pieces. All directions
    share one pass over A.

    Args:
        exact: ``A⁻¹ g``, where it is known.

    Raises:
        ValueError: the gradient is zero.
    """
    best = float(g @ (exact_direction(A, g) if exact is None else exact))
    if not best > 0:
        raise ValueError("The gradient is zero: there is no decrease to capture.")
    slices, V = A.partition.slices, torch.stack(list(directions.values()))
    lengths = torch.stack([V[:, s].norm(dim=1) for s in slices], 1)  # (directions, layers)
    units = (V[:, s].mT / c.clamp_min(1e-300) for s, c in zip(slices, lengths.unbind(1), strict=True))
    Z = LocalSpace(A.partition, list(units), name="pieces")
    E = A.operator.galerkin(Z).unflatten(0, lengths.mT.shape).unflatten(2, lengths.mT.shape)
    E = E.diagonal(dim1=1, dim2=3).movedim(2, 0) + A.damping * torch.diag_embed((lengths > 0).to(g.dtype))
    b = Z.restrict(g).view(lengths.mT.shape).mT
    slope, curvature = (b * lengths).sum(1), _form(E, lengths)
    at_best = torch.where(curvature > 0, slope.square() / curvature, 0.0)  # of length zero it captures nothing
    at_layers = _form(torch.linalg.pinv(E, hermitian=True), b)
    worth = torch.stack([2 * slope - curvature, at_best, at_layers], 1) / best
    return {name: Shares(*values) for name, values in zip(directions, worth.tolist(), strict=True)}


def _form(E: Tensor, c: Tensor) -> Tensor:
    """cᵀ E c of each row of c."""
    return (c * (E @ c[..., None])[..., 0]).sum(1)


def shares(A: Damped, g: Tensor, v: Tensor) -> Shares:
    """:func:`all_shares` of one direction."""
    return all_shares(A, g, {"": v})[""]


def at_best_length(A: Operator, g: Tensor, v: Tensor) -> Tensor:
    """The direction v with the length that captures most, ``gᵀv / vᵀAv`` times its own."""
    return float(g @ v) / float(v @ (A @ v)) * v


def space(name: str, A: Damped, M: KFAC, g: Tensor, per_layer: int, seed: int) -> CoarseSpace:
    """The coarse space of this name; columns that depend on others are left out, and its size says so."""
    if name == "krylov":
        return LocalSpace(A.partition, coarse.krylov_pieces(A, M, g, per_layer)[0], name=name)
    arguments = {"optimal": (A, M, per_layer), "random": (M, per_layer, seed)}
    return getattr(coarse, name)(*arguments.get(name, (M, per_layer)))


def iterations(A: Operator, g: Tensor, M: Operator | None, rtol: float) -> int:
    """Of conjugate gradients nearly as in exact arithmetic. Dense, which is the quickest at some hundred unknowns."""
    M = M if M is None or isinstance(M, Dense) else Dense(M.dense(), A.partition)
    return pcg(A, g, M, rtol=rtol, reorthogonalize=True).iterations


def largest_eigenvalue(T: Tensor, L: Tensor) -> float:
    """λ_max(T A) for ``A = L Lᵀ``, by Lanczos on the similar ``Lᵀ T L``."""
    from scipy.sparse.linalg import LinearOperator, eigsh

    T, L = T.cpu().numpy(), L.cpu().numpy()
    similar = LinearOperator(T.shape, matvec=lambda x: L.T @ (T @ (L @ x)), dtype=T.dtype)
    return float(eigsh(similar, 1, which="LA", v0=np.ones(len(T)), ncv=12, tol=1e-4, return_eigenvectors=False)[0])
