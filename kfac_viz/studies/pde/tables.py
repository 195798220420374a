"""What ``make bench ARGS=pde`` has measured: curves over columns and seconds, the map, and what a step takes.

With fewer points than parameters a network can make the residuals vanish at all of them and still be far from the
solution, so that every curve and cell that is drawn is a relative L² error on points that no run has seen.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ...show import Curve
from ..common.measured import TUNING_SEED, Run, grouped, loss_of, measured_rows
from ..common.result import curve

if TYPE_CHECKING:
    from numpy.typing import NDArray

TABLES = ("pde_runs.csv", "pde_map.csv", "pde_peers.csv")
MEASURED_COLUMNS = (4, 16, 64)  # per layer
PEERS = {  # what is trained on the peers' problem, with the names of their curves
    "K-FAC for PINNs": "kfac-pinns", "Nyström": "nystrom", "SPRING": "spring", "ENGD-W": "engd-w",
    "two levels": "ours", "exact step": "own exact", "K-FAC": "own kfac",
}  # fmt: skip
TIMES = (1, 2, 3, 5, 7, 10, 14, 20, 30, 40, 60, 80, 100, 120)  # processor seconds of these curves


@lru_cache(maxsize=1)
def measured_curves() -> dict[tuple[str, str], Curve]:
    """On every equation of small networks the last loss, ``columns``, and the last error, ``errors``, over columns per
    layer; on the peers' problem ``peers``, the error over seconds, and ``step``, seconds a step over points."""
    runs: dict[tuple[str, ...], Collection[Run]] = {}
    for key, rows in grouped(measured_rows("pde_runs.csv"), "problem", "method").items():
        tried = [(loss_of(row), row["damping"]) for row in rows if row["seed"] == TUNING_SEED]
        best = min(tried, default=(0.0, rows[0]["damping"]))[1]  # L-BFGS has nothing to tune
        kept = [row for row in rows if row["seed"] != TUNING_SEED and row["damping"] == best]
        runs[key] = grouped(kept, "seed").values()
    curves = {}
    for quantity, column in (("columns", "loss"), ("errors", "error")):
        curves |= _over_columns(quantity, {
            key: [float(run[-1][column]) for run in found] for key, found in runs.items()
        })  # fmt: skip
    return curves | _peer_curves()


def _over_columns(quantity: str, last: dict[tuple[str, ...], list[float]]) -> dict[tuple[str, str], Curve]:
    """From the last values of all runs, by equation and method: curves over columns per layer, and single points."""
    curves = {}
    for problem in dict.fromkeys(problem for problem, _ in last):
        for key, name in (("coarse", "coarse alone"), ("both", "two levels")):
            found = {k: last.get((problem, f"{name}, {k}")) for k in MEASURED_COLUMNS}
            if all(found.values()):
                curves[f"{quantity}, {problem}", key] = curve(list(found), np.array(list(found.values())).T)
        for key, name in (("kfac", "K-FAC"), ("exact", "exact"), ("lbfgs", "L-BFGS")):
            if (problem, name) in last:
                curves[f"{quantity}, {problem}", key] = curve([0], np.array(last[problem, name])[:, None])
    return curves


# ---- beside the peers ---------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def peer_runs() -> dict[tuple[int, str], dict[str, Run]]:
    """The runs on the peers' problem by points and method, and then by seed; without those that chose the setting."""
    kept = [row for row in measured_rows("pde_peers.csv") if row["seed"] != TUNING_SEED]
    return {
        (int(points), PEERS[name]): {seed: run for (seed,), run in grouped(rows, "seed").items()}
        for (points, name), rows in grouped(kept, "points", "method").items()
    }


def _peer_curves() -> dict[tuple[str, str], Curve]:
    curves, steps = {}, {}
    for (points, name), found in peer_runs().items():
        curves[f"peers, {points}", name] = curve(TIMES, [_error_at(TIMES, run) for run in found.values()])
        last = [run[-1] for run in found.values()]
        steps.setdefault(name, {})[points] = [float(row["seconds"]) / int(row["step"]) for row in last]
    for name, found in steps.items():
        at = sorted(found)
        medians, least, most = ([float(f(found[n])) for n in at] for f in (np.median, min, max))
        curves["step", name] = Curve(*map(np.array, (at, medians, least, most)))
    return curves


def _error_at(times: Collection[float], run: Run) -> NDArray:
    """The error at these seconds, between the looks at a run on logarithmic scales; one that has blown up is at 10⁶."""
    seconds, errors = (np.array([float(row[key]) for row in run]) for key in ("seconds", "error"))
    errors = np.nan_to_num(errors, nan=1e6, posinf=1e6).clip(max=1e6)
    return np.exp(np.interp(np.log(np.array(times, float)), np.log(seconds), np.log(errors)))


# ---- the map ------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """One size of network and of batch: the last error of each method at the better λ."""

    parameters: str
    points: int
    errors: dict[str, float]

    @property
    def first(self) -> str:
        return min(self.errors, key=self.errors.get)


@lru_cache(maxsize=1)
def cells() -> tuple[Cell, ...]:
    """The map, from networks and batches that grow downwards and to the right."""
    found: dict[tuple[str, int], dict[str, float]] = {}
    for row in measured_rows("pde_map.csv"):
        errors = found.setdefault((row["parameters"], int(row["points"])), {})
        errors[row["method"]] = min(float(row["error"]), errors.get(row["method"], np.inf))
    return tuple(Cell(parameters, points, errors) for (parameters, points), errors in found.items())
