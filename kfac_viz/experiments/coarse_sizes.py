"""Every coarse space at every size, added and balanced, over several networks."""

from __future__ import annotations

import warnings
from collections import defaultdict
from functools import lru_cache
from typing import Annotated

from torch import Tensor

from .. import coarse as spaces
from ..method.columns import CoarseSpace
from ..method.kfac import KFAC
from ..method.krylov import pcg
from ..method.operator import Dense, cholesky
from ..method.two_level import TwoLevel
from ..parameters import Device, Range, Seed, check
from .coarse_space import Damping, Rule
from .curves import Study, captured, curve
from .depth import largest_eigenvalue
from .setting import Data, Flavour, Setting, Widths, setting
from .threads import one_thread

CORRECTIONS = ("balanced", "additive")


class CoarseSizesResult(Study):
    """Curves over the number of columns per layer, a series for each ``"space, correction"``.

    Quantities: ``captured`` decrease of one step, ``largest`` eigenvalue of T A, ``iterations`` of conjugate
    gradients with orthogonal residuals, there also ``"none"`` for those without preconditioner. Size 0 is K-FAC.
    """


@one_thread()
def run_coarse_sizes(
    *,
    damping: Damping = 1e-2,
    sizes: Annotated[tuple[int, ...], Range(0, 64)] = (0, 1, 2, 4, 8, 16),
    rule: Rule = "eigen",
    fisher: Flavour = "exact",
    data: Data = "digits4",
    widths: Widths = (12, 12, 12),
    n: Annotated[int, Range(1, 1797)] = 500,
    steps: Annotated[int, Range(0, 1000)] = 0,
    rtol: Annotated[float, Range(1e-10, 1e-1, log=True)] = 1e-6,
    repeats: Annotated[int, Range(1, 20)] = 5,
    seed: Seed = 0,
    device: Device = "cpu",
) -> CoarseSizesResult:
    """What each coarse space brings, from 0 to some columns per layer.

    Args:
        damping: λ.
        sizes: columns per layer.
        rule: how K-FAC is damped.
        fisher: which Fisher.
        data: which problem; see :func:`run_coarse_space`.
        widths: of the hidden layers.
        n: examples.
        steps: full-batch Adam steps before the Fisher is taken.
        rtol: residual, as a share of the gradient, at which the iterations stop.
        repeats: seeds, from ``seed`` upwards; a band shows the lowest and the highest.
        seed: of data, weights and random columns.
        device: where to compute.
    """
    parameters = check(run_coarse_sizes, locals())
    sizes, widths = tuple(sizes), tuple(widths)
    values: dict[tuple[str, str], list[list[float]]] = defaultdict(list)
    for s in range(seed, seed + repeats):
        where = setting(data, widths, n, s, steps, fisher, device)
        for key, row in _rows(where, damping, sizes, rule, rtol, s).items():
            values[key].append(row)
    return CoarseSizesResult(parameters, {key: curve(sizes, rows) for key, rows in values.items()})


@lru_cache(maxsize=64)
def _rows(
    where: Setting, damping: float, sizes: tuple[int, ...], rule: str, rtol: float, seed: int
) -> dict[tuple[str, str], list[float]]:
    """One number per size, for every quantity and series of one network."""
    F, g = where.F, where.g
    A = Dense(where.dense, F.partition).damped(damping)
    system = Dense(A.dense(), F.partition)
    L = cholesky(system.dense(), "The damped Fisher")
    M = KFAC(F, damping, rule)
    rows = defaultdict(list)
    rows["iterations", "none"] = [pcg(system, g, rtol=rtol, reorthogonalize=True).iterations] * len(sizes)
    for name in spaces.SPACES:
        for Z in nested(name, A, M, where, sizes, seed):
            T = TwoLevel(A, M, Z)
            for correction in CORRECTIONS:
                dense = T.with_correction(correction).dense()
                series = f"{name}, {correction}"
                rows["captured", series].append(captured(A, g, dense @ g)[0])
                rows["largest", series].append(largest_eigenvalue(dense, L))
                solution = pcg(system, g, Dense(dense, F.partition), rtol=rtol, reorthogonalize=True)
                rows["iterations", series].append(solution.iterations)
    return rows


def nested(name: str, A, M: KFAC, where: Setting, sizes: tuple[int, ...], seed: int) -> list[CoarseSpace]:
    """The coarse space ``name`` at each size. An expensive one is built once: its columns are nested."""
    F = where.F
    if name == "optimal":
        columns = spaces.optimal(A, M, max(sizes)).dense()
        return [CoarseSpace(F.partition, columns[:, : k * len(F.partition)], name=name) for k in sizes]
    arguments: tuple[Tensor | Setting, ...] = (A, M, where.g) if name == "krylov" else (F,)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dependent Krylov columns are left out
        return [getattr(spaces, name)(*arguments, k, *([seed] if name == "random" else [])) for k in sizes]
