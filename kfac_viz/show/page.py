"""A page of frames that a browser opens without Python: small pictures of matrices, and a template with its data."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .parts import compressed, pooled
from .save import write
from .style import SIGNED

if TYPE_CHECKING:
    from torch import Tensor

PIXELS = 170  # along one side of a matrix, at most
LEVELS = 16  # of red, and as many of blue


def write_page(template: Path, data: dict[str, Any], name: str, out_dir: str | Path) -> Path:
    """Write NAME.html: the template with ``data`` as JSON in place of ``{{data}}``."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return write(folder / f"{name}.html", template.read_text(encoding="utf-8").replace("{{data}}", text).encode())


def frame(matrix: Tensor, limit: float) -> str:
    """A matrix as a small picture in a data address; empty where it is zero."""
    from matplotlib import colormaps
    from PIL import Image

    if not matrix.numpy().any():
        return ""
    values = pooled(matrix, -(-len(matrix) // PIXELS))
    share = np.round(compressed(np.clip(values / limit, -1, 1)) * LEVELS) / LEVELS
    picture = Image.fromarray(colormaps[SIGNED]((share + 1) / 2, bytes=True)[..., :3])
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", lossless=True, quality=60, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
