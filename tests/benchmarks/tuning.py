"""The one rule by which every method is tuned: the lowest loss of a grid that is extended until its best is inside."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import NamedTuple


class Axis(NamedTuple):
    """Values of one setting to start with, in rising order, the factor between two, and where an extension ends."""

    start: tuple[float, ...]
    factor: float = 10.0
    ends: tuple[float, float] = (0.0, math.inf)


def tune(loss: Callable[..., float], *axes: Axis) -> tuple[float, ...]:
    """The best point of a grid that goes on from its best until none beside that is lower: so it is at no end, unless
    the axis ends there. Of equal points it is the first that was asked.

    Args:
        loss: of a point, one number for each axis.

    >>> tune(lambda x, y: (x - 20) ** 2 + y, Axis((0.1, 1.0)), Axis((3.0,), ends=(3.0, 3.0)))
    (10.0, 3.0)
    """
    grid = [list(axis.start) for axis in axes]
    losses = {point: loss(*point) for point in product(*grid)}
    while True:
        best = min(losses, key=losses.get)
        near = [
            (*best[:i], x, *best[i + 1 :])
            for i, axis in enumerate(axes) for x in beside(best[i], grid[i], axis)
        ]  # fmt: skip
        missing = [point for point in near if point not in losses]
        if not missing:
            return best
        losses |= {point: loss(*point) for point in missing}


def beside(x: float, values: list[float], axis: Axis) -> list[float]:
    """The values of an axis next to x, which are added to the list where it ends."""
    if x == values[0] and x > axis.ends[0]:
        values.insert(0, x / axis.factor)
    if x == values[-1] and x < axis.ends[1]:
        values.append(x * axis.factor)
    i = values.index(x)
    return [*values[max(i - 1, 0) : i], *values[i + 1 : i + 2]]
