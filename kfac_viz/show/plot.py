"""A figure that can be drawn again in place: what a slider moves and what a file keeps are one object."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from .style import MUTED, rc

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEAD = 0.6  # inches, for the headline and the line below it
Part = TypeVar("Part")


class Plot(ABC):
    """Builds a figure once, without pyplot, and fills it from one result after the other.

    A result has ``headline``, a sentence with its numbers, and ``where``, a line with network, data, λ and seeds. A
    subclass draws axes in :meth:`build`, hands what will change to :meth:`add`, and changes it in :meth:`move`,
    where anything moves. Where a part of the result takes long to compute, its axes go to :meth:`add_late`, and
    :meth:`finish` fills them: a panel shows the rest of the picture before that.

    Attributes:
        fixed: the fields or parameters that a result must share with the first to be shown in its place.
        parts: what was added, but for single artists.
        animated: the artists that :meth:`move` changes: a live panel draws these and leaves the rest.
        late: those that :meth:`finish` changes, in axes of their own.
    """

    size: ClassVar[tuple[float, float]] = (10.0, 6.0)  # inches; 9 points are 11 pixels in a picture of 900
    layout: ClassVar[str | None] = "constrained"  # None where ``build`` places the axes itself
    fixed: ClassVar[tuple[str, ...]] = ("partition",)

    def __init__(self, result: Any) -> None:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.parts: list[Any] = []
        self.animated: list[Artist] = []
        self.late: list[Artist] = []
        with matplotlib.rc_context(rc()):
            self.figure: Figure = Figure(figsize=self.size, layout=self.layout)
            FigureCanvasAgg(self.figure)
            if self.layout:
                free = (0, 0, 1, 1 - HEAD / self.size[1])
                self.figure.get_layout_engine().set(rect=free, h_pad=0.08, w_pad=0.06)
            self.title = self.add(self.text(0.1, 0.19, size=12, weight="bold", va="center"))
            self.subtitle = self.add(self.text(0.1, 0.43, color=MUTED, va="center"))
            self._first = self._fixed(result)
            self.build(result)
            if self.animated[2:] and type(self).move is Plot.move:  # more than the two lines above
                raise TypeError(f"{type(self).__name__} adds what changes, and has no move() that changes it.")
            if self.late and type(self).finish is Plot.finish:
                raise TypeError(f"{type(self).__name__} adds what is late, and has no finish() that changes it.")
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

    def move(self, result: Any) -> None:  # noqa: B027
        """Put the numbers of ``result`` into the artists."""

    def finish(self, result: Any) -> None:  # noqa: B027
        """Put those numbers that take long to compute into the artists of :meth:`add_late`."""

    def update(self, result: Any) -> None:
        """Show another result that fits."""
        self.first_stroke(result)
        self.second_stroke(result)

    def first_stroke(self, result: Any) -> None:
        """Show what :meth:`move` changes, and the words of the result as the head of the figure."""
        self.title.set_text(result.headline)
        self.subtitle.set_text(result.where + self.note(result))
        self.move(result)

    def second_stroke(self, result: Any) -> None:
        """Show what :meth:`finish` changes. The words of the result, and those of the views, become the alternative
        text of the figure, ``figure.get_label()``."""
        self.finish(result)
        self.figure.set_label(f"{result.headline}. {result.where}. {self.words(result)}")

    def note(self, result: Any) -> str:
        """What the line below the headline says of the drawing."""
        return ""

    def words(self, result: Any) -> str:
        """What else the picture shows."""
        return " ".join(part.words() for part in self.parts if hasattr(part, "words"))

    def fits(self, result: Any) -> bool:
        """Whether :meth:`update` can show ``result``; else a new plot is built."""
        return self._fixed(result) == self._first

    def _fixed(self, result: Any) -> list[Any]:
        return [getattr(result, name) if hasattr(result, name) else result.parameters[name] for name in self.fixed]

    def regions(self, result: Any) -> list[tuple[float, float, float, float, str]]:
        """Left, top, width, height as shares of the figure, and the text that is shown when a reader points there."""
        return [region for part in self.parts if hasattr(part, "regions") for region in part.regions()]

    def add(self, part: Part) -> Part:
        """Note that this artist, or the ``artists`` of this view, will change; returns it."""
        if hasattr(part, "artists"):
            self.parts.append(part)
        self.animated += getattr(part, "artists", [part])
        return part

    def add_late(self, artist: Artist) -> Artist:
        """Note that :meth:`finish` will change this artist; returns it."""
        self.late.append(artist)
        return artist

    def legend(self, lines: Iterable[Artist], columns: int) -> None:
        """One legend for all axes, below them."""
        self.figure.legend(handles=list(lines), loc="outside lower center", ncols=columns)

    def text(self, left: float, top: float, words: str = "", **style: Any) -> Artist:
        """A text in inches from the upper left corner."""
        return self.figure.text(left / self.size[0], 1 - top / self.size[1], words, **style)

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Axes in inches from the upper left corner, for a plot without layout: nothing moves when texts change."""
        W, H = self.size
        return self.figure.add_axes((left / W, 1 - (top + height) / H, width / W, height / H))
