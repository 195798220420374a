"""Iterations against the number of layers: does a coarse space do for networks what it does for subdomains?"""

from __future__ import annotations

import warnings
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Annotated, Literal

import torch
from torch import Tensor

from .. import coarse, problems
from ..method.kfac import KFAC
from ..method.krylov import pcg
from ..method.operator import Dense, cholesky
from ..method.two_level import TwoLevel
from ..parameters import Device, Range, Seed, check
from .curves import Study, curve
from .setting import Setting
from .threads import one_thread


class DepthResult(Study):
    """Curves over the number of layers, a series for each method.

    Quantities: ``iterations`` of conjugate gradients with orthogonal residuals, ``largest`` eigenvalue of M A,
    ``captured`` decrease; and ``above``, the number of eigenvalues of F that exceed λ.
    """


@one_thread()
def run_depth(
    *,
    damping: Annotated[float, Range(1e-5, 1e-1, log=True, steps=61)] = 1e-3,
    per_layer: Annotated[int, Range(1, 7)] = 4,
    layers: Annotated[tuple[int, ...], Range(2, 24)] = (2, 3, 5, 9, 17),
    width: Annotated[int, Range(6, 16)] = 8,
    data: Literal["planted_bn", "planted", "digits4"] = "planted_bn",
    n: Annotated[int, Range(1, 1797)] = 500,
    steps: Annotated[int, Range(0, 1000)] = 100,
    rtol: Annotated[float, Range(1e-10, 1e-1, log=True)] = 1e-6,
    repeats: Annotated[int, Range(1, 20)] = 5,
    seed: Seed = 0,
    device: Device = "cpu",
) -> DepthResult:
    """Conjugate gradients on ``(F + λI) v = g`` for networks of more and more layers.

    Args:
        damping: λ as a share of the largest eigenvalue of F, so that every depth is asked the same.
        per_layer: leading eigenvectors in each layer; the constants are always one per layer.
        layers: how many Linear layers.
        width: of the hidden layers.
        data: the planted toy problem with or without batch norm, or digits of 4×4 pixels. Without batch norm
            the signal fades from layer to layer.
        n: examples.
        steps: full-batch Adam steps before the Fisher is taken.
        rtol: residual, as a share of the gradient, at which the iterations stop.
        repeats: seeds, from ``seed`` upwards; a band shows the lowest and the highest.
        seed: of data and weights.
        device: where to compute.
    """
    parameters = check(run_depth, locals())
    values: dict[tuple[str, str], list[list[float]]] = defaultdict(list)  # one row per seed
    for s in range(seed, seed + repeats):
        rows = defaultdict(list)
        for depth in layers:
            network = _network(data, depth, width, n, steps, s, device)
            for key, value in _measure(network, damping, per_layer, rtol).items():
                rows[key].append(value)
        for key, row in rows.items():
            values[key].append(row)
    return DepthResult(parameters, {key: curve(layers, rows) for key, rows in values.items()})


def methods(A: Dense, M: KFAC, F, per_layer: int) -> dict[str, Dense | TwoLevel | KFAC]:
    """The preconditioners that the study compares, by the name of their series."""
    constants, leading = coarse.nicolaides(F, 1), coarse.spectral(F, per_layer)
    return {
        "kfac": M,
        "constants, additive": TwoLevel(A, M, constants, "additive"),
        "constants, balanced": TwoLevel(A, M, constants, "balanced"),
        "leading, additive": TwoLevel(A, M, leading, "additive"),
        "leading, balanced": TwoLevel(A, M, leading, "balanced"),
    }


@dataclass(frozen=True, eq=False)
class _Network(Setting):
    """A setting with the eigenvalues of its Fisher alone: at 1,200 parameters these are cheap, eigenvectors not."""

    @cached_property
    def eigenvalues(self) -> Tensor:
        return torch.linalg.eigvalsh(self.dense)


@lru_cache(maxsize=64)
def _network(data: str, depth: int, width: int, n: int, steps: int, seed: int, device: str) -> _Network:
    if data == "digits4":
        problem = problems.digits([width] * (depth - 1), n, seed, side=4, device=device)
    else:
        problem = problems.planted(depth, width, n, seed, batch_norm=data == "planted_bn", device=device)
    network = _Network(problem.trained(steps))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the parameters of batch norm stay outside the Fisher
        network.F  # noqa: B018
    return network


def _measure(network: _Network, damping: float, per_layer: int, rtol: float) -> dict[tuple[str, str], float]:
    """One number for every quantity and series. Dense throughout: quickest for some hundred parameters."""
    F, g = network.F, network.g
    lam = damping * float(network.eigenvalues[-1])
    A = Dense(network.dense + lam * torch.eye(len(g), dtype=g.dtype, device=g.device), F.partition)
    two_level = Dense(network.dense, F.partition).damped(lam)
    L = cholesky(A.dense(), "The damped Fisher")
    exact = torch.cholesky_solve(g[:, None], L)[:, 0]
    found = {
        ("above", "eigenvalues"): float((network.eigenvalues > lam).sum()),
        ("iterations", "none"): pcg(A, g, rtol=rtol, reorthogonalize=True).iterations,
    }
    for name, method in methods(two_level, KFAC(F, lam), F, per_layer).items():
        T = Dense(method.dense(), F.partition)
        v = T @ g
        found["iterations", name] = pcg(A, g, T, rtol=rtol, reorthogonalize=True).iterations
        found["largest", name] = largest_eigenvalue(T.dense(), L)
        found["captured", name] = float(2 * (g @ v) - v @ (A @ v)) / float(g @ exact)
    return found


def largest_eigenvalue(T: Tensor, L: Tensor) -> float:
    """λ_max(T A) for ``A = L Lᵀ``, by Lanczos on the similar ``Lᵀ T L``."""
    import numpy as np
    from scipy.sparse.linalg import LinearOperator, eigsh

    T, L = T.cpu().numpy(), L.cpu().numpy()
    similar = LinearOperator(T.shape, matvec=lambda x: L.T @ (T @ (L @ x)), dtype=T.dtype)
    return float(eigsh(similar, 1, which="LA", v0=np.ones(len(T)), ncv=12, tol=1e-4, return_eigenvectors=False)[0])
