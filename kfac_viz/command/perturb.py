"""Whether what is published survives other rounding: every study that computes is run again, and its words compared."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from ..checkout import ROOT
from ..problems.rounding import VARIABLE
from .prose import findings, is_there, numbers, told

ROUNDINGS = {
    "on another processor": {
        "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "OPENBLAS_CORETYPE": "Haswell",
    },
    "with inputs moved in the last bit": {VARIABLE: "1"},
}  # fmt: skip
REDRAWN = (  # from measured tables alone
    "10_depth", "11_solving", "12_training", "13_published", "14_speed", "16_which_method",
)  # fmt: skip
Cells = dict[tuple[str, ...], float]


def perturb(stems: list[str], jobs: int) -> int:
    """Run these notebooks with each of ROUNDINGS, and print what stays and what does not of the published words.

    Returns:
        0 where all of it stays, else 1.
    """
    stems, bad = [stem for stem in stems if stem not in REDRAWN], 0
    for how, variables in ROUNDINGS.items() if stems else ():
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "kfac_viz", "figures", *stems, "--out", folder, "--jobs", str(jobs)]
            bad += subprocess.run(command, env=os.environ | variables).returncode != 0
            for stem in stems:
                if not (Path(folder) / f"{stem}.json").is_file():
                    print(f"{stem} {how}: it has no record to compare")
                    continue
                found = moved(stem, Path(folder))
                bad += bool(found)
                print(f"{stem} {how}: {'; '.join(found) or 'headline and numbers stay'}", flush=True)
    return bad > 0


def moved(stem: str, folder: Path, published: Path = ROOT / "figures") -> list[str]:
    """What the figure in ``folder`` says otherwise than the published one, a sentence for each: headline and place in
    its record, and the numbers of its notebook and of README that none of the rows gives any more that gave them."""
    new, old = (json.loads((where / f"{stem}.json").read_text(encoding="utf-8")) for where in (folder, published))
    found = [f"{name}: {new.get(name)} for {old.get(name)}" for name in ("headline", "where")
             if new.get(name) != old.get(name)]  # fmt: skip
    cells, published_cells = (_cells(where / f"{stem}.csv", new["values"]) for where in (folder, published))
    for number in dict.fromkeys(numbers(" ".join([*told(stem), *(text for text, _ in findings(stem))]))):
        places = [place for place, value in published_cells.items() if is_there(number, {value})]
        if places and not any(is_there(number, {cells.get(place, math.nan)}) for place in places):
            first = places[0]
            row = ", ".join(filter(None, first))
            found.append(f"{number} in its prose: row {row}: {cells.get(first)} for {published_cells[first]}")
    return found


def _cells(table: Path, values: list[str]) -> Cells:
    """The numbers in these columns of a table, by what the others say and the column."""
    found: Cells = {}
    with table.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            key = tuple(cell for name, cell in row.items() if name not in values)
            found |= {(*key, name): float(row[name]) for name in values if row.get(name)}
    return found
