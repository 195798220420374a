"""What a step takes by its matrix products: why one method is first with few points, and another with many.

Every point inside is carried through the network at d + 2 positions, one on the boundary at one. With T of them on
average a pass multiplies N T P numbers. K-FAC and a coarse level need a number of such passes, and products of the
columns with the points; the exact step needs the inner products of all pairs of points, N² P.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from ...show import Curve
from ...train.search import LENGTHS_TRIED
from .tables import measured_curves

POINTS = (250, 500, 1000, 2000, 4000, 8000)
WIDTHS, DIM, INSIDE = (64, 64, 48, 48), 5, 0.8  # of the peers' problem
SEARCHED = 5  # evaluations of a search by parabolas
PER_LAYER = 64


def multiplications(method: str, points: int, widths: Sequence[int] = WIDTHS, dim: int = DIM) -> float:
    """Of one step, in its matrix products alone.

    >>> f"{multiplications('engd-w', 2000) / multiplications('engd-w', 1000):.1f}"
    '3.7'
    """
    layers = [(i + 1, o) for i, o in pairwise((dim, *widths, 1))]
    P = sum(i * o for i, o in layers)
    N = points
    NT = N * (INSIDE * (dim + 2) + 1 - INSIDE)  # positions of all points
    forward, back = NT * P, NT * P  # to what goes into each layer
    if method in ("engd-w", "spring"):
        return forward + back + NT * P + 0.625 * N**2 * P + N**3 / 3 + 2 * N * P + len(LENGTHS_TRIED) * forward
    if method == "nystrom":
        rank = N // 10
        return forward + back + NT * P + 2 * rank * N * P + 2 * rank**2 * N + len(LENGTHS_TRIED) * forward
    factors = NT * sum(i**2 + o**2 for i, o in layers)
    eigen = 10 * sum(i**3 + o**3 for i, o in layers)
    if method == "kfac-pinns":
        return forward + back + factors + 4 * eigen + 3 * forward
    k = sum(min(PER_LAYER, i * o) for i, o in layers)
    columns = NT * PER_LAYER * sum(i + o for i, o in layers) + N * k**2 / 2 + k**3 / 3
    return forward + back + factors + eigen + columns + 4 * N * k + 4 * forward + SEARCHED * forward


def counted_curves() -> dict[tuple[str, str], Curve]:
    """``counted``: seconds a step over POINTS by the multiplications, with one rate for all: the median of the measured
    steps, wherever a method was measured."""
    measured = {name: c for (quantity, name), c in measured_curves().items() if quantity == "step"}
    names = [name for name in ("kfac-pinns", "spring", "engd-w", "ours") if name in measured]
    rates = [multiplications(name, int(n)) / y for name in names for n, y in zip(*measured[name][:2], strict=True)]
    rate = float(np.median(rates))
    curves = {}
    for name in names:
        seconds = np.array([float(f"{multiplications(name, n) / rate:.3g}") for n in POINTS])
        curves["counted", name] = Curve(np.array(POINTS, float), seconds, seconds, seconds)
    return curves
