"""Which level does the work, where a coarse level matters: networks that solve differential equations."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
import torch

from ... import KFAC, CoarseCorrection, CoarseSpace, Damped, Dense, TwoLevel, show
from ...method.decompositions import eigvalsh
from ...method.two_level import CORRECTIONS
from ...parameters import Device, Range, Seed, check, number
from ...problems import equations
from ...problems.equations import Equation
from ...show import INK, METHODS, CurveView, MapView, Style, Tolerance, empty_line, plain_numbers
from ..common.exercises import exercise
from ..common.measured import seeds_in
from ..common.options import told
from ..common.result import PRECISION, Curve, Study, banded, curve, rounded
from ..common.setting import Shares, all_shares
from .cost import counted_curves
from .descent import Method, columns, training
from .tables import MEASURED_COLUMNS, TABLES, Cell, cells, measured_curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

EQUATIONS = {  # with their names in the measured tables
    "poisson": ("Poisson in 2 dimensions", partial(equations.poisson, 2), "Poisson 2D"),
    "heat": ("heat in 1 + 1 dimensions", partial(equations.heat, 1), "heat 1+1D"),
    "burgers": ("Burgers", equations.burgers, "Burgers 1+1D"),
}
LIVE = ("kfac", "coarse", "both", "exact")  # methods that the panel trains
GRID = 40  # points along each side of a picture
DECADES = 7  # of the errors that have a colour


class Trained(NamedTuple):
    """A run of one method: loss and error after 0, 1, 2, … steps; at this step its field, less the solution."""

    losses: NDArray
    errors: NDArray
    field: NDArray
    at_step: int

    @property
    def error(self) -> float:
        """At this step."""
        return float(self.errors[self.at_step])


@dataclass(frozen=True, eq=False)
class Result(Study):
    """Curves ``loss`` and ``error`` over steps, one for each method that was trained here, ``eigenvalues`` over their
    rank at ``at_step``, those of :func:`.tables.measured_curves`, and ``counted``, what a step takes by its products.

    What was trained here is one run. Rounding decides which steps its line search takes, so that another processor
    gives other numbers after some steps: the headline is made of the measured tables.

    Attributes:
        solution: the known one on a grid of the box, (n, n), rows along the last coordinate from high to low.
        fields: for each method the network's solution minus that, at this step.
        errors: relative L² errors at this step.
        dimension: effective dimension where both levels have come to at this step, at this λ.
        sizes: parameters, points, and columns of the coarse space in all.
        cells: of the map.
        box: the ends of each coordinate.
    """

    # One run with a line search is chaotic: the last bit of a sum decides how often a step is halved. Elsewhere single
    # losses were 33 times apart; what is measured where the run has come to moves with it.
    tolerances = {
        "loss": Tolerance(relative=99),
        "error": Tolerance(relative=19),
        "eigenvalues": Tolerance(relative=9),
        "captured": Tolerance(relative=9, absolute=0.3),
        "at_best_length": Tolerance(absolute=0.3),
        "at_layer_lengths": Tolerance(absolute=0.3),
        "effective dimension": Tolerance(relative=0.2),
        "layer overlap": Tolerance(relative=0.2),
    }

    solution: NDArray
    fields: dict[str, NDArray]
    errors: dict[str, float]
    dimension: float
    sizes: tuple[int, int, int]
    cells: tuple[Cell, ...]
    box: Sequence[tuple[float, float]]

    @property
    def headline(self) -> str:
        k = self.parameters["per_layer"]
        k = k if k in MEASURED_COLUMNS else 16
        ranges = (self.measured("errors", name, k)[1:] for name in ("kfac", "coarse", "both"))
        kfac, coarse, both = (" to ".join(number(x, 1) for x in ends) for ends in ranges)
        return f"Error after 4 s: K-FAC {kfac}, {k} columns alone {coarse}, both {both}"

    @property
    def where(self) -> str:
        p, (_, N, k) = self.parameters, self.sizes
        name, widths = EQUATIONS[p["equation"]][0], "-".join(map(str, p["widths"]))
        return (f"{name}: range of {seeds_in('pde_runs.csv')} seeds, measured; one run of widths {widths}, {N} points, "
                f"λ = {number(p['damping'], 1)}, {k} columns{told(*TABLES)}")  # fmt: skip

    def measured(self, quantity: str, method: str, per_layer: int) -> tuple[float, float, float] | None:
        """Median, least and largest of ``columns`` (the loss) or ``errors`` after four seconds on this equation, on
        the larger network; None where this number of columns was not measured."""
        c = self.curves[f"{quantity}, {EQUATIONS[self.parameters['equation']][2]}", method]
        at = np.flatnonzero(c.x == (per_layer if method in ("coarse", "both") else 0))
        return (float(c.y[at[0]]), float(c.low[at[0]]), float(c.high[at[0]])) if len(at) else None

    @property
    def worth(self) -> dict[str, Shares]:
        """Of the next step of several methods, from where both levels have come to at this step."""
        return _next_step(Reached.of(self.parameters))[0]

    @property
    def layer_overlap(self) -> float:
        """How many layers take the same step there."""
        return _next_step(Reached.of(self.parameters))[1]

    def others(self) -> list[tuple]:
        """A row for what is measured at this step, and for each cell of the map."""
        at = self.parameters["at_step"]
        rows = [("effective dimension", "both", at, self.dimension), ("layer overlap", "both", at, self.layer_overlap)]
        for name, found in self.worth.items():
            rows += [(kind, name, at, x) for kind, x in found._asdict().items()]
        for cell in self.cells:
            for method, error in cell.errors.items():
                rows.append((f"map, {cell.parameters} parameters", method, cell.points, error))
        return rows


def _with_range(found: tuple[float, float, float]) -> str:
    """
    >>> _with_range((0.042, 0.02, 0.3))
    '0.04 (0.02 to 0.3)'
    """
    median, low, high = (number(x, 1) for x in found)
    return f"{median} ({low} to {high})"


def run(
    *,
    damping: Annotated[float, Range(1e-10, 1e-2, log=True, steps=33), "λ, the same for every method."] = 1e-6,
    per_layer: Annotated[int, Range(0, 64), "columns of the coarse space in each layer."] = 16,
    coarse: Annotated[Literal["nicolaides", "spectral", "krylov", "random"], "which columns."] = "spectral",
    at_step: Annotated[int, Range(0, 200), "steps before the pictures are taken."] = 40,
    equation: Annotated[Literal["poisson", "heat", "burgers"], "which equation is solved."] = "poisson",
    widths: Annotated[tuple[int, ...], Range(1, 64), "of the hidden layers."] = (32, 32),
    points: Annotated[int, Range(20, 2000), "inside; a quarter as many lie on the boundary."] = 400,
    steps: Annotated[int, Range(1, 200), "of each method."] = 60,
    seed: Seed = 0,
    device: Device = "cpu",
) -> Result:
    """Train a network to solve a differential equation with K-FAC, with a coarse level, and with both.

    Args:
        at_step: steps before the pictures are taken, at most ``steps``.
    """
    p = check(run, locals())
    p["at_step"] = min(p["at_step"], p["steps"])
    kind = kind_of(p)
    runs = {name: run_of(p, name, per_layer, p["at_step"]) for name in LIVE}
    spectra, dimension, sizes = _spectra(Reached.of(p))
    curves = {
        (quantity, name): curve(np.arange(len(y)), y)
        for name, run in runs.items() for quantity, y in (("loss", run.losses), ("error", run.errors))
    }  # fmt: skip
    curves |= {("eigenvalues", name): curve(np.arange(1, len(d) + 1), d) for name, d in spectra.items()}
    problem = build(kind)
    return Result(
        p, curves | measured_curves() | counted_curves(), on_grid(problem, problem.model.solution),
        {name: run.field for name, run in runs.items()}, {name: run.error for name, run in runs.items()},
        dimension, sizes, cells(), problem.box,
    )  # fmt: skip


def kind_of(p: dict[str, Any]) -> tuple:
    """Equation, widths, points, seed, device: what problem the parameters name."""
    return p["equation"], tuple(p["widths"]), p["points"], p["seed"], p["device"]


@lru_cache(maxsize=8)
def build(kind: tuple) -> Equation:
    """The problem of a kind, whose network is not to be moved."""
    equation, widths, points, seed, device = kind
    return EQUATIONS[equation][1](widths, points, seed=seed, device=device)


def standing(kind: tuple, x: torch.Tensor) -> Equation:
    """The problem with a network of its own whose parameters are x (P,)."""
    problem = build(kind).twin()
    P, model = problem.partition, problem.model
    P.add_(model, P.pack(model), -1)  # which leaves zeros, so that they are x to the last bit
    P.add_(model, x)
    return problem


@lru_cache(maxsize=64)
def _path(kind: tuple, name: str, damping: float, coarse: str, per_layer: int, steps: int) -> tuple:
    """After 0, 1, … steps the parameters, (steps + 1, P), losses and errors; a run that ends stays where it is."""
    problem = build(kind).twin()
    method = Method(name, coarse, per_layer)
    if name in ("coarse", "both") and not per_layer:
        method = Method("kfac") if name == "both" else None
    P = problem.partition
    path, seen = [P.pack(problem.model)], [(float(problem.loss().detach()), problem.error())]
    going = iter(()) if method is None else training(problem, method, damping)
    with suppress(ValueError):  # singular to working precision at this λ: the run ends
        for _ in zip(range(steps), going, strict=False):
            path.append(P.pack(problem.model))
            seen.append((float(problem.loss().detach()), problem.error()))
    missing = steps + 1 - len(path)
    return torch.stack(path + path[-1:] * missing), *np.array(seen + seen[-1:] * missing).T


@lru_cache(maxsize=256)
def _trained(kind: tuple, name: str, damping: float, coarse: str, per_layer: int, steps: int, at_step: int) -> Trained:
    path, losses, errors = _path(kind, name, damping, coarse, per_layer, steps)
    problem = standing(kind, path[at_step])
    field = on_grid(problem, problem.values) - on_grid(problem, problem.model.solution)
    return Trained(losses, errors, field, at_step)


def run_of(p: dict[str, Any], method: str, per_layer: int, at_step: int) -> Trained:
    """The run of one of LIVE, with so many columns where it has any, at one step; the parameters p say the rest."""
    columns = (p["coarse"], per_layer) if method in ("coarse", "both") else ("spectral", 0)
    return _trained(kind_of(p), method, p["damping"], *columns, p["steps"], at_step)


class Reached(NamedTuple):
    """Arguments that identify one step of a two-level run (a cache key)."""

    kind: tuple
    damping: float
    coarse: str
    per_layer: int
    steps: int
    at_step: int

    @classmethod
    def of(cls, p: dict[str, Any]) -> Reached:
        return cls(kind_of(p), *(p[name] for name in cls._fields[1:]))


class _Parts(NamedTuple):
    """At a place: F + λI as it was captured and as a matrix, gradient, and both levels; a seed for random columns."""

    damped: Damped
    A: Dense
    g: torch.Tensor
    M: KFAC
    Z: CoarseSpace
    seed: int


def _parts_at(at: Reached) -> _Parts:
    path, *_ = _path(at.kind, "both", at.damping, at.coarse, at.per_layer, at.steps)
    problem = standing(at.kind, path[at.at_step])
    F, g, seed = problem.capture(), problem.gradient(), at.kind[3] + at.at_step
    damped, M = F.damped(at.damping), KFAC(F, at.damping)
    Z = columns(at.coarse, damped, M, g, at.per_layer, seed)
    return _Parts(damped, Dense(damped.dense(), F.partition), g, M, Z, seed)


@lru_cache(maxsize=256)
def _spectra(at: Reached) -> tuple[dict[str, NDArray], float, tuple[int, int, int]]:
    """Descending eigenvalues of M A, Q A and T A; the effective dimension; parameters, points and columns."""
    damped, A, _, M, Z, _ = _parts_at(at)
    operators = {"kfac": M, "both": TwoLevel(A, M, Z)} | ({"coarse": CoarseCorrection(A, Z)} if Z.size else {})
    L = torch.linalg.cholesky(A.dense())  # kv.spectrum refuses the least λ of the slider, for its smallest eigenvalues
    spectra = {}
    for name, operator in operators.items():
        inner = L.T @ operator.dense() @ L
        d = eigvalsh((inner + inner.T) / 2, "The preconditioned matrix").flip(0).cpu().numpy()
        spectra[name] = d.clip(PRECISION * d[0])  # the zeros of Q A are below that
    sizes = A.partition.size, len(build(at.kind).inputs), Z.size
    return spectra, float(rounded(damped.effective_dimension())), sizes


@lru_cache(maxsize=8)
def _next_step(at: Reached) -> tuple[dict[str, Shares], float]:
    """What the next step of each method captures, and the overlap of layers."""
    damped, A, g, M, Z, seed = _parts_at(at)
    directions = {"kfac": M @ g}
    if Z.size:
        T = TwoLevel(A, M, Z)
        directions["coarse"] = CoarseCorrection(A, Z) @ g
        directions |= {name: T.with_correction(name) @ g for name in CORRECTIONS}
        other = columns("random", damped, M, g, at.per_layer, seed)
        directions["random columns, balanced"] = TwoLevel(A, M, other) @ g
    worth = {name: x.rounded() for name, x in all_shares(damped, g, directions).items()}
    return worth, float(rounded(damped.layer_overlap()))


def on_grid(problem: Equation, function: Any) -> NDArray:
    """A function of points (n, 2) on a grid of the box, (n, n), rows along the last coordinate from high to low."""
    sides = [torch.linspace(*ends, GRID, dtype=problem.inputs.dtype, device="cpu") for ends in problem.box]
    x, y = torch.meshgrid(*sides, indexing="ij")
    values = function(torch.stack([x, y], -1).flatten(0, 1).to(problem.inputs))
    return values.view(GRID, GRID).T.flip(0).cpu().numpy()


# ---- the picture --------------------------------------------------------------------------------------

STYLES: dict[str, Style] = {
    "lbfgs": Style("L-BFGS", "#888888", "h", "--"),
    "kfac": METHODS["kfac"]._replace(label="K-FAC alone"),
    "coarse": Style("coarse alone", "#117733", "s", "--"),
    "both": METHODS["balanced"]._replace(label="two levels, balanced"),
    "exact": METHODS["exact"]._replace(label="exact step"),
}
BESIDE: dict[str, Style] = {  # on the problem of arXiv 2505.12149, K-FAC for PINNs being that of 2405.15603
    "own exact": METHODS["exact"]._replace(label="exact step"),
    "kfac-pinns": Style("K-FAC for PINNs", "#56B4E9", "P", ":"),
    "spring": Style("SPRING", "#5E3C99", "^", "--"),
    "engd-w": Style("ENGD-W", "#CC79A7", "s", "-."),
    "ours": METHODS["balanced"]._replace(label="two levels, default"),
}
SHOWN = 1000  # points of the measured runs that are drawn
LOOKS = (5, 20, 60, 120)  # seconds at which these are told
SHORT = {f"{name}, {k}": f"{short}{k}" for name, short in (("coarse alone", "alone "), ("two levels", "both "))
         for k in MEASURED_COLUMNS}  # fmt: skip


class Plot(show.Plot):
    """Solution and errors above; loss over steps, eigenvalues and loss over seconds; columns and the map below."""

    size = (10.0, 8.8)
    fixed = ("equation", "widths", "points", "steps", "seed")

    def __init__(self, result: Result) -> None:
        super().__init__(result)
        for ax in self.figure.axes:  # an SVG names its clips by their last bits, which differ from run to run
            ax.set_position(np.round(ax.get_position().bounds, 6))

    def build(self, result: Result) -> None:
        grid = self.figure.add_gridspec(3, 1, height_ratios=(0.95, 1.1, 1.1))
        self._build_fields(grid[0].subgridspec(1, 5), result)
        middle = grid[1].subgridspec(1, 3)
        steps, P = result.parameters["steps"], result.sizes[0]
        errors, both = (1e-6, 10), ("log", "log")
        self.error = self.add(CurveView(
            self.figure.add_subplot(middle[0]), STYLES, {name: result.curves["error", name] for name in LIVE},
            "One run: error over steps", x="steps", xlim=(0, steps), ylim=errors, scale=("linear", "log"),
        ))  # fmt: skip
        self.eigenvalues = self.add(CurveView(
            self.figure.add_subplot(middle[1]), STYLES, result.of("eigenvalues"), "One run: eigenvalues",
            x="rank (triangle: less)", xlim=(1, P), ylim=(1e-6, 1e3), scale=both,
        ))  # fmt: skip
        self._build_columns(self.figure.add_subplot(middle[2]), result)
        below = grid[2].subgridspec(1, 3, width_ratios=(1.15, 0.95, 1))
        seconds = CurveView(
            self.figure.add_subplot(below[0]), BESIDE, banded(result.of(f"peers, {SHOWN}"), ("ours", "engd-w")),
            f"Error, 5 dimensions, {SHOWN:,} points", x="seconds (arXiv 2505.12149, 2405.15603)", xlim=(1, 120),
            ylim=(3e-5, 5), scale=both,
        )  # fmt: skip
        self._build_steps(self.figure.add_subplot(below[1]), result)
        self._build_map(self.figure.add_subplot(below[2]), result)
        lbfgs = empty_line(self.error.ax, STYLES["lbfgs"], marker=STYLES["lbfgs"].marker)
        others = [line for name, line in seconds.lines.items() if name not in ("ours", "own exact")]
        self.legend([*self.error.lines.values(), lbfgs, *others], 4)

    def _build_steps(self, ax: Axes, result: Result) -> None:
        """Seconds a step over points: counted as lines, measured as marks."""
        for name, c in result.of("counted").items():
            ax.plot(c.x, c.y, color=BESIDE[name].color, linestyle=BESIDE[name].line)
        for name, c in result.of("step").items():
            if name in BESIDE:
                ax.plot(c.x, c.y, color=BESIDE[name].color, marker=BESIDE[name].marker, linestyle="none")
        ax.set(xscale="log", yscale="log", xlabel="points (lines: counted)", title="Seconds a step")  # fmt: skip
        plain_numbers(ax.xaxis)
        plain_numbers(ax.yaxis)

    def _build_fields(self, grid: Any, result: Result) -> None:
        box = result.box
        titles = {"solution": "solution $u$", **{name: STYLES[name].label for name in LIVE}}
        self.images, self.texts = {}, {}
        for i, (name, title) in enumerate(titles.items()):
            ax = self.figure.add_subplot(grid[i])
            ax.set_title(title, color=INK if name == "solution" else STYLES[name].ink)
            how = dict(extent=(*box[0], *box[1]), aspect="auto", interpolation="nearest")
            if name == "solution":
                ax.imshow(result.solution, cmap="viridis", **how)
                horizontal, ax_name = AXES[result.parameters["equation"]]
                ax.set(ylabel=ax_name)
                ax.text(0.02, -0.06, horizontal, transform=ax.transAxes, va="top")
                key = ax.inset_axes((0.66, -0.15, 0.24, 0.07))  # of the errors; words for colours fail in a dark theme
                key.imshow(np.linspace(0, 1, 64)[None], cmap="magma", aspect="auto")
                key.set(xticks=[], yticks=[])
                for place, words, side in ((-0.06, f"error {number(10.0**-DECADES)}", "right"), (1.06, "1", "left")):
                    key.text(place, 0.45, words, transform=key.transAxes, ha=side, va="center")
            else:
                image = ax.imshow(np.zeros((2, 2)), cmap="magma", vmin=-DECADES, vmax=0, **how)
                self.images[name] = self.add(image)
                ax.set_yticks([])
                self.texts[name] = self.add(ax.text(0.5, -0.06, "", transform=ax.transAxes, ha="center", va="top"))
            ax.set_xticks([])
            ax.tick_params(length=0)

    def _build_columns(self, ax: Axes, result: Result) -> None:
        """The last error over columns per layer, one colour for each level, one line for each equation."""
        quantities = [f"errors, {measured}" for _, _, measured in EQUATIONS.values()]
        for quantity, marker in zip(quantities, "os^", strict=True):
            found = result.of(quantity)
            for name in ("coarse", "both"):
                if name in found:
                    c = found[name]
                    ax.plot(c.x, c.y, color=STYLES[name].color, linestyle=STYLES[name].line, marker=marker)
            for name, x in (("kfac", 1.0), ("lbfgs", 1.4), ("exact", 256.0)):
                if name in found:
                    ax.plot([x], found[name].y, color=STYLES[name].color, marker=marker, linestyle="none")
            ax.plot([], [], color=INK, marker=marker, linestyle="none", label=quantity.removeprefix("errors, "))
        ax.set(xscale="log", yscale="log", xlim=(0.8, 400), xlabel="columns per layer",
               title="Measured: error after 4 seconds")  # fmt: skip
        ax.set_xticks([1.15, 4, 16, 64, 256], ["none", "4", "16", "64", "exact"])
        ax.minorticks_off()
        ax.legend(loc="upper right")

    def _build_map(self, ax: Axes, result: Result) -> None:
        gains, names = [], {}
        for cell in result.cells:
            row, column = f"{float(cell.parameters):,.0f}", f"{cell.points:,}"
            levels = {name: error for name, error in cell.errors.items() if name not in ("K-FAC", "exact")}
            gains.append((row, column, cell.errors["K-FAC"] / min(levels.values())))
            names[row, column] = cell
        missing = {(row, column) for row, *_ in gains for _, column, _ in gains} - {g[:2] for g in gains}
        gains += [(row, column, np.nan) for row, column in missing]
        view = MapView(
            ax, gains, "Error: K-FAC's over the least", x="points (one seed)", y="parameters",
            limits=(1, 1e5), colour=np.log10, palette="Oranges", form=lambda x: "" if x != x else f"×{number(x, 1)}",
        )  # fmt: skip
        for text in ax.texts:
            x, y = text.get_position()
            cell = names.get((view.rows[int(y)], view.columns[int(x)]))
            if cell:
                text.set_text(f"{text.get_text()}\n{SHORT.get(cell.first, cell.first)}")

    def move(self, result: Result) -> None:
        for name, image in self.images.items():
            image.set_data(np.log10(np.abs(result.fields[name]).clip(1e-16)))
            here = number(10.0 ** round(np.log10(result.errors[name])), 1)
            found = result.measured("errors", name, result.parameters["per_layer"])
            measured = f"measured {number(found[1], 1)} to {number(found[2], 1)}" if found else ""
            self.texts[name].set_text(f"one run: error near {here}\n{measured}")
        self.error.update({name: result.curves["error", name] for name in LIVE}, at=result.parameters["at_step"])
        spectra = result.of("eigenvalues")
        absent = Curve(*[np.array([np.nan])] * 4)
        self.eigenvalues.update({name: spectra.get(name, absent) for name in self.eigenvalues.lines})

    def words(self, result: Result) -> str:
        k = result.parameters["per_layer"]
        errors = {name: result.measured("errors", name, k) for name in LIVE}
        known = ", ".join(f"{STYLES[name].label} {_with_range(found)}" for name, found in errors.items() if found)
        first = "; ".join(f"{c.parameters} parameters, {c.points} points: {c.first}" for c in result.cells)
        peers = "; ".join(
            f"{BESIDE[name].label} " + ", ".join(f"{number(c.at(t), 1)} after {t} s" for t in LOOKS)
            for name, c in result.of(f"peers, {SHOWN}").items() if name in BESIDE
        )  # fmt: skip
        return (
            f"Of one run of each method: the error on the square, the error over steps, and the eigenvalues of the "
            f"preconditioned matrix. Relative errors after 4 s, measured: {known}. First in the map: {first}. "
            f"Poisson's equation in 5 dimensions, {SHOWN} fresh points at each step: {peers}."
        )


AXES = {"poisson": ("$x$", "$y$"), "heat": ("time", "$x$"), "burgers": ("time", "$x$")}


# ---- the exercises ------------------------------------------------------------------------------------


@exercise("15a", "Each position carries one number through a layer; count value, first derivatives and Laplacian.")
def _positions_of_a_point() -> int:
    (position,) = {a.shape[1] for a in equations.poisson(5, (3,), 10).capture().a}
    return position


@exercise("15b", "With Z = I, what are E and Q? And P = I − A Q? One word: exact, K-FAC, coarse …")
def _what_all_columns_make() -> str:
    F = equations.poisson(2, (3,), 10).capture()
    A, g = Dense(F.damped(1e-3).dense(), F.partition), torch.ones_like(F.diagonal())
    named = {"exact": F.damped(1e-3).solve(g), "k-fac": KFAC(F, 1e-3) @ g}
    found = CoarseCorrection(A, CoarseSpace(F.partition, F.eye())) @ g
    return min(named, key=lambda name: float((named[name] - found).norm()))
