"""The playground for networks whose matrices are too large to be drawn: layers by layers, and the rest exact."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .. import KFAC, Fisher, TwoLevel, show
from ..method.fisher import rotated
from ..method.krylov import MOST_SCORES
from ..method.one_hot import inner
from ..parameters import number
from ..show import INK, METHODS, StepBars, plain_numbers
from ..show.parts import LayerMap
from ..studies.coarse_space import ORDER, Captured, architecture, shares_of
from ..studies.common.result import rounded, share
from ..studies.common.setting import Setting, space

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Result(Captured):
    """One position of the sliders.

    Attributes:
        norms: ``‖F_lm‖`` ("fisher") and ``‖F_lm − K_lm‖`` ("missed"), with K what K-FAC keeps, (L, L) each.
        eigenvalues: of F that are not zero, descending.
        dimension: effective dimension at this λ.
        layer_overlap: how many layers take the same step.
        how: where the exact step was found, and its residual.
    """

    norms: dict[str, NDArray]
    eigenvalues: NDArray
    dimension: float
    layer_overlap: float
    how: str

    @property
    def where(self) -> str:
        P, L = self.partition.size, len(self.partition)
        of, λ = f"{self.problem}, {architecture(self.partition)}", number(self.parameters["damping"])
        return (
            f"{of}, λ = {λ}; data decide {number(self.dimension)} of {P:,} directions, "
            f"{number(self.layer_overlap)} of {L} layers take the same step"
        )

    def table(self) -> pandas.DataFrame:
        """Tidy: ``quantity``, ``item``, ``position``, ``value``."""
        import pandas

        alone = {"effective dimension": self.dimension, "layer overlap": self.layer_overlap}
        rows: list[tuple] = [(name, "", "", value) for name, value in alone.items()]
        rows += [(kind, item, "", value) for item, s in self.shares.items() for kind, value in s._asdict().items()]
        for item, norms in self.norms.items():
            rows += [("norm of block", item, f"{l + 1},{m + 1}", x) for (l, m), x in np.ndenumerate(norms)]
        rows += [("eigenvalue", "fisher", str(i + 1), x) for i, x in enumerate(self.eigenvalues)]
        return pandas.DataFrame(rows, columns=["quantity", "item", "position", "value"])


@lru_cache(maxsize=4)
def _norms(network: Setting) -> dict[str, NDArray]:
    norms = network.F.norms()
    missed = norms.clone()
    missed.diagonal().copy_(blocks_missed(network.F, norms.diagonal()))
    return {"fisher": rounded(norms.cpu()), "missed": rounded(missed.cpu())}


@lru_cache(maxsize=4)
def _eigenvalues(network: Setting) -> NDArray:
    d = network.F.solver.eigenvalues.flip(0).cpu().numpy()
    return rounded(d[d > 1e-12 * d[0]])


def blocks_missed(F: Fisher, norms: Tensor) -> Tensor:
    """``‖F_ll − G ⊗ A‖`` for each layer, (L,), from ``‖F_ll‖``, ``⟨F_ll, G ⊗ A⟩`` and ``‖G‖ ‖A‖``.

    ``⟨F_ll, G ⊗ A⟩ = (1/N) Σ_{s,n,t,t'} (g_tᵀ G g_t') (a_tᵀ A a_t')``.
    """
    factors, found = F.kronecker(), []
    for norm, A, G, a, g in zip(norms, factors.A, factors.G, F.a, F.g, strict=True):
        left = rotated(a, A) if A.ndim == G.ndim else a.scaled(A)  # one-hot inputs have a diagonal A
        inputs, vectors = inner(left, a), rotated(g, G) @ g.mT
        shared = ((inputs if inputs.ndim == vectors.ndim else inputs.unsqueeze(-4)) * vectors).sum() / F.N
        sizes = (X.flatten(G.ndim - 2).norm(dim=-1) for X in (G, A))  # of every group
        found.append(norm.square() - 2 * shared + prod(sizes).square().sum())
    return torch.stack(found).clamp_min(0).sqrt()


def compute(network: Setting, p: dict[str, Any]) -> Result:
    """Everything for the parameters p; what no slider moves is computed once."""
    F, g, damping = network.F, network.g, p["damping"]
    A, M = F.damped(damping), KFAC(F, damping, p["rule"])
    T = TwoLevel(A, M, space(p["coarse"], A, M, g, p["per_layer"], network.seed), p["correction"])
    eigenvalues = _eigenvalues(network)  # first: the decomposition serves A.solve at every λ
    return Result(
        parameters=p,
        partition=F.partition,
        problem=network.problem.name,
        shares=shares_of(network, T, A),
        T=T,
        gradient=g,
        norms=_norms(network),
        eigenvalues=eigenvalues,
        dimension=float(rounded(A.effective_dimension())),
        layer_overlap=float(rounded(A.layer_overlap())),
        how=repr(F.solver),
    )


def few_enough_scores(setting: Setting) -> Setting:
    """The setting as it is; ValueError where neither parameters nor scores are few enough to be decomposed."""
    F = setting.F
    if F.solver.size > MOST_SCORES:
        raise ValueError(
            f"The network has {F.partition.size} parameters and the batch {F.N} examples with {F.S} vectors each; "
            f"exact solutions need at most {MOST_SCORES} of either. Take fewer examples, or fisher='mc'."
        )
    return setting


# ---- the picture --------------------------------------------------------------------------------------


class Plot(show.Plot):
    """Two maps of layers above; eigenvalues of F and captured decreases below."""

    size = (10.0, 6.2)
    layout = None

    def build(self, result: Result) -> None:
        titles = {"fisher": "Exact Fisher: norm of each block", "missed": "K-FAC misses: norm of each block"}
        self.maps = {
            name: self.add(LayerMap(self.axes(left, 1.0, 2.6, 2.6), result.partition, title))
            for (name, title), left in zip(titles.items(), (1.2, 6.2), strict=True)
        }
        self._build_spectrum(self.axes(0.8, 4.3, 3.9, 1.4), result)
        self._build_shares(self.axes(6.6, 4.3, 2.2, 1.6))

    def _build_spectrum(self, ax: Axes, result: Result) -> None:
        d = result.eigenvalues
        ax.plot(np.arange(1, len(d) + 1), d, color=INK)
        ax.set(xscale="log", yscale="log", xlabel="rank", title=f"The {len(d)} eigenvalues of F that are not zero")
        ax.set_ylim(min(d[-1], 1e-3) / 3, 2 * d[0])
        plain_numbers(ax.xaxis)
        self.level = self.add(ax.axhline(1.0, color=METHODS["balanced"].color, linewidth=1))
        self.told = self.add(ax.text(0.03, 0.06, "", transform=ax.transAxes, color=METHODS["balanced"].ink))

    def _build_shares(self, ax: Axes) -> None:
        ax.set_title("Captured: bars best length, ○ one per layer, | as it is", x=-0.7)
        self.steps = self.add(StepBars(ax, ORDER, share))

    def move(self, result: Result) -> None:
        limit = float(result.norms["fisher"].max())
        for name, view in self.maps.items():
            view.update(result.norms[name], limit)
        self.level.set_ydata([result.parameters["damping"]] * 2)
        self.told.set_text(f"λ: effective dimension {number(result.dimension)}")
        self.steps.update(result.at_best_length, result.at_layer_lengths, result.captured)

    def words(self, result: Result) -> str:
        told = "; ".join(f"{METHODS[name].label} {share(result.at_best_length[name])} ({share(result.captured[name])})"
                         for name in ORDER)  # fmt: skip
        return f"{super().words(result)} Captured at the best length, and unscaled: {told}. Found in {result.how}."
