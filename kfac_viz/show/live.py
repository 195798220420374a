"""A plot under a moving slider: the background is drawn once, then only what changed, 10 times as fast."""

from __future__ import annotations

import io
import threading
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.colors import to_hex
from matplotlib.font_manager import findfont
from matplotlib.image import AxesImage
from matplotlib.text import Text
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from .style import rc

if TYPE_CHECKING:
    from matplotlib.artist import Artist

    from .plot import Plot

_ONE_AT_A_TIME = threading.RLock()  # matplotlib draws in one thread only

# What matplotlib reads of the style of the process while a frame is drawn, once the figure is built.
READ = ("_internal.classic_mode", "agg.path.chunksize", "lines.scale_dashes", "path.simplify",
        "path.simplify_threshold", "path.snap")  # fmt: skip

# Where matplotlib and Pillow anchor a text.
_ACROSS = {"left": "l", "center": "m", "right": "r"}
_DOWN = {"top": "a", "center": "m", "center_baseline": "m", "baseline": "s", "bottom": "d"}


def drawn_here() -> bool:
    """Whether a frame comes out right in the style that the process has now, without a change of it: styles are those
    of the process and not of a thread."""
    return all(matplotlib.rcParams[key] == matplotlib.rcParamsDefault[key] for key in READ)


def _style() -> AbstractContextManager:
    """The style of every frame."""
    return matplotlib.rc_context(rc() | {key: matplotlib.rcParamsDefault[key] for key in READ})


class View(NamedTuple):
    """A picture, what it shows in words, and what a reader who points into it is told: left, top, width and height as
    shares of the picture, and the words."""

    picture: bytes
    words: str
    regions: list[tuple[float, float, float, float, str]]


class Live:
    """Renders a :class:`Plot` of results, one after the other.

    Plain texts are set by Pillow, since matplotlib spends more time on their glyphs than on all the rest.
    """

    def __init__(self, plot: Plot) -> None:
        self.plot, self.canvas = plot, plot.figure.canvas
        for artist in plot.animated:
            artist.set_animated(True)
        self.texts = [artist for artist in plot.animated if isinstance(artist, Text) and not artist.get_rotation()]
        self.others = [artist for artist in plot.animated if artist not in self.texts]
        with _style():
            self.canvas.draw()
        self._background = self.canvas.copy_from_bbox(self.plot.figure.bbox)

    def picture(self, result: Any) -> Image.Image:
        """The picture of a result that fits; from any thread where :func:`drawn_here` says so."""
        with _ONE_AT_A_TIME, nullcontext() if drawn_here() else _style():
            self.plot.update(result)
            return self._picture()

    def _picture(self) -> Image.Image:
        """What the figure looks like now."""
        self.canvas.restore_region(self._background)
        for artist in self.others:
            self._draw(artist)
        image = Image.fromarray(np.asarray(self.canvas.buffer_rgba())).convert("RGB")
        pen, dpi = ImageDraw.Draw(image), self.plot.figure.dpi
        for text in self.texts:
            if text.get_visible():
                x, y = text.get_transform().transform(text.get_position())
                anchor = _ACROSS[text.get_horizontalalignment()] + _DOWN[text.get_verticalalignment()]
                font = _font(findfont(text.get_fontproperties()), text.get_fontsize() * dpi / 72)
                pen.text((x, image.height - y), text.get_text(), to_hex(text.get_color()), font, anchor)
        return image

    def _draw(self, artist: Artist) -> None:
        """As matplotlib does; but of a matrix write the entry at the middle of each pixel, in a tenth of the time."""
        plain = isinstance(artist, AxesImage) and artist.get_interpolation() == "nearest" and artist.origin == "upper"
        if plain and artist.get_visible() and artist.get_array().ndim == 2:
            values, canvas = artist.get_array(), np.asarray(self.canvas.buffer_rgba())
            (x, y), (X, Y) = np.rint(artist.axes.bbox.get_points()).astype(int)
            (left, down), (right, up) = artist.axes.transData.inverted().transform([(x, y), (X, Y)])
            west, east, south, north = artist.get_extent()
            i = (np.linspace(up, down, 2 * (Y - y) + 1)[1::2] - north) / (south - north) * len(values)
            j = (np.linspace(left, right, 2 * (X - x) + 1)[1::2] - west) / (east - west) * len(values.T)
            if min(*i, *j) >= 0 and max(i) < len(values) and max(j) < len(values.T):  # it fills its axes
                shown = values[np.ix_(i.astype(int), j.astype(int))]
                canvas[len(canvas) - Y : len(canvas) - y, x:X] = artist.to_rgba(shown, bytes=True)
                return
        artist.draw(self.canvas.get_renderer())

    @classmethod
    def of(cls, plot: type[Plot], result: Any, last: Live | None) -> Live:
        """``last`` where ``result`` can be shown there, else a new one."""
        with _ONE_AT_A_TIME:
            return last if last is not None and last.plot.fits(result) else cls(plot(result))

    def show(self, result: Any, format: str = "JPEG") -> View:
        """The view of a result that fits, its picture as JPEG, or as PNG without loss and with its words; from any
        thread where :func:`drawn_here` says so."""
        with _ONE_AT_A_TIME:
            picture = self.picture(result)
            words = self.plot.figure.get_label()
            if format == "PNG":
                options: dict[str, Any] = {"pnginfo": PngInfo()}
                options["pnginfo"].add_itxt("Description", words)
            else:
                options = {"quality": 80, "subsampling": 0}
            buffer = io.BytesIO()
            picture.save(buffer, format, **options)
            return View(buffer.getvalue(), words, self.plot.regions(result))


@lru_cache(maxsize=64)
def _font(path: str, size: float) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
