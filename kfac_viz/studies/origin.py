"""Where two levels come from: Poisson's equation on an interval, and ridge regression over clusters of examples."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..method.coarse import nicolaides
from ..method.krylov import pcg, spectrum
from ..method.operator import Damped, Dense, Operator
from ..method.partition import Partition
from ..method.preconditioner import BlockDiagonal, Identity
from ..method.two_level import TwoLevel
from ..parameters import Device, Range, Seed, check
from ..show.curves import CurveView
from ..show.parts import MatrixView, limit_of
from ..show.plot import Plot
from ..show.style import FAINT, INK, METHODS, MUTED, SPACES, Style
from .curves import Study, curve, rounded
from .exercises import exercise
from .threads import one_thread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis



@dataclass(frozen=True, eq=False)
class OriginResult(Study):
    """Curves ``poisson`` (iterations over subdomains), ``modes`` (root of the energy in each sine mode)
    and ``ridge`` (iterations over clusters), and what else is pictured.

    Attributes:
        errors: over the interval, at the start, after the sweeps with one level, and with two.
        gram: the Gram matrix of the digits in the order of ``groups``, and its partition into clusters.
        means: mean image of each of these clusters, (clusters, 8, 8).
    """

    errors: dict[str, NDArray]
    gram: NDArray
    groups: Partition
    means: NDArray


@one_thread()
def run_origin(
    *,
    damping: Annotated[float, Range(1e-6, 1, log=True, steps=61)] = 1e-3,
    per_subdomain: Annotated[int, Range(1, 8)] = 1,
    local: Annotated[int, Range(8, 64)] = 16,
    subdomains: Annotated[tuple[int, ...], Range(2, 128)] = (2, 4, 8, 16, 32),
    shown: Annotated[int, Range(2, 32)] = 8,
    sweeps: Annotated[int, Range(0, 100)] = 10,
    clusters: Annotated[tuple[int, ...], Range(2, 200)] = (2, 5, 10, 20, 40, 80),
    n: Annotated[int, Range(50, 1797)] = 500,
    rtol: Annotated[float, Range(1e-12, 1e-1, log=True)] = 1e-6,
    repeats: Annotated[int, Range(1, 20)] = 5,
    seed: Seed = 0,
    device: Device = "cpu",
) -> OriginResult:
    """Block Jacobi without and with a coarse space, for Poisson's equation and for ridge regression.

    Args:
        damping: λ of the ridge regression, as a share of the largest eigenvalue.
        per_subdomain: constants in each subdomain of the interval; more than one cut it into aggregates.
        local: points in each subdomain.
        subdomains: how many, for the iterations.
        shown: how many, for the pictured errors.
        sweeps: of the stationary iteration before the errors are pictured.
        clusters: how many clusters of examples, for the ridge regression.
        n: examples, digits of 8×8 pixels.
        rtol: residual, as a share of the right-hand side, at which the iterations stop.
        repeats: seeds, from ``seed`` upwards; a band shows the lowest and the highest.
        seed: of right-hand sides, examples and clusters.
        device: where to compute.
    """
    parameters = check(run_origin, locals())
    seeds = range(seed, seed + repeats)
    curves = {}
    for quantity, x, measure in (
        ("poisson", subdomains, lambda size, s: _poisson_iterations(size, local, per_subdomain, rtol, s, device)),
        ("ridge", clusters, lambda size, s: _ridge_iterations(size, n, damping, rtol, s, device)),
    ):
        found = defaultdict(list)
        for s in seeds:
            for series, counts in _transposed([measure(size, s) for size in x]).items():
                found[series].append(counts)
        curves |= {(quantity, series): curve(x, rows) for series, rows in found.items()}
    errors, modes = _errors(shown, local, per_subdomain, sweeps, seed, device)
    curves |= {("modes", series): curve(np.arange(1, len(y) + 1), np.abs(y)) for series, y in modes.items()}
    ten = min(clusters, key=lambda k: abs(k - 10))
    ridge = _ridge(ten, n, seed, device)
    return OriginResult(parameters, curves, errors, ridge.B.dense().cpu().numpy(), ridge.B.partition, ridge.means)


def poisson(subdomains: int, local: int, device: str = "cpu") -> Dense:
    """``−u″`` by second differences with both ends held at zero, over subdomains of ``local`` points."""
    size = subdomains * local
    ones = torch.ones(size, dtype=torch.float64, device=device)
    return Dense(
        2 * ones.diag() - ones[1:].diag(1) - ones[1:].diag(-1), Partition.from_sizes([local] * subdomains)
    )


def _transposed(dicts: list[dict[str, int]]) -> dict[str, list[int]]:
    return {key: [d[key] for d in dicts] for key in dicts[0]}


@lru_cache(maxsize=256)
def _poisson_iterations(size: int, local: int, per_subdomain: int, rtol: float, seed: int, device: str) -> dict:
    A = poisson(size, local, device)
    M, Z = BlockDiagonal(A, 0.0), nicolaides(A, per_subdomain)
    b = torch.randn(len(A.eye()), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device)
    methods = {"none": None, "blocks": M, "additive": TwoLevel(A, M, Z, "additive"), "balanced": TwoLevel(A, M, Z)}
    return {name: _iterations(A, b, T, rtol) for name, T in methods.items()}


def _iterations(A: Operator, b: Tensor, T: Operator | None, rtol: float) -> int:
    """Of conjugate gradients nearly as in exact arithmetic. Dense, which is the quickest at some hundred unknowns."""
    return pcg(A, b, None if T is None else Dense(T.dense(), A.partition), rtol=rtol, reorthogonalize=True).iterations


@lru_cache(maxsize=16)
def _errors(shown: int, local: int, per_subdomain: int, sweeps: int, seed: int, device: str) -> tuple[dict, dict]:
    """One error over the interval; and for all errors that begin with energy ``eᵀAe = 1`` and a random sign in
    every sine mode, the root mean square of the energy that sweeps of ``e ← e − T A e`` leave in each mode."""
    A = poisson(shown, local, device)
    M = BlockDiagonal(A, 0.0)
    T = TwoLevel(A, M, nicolaides(A, per_subdomain))
    d, sines = A.eigen
    signs = torch.randint(0, 2, (len(d),), generator=torch.Generator().manual_seed(seed)).to(d) * 2 - 1
    starts = sines / d.sqrt()  # every sine mode with energy 1
    errors, modes = {}, {}
    for name, method, k in (("start", M, 0), ("blocks", M, sweeps), ("balanced", T, sweeps)):
        left = torch.linalg.matrix_power(A.eye() - method @ A.dense(), k) @ starts
        errors[name] = left @ signs
        modes[name] = torch.linalg.vector_norm(d.sqrt()[:, None] * (sines.T @ left), dim=1).cpu().numpy()
    return {name: rounded(e.cpu()) for name, e in errors.items()}, modes


@dataclass(frozen=True, eq=False)
class _Ridge:
    """``B = X Xᵀ / λ_max`` over n digits sorted by cluster, right-hand side b, and the same for random groups."""

    B: Dense
    b: Tensor
    random: tuple[Dense, Tensor]
    means: NDArray


@lru_cache(maxsize=64)
def _ridge(clusters: int, n: int, seed: int, device: str) -> _Ridge:
    from sklearn.cluster import KMeans
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    chosen = np.random.default_rng(seed).permutation(len(pixels))[:n]
    x, target = pixels[chosen] / 16, np.where(labels[chosen] == 3, 1.0, -1.0)
    gram = x @ x.T
    gram /= np.linalg.eigvalsh(gram)[-1]

    def sorted_by(groups: NDArray) -> tuple[Dense, Tensor]:
        order = np.argsort(groups, kind="stable")
        partition = Partition.from_sizes(np.unique(groups, return_counts=True)[1])
        matrix = torch.as_tensor(gram[np.ix_(order, order)], device=device)
        return Dense(matrix, partition), torch.as_tensor(target[order], device=device)

    groups = KMeans(clusters, n_init=1, random_state=seed).fit_predict(x)
    shuffled = np.random.default_rng(seed).permutation(groups)  # the same sizes, without the neighbours
    means = np.stack([x[groups == k].mean(0).reshape(8, 8) for k in np.unique(groups)])
    return _Ridge(*sorted_by(groups), sorted_by(shuffled), rounded(means))


@lru_cache(maxsize=512)
def _ridge_iterations(clusters: int, n: int, damping: float, rtol: float, seed: int, device: str) -> dict[str, int]:
    """``(X Xᵀ + λI) α = y``: the ridge regression of whether a digit is a 3, in its dual form."""
    ridge = _ridge(clusters, n, seed, device)
    (R, r), A, M = ridge.random, ridge.B.damped(damping), BlockDiagonal(ridge.B, damping)
    shuffled = R.damped(damping)

    def constants(A: Damped) -> TwoLevel:
        return TwoLevel(A, Identity(A), nicolaides(A, 1))

    return {
        "none": _iterations(A, ridge.b, None, rtol),
        "blocks": _iterations(A, ridge.b, M, rtol),
        "balanced": _iterations(A, ridge.b, TwoLevel(A, M, nicolaides(A, 1)), rtol),
        "clusters": _iterations(A, ridge.b, constants(A), rtol),
        "random": _iterations(shuffled, r, constants(shuffled), rtol),
    }


# ---- the picture --------------------------------------------------------------------------------------


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


# ---- the exercises ------------------------------------------------------------------------------------


@exercise("04a", "Each inner boundary couples one pair of neighbours, and that pair spans how many dimensions?")
def _interface_eigenvalues() -> int:
    A = poisson(subdomains=10, local=8)
    return int((abs(spectrum(A, BlockDiagonal(A, 0.0)) - 1) > 1e-8).sum())


@exercise("04b", "kv.spectrum(A, T)[-1], with T = kv.TwoLevel(A, M, Z, 'balanced').", 1e-3)
def _largest_balanced_eigenvalue() -> float:
    A = poisson(subdomains=8, local=16)
    return float(spectrum(A, TwoLevel(A, BlockDiagonal(A, 0.0), nicolaides(A, 1)))[-1])
