"""What does K-FAC throw away? Its error in orthogonal pieces, by pair of layers and over training."""

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
from .curves import Study, by_key, captured, curve, frobenius, rounded
from .setting import DAMPINGS, Data, Setting, Widths, setting
from .threads import one_thread

if TYPE_CHECKING:
    from numpy.typing import NDArray

COMPARED = DAMPINGS.positions[::6]
MOMENTS = (0, 10, 30, 100, 300)  # steps of Adam
PIECES = ("dropped", "basis", "eigenvalues", "sampling", "damping")


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
