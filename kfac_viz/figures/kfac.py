"""What K-FAC throws away: matrices, pairs of layers, pieces of the error over training, and other methods."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..experiments.kfac import MOMENTS, KfacResult
from .curves import OVER_DAMPINGS, CurveView
from .parts import MatrixView, limit_of
from .plot import Plot
from .style import INK, METHODS, PIECES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from ..experiments.curves import Curve

SHOWN = {k: METHODS[k] for k in ("block-diagonal", "ekfac", "kfac", "sampled", "factored", "block-tridiagonal")}


class KfacPlot(Plot):
    size = (13.0, 7.2)

    def build(self, result: KfacResult) -> None:
        grid = self.figure.add_gridspec(2, 4)
        top = [self.figure.add_subplot(grid[0, i]) for i in range(4)]
        self.F = MatrixView(top[0], result.partition, "Fisher F", pixels=162, logarithmic=False)
        self.error = MatrixView(top[1], result.partition, "F − K-FAC", pixels=162, logarithmic=False)
        self.ends = top[0].text(1, 1.015, "", transform=top[0].transAxes, ha="right", fontsize="small")
        L = len(result.partition)
        self.lost = PairView(top[2], L, "Where the squared error lies", "{:.1%}", 0.5)
        self.misfit = PairView(top[3], L, "Misfit of G ⊗ A, if kept", "{:.2f}", 1.0)
        self.pieces = Bars(self.figure.add_subplot(grid[1, :2]))
        self.matrix_error = CurveView(
            self.figure.add_subplot(grid[1, 2]), SHOWN, "Error of the matrix",
            y="‖F + λI − M⁻¹‖ / ‖F‖", ylim=(0.2, 20), **OVER_DAMPINGS,
        )  # fmt: skip
        self.captured = CurveView(
            self.figure.add_subplot(grid[1, 3]), SHOWN, "Decrease captured by M g",
            y="share, step as it is", ylim=(-1, 1.05), scale=("log", "linear"), **OVER_DAMPINGS,
        )  # fmt: skip
        self.captured.ax.axhline(0, color=INK, linewidth=0.6)
        self.figure.legend(*self.captured.ax.get_legend_handles_labels(), loc="outside lower center", ncols=len(SHOWN))
        self.animated = [
            *self.F.artists, *self.error.artists, self.ends, *self.lost.artists, *self.misfit.artists,
            *self.pieces.artists, *self.matrix_error.artists, *self.captured.artists,
        ]  # fmt: skip

    def update(self, result: KfacResult) -> None:
        # The first layers would outshine the rest: colours end at a fifth of the largest entry.
        limit = limit_of(result.fisher / 5)
        self.F.update(result.fisher, limit)
        self.error.update(result.error, limit)
        self.ends.set_text(f"colours end at ±{limit:.2g}")
        self.lost.update(result.lost)
        self.misfit.update(result.misfit)
        pieces = result.of("piece")
        self.pieces.update(pieces)
        self.matrix_error.update(result.of("error"), at=result.parameters["damping"])
        self.captured.update(result.of("captured"), at=result.parameters["damping"])
        between = 1 - float(np.trace(result.lost))
        told = (
            f"after {step} steps " + ", ".join(f"{PIECES[name].label} {c.y[i]:.2g}" for name, c in pieces.items())
            for i, step in ((0, MOMENTS[0]), (-1, MOMENTS[-1]))
        )
        self.figure.set_label(
            f"The Fisher of a network of {result.partition.size} parameters, what K-FAC misses of it, and the share of "
            f"the squared error in each pair of layers: {between:.0%} lies between layers. Pieces of the squared "
            f"error as shares of ‖F‖²: {'; '.join(told)}. Then the error of the matrix and the captured decrease "
            "against damping for exact blocks, EKFAC, K-FAC, sampled labels, factored damping and block-tridiagonal."
        )

    def fits(self, result: KfacResult) -> bool:
        return result.partition == self.F.partition

    def regions(self, result: KfacResult) -> list[tuple[float, float, float, float, str]]:
        words = "Layers {} and {}: {:.2%} of K-FAC's squared error; G ⊗ A would miss {:.2g} of the block's norm"
        return [
            (*box, words.format(l + 1, m + 1, result.lost[l, m], result.misfit[l, m]))
            for view in (self.F, self.error)
            for l, m, box in view.boxes()
        ]


class PairView:
    """A number for each pair of layers, shaded and written; symmetric, so the upper half says it all."""

    def __init__(self, ax: Axes, L: int, title: str, form: str, limit: float) -> None:
        self.form, self.limit = form, limit
        self.image = ax.imshow(np.zeros((L, L)), cmap="Blues", vmin=0, vmax=limit)
        text = {"ha": "center", "va": "center", "fontsize": min(9.0, 44 / L)}
        self.texts = [ax.text(m, l, "", **text) for l in range(L) for m in range(L)]
        self.artists = [self.image, *self.texts]
        names = [str(i + 1) for i in range(L)]
        ax.set(title=title, xlabel="layer", ylabel="layer")
        ax.set_xticks(range(L), names)
        ax.set_yticks(range(L), names)
        ax.tick_params(length=0)

    def update(self, values: NDArray) -> None:
        self.image.set_data(values)
        for text, value in zip(self.texts, values.flat, strict=True):
            text.set(text=self.form.format(value), color="white" if value > 0.6 * self.limit else INK)


class Bars:
    """The pieces of the squared error at every moment, side by side, with the range over seeds."""

    FLOOR = 1e-6

    def __init__(self, ax: Axes) -> None:
        width = 0.8 / len(PIECES)
        self.bars, self.ranges = {}, {}
        for i, (name, style) in enumerate(PIECES.items()):
            x = np.arange(len(MOMENTS)) + (i - (len(PIECES) - 1) / 2) * width
            self.bars[name] = ax.bar(x, 1.0, 0.9 * width, bottom=self.FLOOR, color=style.color, label=style.label)
            self.ranges[name] = ax.vlines(x, 1.0, 1.0, color=INK, linewidth=1)
        ax.set(
            title="Pieces of K-FAC's squared error over training", yscale="log", ylim=(self.FLOOR, 30),
            ylabel="‖piece‖² / ‖F‖²", xlabel="steps of Adam",
        )  # fmt: skip
        ax.set_xticks(range(len(MOMENTS)), [str(m) for m in MOMENTS])
        legend = ax.legend(ncols=len(PIECES), loc="upper left", columnspacing=1, handlelength=1)
        legend.set_in_layout(False)
        self.artists = [*(bar for bars in self.bars.values() for bar in bars), *self.ranges.values()]

    def update(self, pieces: dict[str, Curve]) -> None:
        for name, c in pieces.items():
            for bar, height in zip(self.bars[name], c.y, strict=True):
                bar.set_height(max(height - self.FLOOR, 0))
            x = [bar.get_x() + bar.get_width() / 2 for bar in self.bars[name]]
            low, high = np.maximum(c.low, self.FLOOR), np.maximum(c.high, self.FLOOR)
            self.ranges[name].set_segments(np.stack([np.stack([x, low], 1), np.stack([x, high], 1)], 1))


plot_kfac = KfacPlot.draw
