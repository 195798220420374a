"""Result and figure to files: SVG, PNG, a tidy CSV and a JSON that says where they come from."""

from __future__ import annotations

import base64
import io
import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import __version__
from .files import folder, put
from .style import rc

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What numbers and pictures depend on.
LIBRARIES = ("torch", "numpy", "scipy", "scikit-learn", "pandas", "matplotlib", "seaborn", "pillow")


class Saved(NamedTuple):
    """The files of one figure, none where nothing was to be written; a notebook shows the picture."""

    paths: tuple[Path, ...]
    png: bytes
    alt: str

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict, dict]:
        picture = base64.b64encode(self.png).decode()
        return {"image/png": picture, "text/plain": self.alt}, {"image/png": {"alt": self.alt}}


def save(figure: Figure, result: Any, name: str, out_dir: str | Path) -> Saved:
    """Write NAME.svg, NAME.png, NAME.csv and NAME.json into ``out_dir``; the record, NAME.json, comes last.

    No date, path or duration enters the files, so the same numbers give the same bytes.

    Args:
        figure: drawn from ``result``; its label says in words what it shows, and becomes the alternative text.
        result: has ``parameters`` (plain values) and ``table()``, a data frame.
        name: stem of the files.
        out_dir: folder, made if it is missing; empty to write nothing, as when a notebook is only read.

    Raises:
        ValueError: the figure has no label, or a folder stands where a file is to be written.
        TypeError: ``out_dir`` is no name of a folder.
    """
    import matplotlib

    out = folder(out_dir)
    alt = str(figure.get_label()).strip()
    if not alt:
        raise ValueError("Every figure needs an alternative text: figure.set_label('what it shows').")
    # Without build tags such as +cpu.
    versions = {"kfac_viz": __version__} | {library: version(library).partition("+")[0] for library in LIBRARIES}
    description = {"name": name, "alt": alt, "parameters": result.parameters, "versions": versions}
    table = result.table().to_csv(index=False, float_format="%.4g", lineterminator="\n")
    text = json.dumps(description, indent=2, ensure_ascii=False, default=list) + "\n"
    with matplotlib.rc_context(rc()):
        png = _render(figure, "png", {"Title": name, "Description": alt, "Software": None})
        svg = _render(figure, "svg", {"Title": name, "Description": alt, "Creator": None, "Date": None})
    if out is None:
        return Saved((), png, alt)
    contents = {"svg": svg, "png": png, "csv": table.encode(), "json": text.encode()}
    return Saved(put({f"{name}.{suffix}": data for suffix, data in contents.items()}, out), png, alt)


def _render(figure: Figure, format: str, metadata: dict[str, str | None]) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=format, metadata=metadata)
    return buffer.getvalue()
