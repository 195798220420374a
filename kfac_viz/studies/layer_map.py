"""The playground for networks whose matrices are too large to be drawn: layers by layers, and the rest exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .. import KFAC, Diagonal, Fisher, Partition, TwoLevel
from ..method.columns import LocalSpace
from ..method.fisher import ScoreImage
from ..method.krylov import LARGEST as MOST_SCORES
from ..method.two_level import CORRECTIONS
from ..parameters import number
from ..show import INK, METHODS, SPACES, Plot, StepBars, plain_numbers
from ..show.parts import LayerMap
from .coarse_space import Correction, PerLayer, Space, architecture
from .curves import rounded, share
from .setting import Damping, Rule, Setting, Shares, space

if TYPE_CHECKING:
    import pandas
    from numpy.typing import NDArray

ORDER = ("gradient", "diagonal", "kfac", *CORRECTIONS, "exact")


@dataclass(frozen=True, eq=False)
class LayerMapResult:
    """One position of the sliders.

    Attributes:
        size: of the coarse space.
        norms: ``‖F_lm‖`` ("fisher") and ``‖F_lm − K_lm‖`` ("missed"), with K what K-FAC keeps, (L, L) each.
        eigenvalues: of F that are not zero, descending.
        dimension: effective dimension at this λ.
        claims: how many layers claim one direction.
        shares: what each direction captures.
        how: where the exact step was found, and its residual.
    """

    parameters: dict[str, Any]
    partition: Partition
    problem: str
    size: int
    norms: dict[str, NDArray]
    eigenvalues: NDArray
    dimension: float
    claims: float
    shares: dict[str, Shares]
    how: str

    @property
    def headline(self) -> str:
        p = self.parameters
        two, one = (self.shares[name] for name in (p["correction"], "kfac"))
        kfac = f"{share(one.at_best_length)} ({share(one.captured)})"
        if not self.size:
            return f"Without coarse space: K-FAC captures {kfac} at its best length (as it is)"
        space = f"{p['per_layer']} {SPACES[p['coarse']].label}, {p['correction']}"
        mine = f"{share(two.at_best_length)} at best length (unscaled {share(two.captured)})"
        return f"{space}, capture {mine}; K-FAC {kfac}"

    @property
    def where(self) -> str:
        P, L = self.partition.size, len(self.partition)
        of, λ = f"{self.problem}, {architecture(self.partition)}", number(self.parameters["damping"])
        return (f"{of}, λ = {λ}; data decide {number(self.dimension)} of {P:,} directions, {number(self.claims)} of {L}"
                " layers claim one")

    def table(self) -> pandas.DataFrame:
        """Tidy: ``quantity``, ``item``, ``position``, ``value``."""
        import pandas

        rows: list[tuple] = [("effective dimension", "", "", self.dimension), ("claims", "", "", self.claims)]
        rows += [(kind, item, "", value) for item, s in self.shares.items() for kind, value in s._asdict().items()]
        for item, norms in self.norms.items():
            rows += [("norm of block", item, f"{l + 1},{m + 1}", x) for (l, m), x in np.ndenumerate(norms)]
        rows += [("eigenvalue", "fisher", str(i + 1), x) for i, x in enumerate(self.eigenvalues)]
        return pandas.DataFrame(rows, columns=["quantity", "item", "position", "value"])


@dataclass(frozen=True, eq=False)
class _Network:
    """What moves with no slider."""

    setting: Setting

    @cached_property
    def norms(self) -> dict[str, NDArray]:
        F = self.setting.F
        norms = F.norms()
        missed = norms.clone()
        missed.diagonal().copy_(blocks_missed(F, norms.diagonal()))
        return {"fisher": rounded(norms.cpu()), "missed": rounded(missed.cpu())}

    @cached_property
    def eigenvalues(self) -> NDArray:
        d = self.setting.F.exact.eigenvalues.flip(0).cpu().numpy()
        return rounded(d[d > 1e-12 * d[0]])

    def preconditioner(self, damping: float, rule: str) -> KFAC:
        return KFAC(self.setting.F, damping, rule)


def blocks_missed(F: Fisher, norms: Tensor) -> Tensor:
    """``‖F_ll − G ⊗ A‖`` for each layer, (L,), from ``‖F_ll‖``, ``⟨F_ll, G ⊗ A⟩`` and ``‖G‖ ‖A‖``.

    ``⟨F_ll, G ⊗ A⟩ = (1/N) Σ_{s,n,t,t'} (g_tᵀ G g_t') (a_tᵀ A a_t')``.
    """
    found = []
    for A, G, a, g in zip(F.kronecker().A, F.kronecker().G, F.a, F.g, strict=True):
        inputs, vectors = (a @ A) @ a.mT, (g @ G) @ g.mT
        inner = (inputs * vectors).sum() / F.N
        found.append(inner)
    kept = torch.stack([G.norm() * A.norm() for A, G in zip(F.kronecker().A, F.kronecker().G, strict=True)])
    return (norms.square() - 2 * torch.stack(found) + kept.square()).clamp_min(0).sqrt()


def shares_of(F: Fisher, damping: float, g: Tensor, directions: dict[str, Tensor], exact: Tensor) -> dict[str, Shares]:
    """What directions capture, all of them from one pass over the scores: no product with F for each.

    Args:
        exact: ``(F + λI)⁻¹ g``.
    """
    rows = torch.stack(list(directions.values()))
    sizes = [torch.linalg.vector_norm(rows[:, s], dim=1).clamp_min(1e-300) for s in F.partition.slices]
    blocks = [(rows[:, s] / size[:, None]).mT for s, size in zip(F.partition.slices, sizes, strict=True)]
    Z = LocalSpace(F.partition, blocks, name="pieces")
    L, D = len(blocks), len(rows)
    lengths = torch.stack(sizes, 1).double()  # (D, L)
    U = ScoreImage(F, Z).U.double().view(L, D, -1)
    slopes = Z.restrict(g).double().view(L, D)
    best = float(g.double() @ exact.double())
    found = {}
    for i, name in enumerate(directions):
        E = U[:, i] @ U[:, i].T / F.N
        E.diagonal().add_(damping * (lengths[i] > 1e-200))
        c, b = lengths[i], slopes[:, i]
        slope, curvature = float(c @ b), float(c @ E @ c)
        each = torch.linalg.lstsq(E.cpu(), b[:, None].cpu(), driver="gelsd").solution[:, 0].to(b)
        found[name] = Shares(*rounded([
            (2 * slope - curvature) / best, slope**2 / curvature / best, float(b @ each) / best,
        ]).tolist())  # fmt: skip
    return found


def run_layers_of(setting: Setting) -> Callable[..., LayerMapResult]:
    """The run of a panel on a network of the reader's own."""
    network = _Network(setting)

    def run(
        *,
        damping: Damping = 1e-2,
        per_layer: PerLayer = 4,
        coarse: Space = "spectral",
        correction: Correction = "balanced",
        rule: Rule = "eigen",
    ) -> LayerMapResult:
        p = dict(damping=damping, per_layer=per_layer, coarse=coarse, correction=correction, rule=rule)
        return layer_map(network, p)

    return run


def layer_map(network: _Network, p: dict[str, Any]) -> LayerMapResult:
    """Everything for the parameters p."""
    s, damping = network.setting, p["damping"]
    F, g, A = s.F, s.g, s.F.damped(damping)
    M = network.preconditioner(damping, p["rule"])
    T = TwoLevel(A, M, space(p["coarse"], A, M, g, p["per_layer"], s.seed), p["correction"])
    network.eigenvalues  # noqa: B018  (its decomposition serves every λ)
    exact = A.solve(g)
    directions = {"gradient": g, "diagonal": Diagonal(F, damping) @ g, "kfac": M @ g}
    directions |= {name: T.with_correction(name) @ g for name in CORRECTIONS}
    return LayerMapResult(
        parameters=p | {"fisher": s.fisher},
        partition=F.partition,
        problem=s.problem.name,
        size=T.Z.size,
        norms=network.norms,
        eigenvalues=network.eigenvalues,
        dimension=float(rounded(A.effective_dimension())),
        claims=float(rounded(A.claims())),
        shares=shares_of(F, damping, g, directions | {"exact": exact}, exact),
        how=repr(F.exact),
    )


def few_enough_scores(setting: Setting) -> Setting:
    """The setting as it is; ValueError where neither parameters nor scores are few enough to be decomposed."""
    F = setting.F
    if F.exact.size > MOST_SCORES:
        raise ValueError(
            f"The network has {F.partition.size} parameters and the batch {F.N} examples with {F.S} vectors each; "
            f"exact solutions need at most {MOST_SCORES} of either. Take fewer examples, or fisher='mc'."
        )
    return setting


# ---- the picture --------------------------------------------------------------------------------------


class LayerMapPlot(Plot):
    """Two maps of layers above; eigenvalues of F and captured decreases below."""

    size = (10.0, 6.2)
    layout = None

    def build(self, result: LayerMapResult) -> None:
        titles = {"fisher": "Exact Fisher: norm of each block", "missed": "K-FAC misses: norm of each block"}
        self.maps = {
            name: self.add(LayerMap(self.axes(left, 1.0, 2.6, 2.6), result.partition, title))
            for (name, title), left in zip(titles.items(), (1.2, 6.2), strict=True)
        }
        self._build_spectrum(self.axes(0.8, 4.3, 3.9, 1.4), result)
        self._build_shares(self.axes(6.6, 4.3, 2.2, 1.6))

    def _build_spectrum(self, ax, result: LayerMapResult) -> None:
        d = result.eigenvalues
        ax.plot(np.arange(1, len(d) + 1), d, color=INK)
        ax.set(xscale="log", yscale="log", xlabel="rank", title=f"The {len(d)} eigenvalues of F that are not zero")
        ax.set_ylim(min(d[-1], 1e-3) / 3, 2 * d[0])
        plain_numbers(ax.xaxis)
        self.level = self.add(ax.axhline(1.0, color=METHODS["balanced"].color, linewidth=1))
        self.told = self.add(ax.text(0.03, 0.06, "", transform=ax.transAxes, color=METHODS["balanced"].color))

    def _build_shares(self, ax) -> None:
        ax.set_title("Captured: bars best length, ○ one per layer, | as it is", x=-0.7)
        self.steps = self.add(StepBars(ax, ORDER, share))

    def move(self, result: LayerMapResult) -> None:
        limit = float(result.norms["fisher"].max())
        for name, view in self.maps.items():
            view.update(result.norms[name], limit)
        self.level.set_ydata([result.parameters["damping"]] * 2)
        self.told.set_text(f"λ: effective dimension {number(result.dimension)}")
        by_kind = [{name: found[i] for name, found in result.shares.items()} for i in range(3)]
        self.steps.update(by_kind[1], by_kind[2], by_kind[0])

    def words(self, result: LayerMapResult) -> str:
        told = "; ".join(f"{METHODS[name].label} {share(result.shares[name].at_best_length)} "
                         f"({share(result.shares[name].captured)})" for name in ORDER)  # fmt: skip
        return f"{super().words(result)} Captured at the best length, and unscaled: {told}. Found in {result.how}."
