"""How long a step is, by looking at the loss along it: for full batches, whose loss is one function of the weights."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

SEARCHES = ("first", "parabola", "least")
LENGTHS_TRIED = tuple(0.5**i for i in range(31))  # of a step, before it is given up
DOUBLINGS = tuple(2.0**i for i in range(1, 6))  # of a step that goes down, as long as it goes down further
VERTICES = 2  # of parabolas that are tried within a bracket


def line_search(at: Callable[[float], float], loss: float, rule: str) -> tuple[float, int]:
    """The length of a step, and how often the loss was evaluated; 0 where it is nowhere lower than without the step.

    - ``"first"``: 1, ½, ¼, … until the loss is lower than without the step.
    - ``"parabola"``: 1, ¼, 1/16, … until the loss is lower, and 2, 4, … where 1 goes down, so that three lengths
      bracket a minimum; then the lowest points of the parabolas through the best three, twice. It takes the best
      length that it has seen.
    - ``"least"``: the best of all 31 halvings, as in energy natural gradients (Müller and Zeinhofer 2023).

    Args:
        at: the loss at a length. NaN and inf count as higher than all else.
        loss: that without the step, finite.
        rule: one of :data:`SEARCHES`.

    >>> def at(t):
    ...     return (t - 0.3) ** 2
    >>> line_search(at, at(0), "first"), line_search(at, at(0), "least")
    ((0.5, 2), (0.25, 31))
    >>> length, evaluations = line_search(at, at(0), "parabola")
    >>> round(length, 12), evaluations
    (0.3, 3)
    """
    seen = {0.0: loss}

    def lower(t: float, than: float) -> bool:
        """Look at a length, and say whether the loss there is lower than at another one."""
        value = at(t)
        seen[t] = value if value == value else inf
        return seen[t] < seen[than]

    if rule == "least":
        for t in LENGTHS_TRIED:
            lower(t, 0.0)
    elif rule == "first":
        any(lower(t, 0.0) for t in LENGTHS_TRIED)
    elif any(lower(t, 0.0) for t in LENGTHS_TRIED[::2]):
        if len(seen) == 2:
            all(lower(t, t / 2) for t in DOUBLINGS)
        for _ in range(VERTICES):
            if (t := _lowest_point(seen)) is None:
                break
            lower(t, 0.0)
    return min(seen, key=seen.__getitem__), len(seen) - 1


def _lowest_point(seen: dict[float, float]) -> float | None:
    """Where the parabola through the best length and its two neighbours is lowest; None within 1 % of that length, or
    where it has no neighbours."""
    lengths = sorted(seen)
    i = lengths.index(min(seen, key=seen.__getitem__))
    if not 0 < i < len(lengths) - 1:
        return None
    (a, b, c), (left, middle, right) = lengths[i - 1 : i + 2], (seen[t] for t in lengths[i - 1 : i + 2])
    if right == inf:
        return (b + c) / 2
    before, after = (left - middle) * (c - b), (right - middle) * (b - a)  # both at least 0
    if not before + after > 0:
        return None
    t = (before * (b + c) + after * (a + b)) / (2 * (before + after))
    return t if abs(t - b) > 0.01 * b else None
