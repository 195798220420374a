"""The playground as one HTML file: no kernel and no network, two sliders over frames computed beforehand."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..parameters import check, number, read
from ..show import METHODS, Tolerance, limit_of
from ..show.files import folder, put
from ..show.page import nearest, write_page
from ..show.parts import frame
from ..studies import coarse_space
from ..studies.coarse_space import CEILING, FLOOR, ORDER, stretched

SIZES = (0, 1, 2, 4, 8, 16)
MOVING = (1000, 560)  # pixels of the moving picture
TEMPLATE = Path(__file__).with_name("playground.html")
TOLERANCES = {  # three digits are kept of most
    "captured": Tolerance(absolute=1e-3),
    "best": Tolerance(absolute=2e-3),
    "errors": Tolerance(absolute=0.2),
    "spectra": Tolerance(relative=1e-2),
}


def save_page(run: Callable[..., coarse_space.Result], name: str, out_dir: str | Path, **choices: Any) -> Path | None:
    """Write NAME.html, a page that a browser opens without Python: sliders for λ and the size of the coarse space.

    Args:
        run: ``coarse_space.run``.
        out_dir: folder, made if it is missing; empty to compute and write nothing.
        choices: parameters of ``run``; ``damping`` and ``per_layer`` say where the sliders start.
    """
    if (out := folder(out_dir)) is None:
        return None
    choices = check(run, choices)
    dampings = read(run)["damping"].range.positions[10::3]
    damping, per_layer = choices.pop("damping"), choices.pop("per_layer")
    columns = [[run(damping=x, per_layer=size, **choices) for size in SIZES] for x in dampings]
    first = columns[0][0]
    P, correction = first.partition.size, choices["correction"]
    ranks = np.unique(np.concatenate([np.geomspace(1, P, 16), P + 1 - np.geomspace(1, P, 16)]).round().astype(int))
    data = {
        "dampings": dampings,
        "sizes": SIZES,
        "start": [nearest(np.log(dampings), np.log(damping)), nearest(SIZES, per_layer)],
        "edges": [edge / P for edge in first.partition.offsets],
        "layers": [str(layer) for layer in first.partition.layers],
        "methods": [[METHODS[key].label, METHODS[key].color] for key in ORDER],
        "lines": [[METHODS[first.first].label, METHODS[first.first].color], ["two-level", METHODS[correction].color]],
        "axis": [FLOOR, CEILING],
        "ranks": [round(float(x), 4) for x in stretched(ranks, P) / stretched(P, P)],
        "fisher": frame(first.fisher, limit_of(first.fisher)),
        "blocks": frame(first.blocks, limit_of(first.fisher)),
        "limit": number(limit_of(first.fisher), 2),
        "missed": [frame(column[0].missed, limit_of(column[0].missed)) for column in columns],
        "limits": [number(limit_of(column[0].missed), 2) for column in columns],
        "views": [[_view(result, correction, ranks) for result in column] for column in columns],
    }  # fmt: skip
    return write_page(TEMPLATE, data, name, out, TOLERANCES)


def save_moving(run: Callable[..., coarse_space.Result], name: str, out_dir: str | Path, **choices: Any) -> Path | None:
    """Write NAME.webp, a moving picture in which the coarse space grows from nothing to 16 columns per layer.

    Args:
        run: ``coarse_space.run``.
        out_dir: folder, made if it is missing; empty to compute and write nothing.
        choices: parameters of ``run``; that of ``per_layer`` is not used.
    """
    if (out := folder(out_dir)) is None:
        return None
    from PIL.Image import Resampling

    from ..show.live import Live

    choices.pop("per_layer", None)
    results = [run(per_layer=size, **choices) for size in SIZES]
    live = Live(coarse_space.Plot(results[0]))
    frames = []
    for result in results:
        frames.append(live.picture(result).resize(MOVING, Resampling.LANCZOS))
    buffer = io.BytesIO()
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:], loop=0, quality=80, method=4,
                   duration=[1200] * (len(frames) - 1) + [3000])  # fmt: skip
    return put({f"{name}.webp": buffer.getvalue()}, out)[0]


def _view(result: coarse_space.Result, correction: str, ranks: np.ndarray) -> dict[str, Any]:
    """What one position of the two sliders shows."""
    return {
        "added": frame(result.added, limit_of(result.missed)),
        "title": result.headline,
        "where": result.where,
        "captured": [result.captured[name] for name in ORDER],
        "best": [round(result.at_best_length[name], 3) for name in ORDER],
        "errors": [round(100 * result.errors[name], 1) for name in ("blocks", result.first, correction)],
        "spectra": [[float(f"{x:.3g}") for x in values.numpy()[ranks - 1]] for values in result.spectra.values()],
    }
