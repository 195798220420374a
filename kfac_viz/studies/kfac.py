"""What K-FAC throws away: its error in orthogonal pieces, by pair of layers and over training."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
from torch import Tensor

from ..method.fisher import Fisher
from ..method.kfac import EKFAC, KFAC
from ..method.partition import Partition
from ..method.preconditioner import BlockDiagonal
from ..method.tridiagonal import BlockTridiagonal
from ..parameters import Device, Range, Seed, check
from ..show.curves import CurveView
from ..show.parts import MatrixView, limit_of
from ..show.plot import Plot
from ..show.style import INK, METHODS, Style
from .curves import Curve, Study, by_key, captured, curve, frobenius, rounded
from .exercises import exercise
from .setting import DAMPINGS, OVER_DAMPINGS, Data, Setting, Widths, first_network, setting
from .threads import one_thread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray



COMPARED = DAMPINGS.positions[::6]
MOMENTS = (0, 10, 30, 100, 300)  # steps of Adam
PIECES: dict[str, Style] = {  # of K-FAC's error
    "dropped": Style("blocks dropped", "#0072B2"),
    "basis": Style("basis", "#009E73"),
    "eigenvalues": Style("eigenvalues", "#56B4E9"),
    "sampling": Style("sampled labels", "#CC79A7"),
    "damping": Style("factored damping", "#E69F00"),
}


@dataclass(frozen=True, eq=False)
class KfacResult(Study):
    """What K-FAC loses of F, over training and at one moment of it.

    ``curves`` by quantity: ``piece`` over steps, series PIECES, ‖piece‖² / ‖F‖²; ``error`` and ``captured`` over λ,
    series methods, ‖F + λI − M⁻¹‖ / ‖F‖ and the decrease captured by M g; ``lost`` and ``misfit`` for the first
    seed, series pairs of layers such as 1–2, the entries of the two fields of that name.
    """

    partition: Partition
    fisher: Tensor  # (P, P)
    error: Tensor  # (P, P): F minus K-FAC
    lost: NDArray  # (L, L): share of ‖F − K-FAC‖² in each block, adding up to 1
    misfit: NDArray  # (L, L): ‖F_lm − G_lm ⊗ A_lm‖ / ‖F_lm‖


@one_thread()
def run_kfac(
    *,
    damping: Annotated[float, DAMPINGS] = 1e-2,
    steps: Annotated[int, Range(0, 2000)] = 100,
    samples: Annotated[int, Range(1, 64)] = 1,
    data: Data = "digits4",
    widths: Widths = (12, 12, 12),
    n: Annotated[int, Range(10, 1797)] = 500,
    repeats: Annotated[int, Range(1, 20)] = 5,
    seed: Seed = 0,
    device: Device = "cpu",
) -> KfacResult:
    """Split the error of K-FAC, and compare it with other approximations of the same Fisher.

    Args:
        damping: λ of the factored rule, and of the steps that are compared.
        steps: of Adam before the network is looked at.
        samples: labels drawn per example where labels are sampled.
        data: which data, and with it the likelihood.
        widths: of the hidden layers.
        n: examples.
        repeats: networks, each with its own data, weights and labels: seed, seed + 1, …
        seed: of the first network, which the matrices show.
        device: where to compute.
    """
    parameters = check(run_kfac, locals())
    common, seeds = (data, tuple(widths), n, samples, device), range(seed, seed + repeats)
    pieces = np.array([[_pieces(*common, step, r) for step in MOMENTS] for r in seeds])
    pieces[:, :, -1] *= damping
    curves = {("piece", name): curve(MOMENTS, pieces[:, :, i]) for i, name in enumerate(PIECES)}
    s = setting(data, tuple(widths), n, seed, steps, "exact", device)
    error, lost, misfit = _by_pair(s)
    for quantity, matrix in (("lost", lost), ("misfit", misfit)):
        for l, m in np.ndindex(*matrix.shape):
            curves[quantity, f"{l + 1}–{m + 1}"] = curve([steps], [matrix[l, m]])
    methods = by_key(_methods(*common, steps, r) for r in seeds)
    curves |= {key: curve(COMPARED, rows) for key, rows in methods.items()}
    return KfacResult(parameters, curves, s.F.partition, s.dense.cpu(), error, lost, misfit)


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


def kronecker_blocks(F: Fisher, damping: float = 0.0) -> Tensor:
    """K-FAC as a matrix (P, P): ``G ⊗ A`` per layer; with damping, what its factored rule inverts."""
    f, root = F.kronecker(), damping**0.5
    blocks = []
    for A, G, π in zip(f.A, f.G, f.pi, strict=True):
        eye_A, eye_G = (torch.eye(len(X), dtype=X.dtype, device=X.device) for X in (A, G))
        blocks.append(torch.kron(G + root / π * eye_G, A + π * root * eye_A))
    return torch.block_diag(*blocks)


@lru_cache(maxsize=256)
def _pieces(data, widths, n, samples, device, steps, seed) -> list[float]:
    """The PIECES of one network as shares of ‖F‖²; the last for λ = 1."""
    s = setting(data, widths, n, seed, steps, "exact", device)
    sampled = frobenius(kronecker_blocks(s.F) - kronecker_blocks(_sampled(s, samples, seed))) ** 2
    return [piece / frobenius(s.dense) ** 2 for piece in (*split(s.F, s.dense), sampled, factored_excess(s.F))]


def _sampled(s: Setting, samples: int, seed: int) -> Fisher:
    """The same network seen through labels drawn from it."""
    return s.problem.capture("mc", samples=samples, generator=torch.Generator(s.F.device).manual_seed(seed))


@lru_cache(maxsize=64)
def _methods(data, widths, n, samples, device, steps, seed) -> dict[tuple[str, str], list[float]]:
    """Error and captured decrease of every method at the dampings COMPARED, on one network."""
    s = setting(data, widths, n, seed, steps, "exact", device)
    F, dense, drawn = s.F, s.dense, _sampled(s, samples, seed)
    dropped, basis, eigenvalues = split(F, dense)
    constant = {  # without damping in the error: λI is added on both sides
        "block-diagonal": dropped**0.5,
        "ekfac": (dropped + basis) ** 0.5,
        "kfac": (dropped + basis + eigenvalues) ** 0.5,
        "sampled": frobenius(dense - kronecker_blocks(drawn)),
    }
    methods = {
        "block-diagonal": BlockDiagonal(F, 1.0),
        "ekfac": EKFAC(F, 1.0),
        "kfac": KFAC(F, 1.0),
        "sampled": KFAC(drawn, 1.0),
        "factored": KFAC(F, 1.0, "factored"),
        "block-tridiagonal": BlockTridiagonal(F, 1.0),
    }
    found = defaultdict(list)
    for λ in COMPARED:
        A = F.damped(λ)
        for name, M in methods.items():
            M = M.with_damping(λ)
            error = constant.get(name)
            if error is None:
                inverse = kronecker_blocks(F, λ) if name == "factored" else torch.linalg.inv(M.dense())
                error = frobenius(dense + λ * F.eye() - inverse)
            found["error", name].append(error / frobenius(dense))
            found["captured", name].append(captured(A, s.g, M @ s.g)[0])
    return found


@lru_cache(maxsize=4)
def _by_pair(s: Setting) -> tuple[Tensor, NDArray, NDArray]:
    """F − K-FAC, the share of its square in each pair of layers, and how well ``G_lm ⊗ A_lm`` would fit each."""
    error, all_blocks, slices = s.dense - kronecker_blocks(s.F), s.K.dense(), s.F.partition.slices

    def norms(matrix: Tensor) -> NDArray:
        return np.array([[frobenius(matrix[a, b]) for b in slices] for a in slices])

    lost = norms(error) ** 2
    return error.cpu(), rounded(lost / lost.sum()), rounded(norms(s.dense - all_blocks) / norms(s.dense))


# ---- the picture --------------------------------------------------------------------------------------


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


# ---- the exercises ------------------------------------------------------------------------------------


@exercise("02a", "Only the blocks between layers are lost for certain; what is the norm of those?", 0.01)
def _best_block_diagonal_error() -> float:
    s = first_network()
    return (split(s.F, s.dense)[0] / float(s.dense.square().sum())) ** 0.5


@exercise("02b", "Multiply the product out: both terms that are left over grow with the root of λ.", 0.01)
def _growth_of_the_factored_excess() -> float:
    F = first_network().F
    near, far = (kronecker_blocks(F, λ) - kronecker_blocks(F) - λ * F.eye() for λ in (1e-3, 1e-1))
    return float(far.square().sum() / near.square().sum())
