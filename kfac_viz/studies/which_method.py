"""Which method for which network: every measured comparison of this project in one table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import isnan
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from .. import show
from ..parameters import number
from ..show import MapView, Tolerance
from . import published, training
from .common.exercises import exercise
from .common.measured import seeds_in
from .common.options import told
from .common.result import rounded
from .pde import measured_curves
from .published import MENDED
from .training import ROUNDING, TOLD

if TYPE_CHECKING:
    import pandas

METHODS = ("SGD", "Adam", "Muon", "SOAP", "Shampoo", "L-BFGS", "K-FAC", "KL product", "two levels", "coarse alone",
           "exact step")  # fmt: skip
NAMES = {  # of these methods, in the studies that measured them
    "K-FAC, KL": "KL product", "two-level": "two levels", MENDED: "two levels", "both": "two levels",
    "coarse": "coarse alone", "kfac": "K-FAC", "lbfgs": "L-BFGS", "exact": "exact step",
}  # fmt: skip
WORTH = 1.25  # times the lowest loss: what counts as nearly as good


@dataclass(frozen=True, eq=False)
class Result:
    """The last loss of each method in each situation, over the lowest there.

    Attributes:
        losses: median last training losses by situation and method, where there is one.
        tests: median last test losses, where they were measured.
        budgets: what every method of a situation had: steps, or seconds.
    """

    values: ClassVar[tuple[str, ...]] = ("loss", "over best")
    tolerances: ClassVar[Mapping[str, Tolerance]] = {}

    parameters: dict[str, Any]
    losses: Mapping[str, Mapping[str, float]]
    tests: Mapping[str, Mapping[str, float]]
    budgets: Mapping[str, str]

    def over_best(self, situation: str, method: str, *, of: str = "losses") -> float:
        """The loss of a method over the lowest one of the situation; NaN where it was not measured."""
        found = getattr(self, of)[situation]
        return float(rounded(found[method] / min(found.values()), 3)) if method in found else np.nan

    def first(self, method: str) -> int:
        """In how many situations the method has the lowest loss, or nearly."""
        return sum(self.over_best(situation, method) <= WORTH for situation in self.losses)

    @property
    def headline(self) -> str:
        told = ", ".join(f"{name} {self.first(name)}" for name in ("Adam", "SOAP", "K-FAC", "KL product", "two levels"))
        return f"Within {number(100 * (WORTH - 1))} % of the lowest loss in so many of {len(self.losses)}: {told}"

    @property
    def where(self) -> str:
        tables = ("training.csv", "published_autoencoder.csv", "pde_runs.csv")
        return (f"last loss over the lowest of its row; each method tuned by one rule, medians of {seeds_in(*tables)} "
                f"seeds{told(*tables)}")  # fmt: skip

    def table(self) -> pandas.DataFrame:
        """Tidy: ``situation``, ``budget``, ``method``, ``loss``, ``over best``, those of the test loss with ``, test``
        behind their situation; and how often each method is first."""
        import pandas

        rows = [(situation, self.budgets[situation], method, loss, self.over_best(situation, method))
                for situation, found in self.losses.items() for method, loss in found.items()]  # fmt: skip
        rows += [(f"{situation}, test", self.budgets[situation], method, loss,
                  self.over_best(situation, method, of="tests"))
                 for situation, found in self.tests.items() for method, loss in found.items()]  # fmt: skip
        rows += [("first or nearly", "", method, self.first(method), len(self.losses)) for method in METHODS]
        return pandas.DataFrame(rows, columns=["situation", "budget", "method", "loss", "over best"])


def run() -> Result:
    """Read the tables of the other studies.

    Raises:
        ValueError: a table is missing.
    """
    losses = {situation: dict(methods) for (situation, _), methods in _measured().items()}
    return Result({}, losses, _tests(), dict(_measured().keys()))


def _situation(regime: str, problem: str) -> str:
    return f"{TOLD[problem]}, {'mini-batches' if regime == 'mini' else 'full batch'}"


def _tests() -> dict[str, dict[str, float]]:
    """Median last test losses by situation and method."""
    rows: dict[str, dict[str, float]] = {}
    for (regime, problem, method), end in training.run().ends.items():
        if not isnan(end.test):
            rows.setdefault(_situation(regime, problem), {})[NAMES.get(method, method)] = end.test
    return rows


@lru_cache(maxsize=1)
def _measured() -> dict[tuple[str, str], dict[str, float]]:
    """Median last training losses by (situation, budget) and method; those in single precision are at least
    :data:`~kfac_viz.studies.training.ROUNDING`."""
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for (regime, problem, method), end in training.run().ends.items():
        budget = "600 steps" if regime == "mini" else "100 steps"
        row = rows.setdefault((_situation(regime, problem), budget), {})
        row[NAMES.get(method, method)] = max(end.loss, ROUNDING)
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
    """Two maps: situations downwards, methods to the right; training losses, and test losses where there are some."""

    size = (10.0, 10.4)
    fixed = ()

    def build(self, result: Result) -> None:
        heights = len(result.losses), len(result.tests)
        maps = self.figure.add_gridspec(2, 1, height_ratios=heights)
        for place, of, largest in zip(maps, ("losses", "tests"), (1e3, 10), strict=True):
            points = [(f"{row}  ({result.budgets[row]})", method, result.over_best(row, method, of=of))
                      for row in getattr(result, of) for method in METHODS]  # fmt: skip
            kind = "training" if of == "losses" else "test"
            MapView(
                self.figure.add_subplot(place), points, f"Times the lowest {kind} loss of the row; 1 is the best",
                limits=(1, largest), colour=np.log10, palette="Blues_r", form=lambda x: "" if x != x else number(x, 2),
                tilt=30,
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
