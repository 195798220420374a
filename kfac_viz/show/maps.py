"""A map: one number for each pair of two parameters, drawn by seaborn from a tidy table and recoloured in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..parameters import number
from .style import words_on

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.text import Text
    from numpy.typing import NDArray


class MapView:
    """A heatmap with its numbers written in it.

    Args:
        points: (row, column, value), the first row on top; rows and columns in the order in which they come.
        limits: values at the two ends of the colours, beyond which they do not change.
        colour: applied to values and limits before they become colours, such as ``np.log``.
        palette: a name of matplotlib's.
        form: how numbers are written.
        tilt: degrees by which the names of columns are turned.
    """

    def __init__(
        self,
        ax: Axes,
        points: Sequence[tuple[str, str, float]],
        title: str,
        *,
        x: str = "",
        y: str = "",
        limits: tuple[float, float],
        colour: Callable = np.asarray,
        palette: str = "Blues",
        form: Callable[[float], str] = "{:.2f}".format,
        tilt: float = 0.0,
    ) -> None:
        import pandas
        import seaborn

        self.ax, self.colour, self.form = ax, colour, form
        table = pandas.DataFrame(points, columns=["row", "column", "value"])
        grid = table.pivot(index="row", columns="column", values="value")
        self.rows, self.columns = (list(dict.fromkeys(table[name])) for name in ("row", "column"))
        grid = grid.loc[self.rows, self.columns]
        self.low, self.high = (float(colour(end)) for end in limits)
        seaborn.heatmap(
            colour(grid), vmin=self.low, vmax=self.high, cmap=palette, annot=grid.map(form), fmt="", cbar=False,
            linewidths=0.5, annot_kws={"fontsize": 9}, xticklabels=self.columns, yticklabels=self.rows, ax=ax,
        )  # fmt: skip
        ax.set(title=title, xlabel=x, ylabel=y)
        ax.tick_params(length=0)
        ax.tick_params(axis="y", rotation=0)
        side = {"ha": "right", "rotation_mode": "anchor"} if tilt else {}
        ax.set_xticklabels(ax.get_xticklabels(), rotation=tilt, **side)
        (self.mesh,) = ax.collections
        self.texts = list(ax.texts)
        self.update(points)

    @property
    def artists(self) -> list[Artist]:
        return [self.mesh, *self.texts]

    def words(self) -> str:
        """Title, and the numbers row by row."""
        width = len(self.columns)
        lines = (self.texts[i : i + width] for i in range(0, len(self.texts), width))
        told = (f"{name}: {', '.join(text.get_text() for text in line)}" for name, line in
                zip(self.rows, lines, strict=True))  # fmt: skip
        return f"{self.ax.get_title('left')}. {'; '.join(told)}."

    def update(self, points: Sequence[tuple[str, str, float]]) -> None:
        """Show other values at the same rows and columns."""
        at = {(row, column): value for row, column, value in points}
        values = np.array([[at[row, column] for column in self.columns] for row in self.rows])
        self.mesh.set_array(np.asarray(self.colour(values)))
        write(self.mesh, self.texts, values, self.form)


def ratios(ax: Axes, points: Sequence[tuple[str, str, float]], title: str, largest: float) -> MapView:
    """A map of ratios from 1 / largest to largest: blue below 1, red above; a cell is empty where a ratio is NaN."""
    return MapView(
        ax, points, title, limits=(1 / largest, largest), colour=np.log10, palette="RdBu_r",
        form=lambda x: number(x, 2) if x == x else "", tilt=30,
    )  # fmt: skip


def write(mesh: QuadMesh, texts: Sequence[Text], values: NDArray, form: Callable[[float], str]) -> None:
    """Put each number into its cell of a heatmap, in black or white, whichever can be read there."""
    colours = mesh.cmap(mesh.norm(mesh.get_array())).reshape(*values.shape, 4)
    for text in texts:  # cells without a number have none
        column, row = map(int, text.get_position())
        text.set(text=form(values[row, column]), color=words_on(colours[row, column, :3]))
