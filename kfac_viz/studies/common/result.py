"""The numbers of a study: curves with their range over seeds, in one tidy table, and a line that says where."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ...parameters import number
from ...show import Curve, Tolerance

if TYPE_CHECKING:
    import pandas
    from numpy.typing import ArrayLike, NDArray


PRECISION = 1e-12  # of the largest number of its kind: what is smaller is rounding error, and clipped
SHARE = Tolerance(absolute=1e-3)  # of a decrease whose best is 1
SHARES = dict.fromkeys(("captured", "at_best_length", "at_layer_lengths"), SHARE)
COUNT = Tolerance(absolute=1)  # one iteration, or one eigenvalue, more or less


def curve(x: ArrayLike, seeds: ArrayLike | Sequence[Sequence[float]]) -> Curve:
    """``seeds`` (n,), or (repeats, n), as a :class:`Curve` of 4 significant digits.

    >>> curve([1, 2], [[1.0, 5.0], [3.0, 6.0], [2.0, 9.0]]).y
    array([2., 6.])
    """
    values = np.atleast_2d(np.asarray(seeds, dtype=float))
    summary = np.median(values, 0), values.min(0), values.max(0)
    return Curve(rounded(x), *map(rounded, summary))


def banded(curves: Mapping[Any, Curve], names: Collection) -> dict[Any, Curve]:
    """The curves, with a band for these alone: more would hide each other."""
    return {name: c if name in names else c._replace(low=c.y, high=c.y) for name, c in curves.items()}


def by_key(mappings: Iterable[Mapping[Any, Any]]) -> dict[Any, list]:
    """From many mappings to one list for each key.

    >>> by_key([{"a": 1, "b": 2}, {"a": 3, "b": 4}])["b"]
    [2, 4]
    """
    found: dict[Any, list] = defaultdict(list)
    for one in mappings:
        for key, value in one.items():
            found[key].append(value)
    return found


def over_seeds(x: ArrayLike, seeds: Iterable[Mapping[Any, Sequence[float]]]) -> dict[Any, Curve]:
    """A curve for each key, from the values (n,) of each seed."""
    return {key: curve(x, values) for key, values in by_key(seeds).items()}


def seeds(p: Mapping[str, Any]) -> range:
    """The seeds that these parameters name."""
    return range(p["seed"], p["seed"] + p["repeats"])


def over(p: Mapping[str, Any], told: str = "median and range") -> str:
    """The phrase that says which seeds are told of, and how.

    >>> over({"seed": 0, "repeats": 5}), over({"seed": 3, "repeats": 1})
    ('median and range of 5 seeds', 'seed 3 alone')
    """
    return f"{told} of {p['repeats']} seeds" if p["repeats"] > 1 else f"seed {p['seed']} alone"


def rounded(values: ArrayLike, digits: int = 4) -> NDArray:
    """``values`` to significant digits: what is drawn does not depend on the last bits of a sum."""
    values = np.asarray(values, dtype=float)
    return np.reshape([float(f"{v:.{digits}g}") for v in values.ravel()], values.shape)


def stage(steps: int) -> str:
    """The phrase that says how long a network was trained, such as "after 20 Adam steps"."""
    return f"after {steps} Adam step{'s' * (steps > 1)}" if steps else "untrained"


def share(x: float) -> str:
    """A captured decrease for a reader: two decimals, and fewer digits far below zero.

    >>> share(0.9), share(-2.341), share(-225.3)
    ('0.90', '−2.34', '−230')
    """
    return f"{x:.2f}".replace("-", "−") if abs(x) < 10 else number(x, 2)


@dataclass(frozen=True, eq=False)
class Study:
    """A result made of curves: ``curves[quantity, series]``; subclasses add their headline, and what pictures need.

    Attributes:
        values: the columns of the table that are computed; the others say of what.
        tolerances: by quantity, how far its values may be from the published ones; elsewhere the last digit may differ.
    """

    values: ClassVar[tuple[str, ...]] = ("median", "low", "high")
    tolerances: ClassVar[Mapping[str, Tolerance]] = {}

    parameters: dict[str, Any]
    curves: Mapping[tuple[str, str], Curve]

    def of(self, quantity: str) -> dict[str, Curve]:
        """The curves of one quantity, by series."""
        return {series: c for (name, series), c in self.curves.items() if name == quantity}

    def others(self) -> list[tuple]:
        """Table rows beside the curves: (quantity, series, x, median[, low, high])."""
        return []

    def table(self) -> pandas.DataFrame:
        """One row per point: quantity, series, x, median, low, high; then the others."""
        import pandas

        rows = [(*key, *point) for key, c in self.curves.items() for point in zip(*c, strict=True)]
        rows += [(*row, row[-1], row[-1]) if len(row) == 4 else row for row in self.others()]
        return pandas.DataFrame(rows, columns=["quantity", "series", "x", "median", "low", "high"])

    @property
    def where(self) -> str:
        """Network, data and stage, λ and seeds."""
        p = self.parameters
        widths = ", ".join(map(str, p["widths"]))
        data = re.sub(r"(\d)$", r" \1×\1", p["data"])  # digits4: digits 4×4
        network = f"{data}, {p['n']} examples, hidden widths {widths}, {stage(p['steps'])}"
        return f"{network}, λ = {number(p['damping'])}; {over(p)}"
