"""Numbers in prose, and whether data files have them: what holds for the verdicts of notebooks, and for any page."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent
NUMBER = re.compile(r"(?<![\w.,−⁻-])(−?)(\d+(?:\.\d+)?)(?:·10(⁻?[⁰¹²³⁴⁵⁶⁷⁸⁹]+))?( %)?(?!\w)")
ASIDE = r"`[^`]*`|\$[^$]*\$|\b(?:19|20)\d\d\b|https?://\S+|section \S+"  # code, formulas, years, addresses, sections


def verdict(stem: str) -> str:
    """The verdict of a notebook, without its heading; empty where there is none."""
    cells = json.loads((ROOT / "notebooks" / f"{stem}.ipynb").read_text(encoding="utf-8"))["cells"]
    texts = ("".join(cell["source"]) for cell in cells)
    return next((text.removeprefix("## Verdict").strip() for text in texts if text.startswith("## Verdict")), "")


def numbers(text: str) -> list[str]:
    """The numbers of a text as they are written, without years and what stands in code and formulas.

    >>> numbers("In 2020 `x = 3` gave −0.54, 12 %, 3 layers and 1.6·10⁻⁸; see 05_coarse.")
    ['−0.54', '12 %', '3', '1.6·10⁻⁸']
    """
    return [match[0] for match in NUMBER.finditer(re.sub(ASIDE, " ", text))]


def data(files: Iterable[Path]) -> set[float]:
    """Every number in these tables (CSV) and records (JSON)."""
    found: set[float] = set()
    for file in files:
        if file.suffix == ".csv":
            with open(file, newline="", encoding="utf-8") as lines:
                for cell in (cell for row in csv.reader(lines) for cell in row):
                    try:
                        found.add(float(cell))
                    except ValueError:
                        pass
        else:
            _numbers_in(json.loads(file.read_text(encoding="utf-8")).get("parameters", {}), found)
    return found


def _numbers_in(value: object, found: set[float]) -> None:
    if isinstance(value, (int, float)):
        found.add(float(value))
    elif isinstance(value, (list, dict)):
        for one in value.values() if isinstance(value, dict) else value:
            _numbers_in(one, found)


def is_there(number: str, values: set[float]) -> bool:
    """Whether one of the values, rounded to the digits that are written, is this number.

    >>> is_there("−0.54", {-0.5431}), is_there("0.55", {0.54}), is_there("15 %", {0.1501}), is_there("2·10⁻³", {2e-3})
    (True, False, True, True)
    """
    sign, digits, power, percent = NUMBER.fullmatch(number).groups()
    exponent = int(power.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789"))) if power else 0
    decimals = len(digits.partition(".")[2])
    scale = 10.0**-exponent * (100 if percent else 1)
    wanted = float(digits) * (-1 if sign else 1)
    return any(round(value * scale, decimals) == wanted for value in values)


def unit_of(number: str) -> float:
    """One in the last digit that is written.

    >>> unit_of("−0.54"), unit_of("15 %"), unit_of("2·10⁻³")
    (0.01, 0.01, 0.001)
    """
    _, digits, power, percent = NUMBER.fullmatch(number).groups()
    exponent = int(power.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789"))) if power else 0
    return float(f"{10.0 ** (exponent - len(digits.partition('.')[2])) / (100 if percent else 1):.1e}")
