"""A plot under a moving slider: the background is drawn once, then only what changed, 10 times as fast."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.colors import to_hex
from matplotlib.font_manager import findfont
from matplotlib.text import Text
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from .plot import Plot

# Where matplotlib and Pillow anchor a text.
_ACROSS = {"left": "l", "center": "m", "right": "r"}
_DOWN = {"top": "a", "center": "m", "center_baseline": "m", "baseline": "s", "bottom": "d"}


class Live:
    """Renders a :class:`Plot` after each of its updates; one thread at a time.

    Plain texts are set by Pillow, since matplotlib spends more time on their glyphs than on all the rest.
    """

    def __init__(self, plot: Plot) -> None:
        self.plot, self.canvas = plot, plot.figure.canvas
        for artist in plot.animated:
            artist.set_animated(True)
        self.texts = [artist for artist in plot.animated if isinstance(artist, Text) and not artist.get_rotation()]
        self.others = [artist for artist in plot.animated if artist not in self.texts]
        self.canvas.draw()
        self._background = self.canvas.copy_from_bbox(self.plot.figure.bbox)

    def picture(self) -> Image.Image:
        """What the figure looks like now."""
        self.canvas.restore_region(self._background)
        for artist in self.others:
            artist.draw(self.canvas.get_renderer())
        image = Image.fromarray(np.asarray(self.canvas.buffer_rgba())).convert("RGB")
        pen, dpi = ImageDraw.Draw(image), self.plot.figure.dpi
        for text in self.texts:
            if text.get_visible():
                x, y = text.get_transform().transform(text.get_position())
                anchor = _ACROSS[text.get_horizontalalignment()] + _DOWN[text.get_verticalalignment()]
                font = _font(findfont(text.get_fontproperties()), text.get_fontsize() * dpi / 72)
                pen.text((x, image.height - y), text.get_text(), to_hex(text.get_color()), font, anchor)
        return image

    def jpeg(self) -> bytes:
        return _encoded(self.picture(), "JPEG", quality=90, subsampling=0)

    def png(self) -> bytes:
        return _encoded(self.picture(), "PNG")


@lru_cache(maxsize=64)
def _font(path: str, size: float) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def _encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()
