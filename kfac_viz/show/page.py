"""Pages that a browser opens without Python: a template, the look and the tools of all such pages, and the data."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .files import put
from .tolerance import Tolerance

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

HERE = Path(__file__).parent


def write_page(template: Path, data: dict[str, Any], name: str, out: Path, tolerances: Mapping[str, Tolerance]) -> Path:
    """Write NAME.html: ``template`` with the shared style and script, and ``data`` as JSON, in their places.

    Args:
        tolerances: by a name among the data, how far what lies below it may be from the published page: numbers, and
            the levels, of 255, of pictures. They are put among the data.
    """
    data = data | {"tolerances": {name: tolerance._asdict() for name, tolerance in tolerances.items()}}
    parts = {
        "style": (HERE / "page.css").read_text(encoding="utf-8"),
        "script": (HERE / "page.js").read_text(encoding="utf-8"),
        "data": json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
    }
    page = template.read_text(encoding="utf-8")
    for part, text in parts.items():
        page = page.replace("{{" + part + "}}", text)
    return put({f"{name}.html": page.encode()}, out)[0]


def nearest(values: ArrayLike, x: float) -> int:
    """The position of the value that is nearest to x: where a slider starts."""
    return int(np.abs(np.asarray(values) - x).argmin())


def address(shares: NDArray, palette: str) -> str:
    """A picture as a data address, from numbers in [0, 1] and a palette of matplotlib's."""
    from matplotlib import colormaps
    from PIL import Image

    buffer = io.BytesIO()
    picture = Image.fromarray(colormaps[palette](shares, bytes=True)[..., :3])
    picture.save(buffer, "WEBP", lossless=True, quality=60, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
