"""One picture of the whole story: the Fisher, what K-FAC keeps and misses, what a coarse space gives back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .parts import ColourBar, MatrixView, limit_of, number
from .plot import Plot
from .style import FAINT, INK, METHODS, MUTED, SPACES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Text

    from ..experiments.coarse_space import CoarseSpaceResult

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
