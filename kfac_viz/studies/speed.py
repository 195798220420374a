"""What a step costs: committed measurements, read and not repeated, beside the count of the products needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .. import show
from ..parameters import Device, read
from ..show import FAINT, INK, METHODS, CurveView, Style, plain_numbers, styled
from .common.exercises import exercise
from .common.measured import Row, grouped, measured_rows
from .common.options import told
from .common.result import Curve, Study, curve, rounded

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FULL_BATCH = "spectral-4 balanced, 512 examples"


@dataclass(frozen=True, eq=False)
class Result(Study):
    """Milliseconds per step, with the least and the largest of several rounds.

    Curves ``width``, ``depth``, ``batch`` and ``per_layer``, a series for each method, each with a counterpart such
    as ``width, counted``; and for the autoencoder of the 2020 paper ``autoencoder``, ``autoencoder, counted`` and
    ``autoencoder, alone`` (the same products, each timed by itself), with one point per method.

    Attributes:
        machine: where, and with which PyTorch, it was measured.
    """

    machine: str

    @property
    def headline(self) -> str:
        ms = {name: c.y[0] for name, c in self.of("autoencoder").items()}
        one, least, most = (ms[name] for name in ("one-level K-FAC", "nicolaides additive", FULL_BATCH))
        return (
            f"Autoencoder: a coarse level costs {least / one:.2f} (constants) to {most / one:.2f} (4 eigenvectors) "
            "times a step of K-FAC"
        )

    @property
    def where(self) -> str:
        tables = (f"{name}_{self.parameters['device']}.csv" for name in ("speed", "growth"))
        return (f"{self.machine}; autoencoder of the 2020 paper, and perceptrons; range over several rounds"
                f"{told(*tables)}")  # fmt: skip


def run(*, device: Device = "cpu") -> Result:
    """Read the timings that ``make bench`` has written for this kind of device.

    Args:
        device: whose measurements to show.

    Raises:
        ValueError: there are none.
    """
    parameters = {"device": read(run)["device"].check(device)}  # measured there, and read anywhere
    curves = {}
    for row in measured_rows(f"speed_{device}.csv"):
        curves["autoencoder", row["method"]] = _curve([0.0], [row], "amortised_ms")
        for kind in ("counted", "alone"):
            if row[f"{kind}_ms"]:
                curves[f"autoencoder, {kind}", row["method"]] = curve([0], [float(row[f"{kind}_ms"])])
    growth = measured_rows(f"growth_{device}.csv")
    for (axis, method), rows in grouped(growth, "axis", "method").items():
        x = [float(row["value"]) for row in rows]
        curves[axis, method] = _curve(x, rows, "ms")
        curves[f"{axis}, counted", method] = curve(x, [float(row["counted_ms"]) for row in rows])
    return Result(parameters, curves, f"{growth[-1]['machine']}, PyTorch {growth[-1]['torch']}")


def _curve(x: list[float], rows: list[Row], time: str) -> Curve:
    """What is in the column ``time``, with the least and the largest of the rounds."""
    return Curve(np.array(x), *(rounded([float(row[key]) for row in rows]) for key in (time, "low_ms", "high_ms")))


# ---- many processes -----------------------------------------------------------------------------------

RANKS, WIDTHS = (8, 64, 1024), (1024, 4096, 16384)
SENT = ("the gradient", "factors", "vectors of A", "headers")
REPEATED = ("a gradient of 64 examples", "inverting all factors", "M v")
OTHERWISE = ("balanced", "a-def1", "a-def2", "additive", "local: pieces of v", "local: columns of Z")


def counted_across_ranks(width: int, ranks: int) -> dict[str, float]:
    """Counted, not measured: what one of R ranks receives for a step of 8 square layers of this width, in MB of
    float32, and its multiplications, in 10⁹, with the optimizer's default schedule, 4 columns per layer and one vector
    for each of 512 examples in A.

    A sum over ranks moves 2 (R − 1)/R times its size through each (a ring). ``SENT`` is what the optimizer sends,
    beside the gradient that every data-parallel method sums. ``OTHERWISE`` is what would travel if A stayed where its
    vectors are, so that A Z c is a sum over ranks, and if each layer had one owner (DP-KFAC, Zhang et al. 2022).
    """
    L, w, n, columns, observe, refresh = 8, 4e-6, 512, 4, 5, 10
    o, i = width, width + 1
    P, k, ring = L * o * i, L * columns, 2 * (ranks - 1) / ranks
    sent = (
        ring * w * P,
        ring * w * L * (i * (i + 1) + o * (o + 1)) / 2 / observe,
        w * ranks * -(-n // ranks) * L * (i + o) / observe,
        1e-6 * (2 * 64 + 32 * L) * ranks / observe,
    )
    repeated = (3 * 64 * P / 1e9, L * (o**3 + i**3) / 2 / refresh / 1e9, L * (o * o * i + o * i * i) / 1e9)
    owners = (ranks - 1) / ranks
    summed = (ring * w * (P + k), ring * w * P, ring * w * k, 0.0)
    local = (owners * w * P, owners * w * k * (o + i) / refresh)
    names = (*SENT, *REPEATED, *OTHERWISE)
    return dict(zip(names, (*sent, *repeated, *summed, *local), strict=True))


def across_ranks() -> str:
    """The tables ``ranks_counted.csv`` and ``ranks_cpu.csv`` as text: on paper for many ranks, measured for few."""
    counted = grouped(measured_rows("ranks_counted.csv"), "width", "ranks")
    lines = ["COUNTED, not measured, for one rank and one step of 8 layers"]
    for title, names in (
        ("MB that travel", SENT),
        ("10⁹ multiplications that every rank makes", REPEATED),
        ("MB that would travel otherwise", OTHERWISE),
    ):
        columns = [max(12, len(name)) for name in ("width", "ranks", *names)]
        lines += ["", title, _line(columns, "width", "ranks", *names)]
        for key, rows in counted.items():
            values = {row["quantity"]: float(row["value"]) for row in rows}
            lines.append(_line(columns, *key, *(f"{values[name]:.4g}" for name in names)))
    few = measured_rows("ranks_cpu.csv")
    by_ranks = grouped(few, "ranks")
    where = "{depth} layers of width {width}, {batch} examples a rank; {machine}, PyTorch {torch}".format(**few[0])
    columns = [20, *[12] * len(by_ranks)]
    lines += ["", f"MEASURED, for one rank and one step: {where}", ""]
    lines.append(_line(columns, "ranks", *(ranks for (ranks,) in by_ranks)))
    for name in dict.fromkeys(row["quantity"] for row in few):
        values = [{row["quantity"]: row["per_step"] for row in rows}.get(name, "0") for rows in by_ranks.values()]
        lines.append(_line(columns, name + ", s" * (name in ("forward, backward", "observe", "step")), *values))
    return "\n".join(lines)


def _line(columns: list[int], *entries: str) -> str:
    """Entries of a row, each at the right of a column of so many characters."""
    return "  ".join(f"{x:>{n}}" for n, x in zip(columns, entries, strict=True))


# ---- the picture --------------------------------------------------------------------------------------

STYLES: dict[str, Style] = {
    "Adam": METHODS["adam"],
    "K-FAC": METHODS["kfac"],
    "constants, additive": styled("nicolaides", "additive"),
    "leading, balanced": styled("spectral", "balanced"),
}
DOTTED = {f"{name}, counted": style._replace(marker="", line=":") for name, style in STYLES.items()}
PUBLISHED = Style("as published", FAINT)
BARS: dict[str, tuple[str, Style]] = {  # of the autoencoder: what is written above the bar, and its colour
    "SGD": ("SGD", METHODS["gradient"]),
    "Adam": ("Adam", METHODS["adam"]),
    "one-level K-FAC": ("one-level K-FAC", METHODS["kfac"]),
    "nicolaides additive": ("constants, additive", STYLES["constants, additive"]),
    "spectral-4 balanced, 128 examples": ("4 eigenvectors, balanced; A of 128 examples", STYLES["leading, balanced"]),
    FULL_BATCH: ("4 eigenvectors, balanced; A of all examples", STYLES["leading, balanced"]),
    "as published, LU inverses": ("as published: LU inverses", PUBLISHED),
    "as published, eigenvectors": ("as published: eigenvectors", PUBLISHED),
}
AXES = {
    "width": "width of the layers",
    "depth": "number of layers",
    "batch": "examples in a batch",
    "per_layer": "eigenvectors per layer",
}


class Plot(show.Plot):
    """One network in bars, growth in curves; what the products alone would take is dotted."""

    size = (10.0, 6.2)
    fixed = ("device",)

    def build(self, result: Result) -> None:
        grid = self.figure.add_gridspec(2, 3, width_ratios=(1.3, 1, 1))
        self._bars(self.figure.add_subplot(grid[:, 0]), result)
        self.views = {}
        for i, (quantity, label) in enumerate(AXES.items()):
            ax, curves = self.figure.add_subplot(grid[i // 2, 1 + i % 2]), shown(result, quantity)
            x = np.unique(np.concatenate([c.x for c in curves.values()]))
            ends = [end for c in curves.values() for end in (c.low.min(), c.high.max())]
            self.views[quantity] = self.add(CurveView(
                ax, DOTTED | STYLES, curves, "ms per step", x=label,
                xlim=(x[0] / 1.15, x[-1] * 1.15), ylim=(min(ends) / 1.5, max(ends) * 1.5),
            ))  # fmt: skip
            plain_numbers(ax.xaxis, x)
        (limit,) = ax.plot([], [], ":", color=INK, label="counted, without marks")
        self.legend([*(self.views["width"].lines[name] for name in STYLES), limit], 5)

    def _bars(self, ax: Axes, result: Result) -> None:
        measured, counted = result.of("autoencoder"), result.of("autoencoder, counted")
        names = [name for name in BARS if name in measured]
        for i, name in enumerate(names):
            (label, style), (_, (ms,), (low,), (high,)) = BARS[name], measured[name]
            ax.barh(i, ms, color=style.color, height=0.5)
            ax.plot([low, high], [i, i], color=INK, linewidth=1.4)
            ax.annotate(f"{ms:.0f} ms", (max(ms, high), i), (5, 0), textcoords="offset points", va="center")
            ax.annotate(label, (0, i - 0.25), (2, 2), textcoords="offset points", va="bottom")
            if name in counted:
                ax.plot([counted[name].y[0]] * 2, [i - 0.32, i + 0.32], ":", color=INK, linewidth=1.6)
        ax.set(xlabel="ms per step, amortised", yticks=[], ylim=(len(names) - 0.6, -0.9),
               xlim=(0, 1.25 * max(measured[name].high[0] for name in names)))  # fmt: skip
        ax.set_title("784-1000-500-250-30-…, batch 512")
        ax.spines["left"].set_visible(False)

    def move(self, result: Result) -> None:
        for quantity, view in self.views.items():
            view.update(shown(result, quantity))

    def words(self, result: Result) -> str:
        times = "; ".join(f"{name} {c.y[0]:.0f} ms" for name, c in result.of("autoencoder").items())
        return f"Autoencoder: {times}. {super().words(result)}"


def shown(result: Result, quantity: str) -> dict[str, Curve]:
    """What was measured along one axis, and what the products alone would take."""
    return result.of(quantity) | {f"{name}, counted": c for name, c in result.of(f"{quantity}, counted").items()}


# ---- the exercises ------------------------------------------------------------------------------------


@exercise("14a", "Set the three products of the gradient equal to the two of K-FAC: 3 N o i = o² i + o i².", 0.01)
def _batch_that_pays_for_kfac() -> float:
    return (1000 + 1001) / 3


@exercise("14b", "A column has o i entries, and is met in Zᵀ g and in Z c; K-FAC's products are o² i + o i².", 0.02)
def _price_of_four_columns() -> float:
    return 2 * 4 / (1000 + 1001)
