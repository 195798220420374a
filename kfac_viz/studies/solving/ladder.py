"""Does solving ``A v = g`` better train better? One loop, and the directions of a ladder from g to ``A⁻¹ g``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ...method import coarse
from ...method.fisher import Fisher
from ...method.kfac import EKFAC, KFAC
from ...method.preconditioner import BlockDiagonal, Diagonal, Preconditioner
from ...method.two_level import TwoLevel
from ...problems.problem import Problem
from ...train.options import Options
from ...train.update import QuadraticModel, judged_damping, update

Direction = Callable[[Fisher, float, Tensor], Tensor]  # from F, λ and g (P,) to v (P,), which is subtracted


def _one_level(make: Callable[[Fisher, float], Preconditioner]) -> Direction:
    return lambda F, damping, g: make(F, damping) @ g


def _two_levels(make: Callable[[Fisher, float], Preconditioner], per_layer: int) -> Direction:
    """With that many of the leading Kronecker eigenvectors of each layer, balanced."""

    def direction(F: Fisher, damping: float, g: Tensor) -> Tensor:
        return TwoLevel(F.damped(damping), make(F, damping), coarse.spectral(F, per_layer)) @ g

    return direction


def _kfac(F: Fisher, damping: float) -> KFAC:
    return KFAC(F, damping, "eigen")


RUNGS: dict[str, Direction] = {
    "gradient": lambda F, damping, g: g.clone(),
    "diagonal": _one_level(Diagonal),
    "diagonal, 4": _two_levels(Diagonal, 4),
    "diagonal, 16": _two_levels(Diagonal, 16),
    "nearest": _one_level(lambda F, damping: KFAC(F, damping, "eigen", factors="nearest")),
    "kfac": _one_level(_kfac),
    "factored": _one_level(lambda F, damping: KFAC(F, damping, "factored")),
    "kl": _one_level(lambda F, damping: KFAC(F, damping, "eigen", factors="kl")),
    "shampoo": _one_level(lambda F, damping: KFAC(F, damping, "eigen", factors="shampoo")),
    "kfac, 4": _two_levels(_kfac, 4),
    "kfac, 16": _two_levels(_kfac, 16),
    "ekfac": _one_level(EKFAC),
    "blocks": _one_level(BlockDiagonal),
    "blocks, 4": _two_levels(BlockDiagonal, 4),
    "blocks, 16": _two_levels(BlockDiagonal, 16),
    "exact step": lambda F, damping, g: F.damped(damping).solve(g),
}


class Regime(NamedTuple):
    """What the loop does beside the direction: the core, or one thing in it varied.

    Attributes:
        step_rule: ``"quadratic"`` or ``"kl_clip"``, see :class:`kfac_viz.TwoLevelKFAC`; λ is adapted by the former.
        fisher: of the vectors, ``"exact"`` or ``"mc"``.
        batch: examples of a mini-batch, drawn anew for each step; None for all.
    """

    step_rule: str = "quadratic"
    fisher: str = "exact"
    batch: int | None = None


REGIMES = {
    "core": Regime(),
    "mini-batches": Regime(batch=100),
    "sampled labels": Regime(fisher="mc"),
    "KL bound": Regime(step_rule="kl_clip"),
}


class Point(NamedTuple):
    """Where a run is after so many steps: losses per example, λ, and seconds of the steps on one core."""

    step: int
    loss: float
    test_loss: float
    damping: float
    seconds: float


def train(
    problem: Problem,
    test: Problem,
    direction: Direction,
    damping: float,
    steps: int,
    *,
    regime: Regime = REGIMES["core"],
    lr: float = 1.0,
    seed: int = 0,
    every: int = 5,
) -> Iterator[Point]:
    """Train the network of a problem with the rule and the curvature of :class:`kfac_viz.TwoLevelKFAC`.

    A test finds the two equal where both can take a direction. A step that raises the loss is undone, its momentum
    forgotten, and λ raised fourfold; λ otherwise follows the reduction ratio (Martens and Grosse 2015, section 6.5).

    Args:
        problem, test: the examples to train on and examples apart, of one network; the loss is that of all of them,
            in eval mode.
        direction: one of :data:`RUNGS`.
        damping: λ to start with.
        lr: of the KL bound; the quadratic rule takes 1.
        seed: of batches and sampled labels.
        every: steps between two points.

    Raises:
        ValueError: a step that overflows, or a matrix that cannot be inverted, as the method that refuses says.
    """
    options = Options(likelihood=problem.likelihood, step_rule=regime.step_rule, fisher=regime.fisher)
    labels, draws = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    last, seconds = problem.gradient().zero_(), 0.0
    momentum = options.usual("momentum")
    for step in range(1, steps + 1):
        start = time.process_time()
        batch = problem
        if regime.batch is not None:
            chosen = torch.randperm(len(problem.targets), generator=draws)[: regime.batch]
            batch = replace(problem, inputs=problem.inputs[chosen], targets=problem.targets[chosen])
        sampling = {"generator": labels} if regime.fisher == "mc" else {}
        F, g, before = batch.capture(regime.fisher, **sampling), batch.gradient(), float(batch.loss().detach())
        judged = regime.step_rule == "quadratic"
        model = QuadraticModel(F, g, damping)
        found = update(
            direction(F, damping, g), last, model, options, lr=lr, momentum=momentum, damping=damping, predicting=judged
        )
        batch.partition.add_(problem.model, found.step)
        last = found.momentum
        if judged:
            change = float(batch.loss().detach()) - before
            if not change <= 0:  # which NaN is not, either
                batch.partition.add_(problem.model, -found.step)
                last = torch.zeros_like(last)
            predicted = float(found.facts["predicted"])
            damping = judged_damping(damping, change, change / predicted if predicted else 0.0, step - 1)
        seconds += time.process_time() - start
        if step % every == 0 or step == steps:
            loss = float(problem.loss().detach())
            yield Point(step, loss, float(test.loss().detach()), damping, seconds)
            if not math.isfinite(loss):
                return
