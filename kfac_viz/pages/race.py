"""Four methods solve one differential equation, as one HTML file: sliders over runs that were trained beforehand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..parameters import number
from ..show import Tolerance
from ..show.files import folder
from ..show.page import address, nearest, write_page
from ..studies import pde
from ..studies.pde import AXES, DECADES, EQUATIONS, LIVE, STYLES, run_of

SIZES = (0, 1, 2, 4, 8, 16, 32, 64)  # columns per layer
EVERY = 4  # steps between two pictures
TEMPLATE = Path(__file__).with_name("race.html")
TOLERANCES = {  # as in the table; where two runs have parted, so have the pictures
    "errors": pde.Result.tolerances["error"],
    "fields": Tolerance(absolute=180),
}


def save_race(run: Callable[..., pde.Result], name: str, out_dir: str | Path, **choices: Any) -> Path | None:
    """Write NAME.html, a page that a browser opens without Python: sliders for the columns and for the steps taken.

    Args:
        run: ``pde.run``.
        out_dir: folder, made if it is missing; empty to compute and write nothing.
        choices: parameters of ``run``; ``per_layer`` and ``at_step`` say where the sliders start.
    """
    if (out := folder(out_dir)) is None:
        return None
    first = run(**choices)
    p = first.parameters
    shown = [*range(0, p["steps"], EVERY), p["steps"]]
    runs = {f"{method} {size}": [run_of(p, method, size, at_step) for at_step in shown] for method in LIVE
            for size in (SIZES if method in ("coarse", "both") else (0,))}  # fmt: skip
    data = {
        "where": f"{EQUATIONS[p['equation']][0]}: {first.sizes[0]} parameters, {first.sizes[1]} points, "
                 f"damping λ = {number(p['damping'], 1)}",
        "sizes": SIZES,
        "shown": shown,
        "start": [nearest(SIZES, p["per_layer"]), nearest(shown, p["at_step"])],
        "methods": [[key, STYLES[key].label, STYLES[key].color] for key in LIVE],
        "axes": [name.strip("$") for name in AXES[p["equation"]]],
        "solution": _picture(first.solution, first.solution.min(), first.solution.max(), "viridis"),
        "errors": {name: [float(f"{x:.3g}") for x in found[0].errors] for name, found in runs.items()},
        "fields": {name: [_picture(np.log10(np.abs(x.field).clip(1e-16)), -DECADES, 0, "magma") for x in found]
                   for name, found in runs.items()},
    }  # fmt: skip
    return write_page(TEMPLATE, data, name, out, TOLERANCES)


def _picture(values: NDArray, low: float, high: float, palette: str, levels: int = 28) -> str:
    """A field as a small picture in a data address, in so many shades."""
    return address(np.round(((values - low) / (high - low)).clip(0, 1) * levels) / levels, palette)
