"""What K-FAC throws away: its error in orthogonal pieces, by pair of layers and over training."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
from torch import Tensor

from .. import EKFAC, KFAC, BlockDiagonal, BlockTridiagonal, Fisher, KroneckerFisher, Partition, show
from ..parameters import Device, Examples, Range, Repeats, Seed, Steps, Widths, check, number
from ..show import INK, METHODS, CurveView, MatrixView, PairView, Style, Tolerance, limit_of, plain_numbers
from .common.exercises import crossing, exercise
from .common.result import SHARES, Curve, Study, curve, over_seeds, rounded, seeds
from .common.setting import (
    DAMPINGS,
    OVER_DAMPINGS,
    Data,
    Setting,
    chosen,
    first_network,
    kronecker_blocks,
    setting,
    shares,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

COMPARED = DAMPINGS.positions[::5]
STAGES = (0, 10, 30, 100, 300)  # steps of Adam
PIECES: dict[str, Style] = {  # greys: colours belong to methods
    "dropped": Style("blocks dropped", INK),
    "basis": Style("basis", "#5E5E5E"),
    "eigenvalues": Style("eigenvalues", "#8C8C8C"),
    "sampling": Style("sampled labels", "#B8B8B8"),
    "damping": Style("factored damping", "#E0E0E0"),
}
METHODS_COMPARED = {
    "block-diagonal": BlockDiagonal,
    "ekfac": EKFAC,
    "kfac": KFAC,
    "sampled": KFAC,
    "factored": lambda F, damping: KFAC(F, damping, "factored"),
    "block-tridiagonal": BlockTridiagonal,
}


@dataclass(frozen=True, eq=False)
class Result(Study):
    """What K-FAC loses of F, over training and at one stage of it.

    ``curves`` by quantity: ``piece`` over steps, series PIECES, ‖piece‖² / ‖F‖²; ``error``, ``at_best_length`` and
    ``captured`` over λ, series methods, ‖F + λI − M⁻¹‖ / ‖F‖ and what M g captures (:func:`.setting.shares`); ``lost``
    and ``misfit`` for the first seed, series pairs of layers such as 1–2, the entries of the two fields of that name.
    """

    tolerances = SHARES | {
        "error": Tolerance(relative=2e-3),
        "piece": Tolerance(relative=2e-3, absolute=1e-5),
        "lost": Tolerance(absolute=1e-4),
        "misfit": Tolerance(absolute=1e-3),
    }

    partition: Partition
    fisher: Tensor  # (P, P)
    error: Tensor  # (P, P): F minus K-FAC
    lost: NDArray  # (L, L): share of ‖F − K-FAC‖² in each block, adding up to 1
    misfit: NDArray  # (L, L): ‖F_lm − G_lm ⊗ A_lm‖ / ‖F_lm‖

    @property
    def headline(self) -> str:
        between = 1 - float(np.trace(self.lost))
        return f"In the first network {between:.0%} of K-FAC's squared error lie between the layers"


def run(
    *,
    damping: Annotated[float, DAMPINGS] = 1e-2,
    steps: Steps = 100,
    samples: Annotated[int, Range(1, 64)] = 1,
    data: Data = "digits4",
    widths: Widths = (12, 12, 12),
    n: Examples = 500,
    repeats: Repeats = 5,
    seed: Seed = 0,
    device: Device = "cpu",
) -> Result:
    """Split the error of K-FAC, and compare it with other approximations of the same Fisher.

    Args:
        damping: λ of the factored rule, and of the steps that are compared.
        samples: labels drawn per example where labels are sampled.
        seed: of the first network, which the matrices show.
    """
    p = check(run, locals())
    pieces = np.array([[_pieces(chosen(p, seed=s, steps=m), samples) for m in STAGES] for s in seeds(p)])
    pieces[:, :, -1] *= damping
    curves = {("piece", name): curve(STAGES, pieces[:, :, i]) for i, name in enumerate(PIECES)}
    s = setting(*chosen(p))
    error, lost, misfit = _by_pair(s)
    for quantity, matrix in (("lost", lost), ("misfit", misfit)):
        for l, m in np.ndindex(*matrix.shape):
            curves[quantity, f"{l + 1}–{m + 1}"] = curve([steps], [matrix[l, m]])
    curves |= over_seeds(COMPARED, (_methods(chosen(p, seed=s), samples) for s in seeds(p)))
    return Result(p, curves, s.F.partition, s.dense.cpu(), error, lost, misfit)


def split(F: Fisher, dense: Tensor) -> tuple[float, float, float]:
    """‖F − K-FAC‖² in three pieces that add up to it exactly, being orthogonal in the Frobenius product.

    ``dropped``: the blocks between layers. Within the blocks that are kept, K-FAC and EKFAC are both diagonal in the
    Kronecker eigenbasis and EKFAC is the orthogonal projection on such matrices (George et al. 2018), so the rest
    is ``basis`` = ‖blocks − EKFAC‖², what no choice of eigenvalues can mend, and ``eigenvalues`` = ‖EKFAC − K-FAC‖².
    """
    f = F.kronecker()
    basis = eigenvalues = kept = 0.0
    variances = F.second_moments([(G.U, A.U) for A, G in zip(f.eigen_A, f.eigen_G, strict=True)])
    for d, A, G, s in zip(variances, f.eigen_A, f.eigen_G, F.partition.slices, strict=True):
        block = float(dense[s, s].square().sum())
        kept += block
        basis += max(block - float(d.square().sum()), 0.0)
        eigenvalues += float((d - torch.outer(G.d, A.d)).square().sum())
    return float(dense.square().sum()) - kept, basis, eigenvalues


def factored_excess(F: Fisher) -> float:
    """‖(G + √λ/π I) ⊗ (A + π√λ I) − G ⊗ A − λI‖² / λ: what the factored rule adds to A, for every λ."""
    f = F.kronecker()
    return sum(
        π**2 * len(A) * float(G.square().sum())
        + len(G) * float(A.square().sum()) / π**2
        + 2 * float(G.trace() * A.trace())
        for A, G, π in zip(f.A, f.G, f.pi, strict=True)
    )


@lru_cache(maxsize=256)
def _pieces(network: tuple, samples: int) -> list[float]:
    """The PIECES of one network as shares of ‖F‖²; the last for λ = 1."""
    s = setting(*network)
    sampled = float((s.blocks - kronecker_blocks(_sampled(s, samples))).norm()) ** 2
    return [piece / float(s.dense.norm()) ** 2 for piece in (*split(s.F, s.dense), sampled, factored_excess(s.F))]


def _sampled(s: Setting, samples: int) -> Fisher:
    """The same network seen through labels drawn from it."""
    return s.problem.capture("mc", samples=samples, generator=torch.Generator().manual_seed(s.seed))


@lru_cache(maxsize=64)
def _methods(network: tuple, samples: int) -> dict[tuple[str, str], list[float]]:
    """Error and captured decrease of every method at the dampings COMPARED, on one network."""
    s = setting(*network)
    F, drawn = s.F, _sampled(s, samples)
    dropped, basis, eigenvalues = split(F, s.dense)
    constant = {  # errors that no λ changes: λI stands on both sides
        "block-diagonal": dropped**0.5,
        "ekfac": (dropped + basis) ** 0.5,
        "kfac": (dropped + basis + eigenvalues) ** 0.5,
        "sampled": float((s.dense - kronecker_blocks(drawn)).norm()),
    }
    methods = {name: make(drawn if name == "sampled" else F, 1.0) for name, make in METHODS_COMPARED.items()}
    found = defaultdict(list)
    for λ in COMPARED:
        A = F.damped(λ)
        for name, M in methods.items():
            M = M.with_damping(λ)
            error = constant.get(name)
            if error is None:
                inverse = kronecker_blocks(F, λ) if name == "factored" else torch.linalg.inv(M.dense())
                error = float((A.dense() - inverse).norm())
            found["error", name].append(error / float(s.dense.norm()))
            for quantity, value in shares(A, s.g, M @ s.g)._asdict().items():
                found[quantity, name].append(value)
    return found


@lru_cache(maxsize=4)
def _by_pair(s: Setting) -> tuple[Tensor, NDArray, NDArray]:
    """F − K-FAC, the share of its square in each pair of layers, and how well ``G_lm ⊗ A_lm`` would fit each."""
    error, slices = s.dense - s.blocks, s.F.partition.slices

    def norms(matrix: Tensor) -> NDArray:
        return np.array([[float(matrix[a, b].norm()) for b in slices] for a in slices])

    lost, misfit = norms(error) ** 2, norms(s.dense - KroneckerFisher(s.F).dense()) / norms(s.dense)
    return error.cpu(), rounded(lost / lost.sum()), rounded(misfit)


# ---- the picture --------------------------------------------------------------------------------------


class Plot(show.Plot):
    """Matrices and pairs of layers above; pieces of the error and other methods below."""

    size = (10.0, 6.2)

    def build(self, result: Result) -> None:
        grid = self.figure.add_gridspec(2, 4)
        top = [self.figure.add_subplot(grid[0, i]) for i in range(4)]
        self.F, self.error = (
            self.add(MatrixView(ax, result.partition, name, pixels=162, logarithmic=False))
            for ax, name in zip(top, ("Fisher F", "F − K-FAC"), strict=False)
        )
        self.lost = self.add(PairView(top[2], result.lost, "Share of squared error", ".1%", 0.5))
        self.misfit = self.add(PairView(top[3], result.misfit, "Misfit of $G \\otimes A$", ".2f", 1.0))
        below = grid[1, :].subgridspec(1, 4, width_ratios=(1.7, 1, 1, 1))
        self.pieces = self.add(Bars(self.figure.add_subplot(below[0]), result.of("piece")))
        shown = {name: METHODS[name] for name in reversed(METHODS_COMPARED)}
        self.matrix_error = self.add(CurveView(
            self.figure.add_subplot(below[1]), shown, result.of("error"), "‖F + λI − M⁻¹‖ / ‖F‖",
            ylim=(0.2, 20), **OVER_DAMPINGS,
        ))  # fmt: skip
        self.shares = {
            quantity: self.add(CurveView(
                self.figure.add_subplot(below[i]), shown, result.of(quantity), title, ylim=ends,
                scale=("log", "linear"), **OVER_DAMPINGS,
            ))
            for i, quantity, title, ends in (
                (2, "at_best_length", "Captured, best length", (0.3, 1.02)),
                (3, "captured", "Captured as it is", (-1, 1.05)),
            )
        }  # fmt: skip
        self.shares["captured"].ax.axhline(0, color=INK, linewidth=0.6)
        for view in (self.matrix_error, *self.shares.values()):
            plain_numbers(view.ax.xaxis, (1e-4, 1e-2, 1, 100))
        self.legend(self.matrix_error.lines.values(), 3)

    def move(self, result: Result) -> None:
        limit, damping = limit_of(result.fisher / 5), result.parameters["damping"]
        self.F.update(result.fisher, limit)
        self.error.update(result.error, limit)
        self.lost.update(result.lost)
        self.misfit.update(result.misfit)
        self.pieces.update(result.of("piece"))
        self.matrix_error.update(result.of("error"), at=damping)
        for quantity, view in self.shares.items():
            view.update(result.of(quantity), at=damping)

    def note(self, result: Result) -> str:
        return f"; colours end at ±{number(limit_of(result.fisher / 5), 2)}"

    def regions(self, result: Result) -> list[tuple[float, float, float, float, str]]:
        words = "Layers {} and {}: {:.2%} of K-FAC's squared error; G ⊗ A would miss {:.2g} of the block's norm"
        return [
            region
            for view in (self.F, self.error)
            for region in view.regions(lambda l, m: words.format(l + 1, m + 1, result.lost[l, m], result.misfit[l, m]))
        ]


class Bars:
    """The pieces of the squared error at every stage, side by side, with the range over seeds."""

    FLOOR = 1e-6

    def __init__(self, ax: Axes, pieces: dict[str, Curve]) -> None:
        import pandas
        import seaborn

        rows = [(PIECES[name].label, f"{x:g}", *y) for name, c in pieces.items() for x, *y in zip(*c, strict=True)]
        table = pandas.DataFrame(rows, columns=["piece", "step", "median", "low", "high"]).melt(["piece", "step"])
        ax.set_yscale("log")
        seaborn.barplot(
            table, x="step", y="value", hue="piece", palette={s.label: s.color for s in PIECES.values()}, saturation=1,
            estimator="median", errorbar=("pi", 100), err_kws={"color": INK, "linewidth": 1},
            edgecolor=INK, linewidth=0.5, ax=ax,
        )  # fmt: skip
        ax.set(title="Pieces of the squared error / ‖F‖²", ylim=(self.FLOOR, 1e5), xlabel="steps of Adam", ylabel="")
        seaborn.move_legend(ax, "upper left", ncols=2, title=None, columnspacing=1, handlelength=1)
        ax.get_legend().set_in_layout(False)
        self.bars = dict(zip(pieces, ax.containers, strict=True))
        self.ranges = dict(zip(pieces, np.reshape(ax.lines, (len(pieces), -1)), strict=True))
        self.artists = [*ax.patches, *ax.lines]

    def words(self) -> str:
        told = (f"{PIECES[name].label} {number(bars[0].get_height())} to {number(bars[-1].get_height())}"
                for name, bars in self.bars.items())  # fmt: skip
        return f"Pieces of the squared error over {STAGES[0]} to {STAGES[-1]} steps: {', '.join(told)}."

    def update(self, pieces: dict[str, Curve]) -> None:
        for name, c in pieces.items():
            for bar, line, y, low, high in zip(self.bars[name], self.ranges[name], *c[1:], strict=True):
                bar.set(y=self.FLOOR, height=max(y - self.FLOOR, 0))
                line.set_ydata([low, high])


# ---- the exercises ------------------------------------------------------------------------------------


@exercise("02a", "Only the blocks between layers are lost for certain; what is the norm of those?", 0.01)
def _best_block_diagonal_error() -> float:
    s = first_network()
    return (split(s.F, s.dense)[0] / float(s.dense.square().sum())) ** 0.5


@exercise("02b", "Write π² with the mean eigenvalues of A and G: what mean eigenvalue has each of the two terms?", 0.01)
def _damping_that_the_factored_rule_doubles() -> float:
    F = first_network().F
    layer = F.partition.slices[0]
    mean = float(kronecker_blocks(F)[layer, layer].diagonal().mean())

    def excess(multiple: float) -> float:
        λ = multiple * mean
        return float(kronecker_blocks(F, λ)[layer, layer].diagonal().mean()) - mean - 2 * λ

    return crossing(excess, -2, 2)
