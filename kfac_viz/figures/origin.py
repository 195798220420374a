"""Two levels at home: errors and iterations on an interval, clusters and iterations of a ridge regression."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .curves import CurveView
from .parts import MatrixView, limit_of
from .plot import Plot
from .style import FAINT, INK, METHODS, MUTED, SPACES, Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

    from ..experiments.origin import OriginResult

NONE = METHODS["gradient"]._replace(label="no preconditioner")
BLOCKS = METHODS["block-diagonal"]._replace(label="block Jacobi", line="-")
BALANCED = METHODS["balanced"]._replace(label="block Jacobi and constants, balanced")
POISSON = {
    "none": NONE,
    "blocks": BLOCKS,
    "additive": METHODS["additive"]._replace(label="block Jacobi and constants, additive"),
    "balanced": BALANCED,
}
RIDGE = {
    "none": NONE,
    "blocks": BLOCKS,
    "balanced": BALANCED,
    "clusters": SPACES["nicolaides"]._replace(label="constants of clusters alone", color="#0072B2"),
    "random": SPACES["random"]._replace(label="constants of random groups alone", color="#CC79A7"),
}
FRAME = ("local", "subdomains", "shown", "clusters", "n", "seed")  # what else than lines depends on
START = Style("at the start", FAINT, "", "-")


class OriginPlot(Plot):
    size = (11.6, 6.6)

    def build(self, result: OriginResult) -> None:
        p = result.parameters
        self.frame = {name: p[name] for name in FRAME}
        top, bottom = self.figure.subplots(2, 3)
        self.lines = self._interval(top[0], result)
        errors = {"start": START, "blocks": BLOCKS, "balanced": BALANCED}
        modes = min(4, p["local"]) * p["shown"]
        self.modes = CurveView(top[1], errors, "Poisson: energy left in each sine mode", x="mode", y="",
                               xlim=(0, modes), ylim=(1e-2, 1.5), scale=("linear", "log"))  # fmt: skip
        for line in self.modes.lines.values():
            line.set_marker("")
        top[1].axvline(p["shown"], color=FAINT, linewidth=1, zorder=0.5)
        top[1].text(p["shown"], 1.12, " as many as subdomains", color=MUTED, fontsize="small")
        _numbers(top[1].yaxis, (0.01, 0.1, 1))
        x = p["subdomains"]
        self.poisson = CurveView(top[2], POISSON, "Poisson: iterations", x="subdomains", y="",
                                 xlim=(min(x) / 1.15, max(x) * 1.15), ylim=(2, 1.6 * max(x) * p["local"]))  # fmt: skip
        _numbers(top[2].xaxis, x)
        _numbers(top[2].yaxis, (10, 100))
        self._clusters(bottom[0], result)
        self.gram = MatrixView(bottom[1], result.groups, "Ridge: Gram matrix by cluster", logarithmic=False)
        self.gram.update(result.gram, limit_of(result.gram))
        bottom[1].set(xticks=[], yticks=[], xlabel="examples", ylabel="")
        x = p["clusters"]
        self.ridge = CurveView(bottom[2], RIDGE, "Ridge: iterations", x="clusters", y="",
                               xlim=(min(x) / 1.15, max(x) * 1.15), ylim=(3, 1000))  # fmt: skip
        _numbers(bottom[2].xaxis, x)
        _numbers(bottom[2].yaxis, (10, 100))
        handles = [*self.poisson.lines.values(), *(self.ridge.lines[name] for name in ("clusters", "random"))]
        self.figure.legend(handles=handles, loc="outside lower center", ncols=3)
        self.title = self.figure.suptitle("", x=0.01, ha="left", weight="bold", fontsize=11)
        views = (self.modes, self.poisson, self.ridge)
        self.animated = [*self.lines.values(), *(artist for view in views for artist in view.artists), self.title]

    def _interval(self, ax: Axes, result: OriginResult) -> dict:
        p, start = result.parameters, result.errors["start"]
        low, high = start.min(), start.max()
        ax.set(title="Poisson: error over the interval", xlabel="point; every other subdomain is shaded", ylabel="",
               xlim=(0, len(start) - 1), ylim=(1.1 * low - 0.3 * (high - low), 1.1 * high))  # fmt: skip
        ax.set_yticks([])
        for i in range(0, p["shown"], 2):
            ax.axvspan(i * p["local"] - 0.5, (i + 1) * p["local"] - 0.5, color=FAINT, alpha=0.25, linewidth=0,
                       label="_" * (i > 0) + "one coarse constant")  # fmt: skip
        ax.axhline(0, color=INK, linewidth=0.6)
        styles = {
            "start": START._replace(label="at the start"),
            "blocks": BLOCKS._replace(label="after sweeps, one level"),
            "balanced": BALANCED._replace(label="after sweeps, two levels"),
        }
        lines = {name: ax.plot([], [], color=s.color, linestyle=s.line, label=s.label)[0] for name, s in styles.items()}
        ax.legend(loc="lower center", ncols=2, fontsize="small")
        return lines

    def _clusters(self, ax: Axes, result: OriginResult) -> None:
        """Mean images side by side, with a white line between."""
        means = result.means[:10]
        columns = -(-len(means) // 2)
        tiles = np.full((2 * 9 - 1, columns * 9 - 1), np.nan)
        for i, mean in enumerate(means):
            row, column = divmod(i, columns)
            tiles[9 * row : 9 * row + 8, 9 * column : 9 * column + 8] = mean
        ax.imshow(tiles, cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
        ax.set(xticks=[], yticks=[])
        ax.set_title(f"Ridge: means of {len(result.means)} clusters")
        ax.spines[:].set_visible(False)

    def update(self, result: OriginResult) -> None:
        for name, line in self.lines.items():
            line.set_data(np.arange(len(result.errors[name])), result.errors[name])
        self.modes.update(result.of("modes"))
        self.poisson.update(result.of("poisson"))
        self.ridge.update(result.of("ridge"))
        self.title.set_text(headline(result))
        self.figure.set_label(describe(result))

    def fits(self, result: OriginResult) -> bool:
        return all(result.parameters[name] == value for name, value in self.frame.items())


def _numbers(axis: Axis, values: tuple[float, ...]) -> None:
    """Plain numbers on a logarithmic axis."""
    axis.set_ticks(values, [str(v) for v in values])
    axis.set_ticks([], minor=True)


def headline(result: OriginResult) -> str:
    """What to see, in one line."""
    p, poisson, ridge = result.parameters, result.of("poisson"), result.of("ridge")
    s, k = max(p["subdomains"]), max(p["clusters"])
    at, there = p["subdomains"].index(s), p["clusters"].index(k)
    return (
        f"Poisson, {s} subdomains: {poisson['blocks'].y[at]:.0f} iterations, {poisson['balanced'].y[at]:.0f} with "
        f"balanced constants. Ridge, {k} clusters: {ridge['none'].y[there]:.0f}, {ridge['clusters'].y[there]:.0f} "
        "with constants"
    )


def describe(result: OriginResult) -> str:
    """The alternative text."""
    p = result.parameters
    lines = [
        f"{styles[name].label} {c.y[0]:.0f} to {c.y[-1]:.0f}"
        for quantity, styles in (("poisson", POISSON), ("ridge", RIDGE))
        for name, c in result.of(quantity).items()
    ]
    half = len(POISSON)
    return (
        f"{headline(result)}. Above: an error over {p['shown']} subdomains of the interval before and after "
        f"{p['sweeps']} sweeps, the energy left in each sine mode, and iterations from {p['subdomains'][0]} to "
        f"{p['subdomains'][-1]} subdomains: {', '.join(lines[:half])}. Below: mean images of clusters of digits, their "
        f"Gram matrix, and iterations of the ridge regression from {p['clusters'][0]} to {p['clusters'][-1]} clusters: "
        f"{', '.join(lines[half:])}. Medians over {p['repeats']} seeds."
    )


plot_origin = OriginPlot.draw
