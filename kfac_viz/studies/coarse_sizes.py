"""Every coarse space at every size, added and balanced, over several networks."""

from __future__ import annotations

import warnings
from collections import defaultdict
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated

from torch import Tensor

from ..method import coarse as spaces
from ..method.columns import CoarseSpace
from ..method.kfac import KFAC
from ..method.krylov import pcg, spectrum
from ..method.operator import Dense, cholesky
from ..method.two_level import TwoLevel
from ..parameters import Device, Range, Seed, check
from ..show.curves import CurveView
from ..show.plot import Plot
from ..show.style import FAINT, METHODS, SPACES
from .coarse_space import Damping, Rule
from .curves import Study, captured, curve
from .depth import largest_eigenvalue
from .exercises import exercise
from .setting import Data, Flavour, Setting, Widths, first_network, setting
from .threads import one_thread

if TYPE_CHECKING:
    from matplotlib.axis import Axis



CORRECTIONS = ("balanced", "additive")


class CoarseSizesResult(Study):
    """Curves over the number of columns per layer, a series for each ``"space, correction"``.

    Quantities: ``captured`` decrease of one step, ``largest`` eigenvalue of T A, ``iterations`` of conjugate
    gradients with orthogonal residuals, there also ``"none"`` for those without preconditioner. Size 0 is K-FAC.
    """


@one_thread()
def run_coarse_sizes(
    *,
    damping: Damping = 1e-2,
    sizes: Annotated[tuple[int, ...], Range(0, 64)] = (0, 1, 2, 4, 8, 16),
    rule: Rule = "eigen",
    fisher: Flavour = "exact",
    data: Data = "digits4",
    widths: Widths = (12, 12, 12),
    n: Annotated[int, Range(1, 1797)] = 500,
    steps: Annotated[int, Range(0, 1000)] = 0,
    rtol: Annotated[float, Range(1e-10, 1e-1, log=True)] = 1e-6,
    repeats: Annotated[int, Range(1, 20)] = 5,
    seed: Seed = 0,
    device: Device = "cpu",
) -> CoarseSizesResult:
    """What each coarse space brings, from 0 to some columns per layer.

    Args:
        damping: λ.
        sizes: columns per layer.
        rule: how K-FAC is damped.
        fisher: which Fisher.
        data: which problem; see :func:`run_coarse_space`.
        widths: of the hidden layers.
        n: examples.
        steps: full-batch Adam steps before the Fisher is taken.
        rtol: residual, as a share of the gradient, at which the iterations stop.
        repeats: seeds, from ``seed`` upwards; a band shows the lowest and the highest.
        seed: of data, weights and random columns.
        device: where to compute.
    """
    parameters = check(run_coarse_sizes, locals())
    sizes, widths = tuple(sizes), tuple(widths)
    values: dict[tuple[str, str], list[list[float]]] = defaultdict(list)
    for s in range(seed, seed + repeats):
        where = setting(data, widths, n, s, steps, fisher, device)
        for key, row in _rows(where, damping, sizes, rule, rtol, s).items():
            values[key].append(row)
    return CoarseSizesResult(parameters, {key: curve(sizes, rows) for key, rows in values.items()})


@lru_cache(maxsize=64)
def _rows(
    where: Setting, damping: float, sizes: tuple[int, ...], rule: str, rtol: float, seed: int
) -> dict[tuple[str, str], list[float]]:
    """One number per size, for every quantity and series of one network."""
    F, g = where.F, where.g
    A = Dense(where.dense, F.partition).damped(damping)
    system = Dense(A.dense(), F.partition)
    L = cholesky(system.dense(), "The damped Fisher")
    M = KFAC(F, damping, rule)
    rows = defaultdict(list)
    rows["iterations", "none"] = [pcg(system, g, rtol=rtol, reorthogonalize=True).iterations] * len(sizes)
    for name in spaces.SPACES:
        for Z in nested(name, A, M, where, sizes, seed):
            T = TwoLevel(A, M, Z)
            for correction in CORRECTIONS:
                dense = T.with_correction(correction).dense()
                series = f"{name}, {correction}"
                rows["captured", series].append(captured(A, g, dense @ g)[0])
                rows["largest", series].append(largest_eigenvalue(dense, L))
                solution = pcg(system, g, Dense(dense, F.partition), rtol=rtol, reorthogonalize=True)
                rows["iterations", series].append(solution.iterations)
    return rows


def nested(name: str, A, M: KFAC, where: Setting, sizes: tuple[int, ...], seed: int) -> list[CoarseSpace]:
    """The coarse space ``name`` at each size. An expensive one is built once: its columns are nested."""
    F = where.F
    if name == "optimal":
        columns = spaces.optimal(A, M, max(sizes)).dense()
        return [CoarseSpace(F.partition, columns[:, : k * len(F.partition)], name=name) for k in sizes]
    arguments: tuple[Tensor | Setting, ...] = (A, M, where.g) if name == "krylov" else (F,)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dependent Krylov columns are left out
        return [getattr(spaces, name)(*arguments, k, *([seed] if name == "random" else [])) for k in sizes]


# ---- the picture --------------------------------------------------------------------------------------


NONE = METHODS["gradient"]._replace(label="no preconditioner", marker="", line=":", color="#222222")
ROWS = ("balanced", "additive")


class CoarseSizesPlot(Plot):
    """Balanced corrections above, added ones below."""

    size = (11.6, 6.8)

    def build(self, result: CoarseSizesResult) -> None:
        self.sizes = sizes = result.parameters["sizes"]
        self.limits = limits(result)
        below = {-(10**i): f"−{10**i}" for i in range(5)}
        self.views = {}
        for row, axes in zip(ROWS, self.figure.subplots(2, 3), strict=True):
            kinds = {
                "captured": (SPACES, "captured decrease of one step", "symlog",
                             {1: "1: exact", 0.5: "0.5", 0: "0: no step", **below}),
                "largest": (SPACES, "largest eigenvalue of T A", "log",
                            {v: str(v) for v in (1, 2, 3, 5, 10, 30, 100)}),
                "iterations": ({**SPACES, "none": NONE}, "iterations", "log",
                               {v: str(v) for v in (1, 3, 10, 30, 100, 300, 1000)}),
            }  # fmt: skip
            for ax, (quantity, (styles, title, scale, names)) in zip(axes, kinds.items(), strict=True):
                self.views[row, quantity] = CurveView(
                    ax, styles, f"{row.capitalize()}: {title}", x="columns per layer", y="",
                    xlim=(-0.1, max(sizes) * 1.12), ylim=self.limits[row, quantity], scale=("symlog", scale),
                )  # fmt: skip
                ax.set_xscale("symlog", linthresh=1, linscale=0.3)
                if scale == "symlog":
                    ax.set_yscale("symlog", linthresh=1, linscale=1.6)
                    ax.axhline(0, color=FAINT, linewidth=1, zorder=0.5)
                if quantity != "iterations":
                    ax.axhline(1, color=FAINT, linewidth=1, zorder=0.5)
                _numbers(ax.xaxis, {size: str(size) for size in sizes})
                _numbers(ax.yaxis, names)
        lines = self.views["balanced", "iterations"].lines
        self.figure.legend(handles=[*lines.values()], loc="outside lower center", ncols=len(lines))
        self.title = self.figure.suptitle("", x=0.01, ha="left", weight="bold", fontsize=11)
        self.animated = [*(artist for view in self.views.values() for artist in view.artists), self.title]

    def update(self, result: CoarseSizesResult) -> None:
        for (row, quantity), view in self.views.items():
            curves = result.of(quantity)
            view.update({name: curves[key] for name in view.lines if (key := series(name, row)) in curves})
        self.title.set_text(headline(result))
        self.figure.set_label(describe(result))

    def fits(self, result: CoarseSizesResult) -> bool:
        return result.parameters["sizes"] == self.sizes and limits(result) == self.limits


def limits(result: CoarseSizesResult) -> dict[tuple[str, str], tuple[float, float]]:
    """Ends of the upright axes, by row and quantity."""
    largest, iterations = (list(result.of(quantity).values()) for quantity in ("largest", "iterations"))
    ends = {}
    for row in ROWS:
        lowest = min(c.low.min() for name, c in result.of("captured").items() if name.endswith(row))
        ends[row, "captured"] = min(-0.05, 1.5 * lowest), 1.08
        ends[row, "largest"] = 0.95, 1.3 * max(c.high.max() for c in largest)
        counts = [count for c in iterations for count in (c.low.min(), c.high.max())]
        ends[row, "iterations"] = 0.7 * min(counts), 1.4 * max(counts)
    return ends


def series(space: str, correction: str) -> str:
    return space if space == "none" else f"{space}, {correction}"


def _numbers(axis: Axis, names: dict[float, str]) -> None:
    low, high = axis.get_view_interval()
    names = {value: name for value, name in names.items() if low <= value <= high}
    axis.set_ticks(list(names), list(names.values()))
    axis.set_ticks([], minor=True)


def headline(result: CoarseSizesResult) -> str:
    """What to see, in one line."""
    sizes, captured = result.parameters["sizes"], result.of("captured")
    at = min(range(len(sizes)), key=lambda i: abs(sizes[i] - 4))
    shares = ", ".join(
        f"{words} {captured[f'{name}, balanced'].y[at]:.2f}"
        for name, words in (("nicolaides", "constants"), ("spectral", "eigenvectors"), ("krylov", "Krylov pieces"))
    )
    kfac = captured["spectral, balanced"].y[0]
    return f"One step with {sizes[at]} balanced columns per layer: {shares}; K-FAC {kfac:.2f}"


def describe(result: CoarseSizesResult) -> str:
    """The alternative text: what every space captures at its largest size."""
    p, captured = result.parameters, result.of("captured")
    rows = "; ".join(
        f"{row}: " + ", ".join(f"{SPACES[name].label} {captured[series(name, row)].y[-1]:.3g}" for name in SPACES)
        for row in ROWS
    )
    return (
        f"{headline(result)}. Captured decrease, largest eigenvalue and iterations of conjugate gradients for six "
        f"coarse spaces of {p['sizes'][0]} to {p['sizes'][-1]} columns per layer, balanced above and added below; "
        f"medians over {p['repeats']} seeds, bands from the lowest to the highest. Captured with "
        f"{p['sizes'][-1]} columns, {rows}."
    )


plot_coarse_sizes = CoarseSizesPlot.draw


# ---- the exercises ------------------------------------------------------------------------------------


@exercise("05c", "Look at a column x of the space: M A x = μ x, and what is Q A x?", 1e-3)
def _what_the_optimal_space_adds() -> float:
    s = first_network(steps=0)
    A, M = s.matrix.damped(0.01), KFAC(s.F, 0.01)
    T = TwoLevel(A, M, spaces.optimal(A, M, 1), "additive")
    return float(spectrum(A, T)[-1] - spectrum(A, M)[-1])


@exercise("05d", "kv.pcg(A, g, T).iterations, for one size after the other, beside kv.pcg(A, g).iterations.")
def _eigenvectors_that_are_quicker_than_none() -> int:
    s = first_network(steps=0)
    A, M = s.matrix.damped(0.01), KFAC(s.F, 0.01)

    def iterations(T: TwoLevel | None) -> int:
        return pcg(A, s.g, T, rtol=1e-6, reorthogonalize=True).iterations

    none = iterations(None)
    return next(k for k in range(17) if iterations(TwoLevel(A, M, spaces.spectral(s.F, k))) < none)
