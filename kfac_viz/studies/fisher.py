"""What tells the exact, the Monte Carlo and the empirical Fisher apart, on two parameters and on a network."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import torch
from torch import Tensor, nn

from .. import Diagonal, Fisher, Identity, Partition, nll, show
from ..parameters import Device, Examples, Range, Repeats, Seed, Steps, Widths, check, number
from ..problems.rounding import perturbed
from ..problems.toys import Problem
from ..show import FAINT, INK, METHODS, CurveView, MatrixView, Style, Tolerance, empty_line, limit_of
from .common.exercises import exercise
from .common.result import PRECISION, SHARE, SHARES, Curve, Study, curve, rounded
from .common.setting import DAMPINGS, OVER_DAMPINGS, all_shares, at_best_length, chosen, first_network, setting, shares

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

SAMPLES = tuple(2**k for k in range(8))


@dataclass(frozen=True, eq=False)
class Plane:
    """A model with two parameters: its loss around the data, and what each Fisher makes of one point."""

    axis: NDArray  # of weight and of bias (n,)
    loss: NDArray  # (bias, weight)
    minimum: NDArray  # (2,)
    metrics: dict[str, NDArray]  # flavour: F + λI, (2, 2)
    steps: dict[str, NDArray]  # direction, to be subtracted, with its own best length, (2,)
    shares: dict[str, float]  # captured decrease of that step


@dataclass(frozen=True, eq=False)
class Result(Study):
    """Series are flavours; by quantity: ``spectrum`` over rank, as a share of the largest eigenvalue of F;
    ``error`` over samples, ‖F̂ − F‖ / ‖F‖; ``captured`` and ``at_best_length`` over λ, see :func:`.setting.shares`;
    ``plane``, what its steps capture.
    """

    tolerances = SHARES | {
        "plane": SHARE,
        "error": Tolerance(relative=2e-3),
        "spectrum": Tolerance(relative=1e-2, absolute=10 * PRECISION),
    }

    partition: Partition
    matrices: dict[str, Tensor]  # flavour: (P, P)
    largest: float  # eigenvalue of the exact F
    plane: Plane

    @property
    def headline(self) -> str:
        error = self.of("error")
        one, many = (number(error["mc"].y[i], 2) for i in (0, -1))
        return (
            f"One drawn label misses {one} of the Fisher, {error['mc'].x[-1]:.0f} miss {many}; the true one "
            f"(empirical) {number(error['empirical'].y[0], 2)}"
        )


def run(
    *,
    damping: Annotated[float, DAMPINGS] = 1e-2,
    samples: Annotated[int, Range(1, 64)] = 1,
    weight: Annotated[float, Range(-2, 2, steps=81)] = 0.0,
    bias: Annotated[float, Range(-2, 2, steps=81)] = 1.0,
    likelihood: Literal["gaussian", "bernoulli"] = "gaussian",
    data: Literal["digits4", "digits8"] = "digits4",
    widths: Widths = (12, 12, 12),
    n: Examples = 500,
    steps: Steps = 20,
    repeats: Repeats = 5,
    seed: Seed = 0,
    device: Device = "cpu",
) -> Result:
    """Compare the exact, the Monte Carlo and the empirical Fisher.

    Args:
        damping: λ, added to each of the three.
        samples: labels drawn per example for the Monte Carlo Fisher.
        weight: first parameter of the small model y = weight·x + bias.
        bias: its second parameter.
        likelihood: of the small model: least squares or logistic regression.
        data: digits pooled to 4×4 pixels, or in full.
        repeats: independent draws of the Monte Carlo labels.
        seed: of data, weights and draws.
    """
    parameters = check(run, locals())
    partition, matrices, curves, largest = _network(chosen(parameters), samples, repeats)
    plane = _plane(damping, samples, likelihood, seed, device, weight=weight, bias=bias)
    steps = {("plane", name): curve([damping], [share]) for name, share in plane.shares.items()}
    return Result(parameters, curves | steps, partition, matrices, largest, plane)


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
def _network(
    network: tuple, samples: int, repeats: int
) -> tuple[Partition, dict[str, Tensor], dict[tuple[str, str], Curve], float]:
    """What λ and the small model do not change: partition, matrices, curves over samples and λ, largest eigenvalue."""
    s = setting(*network)

    def draw(k: int, repeat: int) -> Fisher:
        generator = torch.Generator().manual_seed(s.seed + 1000 * k + repeat)
        return s.problem.capture("mc", samples=k, generator=generator)

    norm, largest = float(s.dense.norm()), float(s.F.eigen.d.max())
    flavours = {
        "exact": [s.F],
        "mc": [draw(samples, r) for r in range(repeats)],
        "empirical": [s.problem.capture("empirical")],
    }
    matrices = {name: Fs[0].dense() for name, Fs in flavours.items()}
    errors = [[float((draw(k, r).dense() - s.dense).norm()) / norm for k in SAMPLES] for r in range(repeats)]
    with torch.no_grad():
        predicted = sampling_error(s.F, s.problem.model(s.problem.inputs).softmax(1)) / norm
    missed = float((matrices["empirical"] - s.dense).norm()) / norm
    curves: dict[tuple[str, str], Curve] = {
        ("error", "mc"): curve(SAMPLES, errors),
        ("error", "theory"): curve(SAMPLES, [predicted / k**0.5 for k in SAMPLES]),
        ("error", "empirical"): curve(SAMPLES, [missed] * len(SAMPLES)),
    }
    λs = DAMPINGS.positions[::2]
    for name, Fs in flavours.items():
        d = np.stack([F.eigen.d.flip(0).cpu().numpy() for F in Fs]) / largest
        curves["spectrum", name] = curve(1 + np.arange(d.shape[1]), np.where(d < PRECISION, 0, d))
        found = np.array([[shares(s.F.damped(λ), s.g, F.damped(λ).solve(s.g)) for λ in λs] for F in Fs])
        curves["captured", name] = curve(λs, found[:, :, 0])
        curves["at_best_length", name] = curve(λs, found[:, :, 1])
    return s.F.partition, {name: matrix.cpu() for name, matrix in matrices.items()}, curves, largest


def _plane(
    damping: float, samples: int, likelihood: str, seed: int, device: str, *, weight: float, bias: float
) -> Plane:
    """Regression with one weight and one bias; the noise grows with x, so no point makes the model right."""
    problem = small_problem(likelihood, seed, device, weight=weight, bias=bias)
    g, generator = problem.gradient(), torch.Generator().manual_seed(seed)
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
    return Plane(
        *_landscape(likelihood, seed),
        {name: fisher.damped(damping).dense().cpu().numpy() for name, fisher in F.items()},
        {name: rounded(at_best_length(A, g, v).cpu()) for name, v in directions.items()},
        {name: float(rounded(x.at_best_length)) for name, x in all_shares(A, g, directions).items()},
    )


def small_problem(
    likelihood: str, seed: int, device: str = "cpu", *, weight: float = 0.0, bias: float = 0.0
) -> Problem:
    """The model with two parameters at one point: 200 examples, least squares or logistic regression."""
    generator = torch.Generator().manual_seed(seed)
    x = 1.5 + torch.randn(200, 1, generator=generator, dtype=torch.float64, device="cpu")
    noise = torch.randn(200, 1, generator=generator, dtype=torch.float64, device="cpu")
    y = x - 0.5 + 0.5 * x * noise
    if likelihood == "bernoulli":
        y = (x - 0.5 + 1.5 * noise > 0).to(torch.float64)
    model = nn.Sequential(nn.Linear(1, 1, dtype=torch.float64, device="cpu"))
    problem = Problem(model, perturbed(x), y, likelihood, "a line")
    point = torch.tensor([weight, bias], dtype=torch.float64, device="cpu")
    problem.partition.add_(model, point - problem.partition.pack(model))
    return problem.to(device)


@lru_cache(maxsize=4)
def _landscape(likelihood: str, seed: int) -> tuple[NDArray, NDArray, NDArray]:
    """The loss on a grid of weights and biases, and its minimum by Newton's method (the exact Fisher: λ = 0)."""
    problem = small_problem(likelihood, seed)
    axis = torch.linspace(-2.5, 2.5, 71, dtype=torch.float64, device="cpu")

    def loss(w: Tensor, b: Tensor) -> Tensor:
        return nll(problem.inputs * w + b, problem.targets, likelihood)

    grid = torch.vmap(torch.vmap(loss, (0, None)), (None, 0))(axis, axis)
    for _ in range(20):
        step = problem.capture().damped(0.0).solve(problem.gradient())
        problem.partition.add_(problem.model, step, alpha=-1)
    return axis.numpy(), rounded(grid), rounded(problem.partition.pack(problem.model))


# ---- the picture --------------------------------------------------------------------------------------

FLAVOURS: dict[str, Style] = {
    "exact": Style("exact Fisher", "#000000", "*", "-"),
    "mc": Style("Monte Carlo Fisher", "#009E73", "s", "-"),
    "empirical": Style("empirical Fisher", "#CC79A7", "P", "--"),
}
RADIUS = 0.25  # ½ vᵀ(F + λI)v on the ellipses
STEPS = {name: (METHODS | FLAVOURS)[name] for name in ("gradient", "adam", "mc", "empirical", "exact")}
THEORY = Style("sampling error, expected", INK, "", ":")


class Plot(show.Plot):
    """Two parameters and errors above; the three matrices and their spectra below."""

    size = (10.0, 5.9)

    def build(self, result: Result) -> None:
        top, bottom = self.figure.subplots(2, 4)
        titles = "Three metrics", "Share that steps capture"
        self.landscapes = [self.add(Landscape(ax, title)) for ax, title in zip(top, titles, strict=False)]
        self.ellipses = {name: self.add(empty_line(top[0], style)) for name, style in FLAVOURS.items()}
        self.steps = {  # where two agree the later one lies, thinner, on the other
            name: self.add(empty_line(top[1], style, marker=style.marker, markevery=[1], linewidth=width,
                                      markersize=4 + 2.4 * width))
            for (name, style), width in zip(STEPS.items(), (3.2, 1.4, 3.2, 2, 1.4), strict=True)
        }  # fmt: skip
        self.shares = {
            name: self.add(top[1].text(0.03, 0.4 - 0.095 * i, "", transform=top[1].transAxes, color=s.ink, size=9))
            for i, (name, s) in enumerate(STEPS.items())
        }
        self.points = [self.add(ax.plot([], [], "o", color=INK, zorder=5)[0]) for ax in top[:2]]
        self.error = self.add(CurveView(
            top[2], FLAVOURS | {"theory": THEORY}, result.of("error"), "‖F̂ − F‖ / ‖F‖", x="labels per example",
            xlim=(0.9, 1.1 * SAMPLES[-1]), ylim=(0.005, 3),
        ))  # fmt: skip
        self.at_best_length = self.add(CurveView(
            top[3], FLAVOURS, result.of("at_best_length"), "Captured, best length", ylim=(0, 1.03),
            scale=("log", "linear"), **OVER_DAMPINGS,
        ))  # fmt: skip
        self.spectrum = self.add(CurveView(
            bottom[3], FLAVOURS, result.of("spectrum"), "Spectra / λ_max(F)", x="rank (triangle: less)",
            xlim=(0.9, 1.1 * result.partition.size), ylim=(1e-10, 3),
        ))  # fmt: skip
        self.level = self.add(bottom[3].axhline(1, color=INK, linewidth=0.9, alpha=0.6))
        self.matrices = [
            self.add(MatrixView(ax, result.partition, style.label, pixels=162, logarithmic=False))
            for ax, style in zip(bottom, FLAVOURS.values(), strict=False)
        ]
        self.legend([*self.steps.values(), self.error.lines["theory"]], 3)

    def note(self, result: Result) -> str:  # the diagonal of the first layers would outshine the rest
        return f"; colours end at ±{number(limit_of(result.matrices['exact'] / 5), 2)}"

    def move(self, result: Result) -> None:
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
            self.shares[name].set_text(f"{plane.shares[name]:.2f}")
        limit = limit_of(result.matrices["exact"] / 5)
        for view, matrix in zip(self.matrices, result.matrices.values(), strict=True):
            view.update(matrix, limit)
        self.error.update(result.of("error"), at=p["samples"])
        self.at_best_length.update(result.of("at_best_length"), at=p["damping"])
        self.spectrum.update(result.of("spectrum"))
        self.level.set_ydata([p["damping"] / result.largest] * 2)


class Landscape:
    """Contours of the loss over two parameters, and its minimum."""

    def __init__(self, ax: Axes, title: str) -> None:
        from matplotlib.collections import LineCollection

        self.lines = ax.add_collection(LineCollection([], colors=FAINT, linewidths=0.7))
        (self.minimum,) = ax.plot([], [], "+", color=INK, markersize=10)
        self.artists = [self.lines, self.minimum]
        ax.set(title=title, xlabel="weight", ylabel="bias", xlim=(-2.5, 2.5), ylim=(-2.5, 2.5), aspect="equal")

    def update(self, plane: Plane) -> None:
        from contourpy import contour_generator

        lowest = plane.loss.min()
        levels = lowest + (plane.loss.max() - lowest) * np.geomspace(1e-3, 1, 14)[:-1]
        contours = contour_generator(plane.axis, plane.axis, plane.loss)
        self.lines.set_segments([np.round(line, 4) for level in levels for line in contours.lines(level)])
        self.minimum.set_data(*plane.minimum[:, None])


# ---- the exercises ------------------------------------------------------------------------------------


@exercise("01a", "The error falls with the root of the number of labels: what does a factor of ten cost?", 0.2)
def _labels_for_one_percent() -> float:
    s = first_network(steps=20)
    error = sampling_error(s.F, s.problem.model(s.problem.inputs).detach().softmax(1))
    return (error / float(s.dense.norm()) / 0.01) ** 2


@exercise("01b", "The score of one example is its residual times (x, 1); average the outer products.", 1e-6)
def _empirical_fisher_of_a_line() -> np.ndarray:
    return small_problem("gaussian", 0, weight=0.0, bias=1.0).capture("empirical").dense().numpy()
