"""Which Fisher: ellipses and steps on two parameters, matrices, spectra and errors on a network."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.collections import LineCollection

from ..experiments.fisher import SAMPLES, FisherResult, Plane
from .curves import OVER_DAMPINGS, CurveView, empty_line
from .parts import MatrixView, limit_of
from .plot import Plot
from .style import FAINT, FLAVOURS, INK, METHODS, Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
