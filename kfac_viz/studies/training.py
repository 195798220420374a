"""Whether a coarse level pays in training: two levels beside one, Adam and SGD, every method tuned by one rule."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import inf
from typing import Annotated, Any, Literal, get_args

import numpy as np

from .. import show
from ..parameters import check, number
from ..show import METHODS, CurveView, MapView, Style, plain_numbers, ratios
from .common.exercises import exercise
from .common.measured import TUNING_SEED, Run, last_losses, loss_of, measured_runs, over_runs
from .common.options import told
from .common.result import Curve, Study, rounded

Problem = Literal["classifier", "autoencoder", "deep classifier", "attention", "convolutional"]
PROBLEMS = get_args(Problem)
LOWER = 0.95  # a ratio of two medians above it is no difference
TOLD = {what: "transformer" if what == "attention" else what for what in PROBLEMS}  # as the reader knows them
REGIMES = {"mini": "mini-batches of 100", "full": "full batch of 1,500"}
CURVED = ("K-FAC", "two-level")


@dataclass(frozen=True, eq=False)
class Result(Study):
    """Curves of the chosen problem and regime, by method: the loss over ``step`` and over ``seconds``; and over the
    size of the batch the ``steps to target``, for the classifier and the autoencoder.

    Attributes:
        ends: median, least and largest last loss, and median seconds, by (regime, problem, method).
        grids: last loss of the tuning runs by (method, rate, λ), of the chosen problem in mini-batches.
        causes: median last loss by (problem, variation, method) in mini-batches; "tuned" is no variation.
    """

    ends: Mapping[tuple[str, str, str], tuple[float, float, float, float]]
    grids: Mapping[tuple[str, float, float], float]
    causes: Mapping[tuple[str, str, str], float]

    def ratio(self, regime: str, problem: str, method: str = "two-level") -> float:
        """The median last loss of a method over that of one-level K-FAC."""
        return float(rounded(self.ends[regime, problem, method][0] / self.ends[regime, problem, "K-FAC"][0], 3))

    def changed(self, problem: str, cause: str, method: str = "two-level") -> float:
        """The same in mini-batches, with one thing changed for both."""
        return float(rounded(self.causes[problem, cause, method] / self.causes[problem, cause, "K-FAC"], 3))

    @property
    def headline(self) -> str:
        lower = {}
        for regime in REGIMES:
            found = [self.ratio(regime, what) for what in PROBLEMS if (regime, what, "two-level") in self.ends]
            lower[regime] = f"{sum(x < LOWER for x in found)} of {len(found)}"
        return (f"Two levels end {number(100 * (1 - LOWER))} % or more below K-FAC on {lower['mini']} problems in "
                f"mini-batches, {lower['full']} with full batches")  # fmt: skip

    @property
    def where(self) -> str:
        p = self.parameters
        return (f"{TOLD[p['problem']]} on digits, {REGIMES[p['regime']]}; rate and λ of every method tuned on a seed "
                f"apart; median and range of 5 seeds{told('training.csv', 'training_batches.csv')}")  # fmt: skip

    def others(self) -> list[tuple]:
        """A row for each last loss, ratio, tuning run and variation."""
        rows: list[tuple] = []
        for (regime, problem, method), (median, low, high, seconds) in self.ends.items():
            rows.append((f"last loss, {regime}, {problem}", method, "", median, low, high))
            rows.append((f"seconds, {regime}, {problem}", method, "", seconds))
            rows.append((f"over K-FAC, {regime}, {problem}", method, "", self.ratio(regime, problem, method)))
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
    curves |= _steps_to_target()
    ends = {key[1:]: _last(by_seed.values()) for key, by_seed in runs.items() if key[0] == "method"}
    grids = {
        (method, float(rate), float(damping)): loss_of(by_seed[TUNING_SEED][-1])
        for (where, what, method, rate, damping), by_seed in tuning.items()
        if (where, what) == ("mini", problem) and method in CURVED
    }
    varied = {what for cause, _, what, _ in runs if cause != "method"}
    causes = {
        (what, "tuned" if cause == "method" else cause, method): last_losses(by_seed.values())[0]
        for (cause, where, what, method), by_seed in runs.items()
        if where == "mini" and method in CURVED and what in varied
    }
    return Result(parameters, curves, ends, grids, causes)


def _last(runs: Collection[Run]) -> tuple[float, float, float, float]:
    """Median, least and largest last loss, and median seconds."""
    seconds = np.median([float(run[-1]["seconds"]) for run in runs])
    return *last_losses(runs), float(rounded(seconds))


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
    "K-FAC": METHODS["kfac"]._replace(label="one-level K-FAC"),
    "two-level": METHODS["balanced"]._replace(label="two levels, 4 eigenvectors"),
}


class Plot(show.Plot):
    """Loss over steps and seconds, and steps over the batch above; all problems, tuning and variations below."""

    size = (10.0, 7.2)
    fixed = ("problem", "regime")

    def build(self, result: Result) -> None:
        grid = self.figure.add_gridspec(2, 1, height_ratios=(1, 1.15))
        above, below = grid[0].subgridspec(1, 3), grid[1].subgridspec(1, 3, width_ratios=(1.25, 1, 1.35))
        ends = [x for quantity in ("step", "seconds") for c in result.of(quantity).values() for x in c.y]
        limits = min(ends) / 2, 2 * max(x for x in ends if x < 1e5)
        for i, (quantity, title, x) in enumerate((("step", "Loss over steps", "steps"),
                                                  ("seconds", "Loss over seconds", "processor seconds"))):  # fmt: skip
            curves = result.of(quantity)
            last = max(c.x[-1] for c in curves.values())
            view = CurveView(
                self.figure.add_subplot(above[i]), STYLES, curves, title, x=x, xlim=(0, last), ylim=limits,
                scale=("linear", "log"),
            )  # fmt: skip
        name = "autoencoder" if result.parameters["problem"] == "autoencoder" else "classifier"
        curves = result.of(f"steps to target, {name}")
        sizes = CurveView(
            self.figure.add_subplot(above[2]), STYLES, curves, f"Steps to target, {name}", x="examples in a batch",
            xlim=(20, 2000), ylim=(5, 1200),
        )  # fmt: skip
        plain_numbers(sizes.ax.xaxis, (25, 100, 400, 1500))
        self.legend(view.lines.values(), 4)
        self._build_maps(below, result)

    def _build_maps(self, grid: Any, result: Result) -> None:
        points = [
            (f"{TOLD[what]}, {regime}", method.replace("two-level", "two levels"), result.ratio(regime, what, method))
            for regime in REGIMES for what in PROBLEMS for method in STYLES if (regime, what, method) in result.ends
        ]  # fmt: skip
        ratios(self.figure.add_subplot(grid[0]), points, "Last loss over that of K-FAC", 100)
        best = {key: loss for key, loss in result.grids.items() if key[0] == "two-level"}
        tuning = [(f"{rate:g}", f"{λ:g}", min(loss, 1e6)) for (_, rate, λ), loss in best.items()]
        low, high = min(x for *_, x in tuning), max(x for *_, x in tuning)
        MapView(
            self.figure.add_subplot(grid[1]), tuning, "Tuning two levels: last loss", x="λ", y="rate",
            limits=(low, high), colour=np.log10, palette="Oranges",
            form=lambda x: number(x, 2) if x < 1e5 else "blew up",
        )  # fmt: skip
        names = list(dict.fromkeys(problem for problem, *_ in result.causes))
        rows = dict.fromkeys(cause for _, cause, _ in result.causes)
        changed = [(cause, problem, result.changed(problem, cause)) for cause in rows for problem in names
                   if (problem, cause, "two-level") in result.causes]  # fmt: skip
        ratios(self.figure.add_subplot(grid[2]), changed, "Two levels, varied", 100)

    def words(self, result: Result) -> str:
        told = "; ".join(f"{TOLD[problem]}, {regime}: {number(result.ratio(regime, problem), 2)}" for regime in REGIMES
                         for problem in PROBLEMS if (regime, problem, "two-level") in result.ends)  # fmt: skip
        return f"Last loss of two levels over that of K-FAC: {told}."


# ---- the exercises ------------------------------------------------------------------------------------

@exercise("12a", "Divide the steps at 25 examples by those at 1,500, and compare with 60.", 0.02)
def _saved_by_a_larger_batch() -> float:
    steps = run().of("steps to target, classifier")["K-FAC"].y
    return float(steps[0] / steps[-1])
