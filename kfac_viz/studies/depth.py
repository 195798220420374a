"""Depth: what a coarse space does for the layers of a network, where K-FAC's step has a length and a direction."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_type_hints

import numpy as np
import torch

from .. import (
    KFAC,
    BlockDiagonal,
    Damped,
    Dense,
    Diagonal,
    Identity,
    Operator,
    Partition,
    TwoLevel,
    coarse,
    show,
    spectrum,
)
from ..checkout import ROOT, check_checkout
from ..method.decompositions import cholesky
from ..parameters import Device, Examples, Range, Repeats, Rtol, Seed, Steps, check, number
from ..problems import toys as problems
from ..show import FAINT, INK, METHODS, CurveView, MapView, Style, Tolerance, plain_numbers, styled
from .common.exercises import exercise
from .common.measured import MEASURED, rows_of
from .common.options import told
from .common.result import COUNT, SHARES, Curve, Study, banded, curve, over, rounded, seeds, share, stage
from .common.setting import KFAC_BY_RULE, Setting, all_shares, iterations, largest_eigenvalue, space

if TYPE_CHECKING:
    import pandas

NOTEBOOKS = ROOT / "notebooks"
NETWORKS = {
    "planted_bn": "planted, batch norm",
    "planted": "planted",
    "planted_bn_residual": "planted, batch norm and residual",
    "planted_residual": "planted, residual",
    "digits4": "digits 4×4",
}
Network = Literal["planted_bn", "planted", "planted_bn_residual", "planted_residual", "digits4"]
LAMBDAS = Range(1e-5, 1e-1, log=True, steps=61)
MAPPED = ("none", "kfac", "leading, balanced")  # what the map over λ compares


class Case(NamedTuple):
    """One network at one stage, and one λ: what a row of the measured table is about."""

    data: str
    layers: int
    width: int
    n: int
    steps: int
    seed: int
    damping_share: float
    per_layer: int
    rtol: float


Found = dict[tuple[str, str], float]  # by quantity and series


@dataclass(frozen=True, eq=False)
class Result(Study):
    """Curves over the number of layers, a series for each method, for the network, stage and λ that are asked for.

    Quantities: the shares ``captured``, ``at_best_length`` and ``at_layer_lengths`` of :func:`.setting.shares`; the
    ``largest`` eigenvalue of M A; ``iterations`` of conjugate gradients with orthogonal residuals; ``above``, the
    number of eigenvalues of F that exceed λ; ``layer_overlap``, the largest eigenvalue of ``Σ_l H_l``,
    ``H_l = K_l (K_l + λ)⁻¹``, with ``K_l`` what layer l alone contributes to F in sample space: how many layers
    take the same step.

    Attributes:
        everywhere: the same curves by network, stage and λ: ``(data, steps, damping_share)``.
    """

    tolerances = SHARES | {
        "largest": Tolerance(relative=2e-3),
        "layer_overlap": Tolerance(relative=2e-3),
        "iterations": COUNT,
        "above": COUNT,
    }

    everywhere: Mapping[tuple[str, int, float], Mapping[tuple[str, str], Curve]]

    @property
    def headline(self) -> str:
        p, best, as_it_is = self.parameters, self.of("at_best_length"), self.of("captured")
        at = int(np.argmax(p["layers"]))
        if p["repeats"] == 1:  # rounding may change the digits of one long training, and leaves the order
            *ones, two = (best[name].y[at] for name in SEPARATED)
            more = ("no more than K-FAC", "more than K-FAC by one rule of damping", "more than K-FAC by either rule")
            return (f"{p['layers'][at]} layers, best length: {p['per_layer']} eigenvectors capture "
                    f"{more[sum(two > one for one in ones)]}")  # fmt: skip
        one, factored, two = ([share(found[name].y[at]) for found in (best, as_it_is)] for name in SEPARATED)
        return (f"{p['layers'][at]} layers: {p['per_layer']} eigenvectors capture {two[0]} (unscaled {two[1]}), K-FAC "
                f"{one[0]} ({one[1]}), factored {factored[0]} ({factored[1]})")  # fmt: skip

    @property
    def where(self) -> str:
        p = self.parameters
        published = p["measured"] and (NOTEBOOKS / p["measured"]).resolve() == MEASURED / "depth.csv"
        older = told("depth.csv") if published else ""
        return (f"{NETWORKS[p['data']]}, {p['n']} examples, width {p['width']}, {stage(p['steps'])}, "
                f"λ = {number(p['damping_share'])} λ_max; best length (unscaled), {over(p, 'median')}"
                f"{older}")  # fmt: skip

    def table(self) -> pandas.DataFrame:
        """One row per point: data, steps, damping_share, quantity, series, x, median, low, high."""
        import pandas

        columns = ["data", "steps", "damping_share", "quantity", "series", "x", "median", "low", "high"]
        rows = [(*network, *key, *point) for network, curves in self.everywhere.items()
                for key, c in curves.items() for point in zip(*c, strict=True)]  # fmt: skip
        return pandas.DataFrame(rows, columns=columns)


def run(
    *,
    damping_share: Annotated[float, LAMBDAS] = 1e-3,
    per_layer: Annotated[int, Range(1, 7)] = 4,
    layers: Annotated[tuple[int, ...], Range(2, 33)] = (2, 3, 5, 9, 17, 33),
    width: Annotated[int, Range(6, 16)] = 8,
    data: Network = "planted_bn_residual",
    networks: Annotated[tuple[Network, ...], "compared at the start and after ``steps``."] = (
        "planted_bn", "planted", "planted_bn_residual", "planted_residual",
    ),
    damping_shares: Annotated[tuple[float, ...], LAMBDAS] = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    n: Examples = 500,
    steps: Steps = 100,
    rtol: Rtol = 1e-6,
    repeats: Repeats = 5,
    measured: str = "../figures/benchmarks/depth.csv",
    seed: Seed = 0,
    device: Device = "cpu",
) -> Result:  # fmt: skip
    """Steps, and conjugate gradients on ``(F + λI) v = g``, for networks of more and more layers.

    Args:
        damping_share: λ as a share of the largest eigenvalue of F, so that every depth is asked the same.
        per_layer: leading eigenvectors, and Krylov pieces, in each layer; the constants are always one per layer.
        layers: how many Linear layers.
        width: of the hidden layers.
        data: the planted toy problem with or without batch norm and residual connections, or digits of 4×4 pixels. It
            takes both for the signal to reach the last of 33 layers, and the first.
        damping_shares: for the map of iterations over λ and depth.
        measured: table that ``make bench ARGS=depth`` has written, as seen from notebooks/; what stands there on the
            CPU is not computed again. Empty to compute everything.

    Raises:
        ValueError: ``measured`` names no file.
    """
    p = check(run, locals())
    stored = _stored(p["measured"]) if p["measured"] and device == "cpu" else {}
    grouped: dict[tuple[str, int, float], dict[tuple[str, str], list]] = defaultdict(lambda: defaultdict(list))
    for case, all_of_it in cases(p).items():
        found = stored.get(case)
        if not found or all_of_it and not whole(found):
            found = measure(case, all_of_it, device)
        for key, value in sorted(found.items(), key=lambda pair: QUANTITIES.index(pair[0][0])):
            grouped[case.data, case.steps, case.damping_share][key].append(value)
    everywhere = {
        network: {key: curve(layers, np.reshape(values, (len(layers), -1)).T) for key, values in by_series.items()}
        for network, by_series in grouped.items()
    }
    return Result(p, everywhere[p["data"], p["steps"], p["damping_share"]], everywhere)


def cases(p: Mapping[str, Any]) -> dict[Case, bool]:
    """What these parameters need, and whether all of it or the iterations of MAPPED alone."""
    networks = [(p["data"], p["steps"])]
    networks += [(data, steps) for data in p["networks"] for steps in dict.fromkeys((0, p["steps"]))]
    wanted = [(*network, p["damping_share"], True) for network in dict.fromkeys(networks)]
    wanted += [(p["data"], p["steps"], share, False) for share in p["damping_shares"] if share != p["damping_share"]]
    return {
        Case(data, depth, p["width"], p["n"], steps, seed, share, p["per_layer"], p["rtol"]): all_of_it
        for data, steps, share, all_of_it in wanted
        for depth in p["layers"]
        for seed in seeds(p)
    }


def methods(A: Damped, M: KFAC, g: torch.Tensor, per_layer: int) -> dict[str, Operator]:
    """The preconditioners that the study compares, by the name of their series: without ``per_layer``, 0, those that
    do not depend on it, and else the others."""
    F, λ = A.operator, M.damping
    if not per_layer:
        constants = TwoLevel(A, M, coarse.nicolaides(M, 1))
        return {
            "none": Identity(A),
            "diagonal": Diagonal(F, λ),
            "block-diagonal": BlockDiagonal(F, λ),
            "kfac": M,
            "factored": KFAC(M.factors, λ, "factored"),
            "constants, additive": constants.with_correction("additive"),
            "constants, balanced": constants,
        }
    leading, pieces = (TwoLevel(A, M, space(name, A, M, g, per_layer, 0)) for name in ("spectral", "krylov"))
    return {
        "leading, additive": leading.with_correction("additive"),
        "leading, a-def1": leading.with_correction("a-def1"),
        "leading, a-def2": leading.with_correction("a-def2"),
        "leading, balanced": leading,
        "krylov, balanced": pieces,
    }


@lru_cache(maxsize=64)
def _network(data: str, layers: int, width: int, n: int, steps: int, seed: int, device: str) -> Setting:
    """A network at a stage: everything that λ does not change."""
    if data == "digits4":
        problem = problems.digits([width] * (layers - 1), n, seed, side=4, device=device)
    else:
        extras = dict(batch_norm="bn" in data, residual=data.endswith("residual"))
        problem = problems.planted(layers, width, n, seed, device=device, **extras)
    trained = problem.trained(steps)
    inside = {id(p) for own in trained.partition.own_parameters(trained.model) for p in own}
    for p in trained.model.parameters():  # those of batch norm stay outside the Fisher
        p.requires_grad_(id(p) in inside)
    return Setting(trained)


def measure(case: Case, all_of_it: bool, device: str = "cpu") -> Found:
    """One number, of 4 digits, for every quantity and series; or else the iterations of MAPPED alone."""
    without = _measure(case._replace(per_layer=0), all_of_it, device)
    return without | _measure(case, all_of_it, device)


@lru_cache(maxsize=4096)
def _measure(case: Case, all_of_it: bool, device: str) -> Found:
    """Of the methods that depend on ``per_layer``, or of the others where it is 0.

    Dense throughout: quickest for some hundred parameters.
    """
    s = _network(case.data, case.layers, case.width, case.n, case.steps, case.seed, device)
    F, g, (d, U) = s.F, s.g, s.F.eigen
    λ = case.damping_share * float(d[-1])
    system = s.matrix.damped(λ)
    A = Dense(system.dense(), F.partition)
    compared = methods(system, KFAC(F, λ), g, case.per_layer)
    symmetric = [name for name, T in compared.items() if T.symmetric and (all_of_it or name in MAPPED)]
    compared |= {name: Dense(compared[name].dense(), F.partition) for name in symmetric}
    found: dict[tuple[str, str], Any] = {}
    if all_of_it:
        for name, worth in all_shares(system, g, {name: T @ g for name, T in compared.items()}).items():
            found |= {(quantity, name): value for quantity, value in worth._asdict().items()}
        L = cholesky(A.dense(), "The damped Fisher")
    for name in symmetric:
        found["iterations", name] = iterations(A, g, None if name == "none" else compared[name], case.rtol)
        if all_of_it and name != "none":
            found["largest", name] = largest_eigenvalue(compared[name].dense(), L)
    if all_of_it and not case.per_layer:
        # K_l (K_l + λ)⁻¹ = J_l (F_ll + λ)⁻¹ J_lᵀ / N: their sum has the spectrum of M F
        blocks = compared["block-diagonal"].dense()
        found["layer_overlap", "layers"] = largest_eigenvalue(blocks, U * d.clamp_min(0).sqrt())
        found["above", "eigenvalues"] = int((d > λ).sum())
    return {key: float(rounded(value)) for key, value in found.items()}


# ---- the measured table -------------------------------------------------------------------------------

QUANTITIES = ("at_best_length", "captured", "at_layer_lengths", "largest", "iterations", "above", "layer_overlap")
COLUMNS = (*Case._fields, "series", *QUANTITIES)


def rows(case: Case, found: Found) -> list[dict[str, Any]]:
    """A row of the table for each series; what was not measured is empty."""
    by_series: dict[str, dict[str, Any]] = {}
    for (quantity, series), value in found.items():
        by_series.setdefault(series, {**case._asdict(), "series": series})[quantity] = f"{value:.4g}"
    return list(by_series.values())


def whole(found: Found) -> bool:
    """Whether it is all that is measured of a case, and not the iterations alone."""
    return ("captured", "kfac") in found


def _stored(path: str) -> dict[Case, Found]:
    """What the table says, by case."""
    file = NOTEBOOKS / path
    if not file.is_file():
        check_checkout("Measured tables")
        raise ValueError(
            f"measured must name a table, as seen from notebooks/; {path!r} is none. "
            'make bench ARGS=depth writes one, and measured="" does without.'
        )
    return read(file)


def read(file: Path) -> dict[Case, Found]:
    """A table that rows of :func:`rows` were written to."""
    kinds = get_type_hints(Case).items()
    found: dict[Case, Found] = defaultdict(dict)
    for row in rows_of(file):
        case = Case(*(kind(row[name]) for name, kind in kinds))
        found[case] |= {(quantity, row["series"]): float(row[quantity]) for quantity in QUANTITIES if row[quantity]}
    return dict(found)


# ---- the picture --------------------------------------------------------------------------------------

SERIES: dict[str, Style] = {
    "none": METHODS["none"],
    "diagonal": METHODS["diagonal"],
    "block-diagonal": METHODS["block-diagonal"],
    "kfac": METHODS["kfac"],
    "factored": METHODS["factored"],
    "constants, balanced": styled("nicolaides", "balanced"),
    "krylov, balanced": styled("krylov", "balanced"),
    "leading, balanced": styled("spectral", "balanced"),
}
LENGTHS = {  # how the length of a step is chosen: words and line
    "captured": ("step as it is", ":"),
    "at_best_length": ("one best length", "-"),
    "at_layer_lengths": ("one length per layer", "--"),
}
SEPARATED = (*KFAC_BY_RULE.values(), "leading, balanced")
LENGTH_AND_DIRECTION = {
    f"{name}, {quantity}": SERIES[name]._replace(label=words, line=line)
    for name in SEPARATED
    for quantity, (words, line) in LENGTHS.items()
}
ABOVE = {"eigenvalues": Style("eigenvalues of F above λ", INK, "", "-")}
PLACES = {  # as names of columns
    data: name.removeprefix("planted").removeprefix(", ").replace(" and", "\nand") or "plain"
    for data, name in NETWORKS.items()
}
OVERLAP = {"layers": Style("overlap of layers", INK, "x", "")}  # on exact blocks, whose eigenvalue it is
SHORT = {  # columns of the map of networks
    "none": "gradient",
    "diagonal": "diagonal",
    "block-diagonal": "exact blocks",
    "kfac": "K-FAC",
    "factored": "K-FAC, factored",
    "constants, balanced": "constants",
    "krylov, balanced": "Krylov pieces",
    "leading, balanced": "eigenvectors",
}


class Plot(show.Plot):
    """Steps above: at their best length, by kind of length, and why they are too long; conjugate gradients in the
    middle, and where they pay; below the deepest of all networks."""

    size = (10.0, 9.6)
    fixed = ("layers", "networks", "damping_shares")

    def build(self, result: Result) -> None:
        p, mapped = result.parameters, len(result.parameters["damping_shares"]) > 1
        heights = (1.15, 1, 1)[: 3 if p["networks"] else 2]
        grid = self.figure.add_gridspec(len(heights), 3, height_ratios=heights)
        best, lengths, largest = (self.figure.add_subplot(grid[0, i]) for i in range(3))
        iterations = self.figure.add_subplot(grid[1, 0] if mapped else grid[1, :])
        layers = sorted(p["layers"])
        over = dict(x="layers", xlim=(layers[0] / 1.15, layers[-1] * 1.15))
        curves = {  # axes, series, title, ends, scale and numbers of the upright axis
            "at_best_length": (best, SERIES, "Captured at the best length", (0, 1.05), "linear", (0, 0.5, 1)),
            "lengths": (lengths, LENGTH_AND_DIRECTION, "Length or direction?", (-2000, 1.15), "symlog",
                        (1, 0.5, 0, -0.5, -1, -10, -100, -1000)),
            "largest": (largest, SERIES | OVERLAP, "Largest eigenvalue of M A", (0.9, 250), "log", (1, 3, 10, 30, 100)),
            "iterations": (iterations, SERIES | ABOVE, "Iterations", (3, 300), "log", (3, 10, 30, 100, 300)),
        }  # fmt: skip
        self.views = {}
        for quantity, (ax, series, title, ends, scale, numbers) in curves.items():
            self.views[quantity] = self.add(CurveView(ax, series, shown(result, quantity), title, ylim=ends,
                                                      scale=("log", scale), **over))  # fmt: skip
            if scale == "symlog":
                ax.set_yscale("symlog", linthresh=1, linscale=2.5)
            plain_numbers(ax.xaxis, layers)
            plain_numbers(ax.yaxis, numbers)
        lengths.axhline(0, color=FAINT, linewidth=1, zorder=0.5)
        (bound,) = largest.plot(layers, layers, color=FAINT, linewidth=1, zorder=0.5, label="number of layers")
        if mapped:
            for column, name in ((1, "kfac"), (2, "leading, balanced")):
                self.views[name] = self.add(MapView(
                    self.figure.add_subplot(grid[1, column]), shown(result, name),
                    f"Iterations: {SHORT[name]} / none", x="λ / λ_max", y="layers", limits=(1 / 4, 4), colour=np.log,
                    palette="PuOr_r", form="{:.1f}".format,
                ))  # fmt: skip
        if p["networks"]:
            self.views["networks"] = self.add(MapView(
                self.figure.add_subplot(grid[2, :]), shown(result, "networks"),
                f"Captured at the best length, {layers[-1]} layers: networks at the start and after training",
                limits=(0, 1),
            ))  # fmt: skip
        lines = self.views["at_best_length"].lines
        others = [self.views["iterations"].lines["eigenvalues"], self.views["largest"].lines["layers"]]
        kinds = [lengths.plot([], [], color=INK, linestyle=line, label=words)[0] for words, line in LENGTHS.values()]
        self.legend([*(lines[name] for name in SERIES), *others, bound, *kinds], 4)

    def move(self, result: Result) -> None:
        for quantity, view in self.views.items():
            view.update(shown(result, quantity))


def shown(result: Result, quantity: str) -> Any:
    """What one axes shows: curves, or for a map its points."""
    p = result.parameters
    deepest = int(np.argmax(p["layers"]))
    if quantity == "lengths":
        return {f"{name}, {kind}": result.of(kind)[name] for name in SEPARATED for kind in LENGTHS}
    if quantity in SHORT:  # iterations of this method over those without preconditioner
        over = {share: result.everywhere[p["data"], p["steps"], share] for share in sorted(p["damping_shares"])}
        return [
            (str(depth), number(share, 2) if i % 2 == 0 else " " * i,
             c["iterations", quantity].y[at] / c["iterations", "none"].y[at])
            for at, depth in sorted(enumerate(p["layers"]), key=lambda pair: pair[1])
            for i, (share, c) in enumerate(over.items())
        ]  # fmt: skip
    if quantity == "networks":
        found = {(data, steps): result.everywhere[data, steps, p["damping_share"]] for data in p["networks"]
                 for steps in dict.fromkeys((0, p["steps"]))}  # fmt: skip
        return [
            (label, f"{PLACES[data]}\n{'trained' if steps else 'start'}", c["at_best_length", name].y[deepest])
            for name, label in SHORT.items() for (data, steps), c in found.items()
        ]  # fmt: skip
    curves = result.of(quantity)
    curves |= result.of({"iterations": "above", "largest": "layer_overlap"}.get(quantity, ""))
    return banded(curves, ("kfac", "leading, balanced", "none"))


# ---- the exercises ------------------------------------------------------------------------------------


@exercise("10a", "The trace of M A is a sum over layers. What is it in each, and what is the mean eigenvalue?", 1e-6)
def _least_that_the_largest_eigenvalue_can_be() -> float:
    layers = 17
    A = Dense(torch.eye(layers, dtype=torch.float64, device="cpu"), Partition.from_sizes([1] * layers))  # no coupling
    return float(spectrum(A, BlockDiagonal(A, 0.0))[-1])


@exercise("10b", "Call run for one size after the other and watch the share at the best length.")
def _eigenvectors_for_eight_tenths() -> int:
    one = dict(layers=(9,), repeats=1, networks=(), damping_shares=(), measured="")
    best = (run(per_layer=k, **one).of("at_best_length")["leading, balanced"].y[0] for k in range(1, 8))
    return next(k for k, captured in enumerate(best, 1) if captured >= 0.8)
