"""Whether a coarse level pays in training: two levels beside K-FAC, its KL product and what others train with."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import inf, isnan, nan
from typing import Annotated, Any, Literal, NamedTuple, get_args

import numpy as np

from .. import show
from ..parameters import check, number
from ..show import METHODS, CurveView, MapView, Style, plain_numbers, ratios
from .common.exercises import exercise
from .common.measured import TUNING_SEED, Run, last_losses, loss_of, measured_runs, over_runs
from .common.options import told
from .common.result import Curve, Study, banded, rounded

Problem = Literal["classifier", "autoencoder", "deep classifier", "attention", "convolutional"]
PROBLEMS = get_args(Problem)
ROUNDING = 2.0**-23  # of a loss in single precision: losses below it are all alike
LOWER = 0.95  # a ratio of two medians above it is no difference
TOLD = {what: "transformer" if what == "attention" else what for what in PROBLEMS}  # as the reader knows them
REGIMES = {"mini": "mini-batches of 100", "full": "full batch of 1,500"}
CURVED = ("K-FAC", "two-level")  # of which the variations are
OF_KFACS_KIND = ("K-FAC", "K-FAC, KL", "two-level")


class End(NamedTuple):
    """Where the runs of a method ended: its last training loss, median, least and largest; median processor seconds;
    the median test loss, NaN where none was measured."""

    loss: float
    low: float
    high: float
    seconds: float
    test: float


@dataclass(frozen=True, eq=False)
class Result(Study):
    """Curves of the chosen problem and regime, by method: the loss over ``step`` and over ``seconds``, and the ``test``
    loss over steps; over the size of the batch the ``steps to target``, for the classifier and the autoencoder.

    Attributes:
        ends: by (regime, problem, method).
        grids: last loss of the tuning runs by (method, rate, λ), of the chosen problem in mini-batches.
        causes: median last loss by (problem, variation, method) in mini-batches; "tuned" is no variation.
    """

    ends: Mapping[tuple[str, str, str], End]
    grids: Mapping[tuple[str, float, float], float]
    causes: Mapping[tuple[str, str, str], float]

    def ratio(self, regime: str, problem: str, method: str = "two-level", *, of: str = "loss") -> float:
        """The median of a method over that of K-FAC: of its last ``loss``, last ``test`` loss or ``seconds``. A loss
        below :data:`ROUNDING` counts as that."""
        mine, base = (np.maximum(getattr(self.ends[regime, problem, name], of), ROUNDING) for name in (method, "K-FAC"))
        return float(rounded(mine / base, 3))

    def lowest(self, regime: str, problem: str, *, of: str = "loss") -> str:
        """The method with the lowest median; empty where none was measured."""
        found = {method: getattr(end, of) for (where, what, method), end in self.ends.items()
                 if (where, what) == (regime, problem) and not isnan(getattr(end, of))}  # fmt: skip
        return min(found, key=found.get) if found else ""

    def lower(self, regime: str, method: str) -> tuple[int, int]:
        """On how many problems a method ends clearly below K-FAC, and of how many."""
        found = [self.ratio(regime, what, method) for what in PROBLEMS if (regime, what, method) in self.ends]
        return sum(x < LOWER for x in found), len(found)

    def changed(self, problem: str, cause: str, method: str = "two-level") -> float:
        """The same in mini-batches, with one thing changed for both."""
        return float(rounded(self.causes[problem, cause, method] / self.causes[problem, cause, "K-FAC"], 3))

    @property
    def headline(self) -> str:
        two, product, soap = (self.lower("mini", name)[0] for name in ("two-level", "K-FAC, KL", "SOAP"))
        return (f"Two levels end below K-FAC on {two} of {len(PROBLEMS)} problems in mini-batches, the KL product on "
                f"{product}, SOAP on {soap}")  # fmt: skip

    @property
    def where(self) -> str:
        p = self.parameters
        return (f"{TOLD[p['problem']]} on digits, {REGIMES[p['regime']]}; K-FAC with the factored rule; all methods "
                f"tuned on a seed apart; median of 5 seeds{told('training.csv', 'training_batches.csv')}")  # fmt: skip

    def others(self) -> list[tuple]:
        """A row for each last loss, ratio, tuning run and variation."""
        rows: list[tuple] = []
        for (regime, problem, method), (median, low, high, seconds, test) in self.ends.items():
            rows.append((f"last loss, {regime}, {problem}", method, "", median, low, high))
            rows.append((f"seconds, {regime}, {problem}", method, "", seconds))
            rows.append((f"over K-FAC, {regime}, {problem}", method, "", self.ratio(regime, problem, method)))
            ratio = self.ratio(regime, problem, method, of="seconds")
            rows.append((f"seconds over K-FAC, {regime}, {problem}", method, "", ratio))
            if not isnan(ratio := self.ratio(regime, problem, method, of="test")):
                rows.append((f"test loss, {regime}, {problem}", method, "", test))
                rows.append((f"test loss over K-FAC, {regime}, {problem}", method, "", ratio))
        rows += [(f"lower than K-FAC, {regime}", method, "", *self.lower(regime, method), self.lower(regime, method)[1])
                 for regime, method in dict.fromkeys((where, name) for where, _, name in self.ends)]  # fmt: skip
        rows += [(f"tuning, rate {rate:g}", method, λ, loss) for (method, rate, λ), loss in self.grids.items()]
        for (problem, cause, method), loss in self.causes.items():
            rows.append((f"{cause}, {problem}", method, "", loss))
            rows.append((f"{cause}, {problem}, over K-FAC", method, "", self.changed(problem, cause, method)))
        return rows


def run(
    *,
    problem: Annotated[Problem, "what is trained."] = "deep classifier",
    regime: Annotated[Literal["mini", "full"], "mini-batches of 100 examples, or all 1,500 in every step."] = "mini",
) -> Result:
    """Read what ``make bench ARGS=training`` has measured.

    Raises:
        ValueError: the tables are missing.
    """
    parameters = check(run, locals())
    runs = measured_runs("training.csv", "cause", "regime", "problem", "method")
    tuning = measured_runs("training.csv", "regime", "problem", "method", "lr", "damping", tuning=True)
    curves: dict[tuple[str, str], Curve] = {}
    for (cause, where, what, method), by_seed in runs.items():
        if (cause, where, what) == ("method", regime, problem):
            for quantity in ("step", "seconds"):
                curves[quantity, method] = over_runs(quantity, by_seed.values())
            if not isnan(_last(by_seed.values()).test):
                curves["test", method] = over_runs("step", by_seed.values(), "test_loss")
    curves |= _steps_to_target()
    ends = {key[1:]: _last(by_seed.values()) for key, by_seed in runs.items() if key[0] == "method"}
    grids = {
        (method, float(rate), float(damping)): loss_of(by_seed[TUNING_SEED][-1])
        for (where, what, method, rate, damping), by_seed in tuning.items()
        if (where, what) == ("mini", problem) and method in OF_KFACS_KIND
    }
    varied = {what for cause, _, what, _ in runs if cause != "method"}
    causes = {
        (what, "tuned" if cause == "method" else cause, method): last_losses(by_seed.values())[0]
        for (cause, where, what, method), by_seed in runs.items()
        if where == "mini" and method in CURVED and what in varied
    }
    return Result(parameters, curves, ends, grids, causes)


def _last(runs: Collection[Run]) -> End:
    seconds, test = (np.median([float(run[-1][name] or nan) for run in runs]) for name in ("seconds", "test_loss"))
    return End(*last_losses(runs), *map(float, rounded([seconds, test])))


@lru_cache(maxsize=1)
def _steps_to_target() -> dict[tuple[str, str], Curve]:
    """Median over seeds, by problem and method; sizes at which the target was not reached are left out."""
    found: dict[tuple[str, str], dict[float, tuple[float, float, float]]] = {}
    runs = measured_runs("training_batches.csv", "problem", "method", "batch")
    for (problem, method, batch), by_seed in runs.items():
        steps = [float(row["step"]) if row["reached"] == "1" else inf for (row,) in by_seed.values()]
        if np.median(steps) < inf:
            sizes = found.setdefault((f"steps to target, {problem}", method), {})
            sizes[float(batch)] = float(np.median(steps)), min(steps), min(max(steps), 1e4)
    return {key: Curve(np.array([*sizes]), *rounded([*sizes.values()]).T) for key, sizes in found.items()}


# ---- the picture --------------------------------------------------------------------------------------

STYLES: dict[str, Style] = {
    "SGD": METHODS["gradient"]._replace(label="SGD, momentum 0.9"),
    "Adam": METHODS["adam"],
    "Muon": METHODS["muon"],
    "SOAP": METHODS["soap"],
    "Shampoo": METHODS["shampoo-optimizer"],
    "K-FAC": METHODS["factored"],
    "K-FAC, KL": METHODS["kl"]._replace(label="K-FAC, KL product"),
    "two-level": METHODS["balanced"]._replace(label="two levels, 4 eigenvectors"),
}
SHORT = {"K-FAC, KL": "KL product", "two-level": "two levels"}  # above the columns of a map


class Plot(show.Plot):
    """Training and test loss over steps, and training loss over seconds; last losses over those of K-FAC, everywhere;
    steps over the batch, tuning and variations."""

    size = (10.0, 11.2)
    fixed = ("problem", "regime")

    def build(self, result: Result) -> None:
        above, middle, below = self.figure.add_gridspec(3, 1, height_ratios=(1, 1.5, 1))
        self._build_curves(above.subgridspec(1, 3), result)
        self._build_ratios(middle.subgridspec(1, 2), result)
        self._build_causes(below.subgridspec(1, 3, width_ratios=(1.1, 1, 1.25)), result)

    def _build_curves(self, grid: Any, result: Result) -> None:
        curves = {quantity: result.of(quantity) for quantity in ("step", "test", "seconds")}
        ends = [x for c in curves["step"].values() for x in c.y]
        limits = min(ends) / 2, 2 * max(x for x in ends if x < 1e5)
        for place, (quantity, title, x) in zip(grid, (
            ("step", "Training loss over steps", "steps"), ("test", "Test loss over steps", "steps"),
            ("seconds", "Training loss over seconds", "processor seconds"),
        ), strict=True):  # fmt: skip
            if curves[quantity]:
                last = max(c.x[-1] for c in curves[quantity].values())
                if quantity == "test":
                    ends = [x for c in curves[quantity].values() for x in c.y]
                view = CurveView(
                    self.figure.add_subplot(place), STYLES, banded(curves[quantity], CURVED), title, x=x,
                    xlim=(0, last), scale=("linear", "log"),
                    ylim=(min(ends) / 1.2, min(3 * max(c.y[0] for c in curves[quantity].values()), 1e4))
                    if quantity == "test" else limits,
                )  # fmt: skip
                if quantity == "step":
                    self.legend(view.lines.values(), 4)

    def _build_ratios(self, grid: Any, result: Result) -> None:
        rows = [(regime, what) for regime in REGIMES for what in PROBLEMS if (regime, what, "K-FAC") in result.ends]
        for place, of, kind, largest in zip(grid, ("loss", "test"), ("training", "test"), (100, 10), strict=True):
            points = [(f"{TOLD[what]}, {regime}", SHORT.get(method, method),
                       result.ratio(regime, what, method, of=of) if (regime, what, method) in result.ends else nan)
                      for regime, what in rows for method in STYLES]  # fmt: skip
            view = ratios(self.figure.add_subplot(place), points, f"Last {kind} loss over that of K-FAC", largest)
            if of == "test":
                view.ax.set_yticks([])

    def _build_causes(self, grid: Any, result: Result) -> None:
        name = "autoencoder" if result.parameters["problem"] == "autoencoder" else "classifier"
        curves = result.of(f"steps to target, {name}")
        sizes = CurveView(
            self.figure.add_subplot(grid[0]), STYLES, curves, f"Steps to target, {name}", x="examples in a batch",
            xlim=(20, 2000), ylim=(5, 1200),
        )  # fmt: skip
        plain_numbers(sizes.ax.xaxis, (25, 100, 400, 1500))
        best = {key: loss for key, loss in result.grids.items() if key[0] == "two-level"}
        rates, dampings = (sorted({key[i] for key in best}) for i in (1, 2))
        tuning = [(f"{rate:g}", f"{λ:g}", min(best.get(("two-level", rate, λ), nan), 1e6))
                  for rate in rates for λ in dampings]  # fmt: skip
        known = [x for *_, x in tuning if x == x]
        MapView(
            self.figure.add_subplot(grid[1]), tuning, "Tuning two levels: last loss", x="λ", y="rate",
            limits=(min(known), max(known)), colour=np.log10, palette="Oranges",
            form=lambda x: "" if x != x else number(x, 2) if x < 1e5 else "blew up", tilt=30,
        )  # fmt: skip
        names = list(dict.fromkeys(problem for problem, *_ in result.causes))
        rows = dict.fromkeys(cause for _, cause, _ in result.causes)
        changed = [(cause, problem, result.changed(problem, cause)) for cause in rows for problem in names
                   if (problem, cause, "two-level") in result.causes]  # fmt: skip
        ratios(self.figure.add_subplot(grid[2]), changed, "Two levels, varied", 100)

    def words(self, result: Result) -> str:
        told = "; ".join(f"{TOLD[problem]}, {regime}: {number(result.ratio(regime, problem), 2)}" for regime in REGIMES
                         for problem in PROBLEMS if (regime, problem, "two-level") in result.ends)  # fmt: skip
        first = ", ".join(f"{TOLD[problem]} {SHORT.get(name, name)}" for problem in PROBLEMS
                          if (name := result.lowest("mini", problem)))  # fmt: skip
        return f"Last training loss of two levels over that of K-FAC: {told}. Lowest in mini-batches: {first}."


# ---- the exercises ------------------------------------------------------------------------------------


@exercise("12a", "Divide the steps at 25 examples by those at 1,500, and compare with 60.", 0.02)
def _saved_by_a_larger_batch() -> float:
    steps = run().of("steps to target, classifier")["K-FAC"].y
    return float(steps[0] / steps[-1])
