"""Files of notebooks: each set is made once for what it depends on, in a folder of its own, and then put in place.

A notebook never writes into the output folder itself. Hidden in ``DIR/.made`` lie a lock, the executed copies, and for
each notebook the set of files that it made last, with a stamp that says from what; a set is there whole or not at all.
"""

from __future__ import annotations

import contextlib
import html
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..show.files import PART, put, sha256

try:
    import fcntl
except ImportError:  # Windows: no lock there
    fcntl = None

STAMP = "made.json"


@dataclass(frozen=True, eq=False)
class Output:
    """The files of one notebook with one choice of values, and what they are made from.

    Attributes:
        stem: how their names begin.
        folder: where they lie, relative to the output folder.
        inputs: all that they depend on, as JSON has it.
    """

    stem: str
    folder: str
    inputs: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.folder}/{self.stem}".removeprefix("./")

    @property
    def made(self) -> str:
        """The folder of the set that was made last."""
        return f".made/{self.name}"

    @property
    def copy(self) -> str:
        return f".made/{self.name}.ipynb"

    def why(self, out: Path) -> str:
        """Why the set has to be made anew; empty where it need not."""
        try:
            stamp = json.loads((out / self.made / STAMP).read_text(encoding="utf-8"))
            changed = [key for key in self.inputs if self.inputs[key] != stamp["inputs"].get(key)]
            for name, digest in stamp["files"].items():
                file = out / self.made / name
                if not file.is_file() or sha256(file.read_bytes()) != digest:
                    changed.append(name)
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return "not made here before"
        return f"{', '.join(changed)} changed" if changed else ""

    def keep(self, scratch: Path, out: Path) -> None:
        """Make what a notebook wrote into ``scratch`` the set that was made last.

        Raises:
            ValueError: it wrote nothing, or files of other names.
        """
        files = sorted(scratch.iterdir())
        strange = [file.name for file in files if not (file.is_file() and file.name.startswith(self.stem))]
        if strange or not files:
            raise ValueError(
                f"It must write files whose names begin with {self.stem} into out_dir; "
                f"it wrote {', '.join(strange) or 'nothing'}."
            )
        stamp = {"inputs": self.inputs, "files": {file.name: sha256(file.read_bytes()) for file in files}}
        (scratch / STAMP).write_text(json.dumps(stamp, indent=2), encoding="utf-8")
        shutil.rmtree(out / self.made, ignore_errors=True)
        scratch.rename(out / self.made)  # from here on the set is there, whole

    def files(self, out: Path) -> dict[str, bytes]:
        """The set that was made last."""
        return {file.name: file.read_bytes() for file in sorted((out / self.made).iterdir()) if file.name != STAMP}


@contextlib.contextmanager
def only_run_in(out: Path) -> Iterator[None]:
    """Wait for other runs that write into ``out``, then remove what a killed one left half made."""
    hidden = out / ".made"
    hidden.mkdir(parents=True, exist_ok=True)
    with open(hidden / "lock", "w") as lock:
        if fcntl:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                print(f"Another run is writing into {out}; waiting for it.", flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
        for unfinished in hidden.glob("making-*"):
            shutil.rmtree(unfinished, ignore_errors=True)
        for unfinished in (*out.glob(f".*{PART}"), *out.glob(f"*=*/.*{PART}")):
            unfinished.unlink(missing_ok=True)
        yield


def scratch_in(out: Path) -> Path:
    """A new folder for one notebook to write into."""
    return Path(tempfile.mkdtemp(prefix="making-", dir=out / ".made"))


def lay_beside(outputs: list[Output], out: Path) -> Path:
    """The folder in which these sets, and no others, lie beside the published ones."""
    beside = out / ".made" / "differs"
    shutil.rmtree(beside, ignore_errors=True)
    for output in outputs:
        put(output.files(out), beside)
    return beside


def write_gallery(out: Path) -> None:
    """README.md: every figure in ``out`` under its headline, with what it is of and links to its files."""
    text = "# The figures\n\nEach is made by the notebook of its name: `make figures`.\n"
    told = {}
    for file in sorted(out.glob("*.json")):
        with contextlib.suppress(ValueError, TypeError, LookupError, AttributeError, RecursionError):  # no such record
            record = json.loads(file.read_bytes())
            told[file.stem] = {name: record[name] for name in ("headline", "where")}
    notebooks = sorted(path.stem for path in (out.parent / "notebooks").glob("*.ipynb"))
    for stem, record in told.items():
        files = ", ".join(f"[{kind.upper()}]({stem}.{kind})" for kind in ("svg", "csv", "json"))
        text += f"\n## {record['headline']}\n\n{record['where']}.\n\n![{record['headline']}]({stem}.png)\n\n"
        notebook = next((name for name in notebooks if f"{stem}_".startswith(f"{name}_")), stem)  # it may have several
        text += f"[The notebook](../notebooks/{notebook}.ipynb); {files}.\n"
    gallery = out / "README.md"
    if told and not (gallery.is_file() and gallery.read_bytes() == text.encode()):
        put({gallery.name: text.encode()}, out)


def write_index(out: Path) -> None:
    """A page with a table for each notebook over all grid folders in ``out``: the last parameter to the right, the
    others downwards, in each cell the picture and links to its files."""
    grids: dict[str, dict[tuple[str, str], Path]] = {}
    for file in sorted(out.glob("*=*/*"), key=lambda file: [_sortable(x) for pair in _point(file) for x in pair]):
        if file.suffix in (".png", ".html"):
            *others, last = ("=".join(pair) for pair in _point(file))
            grids.setdefault(file.stem, {})[", ".join(others), last] = file
    tables = ""
    for stem, cells in grids.items():
        rows, columns = (list(dict.fromkeys(key[k] for key in cells)) for k in (0, 1))
        head = "".join(f"<th scope=col>{html.escape(column)}</th>" for column in columns)
        body = ""
        for row in rows:
            line = "".join(f"<td>{_cell(cells.get((row, column)), out)}</td>" for column in columns)
            body += f"<tr><th scope=row>{html.escape(row)}</th>{line}</tr>\n"
        tables += f"<h2>{html.escape(stem)}</h2>\n<div><table>\n<tr><td></td>{head}</tr>\n{body}</table></div>\n"
    page = (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">\n'
        "<title>Figures over a grid of parameters</title>\n<style>:root { color-scheme: light dark; }\n"
        "body { font: 15px system-ui, sans-serif; margin: 1rem; } div { overflow-x: auto; }\n"
        "td { vertical-align: top; padding: .4rem; } th { font-weight: 600; text-align: left; white-space: nowrap; }\n"
        f"img {{ width: min(24rem, 80vw); background: white; }}</style>\n{tables}</html>\n"
    )
    put({"index.html": page.encode()}, out)


def _point(file: Path) -> list[tuple[str, str]]:
    """Names and values of the parameters in a folder's name.

    >>> _point(Path("damping=0.1,widths=12,12/07_coarse_space.png"))
    [('damping', '0.1'), ('widths', '12,12')]
    """
    return re.findall(r"(\w+)=(.*?)(?=,\w+=|$)", file.parent.name)


def _sortable(text: str) -> tuple[bool, float, str]:
    """Numbers by their value, and before words."""
    try:
        return False, float(text), ""
    except ValueError:
        return True, 0.0, text


def _cell(file: Path | None, out: Path) -> str:
    """The picture of a point of the grid, or the word for a page, with links to the files beside it."""
    if file is None:
        return ""
    beside = {kind: file.with_suffix(f".{kind}") for kind in ("svg", "csv", "json")}
    links = {kind: html.escape(path.relative_to(out).as_posix()) for kind, path in beside.items() if path.exists()}
    link, words = html.escape(file.relative_to(out).as_posix()), html.escape(f"{file.stem}, {file.parent.name}")
    shown = f'<img src="{link}" alt="{words}">' if file.suffix == ".png" else "open the page"
    told = " ".join(f'<a href="{path}">{kind.upper()}</a>' for kind, path in links.items())
    return f'<a href="{link}">{shown}</a><br>{told}'
