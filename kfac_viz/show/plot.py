"""A figure that can be drawn again in place: what a slider moves and what a file keeps are one object."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from .style import rc

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure


class Plot(ABC):
    """Builds a figure once, without pyplot, and fills it from a result.

    Subclasses draw axes in :meth:`build` and put numbers into artists in :meth:`update`. ``animated`` lists the
    artists that ``update`` changes: a live panel blits these and leaves the rest. ``figure.get_label()`` is the
    alternative text.
    """

    size: tuple[float, float] = (10.0, 6.0)  # inches
    layout: str | None = "constrained"  # None where ``build`` places the axes itself

    def __init__(self, result: Any) -> None:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.animated: list[Artist] = []
        with matplotlib.rc_context(rc()):
            self.figure: Figure = Figure(figsize=self.size, layout=self.layout)
            FigureCanvasAgg(self.figure)
            self.build(result)
            self.update(result)
            self.figure.canvas.draw()  # lays out once; afterwards nothing may jump
            self.figure.set_layout_engine("none")

    @classmethod
    def draw(cls, result: Any) -> Figure:
        """The figure of ``result``."""
        return cls(result).figure

    @abstractmethod
    def build(self, result: Any) -> None:
        """Make axes and artists for results like this one."""

    @abstractmethod
    def update(self, result: Any) -> None:
        """Put the numbers of ``result`` into the artists, and its words into ``figure.set_label``."""

    def fits(self, result: Any) -> bool:
        """Whether :meth:`update` can show ``result``; else a new plot is built."""
        return True

    def regions(self, result: Any) -> list[tuple[float, float, float, float, str]]:
        """Left, top, width, height as shares of the figure, and what a reader who points there is told."""
        return []
