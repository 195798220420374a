"""Depth: whether a coarse space does for the layers of a network what it does for subdomains."""

from __future__ import annotations

import warnings
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor

from ..method import coarse
from ..method.kfac import KFAC
from ..method.krylov import pcg, spectrum
from ..method.operator import Dense, cholesky
from ..method.partition import Partition
from ..method.preconditioner import BlockDiagonal
from ..method.two_level import TwoLevel
from ..parameters import Device, Range, Seed, check
from ..show.curves import CurveView
from ..show.plot import Plot
from ..show.style import FAINT, METHODS, MUTED, SPACES, Style
from . import problems
from .curves import Study, curve
from .exercises import exercise
from .setting import Setting
from .threads import one_thread


class DepthResult(Study):
    """Curves over the number of layers, a series for each method.

    Quantities: ``iterations`` of conjugate gradients with orthogonal residuals, ``largest`` eigenvalue of M A,
    ``captured`` decrease; and ``above``, the number of eigenvalues of F that exceed λ.
    """


@one_thread()
def run_depth(
    *,
    damping: Annotated[float, Range(1e-5, 1e-1, log=True, steps=61)] = 1e-3,
    per_layer: Annotated[int, Range(1, 7)] = 4,
    layers: Annotated[tuple[int, ...], Range(2, 24)] = (2, 3, 5, 9, 17),
    width: Annotated[int, Range(6, 16)] = 8,
    data: Literal["planted_bn", "planted", "digits4"] = "planted_bn",
    n: Annotated[int, Range(1, 1797)] = 500,
    steps: Annotated[int, Range(0, 1000)] = 100,
    rtol: Annotated[float, Range(1e-10, 1e-1, log=True)] = 1e-6,
    repeats: Annotated[int, Range(1, 20)] = 5,
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
        n: examples.
        steps: full-batch Adam steps before the Fisher is taken.
        rtol: residual, as a share of the gradient, at which the iterations stop.
        repeats: seeds, from ``seed`` upwards; a band shows the lowest and the highest.
        seed: of data and weights.
        device: where to compute.
    """
    parameters = check(run_depth, locals())
    values: dict[tuple[str, str], list[list[float]]] = defaultdict(list)  # one row per seed
    for s in range(seed, seed + repeats):
        rows = defaultdict(list)
        for depth in layers:
            network = _network(data, depth, width, n, steps, s, device)
            for key, value in _measure(network, damping, per_layer, rtol).items():
                rows[key].append(value)
        for key, row in rows.items():
            values[key].append(row)
    return DepthResult(parameters, {key: curve(layers, rows) for key, rows in values.items()})


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


@dataclass(frozen=True, eq=False)
class _Network(Setting):
    """A setting with the eigenvalues of its Fisher alone: at 1,200 parameters these are cheap, eigenvectors not."""

    @cached_property
    def eigenvalues(self) -> Tensor:
        return torch.linalg.eigvalsh(self.dense)


@lru_cache(maxsize=64)
def _network(data: str, depth: int, width: int, n: int, steps: int, seed: int, device: str) -> _Network:
    if data == "digits4":
        problem = problems.digits([width] * (depth - 1), n, seed, side=4, device=device)
    else:
        problem = problems.planted(depth, width, n, seed, batch_norm=data == "planted_bn", device=device)
    network = _Network(problem.trained(steps))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the parameters of batch norm stay outside the Fisher
        network.F  # noqa: B018
    return network


def _measure(network: _Network, damping: float, per_layer: int, rtol: float) -> dict[tuple[str, str], float]:
    """One number for every quantity and series. Dense throughout: quickest for some hundred parameters."""
    F, g = network.F, network.g
    lam = damping * float(network.eigenvalues[-1])
    A = Dense(network.dense + lam * torch.eye(len(g), dtype=g.dtype, device=g.device), F.partition)
    two_level = Dense(network.dense, F.partition).damped(lam)
    L = cholesky(A.dense(), "The damped Fisher")
    exact = torch.cholesky_solve(g[:, None], L)[:, 0]
    found = {
        ("above", "eigenvalues"): float((network.eigenvalues > lam).sum()),
        ("iterations", "none"): pcg(A, g, rtol=rtol, reorthogonalize=True).iterations,
    }
    for name, method in methods(two_level, KFAC(F, lam), F, per_layer).items():
        T = Dense(method.dense(), F.partition)
        v = T @ g
        found["iterations", name] = pcg(A, g, T, rtol=rtol, reorthogonalize=True).iterations
        found["largest", name] = largest_eigenvalue(T.dense(), L)
        found["captured", name] = float(2 * (g @ v) - v @ (A @ v)) / float(g @ exact)
    return found


def largest_eigenvalue(T: Tensor, L: Tensor) -> float:
    """λ_max(T A) for ``A = L Lᵀ``, by Lanczos on the similar ``Lᵀ T L``."""
    import numpy as np
    from scipy.sparse.linalg import LinearOperator, eigsh

    T, L = T.cpu().numpy(), L.cpu().numpy()
    similar = LinearOperator(T.shape, matvec=lambda x: L.T @ (T @ (L @ x)), dtype=T.dtype)
    return float(eigsh(similar, 1, which="LA", v0=np.ones(len(T)), ncv=12, tol=1e-4, return_eigenvectors=False)[0])


# ---- the picture --------------------------------------------------------------------------------------


def _style(space: str, correction: str) -> Style:
    style, line = SPACES[space], "-" if correction == "balanced" else ":"
    return style._replace(label=f"{style.label.split(' (')[0]}, {correction}", line=line)


SERIES: dict[str, Style] = {  # what is added lies close to K-FAC, and is drawn below it
    "none": METHODS["gradient"]._replace(label="no preconditioner"),
    "constants, additive": _style("nicolaides", "additive"),
    "leading, additive": _style("spectral", "additive"),
    "kfac": METHODS["kfac"],
    "constants, balanced": _style("nicolaides", "balanced"),
    "leading, balanced": _style("spectral", "balanced"),
}
ORDER = ("none", "kfac", "constants, additive", "constants, balanced", "leading, additive", "leading, balanced")


class DepthPlot(Plot):
    size = (11.6, 4.6)

    def build(self, result: DepthResult) -> None:
        axes = self.figure.subplots(1, 3)
        self.layers = layers = sorted(result.parameters["layers"])
        x = dict(x="layers", xlim=(layers[0] / 1.15, layers[-1] * 1.15))
        above = Style("eigenvalues of F above λ", FAINT, "", "-")
        self.views = {
            "largest": CurveView(axes[0], SERIES, "Largest eigenvalue of M A", y="", ylim=(0.9, 100), **x),
            "iterations": CurveView(axes[1], {**SERIES, "eigenvalues": above}, "Iterations of conjugate gradients",
                                    y="", ylim=(8, 800), **x),
            "captured": CurveView(axes[2], SERIES, "Captured decrease of one step", y="", ylim=(-2000, 1.15),
                                  scale=("log", "symlog"), **x),
        }  # fmt: skip
        for ax in axes:
            ax.set_xticks(layers, [str(l) for l in layers])
            ax.minorticks_off()
        axes[0].plot(layers, layers, color=FAINT, linewidth=1, zorder=0.5)
        axes[0].annotate("one for each layer", (layers[-2], layers[-2]), (5, -3), textcoords="offset points",
                         va="top", color=MUTED, fontsize="small")  # fmt: skip
        axes[0].set_yticks([1, 3, 10, 30, 100], ["1", "3", "10", "30", "100"])
        axes[1].set_yticks([10, 30, 100, 300], ["10", "30", "100", "300"])
        axes[2].set_yscale("symlog", linthresh=1, linscale=0.7)
        axes[2].set_yticks([1, 0, -1, -10, -100, -1000], ["1: exact", "0: no step", "−1", "−10", "−100", "−1000"])
        axes[2].axhline(0, color=FAINT, linewidth=1, zorder=0.5)
        self.title = self.figure.suptitle("", x=0.01, ha="left", weight="bold", fontsize=11)
        lines = self.views["iterations"].lines
        for view in self.views.values():
            for name in ("constants, additive", "leading, additive"):
                view.lines[name].set(markersize=8, markerfacecolor="none")
        handles = [lines[name] for name in (*ORDER, "eigenvalues")]
        self.figure.legend(handles=handles, loc="outside lower center", ncols=4)
        self.animated = [*(artist for view in self.views.values() for artist in view.artists), self.title]

    def update(self, result: DepthResult) -> None:
        for quantity, view in self.views.items():
            curves = result.of(quantity)
            if quantity == "iterations":
                curves |= result.of("above")
            # Bands where the lines are solid: five of them would hide each other.
            view.update({k: c._replace(low=c.y, high=c.y) if "additive" in k else c for k, c in curves.items()})
        self.title.set_text(headline(result))
        self.figure.set_label(describe(result))

    def fits(self, result: DepthResult) -> bool:
        return sorted(result.parameters["layers"]) == self.layers


def headline(result: DepthResult) -> str:
    """What to see, in one line."""
    p, iterations = result.parameters, result.of("iterations")
    first, last = np.argmin(p["layers"]), np.argmax(p["layers"])

    def span(name: str) -> str:
        return f"{iterations[name].y[first]:.0f} to {iterations[name].y[last]:.0f}"

    return (
        f"Iterations from {min(p['layers'])} to {max(p['layers'])} layers: {span('kfac')} with K-FAC, "
        f"{span('leading, balanced')} with {p['per_layer']} eigenvectors per layer balanced, {span('none')} without"
    )


def describe(result: DepthResult) -> str:
    """The alternative text."""
    p, last = result.parameters, np.argmax(result.parameters["layers"])
    deepest = "; ".join(
        f"{SERIES[name].label}: λ_max {c.y[last]:.3g}, captured {result.of('captured')[name].y[last]:.3g}"
        for name, c in result.of("largest").items()
    )
    return (
        f"{headline(result)}. Medians over {p['repeats']} seeds with a band from the lowest to the highest; hidden "
        f"width {p['width']}, λ = {p['damping']:g} of the largest eigenvalue of F. "
        f"At {max(p['layers'])} layers: {deepest}."
    )


plot_depth = DepthPlot.draw


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
