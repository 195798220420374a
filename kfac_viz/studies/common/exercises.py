"""Whether an answer to an exercise of the notebooks is right: the truth is computed, never stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

TRUTHS: dict[str, Exercise] = {}


@dataclass(frozen=True)
class Exercise:
    """``truth()`` is the right answer; ``hint`` is shown for a wrong one."""

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

    >>> check("05a", None)
    Exercise 05a: put your answer in place of None.

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
            return Verdict(f"Exercise {name}: the answer is made of numbers; got {answer!r}.")
        if given.shape != truth.shape:
            return Verdict(f"Exercise {name}: the answer has shape {truth.shape}; yours has {given.shape}.")
        right = bool(np.linalg.norm(given - truth) <= task.tolerance * np.linalg.norm(truth) + 1e-12)
    return Verdict(f"Exercise {name}: right." if right else f"Exercise {name}: not yet. {task.hint}")


def crossing(f: Callable[[float], float], low: float, high: float) -> float:
    """Where between 10^low and 10^high f changes its sign."""
    from scipy.optimize import brentq

    return 10 ** brentq(lambda exponent: f(10**exponent), low, high)
