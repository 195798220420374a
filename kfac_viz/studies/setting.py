"""What several studies share: a network at a moment of its training, and what is measured there."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import KFAC, CoarseCorrection, CoarseSpace, Damped, Dense, Fisher, Operator, captured_decrease, coarse, pcg
from ..method.columns import LocalSpace
from ..method.kfac import shifted
from ..parameters import Range
from . import problems
from .problems import Problem

Data = Annotated[
    Literal["digits4", "digits8", "autoencoder4", "planted", "attention"],
    "digits (4×4 or 8×8 pixels) as classifier or autoencoder, seen by a transformer, or the planted toy problem.",
]
Flavour = Annotated[
    Literal["exact", "mc", "empirical"],
    "which Fisher; mc and empirical are drawn as they are, and A is built from them.",
]
Rule = Annotated[Literal["eigen", "factored"], "how K-FAC is damped."]
Damping = Annotated[float, Range(1e-6, 10, log=True, steps=71), "λ of A = F + λI, and of all that is made of it."]
DAMPINGS = Range(1e-4, 1e2, log=True, steps=61)  # the slider of the first studies, and where their curves lie
OVER_DAMPINGS = {"x": "damping λ", "xlim": (DAMPINGS.low, DAMPINGS.high)}
LARGEST = 2500  # parameters: the matrices are dense


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
    """The problem as it is; ValueError where it has more than LARGEST parameters."""
    if (size := problem.partition.size) > LARGEST:
        raise ValueError(
            f"The network has {size} parameters, and matrices of that size are dense here; at most {LARGEST} are "
            "possible. Take narrower layers."
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
    """The arguments of :func:`setting` that these parameters name, but for the ``other`` ones: what caches go by."""
    p = {"fisher": "exact", **p, **other}
    return p["data"], tuple(p["widths"]), p["n"], p["seed"], p["steps"], p["fisher"], p["device"]


def first_network(steps: int = 100) -> Setting:
    """The network of the first studies, as published."""
    return setting("digits4", (12, 12, 12), 500, 0, steps)


def kronecker_blocks(F: Fisher, damping: float = 0.0) -> Tensor:
    """K-FAC as a matrix (P, P): ``G ⊗ A`` in each layer; with damping, what its factored rule inverts."""
    f = F.kronecker()
    layers = zip(f.A, f.G, f.shifts(damping), strict=True)
    return torch.block_diag(*(torch.kron(shifted(G, for_G), shifted(A, for_A)) for A, G, (for_G, for_A) in layers))


class Shares(NamedTuple):
    """What a direction captures of the best decrease, by how its length is chosen."""

    captured: float  # as it is
    at_best_length: float  # with one best length for all of it
    at_layer_lengths: float  # with the best length for each layer's piece, all chosen together


def shares(A: Operator, g: Tensor, v: Tensor) -> Shares:
    """Captured decrease of the direction v (P,) as it is and at its best lengths.

    With one length it is the squared cosine, in the metric A, of the angle between v and the exact direction; with one
    for each layer, that of the angle between the exact direction and the space of the pieces of v.
    """
    lengths = (v, at_best_length(A, g, v), at_layer_lengths(A, g, v))
    return Shares(*(captured_decrease(A, g, x) for x in lengths))


def at_best_length(A: Operator, g: Tensor, v: Tensor) -> Tensor:
    """The direction v with the length that captures most, ``gᵀv / vᵀAv`` times its own."""
    return float(g @ v) / float(v @ (A @ v)) * v


def at_layer_lengths(A: Operator, g: Tensor, v: Tensor) -> Tensor:
    """The pieces of v, one for each layer, with the lengths that capture most: ``Z (ZᵀAZ)⁻¹ Zᵀg``, Z the pieces."""
    pieces = [v[s] / size if (size := float(v[s].norm())) else v[s][:, None][:, :0] for s in A.partition.slices]
    return CoarseCorrection(A, LocalSpace(A.partition, [x.view(len(x), -1) for x in pieces], name="pieces")) @ g


def space(name: str, A: Damped, M: KFAC, g: Tensor, per_layer: int, seed: int) -> CoarseSpace:
    """The coarse space of this name; columns that depend on others are left out, and its size says so."""
    arguments = {"krylov": (A, M, g, per_layer), "optimal": (A, M, per_layer), "random": (M, per_layer, seed)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
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
