"""What can be known of a network before it is trained, and might say whether a better solve will train better."""

from __future__ import annotations

import torch

from ...method.kfac import KFAC
from ...method.preconditioner import BlockDiagonal
from ...problems.problem import Problem
from ...scores.hessian import Hessian
from ..common.setting import all_shares, at_best_length
from ..damping import loss_after
from ..hessian import negative_share

NAMES = {
    "K-FAC captures": "share that K-FAC captures at its best length",
    "blocks capture": "share that exact blocks capture at their best length",
    "layer overlap": "how many layers take the same step",
    "reduction ratio": "true over predicted change along the exact step",
    "negative curvature": "share of the Hessian's eigenvalues below zero, by modulus",
}


def least_loss(problem: Problem) -> float:
    """The training loss below which no network can go: 0, but for targets between 0 and 1 their entropy."""
    if problem.likelihood != "bernoulli":
        return 0.0
    y = problem.targets.double()
    return float(-(torch.xlogy(y, y) + torch.xlogy(1 - y, 1 - y)).flatten(1).sum(1).mean())


def known_before(problem: Problem, damping: float = 0.01) -> dict[str, float]:
    """The numbers of :data:`NAMES` for the untrained network, at this λ."""
    F, g = problem.capture(), problem.gradient()
    A = F.damped(damping)
    exact = A.solve(g)
    directions = {"kfac": KFAC(F, damping, "eigen") @ g, "blocks": BlockDiagonal(F, damping) @ g}
    captured = all_shares(A, g, directions, exact)
    step = at_best_length(A, g, exact)
    predicted = float(g @ step - step @ (A @ step) / 2)
    change = loss_after(problem, step) - float(problem.loss().detach())
    H = Hessian(problem.model, problem.arguments, problem.targets, likelihood=problem.likelihood)
    return {
        "K-FAC captures": captured["kfac"].at_best_length,
        "blocks capture": captured["blocks"].at_best_length,
        "layer overlap": A.layer_overlap(),
        "reduction ratio": -change / predicted,
        "negative curvature": negative_share(H.eigen.d),
    }
