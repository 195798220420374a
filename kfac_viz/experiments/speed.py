"""What a step costs: committed measurements, read and not repeated, beside the count of the products needed."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from ..parameters import Device, Seed
from .curves import Study, curve

MEASURED = Path(__file__).parents[2] / "figures" / "benchmarks"


@dataclass(frozen=True, eq=False)
class SpeedResult(Study):
    """Milliseconds per step. Curves ``width``, ``depth``, ``batch`` and ``per_layer``, a series for each method,
    each with a counterpart such as ``width, counted``; and for the autoencoder of the 2020 paper ``autoencoder``
    and ``autoencoder, counted``, with one point per method.

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
        curves["autoencoder", row["method"]] = curve([0], [float(row["amortised_ms"])])
        if row["counted_ms"]:
            curves["autoencoder, counted", row["method"]] = curve([0], [float(row["counted_ms"])])
    points = defaultdict(list)
    for row in _rows(f"growth_{device}.csv"):
        points[row["axis"], row["method"]].append([float(row[key]) for key in ("value", "ms", "counted_ms")])
    for (axis, method), found in points.items():
        x, ms, counted = zip(*sorted(found), strict=True)
        curves[axis, method] = curve(x, ms)
        curves[f"{axis}, counted", method] = curve(x, counted)
    return SpeedResult(parameters, curves, f"{row['machine']}, PyTorch {row['torch']}")


def _rows(name: str) -> list[dict[str, str]]:
    import csv

    path = MEASURED / name
    if not path.exists():
        raise ValueError(f"There are no timings in figures/benchmarks/{name}; measure them with make bench.")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
