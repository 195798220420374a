"""What a step costs: committed measurements, read and not repeated, beside the count of the products needed."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..parameters import Device, Seed
from .curves import Curve, Study, curve, rounded

MEASURED = Path(__file__).parents[2] / "figures" / "benchmarks"


@dataclass(frozen=True, eq=False)
class SpeedResult(Study):
    """Milliseconds per step, with the least and the largest of several rounds.

    Curves ``width``, ``depth``, ``batch`` and ``per_layer``, a series for each method, each with a counterpart such
    as ``width, counted``; and for the autoencoder of the 2020 paper ``autoencoder``, ``autoencoder, counted`` and
    ``autoencoder, alone`` (the same products, each timed by itself), with one point per method.

    Attributes:
        machine: where, and with which PyTorch, it was measured.
    """

    machine: str


def run_speed(*, seed: Seed = 0, device: Device = "cpu") -> SpeedResult:
    """Read the timings that ``make bench`` has written for this kind of device.

    Args:
        seed: of nothing here; every notebook has one.
        device: whose measurements to show.

    Raises:
        ValueError: there are none.
    """
    parameters = dict(locals())
    curves = {}
    for row in _rows(f"speed_{device}.csv"):
        curves["autoencoder", row["method"]] = _curve([row], "amortised_ms", x=None)
        for kind in ("counted", "alone"):
            if row[f"{kind}_ms"]:
                curves[f"autoencoder, {kind}", row["method"]] = curve([0], [float(row[f"{kind}_ms"])])
    growth = defaultdict(list)
    for row in _rows(f"growth_{device}.csv"):
        growth[row["axis"], row["method"]].append(row)
    for (axis, method), rows in growth.items():
        curves[axis, method] = _curve(rows, "ms")
        x = curves[axis, method].x
        curves[f"{axis}, counted", method] = curve(x, [float(row["counted_ms"]) for row in rows])
    return SpeedResult(parameters, curves, f"{row['machine']}, PyTorch {row['torch']}")


def _curve(rows: list[dict[str, str]], time: str, x: str | None = "value") -> Curve:
    columns = [[float(row[key]) for row in rows] for key in (time, "low_ms", "high_ms")]
    return Curve(np.array([float(row[x]) if x else 0.0 for row in rows]), *map(rounded, columns))


def _rows(name: str) -> list[dict[str, str]]:
    import csv

    path = MEASURED / name
    if not path.exists():
        raise ValueError(f"There are no timings in figures/benchmarks/{name}; measure them with make bench.")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
