"""What tells the exact, the Monte Carlo and the empirical Fisher apart, on two parameters and on a network."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..method.fisher import Fisher
from ..method.likelihood import nll
from ..method.partition import Partition
from ..method.preconditioner import Diagonal, Identity
from ..parameters import Device, Range, Seed, check
from ..show.curves import CurveView, empty_line
from ..show.parts import MatrixView, limit_of
from ..show.plot import Plot
from ..show.style import FAINT, FLAVOURS, INK, METHODS, Style
from .curves import Curve, Study, captured, curve, frobenius, rounded
from .exercises import exercise
from .problems import Problem
from .setting import DAMPINGS, OVER_DAMPINGS, Widths, first_network, setting
from .threads import one_thread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray


SAMPLES = tuple(2**k for k in range(8))


@dataclass(frozen=True, eq=False)
class Plane:
    """A model with two parameters: its loss around the data, and what each Fisher makes of one point."""

    axes: tuple[NDArray, NDArray]  # weight (n,), bias (n,)
    loss: NDArray  # (bias, weight)
    minimum: NDArray  # (2,)
    metrics: dict[str, NDArray]  # flavour: F + λI, (2, 2)
    steps: dict[str, NDArray]  # direction, to be subtracted, with its own best length, (2,)
    shares: dict[str, float]  # captured decrease of that step


@dataclass(frozen=True, eq=False)
class FisherResult(Study):
    """Series are flavours; by quantity: ``spectrum`` over rank, as a share of the largest eigenvalue of F;
    ``error`` over samples, ‖F̂ − F‖ / ‖F‖; ``captured`` and ``rescaled`` over λ; ``plane``, the shares of its steps.
    """

    partition: Partition
    matrices: dict[str, Tensor]  # flavour: (P, P)
    largest: float  # eigenvalue of the exact F
    plane: Plane


@one_thread()
def run_fisher(
    *,
    damping: Annotated[float, DAMPINGS] = 1e-2,
    samples: Annotated[int, Range(1, 64)] = 1,
    weight: Annotated[float, Range(-2, 2, steps=81)] = 0.0,
    bias: Annotated[float, Range(-2, 2, steps=81)] = 1.0,
    likelihood: Literal["gaussian", "bernoulli"] = "gaussian",
    data: Literal["digits4", "digits8"] = "digits4",
    widths: Widths = (12, 12, 12),
    n: Annotated[int, Range(10, 1797)] = 500,
    steps: Annotated[int, Range(0, 2000)] = 20,
    repeats: Annotated[int, Range(1, 20)] = 5,
    seed: Seed = 0,
    device: Device = "cpu",
) -> FisherResult:
    """Compare the exact, the Monte Carlo and the empirical Fisher.

    Args:
        damping: λ, added to each of the three.
        samples: labels drawn per example for the Monte Carlo Fisher.
        weight: first parameter of the small model y = weight·x + bias.
        bias: its second parameter.
        likelihood: of the small model: least squares or logistic regression.
        data: digits pooled to 4×4 pixels, or in full.
        widths: of the hidden layers.
        n: examples.
        steps: of Adam before the network is looked at.
        repeats: independent draws of the Monte Carlo labels.
        seed: of data, weights and draws.
        device: where to compute.
    """
    parameters = check(run_fisher, locals())
    partition, matrices, curves, largest = _network(data, tuple(widths), n, steps, samples, repeats, seed, device)
    plane = _plane(damping, samples, (weight, bias), likelihood, seed, device)
    shares = {("plane", name): curve([damping], [share]) for name, share in plane.shares.items()}
    return FisherResult(parameters, curves | shares, partition, matrices, largest, plane)


def sampling_error(F: Fisher, probabilities: Tensor) -> float:
    """``√(E‖F_mc − F‖²)`` with one label per example, from the exact categorical Fisher: no sampling.

    Labels of different examples are independent, so the mean square is ``(1/N²) Σ_n (Σ_c p_c ‖s_c‖⁴ − ‖F_n‖²)``
    with the scores s_c and ``F_n = Σ_c p_c s_c s_cᵀ``; S labels per example divide it by S.

    Args:
        F: exact, categorical.
        probabilities: (N, S), in the order of F's vectors.
    """
    # Gram matrix of the scaled scores √p_c s_c of each example; a position t is one use of the layer.
    gram = sum(
        torch.einsum("antu,bntu->nab", v, v)
        for v in (torch.einsum("snto,nti->snoi", g, a) for a, g in zip(F.a, F.g, strict=True))
    )
    fourth = (gram.diagonal(dim1=1, dim2=2).square() / probabilities.clamp_min(1e-300)).sum()
    return float((fourth - gram.square().sum()).clamp_min(0)) ** 0.5 / F.N


@lru_cache(maxsize=4)
def _network(data, widths, n, steps, samples, repeats, seed, device):
    """What λ and the small model do not change: matrices, and curves over samples and over λ."""
    s = setting(data, widths, n, seed, steps, "exact", device)

    def draw(k: int, repeat: int) -> Fisher:
        generator = torch.Generator(device).manual_seed(seed + 1000 * k + repeat)
        return s.problem.capture("mc", samples=k, generator=generator)

    norm, largest = frobenius(s.dense), float(s.F.eigen.d.max())
    flavours = {
        "exact": [s.F],
        "mc": [draw(samples, r) for r in range(repeats)],
        "empirical": [s.problem.capture("empirical")],
    }
    matrices = {name: Fs[0].dense() for name, Fs in flavours.items()}
    errors = [[frobenius(draw(k, r).dense() - s.dense) / norm for k in SAMPLES] for r in range(repeats)]
    with torch.no_grad():
        predicted = sampling_error(s.F, s.problem.model(s.problem.inputs).softmax(1)) / norm
    curves: dict[tuple[str, str], Curve] = {
        ("error", "mc"): curve(SAMPLES, errors),
        ("error", "theory"): curve(SAMPLES, [predicted / k**0.5 for k in SAMPLES]),
        ("error", "empirical"): curve(SAMPLES, [frobenius(matrices["empirical"] - s.dense) / norm] * len(SAMPLES)),
    }
    λs = DAMPINGS.positions[::2]
    for name, Fs in flavours.items():
        d = np.stack([F.eigen.d.flip(0).cpu().numpy() for F in Fs]) / largest
        curves["spectrum", name] = curve(1 + np.arange(d.shape[1]), np.where(d < 1e-12, 0, d))
        shares = np.array([[captured(s.F.damped(λ), s.g, F.damped(λ).solve(s.g)) for λ in λs] for F in Fs])
        curves["captured", name] = curve(λs, shares[:, :, 0])
        curves["rescaled", name] = curve(λs, shares[:, :, 1])
    return s.F.partition, {name: matrix.cpu() for name, matrix in matrices.items()}, curves, largest


def _plane(damping, samples, point, likelihood, seed, device) -> Plane:
    """Regression with one weight and one bias; the noise grows with x, so no point makes the model right."""
    problem = small_problem(likelihood, seed, device, weight=point[0], bias=point[1])
    g, generator = problem.gradient(), torch.Generator(device).manual_seed(seed)
    F = {
        "exact": problem.capture(),
        "mc": problem.capture("mc", samples=samples, generator=generator),
        "empirical": problem.capture("empirical"),
    }
    A = F["exact"].damped(damping)
    directions = {
        "gradient": Identity(A) @ g,
        "adam": Diagonal(F["empirical"], damping, power=0.5) @ g,
        **{name: fisher.damped(damping).solve(g) for name, fisher in F.items()},
    }
    best = {name: float(g @ v) / float(v @ (A @ v)) * v for name, v in directions.items()}
    axis, loss, minimum = _landscape(likelihood, seed)
    return Plane(
        (axis, axis),
        loss,
        minimum,
        {name: fisher.damped(damping).dense().cpu().numpy() for name, fisher in F.items()},
        {name: rounded(v.cpu()) for name, v in best.items()},
        {name: float(rounded(captured(A, g, v)[0])) for name, v in best.items()},
    )


def small_problem(
    likelihood: str, seed: int, device: str = "cpu", *, weight: float = 0.0, bias: float = 0.0
) -> Problem:
    """The model with two parameters at one point: 200 examples, least squares or logistic regression."""
    generator = torch.Generator().manual_seed(seed)
    x = 1.5 + torch.randn(200, 1, generator=generator, dtype=torch.float64)
    noise = torch.randn(200, 1, generator=generator, dtype=torch.float64)
    y = x - 0.5 + 0.5 * x * noise
    if likelihood == "bernoulli":
        y = (x - 0.5 + 1.5 * noise > 0).to(torch.float64)
    model = nn.Sequential(nn.Linear(1, 1, dtype=torch.float64))
    problem = Problem(model, x, y, likelihood, "a line")
    point = torch.tensor([weight, bias], dtype=torch.float64)
    problem.partition.add_(model, point - problem.partition.pack(model))
    return problem.to(device)


@lru_cache(maxsize=4)
def _landscape(likelihood: str, seed: int) -> tuple[NDArray, NDArray, NDArray]:
    """The loss on a grid of weights and biases, and its minimum by Newton's method (the exact Fisher: λ = 0)."""
    problem = small_problem(likelihood, seed)
    axis = torch.linspace(-2.5, 2.5, 71, dtype=torch.float64)

    def loss(w: Tensor, b: Tensor) -> Tensor:
        return nll(problem.inputs * w + b, problem.targets, likelihood)

    grid = torch.vmap(torch.vmap(loss, (0, None)), (None, 0))(axis, axis)
    for _ in range(20):
        step = problem.capture().damped(0.0).solve(problem.gradient())
        problem.partition.add_(problem.model, step, alpha=-1)
    return axis.numpy(), rounded(grid), rounded(problem.partition.pack(problem.model))


# ---- the picture --------------------------------------------------------------------------------------


RADIUS = 0.25  # ½ vᵀ(F + λI)v on the ellipses
STEPS: dict[str, Style] = {"gradient": METHODS["gradient"], "adam": METHODS["adam"], **FLAVOURS}
THEORY = Style("exact expectation of the sampling error", INK, "", ":")


class FisherPlot(Plot):
    size = (13.0, 7.2)

    def build(self, result: FisherResult) -> None:
        top, bottom = self.figure.subplots(2, 4)
        self.landscapes = [
            Landscape(top[0], "Two parameters: three metrics"),
            Landscape(top[1], "… and steps, with the share captured"),
        ]
        self.ellipses = {name: empty_line(top[0], style, linewidth=2) for name, style in FLAVOURS.items()}
        self.steps = {
            name: empty_line(top[1], style, marker=style.marker, markevery=[1], markersize=8)
            for name, style in STEPS.items()
        }
        self.points = [ax.plot([], [], "o", color=INK, markersize=6, zorder=5)[0] for ax in top[:2]]
        self.shares = {
            name: top[1].text(0.03, 0.27 - 0.06 * i, "", transform=top[1].transAxes, color=s.color, weight="bold")
            for i, (name, s) in enumerate(STEPS.items())
        }
        self.error = CurveView(
            top[2], {**FLAVOURS, "theory": THEORY}, "Network: error of the matrix", x="labels drawn per example",
            y="‖F̂ − F‖ / ‖F‖", xlim=(0.9, 1.1 * SAMPLES[-1]), ylim=(0.005, 3),
        )  # fmt: skip
        self.rescaled = CurveView(
            top[3], FLAVOURS, "Network: captured decrease", y="share captured at best length",
            ylim=(0, 1.03), scale=("log", "linear"), **OVER_DAMPINGS,
        )  # fmt: skip
        self.spectrum = CurveView(
            bottom[3], FLAVOURS, "Spectra, and λ", x="rank", y="eigenvalue / largest of F",
            xlim=(0.9, 1.1 * result.partition.size), ylim=(1e-10, 3),
        )  # fmt: skip
        self.level = bottom[3].axhline(1, color=INK, linewidth=0.9, alpha=0.6)
        self.views = [
            MatrixView(ax, result.partition, style.label, pixels=162, logarithmic=False)
            for ax, style in zip(bottom, FLAVOURS.values(), strict=False)
        ]
        self.ends = bottom[0].text(1, 1.015, "", transform=bottom[0].transAxes, ha="right", fontsize="small")
        handles = [*self.steps.values(), self.error.lines["theory"]]
        self.figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
        self.animated = [
            *(view.lines for view in self.landscapes), *(view.minimum for view in self.landscapes),
            *self.ellipses.values(), *self.steps.values(), *self.points, *self.shares.values(),
            *self.error.artists, *self.rescaled.artists, *self.spectrum.artists, self.level,
            *(artist for view in self.views for artist in view.artists), self.ends,
        ]  # fmt: skip

    def update(self, result: FisherResult) -> None:
        plane, p = result.plane, result.parameters
        here = np.array([p["weight"], p["bias"]])
        for landscape, point in zip(self.landscapes, self.points, strict=True):
            landscape.update(plane)
            point.set_data(*here[:, None])
        angle = np.linspace(0, 2 * np.pi, 121)
        for name, line in self.ellipses.items():
            d, U = np.linalg.eigh(plane.metrics[name])
            axes = U * np.sqrt(2 * RADIUS / d)  # half axes, in the columns
            line.set_data(*(here[:, None] + axes @ np.stack([np.cos(angle), np.sin(angle)])))
        for name, line in self.steps.items():
            line.set_data(*np.stack([here, here - plane.steps[name]], axis=1))
            self.shares[name].set_text(f"{plane.shares[name]:.2f}  {STEPS[name].label}")
        # The diagonal of the first layers would outshine the rest: colours end at a fifth of the largest entry.
        limit = limit_of(result.matrices["exact"] / 5)
        for view, matrix in zip(self.views, result.matrices.values(), strict=True):
            view.update(matrix, limit)
        self.ends.set_text(f"colours end at ±{limit:.2g}")
        self.error.update(result.of("error"), at=p["samples"])
        self.rescaled.update(result.of("rescaled"), at=p["damping"])
        self.spectrum.update(result.of("spectrum"))
        self.level.set_ydata([p["damping"] / result.largest] * 2)
        error = {name: float(c.y[0]) for name, c in result.of("error").items()}
        self.figure.set_label(
            "Exact, Monte Carlo and empirical Fisher. Top left: contours of the loss of a model with two parameters, "
            "an ellipse for each Fisher, and steps with the decrease each captures: "
            + ", ".join(f"{STEPS[name].label} {share:.2f}" for name, share in plane.shares.items())
            + f". Network of {result.partition.size} parameters: one label per example gives a relative error of "
            f"{error['mc']:.2g}, falling with the root of the samples; the empirical Fisher stays at "
            f"{error['empirical']:.2g}. Then the decrease captured against damping, the three matrices in one signed "
            "colour scale, and their spectra."
        )

    def fits(self, result: FisherResult) -> bool:
        return result.partition == self.views[0].partition

    def regions(self, result: FisherResult) -> list[tuple[float, float, float, float, str]]:
        slices, found = result.partition.slices, []
        for view, (name, matrix) in zip(self.views, result.matrices.items(), strict=True):
            for l, m, box in view.boxes():
                norm = float(matrix[slices[l], slices[m]].norm())
                found.append((*box, f"{FLAVOURS[name].label}, layers {l + 1} and {m + 1}: Frobenius norm {norm:.3g}"))
        return found


class Landscape:
    """Contours of the loss over two parameters, and its minimum."""

    def __init__(self, ax: Axes, title: str) -> None:
        from matplotlib.collections import LineCollection

        self.lines = ax.add_collection(LineCollection([], colors=FAINT, linewidths=0.7))
        (self.minimum,) = ax.plot([], [], "+", color=INK, markersize=10)
        ax.set(title=title, xlabel="weight", ylabel="bias", xlim=(-2.5, 2.5), ylim=(-2.5, 2.5), aspect="equal")

    def update(self, plane: Plane) -> None:
        from contourpy import contour_generator

        lowest = plane.loss.min()
        levels = lowest + (plane.loss.max() - lowest) * np.geomspace(1e-3, 1, 14)[:-1]
        contours = contour_generator(*plane.axes, plane.loss)
        self.lines.set_segments([np.round(line, 4) for level in levels for line in contours.lines(level)])
        self.minimum.set_data(*plane.minimum[:, None])


plot_fisher = FisherPlot.draw


# ---- the exercises ------------------------------------------------------------------------------------


@exercise("01a", "The error falls with the root of the number of labels: what does a factor of ten cost?", 0.2)
def _labels_for_one_percent() -> float:
    s = first_network(steps=20)
    error = sampling_error(s.F, s.problem.model(s.problem.inputs).detach().softmax(1))
    return (error / float(s.dense.norm()) / 0.01) ** 2


@exercise("01b", "The score of one example is its residual times (x, 1); average the outer products.", 1e-6)
def _empirical_fisher_of_a_line() -> np.ndarray:
    return small_problem("gaussian", 0, weight=0.0, bias=1.0).capture("empirical").dense().numpy()
