"""What damping does to the spectrum, to the step, and to the trust in the quadratic model."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
from torch import Tensor

from ..method.kfac import KFAC
from ..parameters import Device, Range, Seed, check
from ..show.curves import CurveView
from ..show.plot import Plot
from ..show.style import FAINT, INK, METHODS, Style
from .curves import Curve, Study, by_key, captured, curve
from .exercises import exercise
from .problems import Problem
from .setting import DAMPINGS, OVER_DAMPINGS, Data, Setting, Widths, first_network, setting
from .threads import one_thread

if TYPE_CHECKING:
    from numpy.typing import NDArray


FOLLOWED = ("exact", "kfac", "factored")
QUANTITIES = ("length", "captured", "ratio", "decrease")
MOMENTS = ("at the start", "after training")


@dataclass(frozen=True, eq=False)
class DampingResult(Study):
    """Curves over λ, series ``moment, method``, at two moments of training.

    Quantities: ``length`` ‖v‖; ``captured``, the share of the best decrease of the damped quadratic model;
    ``ratio``, actual decrease of the loss over the decrease that the undamped model predicts; ``decrease``, the actual
    one as a share of the loss. K-FAC's directions are rescaled to their best length in the last two. Series of a
    moment alone: ``spectrum`` (x: rank), ``dimension`` Σ d/(d + λ), and ``gradient``, ‖g‖/λ.
    """

    size: int  # P


@one_thread()
def run_damping(
    *,
    damping: Annotated[float, DAMPINGS] = 1e-2,
    steps: Annotated[int, Range(1, 2000)] = 100,
    data: Data = "digits4",
    widths: Widths = (12, 12, 12),
    n: Annotated[int, Range(10, 1797)] = 500,
    repeats: Annotated[int, Range(1, 20)] = 5,
    seed: Seed = 0,
    device: Device = "cpu",
) -> DampingResult:
    """Follow spectrum, step and loss over all dampings, before and after training.

    Args:
        damping: λ, marked in the curves.
        steps: of Adam that count as training.
        data: which data, and with it the likelihood.
        widths: of the hidden layers.
        n: examples.
        repeats: networks, each with its own data and weights: seed, seed + 1, …
        seed: of the first of them.
        device: where to compute.
    """
    parameters = check(run_damping, locals())
    curves = _curves(data, tuple(widths), n, steps, repeats, seed, device)
    return DampingResult(parameters, curves, len(curves["spectrum", MOMENTS[0]].x))


def loss_after(problem: Problem, v: Tensor) -> float:
    """The loss once ``v`` (P,) is subtracted from the parameters of a copy; inf where it overflows."""
    twin = replace(problem, model=copy.deepcopy(problem.model))
    twin.partition.add_(twin.model, v, alpha=-1.0)
    with torch.no_grad():
        loss = float(twin.loss())
    return loss if np.isfinite(loss) else np.inf


@lru_cache(maxsize=4)
def _curves(data, widths, n, steps, repeats, seed, device) -> dict[tuple[str, str], Curve]:
    λs = np.array(DAMPINGS.positions[::2])

    def measure(seed: int) -> dict[tuple[str, str], NDArray]:
        found = {}
        for moment, step in zip(MOMENTS, (0, steps), strict=True):
            s = setting(data, widths, n, seed, step, "exact", device)
            d = s.F.eigen.d.flip(0).cpu().numpy()
            found["spectrum", moment] = d = np.where(d < 1e-12 * d[0], 0, d)
            found["dimension", moment] = (d / (d + λs[:, None])).sum(1)
            found["gradient", moment] = float(s.g.norm()) / λs
            for method in FOLLOWED:
                for quantity, values in zip(QUANTITIES, _follow(s, method, λs), strict=True):
                    found[quantity, f"{moment}, {method}"] = values
        return found

    rows = by_key(measure(seed + r) for r in range(repeats))
    return {key: curve(1 + np.arange(len(y[0])) if key[0] == "spectrum" else λs, y) for key, y in rows.items()}


def _follow(s: Setting, method: str, λs: NDArray) -> NDArray:
    """QUANTITIES of one method at every λ, (4, n)."""
    F, g, now = s.F, s.g, float(s.problem.loss().detach())
    M = None if method == "exact" else KFAC(F, 1.0, "factored" if method == "factored" else "eigen")
    rows = []
    for λ in λs.tolist():
        A = F.damped(λ)
        v = A.solve(g) if M is None else M.with_damping(λ) @ g
        Av = A @ v
        best = v * float(g @ v) / float(v @ Av)
        undamped = float(g @ best) - 0.5 * float(best @ (F @ best))
        decrease = now - loss_after(s.problem, best)
        rows.append((float(v.norm()), captured(A, g, v)[0], decrease / undamped, decrease / now))
    return np.array(rows).T


# ---- the picture --------------------------------------------------------------------------------------


LINES = dict(zip(MOMENTS, (":", "-"), strict=True))
MOMENT = {moment: Style(moment, INK, "", line) for moment, line in LINES.items()}
SERIES = {
    f"{moment}, {name}": METHODS[name]._replace(label=f"{METHODS[name].label}, {moment}", line=line)
    for moment, line in LINES.items()
    for name in FOLLOWED
}
LIMIT = {moment: Style(f"‖g‖ / λ, {moment}", METHODS["gradient"].color, "", line) for moment, line in LINES.items()}


class DampingPlot(Plot):
    size = (13.0, 7.6)

    def build(self, result: DampingResult) -> None:
        axes = self.figure.subplots(2, 3).ravel()

        self.size_of_F = P = result.size
        self.spectrum = CurveView(
            axes[0], MOMENT, "Spectrum of F, and λ", x="rank", y="eigenvalue", xlim=(0.9, 1.1 * P), ylim=(1e-8, 100)
        )
        self.level = axes[0].axhline(1, color=INK, linewidth=0.9, alpha=0.6)
        length = CurveView(axes[2], LIMIT | SERIES, "Length of the step", y="‖v‖", ylim=(1e-3, 1e3), **OVER_DAMPINGS)
        self.views = {"length": length}
        linear = {
            "dimension": (MOMENT, "Effective dimension", f"Σ d/(d + λ), of {P}", (0, P)),
            "captured": (SERIES, "Captured decrease", "share, step as it is", (-1, 1.05)),
            "ratio": (SERIES, "Trust: actual / predicted decrease", "reduction ratio, best length", (-1, 1.5)),
            "decrease": (SERIES, "Progress: actual decrease", "share of the loss, best length", (-0.2, 0.5)),
        }
        for ax, (name, (series, title, y, ylim)) in zip(axes[[1, 3, 4, 5]], linear.items(), strict=True):
            scale = "log", "linear"
            self.views[name] = CurveView(ax, series, title, y=y, ylim=ylim, scale=scale, **OVER_DAMPINGS)
            if name != "dimension":
                ax.axhline(0, color=INK, linewidth=0.6)
        for share in (0.25, 0.75):  # below the first λ is raised, above the second lowered
            axes[4].axhline(share, color=FAINT, linewidth=0.8)
        handles = [*self.views["captured"].lines.values(), *self.views["length"].lines.values()][:8]
        order = [handles[i] for i in (0, 3, 1, 4, 2, 5, 6, 7)]
        self.figure.legend(handles=order, loc="outside lower center", ncols=4)
        views = self.spectrum, *self.views.values()
        self.animated = [self.level, *(artist for view in views for artist in view.artists)]

    def update(self, result: DampingResult) -> None:
        λ = result.parameters["damping"]
        self.spectrum.update(result.of("spectrum"))
        self.level.set_ydata([λ, λ])
        for name, view in self.views.items():
            view.update(result.of(name) | (result.of("gradient") if name == "length" else {}), at=λ)
        told = []
        for series, c in result.of("decrease").items():
            best = int(c.y.argmax())
            told.append(f"{SERIES[series].label} {c.y[best]:.2g} at λ = {c.x[best]:.2g}")
        self.figure.set_label(
            f"Curves over the damping λ for a network of {result.size} parameters, at the start and after training: "
            "spectrum, effective dimension, length of the step, captured and actual decrease, reduction ratio. "
            "Largest decrease, as a share of the loss: " + "; ".join(told) + "."
        )

    def fits(self, result: DampingResult) -> bool:
        return result.size == self.size_of_F


plot_damping = DampingPlot.draw


# ---- the exercises ------------------------------------------------------------------------------------


@exercise("03a", "Σ d/(d + λ) falls as λ grows: try values, or halve an interval.", 0.05)
def _damping_for_a_tenth_of_the_dimensions() -> float:
    from scipy.optimize import brentq

    d = first_network().F.eigen.d.numpy()
    return 10 ** brentq(lambda e: (d / (d + 10**e)).sum() - len(d) / 10, -12, 3)


@exercise("03b", "The loss behind the step less the loss before it changes its sign: halve an interval of λ.", 0.05)
def _damping_at_which_the_step_stops_helping() -> float:
    from scipy.optimize import brentq

    s = first_network()
    now = float(s.problem.loss().detach())
    return 10 ** brentq(lambda e: loss_after(s.problem, s.F.damped(10**e).solve(s.g)) - now, -4, -1)
