"""Whether an answer to an exercise of the notebooks is right: the truth is computed, never stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from . import KFAC, BlockDiagonal, Dense, Partition, TwoLevel, captured_decrease, coarse, spectrum
from .experiments import run_coarse_space, run_depth
from .experiments.damping import loss_after
from .experiments.fisher import sampling_error, small_problem
from .experiments.kfac import kronecker_blocks, split
from .experiments.origin import poisson
from .experiments.setting import Setting, setting

TRUTHS: dict[str, Exercise] = {}


@dataclass(frozen=True)
class Exercise:
    """``truth()`` is the right answer; ``hint`` is what a wrong one is told."""

    truth: Callable[[], Any]
    hint: str
    tolerance: float  # relative


def exercise(name: str, hint: str, tolerance: float = 0.0) -> Callable:
    """Register the function that follows as the truth of an exercise."""

    def register(truth: Callable[[], Any]) -> Callable[[], Any]:
        TRUTHS[name] = Exercise(truth, hint, tolerance)
        return truth

    return register


class Verdict(str):
    """A sentence that a notebook shows without quotes."""

    def __repr__(self) -> str:
        return str(self)


def check(name: str, answer: Any = None) -> Verdict:
    """Whether ``answer``, a number, an array or a text, is right; ``None`` stands for one that is still to be given.

    >>> check("04a", None)
    Exercise 04a: put your answer in place of None.

    Raises:
        ValueError: there is no such exercise.
    """
    if name not in TRUTHS:
        raise ValueError(f"There is no exercise {name!r}; there are {', '.join(sorted(TRUTHS))}.")
    if answer is None:
        return Verdict(f"Exercise {name}: put your answer in place of None.")
    task = TRUTHS[name]
    truth = task.truth()
    if isinstance(truth, str):
        right = str(answer).strip().lower() == truth
    else:
        try:
            given, truth = np.asarray(answer, dtype=float), np.asarray(truth, dtype=float)
        except (TypeError, ValueError):
            return Verdict(f"Exercise {name}: the answer is made of numbers; {answer!r} came.")
        if given.shape != truth.shape:
            return Verdict(f"Exercise {name}: the answer has shape {truth.shape}; yours has {given.shape}.")
        right = bool(np.linalg.norm(given - truth) <= task.tolerance * np.linalg.norm(truth) + 1e-12)
    return Verdict(f"Exercise {name}: right." if right else f"Exercise {name}: not yet. {task.hint}")


def _network(steps: int = 100) -> Setting:
    """The network of the first studies, as published."""
    return setting("digits4", (12, 12, 12), 500, 0, steps)


@exercise("00a", "Compare the bars of the four corrections with that of K-FAC.")
def _takes_the_same_step_twice() -> str:
    captured = run_coarse_space().captured
    return next(name for name in ("additive", "a-def1", "a-def2", "balanced") if captured[name] < captured["kfac"])


@exercise("00b", "Move per_layer upwards until the bar of the balanced correction reaches 0.9.")
def _columns_for_nine_tenths() -> int:
    return next(k for k in range(17) if run_coarse_space(per_layer=k).captured["balanced"] >= 0.9)


@exercise("01a", "The error falls with the root of the number of labels: what does a factor of ten cost?", 0.2)
def _labels_for_one_percent() -> float:
    s = _network(steps=20)
    error = sampling_error(s.F, s.problem.model(s.problem.inputs).detach().softmax(1))
    return (error / float(s.dense.norm()) / 0.01) ** 2


@exercise("01b", "The score of one example is its residual times (x, 1); average the outer products.", 1e-6)
def _empirical_fisher_of_a_line() -> np.ndarray:
    return small_problem("gaussian", 0, weight=0.0, bias=1.0).capture("empirical").dense().numpy()


@exercise("02a", "Only the blocks between layers are lost for certain; what is the norm of those?", 0.01)
def _best_block_diagonal_error() -> float:
    s = _network()
    return (split(s.F, s.dense)[0] / float(s.dense.square().sum())) ** 0.5


@exercise("02b", "Multiply the product out: both terms that are left over grow with the root of λ.", 0.01)
def _growth_of_the_factored_excess() -> float:
    F = _network().F
    near, far = (kronecker_blocks(F, λ) - kronecker_blocks(F) - λ * F.eye() for λ in (1e-3, 1e-1))
    return float(far.square().sum() / near.square().sum())


@exercise("03a", "Σ d/(d + λ) falls as λ grows: try values, or halve an interval.", 0.05)
def _damping_for_a_tenth_of_the_dimensions() -> float:
    from scipy.optimize import brentq

    d = _network().F.eigen.d.numpy()
    return 10 ** brentq(lambda e: (d / (d + 10**e)).sum() - len(d) / 10, -12, 3)


@exercise("03b", "The loss behind the step less the loss before it changes its sign: halve an interval of λ.", 0.05)
def _damping_at_which_the_step_stops_helping() -> float:
    from scipy.optimize import brentq

    s = _network()
    now = float(s.problem.loss().detach())
    return 10 ** brentq(lambda e: loss_after(s.problem, s.F.damped(10**e).solve(s.g)) - now, -4, -1)


@exercise("04a", "Each inner boundary couples one pair of neighbours, and that pair spans how many dimensions?")
def _interface_eigenvalues() -> int:
    A = poisson(subdomains=10, local=8)
    return int((abs(spectrum(A, BlockDiagonal(A, 0.0)) - 1) > 1e-8).sum())


@exercise("04b", "kv.spectrum(A, T)[-1], with T = kv.TwoLevel(A, M, Z, 'balanced').", 1e-3)
def _largest_balanced_eigenvalue() -> float:
    A = poisson(subdomains=8, local=16)
    return float(spectrum(A, TwoLevel(A, BlockDiagonal(A, 0.0), coarse.nicolaides(A, 1)))[-1])


@exercise("05a", "run_coarse_space(coarse=…, per_layer=1).captured['balanced'], for one name after the other.")
def _best_single_column() -> str:
    return max(coarse.SPACES, key=lambda name: run_coarse_space(coarse=name, per_layer=1).captured["balanced"])


@exercise("05b", "The step misses the exact one by M g; measure that in the norm of A.", 0.01)
def _additive_with_everything() -> float:
    s = _network(steps=0)
    A = s.F.damped(0.01)
    return captured_decrease(A, s.g, KFAC(s.F, 0.01) @ s.g + A.solve(s.g))


@exercise("06a", "Take v whose pieces v_l all have v_lᵀ A_ll v_l = 1, and Cauchy–Schwarz for the cross terms.")
def _most_block_jacobi_can_overshoot() -> int:
    layers = 17  # the worst case: every layer sees the same direction
    A = Dense(torch.ones(layers, layers, dtype=torch.float64), Partition.from_sizes([1] * layers)).damped(1e-9)
    return round(float(spectrum(A, BlockDiagonal(A, 1e-9))[-1]))


@exercise("06b", "Call run_depth for one size after the other and watch the captured decrease.")
def _eigenvectors_for_nine_tenths() -> int:
    captured = (run_depth(layers=(9,), repeats=1, per_layer=k).of("captured")["leading, balanced"] for k in range(1, 8))
    return next(k for k, c in enumerate(captured, 1) if c.y[0] >= 0.95)


@exercise("09a", "Set the three products of the gradient equal to the two of K-FAC: 3 N o i = o² i + o i².", 0.01)
def _batch_that_pays_for_kfac() -> float:
    return (1000 + 1001) / 3


@exercise("09b", "of('width, counted')['K-FAC'].y[-1] over of('width')['K-FAC'].y[-1].", 0.02)
def _share_of_the_limit() -> float:
    from .experiments import run_speed

    result = run_speed()
    return float(result.of("width, counted")["K-FAC"].y[-1] / result.of("width")["K-FAC"].y[-1])
