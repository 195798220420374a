"""Depth: eigenvalues, iterations and captured decrease against the number of layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .curves import CurveView
from .plot import Plot
from .style import FAINT, METHODS, MUTED, SPACES, Style

if TYPE_CHECKING:
    from ..experiments.depth import DepthResult

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
