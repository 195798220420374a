"""Which Kronecker product: four of them for one block of F, how far each is from it, and what its step captures."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor

from .. import EKFAC, KFAC, BlockDiagonal, Diagonal, KroneckerFactors, Partition, problems, show
from ..method.decompositions import psd_eigen
from ..method.products import FACTORS, Scores, product
from ..parameters import Device, Examples, Range, Repeats, Seed, Steps, check, number
from ..problems import Problem
from ..show import INK, METHODS, CurveView, MatrixView, Tolerance, limit_of, plain_numbers
from .common import batches
from .common.exercises import exercise
from .common.result import PRECISION, SHARE, SHARES, Study, by_key, curve, over_seeds, seeds, share, stage
from .common.setting import Setting, all_shares

DAMPINGS = Range(1e-5, 1.0, log=True, steps=51)
COMPARED = DAMPINGS.positions[::5]
NETWORKS = {
    "mlp": "digits 4×4, hidden widths 12, 12, 12",
    "convolution": "digits 8×8, two convolutions",
    "transformer": "digits 8×8 as tokens, a transformer",
}
OPTIMIZERS = {"adam": "Adam", "shampoo": "Shampoo", "soap": "SOAP", "muon": "Muon"}  # of batches
BATCH = 50
GROUPS = 12  # of eigenvectors that follow each other


@dataclass(frozen=True, eq=False)
class Result(Study):
    """Four products of one block, over seeds.

    ``curves`` by quantity, with the rules FACTORS as series: ``eigenvalue`` over the rank, also of the ``block``;
    ``too_long`` over the rank, by how much a step along the eigenvectors of the product is too long, means of groups;
    ``error`` at the stage, ‖F_ll − G ⊗ A‖ / ‖F_ll‖; ``divergence`` over λ, of the normal distribution with covariance
    F_ll + λI from that with G ⊗ A + λI, per parameter; ``captured`` and ``at_best_length`` over λ, what the step of
    the whole network with these products captures, also with exact blocks (``block-diagonal``).
    """

    tolerances = SHARES | {
        "error": Tolerance(relative=2e-3),
        "eigenvalue": Tolerance(relative=5e-3, absolute=1e-9),
        "too_long": Tolerance(relative=5e-3),
        "divergence": Tolerance(relative=5e-3, absolute=1e-5),
        **{f"{what}, {network}": SHARE for what in ("error", "at_best_length") for network in NETWORKS},
    }

    partition: Partition  # of the block: one part for each row of the layer
    layer: str
    matrices: dict[str, Tensor]  # of the first seed: the ``block``, and each product

    @property
    def headline(self) -> str:
        error, captured = self.of("error"), self.of("at_best_length")
        λ = self.parameters["damping"]
        near, kfac = ((number(error[rule].y[0], 2), share(captured[rule].at(λ))) for rule in ("nearest", "kfac"))
        return (f"Nearer is not better: the nearest product (error {near[0]}) captures {near[1]}, K-FAC (error "
                f"{kfac[0]}) {kfac[1]}")  # fmt: skip

    def told(self, rule: str) -> str:
        """The error of a product in norm and in KL, for the picture."""
        λ = self.parameters["damping"]
        return f"{number(self.of('error')[rule].y[0], 2)}, {number(self.of('divergence')[rule].at(λ), 2)}"

    @property
    def where(self) -> str:
        p = self.parameters
        return (f"{NETWORKS[p['network']]}, {p['n']} examples, {stage(p['steps'])}; layer {self.layer}; λ = "
                f"{number(p['damping'])}, best lengths, {p['repeats']} seeds")  # fmt: skip

    def others(self) -> list[tuple]:
        """What the other networks, and the optimizers of batches, say of the same at this λ."""
        p = self.parameters
        rows = []
        for network in NETWORKS:
            found = by_key(_elsewhere(network, p["n"], s, p["steps"], p["device"], p["damping"]) for s in seeds(p))
            for (quantity, series), values in found.items():
                x = p["damping"] if quantity == "at_best_length" else p["steps"]
                _, *summary = (float(part[0]) for part in curve([x], [[value] for value in values]))
                rows.append((f"{quantity}, {network}", series, x, *summary))
        return rows


def run(
    *,
    damping: Annotated[float, DAMPINGS] = 1e-3,
    network: Annotated[Literal["mlp", "convolution", "transformer"], "what sees the digits."] = "mlp",
    layer: Annotated[int, Range(1, 8)] = 3,
    steps: Steps = 100,
    n: Examples = 300,
    repeats: Repeats = 5,
    seed: Seed = 0,
    device: Device = "cpu",
) -> Result:
    """Take four Kronecker products for one block of the exact Fisher, and compare them.

    Args:
        damping: λ.
        layer: whose block, counted from the input; the last one where there are fewer. Norms are not counted.
        seed: of the first network, which the matrices show.
    """
    p = check(run, locals())
    places = [(network, n, s, steps, device) for s in seeds(p)]
    found = [_block(place, layer) for place in places]
    first = found[0]
    size = len(first.matrices["block"])
    middles = [float(part.mean()) for part in np.array_split(np.arange(1, size + 1), GROUPS)]
    curves = over_seeds(ranks_of(size), (f.eigenvalues for f in found))
    curves |= over_seeds(middles, (f.too_long(damping) for f in found))
    curves |= over_seeds([steps], (f.errors for f in found))
    curves |= over_seeds(COMPARED, (f.divergences for f in found))
    curves |= over_seeds(COMPARED, map(_steps, places))
    return Result(p, curves, first.partition, first.name, first.matrices)


@lru_cache(maxsize=16)
def network_of(network: str, n: int, seed: int, steps: int, device: str = "cpu") -> Setting:
    """The network of this name after so many full-batch Adam steps; cached."""
    if network == "mlp":
        problem = problems.digits((12, 12, 12), n, seed, side=4, device=device)
    elif network == "transformer":
        problem = _drawn(problems.attention(8, n, seed, device=device), seed)
    else:
        problem = _drawn(problems.convolutional((4, 8), n, seed, device=device), seed)
    return Setting(problem.trained(steps), "exact", seed)


@torch.no_grad()
def _drawn(problem: Problem, seed: int) -> Problem:
    """The problem, its weights and biases drawn anew in double precision, uniform in ±1/√inputs. In single precision,
    which modules take, the last bit depends on the processor, and training makes much of it."""
    generator = torch.Generator("cpu").manual_seed(seed)
    for module in problem.model.modules():
        own = list(module.parameters(recurse=False))
        inputs = max((p[0].numel() for p in own if p.ndim > 1), default=0)
        for p in own if inputs else ():
            uniform = torch.rand(p.shape, generator=generator, dtype=torch.float64, device="cpu")
            p.copy_((2 * uniform - 1) / inputs**0.5)
    return problem


@lru_cache(maxsize=8)
def _factors(place: tuple) -> dict[str, KroneckerFactors]:
    """Those of each rule, in all layers."""
    return {rule: network_of(*place).F.kronecker(factors=rule) for rule in FACTORS}


@dataclass(frozen=True, eq=False)
class _Block:
    """One block, its products, and how far they are from it."""

    partition: Partition
    name: str
    matrices: dict[str, Tensor]
    eigenvalues: dict[tuple[str, str], list[float]]
    errors: dict[tuple[str, str], list[float]]
    divergences: dict[tuple[str, str], list[float]]
    along: dict[str, tuple[Tensor, Tensor]]  # for each rule the k of its eigenvectors u, ascending, and ``uᵀ B u``

    def too_long(self, damping: float) -> dict[tuple[str, str], list[float]]:
        """``(uᵀ B u + λ) / (k + λ)``, the mean of each group of eigenvectors u; the largest eigenvalues k first."""
        found = {}
        for rule, (k, seen) in self.along.items():
            ratios = ((seen + damping) / (k + damping)).flip(0).cpu().numpy()
            found["too_long", rule] = [float(part.mean()) for part in np.array_split(ratios, GROUPS)]
        return found


@lru_cache(maxsize=32)
def _block(place: tuple, number_of: int) -> _Block:
    F, factors = network_of(*place).F, _factors(place)
    matrices = [l for l, layer in enumerate(F.partition.layers) if not layer.vector]
    l = matrices[min(number_of, len(matrices)) - 1]
    layer, B = F.partition.layers[l], F.block(l, l)
    products = {rule: f.blocks()[l] for rule, f in factors.items()}
    eigenvalues, errors, divergences, along = {}, {}, {}, {}
    d = psd_eigen(B, "The block").d
    eigenvalues["eigenvalue", "block"] = _descending(d)
    for rule, K in products.items():
        k, U = psd_eigen(K, f"The product by rule {rule!r}")
        eigenvalues["eigenvalue", rule] = _descending(k)
        errors["error", rule] = [float((B - K).norm() / B.norm())]
        along[rule] = k, (seen := ((B @ U) * U).sum(0))
        divergences["divergence", rule] = [divergence(d, k, seen, λ) for λ in COMPARED]
    rows = Partition.from_sizes([layer.features] * layer.out)
    shown = {name: X.cpu() for name, X in {"block": B, **products}.items()}
    name = f"{matrices.index(l) + 1} of {len(matrices)} ({layer.out} × {layer.features})"
    return _Block(rows, name, shown, eigenvalues, errors, divergences, along)


def ranks_of(size: int) -> list[int]:
    """The ranks at which eigenvalues are shown: a ratio apart, the first and the last included."""
    return np.unique(np.geomspace(1, size, 24).round().astype(int)).tolist()


def _descending(d: Tensor) -> list[float]:
    """Eigenvalues at the ranks shown, the largest first; those below its rounding error are 0."""
    d = torch.where(d > PRECISION * d[-1], d, 0.0).flip(0).tolist()
    return [d[rank - 1] for rank in ranks_of(len(d))]


def divergence(d: Tensor, k: Tensor, seen: Tensor, damping: float) -> float:
    """``½ (tr(X − I) − log det X) / P`` with ``X = (K + λI)⁻¹ (B + λI)``: the Kullback–Leibler divergence of the normal
    distribution with covariance B + λI from that with K + λI, per parameter.

    Args:
        d, k: eigenvalues of B and K.
        seen: ``uᵀ B u`` for the eigenvectors u of K.
    """
    trace = (seen - k) / (k + damping)
    return 0.5 * float((trace + (k + damping).log() - (d + damping).log()).mean())


@lru_cache(maxsize=32)
def _steps(place: tuple) -> dict[tuple[str, str], list[float]]:
    """What the steps of each product, and of exact blocks, capture over the dampings COMPARED."""
    s = network_of(*place)
    levels = {rule: KFAC(f, 1.0) for rule, f in _factors(place).items()} | {"block-diagonal": BlockDiagonal(s.F, 1.0)}
    found = defaultdict(list)
    for λ in COMPARED:
        A = s.matrix.damped(λ)
        steps = {name: M.with_damping(λ) @ s.g for name, M in levels.items()}
        for name, shares in all_shares(A, s.g, steps, A.solve(s.g)).items():
            found["captured", name].append(shares.captured)
            found["at_best_length", name].append(shares.at_best_length)
    return found


@lru_cache(maxsize=64)
def _elsewhere(network: str, n: int, seed: int, steps: int, device: str, λ: float) -> dict[tuple[str, str], float]:
    """All blocks together: ‖blocks − products‖ / ‖blocks‖, and captured at the best length by many methods."""
    place = (network, n, seed, steps, device)
    s, factors = network_of(*place), _factors(place)
    blocks = [s.F.block(l, l) for l in range(len(s.F.partition))]
    whole = sum(float(B.square().sum()) for B in blocks)
    found = {}
    for rule, f in factors.items():
        missed = sum(float((B - K).square().sum()) for B, K in zip(blocks, f.blocks(), strict=True))
        found["error", rule] = (missed / whole) ** 0.5
    levels = {
        **{rule: KFAC(f, λ) for rule, f in factors.items()},
        "ekfac": EKFAC(s.F, λ), "block-diagonal": BlockDiagonal(s.F, λ), "diagonal": Diagonal(s.F, λ),
    }  # fmt: skip
    steps_of = {"gradient": s.g, **{name: M @ s.g for name, M in levels.items()}}
    for name, v in batches.directions(s.problem.capture("empirical"), s.g, BATCH if n % BATCH == 0 else n).items():
        steps_of[OPTIMIZERS[name]] = v
    A = s.matrix.damped(λ)
    for name, shares in all_shares(A, s.g, steps_of, A.solve(s.g)).items():
        found["at_best_length", name] = shares.at_best_length
    return found


# ---- the picture --------------------------------------------------------------------------------------

BLOCK = METHODS["exact"]._replace(label="the block itself", marker="")
TITLES = {"block": "Block of F", "kfac": "K-FAC", "shampoo": "Shampoo's square", "nearest": "Nearest, Frobenius",
          "kl": "Nearest, KL"}  # fmt: skip


class Plot(show.Plot):
    """The block and four products above; below their eigenvalues, their divergence and what their steps capture."""

    size = (10.0, 6.0)

    def build(self, result: Result) -> None:
        grid = self.figure.add_gridspec(2, 1, height_ratios=(1, 1.25))
        above = grid[0].subgridspec(1, len(TITLES))
        self.views, self.errors = {}, {}
        for i, (name, title) in enumerate(TITLES.items()):
            ax = self.figure.add_subplot(above[i])
            self.views[name] = self.add(MatrixView(ax, result.partition, title, pixels=150))
            ax.set(xticks=[], yticks=[], ylabel="", xlabel=" ")
            self.errors[name] = self.add(ax.text(0.5, -0.05, "", transform=ax.transAxes, ha="center", va="top"))
        below = grid[1].subgridspec(1, 4)
        axes = [self.figure.add_subplot(below[i]) for i in range(4)]
        rules = {rule: METHODS[rule] for rule in FACTORS}
        eigenvalues = result.of("eigenvalue")
        largest, ranks = max(c.high[0] for c in eigenvalues.values()), (1, len(result.matrices["block"]))
        self.spectrum = self.add(CurveView(
            axes[0], {"block": BLOCK, **rules}, eigenvalues, "Eigenvalues", x="rank", xlim=ranks,
            ylim=(1e-6 * largest, 3 * largest),
        ))  # fmt: skip
        self.level = self.add(axes[0].axhline(np.nan, color=INK, linewidth=0.9, alpha=0.6, zorder=0.5))
        self.too_long = self.add(CurveView(
            axes[1], rules, result.of("too_long"), "Too long, by direction", x="rank", xlim=ranks, ylim=(0.3, 10),
            scale=("linear", "log"),
        ))  # fmt: skip
        axes[1].axhline(1, color=INK, linewidth=0.6)
        series = {"block-diagonal": METHODS["block-diagonal"], **rules}
        self.shares = {
            quantity: self.add(CurveView(
                ax, series, result.of(quantity), title, x="damping λ", xlim=(DAMPINGS.low, DAMPINGS.high), ylim=ends,
                scale=("log", "linear"),
            ))
            for ax, quantity, title, ends in (
                (axes[2], "at_best_length", "Captured, best length", (0, 1.02)),
                (axes[3], "captured", "Captured as it is", (-2, 1.05)),
            )
        }  # fmt: skip
        axes[3].axhline(0, color=INK, linewidth=0.6)
        for view in self.shares.values():
            plain_numbers(view.ax.xaxis, (1e-5, 1e-3, 0.1))
        lines = {**self.spectrum.lines, "block-diagonal": self.shares["captured"].lines["block-diagonal"]}
        self.legend(lines.values(), len(lines))

    def move(self, result: Result) -> None:
        limit, λ = limit_of(result.matrices["block"]), result.parameters["damping"]
        for name, view in self.views.items():
            view.update(result.matrices[name], limit)
            self.errors[name].set_text(result.told(name) if name in FACTORS else "error in norm, and in KL:")
        self.spectrum.update(result.of("eigenvalue"))
        self.level.set_ydata([λ, λ])
        self.too_long.update(result.of("too_long"))
        for quantity, view in self.shares.items():
            view.update(result.of(quantity), at=λ)

    def words(self, result: Result) -> str:
        told = ", ".join(f"{TITLES[rule]} {result.told(rule)}" for rule in FACTORS)
        views = (self.spectrum, self.too_long, *self.shares.values())
        return f"Error in norm and KL divergence: {told}. {' '.join(view.words() for view in views)}"

    def regions(self, result: Result) -> list[tuple[float, float, float, float, str]]:
        return [
            region
            for name, view in self.views.items()
            for region in view.regions(lambda i, j, name=name: f"{TITLES[name]}: rows {i + 1} and {j + 1} of the layer")
        ]


# ---- the exercises ------------------------------------------------------------------------------------


def _first_entry(rule: str) -> float:
    """Of the product for a layer of two rows and two columns, whose block is diagonal with 4, 1, 1, 1."""
    eye = torch.eye(2, dtype=torch.float64)
    rows, columns, roots = eye[[0, 0, 1, 1]], eye[[0, 1, 0, 1]], torch.tensor([[4.0], [2.0], [2.0], [2.0]])
    A, G, _ = product(rule, Scores(columns[:, None], (rows * roots)[None, :, None]))
    return float(G[0, 0] * A[0, 0])


@exercise("03a", "Add the block up over columns for L, over rows for R; both have the trace 7.", 0.01)
def _shampoos_square() -> float:
    return _first_entry("shampoo")


@exercise("03b", "Divide the block's entries by the product's: every row and every column adds up to 2.", 0.01)
def _nearest_in_divergence() -> float:
    return _first_entry("kl")
