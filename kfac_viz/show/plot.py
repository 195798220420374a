"""A figure that can be drawn again in place: what a slider moves and what a file keeps are one object."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from .style import MUTED, rc

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

HEAD = 0.6  # inches, for the headline and the line below it
Part = TypeVar("Part")


class Plot(ABC):
    """Builds a figure once, without pyplot, and fills it from one result after the other.

    A subclass draws axes in :meth:`build`, hands what will change to :meth:`add`, and changes it in :meth:`move`. It
    says in words what is to be seen; those become the head of the figure and its alternative text,
    ``figure.get_label()``.

    Attributes:
        animated: the artists that change: a live panel draws these and leaves the rest.
    """

    size: tuple[float, float] = (10.0, 6.0)  # inches; text of 9 points is then 11 pixels in a picture of 900
    layout: str | None = "constrained"  # None where ``build`` places the axes itself

    def __init__(self, result: Any) -> None:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.animated: list[Artist] = []
        with matplotlib.rc_context(rc()):
            self.figure: Figure = Figure(figsize=self.size, layout=self.layout)
            FigureCanvasAgg(self.figure)
            left, height = 0.1 / self.size[0], self.size[1]
            if self.layout:
                self.figure.get_layout_engine().set(rect=(0, 0, 1, 1 - HEAD / height), h_pad=0.08, w_pad=0.06)
            self.title = self.add(self.figure.text(left, 1 - 0.19 / height, "", size=12, weight="bold", va="center"))
            self.subtitle = self.add(self.figure.text(left, 1 - 0.43 / height, "", color=MUTED, va="center"))
            self._frame = self.frame(result)
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
    def move(self, result: Any) -> None:
        """Put the numbers of ``result`` into the artists."""

    @staticmethod
    @abstractmethod
    def headline(result: Any) -> str:
        """What is to be seen: a sentence with its numbers, of one line."""

    @staticmethod
    @abstractmethod
    def where(result: Any) -> str:
        """Network, data, λ and seeds, in one line."""

    @staticmethod
    @abstractmethod
    def describe(result: Any) -> str:
        """What else the picture shows, for who cannot see it."""

    @staticmethod
    @abstractmethod
    def frame(result: Any) -> Any:
        """What results must have in common for :meth:`update` to show them; else a new plot is built."""

    def fits(self, result: Any) -> bool:
        """Whether :meth:`update` can show ``result``."""
        return self.frame(result) == self._frame

    def add(self, part: Part) -> Part:
        """Note that this artist, or the ``artists`` of this view, will change; returns it."""
        self.animated += getattr(part, "artists", [part])
        return part

    def legend(self, lines: Iterable[Artist], columns: int) -> None:
        """One legend for all axes, below them."""
        self.figure.legend(handles=list(lines), loc="outside lower center", ncols=columns)

    def update(self, result: Any) -> None:
        """Show another result that fits."""
        headline, where = self.headline(result), self.where(result)
        self.title.set_text(headline)
        self.subtitle.set_text(where)
        self.move(result)
        self.figure.set_label(f"{headline}. {where}. {self.describe(result)}")

    def regions(self, result: Any) -> list[tuple[float, float, float, float, str]]:
        """Left, top, width, height as shares of the figure, and what a reader who points there is told."""
        return []
