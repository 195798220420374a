"""What K-FAC misses of the inverse of ``F + λI``, and what a coarse space of a few numbers per layer gives back."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor

from .. import coarse as spaces
from ..method.kfac import KFAC
from ..method.partition import Partition
from ..method.preconditioner import Diagonal
from ..method.two_level import CORRECTIONS, TwoLevel
from ..parameters import Device, Range, Seed, check
from .curves import rounded
from .setting import Data, Flavour, Setting, Widths, setting, small_enough
from .threads import one_thread

if TYPE_CHECKING:
    import pandas

Damping = Annotated[float, Range(1e-6, 10, log=True, steps=71)]
PerLayer = Annotated[int, Range(0, 16)]
Space = Literal["nicolaides", "spectral", "smooth", "krylov", "random", "optimal"]
Correction = Literal["additive", "a-def1", "a-def2", "balanced"]
Rule = Literal["eigen", "factored"]
Steps = Literal[0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]


@dataclass(frozen=True, eq=False)
class CoarseSpaceResult:
    """What the figure shows, for one λ and one coarse space; matrices are (P, P) in parameter order.

    Attributes:
        fisher: the exact Fisher F; ``blocks``: what K-FAC keeps of it, ``G ⊗ A`` in each layer.
        missed: ``A⁻¹ − M``, with ``A = F + λI`` and M = K-FAC; ``added``: ``T − M``, with T the two-level method.
        spectra: ascending eigenvalues (P,) of M A ("kfac") and T A (the correction's name).
        captured: captured decrease of each direction; ``at_best_length``: the same after the best rescaling.
        errors: ‖F − blocks‖ / ‖F‖ ("blocks"), ‖A⁻¹ − M‖ / ‖A⁻¹‖ ("kfac") and ‖A⁻¹ − T‖ / ‖A⁻¹ − M‖ (the
            correction's name), in the Frobenius norm.
        norms: of every block of ``fisher``, ``blocks``, ``missed`` and ``added``, layer by layer.
    """

    parameters: dict[str, Any]
    partition: Partition
    problem: str
    size: int  # of the coarse space
    fisher: Tensor
    blocks: Tensor
    missed: Tensor
    added: Tensor
    spectra: dict[str, Tensor]
    captured: dict[str, float]
    at_best_length: dict[str, float]
    errors: dict[str, float]
    norms: dict[str, list[list[float]]]

    def table(self) -> pandas.DataFrame:
        """Tidy: ``quantity``, ``item`` (a method or matrix), ``position`` (rank or pair of layers), ``value``."""
        import pandas

        rows: list[tuple] = []
        for quantity in ("captured", "at_best_length", "errors"):
            rows += [(quantity, item, "", value) for item, value in getattr(self, quantity).items()]
        for item, norms in self.norms.items():
            for l, row in enumerate(norms):
                rows += [("norm of block", item, f"{l + 1},{m + 1}", value) for m, value in enumerate(row)]
        for item, values in self.spectra.items():
            rows += [("eigenvalue", item, str(i + 1), value) for i, value in enumerate(values.tolist())]
        return pandas.DataFrame(rows, columns=["quantity", "item", "position", "value"])


def run_coarse_space(
    *,
    damping: Damping = 1e-2,
    per_layer: PerLayer = 4,
    coarse: Space = "spectral",
    correction: Correction = "balanced",
    rule: Rule = "eigen",
    fisher: Flavour = "exact",
    data: Data = "digits4",
    widths: Widths = (12, 12, 12),
    n: Annotated[int, Range(1, 1797)] = 500,
    steps: Steps = 0,
    seed: Seed = 0,
    device: Device = "cpu",
) -> CoarseSpaceResult:
    """The exact Fisher, K-FAC, and a coarse correction on a small network.

    Args:
        damping: λ of A = F + λI, and of K-FAC and the coarse operator.
        per_layer: columns of the coarse space in each layer.
        coarse: which columns.
        correction: how the two levels are combined.
        rule: how K-FAC is damped.
        fisher: which Fisher; mc and empirical are drawn as they are, and A is built from them.
        data: digits (4×4 or 8×8 pixels) as classifier or autoencoder, or the planted toy problem.
        widths: of the hidden layers.
        n: examples.
        steps: full-batch Adam steps before the picture is taken.
        seed: of data, weights and random columns.
        device: where to compute.
    """
    parameters = check(run_coarse_space, locals())
    where = setting(data, tuple(widths), n, seed, steps, fisher, device)
    return coarse_space(where, parameters, damping=damping, per_layer=per_layer, coarse=coarse,
                        correction=correction, rule=rule, seed=seed)  # fmt: skip


def limits(values: dict[str, Any]) -> dict[str, int]:
    """The largest coarse space per layer of the network with these values; sliders end there."""
    partition = setting(values["data"], tuple(values["widths"]), values["n"], values["seed"], 0).problem.partition
    return {"per_layer": min(layer.size for layer in partition.layers)}


run_coarse_space.limits = limits


def run_on(where: Setting) -> Callable[..., CoarseSpaceResult]:
    """The same experiment on a setting of the reader's own: what does not depend on the network stays to choose."""
    room = min(layer.size for layer in where.problem.partition.layers)
    start = min(4, room)

    def run(
        *,
        damping: Damping = 1e-2,
        per_layer: PerLayer = start,
        coarse: Space = "spectral",
        correction: Correction = "balanced",
        rule: Rule = "eigen",
    ) -> CoarseSpaceResult:
        choices = dict(damping=damping, per_layer=per_layer, coarse=coarse, correction=correction, rule=rule)
        return coarse_space(where, choices | {"fisher": where.fisher}, **choices)

    run.limits = lambda values: {"per_layer": room}
    run.__doc__ = run_coarse_space.__doc__
    return run


def coarse_space(
    where: Setting,
    parameters: dict[str, Any],
    *,
    damping: float,
    per_layer: int,
    coarse: str,
    correction: str,
    rule: str,
    seed: int = 0,
) -> CoarseSpaceResult:
    """:func:`run_coarse_space` in a setting of the reader's own; ``parameters`` are kept in the result."""
    small_enough(where.problem)
    depends = damping if coarse in ("krylov", "optimal") else None
    with one_thread(), ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as other_core:
        levels = _levels(where, per_layer, coarse, rule, seed, depends)
        T = levels.two_level.with_damping(damping).with_correction(correction)
        spectrum = other_core.submit(levels.spectrum, where, T)  # half of the work
        one = _one_level(where, rule, damping)
        added = _without_noise(T.contribution(), one.scale)
        captured, at_best_length = _captured(where, T)
        left = _share(_norm(one.missed - added), _norm(one.missed))
        norms = _fisher_norms(where) | {"missed": one.norms, "added": _norms(T.partition, added)}
    return CoarseSpaceResult(
        parameters=parameters,
        partition=where.F.partition,
        problem=where.problem.name,
        size=T.Z.size,
        fisher=where.dense.cpu(),
        blocks=where.blocks.cpu(),
        missed=one.missed.cpu(),
        added=added.cpu(),
        spectra={"kfac": one.spectrum, correction: spectrum.result()},
        captured=captured,
        at_best_length=at_best_length,
        errors={"blocks": _blocks_error(where), "kfac": one.error, correction: left},
        norms=norms,
    )


@dataclass(frozen=True, eq=False)
class _OneLevel:
    """What moves with λ alone: ``A⁻¹ − M`` and its norms, the spectrum of M A, ‖A⁻¹ − M‖ / ‖A⁻¹‖, and ‖A⁻¹‖."""

    missed: Tensor
    norms: list[list[float]]
    spectrum: Tensor
    error: float
    scale: float


@lru_cache(maxsize=4)
def _one_level(where: Setting, rule: str, damping: float) -> _OneLevel:
    M = KFAC(where.F, damping, rule)
    weights = 1 / (where.F.eigen.d + damping)
    half = (where.F.eigen.U * weights.sqrt()).cpu().numpy()
    inverse = torch.from_numpy(half @ half.T)  # NumPy knows that a matrix times its transpose is half the work
    scale = _norm(weights)
    missed = _without_noise(inverse.to(weights.device) - M.dense(), scale)
    spectrum = _eigenvalues(_whitened(where, M)[0])
    return _OneLevel(missed, _norms(M.partition, missed), spectrum, _share(_norm(missed), scale), scale)


@dataclass(frozen=True, eq=False)
class _Levels:
    """What a coarse space alone decides: the method, its columns C in K-FAC's eigenbasis, and F C there."""

    two_level: TwoLevel
    columns: Tensor
    image: Tensor

    def spectrum(self, where: Setting, T: TwoLevel) -> Tensor:
        """Ascending eigenvalues of T A, (P,): those of M A after an update of rank k in the whitened basis.

        ``balanced`` and both a-def have an eigenvalue 1 for each column, and otherwise those of
        ``M^½ (A − A Q A) M^½``; ``additive`` is similar to ``R S R`` with ``R² = I + M^-½ Q M^-½``.
        """
        S, half = _whitened(where, T.M)
        root = T.Q.E.weights.sqrt()
        if T.correction != "additive":
            B = half[:, None] * (self.image + T.damping * self.columns) * root
            values = _eigenvalues(S - B @ B.T)
            return torch.cat([values[B.shape[1] :], values.new_ones(B.shape[1])]).sort().values
        V, s, _ = torch.linalg.svd(self.columns / half[:, None] * root, full_matrices=False)
        D = (1 + s.square()).sqrt() - 1  # R = I + V D Vᵀ
        W = S @ V * D + V * D @ (V.T @ S @ V) * (D / 2)
        return _eigenvalues(S + torch.cat([V, W], 1) @ torch.cat([W, V], 1).T)


@lru_cache(maxsize=24)
def _levels(where: Setting, per_layer: int, coarse: str, rule: str, seed: int, damping: float | None) -> _Levels:
    """``damping`` is None where the columns are the same for every λ; all else of Z and Q is, anyway."""
    A, M = where.matrix.damped(damping or 1.0), KFAC(where.F, damping or 1.0, rule)
    if coarse in ("krylov", "optimal"):
        arguments = (A, M, where.g) if coarse == "krylov" else (A, M)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # dependent columns go; the result says how many are left
            Z = getattr(spaces, coarse)(*arguments, per_layer)
    else:
        Z = getattr(spaces, coarse)(where.F, per_layer, *([seed] if coarse == "random" else []))
    T = TwoLevel(A, M, Z)
    image = T.image_columns
    return _Levels(T, where.basis.T @ T.Q.columns, where.basis.T @ image)


def _captured(where: Setting, T: TwoLevel) -> tuple[dict[str, float], dict[str, float]]:
    """Captured decrease of every direction, as it is and after the best rescaling."""
    directions = {"gradient": where.g, "diagonal": Diagonal(where.F, T.damping) @ where.g, "kfac": T.M @ where.g}
    directions |= {name: T.with_correction(name) @ where.g for name in CORRECTIONS}
    directions["exact"] = where.F.damped(T.damping).solve(where.g)
    V = torch.stack(list(directions.values()), dim=1)
    slope, curvature = where.g @ V, (V * (where.dense @ V + T.damping * V)).sum(0)
    best = float(slope[-1])  # gᵀA⁻¹g, twice the decrease of the exact step
    if not best > 0:
        raise ValueError("The gradient is zero here: there is no decrease to capture. Take fewer training steps.")
    captured, rescaled = (2 * slope - curvature) / best, slope.square() / curvature / best
    return tuple(dict(zip(directions, rounded(x.cpu()).tolist(), strict=True)) for x in (captured, rescaled))


@lru_cache(maxsize=8)
def _blocks_error(where: Setting) -> float:
    return _share(_norm(where.dense - where.blocks), _norm(where.dense))


@lru_cache(maxsize=8)
def _fisher_norms(where: Setting) -> dict[str, list[list[float]]]:
    return {"fisher": _norms(where.F.partition, where.dense), "blocks": _norms(where.F.partition, where.blocks)}


def _norms(partition: Partition, matrix: Tensor) -> list[list[float]]:
    slices = partition.slices
    return rounded([[_norm(matrix[rows, columns]) for columns in slices] for rows in slices]).tolist()


def _whitened(where: Setting, M: KFAC) -> tuple[Tensor, Tensor]:
    """``S = M^½ A M^½`` in K-FAC's eigenbasis, (P, P), and the diagonal of ``M^½`` there, (P,)."""
    half = torch.cat([weights.flatten() for weights in M.eigenvalues()]).sqrt()
    S = where.rotated * half * half[:, None]
    S.diagonal().add_(M.damping * half.square())
    return S, half


def _eigenvalues(S: Tensor) -> Tensor:
    """Of a symmetric matrix, ascending, to 4 digits; NumPy's LAPACK is the quicker one on few cores."""
    values = np.linalg.eigvalsh(S.cpu().numpy())
    return torch.from_numpy(rounded(values.clip(1e-12 * values[-1])))


def _without_noise(x: Tensor, scale: float) -> Tensor:
    """Zero where nothing but round-off is left, as where K-FAC is exact."""
    return x if _norm(x) > 1e-12 * scale else torch.zeros_like(x)


def _share(x: float, of: float) -> float:
    if of == 0:
        return float("inf") if x > 0 else 0.0
    return float(rounded(x / of)) if x > 1e-12 * of else 0.0


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x))
