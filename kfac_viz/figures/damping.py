"""What damping does, over all λ: spectrum, effective dimension, steps, and what becomes of the loss."""

from __future__ import annotations

from ..experiments.damping import METHODS as SHOWN
from ..experiments.damping import MOMENTS, DampingResult
from .curves import OVER_DAMPINGS, CurveView
from .plot import Plot
from .style import FAINT, INK, METHODS, Style

LINES = dict(zip(MOMENTS, (":", "-"), strict=True))
MOMENT = {moment: Style(moment, INK, "", line) for moment, line in LINES.items()}
SERIES = {
    f"{moment}, {name}": METHODS[name]._replace(label=f"{METHODS[name].label}, {moment}", line=line)
    for moment, line in LINES.items()
    for name in SHOWN
}
LIMIT = {moment: Style(f"‖g‖ / λ, {moment}", METHODS["gradient"].color, "", line) for moment, line in LINES.items()}


class DampingPlot(Plot):
    size = (13.0, 7.6)

    def build(self, result: DampingResult) -> None:
        axes = self.figure.subplots(2, 3).ravel()

        self.size_of_F = P = result.size
        self.spectrum = CurveView(
            axes[0], MOMENT, "Spectrum of F, and λ", x="rank", y="eigenvalue", xlim=(0.9, 1.1 * P), ylim=(1e-8, 100)
        )
        self.level = axes[0].axhline(1, color=INK, linewidth=0.9, alpha=0.6)
        length = CurveView(axes[2], LIMIT | SERIES, "Length of the step", y="‖v‖", ylim=(1e-3, 1e3), **OVER_DAMPINGS)
        self.views = {"length": length}
        linear = {
            "dimension": (MOMENT, "Effective dimension", f"Σ d/(d + λ), of {P}", (0, P)),
            "captured": (SERIES, "Captured decrease", "share, step as it is", (-1, 1.05)),
            "ratio": (SERIES, "Trust: actual / predicted decrease", "reduction ratio, best length", (-1, 1.5)),
            "decrease": (SERIES, "Progress: actual decrease", "share of the loss, best length", (-0.2, 0.5)),
        }
        for ax, (name, (series, title, y, ylim)) in zip(axes[[1, 3, 4, 5]], linear.items(), strict=True):
            scale = "log", "linear"
            self.views[name] = CurveView(ax, series, title, y=y, ylim=ylim, scale=scale, **OVER_DAMPINGS)
            if name != "dimension":
                ax.axhline(0, color=INK, linewidth=0.6)
        for share in (0.25, 0.75):  # below the first λ is raised, above the second lowered
            axes[4].axhline(share, color=FAINT, linewidth=0.8)
        handles = [*self.views["captured"].lines.values(), *self.views["length"].lines.values()][:8]
        order = [handles[i] for i in (0, 3, 1, 4, 2, 5, 6, 7)]
        self.figure.legend(handles=order, loc="outside lower center", ncols=4)
        views = self.spectrum, *self.views.values()
        self.animated = [self.level, *(artist for view in views for artist in view.artists)]

    def update(self, result: DampingResult) -> None:
        λ = result.parameters["damping"]
        self.spectrum.update(result.of("spectrum"))
        self.level.set_ydata([λ, λ])
        for name, view in self.views.items():
            view.update(result.of(name) | (result.of("gradient") if name == "length" else {}), at=λ)
        told = []
        for series, c in result.of("decrease").items():
            best = int(c.y.argmax())
            told.append(f"{SERIES[series].label} {c.y[best]:.2g} at λ = {c.x[best]:.2g}")
        self.figure.set_label(
            f"Curves over the damping λ for a network of {result.size} parameters, at the start and after training: "
            "spectrum, effective dimension, length of the step, captured and actual decrease, reduction ratio. "
            "Largest decrease, as a share of the loss: " + "; ".join(told) + "."
        )

    def fits(self, result: DampingResult) -> bool:
        return result.size == self.size_of_F


plot_damping = DampingPlot.draw
