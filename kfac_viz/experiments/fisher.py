"""Which Fisher? Exact, Monte Carlo and empirical: on two parameters, and on a network."""

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
from ..problems import Problem
from .curves import Curve, Study, captured, curve, frobenius, rounded
from .setting import DAMPINGS, Widths, setting
from .threads import one_thread

if TYPE_CHECKING:
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
