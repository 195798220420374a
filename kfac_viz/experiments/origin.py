"""Where two levels come from: Poisson's equation on an interval, and ridge regression over clusters of examples."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..method.coarse import nicolaides
from ..method.krylov import pcg
from ..method.operator import Damped, Dense, Operator
from ..method.partition import Partition
from ..method.preconditioner import BlockDiagonal, Identity
from ..method.two_level import TwoLevel
from ..parameters import Device, Range, Seed, check
from .curves import Study, curve, rounded
from .threads import one_thread


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
