"""What one step of each method captures: bars with its best length, and marks for its other lengths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .style import FAINT, INK, METHODS

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes


class StepBars:
    """A row for each method: a bar for the share of the best decrease at the best length, a circle with one length per
    layer, an upright mark for the step as it is, which is an arrow where it lies below -1; and the numbers beside it.

    Args:
        order: names out of METHODS, from the top.
        form: how a share is written.
    """

    def __init__(self, ax: Axes, order: Sequence[str], form: Callable[[float], str]) -> None:
        self.order, self.form = order, form
        ax.set(xlim=(-1, 1), ylim=(len(order) - 0.4, -0.6))
        ax.set_yticks(range(len(order)), [METHODS[name].label.replace("exact ", "") for name in order])
        ax.tick_params(axis="y", length=0)
        ax.set_xticks([-1, -0.5, 0, 0.5, 1], ["≤ −1", "−0.5", "0", "0.5", "1"])
        ax.axvline(0, color=INK, linewidth=0.8)
        ax.axvline(1, color=FAINT, linewidth=1, zorder=0)
        self.bars = [ax.barh(row, 0, height=0.66, color=METHODS[name].color)[0] for row, name in enumerate(order)]
        self.numbers = [ax.text(1.1, row, "", va="center", size=9) for row in range(len(order))]
        line = dict(linestyle="none", color=INK)
        (self.per_layer,) = ax.plot([], [], marker="o", markersize=5, markerfacecolor="white", clip_on=False, **line)
        (self.unscaled,) = ax.plot([], [], marker="|", markersize=9, markeredgewidth=1.6, **line)
        (self.off,) = ax.plot([], [], marker="<", markersize=6, clip_on=False, **line)

    @property
    def artists(self) -> list[Artist]:
        return [*self.bars, *self.numbers, self.per_layer, self.unscaled, self.off]

    def update(self, best: Mapping[str, float], per_layer: Mapping[str, float], unscaled: Mapping[str, float]) -> None:
        """Show the shares at the best length, with one length per layer, and as they are, by method."""
        for bar, text, name in zip(self.bars, self.numbers, self.order, strict=True):
            bar.set_width(best[name])
            text.set_text(f"{self.form(best[name])} ({self.form(unscaled[name])})")
        rows, values = np.arange(len(self.order)), np.array([unscaled[name] for name in self.order])
        self.per_layer.set_data([per_layer[name] for name in self.order], rows)
        self.unscaled.set_data(np.where(values >= -1, values, np.nan), rows)
        self.off.set_data(np.full(int((values < -1).sum()), -1.0), rows[values < -1])
