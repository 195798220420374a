"""Result and figure to files: SVG, PNG, a tidy CSV, and a JSON record of what they are and where they come from."""

from __future__ import annotations

import base64
import io
import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import __version__
from .files import folder, put, sha256
from .machine import made_on
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
    """Write NAME.svg, NAME.png, NAME.csv and their record, NAME.json, into ``out_dir``: see ``files.put``.

    The record has the figure's ``headline`` and ``where``, its alternative text ``alt``, the ``parameters``, the
    ``values`` and ``tolerances`` with which its table is compared, the SHA-256 of the other ``files``, the processor
    and the BLAS that it was ``made_on``, and the ``versions`` of libraries. No date, path or duration enters any of
    the files, so the same numbers give the same bytes.

    Args:
        figure: drawn from ``result``; its label says in words what it shows, and becomes the alternative text.
        result: has ``parameters`` (plain values), ``headline``, ``where`` and ``table()``, a data frame; ``values``
            names the columns of that table that are measured or computed, and ``tolerances`` says by quantity how far
            these may be from the published ones (``kfac_viz.show.Tolerance``).
        name: stem of the files.
        out_dir: folder, made if it is missing; empty to write nothing, as when a notebook is only read.

    Raises:
        ValueError: the figure has no label, or a folder stands where a file is to be written.
        TypeError: ``out_dir`` is no name of a folder.
        OSError: the folder cannot be written, or the disk is full; the files that are there stay as they are.
    """
    import matplotlib

    out = folder(out_dir)
    alt = str(figure.get_label()).strip()
    if not alt:
        raise ValueError("Every figure needs an alternative text: figure.set_label('what it shows').")
    with matplotlib.rc_context(rc()):
        png = _render(figure, "png", {"Title": name, "Description": alt, "Software": None})
        if out is None:
            return Saved((), png, alt)
        svg = _render(figure, "svg", {"Title": name, "Description": alt, "Creator": None, "Date": None})
    table = result.table().to_csv(index=False, float_format="%.4g", lineterminator="\n")
    contents = {f"{name}.svg": svg, f"{name}.png": png, f"{name}.csv": table.encode()}
    record = {
        "name": name,
        "headline": result.headline,
        "where": result.where,
        "alt": alt,
        "parameters": result.parameters,
        "values": result.values,
        "tolerances": {quantity: tolerance._asdict() for quantity, tolerance in result.tolerances.items()},
        "files": {file: sha256(data) for file, data in contents.items()},
        "made_on": made_on(),
        # Without build tags such as +cpu.
        "versions": {"kfac_viz": __version__} | {name: version(name).partition("+")[0] for name in LIBRARIES},
    }
    text = json.dumps(record, indent=2, ensure_ascii=False, default=list) + "\n"
    return Saved(put(contents | {f"{name}.json": text.encode()}, out), png, alt)


def _render(figure: Figure, format: str, metadata: dict[str, str | None]) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=format, metadata=metadata)
    return buffer.getvalue()
