"""Tables that ``make bench`` has written: their rows, and the runs of which these tell."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Collection, Iterable
from functools import cache
from math import inf, nan
from pathlib import Path

import numpy as np

from ...checkout import ROOT, check_checkout
from ...show import Curve
from .result import curve, rounded

Row = dict[str, str]
Run = list[Row]  # what was written while it went on
TUNING_SEED = "99"  # of the runs that choose rates and λ, and are not shown
MEASURED = ROOT / "figures" / "benchmarks"


def rows_of(table: Path) -> list[Row]:
    """The rows of a CSV file."""
    with table.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@cache
def measured_rows(name: str) -> list[Row]:
    """The rows of a table that ``make bench`` has written; a ValueError says which is missing."""
    if not (MEASURED / name).exists():
        check_checkout("Measured tables")
        raise ValueError(f"There are no timings in figures/benchmarks/{name}; measure them with make bench.")
    return rows_of(MEASURED / name)


@cache
def seeds_in(*tables: str) -> str:
    """How many seeds are shown of each run, "5", or where tables differ "3 to 5"."""
    found = [len({row["seed"] for row in measured_rows(name)} - {TUNING_SEED}) for name in tables]
    return " to ".join(map(str, sorted({min(found), max(found)})))


def grouped(rows: Iterable[Row], *names: str) -> dict[tuple[str, ...], list[Row]]:
    """The rows by what they say in these columns, in the order in which they come."""
    found: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        found[tuple(row[name] for name in names)].append(row)
    return dict(found)


@cache
def measured_runs(name: str, *names: str, tuning: bool = False) -> dict[tuple[str, ...], dict[str, Run]]:
    """The runs of a measured table by these columns, and then by their seed: those that are shown, or the tuning."""
    kept = [row for row in measured_rows(name) if (row["seed"] == TUNING_SEED) == tuning]
    return {
        key: {seed: run for (seed,), run in grouped(rows, "seed").items()}
        for key, rows in grouped(kept, *names).items()
    }


def loss_of(row: Row, of: str = "loss") -> float:
    """The loss of a measured row, or its ``test_loss``; inf where the run had blown up, NaN where none was measured."""
    told = row[of] or nan
    return inf if told == "nan" else float(told)


def last_losses(runs: Iterable[Run], of: str = "loss") -> tuple[float, float, float]:
    """Median, least and largest of the last losses."""
    losses = [loss_of(run[-1], of) for run in runs]
    return tuple(map(float, rounded([np.median(losses), min(losses), max(losses)])))


def over_runs(quantity: str, runs: Collection[Run], of: str = "loss") -> Curve:
    """The loss over a column of measured rows, such as ``step``, or ``seconds`` as they were in the median; a run that
    blew up is at the top."""
    whole = max(runs, key=len)
    losses = [[loss_of(row, of) for row in run] + [inf] * (len(whole) - len(run)) for run in runs]
    x = [np.median([float(run[i][quantity]) for run in runs if i < len(run)]) for i in range(len(whole))]
    return curve(x, np.minimum(losses, 1e6))
