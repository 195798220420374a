"""A plot under a moving slider: the background is drawn once, then only what changed, 10 times as fast."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterable
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
    from matplotlib.axes import Axes

    from .plot import Plot

JPEG = {"quality": 80, "subsampling": 0}
EDGE = 6  # pixels by which a marker leaves its axes
_ONE_AT_A_TIME = threading.RLock()  # matplotlib draws in one thread only

# What matplotlib reads of the style of the process while a frame is drawn, once the figure is built.
READ = ("_internal.classic_mode", "agg.path.chunksize", "lines.scale_dashes", "path.simplify",
        "path.simplify_threshold", "path.snap")  # fmt: skip

# Where matplotlib and Pillow anchor a text.
_ACROSS = {"left": "l", "center": "m", "right": "r"}
_DOWN = {"top": "a", "center": "m", "center_baseline": "m", "baseline": "s", "bottom": "d"}


def _full_style() -> AbstractContextManager:
    """The style of the background and of every frame."""
    return matplotlib.rc_context(rc() | {key: matplotlib.rcParamsDefault[key] for key in READ})


def _style() -> AbstractContextManager:
    """The style of a frame: nothing to do, in a hundredth of the time, where the process has what is read of it."""
    right = all(matplotlib.rcParams[key] == matplotlib.rcParamsDefault[key] for key in READ)
    return nullcontext() if right else _full_style()


class View(NamedTuple):
    """A picture, its alternative text, and the text of each region that a reader may point at: left, top, width and
    height as shares of the picture, and the text."""

    picture: bytes
    words: str
    regions: list[tuple[float, float, float, float, str]]


class Live:
    """Renders a :class:`Plot` of results, one after the other.

    Plain texts are set by Pillow, since matplotlib spends more time on their glyphs than on all the rest.
    """

    def __init__(self, plot: Plot) -> None:
        self.plot, self.canvas = plot, plot.figure.canvas
        changing = [*plot.animated, *plot.late]
        for artist in changing:
            artist.set_animated(True)
        self.texts = [artist for artist in changing if isinstance(artist, Text) and not artist.get_rotation()]
        with _full_style():
            self.canvas.draw()
        self._background = self.canvas.copy_from_bbox(self.plot.figure.bbox)
        self._half: Any = None  # the result of which the canvas shows the first stroke
        size = self.canvas.get_width_height()
        self._late = [_box(ax, *size) for ax in dict.fromkeys(artist.axes for artist in plot.late)]
        self._image: Image.Image  # what is being painted
        self._last: Image.Image | None = None  # the last whole picture

    @property
    def two_strokes(self) -> bool:
        """Whether a part of the picture comes later than the rest."""
        return bool(self._late)

    def picture(self, result: Any) -> Image.Image:
        """The picture of a result that fits. What :meth:`first_stroke` has drawn of it is not drawn again."""
        with _ONE_AT_A_TIME, _style():
            if self._half is not result:
                self.plot.first_stroke(result)
                self._paint_first()
            self.plot.second_stroke(result)
            return self._paint_second()

    def _paint_first(self) -> Image.Image:
        """The picture without what is late."""
        self._half = None
        self.canvas.restore_region(self._background)
        for artist in self.plot.animated:
            if artist not in self.texts:
                self._draw(artist)
        self._image = Image.fromarray(np.asarray(self.canvas.buffer_rgba())).convert("RGB")
        self._write(text for text in self.texts if text not in self.plot.late)
        return self._image

    def _paint_second(self) -> Image.Image:
        """The same with what is late."""
        self._half = None
        for artist in self.plot.late:
            if artist not in self.texts:
                self._draw(artist)
        canvas = np.asarray(self.canvas.buffer_rgba())
        for left, top, right, bottom in self._late:
            self._image.paste(Image.fromarray(canvas[top:bottom, left:right].copy()).convert("RGB"), (left, top))
        self._write(text for text in self.texts if text in self.plot.late)
        self._last = self._image
        return self._image

    def _write(self, texts: Iterable[Text]) -> None:
        height, dpi = self._image.height, self.plot.figure.dpi
        for text in texts:
            if text.get_visible() and text.get_text():
                x, y = text.get_transform().transform(text.get_position())
                anchor = _ACROSS[text.get_horizontalalignment()] + _DOWN[text.get_verticalalignment()]
                font = findfont(text.get_fontproperties()), text.get_fontsize() * dpi / 72
                (across, x), (down, y) = divmod(round(x, 2), 1), divmod(round(height - y, 2), 1)
                mask, (left, top) = _letters(text.get_text(), font, anchor, round(x, 2), round(y, 2))
                self._image.paste(to_hex(text.get_color()), (int(across) + left, int(down) + top), mask)

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

    def first_stroke(self, result: Any) -> bytes:
        """The picture of a result that fits, as JPEG, before that part of it is computed that takes long; there the
        last picture is seen, dimmed."""
        with _ONE_AT_A_TIME, _style():
            self.plot.first_stroke(result)
            image = self._paint_first().copy()
            for box in self._late if self._last else ():
                image.paste(Image.blend(image.crop(box), self._last.crop(box), 0.3), box)
            self._half = result
            return _encoded(image, "JPEG", **JPEG)

    def show(self, result: Any, format: str = "JPEG") -> View:
        """The view of a result that fits, its picture as JPEG, or as PNG without loss and with its words."""
        with _ONE_AT_A_TIME:
            image = self.picture(result)
            words = self.plot.figure.get_label()
            options: dict[str, Any] = JPEG
            if format == "PNG":
                options = {"pnginfo": PngInfo()}
                options["pnginfo"].add_itxt("Description", words)
            return View(_encoded(image, format, **options), words, self.plot.regions(result))


def _encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def _box(ax: Axes, width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of these axes in pixels, with the markers that stand on their edge."""
    (left, low), (right, high) = np.rint(ax.bbox.get_points()).astype(int).tolist()
    return max(left - EDGE, 0), max(height - high - EDGE, 0), min(right + EDGE, width), min(height - low + EDGE, height)


@lru_cache(maxsize=512)
def _letters(
    text: str, font: tuple[str, float], anchor: str, x: float, y: float
) -> tuple[Image.Image, tuple[int, int]]:
    """A text as a mask, and where that lies from the pixel in which the text is anchored: x and y are shares of it."""
    drawn = _font(*font)
    left, top, right, bottom = ImageDraw.Draw(Image.new("L", (1, 1))).textbbox((0, 0), text, drawn, anchor)
    at = min(int(left) - 2, 0), min(int(top) - 2, 0)  # Pillow rounds negative places the other way
    mask = Image.new("L", (int(right) - at[0] + 3, int(bottom) - at[1] + 3))
    ImageDraw.Draw(mask).text((x - at[0], y - at[1]), text, 255, drawn, anchor)
    return mask, at


@lru_cache(maxsize=64)
def _font(path: str, size: float) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
