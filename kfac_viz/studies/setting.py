"""The setting that experiments share: a network at a moment of its training, and what λ does not change."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Annotated, Literal

import torch
from torch import Tensor

from ..method.fisher import Fisher
from ..method.kronecker_fisher import KroneckerFisher
from ..method.operator import Dense
from ..parameters import Range
from . import problems
from .problems import Problem

Data = Literal["digits4", "digits8", "autoencoder4", "planted"]
Flavour = Literal["exact", "mc", "empirical"]
Widths = Annotated[tuple[int, ...], Range(1, 64)]

DAMPINGS = Range(1e-4, 1e2, log=True, steps=61)  # the slider of the first studies; some positions carry their curves
OVER_DAMPINGS = {"x": "damping λ", "xlim": (DAMPINGS.low, DAMPINGS.high)}
LARGEST = 2500  # parameters: the matrices are dense


@dataclass(frozen=True, eq=False)
class Setting:
    """A problem with its Fisher and gradient; everything that is independent of λ and Z is computed once."""

    problem: Problem
    fisher: str = "exact"

    @cached_property
    def F(self) -> Fisher:
        return self.problem.capture(self.fisher)

    @cached_property
    def g(self) -> Tensor:
        return self.problem.gradient()

    @cached_property
    def K(self) -> KroneckerFisher:
        return KroneckerFisher(self.F)

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
        """K-FAC's approximation of it, (P, P): the diagonal blocks ``G ⊗ A`` alone."""
        f = self.F.kronecker()  # not K: its cross-layer blocks do not exist where numbers of positions differ
        return torch.block_diag(*(torch.kron(G, A) for A, G in zip(f.A, f.G, strict=True)))

    @cached_property
    def basis(self) -> Tensor:
        """K-FAC's eigenvectors ``U_G ⊗ U_A``, (P, P), in which K-FAC is diagonal for every λ."""
        f = self.F.kronecker()
        return torch.block_diag(*(torch.kron(G.U, A.U) for A, G in zip(f.eigen_A, f.eigen_G, strict=True)))

    @cached_property
    def rotated(self) -> Tensor:
        """The Fisher in that basis, (P, P)."""
        return self.basis.T @ self.dense @ self.basis


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
    else:
        build = problems.autoencoder if data.startswith("auto") else problems.digits
        problem = build(widths, n, seed, side=int(data[-1]), device=device)
    return Setting(small_enough(problem).trained(steps), fisher)


def first_network(steps: int = 100) -> Setting:
    """The network of the first studies, as published."""
    return setting("digits4", (12, 12, 12), 500, 0, steps)
