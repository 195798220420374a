"""Which method for which network: every measured comparison of this project in one table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from .. import show
from ..parameters import number
from ..show import MapView, Tolerance
from . import published, training
from .common.exercises import exercise
from .common.measured import seeds_in
from .common.result import rounded
from .pde import measured_curves
from .published import MENDED
from .training import TOLD

if TYPE_CHECKING:
    import pandas

METHODS = ("SGD", "Adam", "L-BFGS", "K-FAC", "two levels", "coarse alone", "exact step")
NAMES = {  # of these methods, in the studies that measured them
    "two-level": "two levels", MENDED: "two levels", "both": "two levels", "coarse": "coarse alone",
    "kfac": "K-FAC", "lbfgs": "L-BFGS", "exact": "exact step",
}  # fmt: skip
WORTH = 1.25  # times the lowest loss: what counts as nearly as good


@dataclass(frozen=True, eq=False)
class Result:
    """The last loss of each method in each situation, over the lowest there.

    Attributes:
        losses: median last losses by situation and method, where there is one.
        budgets: what every method of a situation had: steps, or seconds.
    """

    values: ClassVar[tuple[str, ...]] = ("loss", "over best")
    tolerances: ClassVar[Mapping[str, Tolerance]] = {}

    parameters: dict[str, Any]
    losses: Mapping[str, Mapping[str, float]]
    budgets: Mapping[str, str]

    def over_best(self, situation: str, method: str) -> float:
        found = self.losses[situation]
        return float(rounded(found[method] / min(found.values()), 3)) if method in found else np.nan

    def first(self, method: str) -> int:
        """In how many situations the method has the lowest loss, or nearly."""
        return sum(self.over_best(situation, method) <= WORTH for situation in self.losses)

    @property
    def headline(self) -> str:
        told = ", ".join(f"{name} {self.first(name)}" for name in ("Adam", "K-FAC", "two levels"))
        return f"Lowest loss, or within {number(100 * (WORTH - 1))} % of it, in so many of {len(self.losses)}: {told}"

    @property
    def where(self) -> str:
        seeds = seeds_in("training.csv", "published_autoencoder.csv", "pde_runs.csv")
        return f"last loss over the lowest of its row; each method tuned by one rule, medians of {seeds} seeds"

    def table(self) -> pandas.DataFrame:
        """Tidy: ``situation``, ``budget``, ``method``, ``loss``, ``over best``; and how often each method is first."""
        import pandas

        rows = [(situation, self.budgets[situation], method, loss, self.over_best(situation, method))
                for situation, found in self.losses.items() for method, loss in found.items()]  # fmt: skip
        rows += [("first or nearly", "", method, self.first(method), len(self.losses)) for method in METHODS]
        return pandas.DataFrame(rows, columns=["situation", "budget", "method", "loss", "over best"])


def run() -> Result:
    """Read the tables of the other studies.

    Raises:
        ValueError: a table is missing.
    """
    losses = {situation: dict(methods) for (situation, _), methods in _measured().items()}
    return Result({}, losses, dict(_measured().keys()))


@lru_cache(maxsize=1)
def _measured() -> dict[tuple[str, str], dict[str, float]]:
    """Median last losses by (situation, budget) and method."""
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for (regime, problem, method), (median, *_) in training.run().ends.items():
        batch, budget = ("mini-batches", "600 steps") if regime == "mini" else ("full batch", "100 steps")
        rows.setdefault((f"{TOLD[problem]}, {batch}", budget), {})[NAMES.get(method, method)] = median
    for (regime, method), (median, *_) in published.run().large.items():
        name = NAMES.get(method, method)
        if name in METHODS:
            rows.setdefault((f"deep autoencoder, {regime}", "60 seconds"), {})[name] = median
    curves = measured_curves()
    equations = dict.fromkeys(name.removeprefix("columns, ") for name, _ in curves if name.startswith("columns, "))
    for equation in equations:
        mine = {NAMES[key]: float(c.y.min()) for (name, key), c in curves.items() if name == f"columns, {equation}"}
        rows[f"{equation}, to the end", "4 seconds"] = mine
    return rows


# ---- the picture --------------------------------------------------------------------------------------


class Plot(show.Plot):
    """One map: situations downwards, methods to the right."""

    size = (10.0, 6.6)
    fixed = ()

    def build(self, result: Result) -> None:
        points = [(f"{situation}  ({result.budgets[situation]})", method, result.over_best(situation, method))
                  for situation in result.losses for method in METHODS]  # fmt: skip
        MapView(
            self.figure.add_subplot(), points, "Times the lowest loss of the row; 1 is the best", limits=(1, 1e3),
            colour=np.log10, palette="Blues_r", form=lambda x: "" if x != x else number(x, 2),
        )  # fmt: skip

    def words(self, result: Result) -> str:
        best = (f"{situation}: {min(found, key=found.get)}" for situation, found in result.losses.items())
        return f"First: {'; '.join(best)}."


# ---- the exercises ------------------------------------------------------------------------------------

@exercise("16a", "Count the rows in which the cells of both methods are at most 1.25.")
def _where_either_will_do() -> int:
    result = run()
    both = ("K-FAC", "two levels")
    return sum(all(result.over_best(row, method) <= WORTH for method in both) for row in result.losses)
