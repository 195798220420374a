"""Every coarse space at every size, added and balanced, over several networks."""

from __future__ import annotations

from collections import defaultdict
from functools import cache, lru_cache
from typing import Annotated

from torch import Tensor

from .. import KFAC, CoarseSpace, Damped, Dense, Operator, TwoLevel, coarse, show, spectrum
from ..method.decompositions import cholesky
from ..parameters import Device, Examples, Range, Repeats, Rtol, Seed, Steps, Widths, check
from ..show import FAINT, METHODS, SPACES, CurveView, Tolerance, plain_numbers
from .common.exercises import exercise
from .common.result import COUNT, SHARES, Curve, Study, over_seeds, seeds, share
from .common.setting import (
    KFAC_BY_RULE,
    Damping,
    Data,
    Flavour,
    Rule,
    Setting,
    Shares,
    all_shares,
    chosen,
    first_network,
    iterations,
    largest_eigenvalue,
    setting,
    space,
)

CORRECTIONS = ("balanced", "additive")


class Result(Study):
    """Curves over the number of columns per layer, a series for each ``"space, correction"``.

    Quantities: the shares ``captured``, ``at_best_length`` and ``at_layer_lengths`` of :func:`.setting.shares`; the
    ``largest`` eigenvalue of T A; ``iterations`` of conjugate gradients with orthogonal residuals, there also
    ``"none"`` for those without preconditioner. Size 0 is K-FAC under the rule of damping that was chosen;
    ``"kfac"`` and ``"factored"`` are K-FAC alone under each rule.
    """

    tolerances = SHARES | {"largest": Tolerance(relative=2e-3), "iterations": COUNT}

    @property
    def headline(self) -> str:
        sizes, quantities = self.parameters["sizes"], ("at_best_length", "captured")
        at = min(range(len(sizes)), key=lambda i: abs(sizes[i] - 4))
        two, one, factored = ([share(self.of(quantity)[series].y[at]) for quantity in quantities]
                              for series in ("spectral, balanced", *KFAC_BY_RULE.values()))  # fmt: skip
        return (f"{sizes[at]} balanced eigenvectors capture {two[0]} (unscaled {two[1]}), K-FAC {one[0]} "
                f"({one[1]}), factored {factored[0]} ({factored[1]})")  # fmt: skip

    @property
    def where(self) -> str:
        return f"{super().where}; at the best length (unscaled)"


def run(
    *,
    damping: Damping = 1e-2,
    sizes: Annotated[tuple[int, ...], Range(0, 64), "columns per layer."] = (0, 1, 2, 4, 8, 16),
    rule: Rule = "eigen",
    fisher: Flavour = "exact",
    data: Data = "digits4",
    widths: Widths = (12, 12, 12),
    n: Examples = 500,
    steps: Steps = 0,
    rtol: Rtol = 1e-6,
    repeats: Repeats = 5,
    seed: Seed = 0,
    device: Device = "cpu",
) -> Result:
    """What each coarse space brings, from 0 to some columns per layer.

    Args:
        seed: of data, weights and random columns.
    """
    p = check(run, locals())
    rows = (_rows(chosen(p, seed=s), damping, p["sizes"], rule, rtol) for s in seeds(p))
    return Result(p, over_seeds(sizes, rows))


@lru_cache(maxsize=64)
def _rows(
    network: tuple, damping: float, sizes: tuple[int, ...], rule: str, rtol: float
) -> dict[tuple[str, str], list[float]]:
    """One number per size, for every quantity and series of one network."""
    s = setting(*network)
    F, g, A = s.F, s.g, s.matrix.damped(damping)
    system = Dense(A.dense(), F.partition)
    L = cholesky(A.dense(), "The damped Fisher")
    M = KFAC(F, damping, rule)
    rows = defaultdict(list, {("iterations", "none"): [iterations(system, g, None, rtol)] * len(sizes)})
    directions = {}

    @cache  # without columns every space and correction is K-FAC, under the rule that was chosen
    def measured(T: Operator) -> tuple[Tensor, float, int]:
        method = Dense(T.dense(), F.partition)
        return method @ g, largest_eigenvalue(method.dense(), L), iterations(system, g, method, rtol)

    alone = {name: M if one == rule else KFAC(F, damping, one) for one, name in KFAC_BY_RULE.items()}
    for name, T in alone.items():
        rows |= {(kind, name): [] for kind in Shares._fields}
        direction, largest, count = measured(T)
        directions |= {(name, size): direction for size in range(len(sizes))}
        rows["largest", name], rows["iterations", name] = [largest] * len(sizes), [count] * len(sizes)
    for name in coarse.SPACES:
        for size, Z in enumerate(nested(name, A, M, s, sizes)):
            T = TwoLevel(A, M, Z)
            for correction in CORRECTIONS:
                series = f"{name}, {correction}"
                rows |= {(kind, series): [] for kind in Shares._fields if not size}  # which the table has first
                directions[series, size], largest, count = measured(T.with_correction(correction) if Z.size else M)
                rows["largest", series].append(largest)
                rows["iterations", series].append(count)
    for (series, _), worth in all_shares(A, g, directions).items():
        for quantity, value in worth._asdict().items():
            rows[quantity, series].append(value)
    return rows


def nested(name: str, A: Damped, M: KFAC, s: Setting, sizes: tuple[int, ...]) -> list[CoarseSpace]:
    """The coarse space ``name`` at each size. An expensive one is built once: its columns are nested."""
    if name == "optimal":
        columns = coarse.optimal(A, M, max(sizes)).dense()
        counts = [sum(min(k, layer.size) for layer in s.F.partition.layers) for k in sizes]
        return [CoarseSpace(s.F.partition, columns[:, :count], name=name) for count in counts]
    return [space(name, A, M, s.g, k, s.seed) for k in sizes]


# ---- the picture --------------------------------------------------------------------------------------

ALONE = ("none", *KFAC_BY_RULE.values())  # which have no columns
SERIES = {name: METHODS[name] for name in ALONE} | SPACES
QUANTITIES = {  # title, ends of the axis and numbers on it
    "at_best_length": ("best length", (0.4, 1.03), (0.4, 0.6, 0.8, 1)),
    "captured": ("unscaled", (-3, 1.08), (1, 0.5, 0, -1, -3)),
    "largest": ("λ_max of T A", (0.95, 12), (1, 2, 3, 5, 10)),
    "iterations": ("iterations", (2, 120), (3, 10, 30, 100)),
}


class Plot(show.Plot):
    """What one step captures, the largest eigenvalue and iterations; balanced corrections above, added ones below."""

    size = (10.0, 6.2)
    fixed = ("sizes",)

    def build(self, result: Result) -> None:
        sizes, self.views = result.parameters["sizes"], {}
        for row, axes in zip(CORRECTIONS, self.figure.subplots(2, 4), strict=True):
            for ax, (quantity, (title, ends, numbers)) in zip(axes, QUANTITIES.items(), strict=True):
                self.views[row, quantity] = self.add(CurveView(
                    ax, SERIES, shown(result, row, quantity), f"{row.capitalize()}: {title}", x="columns per layer",
                    xlim=(-0.1, max(sizes) * 1.12), ylim=ends,
                    scale=("symlog", {"captured": "symlog", "at_best_length": "linear"}.get(quantity, "log")),
                ))  # fmt: skip
                ax.set_xscale("symlog", linthresh=1, linscale=0.3)
                if quantity == "captured":
                    ax.set_yscale("symlog", linthresh=1, linscale=1.6)
                    ax.set_ylim(bottom=-0.05 if row == "balanced" else None)
                    ax.axhline(0, color=FAINT, linewidth=1, zorder=0.5)
                if quantity != "iterations":
                    ax.axhline(1, color=FAINT, linewidth=1, zorder=0.5)
                plain_numbers(ax.xaxis, sizes)
                plain_numbers(ax.yaxis, numbers)
        self.legend(self.views["balanced", "iterations"].lines.values(), 4)

    def move(self, result: Result) -> None:
        for (row, quantity), view in self.views.items():
            view.update(shown(result, row, quantity))


def shown(result: Result, row: str, quantity: str) -> dict[str, Curve]:
    """The curves of one axes, by the name of the space."""
    curves = result.of(quantity).items()
    return {name.removesuffix(f", {row}"): c for name, c in curves if name in ALONE or name.endswith(row)}


# ---- the exercises ------------------------------------------------------------------------------------


@exercise("08a", "Look at a column x of the space: M A x = μ x, and what is Q A x?", 1e-3)
def _what_the_optimal_space_adds() -> float:
    s = first_network(steps=0)
    A, M = s.matrix.damped(0.01), KFAC(s.F, 0.01)
    T = TwoLevel(A, M, coarse.optimal(A, M, 1), "additive")
    return float(spectrum(A, T)[-1] - spectrum(A, M)[-1])


@exercise("08b", "Which rank has F, if each example has ten outputs whose probabilities add up to one? And where is g?")
def _iterations_on_two_examples() -> int:
    two = setting("digits4", (12, 12, 12), 2, 0, 0)
    return iterations(two.F.damped(0.01), two.g, None, 1e-10)
