"""Where two levels come from: Poisson's equation on an interval, and ridge regression over clusters of examples."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import BlockDiagonal, Damped, Dense, Identity, Partition, TwoLevel, show, spectrum
from ..method.coarse import nicolaides
from ..method.decompositions import eigvalsh
from ..parameters import Device, Range, Repeats, Rtol, Seed, check, number
from ..problems.rounding import perturbed
from ..show import (
    FAINT,
    INK,
    METHODS,
    SPACES,
    CurveView,
    MatrixView,
    Style,
    Tolerance,
    empty_line,
    limit_of,
    plain_numbers,
)
from .common.exercises import exercise
from .common.result import COUNT, PRECISION, Curve, Study, by_key, curve, over, over_seeds, rounded, seeds
from .common.setting import iterations

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D


@dataclass(frozen=True, eq=False)
class Result(Study):
    """Curves ``poisson`` (iterations over subdomains), ``modes`` (root of the energy in each sine mode)
    and ``ridge`` (iterations over clusters), and what else is pictured.

    Attributes:
        errors: over the interval, at the start, after the sweeps with one level, and with two.
        gram: the Gram matrix of the digits in the order of ``groups``, and its partition into clusters.
        means: mean image of each of these clusters, (clusters, 8, 8).
    """

    tolerances = {
        "poisson": COUNT,
        "ridge": COUNT,
        "modes": Tolerance(relative=2e-3, absolute=10 * PRECISION),
    }

    errors: dict[str, NDArray]
    gram: NDArray
    groups: Partition
    means: NDArray

    @property
    def headline(self) -> str:
        s, blocks, balanced = last(self, "poisson", "blocks", "balanced")
        k, none, clusters = last(self, "ridge", "none", "clusters")
        return (
            f"Constants of {s} subdomains save block Jacobi {blocks - balanced} of {blocks} iterations; of {k} "
            f"clusters, alone, {none - clusters} of {none}"
        )

    @property
    def where(self) -> str:
        p = self.parameters
        return (
            f"Poisson on an interval, {p['local']} points a subdomain, {p['sweeps']} sweeps; ridge regression on "
            f"{p['n']} digits, λ = {number(p['damping'])} λ_max; {over(p)}"
        )


def run(
    *,
    damping: Annotated[float, Range(1e-6, 1, log=True, steps=61)] = 1e-3,
    per_subdomain: Annotated[int, Range(1, 8)] = 1,
    local: Annotated[int, Range(8, 64)] = 16,
    subdomains: Annotated[tuple[int, ...], Range(2, 128)] = (2, 4, 8, 16, 32),
    shown: Annotated[int, Range(2, 32)] = 8,
    sweeps: Annotated[int, Range(0, 100)] = 10,
    clusters: Annotated[tuple[int, ...], Range(2, 200)] = (2, 5, 10, 20, 40, 80),
    n: Annotated[int, Range(50, 1797)] = 500,
    rtol: Rtol = 1e-6,
    repeats: Repeats = 5,
    seed: Seed = 0,
    device: Device = "cpu",
) -> Result:
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
        seed: of right-hand sides, examples and clusters.
    """
    p = check(run, locals())
    curves = over_seeds(subdomains, (
        by_key(_poisson_iterations(size, local, per_subdomain, rtol, s, device) for size in subdomains)
        for s in seeds(p)
    ))  # fmt: skip
    curves |= over_seeds(clusters, (
        by_key(_ridge_iterations(size, n, damping, rtol, s, device) for size in clusters) for s in seeds(p)
    ))  # fmt: skip
    errors, modes = _errors(shown, local, per_subdomain, sweeps, seed, device)
    curves |= {("modes", series): curve(np.arange(1, len(y) + 1), np.abs(y)) for series, y in modes.items()}
    ridge = _ridge(min(clusters, key=lambda k: abs(k - 10)), n, seed, device)
    return Result(p, curves, errors, ridge.B.dense().cpu().numpy(), ridge.B.partition, ridge.means)


def poisson(subdomains: int, local: int, device: str = "cpu") -> Dense:
    """``−u″`` by second differences with both ends held at zero, over subdomains of ``local`` points."""
    size = subdomains * local
    ones = torch.ones(size, dtype=torch.float64, device=device)
    return Dense(2 * ones.diag() - ones[1:].diag(1) - ones[1:].diag(-1), Partition.from_sizes([local] * subdomains))


@lru_cache(maxsize=256)
def _poisson_iterations(size: int, local: int, per_subdomain: int, rtol: float, seed: int, device: str) -> dict:
    A = poisson(size, local, device)
    M, Z = BlockDiagonal(A, 0.0), nicolaides(A, per_subdomain)
    generator = torch.Generator().manual_seed(seed)
    b = perturbed(torch.randn(len(A.eye()), generator=generator, dtype=torch.float64, device="cpu")).to(device)
    methods = {"none": None, "blocks": M, "additive": TwoLevel(A, M, Z, "additive"), "balanced": TwoLevel(A, M, Z)}
    return {("poisson", name): iterations(A, b, T, rtol) for name, T in methods.items()}


@lru_cache(maxsize=16)
def _errors(shown: int, local: int, per_subdomain: int, sweeps: int, seed: int, device: str) -> tuple[dict, dict]:
    """One error over the interval; and for all errors that begin with energy ``eᵀAe = 1`` and a random sign in
    every sine mode, the root mean square of the energy that sweeps of ``e ← e − T A e`` leave in each mode, at least
    PRECISION."""
    A = poisson(shown, local, device)
    M = BlockDiagonal(A, 0.0)
    T = TwoLevel(A, M, nicolaides(A, per_subdomain))
    d, sines = A.eigen
    signs = torch.randint(0, 2, (len(d),), generator=torch.Generator().manual_seed(seed), device="cpu").to(d) * 2 - 1
    starts = sines / d.sqrt()  # every sine mode with energy 1
    errors, modes = {}, {}
    for name, method, k in (("start", M, 0), ("blocks", M, sweeps), ("balanced", T, sweeps)):
        left = torch.linalg.matrix_power(A.eye() - method @ A.dense(), k) @ starts
        errors[name] = left @ signs
        energies = torch.linalg.vector_norm(d.sqrt()[:, None] * (sines.T @ left), dim=1)
        modes[name] = energies.clamp_min(PRECISION).cpu().numpy()
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
    x = perturbed(torch.from_numpy(pixels[chosen] / 16)).numpy()
    target = np.where(labels[chosen] == 3, 1.0, -1.0)
    gram = x @ x.T
    gram /= float(eigvalsh(torch.from_numpy(gram), "The Gram matrix")[-1])

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
def _ridge_iterations(clusters: int, n: int, damping: float, rtol: float, seed: int, device: str) -> dict:
    """``(X Xᵀ + λI) α = y``: the ridge regression of whether a digit is a 3, in its dual form."""
    ridge = _ridge(clusters, n, seed, device)
    (R, r), A, M = ridge.random, ridge.B.damped(damping), BlockDiagonal(ridge.B, damping)
    shuffled = R.damped(damping)

    def constants(A: Damped) -> TwoLevel:
        return TwoLevel(A, Identity(A), nicolaides(A, 1))

    methods = {"none": None, "blocks": M, "balanced": TwoLevel(A, M, nicolaides(A, 1)), "clusters": constants(A)}
    found = {("ridge", name): iterations(A, ridge.b, T, rtol) for name, T in methods.items()}
    return found | {("ridge", "random"): iterations(shuffled, r, constants(shuffled), rtol)}


# ---- the picture --------------------------------------------------------------------------------------

BLOCKS = METHODS["kfac"]._replace(label="block Jacobi")
BALANCED = METHODS["balanced"]._replace(label="block Jacobi and constants, balanced")
ADDITIVE = METHODS["additive"]._replace(label="block Jacobi and constants, additive")
CONSTANTS = SPACES["nicolaides"]._replace(label="constants of clusters alone")
RANDOM = SPACES["random"]._replace(label="constants of random groups alone")
POISSON = {"none": METHODS["none"], "blocks": BLOCKS, "additive": ADDITIVE, "balanced": BALANCED}
RIDGE = {"none": METHODS["none"], "random": RANDOM, "blocks": BLOCKS, "balanced": BALANCED, "clusters": CONSTANTS}
ERRORS = {"start": Style("error at the start", FAINT, ""), "blocks": BLOCKS, "balanced": BALANCED}


class Plot(show.Plot):
    """Poisson's equation above, ridge regression below."""

    size = (10.0, 6.6)
    fixed = ("local", "subdomains", "shown", "clusters", "n", "seed")

    def build(self, result: Result) -> None:
        p = result.parameters
        top, bottom = self.figure.subplots(2, 3)
        self.lines = self._interval(top[0], result)
        modes = min(4, p["local"]) * p["shown"]
        errors = {name: style._replace(marker="") for name, style in ERRORS.items()}
        self.modes = self.add(CurveView(
            top[1], errors, result.of("modes"), "Energy left in each sine mode",
            x="mode (line: subdomains; triangle: less)",
            xlim=(0, modes), ylim=(1e-2, 1.5), scale=("linear", "log"),
        ))  # fmt: skip
        self.poisson = self._iterations(top[2], POISSON, result.of("poisson"), "Poisson: iterations", "subdomains",
                                        (2, 1.6 * max(p["subdomains"]) * p["local"]))  # fmt: skip
        self._clusters(bottom[0], result)
        gram = MatrixView(bottom[1], result.groups, "Ridge: Gram matrix", logarithmic=False)
        gram.update(result.gram, limit_of(result.gram))
        bottom[1].set(xticks=[], yticks=[], xlabel="examples by cluster", ylabel="")
        self.ridge = self._iterations(bottom[2], RIDGE, result.of("ridge"), "Ridge: iterations", "clusters", (5, 200))
        lines = {**self.poisson.lines, **self.ridge.lines}
        self.legend([self.lines["start"], *lines.values()], 3)

    def _iterations(
        self, ax: Axes, series: dict[str, Style], curves: dict[str, Curve], title: str, x: str, ylim: tuple
    ) -> CurveView:
        counts = curves["none"].x
        xlim = counts.min() / 1.15, counts.max() * 1.15
        view = self.add(CurveView(ax, series, curves, title, x=x, xlim=xlim, ylim=ylim))
        plain_numbers(ax.xaxis, counts)
        return view

    def _interval(self, ax: Axes, result: Result) -> dict[str, Line2D]:
        p, start = result.parameters, result.errors["start"]
        ax.set(title="Poisson: error", xlabel="point; every other subdomain shaded", xlim=(0, len(start) - 1),
               ylim=(1.1 * start.min(), 1.1 * start.max()), yticks=[])  # fmt: skip
        for i in range(0, p["shown"], 2):
            ax.axvspan(i * p["local"] - 0.5, (i + 1) * p["local"] - 0.5, color=FAINT, alpha=0.25, linewidth=0)
        ax.axhline(0, color=INK, linewidth=0.6)
        return {name: self.add(empty_line(ax, style)) for name, style in ERRORS.items()}

    def _clusters(self, ax: Axes, result: Result) -> None:
        """Mean images side by side, with a white line between."""
        means = result.means[:10]
        columns = -(-len(means) // 2)
        tiles = np.full((2 * 9 - 1, columns * 9 - 1), np.nan)
        for i, mean in enumerate(means):
            row, column = divmod(i, columns)
            tiles[9 * row : 9 * row + 8, 9 * column : 9 * column + 8] = mean
        ax.imshow(tiles, cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
        ax.set(xticks=[], yticks=[], title=f"Ridge: means of {len(result.means)} clusters")
        ax.spines[:].set_visible(False)

    def move(self, result: Result) -> None:
        for name, line in self.lines.items():
            line.set_data(np.arange(len(result.errors[name])), result.errors[name])
        self.modes.update(result.of("modes"), at=result.parameters["shown"])
        self.poisson.update(result.of("poisson"))
        self.ridge.update(result.of("ridge"))


def last(result: Result, quantity: str, *names: str) -> list[int]:
    """The largest x of some curves, and what they are there."""
    curves = result.of(quantity)
    at = curves[names[0]].x.argmax()
    return [round(curves[names[0]].x[at]), *(round(curves[name].y[at]) for name in names)]


# ---- the exercises ------------------------------------------------------------------------------------


@exercise("05a", "Each inner boundary couples one pair of neighbours, and that pair spans how many dimensions?")
def _interface_eigenvalues() -> int:
    A = poisson(subdomains=10, local=8)
    return int((abs(spectrum(A, BlockDiagonal(A, 0.0)) - 1) > 1e-8).sum())


@exercise("05b", "kv.spectrum(A, T)[-1], with T = kv.TwoLevel(A, M, Z, 'balanced').", 1e-3)
def _largest_balanced_eigenvalue() -> float:
    A = poisson(subdomains=8, local=16)
    return float(spectrum(A, TwoLevel(A, BlockDiagonal(A, 0.0), nicolaides(A, 1)))[-1])
