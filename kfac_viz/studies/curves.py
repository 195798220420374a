"""The numbers of a study: curves with their range over seeds, in one tidy table, and a line that says where."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..parameters import number
from ..show import Curve

if TYPE_CHECKING:
    import pandas
    from numpy.typing import ArrayLike, NDArray


def curve(x: ArrayLike, seeds: ArrayLike | Sequence[Sequence[float]]) -> Curve:
    """``seeds`` (n,), or (repeats, n), as a :class:`Curve` of 4 significant digits.

    >>> curve([1, 2], [[1.0, 5.0], [3.0, 6.0], [2.0, 9.0]]).y
    array([2., 6.])
    """
    values = np.atleast_2d(np.asarray(seeds, dtype=float))
    summary = np.median(values, 0), values.min(0), values.max(0)
    return Curve(rounded(x), *map(rounded, summary))


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


def rounded(values: ArrayLike, digits: int = 4) -> NDArray:
    """``values`` to significant digits: what is drawn does not depend on the last bits of a sum."""
    values = np.asarray(values, dtype=float)
    return np.reshape([float(f"{v:.{digits}g}") for v in values.ravel()], values.shape)


# ---- what make bench has measured -----------------------------------------------------------------------

Row = dict[str, str]
Run = list[Row]  # what was written while it went on
TUNING_SEED = "99"  # of the runs that choose rates and λ, and are not shown
MEASURED = Path(__file__).parents[2] / "figures" / "benchmarks"
WITHOUT_EFFECT = "has no effect; all of it is measured, and every notebook has this parameter."


def rows_of(table: Path) -> list[Row]:
    """The rows of a CSV file."""
    import csv

    with table.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@cache
def measured_rows(name: str) -> list[Row]:
    """The rows of a table that ``make bench`` has written; a ValueError says which is missing."""
    if not (MEASURED / name).exists():
        raise ValueError(f"There are no timings in figures/benchmarks/{name}; measure them with make bench.")
    return rows_of(MEASURED / name)


def grouped(rows: Iterable[Row], *names: str) -> dict[tuple[str, ...], list[Row]]:
    """The rows by what they say in these columns, in the order in which they come."""
    found: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        found[tuple(row[name] for name in names)].append(row)
    return dict(found)


@cache
def measured_runs(name: str, *names: str) -> dict[tuple[str, ...], dict[str, Run]]:
    """The runs of a measured table by these columns, and then by their seed; none of the tuning."""
    shown = [row for row in measured_rows(name) if row["seed"] != TUNING_SEED]
    return {
        key: {seed: run for (seed,), run in grouped(rows, "seed").items()}
        for key, rows in grouped(shown, *names).items()
    }


def loss_of(row: Row) -> float:
    """The loss of a measured row; inf where the run had blown up."""
    return inf if row["loss"] == "nan" else float(row["loss"])


def last_losses(runs: Iterable[Run]) -> tuple[float, float, float]:
    """Median, least and largest of the last losses."""
    losses = [loss_of(run[-1]) for run in runs]
    return tuple(map(float, rounded([np.median(losses), min(losses), max(losses)])))


def over_runs(quantity: str, runs: Collection[Run]) -> Curve:
    """The loss over a column of measured rows, such as ``step``, or ``seconds`` as they were in the median; a run that
    blew up is at the top."""
    whole = max(runs, key=len)
    losses = [[loss_of(row) for row in run] + [inf] * (len(whole) - len(run)) for run in runs]
    x = [np.median([float(run[i][quantity]) for run in runs if i < len(run)]) for i in range(len(whole))]
    return curve(x, np.minimum(losses, 1e6))


# ---- what a study says ----------------------------------------------------------------------------------


def moment(steps: int) -> str:
    """When a network is looked at, in words."""
    return f"after {steps} Adam steps" if steps else "untrained"


def share(x: float) -> str:
    """A captured decrease for a reader: two decimals, and fewer digits far below zero.

    >>> share(0.9), share(-2.341), share(-225.3)
    ('0.90', '−2.34', '−230')
    """
    return f"{x:.2f}".replace("-", "−") if abs(x) < 10 else number(x, 2)


@dataclass(frozen=True, eq=False)
class Study:
    """A result made of curves: ``curves[quantity, series]``; subclasses add their headline, and what pictures need."""

    parameters: dict[str, Any]
    curves: Mapping[tuple[str, str], Curve]

    def of(self, quantity: str) -> dict[str, Curve]:
        """The curves of one quantity, by series."""
        return {series: c for (name, series), c in self.curves.items() if name == quantity}

    def others(self) -> list[tuple]:
        """Rows of the table that are no points of curves; one that ends with its median is of a single number."""
        return []

    def table(self) -> pandas.DataFrame:
        """One row per point: quantity, series, x, median, low, high; then the others."""
        import pandas

        rows = [(*key, *point) for key, c in self.curves.items() for point in zip(*c, strict=True)]
        rows += [(*row, row[-1], row[-1]) if len(row) == 4 else row for row in self.others()]
        return pandas.DataFrame(rows, columns=["quantity", "series", "x", "median", "low", "high"])

    @property
    def where(self) -> str:
        """Network, data and moment, λ and seeds."""
        p = self.parameters
        widths = ", ".join(map(str, p["widths"]))
        data = re.sub(r"(\d)$", r" \1×\1", p["data"])  # digits4: digits 4×4
        network = f"{data}, {p['n']} examples, hidden widths {widths}, {moment(p['steps'])}"
        return f"{network}, λ = {number(p['damping'])}; median and range of {p['repeats']} seeds"
