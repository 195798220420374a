"""Curves with bands over seeds and a line at the slider's value, updated in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .style import INK, Style

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D
    from numpy.typing import NDArray

MARKERS = 8  # on a line, at most
NOTHING = np.empty((4, 0))


class CurveView:
    """One axes with one line and one band for each series; ``artists`` change, axes and ticks stay.

    Args:
        series: how each is drawn; a label that begins with ``_`` stays out of the legend.
    """

    def __init__(
        self,
        ax: Axes,
        series: Mapping[str, Style],
        title: str,
        *,
        x: str,
        y: str,
        xlim: tuple[float, float],
        ylim: tuple[float, float],
        scale: tuple[str, str] = ("log", "log"),
    ) -> None:
        from matplotlib.collections import PolyCollection

        self.ax = ax
        ax.set(title=title, xlabel=x, ylabel=y, xscale=scale[0], yscale=scale[1], xlim=xlim, ylim=ylim)
        self.lines, self.bands = {}, {}
        for name, style in series.items():
            self.bands[name] = ax.add_collection(PolyCollection([], color=style.color, alpha=0.18, linewidth=0))
            self.lines[name] = empty_line(ax, style, marker=style.marker)
        self.cursor = ax.axvline(np.nan, color=INK, linewidth=0.9, alpha=0.6, zorder=0.5)
        self.artists: list[Artist] = [*self.bands.values(), *self.lines.values(), self.cursor]

    def update(self, curves: Mapping[str, Sequence[NDArray]], at: float | None = None) -> None:
        """Draw curves ``(x, y, low, high)`` and the upright line at x = ``at``; series without a curve vanish."""
        self.cursor.set_xdata([np.nan if at is None else at] * 2)
        log = self.ax.get_yscale() == "log"
        for name, line in self.lines.items():
            x, *values = curves.get(name, NOTHING)
            y, low, high = map(positive, values) if log else values
            line.set_data(x, y)
            line.set_markevery(max(1, -(-len(x) // MARKERS)))
            seen = np.isfinite(low) & np.isfinite(high)
            outline = np.column_stack([np.r_[x[seen], x[seen][::-1]], np.r_[low[seen], high[seen][::-1]]])
            self.bands[name].set_verts([outline] if (low != high)[seen].any() else [])


def empty_line(ax: Axes, style: Style, **options) -> Line2D:
    """A line in this style that an update fills."""
    return ax.plot([], [], color=style.color, linestyle=style.line, label=style.label, **options)[0]


def positive(values: NDArray) -> NDArray:
    """Values for a logarithmic axis: what is not positive is not drawn."""
    return np.where(values > 0, values, np.nan)
