"""Depth: whether a coarse space does for the layers of a network what it does for subdomains."""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor

from .. import KFAC, BlockDiagonal, Dense, Partition, TwoLevel, captured_decrease, coarse, spectrum
from ..method.operator import cholesky
from ..parameters import Device, Examples, Range, Repeats, Seed, Steps, Tolerance, check, number
from ..show import FAINT, METHODS, MUTED, CurveView, Plot, Style, plain_numbers, styled
from . import problems
from .curves import Curve, Study, by_key, over_seeds, seeds
from .exercises import exercise
from .setting import Setting, iterations, largest_eigenvalue
from .threads import one_thread


class DepthResult(Study):
    """Curves over the number of layers, a series for each method.

    Quantities: ``iterations`` of conjugate gradients with orthogonal residuals, ``largest`` eigenvalue of M A,
    ``captured`` decrease; and ``above``, the number of eigenvalues of F that exceed λ.
    """

    @property
    def headline(self) -> str:
        p, captured = self.parameters, self.of("captured")
        at = int(np.argmax(p["layers"]))
        return (f"At {p['layers'][at]} layers one step of K-FAC captures {number(captured['kfac'].y[at])} of the best "
                f"decrease, balanced eigenvectors {number(captured['leading, balanced'].y[at])}")

    @property
    def where(self) -> str:
        p = self.parameters
        data = {"planted_bn": "planted, batch norm", "planted": "planted", "digits4": "digits 4×4"}[p["data"]]
        return (f"{data}, {p['n']} examples, hidden width {p['width']}, after {p['steps']} Adam steps, "
                f"λ = {number(p['damping'])} λ_max, {p['per_layer']} eigenvectors per layer; median and range of "
                f"{p['repeats']} seeds")


@one_thread()
def run_depth(
    *,
    damping: Annotated[float, Range(1e-5, 1e-1, log=True, steps=61)] = 1e-3,
    per_layer: Annotated[int, Range(1, 7)] = 4,
    layers: Annotated[tuple[int, ...], Range(2, 24)] = (2, 3, 5, 9, 17),
    width: Annotated[int, Range(6, 16)] = 8,
    data: Literal["planted_bn", "planted", "digits4"] = "planted_bn",
    n: Examples = 500,
    steps: Steps = 100,
    rtol: Tolerance = 1e-6,
    repeats: Repeats = 5,
    seed: Seed = 0,
    device: Device = "cpu",
) -> DepthResult:
    """Conjugate gradients on ``(F + λI) v = g`` for networks of more and more layers.

    Args:
        damping: λ as a share of the largest eigenvalue of F, so that every depth is asked the same.
        per_layer: leading eigenvectors in each layer; the constants are always one per layer.
        layers: how many Linear layers.
        width: of the hidden layers.
        data: the planted toy problem with or without batch norm, or digits of 4×4 pixels. Without batch norm
            the signal fades from layer to layer.
    """
    p = check(run_depth, locals())
    curves = over_seeds(layers, (
        by_key(_measure(data, depth, width, n, steps, s, device, damping, per_layer, rtol) for depth in layers)
        for s in seeds(p)
    ))  # fmt: skip
    return DepthResult(p, curves)


def methods(A: Dense, M: KFAC, F, per_layer: int) -> dict[str, Dense | TwoLevel | KFAC]:
    """The preconditioners that the study compares, by the name of their series."""
    constants, leading = coarse.nicolaides(F, 1), coarse.spectral(F, per_layer)
    return {
        "kfac": M,
        "constants, additive": TwoLevel(A, M, constants, "additive"),
        "constants, balanced": TwoLevel(A, M, constants, "balanced"),
        "leading, additive": TwoLevel(A, M, leading, "additive"),
        "leading, balanced": TwoLevel(A, M, leading, "balanced"),
    }


@lru_cache(maxsize=64)
def _network(data: str, depth: int, width: int, n: int, steps: int, seed: int, device: str) -> tuple[Setting, Tensor]:
    """A network, and the eigenvalues of its Fisher: at 1,200 parameters these are cheap, eigenvectors not."""
    if data == "digits4":
        problem = problems.digits([width] * (depth - 1), n, seed, side=4, device=device)
    else:
        problem = problems.planted(depth, width, n, seed, batch_norm=data == "planted_bn", device=device)
    network = Setting(problem.trained(steps))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of batch norm's parameters, which stay outside the Fisher
        return network, torch.linalg.eigvalsh(network.dense)


def _measure(data, depth, width, n, steps, seed, device, damping, per_layer, rtol) -> dict[tuple[str, str], float]:
    """One number for every quantity and series. Dense throughout: quickest for some hundred parameters."""
    s, eigenvalues = _network(data, depth, width, n, steps, seed, device)
    λ = damping * float(eigenvalues[-1])
    F, g, system = s.F, s.g, s.matrix.damped(λ)
    A = Dense(system.dense(), F.partition)
    L = cholesky(A.dense(), "The damped Fisher")
    found = {
        ("above", "eigenvalues"): float((eigenvalues > λ).sum()),
        ("iterations", "none"): iterations(A, g, None, rtol),
    }
    for name, method in methods(system, KFAC(F, λ), F, per_layer).items():
        T = Dense(method.dense(), F.partition)
        found["iterations", name] = iterations(A, g, T, rtol)
        found["largest", name] = largest_eigenvalue(T.dense(), L)
        found["captured", name] = captured_decrease(A, g, T @ g)
    return found


# ---- the picture --------------------------------------------------------------------------------------

SERIES: dict[str, Style] = {  # what is added lies close to K-FAC, and is drawn below it
    "none": METHODS["none"],
    "constants, additive": styled("nicolaides", "additive"),
    "leading, additive": styled("spectral", "additive"),
    "kfac": METHODS["kfac"],
    "constants, balanced": styled("nicolaides", "balanced"),
    "leading, balanced": styled("spectral", "balanced"),
}
ABOVE = {"eigenvalues": Style("eigenvalues of F above λ", FAINT, "")}


class DepthPlot(Plot):
    """Largest eigenvalue, iterations and captured decrease side by side."""

    size = (10.0, 4.7)
    fixed = ("layers",)

    def build(self, result: DepthResult) -> None:
        axes = self.figure.subplots(1, 3)
        layers = sorted(result.parameters["layers"])
        x = dict(x="layers", xlim=(layers[0] / 1.15, layers[-1] * 1.15))
        self.views = {
            "largest": self.add(CurveView(axes[0], SERIES, shown(result, "largest"), "Largest eigenvalue of M A",
                                          ylim=(0.9, 100), **x)),
            "iterations": self.add(CurveView(axes[1], ABOVE | SERIES, shown(result, "iterations"), "Iterations",
                                             ylim=(8, 800), **x)),
            "captured": self.add(CurveView(axes[2], SERIES, shown(result, "captured"), "Captured by one step",
                                           ylim=(-2000, 1.15), scale=("log", "symlog"), **x)),
        }  # fmt: skip
        axes[2].set_yscale("symlog", linthresh=1, linscale=0.7)
        axes[2].axhline(0, color=FAINT, linewidth=1, zorder=0.5)
        axes[0].plot(layers, layers, color=FAINT, linewidth=1, zorder=0.5)
        axes[0].annotate("one for each layer", (layers[-2], layers[-2]), (5, -3), textcoords="offset points", va="top",
                         color=MUTED)  # fmt: skip
        numbers = (1, 3, 10, 30, 100), (10, 30, 100, 300), (1, 0, -1, -10, -100, -1000)
        for ax, ticks in zip(axes, numbers, strict=True):
            plain_numbers(ax.xaxis, layers)
            plain_numbers(ax.yaxis, ticks)
        lines = self.views["iterations"].lines
        self.legend([lines[name] for name in (*SERIES, *ABOVE)], 3)

    def move(self, result: DepthResult) -> None:
        for quantity, view in self.views.items():
            view.update(shown(result, quantity))


def shown(result: DepthResult, quantity: str) -> dict[str, Curve]:
    """The curves of one axes, with bands where the lines are solid: five of them would hide each other."""
    curves = result.of(quantity) | (result.of("above") if quantity == "iterations" else {})
    return {name: c._replace(low=c.y, high=c.y) if "additive" in name else c for name, c in curves.items()}


# ---- the exercises ------------------------------------------------------------------------------------

@exercise("06a", "Take v whose pieces v_l all have v_lᵀ A_ll v_l = 1, and Cauchy–Schwarz for the cross terms.")
def _most_block_jacobi_can_overshoot() -> int:
    layers = 17  # the worst case: every layer sees the same direction
    A = Dense(torch.ones(layers, layers, dtype=torch.float64), Partition.from_sizes([1] * layers)).damped(1e-9)
    return round(float(spectrum(A, BlockDiagonal(A, 1e-9))[-1]))


@exercise("06b", "Call run_depth for one size after the other and watch the captured decrease.")
def _eigenvectors_for_nine_tenths() -> int:
    captured = (run_depth(layers=(9,), repeats=1, per_layer=k).of("captured")["leading, balanced"] for k in range(1, 8))
    return next(k for k, c in enumerate(captured, 1) if c.y[0] >= 0.95)
