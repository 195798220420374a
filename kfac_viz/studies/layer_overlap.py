"""How many layers take the same step: why steps that are right for each layer are too long for all of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch

from .. import BlockDiagonal, Dense, Partition, show
from ..method.decompositions import eigvalsh
from ..parameters import Device, Examples, Repeats, Seed, Steps, Widths, check, number
from ..show import INK, METHODS, CurveView, MapView, Style, Tolerance, plain_numbers
from .common.exercises import crossing, exercise
from .common.result import SHARES, Curve, Study, over_seeds, rounded, seeds
from .common.setting import DAMPINGS, OVER_DAMPINGS, Data, Setting, chosen, setting, shares

if TYPE_CHECKING:
    from numpy.typing import NDArray

STAGES = ("untrained", "trained")
COMPARED = DAMPINGS.positions[::4]


@dataclass(frozen=True, eq=False)
class Result(Study):
    """Curves over λ for the two stages: ``layer_overlap``; of the step of exact layer blocks its ``length``, the best
    factor, what it captures as it is (``captured``) and at that length (``at_best_length``); and ``inverse``,
    ``1 / λ_max(M A)`` with M the exact blocks: no more than 1/overlap, no less than 1/(1 + overlap), and below the best
    factor, since ``vᵀA v ≤ λ_max(M A) gᵀv`` for v = M g.

    Attributes:
        pairs: for each stage, how many of each two layers take the same step at λ, (L, L): the largest eigenvalue of
            ``H_l + H_m``, where λ is small 1 plus the cosine of the angle between what they can do to the outputs.
        layers: L.
    """

    tolerances = SHARES | {
        "layer_overlap": Tolerance(relative=2e-3),
        "length": Tolerance(absolute=1e-3),
        "inverse": Tolerance(absolute=1e-3),
    }

    pairs: Mapping[str, NDArray]
    layers: int

    @property
    def headline(self) -> str:
        λ = self.parameters["damping"]
        first, then = (number(round(self.curves["layer_overlap", stage].at(λ), 1)) for stage in STAGES)
        before, after = (number(round(1 / self.curves["length", stage].at(λ), 1)) for stage in STAGES)
        return (f"{first} of {self.layers} layers take the same step, {then} after training: exact blocks step "
                f"{before} and {after} times too far")  # fmt: skip


def run(
    *,
    damping: Annotated[float, DAMPINGS] = 1e-2,
    data: Data = "digits4",
    widths: Widths = (10, 10, 10, 10, 10),
    steps: Steps = 300,
    n: Examples = 500,
    repeats: Repeats = 5,
    seed: Seed = 0,
    device: Device = "cpu",
) -> Result:
    """Count the layers that take the same step, over λ, before and after training.

    Args:
        damping: λ, marked in the curves, and that of the maps.
        steps: of Adam that count as training.
    """
    p = check(run, locals())
    networks = [[chosen(p, seed=s, steps=k) for k in (0, p["steps"])] for s in seeds(p)]
    curves = over_seeds(COMPARED, (_measure(*pair) for pair in networks))
    pairs = {stage: _pairs(setting(*network), damping) for stage, network in zip(STAGES, networks[0], strict=True)}
    return Result(p, curves, pairs, len(pairs["trained"]))


@lru_cache(maxsize=64)
def _measure(*networks: tuple) -> dict[tuple[str, str], list[float]]:
    """Every curve of one network at the two stages."""
    found = defaultdict(list)
    for stage, network in zip(STAGES, networks, strict=True):
        s = setting(*network)
        M = BlockDiagonal(s.matrix, 1.0)
        for λ in COMPARED:
            A = s.matrix.damped(λ)
            v = M.with_damping(λ) @ s.g
            both, overlap = shares(A, s.g, v), A.layer_overlap()
            numbers = {
                "layer_overlap": overlap,
                "inverse": 1 / Dense(A.dense(), A.partition).solver.layer_overlap(0.0),
                "length": float(s.g @ v) / float(v @ (A @ v)),
                "captured": both.captured,
                "at_best_length": both.at_best_length,
            }
            for quantity, x in numbers.items():
                found[quantity, stage].append(x)
    return found


@lru_cache(maxsize=64)
def _pairs(s: Setting, damping: float) -> NDArray:
    """The largest eigenvalue of ``H_l + H_m``, (L, L); of ``H_l`` alone on the diagonal."""
    slices = s.F.partition.slices
    found = np.empty((len(slices), len(slices)))
    for l in range(len(slices)):
        for m in range(l + 1):
            which = sorted({l, m})
            kept = torch.cat([torch.arange(len(s.dense), device=s.dense.device)[slices[i]] for i in which])
            layers = Partition.from_sizes([slices[i].stop - slices[i].start for i in which])
            found[l, m] = found[m, l] = Dense(s.dense[kept][:, kept], layers).damped(damping).layer_overlap()
    return rounded(found, 3)


# ---- the picture --------------------------------------------------------------------------------------

BLOCKS = METHODS["block-diagonal"].color
LINES = {stage: Style(stage, INK, "o", line) for stage, line in zip(STAGES, (":", "-"), strict=True)}
STEPS = {stage: Style(f"exact blocks, {stage}", BLOCKS, "s", style.line) for stage, style in LINES.items()}
INVERSE = {
    f"inverse, {stage}": Style(f"its least, 1 / λ_max(MA), {stage}", INK, "", style.line)
    for stage, style in LINES.items()
}


class Plot(show.Plot):
    """Overlap, lengths and captured decrease over λ above; pairs of layers below."""

    size = (10.0, 6.6)
    fixed = ("layers",)

    def build(self, result: Result) -> None:
        grid = self.figure.add_gridspec(2, 1, height_ratios=(1, 1.05))
        above, below = (grid[i].subgridspec(1, k) for i, k in ((0, 4), (1, 2)))
        axes = [self.figure.add_subplot(above[i]) for i in range(4)]
        curves = {  # series, title, and ends of the upright axis
            "layer_overlap": (LINES, "Overlap of layers", (0, result.layers + 0.4)),
            "length": (INVERSE | STEPS, "Best factor of the step", (0, 1.05)),
            "captured": (STEPS, "Captured as it is", (-2, 1.05)),
            "at_best_length": (STEPS, "Captured, best length", (0, 1.05)),
        }
        self.views = {
            quantity: self.add(CurveView(ax, series, shown(result, quantity), title, ylim=ends, scale=("log", "linear"),
                                         **OVER_DAMPINGS))
            for ax, (quantity, (series, title, ends)) in zip(axes, curves.items(), strict=True)
        }  # fmt: skip
        axes[0].axhline(result.layers, color=INK, linewidth=0.6)
        axes[2].axhline(0, color=INK, linewidth=0.6)
        for ax in axes:
            plain_numbers(ax.xaxis, (1e-4, 1e-2, 1, 100))
        lines = self.views["length"].lines
        self.legend([*self.views["layer_overlap"].lines.values(), *(lines[name] for name in (*STEPS, *INVERSE))], 3)
        self.maps = {
            stage: self.add(MapView(
                self.figure.add_subplot(below[i]), _points(result.pairs[stage]),
                f"Overlap of two layers, {stage}", x="layer", y="layer", limits=(0, 2), palette="Purples",
            )) for i, stage in enumerate(STAGES)
        }  # fmt: skip

    def move(self, result: Result) -> None:
        for quantity, view in self.views.items():
            view.update(shown(result, quantity), at=result.parameters["damping"])
        for stage, view in self.maps.items():
            view.update(_points(result.pairs[stage]))


def shown(result: Result, quantity: str) -> dict[str, Curve]:
    """The curves of one axes: the best factor goes with what the number of layers alone would say."""
    inverse = {f"inverse, {stage}": c for stage, c in result.of("inverse").items()} if quantity == "length" else {}
    return result.of(quantity) | inverse


def _points(pairs: NDArray) -> list[tuple[str, str, float]]:
    return [(str(l + 1), str(m + 1), float(x)) for (l, m), x in np.ndenumerate(pairs)]


# ---- the exercises ------------------------------------------------------------------------------------


@exercise("09a", "A projection has the eigenvalues 0 and 1. What has twice one, and what if another is added across?")
def _two_pairs_of_equal_layers() -> float:
    first, second = np.diag([1.0, 0.0]), np.diag([0.0, 1.0])
    return float(eigvalsh(torch.from_numpy(first + first + second + second), "The sum")[-1])


@exercise("09b", "One layer takes c / (c + λ) of the residual away; two take twice as much.", 0.01)
def _damping_where_two_do_half_too_much() -> float:
    return crossing(lambda share: 2 / (1 + share) - 1.5, -3, 3)
