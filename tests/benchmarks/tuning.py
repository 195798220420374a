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
    """The point of a grid with the lowest loss, at no end of any axis unless the axis ends there; of equal ones, as
    rates are where a bound makes their steps alike, one that is inside.

    Args:
        loss: of a point, one number for each axis; it is asked again for points of a grid that grows.

    >>> tune(lambda x, y: (x - 20) ** 2 + y, Axis((0.1, 1.0)), Axis((3.0,), ends=(3.0, 3.0)))
    (10.0, 3.0)
    """
    grid = [list(axis.start) for axis in axes]

    def at_an_end(point: tuple[float, ...]) -> bool:
        return any(x in (values[0], values[-1]) for x, values in zip(point, grid, strict=True))

    while True:
        losses = {point: loss(*point) for point in product(*grid)}
        best = min(losses, key=lambda point: (losses[point], losses[point] < math.inf and at_an_end(point)))
        for values, axis, x in zip(grid, axes, best, strict=True):
            if x == values[0] and x > axis.ends[0]:
                values.insert(0, x / axis.factor)
                break
            if x == values[-1] and x < axis.ends[1]:
                values.append(x * axis.factor)
                break
        else:
            return best
