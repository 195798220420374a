"""What K-FAC misses of the inverse of ``F + λI``, and what a few numbers per layer give back."""

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

from ..method import coarse as spaces
from ..method.kfac import KFAC
from ..method.krylov import captured_decrease
from ..method.partition import Partition
from ..method.preconditioner import Diagonal
from ..method.two_level import CORRECTIONS, TwoLevel
from ..parameters import Device, Range, Seed, check
from ..show.parts import ColourBar, MatrixView, limit_of, number
from ..show.plot import Plot
from ..show.style import FAINT, INK, METHODS, MUTED, SPACES
from .curves import rounded
from .exercises import exercise
from .setting import Data, Flavour, Setting, Widths, first_network, setting, small_enough
from .threads import one_thread

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.text import Text



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


@one_thread()
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


# ---- the picture --------------------------------------------------------------------------------------


FLOOR, CEILING = 1e-4, 1e2  # of the spectrum's axis
NAMES = {"fisher": "F", "blocks": "G ⊗ A", "missed": "A⁻¹ − M", "added": "T − M"}
ORDER = ("gradient", "diagonal", "kfac", "additive", "a-def1", "a-def2", "balanced", "exact")


class CoarseSpacePlot(Plot):
    """Four matrices above, spectra and captured decreases below."""

    size = (11.6, 6.5)
    layout = None

    def build(self, result: CoarseSpaceResult) -> None:
        self.title = self._text(0.3, 0.2, size=13, weight="bold", va="center")
        self.subtitle = self._text(0.3, 0.45, color=MUTED, va="center")
        titles = {
            "fisher": "Exact Fisher $F$",
            "blocks": "K-FAC keeps $G \\otimes A$ in each layer",
            "missed": "K-FAC misses $A^{-1} - M$",
            "added": "The correction adds $T - M$",
        }
        self.views, self.notes = {}, {}
        for left, (name, title) in zip((1.0, 3.55, 6.4, 8.95), titles.items(), strict=True):
            ax = self._axes(left, 1.06, 2.4, 2.4)
            self.views[name] = MatrixView(ax, result.partition, "", pixels=240)
            self._text(left, 0.8, title, weight="bold", size=10)
            self.notes[name] = self._text(left, 0.98, color=MUTED, size=8.5)
            ax.set(xlabel="", ylabel="")
            if name in ("blocks", "added"):
                ax.set_yticks([])
        self.views["fisher"].name_layers()
        self.bars = [ColourBar(self._axes(left, 3.72, 4.95, 0.09)) for left in (1.0, 6.4)]
        self._build_spectra(self._axes(1.0, 4.5, 4.95, 1.7), result)
        self._build_captured(self._axes(7.8, 4.6, 2.9, 1.65))
        views = [artist for view in self.views.values() for artist in view.artists]
        texts = [self.title, self.subtitle, *self.notes.values(), *self.bars[0].texts, *self.bars[1].texts]
        self.animated = [*views, *texts, *self.lines, *self.legend, *self.boxes, *self.numbers, self.best, self.off]

    def fits(self, result: CoarseSpaceResult) -> bool:
        return result.partition == self.views["fisher"].partition

    def regions(self, result: CoarseSpaceResult) -> list[tuple[float, float, float, float, str]]:
        """Every block of every matrix, with its layers and its norm."""
        names = [f"{l + 1} ({name})" for l, name in enumerate(result.partition.names)]
        words = "{}, layers {} and {}: Frobenius norm {}"
        return [
            (*box, words.format(NAMES[which], names[l], names[m], number(result.norms[which][l][m])))
            for which, view in self.views.items()
            for l, m, box in view.boxes()
        ]

    def scale(self, logarithmic: bool) -> None:
        for part in (*self.views.values(), *self.bars):
            part.logarithmic = logarithmic

    def _build_spectra(self, ax: Axes, result: CoarseSpaceResult) -> None:
        P = result.partition.size
        ax.set_title(f"All {P} eigenvalues of the preconditioned matrix", pad=8)
        tens = [1, *(10**i for i in range(1, 6) if 10**i <= P / 3)]
        ranks, names = [*tens, *(P + 1 - i for i in tens)], [*map(str, tens), *map(str, tens)]
        names[0], names[len(tens)] = "smallest", "largest"
        ax.set_xticks([stretched(i, P) for i in ranks], names)
        ends = stretched(1, P) * 1.04
        ax.set(yscale="log", xlim=(ends, -ends), ylim=(FLOOR, CEILING), ylabel="eigenvalue")
        ax.set_yticks([1e-4, 1e-2, 1, 1e2])
        ax.minorticks_off()
        ax.axhline(1, color=FAINT, linewidth=1, zorder=0)
        self.lines = [ax.plot([], [], linewidth=w, marker="o", markersize=w + 1)[0] for w in (2.5, 1.2)]
        self.legend = [ax.text(0.03, y, "", transform=ax.transAxes, va="top") for y in (0.99, 0.85)]

    def _build_captured(self, ax: Axes) -> None:
        ax.set_title("Captured decrease of one step", pad=15, x=-0.483)
        ax.text(
            -0.483, 1.025, "bars as it is,  |  with the best step length", transform=ax.transAxes, color=MUTED, size=8.5
        )
        self.rows = {name: row for row, name in enumerate(ORDER)}
        ax.set(xlim=(-1, 1), ylim=(len(ORDER) - 0.4, -0.6))
        ax.set_yticks(range(len(ORDER)), [METHODS[name].label for name in ORDER])
        ax.tick_params(axis="y", length=0)
        ax.set_xticks([-1, -0.5, 0, 0.5, 1], ["≤ −1", "−0.5", "0", "0.5", "1"])
        ax.axvline(0, color=INK, linewidth=0.8)
        ax.axvline(1, color=FAINT, linewidth=1, zorder=0)
        self.boxes = [ax.barh(row, 0, height=0.66, color=METHODS[name].color)[0] for name, row in self.rows.items()]
        self.numbers = [ax.text(1.1, row, "", va="center") for row in self.rows.values()]
        (self.best,) = ax.plot([], [], linestyle="none", marker="|", markersize=9, markeredgewidth=1.6, color=INK)
        (self.off,) = ax.plot([], [], linestyle="none", marker="<", markersize=6, color=INK, clip_on=False)

    def update(self, result: CoarseSpaceResult) -> None:
        p, errors = result.parameters, result.errors
        correction = p["correction"]
        self.title.set_text(headline(result))
        self.subtitle.set_text(subtitle(result))
        for names, bar in zip((("fisher", "blocks"), ("missed", "added")), self.bars, strict=True):
            shown = [getattr(result, name) for name in names if any(map(any, result.norms[name]))]
            limit = limit_of(shown[0] if shown else np.ones(1))
            bar.update(limit)
            for name in names:
                self.views[name].update(getattr(result, name), limit)
        self.notes["fisher"].set_text(f"{p['fisher']}, {result.partition.size} × {result.partition.size}")
        self.notes["blocks"].set_text(f"error {percent(errors['blocks'])} of ‖F‖")
        self.notes["missed"].set_text(f"{percent(errors['kfac'])} of ‖A⁻¹‖, with A = F + λI")
        self.notes["added"].set_text(f"leaves {percent(errors[correction])} of what is missed")
        for line, text, (name, values) in zip(self.lines, self.legend, result.spectra.items(), strict=True):
            values = values.numpy()
            P = len(values)
            line.set_data(stretched(np.arange(1, P + 1), P), np.clip(values, FLOOR, CEILING))
            low, high = values[0], values[-1]
            style = METHODS[name]
            line.set(color=style.color, linestyle=style.line)
            text.set(
                text=f"{style.label}: {number(low, 2)} to {number(high, 2)}, κ = {number(high / low)}",
                color=style.color,
            )
        captured = [result.captured[name] for name in self.rows]
        best = [result.at_best_length[name] for name in self.rows]
        for box, text, value in zip(self.boxes, self.numbers, captured, strict=True):
            box.set_width(max(value, -1))
            text.set_text(number(value))
        self.best.set_data(best, list(self.rows.values()))
        below = [row for row, value in enumerate(captured) if value < -1]
        self.off.set_data([-1.0] * len(below), below)
        self.figure.set_label(describe(result))

    def _axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Axes in inches from the upper left corner: nothing moves when texts change."""
        W, H = self.size
        return self.figure.add_axes((left / W, 1 - (top + height) / H, width / W, height / H))

    def _text(self, left: float, top: float, text: str = "", **style) -> Text:
        W, H = self.size
        return self.figure.text(left / W, 1 - top / H, text, **style)


def headline(result: CoarseSpaceResult) -> str:
    """What to see, in one line."""
    p = result.parameters
    kfac, two = (f"{result.captured[name]:.2f}".replace("-", "−") for name in ("kfac", p["correction"]))
    if not result.size:
        return f"Without coarse space: one step of K-FAC captures {kfac} of the best decrease"
    space = SPACES[p["coarse"]].label
    words = f"{space[0].upper()}{space[1:]}, {p['per_layer']} per layer, {p['correction']}"
    return f"{words}: one step captures {two} of the best decrease; K-FAC {kfac}"


def stretched(rank, P: int):
    """Ranks 1…P with both ends spread out: the log of how many lie below over how many lie above."""
    return np.log(rank / (P + 1 - rank))


def subtitle(result: CoarseSpaceResult) -> str:
    """Where the picture was taken."""
    p, layers = result.parameters, result.partition.layers
    widths = "→".join(str(n) for n in (layers[0].features - layers[0].bias, *(layer.out for layer in layers)))
    moment = f" after {p['steps']} Adam steps" if p.get("steps") else ""
    return f"{result.problem}, {widths}{moment}, λ = {number(p['damping'])}, coarse dimension {result.size}"


def describe(result: CoarseSpaceResult) -> str:
    """The alternative text: the numbers that the picture shows."""
    (one, other), errors, p = result.spectra.values(), result.errors, result.parameters
    captured = ", ".join(f"{METHODS[name].label} {number(result.captured[name])}" for name in ORDER)
    return (
        f"{headline(result)}. {subtitle(result)}. Four matrices with layer boundaries: the exact Fisher; K-FAC's "
        f"diagonal blocks, relative error {percent(errors['blocks'])}; what K-FAC misses of the inverse, "
        f"{percent(errors['kfac'])} of it; what the correction adds, which leaves {percent(errors[p['correction']])} "
        f"of that. Eigenvalues with K-FAC from {number(one[0])} to {number(one[-1])}, with the correction from "
        f"{number(other[0])} to {number(other[-1])}. Captured decrease: {captured}."
    )


def percent(x: float) -> str:
    return f"{100 * x:.3g} %"


plot_coarse_space = CoarseSpacePlot.draw


# ---- the exercises ------------------------------------------------------------------------------------


@exercise("00a", "Compare the bars of the four corrections with that of K-FAC.")
def _takes_the_same_step_twice() -> str:
    captured = run_coarse_space().captured
    return next(name for name in ("additive", "a-def1", "a-def2", "balanced") if captured[name] < captured["kfac"])


@exercise("00b", "Move per_layer upwards until the bar of the balanced correction reaches 0.9.")
def _columns_for_nine_tenths() -> int:
    return next(k for k in range(17) if run_coarse_space(per_layer=k).captured["balanced"] >= 0.9)


@exercise("05a", "run_coarse_space(coarse=…, per_layer=1).captured['balanced'], for one name after the other.")
def _best_single_column() -> str:
    return max(spaces.SPACES, key=lambda name: run_coarse_space(coarse=name, per_layer=1).captured["balanced"])


@exercise("05b", "The step misses the exact one by M g; measure that in the norm of A.", 0.01)
def _additive_with_everything() -> float:
    s = first_network(steps=0)
    A = s.F.damped(0.01)
    return captured_decrease(A, s.g, KFAC(s.F, 0.01) @ s.g + A.solve(s.g))
