"""One step, seen: how far along the exact step, and how far astray, each method goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, vmap

from .. import KFAC, TwoLevel, show
from ..method.checks import evaluation
from ..parameters import Device, Examples, Seed, Widths, check, number
from ..scores.likelihood import checked_nll
from ..show import FAINT, INK, METHODS, MUTED, Tolerance
from .coarse_space import ORDER, Correction, Moments, PerLayer, Space, architecture, directions
from .common.exercises import exercise
from .common.result import SHARE, SHARES, rounded, share, stage
from .common.setting import KFAC_BY_RULE, Damping, Data, Rule, Setting, chosen, setting, space

if TYPE_CHECKING:
    import pandas
    from numpy.typing import NDArray

    from .. import Partition

ALONG, ASTRAY = np.linspace(-0.2, 2.0, 23), np.linspace(-1.1, 1.1, 23)  # where the loss is evaluated
AT_ONCE = 67  # of these points: few enough for what the network makes of them to stay in the caches


class Place(NamedTuple):
    """A direction in the metric A, the exact one having length 1: how far it goes along that, and how far astray."""

    along: float
    astray: float

    @property
    def captured(self) -> float:
        """Captured decrease: one less the squared distance from the exact step, ``1 − (1 − along)² − astray²``."""
        return 1 - (1 - self.along) ** 2 - self.astray**2

    @property
    def at_best_length(self) -> float:
        """The squared cosine of the angle between the two; 0 for no direction at all."""
        length = self.along**2 + self.astray**2
        return self.along**2 / length if length else 0.0


@dataclass(frozen=True, eq=False)
class Result:
    """Where each direction leads, and the loss on a plane.

    Attributes:
        places: of every direction.
        network: the problem with its Fisher.
    """

    values: ClassVar[tuple[str, ...]] = ("value",)
    tolerances: ClassVar[Mapping[str, Tolerance]] = SHARES | {
        "along": SHARE,
        "astray": SHARE,
        "gain": Tolerance(relative=5e-3, absolute=2e-3),
    }

    parameters: dict[str, Any]
    partition: Partition
    problem: str
    places: Mapping[str, Place]
    network: Setting

    @property
    def gain(self) -> NDArray:
        """What the loss really falls by, in units of the best that the model predicts, on the plane of the exact step
        and of K-FAC's, (astray, along), astray to K-FAC's side upwards; computed when it is first read."""
        return _gain(self.network, self.parameters["damping"], self.parameters["rule"])

    @property
    def headline(self) -> str:
        one, factored, two = (self.places[name] for name in (*KFAC_BY_RULE.values(), self.parameters["correction"]))
        return (f"K-FAC goes {number(one.along, 2)} of the way and {number(one.astray, 2)} astray, factored "
                f"{number(factored.along, 2)} and {number(factored.astray, 2)}, two levels {number(two.along, 2)} and "
                f"{number(two.astray, 2)}")  # fmt: skip

    @property
    def where(self) -> str:
        p = self.parameters
        return f"{self.problem}, {architecture(self.partition)}, {stage(p['steps'])}, λ = {number(p['damping'])}"

    def table(self) -> pandas.DataFrame:
        """Tidy: ``quantity``, ``item``, ``along``, ``value``."""
        import pandas

        rows: list[tuple] = []
        for name, place in self.places.items():
            rows += [("along", name, "", place.along), ("astray", name, "", place.astray)]
            rows += [("captured", name, "", place.captured), ("at_best_length", name, "", place.at_best_length)]
        for y, line in zip(ASTRAY.tolist(), self.gain, strict=True):
            rows += [("gain", f"{y:.1f}", round(x, 3), value) for x, value in zip(ALONG.tolist(), line, strict=True)]
        return pandas.DataFrame(rows, columns=["quantity", "item", "along", "value"])


def run(
    *,
    damping: Damping = 1e-2,
    per_layer: PerLayer = 4,
    coarse: Space = "spectral",
    correction: Correction = "balanced",
    rule: Rule = "eigen",
    data: Data = "digits4",
    widths: Widths = (12, 12, 12),
    n: Examples = 500,
    steps: Moments = 0,
    seed: Seed = 0,
    device: Device = "cpu",
) -> Result:
    """Where every method's step leads, beside the exact one.

    Args:
        seed: of data, weights and random columns.
    """
    p = check(run, locals())
    network = setting(*chosen(p))
    A, M, g = network.matrix.damped(damping), KFAC(network.F, damping, rule), network.g
    T = TwoLevel(A, M, space(coarse, A, M, g, per_layer, seed), correction)
    exact, _ = _plane(network, damping, rule)
    found = {name: place(A @ v, v, exact, g) for name, v in directions(network.F, T, g).items()}
    found["exact"] = Place(1.0, 0.0)
    return Result(p, network.F.partition, network.problem.name, found, network)


def place(Av: Tensor, v: Tensor, exact: Tensor, g: Tensor) -> Place:
    """Where v (P,) leads: since ``A e = g`` for the exact direction e, its part along e is ``gᵀv / gᵀe``."""
    unit = float(g @ exact)
    along = float(g @ v) / unit
    astray = max(float(v @ Av) / unit - along**2, 0.0) ** 0.5
    return Place(*map(float, rounded([along, astray])))


@lru_cache(maxsize=8)
def _plane(network: Setting, damping: float, rule: str) -> tuple[Tensor, Tensor]:
    """The exact direction, and what of K-FAC's is A-orthogonal to it, with the same length in the metric A."""
    A, g = network.F.damped(damping), network.g
    exact = A.solve(g)
    v = KFAC(network.F, damping, rule) @ g
    unit = float(g @ exact)
    off = v - float(g @ v) / unit * exact
    length = float(off @ (A @ off))
    return exact, off * (unit / length) ** 0.5 if length > 1e-12 * unit else torch.zeros_like(off)


@lru_cache(maxsize=8)
def _gain(network: Setting, damping: float, rule: str) -> NDArray:
    """The real decrease of the loss on the plane, in units of ``½ gᵀe``."""
    exact, off = _plane(network, damping, rule)
    x, y = (torch.from_numpy(part.ravel()).to(exact) for part in np.meshgrid(ALONG, ASTRAY))
    problem, partition = network.problem, network.F.partition
    weights = dict(problem.model.named_parameters())
    moved = {name: p.detach().expand(len(x), *p.shape).clone() for name, p in weights.items()}
    for layer, V in zip(partition.layers, partition.matrices(torch.outer(x, exact) + torch.outer(y, off)), strict=True):
        for piece in layer.pieces:
            vmap(lambda w, step, piece=piece: piece.of(w).sub_(step))(moved[piece.parameter], piece.view(V))

    model = problem.twin().model  # as functional_call puts other weights into it for a stage
    after = []
    with evaluation(model), torch.no_grad():
        for i in range(0, len(x), AT_ONCE):
            outputs = vmap(lambda weights: functional_call(model, weights, problem.arguments))(
                {name: w[i : i + AT_ONCE] for name, w in moved.items()}
            )
            after += [checked_nll(f, problem.targets, problem.likelihood) for f in outputs]  # vmap is slower
        before, after = problem.loss(), torch.stack(after)
    return rounded(((before - after) / (0.5 * float(network.g @ exact))).view(len(ASTRAY), len(ALONG)).cpu())


# ---- the picture --------------------------------------------------------------------------------------

LEVELS = (0.0, 0.25, 0.5, 0.75, 0.9)
SIDES = (-0.2, 2.0)  # of both pictures, along the exact step


class Plot(show.Plot):
    """Left the quadratic model, with every method's step; right the real loss on the plane of two of them."""

    size = (10.0, 5.9)
    layout = None

    def build(self, result: Result) -> None:
        (left, right), (down, up) = SIDES, (ASTRAY[0], ASTRAY[-1])
        scale = 4.1 / (right - left)  # inches for a unit, the same on every axis: circles are round
        model = self.axes(0.7, 1.0, 4.1, scale * (up + 0.05))
        real = self.axes(5.3, 1.0, 4.1, scale * (up - down))
        model.set(xlim=SIDES, ylim=(-0.05, up), xlabel="along the exact step", ylabel="astray; hollow: leads further")
        above = {"pad": 10}  # the marks at the edge
        model.set_title("The quadratic model: share of the best decrease", **above)
        real.set_title("The real loss on the plane of the exact step and K-FAC's", **above)
        real.set_xlabel("along the exact step; blue: lower, ±1: the best that the model predicts")
        angle = np.linspace(0, np.pi, 200)
        for level in LEVELS:  # captured = 1 − distance² from the exact step
            radius = (1 - level) ** 0.5
            model.plot(1 + radius * np.cos(angle), radius * np.sin(angle), color=FAINT, linewidth=1 + (level == 0))
            model.text(1, radius - 0.02, f"{level:g}", color=MUTED, ha="center", va="top", size=9)
        half = (ALONG[1] - ALONG[0]) / 2  # a pixel, whose middle is a point of the grid
        self.image = self.add_late(real.imshow(
            np.zeros((len(ASTRAY), len(ALONG))), cmap="RdBu", vmin=-1, vmax=1, origin="lower", aspect="auto",
            interpolation="bilinear", extent=(left - half, right + half, down - half, up + half),
        ))  # fmt: skip
        real.set(xlim=SIDES, ylim=(down, up), yticks=[-1, -0.5, 0, 0.5, 1])
        bar = self.figure.colorbar(self.image, cax=self.axes(9.47, 1.0, 0.1, scale * (up - down)), ticks=[-1, 0, 1])
        bar.set_ticklabels(["≤ −1", "0", "≥ 1"])
        bar.outline.set_visible(False)
        self.rays, self.dots, self.real = {}, {}, {}
        for name, style in ((name, METHODS[name]) for name in ORDER):
            marked = {"color": style.color, "marker": style.marker, "markersize": 8}
            self.rays[name] = self.add(model.plot([], [], color=style.color, linewidth=1.2, linestyle=style.line)[0])
            self.dots[name] = self.add(model.plot([], [], **marked, linestyle="none", label=style.label)[0])
            self.dots[name].set_clip_on(False)
            if name in (*KFAC_BY_RULE.values(), "exact"):
                self.real[name] = self.add_late(real.plot([], [], **marked, markevery=[1])[0])
        for ax in (model, real):
            ax.axhline(0, color=INK, linewidth=0.6)
            ax.plot([0], [0], color=INK, marker="+", markersize=9)
        self.figure.legend(handles=list(self.dots.values()), loc="upper left", ncols=2,
                           bbox_to_anchor=(0.06, 1 - 4.25 / self.size[1]))  # fmt: skip

    def move(self, result: Result) -> None:
        (left, right), up = SIDES, ASTRAY[-1]
        for name in ORDER:
            x, y = result.places[name]
            best = x / (x**2 + y**2) if x or y else 0.0  # where its ray comes nearest to the exact step
            self.rays[name].set_data([0, max(1.0, best) * x], [0, max(1.0, best) * y])
            inside = min(1.0, (right if x > 0 else left) / (x or left), up / (y or up))  # so much of the ray is seen
            self.dots[name].set_data([inside * x], [inside * y])
            self.dots[name].set_fillstyle("full" if inside == 1 else "none")

    def finish(self, result: Result) -> None:
        self.image.set_data(result.gain)
        for name, line in self.real.items():
            line.set_data([0, result.places[name].along], [0, result.places[name].astray])
            line.set_visible(name in (KFAC_BY_RULE[result.parameters["rule"]], "exact"))  # what the plane is made of

    def words(self, result: Result) -> str:
        told = ", ".join(f"{METHODS[name].label} {number(p.along, 2)} along and {number(p.astray, 2)} astray (captured "
                         f"{share(p.captured)}, at its best length {share(p.at_best_length)})"
                         for name, p in result.places.items())  # fmt: skip
        return f"{super().words(result)} {told}."


# ---- the exercises ------------------------------------------------------------------------------------


@exercise("06a", "Distance from the exact step: 1.5 too far along, nothing astray.")
def _twice_and_a_half_as_far() -> float:
    return Place(2.5, 0.0).captured


@exercise("06b", "A quarter circle over the segment from standing still to the exact step: Thales.", 0.01)
def _best_of_a_right_angle() -> float:
    return Place(0.5, 0.5).at_best_length
