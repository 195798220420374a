"""Parts that figures are put together from; each can be updated in place, which is what sliders do."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..parameters import number
from .maps import write
from .page import address
from .style import INK, SIGNED

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage
    from numpy.typing import ArrayLike, NDArray

    from ..method.partition import Partition


class MatrixView:
    """A signed P×P matrix as an image with layer boundaries and names; zero is white.

    Entries are drawn as a share of ``limit``: linear, or linear–logarithmic so that small entries show
    (linear below ``limit / 100``). Several entries on one pixel, of which there are at most
    ``pixels`` along a side, appear as the largest of them in modulus.
    """

    def __init__(
        self, ax: Axes, partition: Partition, name: str, *, logarithmic: bool = True, pixels: int = 330
    ) -> None:
        from matplotlib.collections import LineCollection

        self.ax, self.partition, self.name, self.logarithmic = ax, partition, name, logarithmic
        self._shown: tuple | None = None
        self._group = -(-partition.size // pixels)
        P = partition.size
        end = P + -P % self._group
        self.image: AxesImage = ax.imshow(
            np.zeros((1, 1)), cmap=SIGNED, vmin=-1, vmax=1, extent=(0, end, end, 0),
            interpolation="nearest", interpolation_stage="data",
        )  # fmt: skip
        ax.set(xlim=(0, P), ylim=(P, 0), title=name, xlabel="layer", ylabel="layer")
        edges = [edge for edge in partition.offsets[1:-1] for _ in "xy"]
        self.edges = LineCollection(
            [((e, 0), (e, P)) if i % 2 else ((0, e), (P, e)) for i, e in enumerate(edges)],
            colors=INK,
            linewidths=0.6 if len(edges) < 20 else 0.3,
        )
        ax.add_collection(self.edges, autolim=False)
        names = [str(i + 1) for i in range(len(partition))]
        ax.set_xticks(self._apart(14 if len(names) > 9 else 8), names)
        ax.set_yticks(self._apart(12), names)
        ax.tick_params(length=0)
        for spine in ax.spines.values():
            spine.set(visible=True, color=INK, linewidth=0.8)

    @property
    def artists(self) -> list[Artist]:
        """What has to be drawn again after :meth:`update`: the image, and what lies on it."""
        return [self.image, self.edges, *self.ax.spines.values()]

    def name_layers(self) -> None:
        """Names or shapes of the layers beside their numbers, where there is room for them."""
        layers = self.partition.layers
        names = [layer.name.split(".")[-1] for layer in layers]
        if all(name.isdecimal() for name in names):  # as in a Sequential
            names = [f"{layer.features - layer.bias}→{layer.out}\n{layer.size}" for layer in layers]
        if len(layers) <= (6 if "\n" in names[0] else 16):
            places = self._apart(24 if "\n" in names[0] else 12)
            self.ax.set_yticks(places, [f"{l + 1}: {name}" for l, name in enumerate(names)], linespacing=1.4)
            self.ax.set_ylabel("")

    def _apart(self, points: float) -> NDArray:
        """The middles of the layers, moved apart by as little as leaves each label its ``points``."""
        from scipy.optimize import isotonic_regression

        middles = np.array([(s.start + s.stop) / 2 for s in self.partition.slices])
        side = 72 * self.ax.get_position().height * self.ax.figure.get_figheight()
        step = min(points / side, 1 / len(middles)) * self.partition.size
        steps = step * np.arange(len(middles))
        inside = step / 2, self.partition.size - step / 2 - steps[-1]
        return np.clip(isotonic_regression(middles - steps).x, *inside) + steps

    def words(self) -> str:
        return f"{self.name}: a matrix of {self.partition.size} × {self.partition.size} with lines between layers."

    def regions(self, words: Callable[[int, int], str] | None = None) -> list[tuple[float, float, float, float, str]]:
        """For the block of layers l and m its left, top, width, height as shares of the figure, and ``words(l, m)``, or
        its norm."""
        x, y, width, height = self.ax.get_position().bounds
        cuts, found = np.array(self.partition.offsets) / self.partition.size, []
        for l, m in np.ndindex(len(self.partition), len(self.partition)):
            place = x + cuts[m] * width, 1 - y - (1 - cuts[l]) * height
            size = (cuts[m + 1] - cuts[m]) * width, (cuts[l + 1] - cuts[l]) * height
            found.append((*place, *size, (words or self._norm)(l, m)))
        return found

    def _norm(self, l: int, m: int) -> str:
        if self._norms is None:
            self._norms = self.partition.norms(torch.as_tensor(self._matrix, device="cpu")).tolist()
        names, norm = self.partition.names, self._norms[l][m]
        return f"{self.name}, layers {l + 1} ({names[l]}) and {m + 1} ({names[m]}): Frobenius norm {number(norm)}"

    def update(self, matrix: ArrayLike, limit: float) -> None:
        """Draw another matrix; ``limit`` is the modulus at which the colours end."""
        if (shown := (id(matrix), limit)) != self._shown:
            self._matrix, self._shown, self._norms = matrix, shown, None  # while it is held no other matrix has its id
            self.image.set_data(self.shade(pooled(matrix, self._group), limit))

    def shade(self, values: NDArray, limit: float) -> NDArray:
        """Entries as numbers in [-1, 1], rounded so that the last bits of a sum cannot change a pixel."""
        share = np.clip(values / limit if limit > 0 else values * 0.0, -1, 1)
        return np.round(compressed(share) if self.logarithmic else share, 4)


class PairView:
    """A number for each pair of layers, shaded, and written where there is room."""

    def __init__(self, ax: Axes, values: NDArray, title: str, form: str, limit: float) -> None:
        import seaborn

        names = [str(l + 1) for l in range(len(values))]
        seaborn.heatmap(
            values, vmin=0, vmax=limit, cmap="Blues", annot=len(values) <= 5, fmt=form, square=True, cbar=False, ax=ax,
            xticklabels=names, yticklabels=names, annot_kws={"fontsize": 9},
        )  # fmt: skip
        ax.set(title=title, xlabel="layer", ylabel="layer")
        ax.tick_params(length=0)
        (self.mesh,), self.form = ax.collections, f"{{:{form}}}".format
        self.texts = list(ax.texts)
        self.artists = [self.mesh, *self.texts]
        self.update(values)

    def update(self, values: NDArray) -> None:
        self.mesh.set_array(values)
        write(self.mesh, self.texts, values, self.form)


class LayerMap:
    """One non-negative number for each pair of layers of any network, on a logarithmic scale of three decades."""

    DECADES = 3

    def __init__(self, ax: Axes, partition: Partition, title: str) -> None:
        self.ax, self.partition, self.title = ax, partition, title
        L = len(partition)
        self.image = ax.imshow(np.zeros((L, L)), cmap="Blues", vmin=-self.DECADES, vmax=0, interpolation="nearest")
        numbers = [str(l + 1) for l in range(L)]
        shown = range(0, L, 1 + L // 25)
        names = [layer.name.split(".")[-1] for layer in partition.layers]
        told = [f"{l + 1}: {partition.layers[l].out} × {partition.layers[l].features}" if names[l].isdecimal()
                else f"{l + 1}: {names[l]}" for l in range(L)]  # fmt: skip
        ax.set_xticks(shown, [numbers[l] for l in shown])
        ax.set_yticks(shown, [told[l] for l in shown])
        ax.set(title=title)
        ax.tick_params(length=0)
        x, y, width, height = ax.get_position().bounds
        side = ax.figure.add_axes((x + 1.04 * width, y, 0.035 * width, height))
        bar = ax.figure.colorbar(self.image, cax=side, ticks=range(-self.DECADES, 1))
        bar.outline.set_visible(False)
        self.scale = bar.ax
        self.artists = [self.image]

    def update(self, values: NDArray, limit: float) -> None:
        """Show other numbers; ``limit`` is where the colours end."""
        self.values = values
        self.image.set_data(np.log10(np.clip(values / (limit or 1.0), 10.0**-self.DECADES, 1)))
        self.scale.set_yticklabels([number(limit * 10.0**k, 2) for k in range(-self.DECADES, 1)])

    def words(self) -> str:
        l, m = np.unravel_index(self.values.argmax(), self.values.shape)
        return f"{self.title}: largest for layers {l + 1} and {m + 1}, {number(self.values[l, m])}."

    def regions(self) -> list[tuple[float, float, float, float, str]]:
        """For each pair of layers its place as shares of the figure, and its number with the names of both."""
        x, y, width, height = self.ax.get_position().bounds
        L, layers = len(self.partition), self.partition.layers
        return [
            (x + m * width / L, 1 - y - height + l * height / L, width / L, height / L,
             f"{self.title}, layers {l + 1} ({layers[l]}) and {m + 1} ({layers[m]}): {number(self.values[l, m])}")
            for l, m in np.ndindex(L, L)
        ]  # fmt: skip


class ColourBar:
    """The linear–logarithmic scale of some views, below them; its numbers are texts that :meth:`update` sets."""

    def __init__(self, ax: Axes) -> None:
        ax.imshow(np.linspace(-1, 1, 256)[None], cmap=SIGNED, extent=(-1, 1, 0, 1), aspect="auto")
        ax.set(xticks=[], yticks=[])
        self.shares = {-1: "left", -0.1: "center", 0: "center", 0.1: "center", 1: "right"}
        self.artists = [
            ax.text(compressed(share), -0.8, "", ha=side, va="top", fontsize=9) for share, side in self.shares.items()
        ]

    def update(self, limit: float) -> None:
        for text, share in zip(self.artists, self.shares, strict=True):
            text.set_text(number(share * limit, 2))


def compressed(share: NDArray) -> NDArray:
    """Linear–logarithmic: [-1, 1] onto itself, with a knee at 1/100."""
    return np.sign(share) * np.log1p(np.abs(share) * 100) / np.log1p(100)


def pooled(matrix: ArrayLike, group: int) -> NDArray:
    """The entry of largest modulus in every group × group tile, in single precision: it becomes a colour."""
    values = np.asarray(matrix, dtype=np.float32)
    values = np.pad(values, (0, -len(values) % group)) if group > 1 else values
    high = low = values
    for _ in range(2):  # rows, then columns
        high = reduce(np.maximum, (high[i::group] for i in range(group))).T
        low = reduce(np.minimum, (low[i::group] for i in range(group))).T
    return np.where(high > -low, high, low)


def frame(matrix: ArrayLike, limit: float, pixels: int = 170, levels: int = 16) -> str:
    """A matrix as a small picture in a data address, with some levels of red and of blue; empty where it is zero."""
    if not np.asarray(matrix).any():
        return ""
    values = pooled(matrix, -(-len(matrix) // pixels))
    share = np.round(compressed(np.clip(values / limit, -1, 1)) * levels) / levels
    return address((share + 1) / 2, SIGNED)


def limit_of(matrix: ArrayLike) -> float:
    """A colour limit for a signed matrix: the largest modulus, to two digits."""
    largest = float(np.abs(np.asarray(matrix)).max())
    return float(f"{largest:.1e}") if largest > 0 else 1.0
