"""Result and figure to files: SVG, PNG, a tidy CSV and a JSON that says where they come from."""

from __future__ import annotations

import base64
import io
import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from .. import __version__
from .style import rc

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

# What numbers and pictures depend on.
LIBRARIES = ("torch", "numpy", "scipy", "scikit-learn", "pandas", "matplotlib", "seaborn")


class Result(Protocol):
    """What every experiment returns: its parameters, and the numbers of its figure as a tidy table."""

    parameters: dict[str, Any]

    def table(self) -> pandas.DataFrame: ...


class Saved(NamedTuple):
    """The files of one figure, none where nothing was to be written; a notebook shows the picture."""

    paths: tuple[Path, ...]
    png: bytes
    alt: str

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict, dict]:
        return {"image/png": base64.b64encode(self.png).decode(), "text/plain": self.alt}, {
            "image/png": {"alt": self.alt}
        }


def save(figure: Figure, result: Result, name: str, out_dir: str | Path) -> Saved:
    """Write NAME.svg, NAME.png, NAME.csv and NAME.json into ``out_dir``; each appears whole or not at all.

    The record, NAME.json, is taken away first and comes last: where it stands, all four belong together.
    No date, path or duration enters the files, so the same numbers give the same bytes.

    Args:
        figure: drawn from ``result``; its label says in words what it shows, and becomes the alternative text.
        result: has ``parameters`` (plain values) and ``table()``.
        name: stem of the files.
        out_dir: folder, made if it is missing; empty to write nothing, as when a notebook is only read.

    Raises:
        ValueError: the figure has no label.
    """
    import matplotlib

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
    if not out_dir:
        return Saved((), png, alt)
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").unlink(missing_ok=True)
    contents = {"svg": svg, "png": png, "csv": table.encode(), "json": text.encode()}
    return Saved(tuple(write(folder / f"{name}.{suffix}", data) for suffix, data in contents.items()), png, alt)


def write(path: Path, data: bytes) -> Path:
    """Write a file whole or not at all: a temporary neighbour is renamed onto it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path


def _render(figure: Figure, format: str, metadata: dict[str, str | None]) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=format, metadata=metadata)
    return buffer.getvalue()
