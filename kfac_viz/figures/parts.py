"""Parts that figures are put together from; each can be updated in place, which is what sliders do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .style import FAINT, INK, SIGNED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage
    from numpy.typing import ArrayLike, NDArray

    from ..partition import Partition


class MatrixView:
    """A signed P×P matrix as an image with layer boundaries and names; zero is white.

    Entries are drawn as a share of ``limit``: linear, or linear–logarithmic so that small entries show
    (linear below ``limit / 1000``). Several entries on one pixel appear as the largest of them in modulus.
    """

    PIXELS = 330  # along one side, at most
    DECADES = 3.0

    def __init__(self, ax: Axes, partition: Partition, title: str, *, logarithmic: bool = True) -> None:
        self.ax, self.partition, self.logarithmic = ax, partition, logarithmic
        self._group = -(-partition.size // self.PIXELS)
        P = partition.size
        self.image: AxesImage = ax.imshow(
            np.zeros((1, 1)),
            cmap=SIGNED,
            vmin=-1,
            vmax=1,
            extent=(0, P, P, 0),
            interpolation="nearest",
            interpolation_stage="data",
        )
        for edge in partition.offsets[1:-1]:
            ax.axhline(edge, color=FAINT, linewidth=0.6)
            ax.axvline(edge, color=FAINT, linewidth=0.6)
        centres = [(s.start + s.stop) / 2 for s in partition.slices]
        names = [str(i + 1) for i in range(len(partition))]
        ax.set_xticks(centres, names)
        ax.set_yticks(centres, names)
        ax.tick_params(length=0)
        for spine in ax.spines.values():
            spine.set(visible=True, color=INK, linewidth=0.8)
        ax.set_title(title)
        ax.set_xlabel("layer")
        ax.set_ylabel("layer")

    def update(self, matrix: ArrayLike, limit: float) -> None:
        """Draw another matrix; ``limit`` is the modulus at which the colours end."""
        self.image.set_data(self.shade(pooled(matrix, self._group), limit))

    def shade(self, values: NDArray, limit: float) -> NDArray:
        """Entries as numbers in [-1, 1], rounded so that the last bits of a sum cannot change a pixel."""
        share = np.clip(values / limit if limit > 0 else values * 0.0, -1, 1)
        if self.logarithmic:
            knee = 10.0**-self.DECADES
            share = np.sign(share) * np.log1p(np.abs(share) / knee) / np.log1p(1 / knee)
        return np.round(share, 4)


def pooled(matrix: ArrayLike, group: int) -> NDArray:
    """The entry of largest modulus in every group × group tile."""
    values = np.asarray(matrix)
    if group == 1:
        return values
    P = len(values)
    pad = -P % group
    values = np.pad(values, (0, pad))
    tiles = values.reshape((P + pad) // group, group, (P + pad) // group, group)
    high, low = tiles.max(axis=(1, 3)), tiles.min(axis=(1, 3))
    return np.where(high > -low, high, low)


def limit_of(matrix: ArrayLike) -> float:
    """A colour limit for a signed matrix: the largest modulus, to two digits."""
    largest = float(np.abs(np.asarray(matrix)).max())
    return float(f"{largest:.1e}") if largest > 0 else 1.0
