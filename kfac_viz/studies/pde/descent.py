"""Training to the end on a full batch: every direction that this package knows, each with its rule for the length."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from ... import KFAC, CoarseCorrection, CoarseSpace, Damped, Dense, Fisher, TwoLevel, coarse, exact_direction, pcg
from ...method.sample_space import SampleSpace
from ...problems.equations import Equation
from ...scores.likelihood import nll
from ...train.search import line_search
from ...train.update import QuadraticModel, best_coefficients, judged_damping
from ..common.setting import space


class Method(NamedTuple):
    """How a direction is made of Fisher and gradient, and how far the step goes along it.

    Attributes:
        kind: ``"kfac"``, ``"coarse"`` (the coarse level alone), ``"both"`` (two levels), ``"exact"``, or one of
            PyTorch's own, ``"adam"`` and ``"lbfgs"``.
        space, per_layer, correction: of the coarse level.
        iterations: of conjugate gradients that the method preconditions; 0 takes it by itself.
        length: a rule of :func:`kfac_viz.train.search.line_search`, ``"first"``, ``"parabola"`` or ``"least"``; or
            ``"quadratic"``: length and momentum from the quadratic model. λ then follows the reduction ratio, and a
            step that goes up is undone, as the optimizer does it with a closure.
        follow: whether λ follows the loss, ``λ min(1, loss)``.
    """

    kind: str
    space: str = "spectral"
    per_layer: int = 0
    correction: str = "balanced"
    iterations: int = 0
    length: str = "first"
    follow: bool = False


def direction(method: Method, F: Fisher, g: Tensor, residuals: Tensor, damping: float, seed: int = 0) -> Tensor:
    """What the method takes for ``(F + λI)⁻¹ g``, (P,), to be subtracted.

    Args:
        residuals: r (N,) with ``g = Jᵀ r / N``.
        seed: of random columns; the study draws others at every step.
    """
    if method.kind == "exact":
        return exact_step(F, residuals, damping)
    A = F.damped(damping)
    M = KFAC(F, damping)
    if method.kind == "kfac":
        T = M
    else:
        Z = columns(method.space, A, M, g, method.per_layer, seed)
        T = CoarseCorrection(A, Z) if method.kind == "coarse" else TwoLevel(A, M, Z, method.correction)
    return pcg(A, g, T, rtol=1e-10, max_iterations=method.iterations).solution if method.iterations else T @ g


def columns(name: str, A: Damped, M: KFAC, g: Tensor, per_layer: int, seed: int) -> CoarseSpace:
    """As :func:`.setting.space`; ``"spectral in all"`` puts as many where the eigenvalues are."""
    if name == "spectral in all":
        return coarse.spectral(M, total=per_layer * len(A.partition))
    return space(name, A, M, g, per_layer, seed)


def exact_step(F: Fisher, residuals: Tensor, damping: float) -> Tensor:
    """``(F + λI)⁻¹ g`` for ``g = Jᵀ r / N``: in the space of the points, or where there are more of them than
    parameters by a Cholesky factor of the matrix, which is cheaper for one λ than its eigenvectors."""
    if isinstance(F.solver, SampleSpace):
        return F.solver.solve_pulled(residuals[None], damping)
    return exact_direction(Dense(F.damped(damping).dense(), F.partition), F.pull(residuals[None]) / F.N)


def training(problem: Equation, method: Method, damping: float, seed: int = 0) -> Iterator[int]:
    """Train ``problem.model`` in place; after each step, how often the loss has been evaluated beside the gradients.

    The gradient is ``Jᵀ r / N`` with the captured J and the residuals r: no second backward pass is made. It ends where
    a step goes up at every length. With ``"adam"`` the damping is the rate; ``"lbfgs"`` has none.

    Raises:
        ValueError: the loss has overflowed, or a matrix is singular to working precision at this λ.
    """
    if method.kind in ("adam", "lbfgs"):
        yield from _pytorch(problem, method.kind, damping)
        return
    P, model, evaluations, last = problem.partition, problem.model, 0, None
    for step in count():
        with torch.no_grad():
            loss, residuals, F = *_loss(problem), problem.capture()
            g = F.pull(residuals[None]) / F.N
            λ = damping * min(1.0, loss) if method.follow else damping
            try:
                v = direction(method, F, g, residuals, λ, seed + step)
            except torch.linalg.LinAlgError as error:
                raise ValueError(f"The matrix is singular to working precision at λ = {λ:g}.") from error
            if method.length == "quadratic":
                quadratic = QuadraticModel(F, g, λ)
                D = torch.stack([-v] if last is None else [-v, last])
                δ = best_coefficients(*quadratic.along(D)) @ D
                (slope,), ((curvature,),) = quadratic.along(δ[None])
                change, predicted = _moved(problem, δ, -1.0) - loss, float(slope + curvature / 2)
                evaluations += 1
                damping = judged_damping(damping, change, change / predicted if predicted else 0.0, step)
                last = δ if change <= 0 else None
                if last is not None:
                    P.add_(model, last)
            else:
                best, tried = line_search(lambda length: _moved(problem, v, length), loss, method.length)  # noqa: B023
                evaluations += tried
                if best == 0:
                    return
                P.add_(model, v, -best)
        yield evaluations


def _moved(problem: Equation, v: Tensor, length: float) -> float:
    """The loss after a step ``−length v``, which is taken back exactly."""
    kept = [p.clone() for p in problem.model.parameters()]
    problem.partition.add_(problem.model, v, -length)
    loss, _ = _loss(problem)
    torch._foreach_copy_(list(problem.model.parameters()), kept)
    return loss


def _loss(problem: Equation) -> tuple[float, Tensor]:
    """The loss, and the residuals r (N,) that it is made of."""
    outputs = problem.model(problem.inputs)
    return float(nll(outputs, problem.targets, "gaussian")), outputs[:, 0]


def _pytorch(problem: Equation, kind: str, rate: float) -> Iterator[int]:
    """PyTorch's own: Adam, or L-BFGS with strong Wolfe conditions, ten of its iterations at a time."""
    parameters, evaluations = list(problem.model.parameters()), 0

    def closure() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return evaluate()

    if kind == "adam":
        optimizer = torch.optim.Adam(parameters, lr=rate)
    else:
        optimizer = torch.optim.LBFGS(parameters, max_iter=10, tolerance_grad=0, tolerance_change=0,
                                      line_search_fn="strong_wolfe")  # fmt: skip
    evaluate = problem.closure(optimizer)
    while True:
        loss = float(optimizer.step(closure).detach())
        if not isfinite(loss):
            raise ValueError("The loss has overflowed.")
        yield evaluations
