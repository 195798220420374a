"""Pictures region by region: what tells two drawings apart, and leaves single pixels alone."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray

BLOCK = 8  # pixels along each side of a region


def regions(picture: bytes) -> NDArray:
    """The mean colour of each region of a picture, from 0 to 255, (frames, rows, columns, 3); at the edges regions may
    be smaller.

    Raises:
        OSError: these bytes are no picture.
    """
    from PIL import Image, ImageSequence

    with Image.open(io.BytesIO(picture)) as image:
        pixels = np.stack([np.asarray(frame.convert("RGB"), float) for frame in ImageSequence.Iterator(image)])
    height, width = pixels.shape[1:3]
    rows, columns = np.arange(0, height, BLOCK), np.arange(0, width, BLOCK)
    sums = np.add.reduceat(np.add.reduceat(pixels, rows, 1), columns, 2)
    return sums / np.outer(np.diff(rows, append=height), np.diff(columns, append=width))[..., None]
