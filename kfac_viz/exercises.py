"""Whether an answer to an exercise of the notebooks is right: the truth is computed, never stored."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
    """Whether ``answer``, a number or a text, is right; ``None`` stands for one that is still to be given.

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
            right = math.isclose(float(answer), truth, rel_tol=task.tolerance, abs_tol=1e-12)
        except (TypeError, ValueError):
            return Verdict(f"Exercise {name}: the answer is a number; {answer!r} came.")
    return Verdict(f"Exercise {name}: right." if right else f"Exercise {name}: not yet. {task.hint}")


@exercise("04a", "Each inner boundary couples one pair of neighbours, and that pair spans how many dimensions?")
def _interface_eigenvalues() -> int:
    from . import BlockDiagonal, spectrum
    from .experiments.origin import poisson

    A = poisson(subdomains=10, local=8)
    return int((abs(spectrum(A, BlockDiagonal(A, 0.0)) - 1) > 1e-8).sum())


@exercise("06a", "Take v whose pieces v_l all have v_lᵀ A_ll v_l = 1, and Cauchy–Schwarz for the cross terms.")
def _most_block_jacobi_can_overshoot() -> int:
    import torch

    from . import BlockDiagonal, Dense, Partition, spectrum

    layers = 17  # the worst case: every layer sees the same direction
    A = Dense(torch.ones(layers, layers, dtype=torch.float64), Partition.from_sizes([1] * layers)).damped(1e-9)
    return round(float(spectrum(A, BlockDiagonal(A, 1e-9))[-1]))
