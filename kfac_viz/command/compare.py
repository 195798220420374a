"""Whether a figure that was made here is the published one: its numbers within their tolerances, its words equal.

The table is compared row by row with the tolerances in its record, NAME.json, and a page with those among its data.
Pictures are compared by their words and colours, and region by region where they are of the same numbers.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import re
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..show.files import sha256
from ..show.pixels import BLOCK, regions
from ..show.tolerance import Tolerance

SAME, WITHIN, DIFFERS, NEW = "the same bytes", "the same within its tolerance", "differs", "new"
LEVELS = Tolerance(absolute=12)  # of 255: how much lighter or darker a region of a picture may be
DATA = re.compile(r'(?<=<script id="data" type="application/json">).*?(?=</script>)', re.DOTALL)
PICTURE = "data:image/"
DIGITS = re.compile(r"[−-]?[\d.,]*\d(?:·10)?[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]*")

Files = Mapping[str, bytes]


class Difference(NamedTuple):
    """Two values of one place; ``used`` is how much of the tolerance lies between them, more than 1 where too much."""

    used: float
    place: str
    made: Any
    published: Any

    def __str__(self) -> str:
        return f"{self.place}: {_short(self.made)} for {_short(self.published)}"


class Finding(NamedTuple):
    """One of SAME, WITHIN, DIFFERS and NEW, and the words that say where."""

    verdict: str
    words: str = ""


def compare(made: Files, folder: Path) -> Finding:
    """Compare the files of one figure, by name, with those of the same names in ``folder``.

    >>> compare({"x.csv": b"quantity,value"}, Path("missing"))
    Finding(verdict='new', words='')
    """
    old = {name: (folder / name).read_bytes() for name in made if (folder / name).is_file()}
    if missing := sorted(made.keys() - old.keys()):
        return Finding(NEW, f"{', '.join(missing)} was missing" if old else "")
    widest = Difference(0.0, "", "", "")
    try:
        for part in (_settings, _tables, _sentences, _pages, _pictures, _hashes):
            found = list(part(made, old))
            if wrong := [x for x in found if x.used > 1]:
                more = f"; and {len(wrong) - 1} more" if len(wrong) > 1 else ""
                return Finding(DIFFERS, f"{max(wrong, key=lambda x: x.used)}{more}")
            widest = max([widest, *found], key=lambda x: x.used)
    except (ValueError, TypeError, LookupError, AttributeError, OSError, RecursionError) as error:
        return Finding(DIFFERS, f"the published files cannot be read: {error!r}")
    if all(made[name] == old[name] for name in made if not name.endswith(".json")):
        return Finding(SAME)
    return Finding(WITHIN, f"{widest}, {widest.used:.0%} of what is allowed" if widest.used else "")


def _named(files: Files, ending: str) -> list[str]:
    return [name for name in sorted(files) if name.endswith(ending)]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:120]}…"


def _words(made: Any, old: Any, place: str) -> Difference:
    return Difference(0.0 if made == old else math.inf, place, made, old)


# ---- what the record says --------------------------------------------------------------------------------


def _of_records(made: Files, old: Files, names: tuple[str, ...]) -> Iterator[Difference]:
    for file in _named(made, ".json"):
        new, published = json.loads(made[file]), json.loads(old[file])
        for name in (name for name in names if name in new or name in published):
            one, other = new.get(name, "none"), published.get(name, "none in a record of another version")
            if not isinstance(one, dict) or not isinstance(other, dict):
                one, other = {"": one}, {"": other}
            for key in {**one, **other}:
                yield _words(one.get(key, "none"), other.get(key, "none"), f"{name} {key}".strip())


def _settings(made: Files, old: Files) -> Iterator[Difference]:
    """What the numbers depend on, and with what they are compared."""
    return _of_records(made, old, ("parameters", "values", "tolerances"))


def _sentences(made: Files, old: Files) -> Iterator[Difference]:
    return _of_records(made, old, ("headline", "where"))


def _hashes(made: Files, old: Files) -> Iterator[Difference]:
    """Whether the published files are those that their record is of."""
    for file in _named(old, ".json"):
        for name, digest in json.loads(old[file]).get("files", {}).items():
            if name in old and sha256(old[name]) != digest:
                yield Difference(math.inf, name, "made", "one that its record is not of")


# ---- tables ----------------------------------------------------------------------------------------------


def _tables(made: Files, old: Files) -> Iterator[Difference]:
    """Every value of every row. Of a quantity without tolerance of its own the last digit may differ."""
    for file in _named(made, ".csv"):
        if made[file] == old[file]:
            continue
        record = json.loads(made.get(file.replace(".csv", ".json"), b"{}"))
        values = record.get("values", ())
        tolerances = {quantity: Tolerance(**both) for quantity, both in record.get("tolerances", {}).items()}
        tables = [csv.DictReader(io.StringIO(files[file].decode())) for files in (made, old)]
        columns = [", ".join(table.fieldnames or ()) for table in tables]
        rows = [{}, {}]
        for found, table in zip(rows, tables, strict=True):
            for row in table:
                key = tuple(row[name] for name in row if name not in values)
                while key in found:
                    key = (*key, "again")
                found[key] = row
        if columns[0] != columns[1]:
            yield Difference(math.inf, "columns", columns[0], f"{columns[1]} in a table of another version")
            continue
        for key in {**rows[0], **rows[1]}:
            place = f"row {', '.join(filter(None, key))}"
            one, other = (found.get(key) for found in rows)
            if one is None or other is None:
                yield Difference(math.inf, place, *("no such row" if row is None else "a row" for row in (one, other)))
                continue
            tolerance = tolerances.get(one.get("quantity", ""), Tolerance())
            for name in (name for name in one if name in values):
                yield _cell(one[name], other[name], tolerance, f"{place}, {name}")


def _cell(made: str, old: str, tolerance: Tolerance, place: str) -> Difference:
    """Two cells of a table: numbers within the tolerance, or equal words."""
    if made == old:
        return Difference(0.0, place, made, old)
    try:
        return Difference(tolerance.used(float(made), float(old)), place, made, old)
    except ValueError:
        return _words(made, old, place)


# ---- pages -----------------------------------------------------------------------------------------------


def _pages(made: Files, old: Files) -> Iterator[Difference]:
    """A page is its template, which is equal, and its data, whose ``tolerances`` are by the name of what they hold."""
    for file in _named(made, ".html"):
        if made[file] == old[file]:
            continue
        pages = [files[file].decode() for files in (made, old)]
        if DATA.sub("", pages[0]) != DATA.sub("", pages[1]):
            yield Difference(math.inf, file, "another template", "the published one")
            continue
        data = [json.loads(DATA.search(page)[0]) for page in pages]
        tolerances = {name: Tolerance(**both) for name, both in data[0].get("tolerances", {}).items()}
        yield from _data(*data, file, Tolerance(), tolerances)


def _data(
    made: Any, old: Any, place: str, tolerance: Tolerance, named: Mapping[str, Tolerance]
) -> Iterator[Difference]:
    """The tolerance of a name holds for all that lies below it."""
    if made == old:
        return
    kinds = {type(made), type(old)}
    if kinds == {dict} and made.keys() == old.keys() or kinds == {list} and len(made) == len(old):
        for key in made if isinstance(made, dict) else range(len(made)):
            yield from _data(made[key], old[key], f"{place}, {key}", named.get(key, tolerance), named)
    elif kinds == {str} and made.startswith(PICTURE) and old.startswith(PICTURE):
        pixels = (base64.b64decode(address.partition(",")[2]) for address in (made, old))
        yield _regions(*pixels, place, tolerance if tolerance.absolute > 1 else LEVELS)
    elif kinds == {str}:  # a sentence; its numbers are compared among the data
        yield _words(DIGITS.sub("", made), DIGITS.sub("", old), place)
    elif kinds <= {int, float}:
        yield Difference(tolerance.used(made, old), place, made, old)
    else:
        yield _words(*(", ".join(x) if isinstance(x, dict) else x for x in (made, old)), place)


# ---- pictures --------------------------------------------------------------------------------------------


def _pictures(made: Files, old: Files) -> Iterator[Difference]:
    """Words and colours of drawings; and pixels, but where the table beside them has other numbers."""
    for file in _named(made, ".svg"):
        if made[file] != old[file]:
            drawings = [files[file].decode() for files in (made, old)]
            for one, other in zip_longest(*map(_words_of, drawings), fillvalue="none"):
                yield _words(one, other, f"{file}, words")
            yield _words(*map(_colours, drawings), f"{file}, colours")
    moved = any(made[file] != old[file] for file in _named(made, ".csv"))
    for file in (*_named(made, ".webp"), *(() if moved else _named(made, ".png"))):
        if made[file] != old[file]:
            yield _regions(made[file], old[file], file, LEVELS)


def _words_of(svg: str) -> list[str]:
    """The texts of a drawing, which matplotlib writes as comments above their outlines, without their numbers."""
    return [words for text in re.findall(r"<!-- (.*?) -->", svg) if (words := DIGITS.sub("", text).strip())]


def _colours(svg: str) -> str:
    return " ".join(sorted(set(re.findall(r"(?:fill|stroke): (#\w+)", svg))))


def _regions(made: bytes, old: bytes, place: str, tolerance: Tolerance) -> Difference:
    """The region, of any frame, whose mean colour differs most."""
    one, other = regions(made), regions(old)
    if one.shape != other.shape:
        return _words(*("{} × {} × {} regions".format(*x.shape) for x in (one, other)), f"{place}, frames and sizes")
    apart = np.abs(one - other)
    at = np.unravel_index(apart.argmax(), apart.shape)
    used = round(float(apart[at]) / tolerance.absolute, 6)
    place = f"{place} at {BLOCK * at[2]}, {BLOCK * at[1]}"
    return Difference(used, place, f"level {one[at]:.0f}", f"{other[at]:.0f} of 255")
