"""Curves with bands over seeds and a line at the slider's value: drawn by seaborn, then moved in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..parameters import number
from .style import INK, Style

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D
    from numpy.typing import NDArray

MARKERS = 8  # on a line, at most


class Curve(NamedTuple):
    """Median over seeds at each x, with the lowest and the highest seed; every array is (n,)."""

    x: NDArray
    y: NDArray
    low: NDArray
    high: NDArray

    def at(self, x: float, scale: tuple[str, str] = ("log", "linear")) -> float:
        """The median at x, between its points on these scales of x and y; NaN beyond its ends."""
        log_x, log_y = (kind == "log" for kind in scale)
        with np.errstate(divide="ignore"):
            xs, ys = (np.log(part) if log else part for part, log in ((self.x, log_x), (self.y, log_y)))
        found = float(np.interp(np.log(x) if log_x and x > 0 else x, xs, ys, left=np.nan, right=np.nan))
        return float(np.exp(found)) if log_y else found


class CurveView:
    """One axes with a line and a band for each series; ``artists`` change, axes and ticks stay.

    The band reaches from the lowest to the highest seed. Of two curves that lie on each other both can be seen: the
    later one is thinner, its markers are smaller and, where there are many points, stand elsewhere. A triangle at the
    edge marks where a curve leaves the axes.

    Args:
        series: how each is drawn, the lowest first.
        curves: by series; those without a style are not drawn.
    """

    def __init__(
        self,
        ax: Axes,
        series: Mapping[str, Style],
        curves: Mapping[str, Curve],
        title: str,
        *,
        x: str,
        y: str = "",
        xlim: tuple[float, float],
        ylim: tuple[float, float],
        scale: tuple[str, str] = ("log", "log"),
    ) -> None:
        import pandas
        import seaborn

        self.ax, self.styles = ax, {name: style for name, style in series.items() if name in curves}
        ax.set(title=title, xscale=scale[0], yscale=scale[1])
        widths = np.linspace(3.0, 1.3, len(self.styles))
        rows = [(name, *point) for name in self.styles for point in zip(*curves[name], strict=True)]
        table = pandas.DataFrame(rows, columns=["series", "x", "median", "low", "high"]).melt(["series", "x"])
        seaborn.lineplot(
            table, x="x", y="value", hue="series", size="series", legend=False, ax=ax,
            palette={name: style.color for name, style in self.styles.items()},
            sizes=dict(zip(self.styles, widths, strict=True)),
            estimator="median", errorbar=("pi", 100), err_kws={"alpha": 0.18, "linewidth": 0},
        )  # fmt: skip
        ax.set(xlabel=x, ylabel=y, xlim=xlim, ylim=ylim)
        self.lines: dict[str, Line2D] = dict(zip(self.styles, ax.lines, strict=True))
        self.bands = dict(zip(self.styles, ax.collections, strict=True))
        for (name, style), width in zip(self.styles.items(), widths, strict=True):
            self.lines[name].set(marker=style.marker, markersize=2.5 * width + 1.5, markeredgecolor=style.color,
                                 linestyle=style.line, label=style.label)  # fmt: skip
        self.cursor = ax.axvline(np.nan, color=INK, linewidth=0.9, alpha=0.6, zorder=0.5)
        self.leaves = [ax.scatter([], [], s=40, marker=m, clip_on=False, zorder=4) for m in ("^", "v")]
        self.rings = ax.scatter([], [], s=55, facecolors="white", linewidths=2, zorder=5)  # the values at the cursor
        self.at: dict[str, float] = {}
        for axis, kind in zip((ax.xaxis, ax.yaxis), scale, strict=True):
            if kind == "log":
                plain_numbers(axis)
        self.update(curves)

    def words(self) -> str:
        """Title, and where each curve begins and ends."""
        ends = ((line.get_label(), line.get_ydata()) for line in self.lines.values())
        told = (f"{label} {number(y[0])} to {number(y[-1])}" for label, y in ends)
        here = ", ".join(f"{self.styles[name].label} {number(y)}" for name, y in self.at.items())
        here = f" At the line: {here}." if here else ""
        return f"{self.ax.get_title('left')}, over {self.ax.get_xlabel()}: {', '.join(told)}.{here}"

    @property
    def artists(self) -> list[Artist]:
        return [*self.bands.values(), *self.lines.values(), self.cursor, *self.leaves, self.rings]

    def update(self, curves: Mapping[str, Curve], at: float | None = None) -> None:
        """Move to these curves, of the same series, and the upright line to x = ``at``, with a ring on each curve."""
        self.cursor.set_xdata([np.nan if at is None else at] * 2)
        (left, right), (low_end, high_end) = self.ax.get_xlim(), self.ax.get_ylim()
        scale = self.ax.get_xscale(), self.ax.get_yscale()
        self.at = {} if at is None else {name: curves[name].at(at, scale) for name in self.lines}
        rings = [(at, y, self.lines[name].get_color()) for name, y in self.at.items() if low_end <= y <= high_end]
        self.rings.set_offsets(np.array([ring[:2] for ring in rings]).reshape(-1, 2))
        self.rings.set_edgecolor([ring[2] for ring in rings])
        above, below = [], []
        for i, (name, line) in enumerate(self.lines.items()):
            x, y, low, high = curves[name]
            step = max(1, -(-len(x) // MARKERS))
            line.set_data(x, y)
            line.set_markevery((i % step, step))
            self.bands[name].set_data(x, low, high)
            color = line.get_color()
            inside = (left <= x) & (x <= right)
            above += [(x, high_end, color) for x in x[_leaving(y > high_end) & inside]]
            below += [(x, low_end, color) for x in x[_leaving(y < low_end) & inside]]
        for marks, points in zip(self.leaves, (above, below), strict=True):
            marks.set_offsets(np.array([point[:2] for point in points]).reshape(-1, 2))
            marks.set_facecolor([point[2] for point in points])


def _leaving(outside: NDArray) -> NDArray:
    """The points outside that have a neighbour inside; the first where all are outside."""
    if outside.all():
        return np.arange(len(outside)) == 0
    return outside & ~(np.r_[True, outside[:-1]] & np.r_[outside[1:], True])


def empty_line(ax: Axes, style: Style, **options) -> Line2D:
    """A line in this style that an update fills."""
    return ax.plot([], [], color=style.color, linestyle=style.line, label=style.label, **options)[0]


def plain_numbers(axis, values: Sequence[float] = ()) -> None:
    """Ticks that say what a reader would write, at ``values`` or where they are, and none in between."""
    low, high = axis.get_view_interval()
    if not len(values) and high < 50 * low:
        values = [digit * 10.0**power for power in range(-12, 12) for digit in (1, 2, 5)]
    if len(values):
        axis.set_ticks([value for value in values if low <= value <= high])
    axis.set_major_formatter(lambda value, _: number(value, 5))
    axis.set_ticks([], minor=True)
