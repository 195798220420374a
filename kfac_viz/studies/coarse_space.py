"""What K-FAC misses of the inverse of ``F + λI``, and what a few numbers per layer give back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from .. import KFAC, Damped, Diagonal, Fisher, Partition, TwoLevel, captured_decrease, coarse, show
from ..method.decompositions import eigvalsh
from ..method.two_level import CORRECTIONS
from ..parameters import Device, Examples, Range, Seed, Widths, check, number
from ..show import (
    FAINT,
    INK,
    METHODS,
    MUTED,
    SPACES,
    ColourBar,
    MatrixView,
    StepBars,
    Tolerance,
    limit_of,
    plain_numbers,
)
from .common.exercises import exercise
from .common.result import PRECISION, SHARE, SHARES, rounded, share, stage
from .common.setting import (
    KFAC_BY_RULE,
    Damping,
    Data,
    Flavour,
    Rule,
    Setting,
    Shares,
    all_shares,
    chosen,
    first_network,
    setting,
    space,
)

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

PerLayer = Annotated[int, Range(0, 16), "columns of the coarse space in each layer; a smaller layer gives what it has."]
Space = Annotated[Literal["nicolaides", "spectral", "smooth", "krylov", "random", "optimal"], "which columns."]
Correction = Annotated[Literal["additive", "a-def1", "a-def2", "balanced"], "how the two levels are combined."]
R = TypeVar("R")
Moments = Annotated[Literal[0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000], "Adam steps before the picture is taken."]


@dataclass(frozen=True, eq=False)
class Captured:
    """What steps capture for one λ and one coarse space: what the playground shows of a network of any size.

    Attributes:
        problem: its name.
        shares: of every direction, with K-FAC by its rule of damping, "kfac" (eigen) and "factored", and two levels
            under the correction's name.
        T, gradient: the two-level preconditioner of the picture, and the gradient (P,) that it is applied to.
    """

    values: ClassVar[tuple[str, ...]] = ("value",)
    tolerances: ClassVar[Mapping[str, Tolerance]] = SHARES | {
        "errors": SHARE,
        "norm of block": Tolerance(relative=2e-3, absolute=1e-6),
        "eigenvalue": Tolerance(relative=2e-3),
    }

    parameters: dict[str, Any]
    partition: Partition
    problem: str
    shares: dict[str, Shares]
    T: TwoLevel
    gradient: Tensor

    @property
    def size(self) -> int:
        """Of the coarse space."""
        return self.T.Z.size

    @property
    def captured(self) -> dict[str, float]:
        """Captured decrease of each direction as it is."""
        return {name: found.captured for name, found in self.shares.items()}

    @property
    def at_best_length(self) -> dict[str, float]:
        """The same with one best length for all of it."""
        return {name: found.at_best_length for name, found in self.shares.items()}

    @property
    def at_layer_lengths(self) -> dict[str, float]:
        """The same with the best length for each layer's piece."""
        return {name: found.at_layer_lengths for name, found in self.shares.items()}

    @property
    def headline(self) -> str:
        p, kinds = self.parameters, (self.at_best_length, self.captured)
        one, factored, two = ([share(found[name]) for found in kinds] for name in ("kfac", "factored", p["correction"]))
        if not self.size:
            return f"No columns: K-FAC captures {one[0]} (unscaled {one[1]}), factored {factored[0]} ({factored[1]})"
        return (f"{p['per_layer']} {SPACES[p['coarse']].label} capture {two[0]} (unscaled {two[1]}); K-FAC {one[0]} "
                f"({one[1]}), factored {factored[0]} ({factored[1]})")  # fmt: skip

    @property
    def first(self) -> str:
        """The first level of T: K-FAC's name under the rule of damping that was chosen."""
        return KFAC_BY_RULE[self.parameters["rule"]]


@dataclass(frozen=True, eq=False)
class Result(Captured):
    """What the figure shows; matrices are (P, P) in parameter order. Spectra and norms are computed when they are read.

    Attributes:
        fisher: the exact Fisher F; ``blocks``: what K-FAC keeps of it, ``G ⊗ A`` in each layer.
        missed: ``A⁻¹ − M``, with ``A = F + λI`` and M = K-FAC; ``added``: ``T − M``, with T the two-level method; and
            ``left``, ``A⁻¹ − T``, what is missing still.
        errors: ‖F − blocks‖ / ‖F‖ ("blocks"), ‖A⁻¹ − M‖ / ‖A⁻¹‖ (``first``) and ‖A⁻¹ − T‖ / ‖A⁻¹ − M‖ (the
            correction's name), in the Frobenius norm.
        network: the problem with its Fisher.
        levels: what the coarse space alone decides.
    """

    fisher: Tensor
    blocks: Tensor
    missed: Tensor
    added: Tensor
    left: Tensor
    errors: dict[str, float]
    network: Setting
    levels: _TwoLevels

    @cached_property
    def spectra(self) -> dict[str, Tensor]:
        """Ascending eigenvalues (P,) of M A (``first``) and T A (the correction's name)."""
        one = _spectrum(self.network, self.parameters["rule"], self.parameters["damping"])
        return {self.first: one, self.T.correction: self.levels.spectrum(self.network, self.T)}

    @cached_property
    def norms(self) -> dict[str, list[list[float]]]:
        """The Frobenius norms of the blocks of the five matrices, layer by layer."""
        return {name: rounded(self.partition.norms(getattr(self, name))).tolist() for name in MATRICES}

    @property
    def where(self) -> str:
        p = self.parameters
        of = f"{self.problem}, {architecture(self.partition)}"
        if "steps" in p:  # a network of the reader's own has none
            of += f", {stage(p['steps'])}"
        levels = p["correction"] + " on factored K-FAC" * (p["rule"] == "factored")
        of += f", λ = {number(p['damping'])}, coarse dimension {self.size}, {levels}"
        return f"{of}; at the best length (unscaled)"

    def table(self) -> pandas.DataFrame:
        """Tidy: ``quantity``, ``item`` (a method or matrix), ``position`` (rank or pair of layers), ``value``."""
        import pandas

        rows: list[tuple] = []
        for quantity in (*Shares._fields, "errors"):
            rows += [(quantity, item, "", value) for item, value in getattr(self, quantity).items()]
        for item, norms in self.norms.items():
            for l, row in enumerate(norms):
                rows += [("norm of block", item, f"{l + 1},{m + 1}", value) for m, value in enumerate(row)]
        for item, values in self.spectra.items():
            rows += [("eigenvalue", item, str(i + 1), value) for i, value in enumerate(values.tolist())]
        return pandas.DataFrame(rows, columns=["quantity", "item", "position", "value"])


def run(
    *,
    damping: Damping = 1e-2,
    per_layer: PerLayer = 4,
    coarse: Space = "spectral",
    correction: Correction = "balanced",
    rule: Rule = "eigen",
    fisher: Flavour = "exact",
    data: Data = "digits4",
    widths: Widths = (12, 12, 12),
    n: Examples = 500,
    steps: Moments = 0,
    seed: Seed = 0,
    device: Device = "cpu",
) -> Result:
    """The exact Fisher, K-FAC, and a coarse correction on a small network.

    Args:
        seed: of data, weights and random columns.
    """
    p = check(run, locals())
    return compute(setting(*chosen(p)), p)


def run_on(networks: Sequence[Setting], compute: Callable[[Setting, dict[str, Any]], R]) -> Callable[..., R]:
    """An experiment on a network of the reader's own, at one or more stages: the rest stays to choose."""

    def run(
        *,
        damping: Damping = 1e-2,
        per_layer: PerLayer = 4,
        coarse: Space = "spectral",
        correction: Correction = "balanced",
        rule: Rule = "eigen",
        checkpoint: int = 0,
    ) -> R:
        choices = dict(damping=damping, per_layer=per_layer, coarse=coarse, correction=correction, rule=rule)
        stage = {"checkpoint": checkpoint} if len(networks) > 1 else {}
        return compute(networks[checkpoint], choices | stage | {"fisher": networks[checkpoint].fisher})

    if len(networks) > 1:
        run.__annotations__["checkpoint"] = Annotated[int, Range(0, len(networks) - 1), "which of the stages given."]
    else:  # nothing to choose
        signature = inspect.signature(run)
        kept = [parameter for name, parameter in signature.parameters.items() if name != "checkpoint"]
        run.__signature__ = signature.replace(parameters=kept)
    return run


def compute(network: Setting, p: dict[str, Any]) -> Result:
    """:func:`run` with the parameters p in a setting of the reader's own."""
    damping, correction = p["damping"], p["correction"]
    depends = damping if p["coarse"] in ("krylov", "optimal") else None
    levels = _two_levels(network, p["per_layer"], p["coarse"], p["rule"], depends)
    T = levels.two_level.with_damping(damping).with_correction(correction)
    one = _one_level(network, p["rule"], damping)
    added = _without_noise(T.contribution(), one.scale)
    left = _without_noise(one.missed - added, one.scale)
    return Result(
        parameters=p,
        partition=network.F.partition,
        problem=network.problem.name,
        shares=shares_of(network, T, network.matrix.damped(damping)),
        T=T,
        gradient=network.g,
        fisher=network.dense.cpu(),
        blocks=network.blocks.cpu(),
        missed=one.missed.cpu(),
        added=added.cpu(),
        left=left.cpu(),
        errors={
            "blocks": _of_network(network)[2],
            KFAC_BY_RULE[p["rule"]]: one.error,
            correction: _share(left.norm(), one.missed.norm()),
        },
        network=network,
        levels=levels,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _OneLevel:
    """What moves with λ alone: ``A⁻¹ − M``, ‖A⁻¹ − M‖ / ‖A⁻¹‖, and ‖A⁻¹‖."""

    missed: Tensor
    error: float
    scale: float


@lru_cache(maxsize=4)
def _one_level(network: Setting, rule: str, damping: float) -> _OneLevel:
    M = KFAC(network.F, damping, rule)
    weights = 1 / (network.F.eigen.d + damping)
    half = (network.F.eigen.U * weights.sqrt()).cpu().numpy()
    inverse = torch.from_numpy(half @ half.T)  # NumPy does X Xᵀ in half the time
    scale = float(weights.norm())
    missed = _without_noise(inverse.to(weights.device) - M.dense(), scale)
    return _OneLevel(missed, _share(missed.norm(), scale), scale)


@lru_cache(maxsize=4)
def _spectrum(network: Setting, rule: str, damping: float) -> Tensor:
    """Ascending eigenvalues of M A, (P,), which the coarse space does not change."""
    return _eigenvalues(_whitened(network, KFAC(network.F, damping, rule))[0])


@dataclass(frozen=True, eq=False)
class _TwoLevels:
    """What a coarse space alone decides: the method, its columns C in K-FAC's eigenbasis, and F C there."""

    two_level: TwoLevel
    columns: Tensor
    image: Tensor

    def spectrum(self, network: Setting, T: TwoLevel) -> Tensor:
        """Ascending eigenvalues of T A, (P,): those of M A after an update of rank k in the whitened basis.

        ``balanced`` and both a-def have an eigenvalue 1 for each column, and otherwise those of
        ``M^½ (A − A Q A) M^½``; ``additive`` is similar to ``R S R`` with ``R² = I + M^-½ Q M^-½``.
        """
        S, half = _whitened(network, T.M)
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
def _two_levels(network: Setting, per_layer: int, coarse: str, rule: str, damping: float | None) -> _TwoLevels:
    """``damping`` is None where the columns do not depend on it: what is kept then serves every λ."""
    A, M = network.matrix.damped(damping or 1.0), KFAC(network.F, damping or 1.0, rule)
    T = TwoLevel(A, M, space(coarse, A, M, network.g, per_layer, network.seed))
    basis = _of_network(network)[0]
    return _TwoLevels(T, basis.T @ T.Q.columns, basis.T @ T.image_columns)


def shares_of(network: Setting, T: TwoLevel, A: Damped) -> dict[str, Shares]:
    """What every direction captures of the best decrease; A is the damped Fisher, in the form that is quicker."""
    F, g = network.F, network.g
    exact = F.damped(T.damping).solve(g)
    worth = all_shares(A, g, directions(F, T, g) | {"exact": exact}, exact)
    return {name: x.rounded() for name, x in worth.items()}


def directions(F: Fisher, T: TwoLevel, g: Tensor) -> dict[str, Tensor]:
    """The directions that are compared, but for the exact one.

    The gradient is divided by λ: as λ grows all others tend to ``g / λ``, but for the additive correction, whose step
    becomes twice as long along the columns of Z.
    """
    found = {"gradient": g / T.damping, "diagonal": Diagonal(F, T.damping) @ g}
    found |= {name: KFAC(F, T.damping, rule) @ g for rule, name in KFAC_BY_RULE.items()}
    return found | {name: T.with_correction(name) @ g for name in CORRECTIONS}


@lru_cache(maxsize=8)
def _of_network(network: Setting) -> tuple[Tensor, Tensor, float]:
    """What neither λ nor the coarse space changes: K-FAC's eigenvectors ``U_G ⊗ U_A``, (P, P), in which K-FAC is
    diagonal for every λ; the Fisher in that basis; and ‖F − blocks‖ / ‖F‖."""
    basis = torch.block_diag(*network.F.kronecker().basis())
    error = _share((network.dense - network.blocks).norm(), network.dense.norm())
    return basis, basis.T @ network.dense @ basis, error


def _whitened(network: Setting, M: KFAC) -> tuple[Tensor, Tensor]:
    """``S = M^½ A M^½`` in K-FAC's eigenbasis, (P, P), and the diagonal of ``M^½`` there, (P,)."""
    half = torch.cat([weights.flatten() for weights in M.eigenvalues()]).sqrt()
    S = _of_network(network)[1] * half * half[:, None]
    S.diagonal().add_(M.damping * half.square())
    return S, half


def _eigenvalues(S: Tensor) -> Tensor:
    """Of a symmetric matrix, ascending, to 4 digits."""
    values = eigvalsh(S, "The preconditioned matrix").cpu().numpy()
    return torch.from_numpy(rounded(values.clip(PRECISION * values[-1])))


def _without_noise(x: Tensor, scale: float) -> Tensor:
    """Zero where nothing but round-off is left, as where K-FAC is exact."""
    return x if x.norm() > PRECISION * scale else torch.zeros_like(x)


def _share(x: float, of: float) -> float:
    """x / of, where nothing but round-off is nothing."""
    return float(rounded(x / of)) if x > PRECISION * of else 0.0


# ---- the picture --------------------------------------------------------------------------------------

FLOOR, CEILING = 1e-4, 1e2  # of the spectrum's axis


def architecture(partition: Partition) -> str:
    """The widths of a chain of layers; of other models how many of their parameters are seen, in how many layers."""
    layers = partition.layers
    if all(after.features - after.bias == before.out for before, after in pairwise(layers)):
        return "→".join(str(n) for n in (layers[0].features - layers[0].bias, *(layer.out for layer in layers)))
    return f"{partition.size} of {partition.total} parameters in {len(partition)} layers"


MATRICES = {  # name, left end in inches, title
    "fisher": ("F", 0.87, "Exact Fisher $F$"),
    "blocks": ("G ⊗ A", 2.64, "K-FAC keeps $G \\otimes A$"),
    "missed": ("A⁻¹ − M", 4.72, "It misses $A^{-1} - M$"),
    "added": ("T − M", 6.49, "Added: $T - M$"),
    "left": ("A⁻¹ − T", 8.26, "Still missing: $A^{-1} - T$"),
}
SIDE = 1.65  # inches, of a matrix
ORDER = ("gradient", "diagonal", *KFAC_BY_RULE.values(), *CORRECTIONS, "exact")


class Plot(show.Plot):
    """Four matrices above, spectra and captured decreases below."""

    size = (10.0, 5.6)
    layout = None

    def build(self, result: Result) -> None:
        self.views, self.notes = {}, {}
        for name, (letters, left, title) in MATRICES.items():
            view = self.views[name] = self.add(MatrixView(self.axes(left, 1.1, SIDE, SIDE), result.partition, letters,
                                                          pixels=240))  # fmt: skip
            view.ax.set(title="", xlabel="", ylabel="")
            self.text(left, 0.83, title, weight="bold")
            self.notes[name] = self.add(self.text(left, 1.03, color=MUTED, size=9))
            if name in ("blocks", "added", "left"):
                view.ax.set_yticks([])
        self.views["fisher"].name_layers()
        self.bars = [self.add(ColourBar(self.axes(left, 3.0, right - left, 0.09)))
                     for left, right in ((0.87, 4.29), (4.72, 9.91))]  # fmt: skip
        self._build_spectra(self.axes(0.87, 3.75, 3.95, 1.5), result)
        self._build_captured(self.axes(6.75, 3.8, 2.15, 1.5))

    def _build_spectra(self, ax: Axes, result: Result) -> None:
        P = result.partition.size
        ax.set_title(f"All {P} eigenvalues of the preconditioned matrix", pad=8)
        tens = [1, *(10**i for i in range(1, 6) if 10**i <= P / 3)]
        ranks, names = [*tens, *(P + 1 - i for i in tens)], [*map(str, tens), *map(str, tens)]
        names[0], names[len(tens)] = "smallest", "largest"
        ax.set_xticks([stretched(i, P) for i in ranks], names)
        ends = stretched(1, P) * 1.04
        ax.set(yscale="log", xlim=(ends, -ends), ylim=(FLOOR, CEILING))
        plain_numbers(ax.yaxis, (1e-4, 1e-2, 1, 1e2))
        ax.axhline(1, color=FAINT, linewidth=1, zorder=0)
        late = self.add_late
        self.lines = [late(ax.plot([], [], linewidth=w, marker="o", markersize=w + 1)[0]) for w in (2.5, 1.2)]
        self.ends = [late(ax.plot([], [], color=INK, linestyle="none", marker=m, clip_on=False)[0]) for m in "^v"]
        self.keys = [late(ax.text(0.03, y, "", transform=ax.transAxes, va="top", size=9)) for y in (0.99, 0.84)]

    def _build_captured(self, ax: Axes) -> None:
        self.text(5.3, 3.54, "Captured decrease of one step", weight="bold")
        self.text(5.3, 3.72, "bars with the best length,  ○  one per layer,  |  as it is", color=MUTED, size=9)
        self.steps = self.add(StepBars(ax, ORDER, share))

    def move(self, result: Result) -> None:
        p, errors = result.parameters, result.errors
        for names, bar in zip((("fisher", "blocks"), ("missed", "added", "left")), self.bars, strict=True):
            limit = limit_of(next((x for x in (getattr(result, name) for name in names) if x.any()), np.ones(1)))
            bar.update(limit)
            for name in names:
                self.views[name].update(getattr(result, name), limit)
        self.notes["fisher"].set_text(f"{p['fisher']}, {result.partition.size} × {result.partition.size}")
        self.notes["blocks"].set_text(f"error {percent(errors['blocks'])} of ‖F‖")
        self.notes["missed"].set_text(f"{percent(errors[result.first])} of ‖A⁻¹‖")
        self.notes["added"].set_text(p["correction"])
        self.notes["left"].set_text(f"{percent(errors[p['correction']])} of what it missed")
        self.steps.update(result.at_best_length, result.at_layer_lengths, result.captured)

    def finish(self, result: Result) -> None:
        for line, key, (name, values) in zip(self.lines, self.keys, result.spectra.items(), strict=True):
            low, high, style = values[0], values[-1], METHODS[name]
            line.set(data=(stretched(np.arange(1, len(values) + 1), len(values)), values.numpy()), color=style.color,
                     linestyle=style.line)  # fmt: skip
            key.set(text=f"{style.label}: {number(low, 2)} to {number(high, 2)}, κ = {number(high / low)}",
                    color=style.ink)  # fmt: skip
        highest, lowest = (
            max(float(d[-1]) for d in result.spectra.values()),
            min(float(d[0]) for d in result.spectra.values()),
        )
        for marks, end, beyond in zip(self.ends, (CEILING, FLOOR), (highest > CEILING, lowest < FLOOR), strict=True):
            marks.set_data([stretched(len(values) if end == CEILING else 1, len(values))] * beyond, [end] * beyond)

    def words(self, result: Result) -> str:
        (one, other), errors, p = result.spectra.values(), result.errors, result.parameters
        told = ", ".join(
            f"{METHODS[name].label} {number(result.at_best_length[name])}, {number(result.at_layer_lengths[name])}, "
            f"{number(result.captured[name])}" for name in ORDER
        )  # fmt: skip
        return (
            f"{super().words(result)} K-FAC's blocks miss {percent(errors['blocks'])} of F, its inverse "
            f"{percent(errors[result.first])} of A⁻¹, and the correction leaves {percent(errors[p['correction']])} of "
            f"that. "
            f"Eigenvalues from {number(one[0])} to {number(one[-1])} with K-FAC, from {number(other[0])} to "
            f"{number(other[-1])} with the correction. Captured at the best length, with one length per layer, and "
            f"unscaled: {told}."
        )


def stretched(rank, P: int):
    """Ranks 1…P with both ends spread out: the log of how many lie below over how many lie above."""
    return np.log(rank / (P + 1 - rank))


def percent(x: float) -> str:
    return f"{100 * x:.3g} %"


# ---- the exercises ------------------------------------------------------------------------------------


@exercise("00a", "Choose nicolaides as the kind of columns, and compare the numbers in brackets.")
def _best_with_constants() -> str:
    unscaled = run(coarse="nicolaides").captured
    return max(CORRECTIONS, key=unscaled.__getitem__)


@exercise("00b", "Move columns per layer upwards until the bar of the balanced correction reaches 0.9.")
def _columns_for_nine_tenths() -> int:
    return next(k for k in range(17) if run(per_layer=k).captured["balanced"] >= 0.9)


@exercise("07a", "run(coarse=…, per_layer=1).captured['balanced'], for one name after the other.")
def _best_single_column() -> str:
    return max(coarse.SPACES, key=lambda name: run(coarse=name, per_layer=1).captured["balanced"])


@exercise("07b", "The step misses the exact one by M g; measure that in the norm of A.", 0.01)
def _additive_with_everything() -> float:
    s = first_network(steps=0)
    A = s.F.damped(0.01)
    return captured_decrease(A, s.g, KFAC(s.F, 0.01) @ s.g + A.solve(s.g))
