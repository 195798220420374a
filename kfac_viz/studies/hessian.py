"""How far the two Fishers are from the Hessian over training, and whose step lowers the loss most."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor

from .. import Hessian, Partition, show
from ..method.decompositions import eigh, eigvalsh
from ..parameters import Device, Examples, Repeats, Seed, Steps, Widths, check, number
from ..problems import Problem
from ..show import INK, CurveView, MatrixView, Style, Tolerance, limit_of, plain_numbers
from .common.exercises import exercise
from .common.result import PRECISION, Curve, Study, by_key, curve, over_seeds, seeds
from .common.setting import DAMPINGS, OVER_DAMPINGS, chosen, first_network, setting
from .damping import losses_after
from .fisher import FLAVOURS

MOMENTS = (0, 10, 20, 50, 100, 200, 500)  # steps of training at which all is measured
COMPARED = DAMPINGS.positions[::3]
MATRICES = ("exact", "empirical", "hessian")
MARGIN = 1.1  # λ over |d_min|: nearer to it the Hessian's step is long beyond use, and decided by rounding


@dataclass(frozen=True, eq=False)
class Result(Study):
    """By quantity, over steps of training: ``distance``, ‖B − H‖ / ‖H‖ of each Fisher B from the Hessian H;
    ``negative``, the negative eigenvalues' share of Σ|d|, of ``hessian`` and of its ``blocks`` (the layers alone);
    ``between``, what of ‖R‖² lies between layers, R = H − F the residual term; ``best``, the share of the loss that a
    step takes off at its best λ. After ``steps`` steps: ``spectrum`` over rank, in absolute values, of those above and
    of those below zero (``negative``); ``decrease`` over λ, the share of the loss that the step ``(B + λI)⁻¹ g`` takes
    off. The Hessian has such a step where ``H + λI`` is positive definite, and its curve begins there.
    """

    tolerances = {
        "distance": Tolerance(relative=5e-3, absolute=1e-3),
        "negative": Tolerance(relative=1e-2, absolute=1e-3),
        "between": Tolerance(relative=5e-3, absolute=1e-3),
        "best": Tolerance(relative=2e-2, absolute=5e-3),
        "decrease": Tolerance(relative=2e-2, absolute=1e-2),
        "spectrum": Tolerance(relative=2e-2, absolute=100 * PRECISION),
    }

    partition: Partition
    matrices: dict[str, Tensor]  # of the first network after ``steps`` steps, (P, P)

    @property
    def headline(self) -> str:
        distance, at = self.of("distance")["exact"].y, MOMENTS.index(100)
        fisher, newton = (self.of("best")[name].y[at] for name in ("exact", "hessian"))
        return (f"The Fisher misses {distance[0]:.2f} of the untrained Hessian, {distance[at]:.2f} after 100 steps; "
                f"its step lowers the loss {'more' if fisher > newton else 'less'}")  # fmt: skip


def run(
    *,
    damping: Annotated[float, DAMPINGS] = 1e-2,
    steps: Steps = 20,
    data: Literal["digits4", "digits8"] = "digits4",
    widths: Widths = (12, 12, 12),
    n: Examples = 500,
    repeats: Repeats = 5,
    seed: Seed = 0,
    device: Device = "cpu",
) -> Result:
    """Compare the exact and the empirical Fisher with the Hessian while a network is trained.

    Args:
        damping: λ, marked in the curves.
        steps: of Adam, after which matrices, spectra and steps are shown.
        data: digits pooled to 4×4 pixels, or in full.
        seed: of data and weights.
    """
    p = check(run, locals())
    training = [_over_training(chosen(p, seed=s, steps=0)) for s in seeds(p)]
    here = by_key(_measured(chosen(p, seed=s))[0] for s in seeds(p))
    curves = {key: _over_rank(rows) if key[0] == "spectrum" else _where_all_have_it(rows) for key, rows in here.items()}
    partition, matrices = _matrices(chosen(p))
    matrices = matrices | {"residual": matrices["hessian"] - matrices["exact"]}
    shown = {name: matrix.cpu() for name, matrix in matrices.items()}
    return Result(p, curves | over_seeds(MOMENTS, training), partition, shown)


@lru_cache(maxsize=2)
def _stages(start: tuple) -> dict[int, Problem]:
    """The network after each number of steps in MOMENTS, from one run of its training."""
    return dict(zip(MOMENTS, setting(*start).problem.stages(MOMENTS), strict=True))


def _problem(network: tuple) -> Problem:
    steps = network[4]
    return _stages(_after(network, 0))[steps] if steps in MOMENTS else setting(*network).problem


def _after(network: tuple, steps: int) -> tuple:
    """The same network after another number of steps."""
    return (*network[:4], steps, *network[5:])


@lru_cache(maxsize=len(MOMENTS) + 1)
def _matrices(network: tuple) -> tuple[Partition, dict[str, Tensor]]:
    """The two Fishers and the Hessian of one network, (P, P)."""
    problem = _problem(network)
    H = Hessian(problem.model, problem.inputs, problem.targets, likelihood=problem.likelihood)
    exact, empirical = (problem.capture(flavour).dense() for flavour in ("exact", "empirical"))
    return H.partition, {"exact": exact, "empirical": empirical, "hessian": H.dense()}


@lru_cache(maxsize=64)
def _measured(network: tuple) -> tuple[dict[tuple[str, str], np.ndarray], dict[tuple[str, str], float]]:
    """Of one network: spectra, (P,) each, and the share of the loss that a step takes off at each λ, NaN where there is
    no step; and the numbers that are followed over training."""
    problem, (partition, matrices) = _problem(network), _matrices(network)
    g, now, found, numbers = problem.gradient(), float(problem.loss().detach()), {}, {}
    λ = torch.tensor(COMPARED, dtype=g.dtype, device=g.device)
    for name, B in matrices.items():
        d, U = eigh((B + B.mT) / 2, f"The matrix {NAMES[name]}")
        steps = (U @ ((U.mT @ g)[:, None] / (d[:, None] + λ))).mT
        numbers["negative", name] = negative_share(d)
        d = d.flip(0).cpu().numpy()
        seen = np.where(np.abs(d) < PRECISION * d[0], 0, d)
        found["spectrum", name] = np.maximum(seen, 0)
        if name == "hessian":
            found["spectrum", "negative"] = np.maximum(-seen[::-1], 0)
        there = np.array(COMPARED) > MARGIN * max(-float(d[-1]), 0.0)
        after = np.full(len(COMPARED), np.nan)
        after[there] = list(losses_after(problem, steps[there]))
        found["decrease", name] = np.maximum(1 - after / now, -1e3)
        numbers["best", name] = float(np.nanmax(found["decrease", name]))
    exact, empirical, H = (matrices[name] for name in MATRICES)
    R = H - exact
    shares = R.square() / R.square().sum()
    blocks = torch.cat([eigvalsh(H[s, s], "A block of the Hessian") for s in partition.slices])
    return found, {
        ("distance", "exact"): float(R.norm() / H.norm()),
        ("distance", "empirical"): float((empirical - H).norm() / H.norm()),
        ("negative", "hessian"): numbers["negative", "hessian"],
        ("negative", "blocks"): negative_share(blocks),
        ("between", "residual"): 1 - float(sum(shares[s, s].sum() for s in partition.slices)),
        **{("best", name): numbers["best", name] for name in MATRICES},
    }


def _over_training(start: tuple) -> dict[tuple[str, str], list[float]]:
    """What is followed over training, one number for each of MOMENTS."""
    return by_key(_measured(_after(start, steps))[1] for steps in MOMENTS)


def negative_share(d: Tensor) -> float:
    """``Σ|d| over d < 0, as a share of Σ|d|``."""
    return float(-d.clamp_max(0).sum() / d.abs().sum())


def _over_rank(rows: list[np.ndarray]) -> Curve:
    return curve(1 + np.arange(len(rows[0])), rows)


def _where_all_have_it(rows: list[np.ndarray]) -> Curve:
    """Over λ, from the least at which every seed has a step."""
    there = ~np.isnan(rows).any(0)
    return curve(np.array(COMPARED)[there], np.array(rows)[:, there])


# ---- the picture --------------------------------------------------------------------------------------

HESSIAN = Style("Hessian", "#332288", "D", "-")
SERIES = {"hessian": HESSIAN, "exact": FLAVOURS["exact"], "empirical": FLAVOURS["empirical"]}
OTHERS = {
    "negative": Style("negative eigenvalues", "#CC6677", "v", ":"),
    "blocks": Style("Hessian, layers alone", "#88CCEE", "s", "--"),
    "residual": Style("‖R‖² between layers", "#999933", "^", "-."),
}
NAMES = {"exact": "exact Fisher F", "empirical": "empirical Fisher", "hessian": "Hessian H", "residual": "R = H − F"}


class Plot(show.Plot):
    """Four matrices and their spectra above; what training makes of them, and of their steps, below."""

    size = (10.0, 5.6)

    def build(self, result: Result) -> None:
        upper, lower = self.figure.add_gridspec(2, 1)
        *maps, spectra = (self.figure.add_subplot(place) for place in upper.subgridspec(1, 5))
        axes = [self.figure.add_subplot(place) for place in lower.subgridspec(1, 4)]
        self.matrices = {name: self.add(MatrixView(ax, result.partition, NAMES[name], pixels=130, logarithmic=False))
                         for ax, name in zip(maps, NAMES, strict=True)}  # fmt: skip
        for ax in maps[1:]:
            ax.set_ylabel("")
        spectrum = SERIES | {"negative": OTHERS["negative"]}
        self.spectrum = self.add(CurveView(
            spectra, spectrum, result.of("spectrum"), "Spectra, |d|", x="rank (triangle: less)",
            xlim=(0.9, 1.1 * result.partition.size), ylim=(1e-8, 100),
        ))  # fmt: skip
        training = {"x": "steps of training", "xlim": (0, MOMENTS[-1]), "scale": ("linear", "linear")}
        below = {  # quantity: series, title, ends
            "distance": (SERIES, "‖B − H‖ / ‖H‖", (0, 1.05)),
            "negative": (SERIES | OTHERS, "Negative share of Σ|d|", (0, 1.05)),
            "best": (SERIES, "Loss taken off, best λ", (0, 1)),
        }
        self.training = {
            quantity: self.add(CurveView(ax, series, _shown(result, quantity), title, ylim=ends, **training))
            for ax, (quantity, (series, title, ends)) in zip(axes, below.items(), strict=False)
        }
        for view in self.training.values():
            view.ax.set_xscale("symlog", linthresh=10)
            plain_numbers(view.ax.xaxis, (0, 10, 100, 500))
            view.ax.set_yticks([0, 0.5, 1])
        self.decrease = self.add(CurveView(
            axes[3], SERIES, result.of("decrease"), "Loss taken off, over λ", ylim=(-1, 1), scale=("log", "linear"),
            **OVER_DAMPINGS,
        ))  # fmt: skip
        plain_numbers(axes[3].xaxis, (1e-4, 1e-2, 1, 100))
        axes[3].axhline(0, color=INK, linewidth=0.6)
        shares = self.training["negative"].lines
        self.legend([*self.spectrum.lines.values(), shares["blocks"], shares["residual"]], 6)

    def note(self, result: Result) -> str:
        return f"; colours end at ±{number(self._limit(result), 2)}"

    def _limit(self, result: Result) -> float:
        return limit_of(result.matrices["hessian"] / 5)

    def move(self, result: Result) -> None:
        p, limit = result.parameters, self._limit(result)
        for name, view in self.matrices.items():
            view.update(result.matrices[name], limit)
        self.spectrum.update(result.of("spectrum"))
        for quantity, view in self.training.items():
            view.update(_shown(result, quantity), at=min(p["steps"], MOMENTS[-1]))
        self.decrease.update(result.of("decrease"), at=p["damping"])


def _shown(result: Result, quantity: str) -> dict[str, Curve]:
    """The curves of one axes: the share of R between layers goes with that of negative curvature."""
    return result.of(quantity) | (result.of("between") if quantity == "negative" else {})


# ---- the exercises ------------------------------------------------------------------------------------


@exercise("01c", "Along an eigenvector with the eigenvalue d the matrix H + λI has the curvature d + λ.", 0.01)
def _damping_that_mends_the_hessian() -> float:
    s = first_network(steps=20)
    H = Hessian(s.problem.model, s.problem.inputs, s.problem.targets, likelihood=s.problem.likelihood)
    return -float(H.eigen.d[0])


@exercise("01d", "In whose parameters are the outputs linear?")
def _parameters_without_residual_term() -> float:
    return float(first_network(steps=20).F.partition.layers[-1].size)
