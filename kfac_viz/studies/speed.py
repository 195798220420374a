"""What a step costs: committed measurements, read and not repeated, beside the count of the products needed."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..parameters import Device, Seed
from ..show.plot import Plot
from ..show.style import FAINT, INK, METHODS, Style
from .curves import Curve, Study, curve, rounded
from .depth import SERIES
from .exercises import exercise

MEASURED = Path(__file__).parents[2] / "figures" / "benchmarks"


@dataclass(frozen=True, eq=False)
class SpeedResult(Study):
    """Milliseconds per step, with the least and the largest of several rounds.

    Curves ``width``, ``depth``, ``batch`` and ``per_layer``, a series for each method, each with a counterpart such
    as ``width, counted``; and for the autoencoder of the 2020 paper ``autoencoder``, ``autoencoder, counted`` and
    ``autoencoder, alone`` (the same products, each timed by itself), with one point per method.

    Attributes:
        machine: where, and with which PyTorch, it was measured.
    """

    machine: str


def run_speed(*, seed: Seed = 0, device: Device = "cpu") -> SpeedResult:
    """Read the timings that ``make bench`` has written for this kind of device.

    Args:
        seed: of nothing here; every notebook has one.
        device: whose measurements to show.

    Raises:
        ValueError: there are none.
    """
    parameters = dict(locals())
    curves = {}
    for row in _rows(f"speed_{device}.csv"):
        curves["autoencoder", row["method"]] = _curve([row], "amortised_ms", x=None)
        for kind in ("counted", "alone"):
            if row[f"{kind}_ms"]:
                curves[f"autoencoder, {kind}", row["method"]] = curve([0], [float(row[f"{kind}_ms"])])
    growth = defaultdict(list)
    for row in _rows(f"growth_{device}.csv"):
        growth[row["axis"], row["method"]].append(row)
    for (axis, method), rows in growth.items():
        curves[axis, method] = _curve(rows, "ms")
        x = curves[axis, method].x
        curves[f"{axis}, counted", method] = curve(x, [float(row["counted_ms"]) for row in rows])
    return SpeedResult(parameters, curves, f"{row['machine']}, PyTorch {row['torch']}")


def _curve(rows: list[dict[str, str]], time: str, x: str | None = "value") -> Curve:
    columns = [[float(row[key]) for row in rows] for key in (time, "low_ms", "high_ms")]
    return Curve(np.array([float(row[x]) if x else 0.0 for row in rows]), *map(rounded, columns))


def _rows(name: str) -> list[dict[str, str]]:
    import csv

    path = MEASURED / name
    if not path.exists():
        raise ValueError(f"There are no timings in figures/benchmarks/{name}; measure them with make bench.")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# ---- the picture --------------------------------------------------------------------------------------


STYLES: dict[str, Style] = {
    "Adam": METHODS["adam"],
    "K-FAC": METHODS["kfac"],
    "constants, additive": SERIES["constants, additive"],
    "leading, balanced": SERIES["leading, balanced"],
}
BARS: dict[str, Style] = {
    "SGD": METHODS["gradient"],
    "Adam": METHODS["adam"],
    "one-level K-FAC": METHODS["kfac"],
    "nicolaides additive": SERIES["constants, additive"],
    "spectral-4 balanced, 128 examples": SERIES["leading, balanced"],
    "spectral-4 balanced, 512 examples": SERIES["leading, balanced"],
    "as published, LU inverses": Style("as published", FAINT),
    "as published, eigenvectors": Style("as published", FAINT),
}
LABELS = {
    "nicolaides additive": "constants, additive",
    "spectral-4 balanced, 128 examples": "4 eigenvectors, balanced; A of 128 examples",
    "spectral-4 balanced, 512 examples": "4 eigenvectors, balanced; A of all 512 examples",
    "as published, LU inverses": "as published: LU inverses, all cross-layer products",
    "as published, eigenvectors": "as published: eigenvectors, all cross-layer products",
}
AXES = {
    "width": "width of the layers",
    "depth": "number of layers",
    "batch": "examples in a batch",
    "per_layer": "eigenvectors per layer",
}


class SpeedPlot(Plot):
    size = (12.0, 6.0)

    def build(self, result: SpeedResult) -> None:
        from matplotlib.ticker import LogLocator

        grid = self.figure.add_gridspec(2, 3, width_ratios=(1.25, 1, 1))
        self._bars(self.figure.add_subplot(grid[:, 0]), result)
        places = [grid[0, 1], grid[0, 2], grid[1, 1], grid[1, 2]]
        for (quantity, label), place in zip(AXES.items(), places, strict=True):
            ax = self.figure.add_subplot(place)
            ax.set(xscale="log", yscale="log", xlabel=label, ylabel="ms per step")
            for name, style in STYLES.items():
                measured = result.of(quantity).get(name)
                if measured is None:
                    continue
                counted = result.of(f"{quantity}, counted")[name]
                ax.plot(measured.x, measured.y, color=style.color, marker=style.marker, label=style.label)
                ax.fill_between(measured.x, measured.low, measured.high, color=style.color, alpha=0.18, linewidth=0)
                ax.plot(counted.x, counted.y, color=style.color, linestyle=":", linewidth=1.2)
                ax.set_xticks(measured.x, [f"{x:g}" for x in measured.x])
            low, high = ax.get_ylim()
            if high < 4 * low:
                low, high = ax.set_ylim(low / 2, high * 2)
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
            ax.yaxis.set_major_formatter(lambda ms, _: f"{ms:g}")
            ax.minorticks_off()
        handles, _ = self.figure.axes[1].get_legend_handles_labels()
        (dotted,) = self.figure.axes[1].plot([], [], ":", color=INK, label="counted limit")
        self.figure.legend(handles=[*handles, dotted], loc="outside lower center", ncols=5)
        self.figure.suptitle(headline(result), x=0.01, ha="left", weight="bold", fontsize=11)
        self.figure.set_label(describe(result))

    def _bars(self, ax, result: SpeedResult) -> None:
        measured, counted = result.of("autoencoder"), result.of("autoencoder, counted")
        names = [name for name in BARS if name in measured]
        for i, name in enumerate(names):
            _, (ms,), (low,), (high,) = measured[name]
            ax.barh(i, ms, color=BARS[name].color, height=0.5)
            ax.plot([low, high], [i, i], color=INK, linewidth=1.4)
            ax.annotate(f"{ms:.0f} ms", (max(ms, high), i), (5, 0), textcoords="offset points", va="center", color=INK)
            ax.annotate(LABELS.get(name, name), (0, i - 0.25), (2, 2), textcoords="offset points", va="bottom")
            if name in counted:
                ax.plot([counted[name].y[0]] * 2, [i - 0.32, i + 0.32], ":", color=INK, linewidth=1.6)
        ax.set(xlabel=f"ms per step, amortised\n{result.machine}", yticks=[], ylim=(len(names) - 0.6, -0.9))
        ax.set_title("784-1000-500-250-30-…-784, batch 512")
        ax.set_xlim(0, 1.2 * max(measured[name].high[0] for name in names))
        ax.spines["left"].set_visible(False)

    def update(self, result: SpeedResult) -> None:
        """Nothing moves: another device is another plot."""

    def fits(self, result: SpeedResult) -> bool:
        return False


def ratios(result: SpeedResult) -> dict[str, float]:
    """Time of a step of the autoencoder, as a multiple of one-level K-FAC's."""
    measured = result.of("autoencoder")
    one = float(measured["one-level K-FAC"].y[0])
    return {name: float(c.y[0]) / one for name, c in measured.items()}


def headline(result: SpeedResult) -> str:
    """What to see, in one line."""
    r = ratios(result)
    return (
        f"A coarse level costs a step {r['nicolaides additive']:.2f} (constants) to "
        f"{r['spectral-4 balanced, 512 examples']:.2f} (4 eigenvectors, all examples) times one-level K-FAC; "
        f"Adam {r['Adam']:.2f}"
    )


def describe(result: SpeedResult) -> str:
    """The alternative text."""
    times = "; ".join(f"{name} {float(c.y[0]):.0f} ms" for name, c in result.of("autoencoder").items())
    shares = [
        float(np.median(result.of(f"{axis}, counted")["K-FAC"].y / result.of(axis)["K-FAC"].y))
        for axis in ("width", "depth", "batch")
    ]
    return (
        f"{headline(result)}. Autoencoder: {times}. On the right, time against {', '.join(AXES.values())}; "
        f"dotted, the products that are needed at the machine's rate, a median share of {shares[0]:.2f}, "
        f"{shares[1]:.2f} and {shares[2]:.2f} of K-FAC's time over widths, depths and batches. {result.machine}."
    )


plot_speed = SpeedPlot.draw


# ---- the exercises ------------------------------------------------------------------------------------


@exercise("09a", "Set the three products of the gradient equal to the two of K-FAC: 3 N o i = o² i + o i².", 0.01)
def _batch_that_pays_for_kfac() -> float:
    return (1000 + 1001) / 3


@exercise("09b", "of('width, counted')['K-FAC'].y[-1] over of('width')['K-FAC'].y[-1].", 0.02)
def _share_of_the_limit() -> float:
    result = run_speed()
    return float(result.of("width, counted")["K-FAC"].y[-1] / result.of("width")["K-FAC"].y[-1])
