"""Does solving better train better? The ladder of directions, on networks small enough for every rung."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import nan
from typing import Annotated, ClassVar, Literal

import numpy as np

from ... import show
from ...parameters import check, number
from ...show import FAINT, METHODS, Style, ratios
from ..common.exercises import exercise
from ..common.measured import Run, last_losses, measured_rows, measured_runs
from ..common.options import told
from ..common.result import Study, rounded
from .ladder import REGIMES, RUNGS, train
from .networks import CHOSEN_ON, JUDGED_ON

__all__ = ["CHOSEN_ON", "JUDGED_ON", "RUNGS", "Plot", "Result", "run", "train"]

NETWORKS = (*CHOSEN_ON, *JUDGED_ON)
DATA = "ladder_runs.csv", "ladder_shares.csv", "ladder_before.csv"
SEEDS = 5  # of a run that is complete
BASE = "kfac"  # the rung that all others are divided by
TRUSTED = 0.5  # true over predicted change from which the quadratic model counts as right; chosen on the five networks
CLEAR = 0.5  # rank correlation from which the order of the rungs is called the same, or the reverse
STYLED = {"blocks": "block-diagonal", "exact step": "exact"}  # rungs that have another name among METHODS


@dataclass(frozen=True, eq=False)
class Result(Study):
    """Medians over five seeds of the ladder's runs, and of what one step of each rung captures.

    Attributes:
        losses: median last training loss above the least possible one, by (network, rung).
        tests: median last test loss, by (network, rung).
        seconds: median processor seconds of a run, by (network, rung).
        dampings: λ to start with, by (network, rung).
        shares: median captured decrease at the best length, by (network, rung), at the chosen λ and state.
        before: median of each number that is known before training, by (name, network).
        recipes: the rank correlation of :meth:`agreement` by (regime, network), of every regime that was measured.
    """

    values: ClassVar[tuple[str, ...]] = ("median",)

    losses: Mapping[tuple[str, str], float]
    tests: Mapping[tuple[str, str], float]
    seconds: Mapping[tuple[str, str], float]
    dampings: Mapping[tuple[str, str], float]
    shares: Mapping[tuple[str, str], float]
    before: Mapping[tuple[str, str], float]
    recipes: Mapping[tuple[str, str], float]

    def ratio(self, network: str, rung: str, *, of: str = "losses") -> float:
        """The median of a rung over that of K-FAC; NaN where it was not run."""
        values = getattr(self, of)
        return float(rounded(values.get((network, rung), nan) / values[network, BASE], 3))

    def agreement(self, network: str, *, of: str = "losses") -> float:
        """Spearman's rank correlation over the rungs between what a step captures and how low the loss ends: 1 where
        every better solve trains better, −1 where each trains worse."""
        return _agreement(network, self.shares, getattr(self, of))

    def separates(self, name: str, networks: Collection[str] = tuple(CHOSEN_ON)) -> bool:
        """Whether a border on this number, known before training, has all of these networks on which the better solve
        trains better, by :data:`CLEAR`, on one side, and all others on the other."""
        sides = [[self.before[name, network] for network in networks if (self.agreement(network) >= CLEAR) is wanted]
                 for wanted in (True, False)]  # fmt: skip
        return any(max(a) < min(b) for a, b in (sides, sides[::-1]) if a and b)

    @property
    def networks(self) -> list[str]:
        """Those that were measured, in their order."""
        return [network for network in NETWORKS if (network, BASE) in self.losses]

    @property
    def headline(self) -> str:
        found = [self.agreement(network) for network in self.networks]
        return (f"Whoever solves better trains better on {sum(x >= CLEAR for x in found)} of {len(found)} networks, "
                f"and worse on {sum(x <= -CLEAR for x in found)}")  # fmt: skip

    @property
    def where(self) -> str:
        p = self.parameters
        return (f"digits and text, {p['regime']}: 40 steps, λ tuned for each method on a seed apart; captured "
                f"{p['state']} at λ = {number(p['damping'])}; medians of 5 seeds{told(*DATA)}")  # fmt: skip

    def others(self) -> list[tuple]:
        """A row for every number that the maps and points show."""
        rows: list[tuple] = []
        for name in ("losses", "tests"):
            values = getattr(self, name)
            kind = "training loss" if name == "losses" else "test loss"
            rows += [(f"{kind}, {network}", rung, "", x) for (network, rung), x in values.items()]
            rows += [(f"{kind} over K-FAC, {network}", rung, "", self.ratio(network, rung, of=name))
                     for network, rung in values]  # fmt: skip
            rows += [(f"agreement, {kind}", network, "", self.agreement(network, of=name)) for network in self.networks]
        for name in ("seconds", "dampings", "shares"):
            rows += [(f"{name}, {network}", rung, "", x) for (network, rung), x in getattr(self, name).items()]
        rows += [(f"agreement, {regime}", network, "", x) for (regime, network), x in self.recipes.items()]
        return rows + [(name, network, "", x) for (name, network), x in self.before.items()]


def run(
    *,
    regime: Annotated[Literal["core", "mini-batches", "sampled labels", "KL bound"],
                      "how the networks are trained."] = "core",
    state: Annotated[Literal["untrained", "after 20 steps"], "of the network on which a step is judged."]
    = "after 20 steps",
    damping: Annotated[Literal[0.001, 0.01, 0.1], "λ of the system that the step solves."] = 0.01,
) -> Result:  # fmt: skip
    """Read what ``make bench ARGS=ladder`` has measured.

    Raises:
        ValueError: the tables are missing.
    """
    parameters = check(run, locals())
    shares = {
        (network, rung): _median(list(by_seed.values()), "best")
        for (stage, λ, network, rung), by_seed in measured_runs(DATA[1], "state", "damping", "network", "rung").items()
        if (stage, float(λ)) == (state, damping)
    }
    runs = _runs(regime)
    losses = _losses(runs)
    tests = {key: _median(found, "test_loss") for key, found in runs.items()}
    seconds = {key: _median(found, "seconds") for key, found in runs.items()}
    dampings = {key: float(found[0][0]["damping"]) for key, found in runs.items()}
    recipes = {}
    for recipe in REGIMES:
        ends = losses if recipe == regime else _losses(_runs(recipe))
        networks = dict.fromkeys(network for network, _ in ends)
        recipes |= {(recipe, network): _agreement(network, shares, ends) for network in networks}
    before = {
        key: _median(list(by_seed.values()), "value")
        for key, by_seed in measured_runs(DATA[2], "name", "network").items()
    }
    shares = {key: x for key, x in shares.items() if key in losses}
    return Result(parameters, {}, losses, tests, seconds, dampings, shares, before, recipes)


def _runs(regime: str) -> dict[tuple[str, str], list[Run]]:
    """The five runs of each (network, rung) in a regime, where all of them were made."""
    found = measured_runs(DATA[0], "regime", "network", "rung")
    return {(network, rung): list(by_seed.values()) for (where, network, rung), by_seed in found.items()
            if where == regime and len(by_seed) == SEEDS}  # fmt: skip


def _losses(runs: Mapping[tuple[str, str], list[Run]]) -> dict[tuple[str, str], float]:
    """The median last training loss above the least possible one."""
    least = {row["network"]: float(row["value"]) for row in measured_rows(DATA[2]) if row["name"] == "least loss"}
    return {(network, rung): float(rounded(last_losses(found)[0] - least[network]))
            for (network, rung), found in runs.items()}  # fmt: skip


def _agreement(network: str, shares: Mapping[tuple[str, str], float], ends: Mapping[tuple[str, str], float]) -> float:
    from scipy.stats import spearmanr

    rungs = [rung for rung in RUNGS if (network, rung) in shares and (network, rung) in ends]
    captured, last = ([table[network, rung] for rung in rungs] for table in (shares, ends))
    return float(rounded(-spearmanr(captured, last).statistic, 2))


def _median(runs: list[Run], column: str) -> float:
    """Over the last rows of the runs."""
    return float(rounded(np.median([float(run[-1][column] or "nan") for run in runs])))


# ---- the picture --------------------------------------------------------------------------------------

COLOURS: dict[str, Style] = {
    "classifier": Style("classifier", "#332288", "o"), "autoencoder": Style("autoencoder", "#DDCC77", "s"),
    "deep classifier": Style("deep classifier", "#88CCEE", "v"), "attention": Style("transformer", "#CC6677", "D"),
    "convolutional": Style("convolutions", "#117733", "P"), "next letter": Style("next letter", "#AA4499", "X"),
    "residual": Style("residual, 20 layers", "#999933", "^"),
}  # fmt: skip
LARGEST = 1000.0  # of the ratios that the maps tell apart


def label(rung: str) -> str:
    """A rung as all figures call it, and the columns per layer that it has."""
    name, _, columns = rung.partition(", ")
    return METHODS[STYLED.get(name, name)].label + (f", {columns} columns" if columns else "")


class Plot(show.Plot):
    """Training and test loss over those of K-FAC above; below what a step captures beside what training ends at."""

    size = (10.0, 9.0)
    fixed = ("regime",)

    def build(self, result: Result) -> None:
        above, below = self.figure.add_gridspec(2, 1, height_ratios=(1.5, 1))
        maps, points = above.subgridspec(1, 2), below.subgridspec(1, 3, width_ratios=(1.5, 1, 0.9))
        rungs = [rung for rung in RUNGS if any((network, rung) in result.losses for network in result.networks)]
        for place, of, kind in zip(maps, ("losses", "tests"), ("Training", "Test"), strict=True):
            found = [
                (label(rung), COLOURS[network].label, result.ratio(network, rung, of=of))
                for rung in rungs for network in result.networks
            ]  # fmt: skip
            largest = LARGEST if of == "losses" else 10
            view = ratios(self.figure.add_subplot(place), found, f"{kind} loss over that of K-FAC", largest)
            if of == "tests":
                view.ax.set_yticks([])
        ax = self.figure.add_subplot(points[0])
        ax.axhline(1, color=FAINT, linewidth=0.8)
        ax.axvline(0, color=FAINT, linewidth=0.8)
        self.dots = {
            network: self.add(ax.plot([], [], linestyle="", marker=style.marker, color=style.color, markersize=5,
                                      markeredgecolor="white", label=style.label)[0])
            for network, style in COLOURS.items() if network in result.networks
        }  # fmt: skip
        ax.set(yscale="log", xlim=(-0.4, 1), ylim=(1 / LARGEST, LARGEST), title="Does a better step train better?",
               xlabel="share captured at the best length, minus that of K-FAC",
               ylabel="training loss over that of K-FAC")  # fmt: skip
        known = self.figure.add_subplot(points[1])
        known.axhline(0, color=FAINT, linewidth=0.8)
        known.axvline(TRUSTED, color=FAINT, linewidth=0.8, linestyle=":")
        self.known = {}
        for network in result.networks:
            style, open_ = COLOURS[network], network in JUDGED_ON
            (dot,) = known.plot([], [], linestyle="", marker=style.marker, color=style.color, markersize=9,
                                markerfacecolor="white" if open_ else style.color, markeredgewidth=1.6)  # fmt: skip
            self.known[network] = self.add(dot)
        known.set(xlim=(-2.6, 1.4), ylim=(-1.1, 1.1), title="Can it be known before?",
                  xlabel="true over predicted change",
                  ylabel="rank correlation")  # fmt: skip
        ax = self.figure.add_subplot(points[2], sharey=known)
        ax.axhline(0, color=FAINT, linewidth=0.8)
        varied = [network for network in COLOURS if sum((recipe, network) in result.recipes for recipe in REGIMES) > 1]
        self.recipes = {
            network: self.add(ax.plot([], [], marker=COLOURS[network].marker, color=COLOURS[network].color,
                                      linewidth=1.2)[0])
            for network in varied
        }  # fmt: skip
        ax.set(title="With another recipe", xlim=(-0.4, len(REGIMES) - 0.6))
        ax.set_xticks(range(len(REGIMES)), [recipe.replace(" ", "\n").replace("-", "-\n") for recipe in REGIMES])
        ax.tick_params(labelleft=False)
        self.legend(self.dots.values(), 7)

    def move(self, result: Result) -> None:
        for network, dots in self.dots.items():
            rungs = [rung for rung in RUNGS if (network, rung) in result.shares and rung != BASE]
            gained = [result.shares[network, rung] - result.shares[network, BASE] for rung in rungs]
            dots.set_data(gained, np.clip([result.ratio(network, rung) for rung in rungs], 1 / LARGEST, LARGEST))
        for network, line in self.recipes.items():
            line.set_data(range(len(REGIMES)), [result.recipes.get((recipe, network), nan) for recipe in REGIMES])
        for network, dot in self.known.items():
            dot.set_data([result.before["reduction ratio", network]], [result.agreement(network)])

    def words(self, result: Result) -> str:
        told = "; ".join(f"{COLOURS[name].label} {number(result.agreement(name), 2)}" for name in result.networks)
        return f"Rank correlation between what a step captures and how low training ends: {told}."


# ---- the exercises ------------------------------------------------------------------------------------


@exercise("11a", "Call run(), then ratio() with the names of the network and of the rung.", 0.01)
def _sixteen_columns_on_the_residual_network() -> float:
    return run().ratio("residual", "kfac, 16")
