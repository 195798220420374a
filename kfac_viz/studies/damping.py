"""What damping does to the spectrum, to the step, and to the trust in the quadratic model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
from torch import Tensor

from .. import KFAC, show
from ..parameters import Device, Examples, Repeats, Seed, Steps, Widths, check
from ..problems.toys import Problem
from ..show import FAINT, INK, METHODS, CurveView, Style, Tolerance, plain_numbers
from .common.exercises import crossing, exercise
from .common.result import PRECISION, SHARES, Curve, Study, by_key, curve, seeds
from .common.setting import (
    DAMPINGS,
    OVER_DAMPINGS,
    Data,
    Setting,
    at_best_length,
    chosen,
    first_network,
    setting,
    shares,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

COMPARED = np.array(DAMPINGS.positions[::2])
FOLLOWED = ("exact", "kfac", "factored")
QUANTITIES = ("length", "captured", "at_best_length", "ratio", "decrease")
STAGES = ("at the start", "after training")


@dataclass(frozen=True, eq=False)
class Result(Study):
    """Curves over λ, series ``stage, method``, at two stages of training.

    Quantities: ``length`` ‖v‖; ``captured`` and ``at_best_length``, shares of the best decrease of the damped quadratic
    model (:func:`.setting.shares`); ``ratio``, actual decrease of the loss over the decrease that the undamped model
    predicts; ``decrease``, the actual one as a share of the loss. K-FAC's directions are rescaled to their best length
    in the last two. Series of a stage alone: ``spectrum`` (x: rank), ``dimension`` Σ d/(d + λ), and ``gradient``,
    ‖g‖/λ.
    """

    tolerances = SHARES | {
        "decrease": Tolerance(relative=5e-3, absolute=1e-3),
        "ratio": Tolerance(relative=5e-3, absolute=5e-3),
        "dimension": Tolerance(relative=2e-3),
        "gradient": Tolerance(relative=2e-3),
        "length": Tolerance(relative=2e-3),
        "spectrum": Tolerance(relative=1e-2, absolute=100 * PRECISION),
    }

    size: int  # P

    @property
    def headline(self) -> str:
        λ, after = self.parameters["damping"], STAGES[1]
        size = self.curves["dimension", after].at(λ)
        falls = (self.curves["decrease", f"{after}, {method}"].at(λ) for method in FOLLOWED)
        exact, kfac, factored = (f"{fall:.0%}".replace("-", "−") for fall in falls)
        return (f"Data decide {size:.0f} of {self.size} directions; the exact step takes {exact} off the loss, "
                f"K-FAC {kfac}, factored {factored}")  # fmt: skip


def run(
    *,
    damping: Annotated[float, DAMPINGS] = 1e-2,
    steps: Steps = 100,
    data: Data = "digits4",
    widths: Widths = (12, 12, 12),
    n: Examples = 500,
    repeats: Repeats = 5,
    seed: Seed = 0,
    device: Device = "cpu",
) -> Result:
    """Follow spectrum, step and loss over all dampings, before and after training.

    Args:
        damping: λ, marked in the curves.
        steps: of Adam that count as training.
    """
    p = check(run, locals())
    rows = by_key(_measure(chosen(p, seed=s, steps=0), chosen(p, seed=s)) for s in seeds(p))
    curves = {key: curve(1 + np.arange(len(y[0])) if key[0] == "spectrum" else COMPARED, y) for key, y in rows.items()}
    return Result(p, curves, len(curves["spectrum", STAGES[0]].x))


def loss_after(problem: Problem, v: Tensor) -> float:
    """The loss once ``v`` (P,) is subtracted from the parameters of a copy; inf where it overflows."""
    return next(losses_after(problem, [v]))


@torch.no_grad()
def losses_after(problem: Problem, directions: Iterable[Tensor]) -> Iterator[float]:
    """:func:`loss_after` of each direction, with one copy of the network for all."""
    twin = problem.twin()
    start = [p.clone() for p in twin.model.parameters()]
    for v in directions:
        twin.partition.add_(twin.model, v, alpha=-1.0)
        loss = float(twin.loss())
        torch._foreach_copy_(list(twin.model.parameters()), start)
        yield loss if np.isfinite(loss) else np.inf


@lru_cache(maxsize=64)
def _measure(start: tuple, trained: tuple) -> dict[tuple[str, str], NDArray]:
    """Every curve of one network at the two stages."""
    found: dict[tuple[str, str], NDArray] = {}
    for stage, network in zip(STAGES, (start, trained), strict=True):
        s = setting(*network)
        d = s.F.eigen.d.flip(0).cpu().numpy()
        found["spectrum", stage] = d = np.where(d < PRECISION * d[0], 0, d)
        found["dimension", stage] = (d / (d + COMPARED[:, None])).sum(1)
        found["gradient", stage] = float(s.g.norm()) / COMPARED
        for method in FOLLOWED:
            for quantity, values in zip(QUANTITIES, _follow(s, method, COMPARED), strict=True):
                found[quantity, f"{stage}, {method}"] = values
    return found


def _follow(s: Setting, method: str, λs: NDArray) -> NDArray:
    """QUANTITIES of one method at every λ, (5, n)."""
    F, g, now = s.F, s.g, float(s.problem.loss().detach())
    M = None if method == "exact" else KFAC(F, 1.0, "factored" if method == "factored" else "eigen")
    rows = []
    for λ in λs.tolist():
        A = F.damped(λ)
        v = A.solve(g) if M is None else M.with_damping(λ) @ g
        best = at_best_length(A, g, v)
        undamped = float(g @ best) - 0.5 * float(best @ (F @ best))
        decrease = now - loss_after(s.problem, best)
        both = shares(A, g, v)
        rows.append((float(v.norm()), both.captured, both.at_best_length, decrease / undamped, decrease / now))
    return np.array(rows).T


# ---- the picture --------------------------------------------------------------------------------------

LINES = dict(zip(STAGES, (":", "-"), strict=True))
STAGE = {stage: Style(stage, INK, "", line) for stage, line in LINES.items()}
SERIES = {
    f"{stage}, {name}": METHODS[name]._replace(label=f"{METHODS[name].label}, {stage}", line=line)
    for name in FOLLOWED
    for stage, line in LINES.items()
}
LIMIT = {stage: Style(f"‖g‖ / λ, {stage}", METHODS["gradient"].color, "", line) for stage, line in LINES.items()}


class Plot(show.Plot):
    """Spectrum, dimension and length above; what becomes of the model and of the loss below."""

    size = (10.0, 6.4)
    fixed = ("size",)

    def build(self, result: Result) -> None:
        upper, lower = self.figure.add_gridspec(2, 1)
        grids = (*upper.subgridspec(1, 3), *lower.subgridspec(1, 4))
        axes = [self.figure.add_subplot(place) for place in grids]
        self.spectrum = self.add(CurveView(
            axes[0], STAGE, result.of("spectrum"), "Spectrum of F, and λ",
            x="rank (triangle: less)", xlim=(0.9, 1.1 * result.size), ylim=(1e-8, 100),
        ))  # fmt: skip
        self.level = self.add(axes[0].axhline(1, color=INK, linewidth=0.9, alpha=0.6))
        curves = {  # series, title, ends and scale of the upright axis
            "dimension": (STAGE, f"Σ d/(d + λ), of {result.size}", (0, result.size), "linear"),
            "length": (LIMIT | SERIES, "Length of the step ‖v‖", (1e-3, 1e3), "log"),
            "at_best_length": (SERIES, "Captured, best length", (0.3, 1.02), "linear"),
            "captured": (SERIES, "Captured as it is", (-1, 1.05), "linear"),
            "ratio": (SERIES, "Actual / predicted", (-1, 1.5), "linear"),
            "decrease": (SERIES, "Actual decrease / loss", (-0.2, 0.5), "linear"),
        }
        self.views = {
            quantity: self.add(CurveView(ax, series, shown(result, quantity), title, ylim=ends, scale=("log", scale),
                                         **OVER_DAMPINGS))
            for ax, (quantity, (series, title, ends, scale)) in zip(axes[1:], curves.items(), strict=True)
        }  # fmt: skip
        for ax in axes[4:]:
            ax.axhline(0, color=INK, linewidth=0.6)
        for ax in axes[3:]:
            plain_numbers(ax.xaxis, (1e-4, 1e-2, 1, 100))
        for share in (0.25, 0.75):  # Levenberg and Marquardt: λ is raised below the first, lowered above the second
            axes[5].axhline(share, color=FAINT, linewidth=0.8)
        lines = self.views["length"].lines
        self.legend([lines[name] for name in (*SERIES, *LIMIT)], 4)

    def move(self, result: Result) -> None:
        λ = result.parameters["damping"]
        self.spectrum.update(result.of("spectrum"))
        self.level.set_ydata([λ, λ])
        for quantity, view in self.views.items():
            view.update(shown(result, quantity), at=λ)


def shown(result: Result, quantity: str) -> dict[str, Curve]:
    """The curves of one axes: the length of the step goes with what the gradient alone would give."""
    return result.of(quantity) | (result.of("gradient") if quantity == "length" else {})


# ---- the exercises ------------------------------------------------------------------------------------


@exercise("04a", "Σ d/(d + λ) falls as λ grows: try values, or halve an interval.", 0.05)
def _damping_for_a_tenth_of_the_dimensions() -> float:
    d = first_network().F.eigen.d.numpy()
    return crossing(lambda λ: (d / (d + λ)).sum() - len(d) / 10, -12, 3)


@exercise("04b", "The loss behind the step less the loss before it changes its sign: halve an interval of λ.", 0.05)
def _damping_at_which_the_step_stops_helping() -> float:
    s = first_network()
    now = float(s.problem.loss().detach())
    return crossing(lambda λ: loss_after(s.problem, s.F.damped(λ).solve(s.g)) - now, -4, -1)
