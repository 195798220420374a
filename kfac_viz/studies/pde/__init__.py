"""Which level does the work, where a coarse level matters: networks that solve differential equations."""

from __future__ import annotations

from collections.abc import Collection, Sequence
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
from ...show import INK, METHODS, CurveView, MapView, Style, Tolerance, empty_line
from ..common.exercises import exercise
from ..common.measured import TUNING_SEED, Run, grouped, loss_of, measured_rows
from ..common.result import PRECISION, Curve, Study, curve, rounded
from ..common.setting import Shares, all_shares
from .descent import Method, columns, training

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

EQUATIONS = {
    "poisson": ("Poisson in 2 dimensions", partial(equations.poisson, 2)),
    "heat": ("heat in 1 + 1 dimensions", partial(equations.heat, 1)),
    "burgers": ("Burgers", equations.burgers),
}
LIVE = ("kfac", "coarse", "both", "exact")  # methods that the panel trains
GRID = 40  # points along each side of a picture
DECADES = 7  # of the errors that have a colour


class Trained(NamedTuple):
    """A run of one method: the loss after 0, 1, 2, … steps; at this step its field, less the solution, and error."""

    losses: NDArray
    field: NDArray
    error: float


@dataclass(frozen=True, eq=False)
class Result(Study):
    """Curves ``loss`` over steps, one for each method that was trained here, ``eigenvalues`` over their rank at
    ``at_step``, and from the measured tables ``seconds`` (loss over processor time) and ``columns`` (last loss over
    columns per layer).

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
        p = self.parameters
        losses = {name: number(c.y[p["at_step"]], 1) for name, c in self.of("loss").items()}
        return (f"Loss after {p['at_step']} steps: K-FAC {losses['kfac']}, {p['per_layer']} columns per layer alone "
                f"{losses['coarse']}, two levels {losses['both']}")  # fmt: skip

    @property
    def where(self) -> str:
        p, (P, N, k) = self.parameters, self.sizes
        name, widths = EQUATIONS[p["equation"]][0], "-".join(map(str, p["widths"]))
        return (f"{name}, widths {widths}, {P} parameters, {N} points, λ = {number(p['damping'], 1)}; {k} columns in "
                f"all, effective dimension {number(self.dimension)}")  # fmt: skip

    @property
    def worth(self) -> dict[str, Shares]:
        """Of the next step of several methods, from where both levels have come to at this step."""
        return _next_step(Reached.of(self.parameters))[0]

    @property
    def layer_overlap(self) -> float:
        """How many layers take the same step there."""
        return _next_step(Reached.of(self.parameters))[1]

    def others(self) -> list[tuple]:
        """A row for each field's error, for what is measured at this step, and for each cell of the map."""
        at = self.parameters["at_step"]
        rows = [("error", name, at, float(rounded(x))) for name, x in self.errors.items()]
        rows += [("effective dimension", "both", at, self.dimension), ("layer overlap", "both", at, self.layer_overlap)]
        for name, found in self.worth.items():
            rows += [(kind, name, at, x) for kind, x in found._asdict().items()]
        for cell in self.cells:
            for method, loss in cell.losses.items():
                rows.append((f"map, {cell.parameters} parameters", method, cell.points, loss))
        return rows


class Cell(NamedTuple):
    """One size of network and of batch: the last loss of each method at the better λ."""

    parameters: str
    points: int
    losses: dict[str, float]

    @property
    def first(self) -> str:
        return min(self.losses, key=self.losses.get)


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
    curves = {("loss", name): curve(np.arange(len(run.losses)), run.losses) for name, run in runs.items()}
    curves |= {("eigenvalues", name): curve(np.arange(1, len(d) + 1), d) for name, d in spectra.items()}
    problem = build(kind)
    return Result(
        p, curves | measured_curves(), on_grid(problem, problem.model.solution),
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
    """Parameters after 0, 1, … steps, (steps + 1, P), and the losses there; a run that ends stays where it is."""
    problem = build(kind).twin()
    method = Method(name, coarse, per_layer)
    if name in ("coarse", "both") and not per_layer:
        method = Method("kfac") if name == "both" else None
    P = problem.partition
    path, losses = [P.pack(problem.model)], [float(problem.loss().detach())]
    going = iter(()) if method is None else training(problem, method, damping)
    with suppress(ValueError):  # singular to working precision at this λ: the run ends
        for _ in zip(range(steps), going, strict=False):
            path.append(P.pack(problem.model))
            losses.append(float(problem.loss().detach()))
    missing = steps + 1 - len(path)
    return torch.stack(path + path[-1:] * missing), np.array(losses + losses[-1:] * missing)


@lru_cache(maxsize=256)
def _trained(kind: tuple, name: str, damping: float, coarse: str, per_layer: int, steps: int, at_step: int) -> Trained:
    path, losses = _path(kind, name, damping, coarse, per_layer, steps)
    problem = standing(kind, path[at_step])
    field = on_grid(problem, problem.values) - on_grid(problem, problem.model.solution)
    return Trained(losses, field, problem.error())


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
    path, _ = _path(at.kind, "both", at.damping, at.coarse, at.per_layer, at.steps)
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


# ---- the measured tables ------------------------------------------------------------------------------

SHOWN = {  # in the measured curves
    "Adam, then L-BFGS": "adam", "L-BFGS": "lbfgs", "K-FAC": "kfac", "coarse alone, 64": "coarse",
    "two levels, 64": "both", "exact": "exact",
}  # fmt: skip


@lru_cache(maxsize=1)
def measured_curves() -> dict[tuple[str, str], Curve]:
    """Loss over seconds on Poisson in two dimensions, and the last loss over columns per layer on every equation."""
    runs: dict[tuple[str, ...], Collection[Run]] = {}
    for key, rows in grouped(measured_rows("pde_runs.csv"), "problem", "method").items():
        tried = [(loss_of(row), row["damping"]) for row in rows if row["seed"] == TUNING_SEED]
        best = min(tried, default=(0.0, rows[0]["damping"]))[1]  # L-BFGS has nothing to tune
        kept = [row for row in rows if row["seed"] != TUNING_SEED and row["damping"] == best]
        runs[key] = grouped(kept, "seed").values()
    first = next(iter(runs))[0]
    times = np.geomspace(0.1, 3.9, 14)
    curves = {("seconds", key): curve(times, [_loss_at(times, run) for run in runs[first, name]])
              for name, key in SHOWN.items() if (first, name) in runs}  # fmt: skip
    last = {key: [float(run[-1]["loss"]) for run in found] for key, found in runs.items()}
    for problem in dict.fromkeys(problem for problem, _ in last):
        for key, name in (("coarse", "coarse alone"), ("both", "two levels")):
            found = {k: last.get((problem, f"{name}, {k}")) for k in (4, 16, 64)}
            if all(found.values()):
                curves[f"columns, {problem}", key] = curve(list(found), np.array(list(found.values())).T)
        for key, name in (("kfac", "K-FAC"), ("exact", "exact"), ("lbfgs", "L-BFGS")):
            if (problem, name) in last:
                curves[f"columns, {problem}", key] = curve([0], np.array(last[problem, name])[:, None])
    return curves


def _loss_at(times: NDArray, run: Run) -> NDArray:
    """The loss at these seconds, between the looks at a run on logarithmic scales."""
    seconds, losses = (np.log([max(float(row[key]), 1e-30) for row in run]) for key in ("seconds", "loss"))
    return np.exp(np.interp(np.log(times), seconds, losses))


@lru_cache(maxsize=1)
def cells() -> tuple[Cell, ...]:
    """The map, from networks and batches that grow downwards and to the right."""
    found: dict[tuple[str, int], dict[str, float]] = {}
    for row in measured_rows("pde_map.csv"):
        losses = found.setdefault((row["parameters"], int(row["points"])), {})
        losses[row["method"]] = min(loss_of(row), losses.get(row["method"], np.inf))
    return tuple(Cell(parameters, points, losses) for (parameters, points), losses in found.items())


# ---- the picture --------------------------------------------------------------------------------------

STYLES: dict[str, Style] = {
    "adam": METHODS["adam"]._replace(label="Adam, then L-BFGS"),
    "lbfgs": Style("L-BFGS", "#888888", "h", "--"),
    "kfac": METHODS["kfac"]._replace(label="K-FAC alone"),
    "coarse": Style("coarse alone", "#117733", "s", "--"),
    "both": METHODS["balanced"]._replace(label="two levels, balanced"),
    "exact": METHODS["exact"]._replace(label="exact step"),
}


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
        losses, both = (1e-10, 1e3), ("log", "log")
        self.loss = self.add(CurveView(
            self.figure.add_subplot(middle[0]), STYLES, result.of("loss"), "Loss over steps, here", x="steps",
            xlim=(0, steps), ylim=losses, scale=("linear", "log"),
        ))  # fmt: skip
        self.eigenvalues = self.add(CurveView(
            self.figure.add_subplot(middle[1]), STYLES, result.of("eigenvalues"), "Eigenvalues, preconditioned",
            x="rank (triangle: less)", xlim=(1, P), ylim=(1e-6, 1e3), scale=both,
        ))  # fmt: skip
        CurveView(
            self.figure.add_subplot(middle[2]), STYLES, result.of("seconds"), "Loss over seconds, 64 columns",
            x="processor seconds", xlim=(0.1, 4), ylim=losses, scale=both,
        )  # fmt: skip
        others = [empty_line(self.loss.ax, style, marker=style.marker)
                  for name, style in STYLES.items() if name not in LIVE]  # fmt: skip
        self.legend([*self.loss.lines.values(), *others], 6)
        below = grid[2].subgridspec(1, 2, width_ratios=(1, 1))
        self._build_columns(self.figure.add_subplot(below[0]), result)
        self._build_map(self.figure.add_subplot(below[1]), result)

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
        """The last loss over columns per layer, one colour for each level, one line for each equation."""
        quantities = dict.fromkeys(quantity for quantity, _ in result.curves if quantity.startswith("columns"))
        markers = dict(zip(quantities, "os^Dv", strict=False))
        for quantity, marker in markers.items():
            found = result.of(quantity)
            for name in ("coarse", "both"):
                if name in found:
                    c = found[name]
                    ax.plot(c.x, c.y, color=STYLES[name].color, linestyle=STYLES[name].line, marker=marker)
            for name, x in (("kfac", 1.0), ("lbfgs", 1.25), ("exact", 256.0)):
                if name in found:
                    ax.plot([x], found[name].y, color=STYLES[name].color, marker=marker, linestyle="none")
        title = "Loss after 4 seconds, over columns per layer"
        ax.set(xscale="log", yscale="log", xlim=(0.8, 9000), xlabel="columns per layer", title=title)
        ax.set_xticks([1.1, 4, 16, 64, 256], ["none", "4", "16", "64", "exact"])
        ax.minorticks_off()
        for quantity, marker in markers.items():
            ax.plot([], [], color=INK, marker=marker, linestyle="none", label=quantity.removeprefix("columns, "))
        ax.legend(loc="center right")

    def _build_map(self, ax: Axes, result: Result) -> None:
        gains, names = [], {}
        for cell in result.cells:
            row, column = f"{float(cell.parameters):,.0f}", f"{cell.points:,}"
            levels = {name: loss for name, loss in cell.losses.items() if name not in ("K-FAC", "exact")}
            gains.append((row, column, cell.losses["K-FAC"] / min(levels.values())))
            names[row, column] = cell
        missing = {(row, column) for row, *_ in gains for _, column, _ in gains} - {g[:2] for g in gains}
        gains += [(row, column, np.nan) for row, column in missing]
        view = MapView(
            ax, gains, "Times less loss than K-FAC, and what is first", x="points", y="parameters",
            limits=(1, 1e6), colour=np.log10, palette="Oranges", form=lambda x: "" if x != x else f"×{number(x, 1)}",
        )  # fmt: skip
        for text in ax.texts:
            x, y = text.get_position()
            cell = names.get((view.rows[int(y)], view.columns[int(x)]))
            if cell:
                text.set_text(f"{text.get_text()}\n{cell.first.replace(', ', ': ')}")

    def move(self, result: Result) -> None:
        for name, image in self.images.items():
            image.set_data(np.log10(np.abs(result.fields[name]).clip(1e-16)))
            self.texts[name].set_text(f"error {number(result.errors[name], 1)}")
        self.loss.update(result.of("loss"), at=result.parameters["at_step"])
        spectra = result.of("eigenvalues")
        absent = Curve(*[np.array([np.nan])] * 4)
        self.eigenvalues.update({name: spectra.get(name, absent) for name in self.eigenvalues.lines})

    def words(self, result: Result) -> str:
        told = ", ".join(f"{STYLES[name].label} {number(x, 1)}" for name, x in result.errors.items())
        first = "; ".join(f"{c.parameters} parameters, {c.points} points: {c.first}" for c in result.cells)
        return f"{super().words(result)} Relative errors at this step: {told}. First in the map: {first}."


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
