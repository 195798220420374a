"""Networks that solve differential equations: every method from the same start, by loss and error, steps and seconds.

Full batch, float64, tanh, one core, processor time. λ of every method (Adam's rate too) is the one of a common grid
that has the lowest loss after half of the time, on a seed that is not measured. What is there already is not measured
again: rows are appended run by run, and ``--minutes 5`` ends in time, to be gone on with.

    python tests/benchmarks pde [--minutes M] [--only small,two,map,more,peers]

The part ``peers`` compares with what others train such networks with, on their problem (arXiv 2505.12149, section 4):
Poisson's equation in 5 dimensions, fresh points at every step, and the error on points that no run has seen. Every
rival has up to six settings, the published ones among them; the one with the least error after 20 seconds on the seed
that is not measured is run. The package's own configuration is named beforehand.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import torch
from machine import Table, arguments, clock, describe, write

import kfac_viz as kv
from kfac_viz.studies.common.options import entry, remember
from kfac_viz.studies.pde import rivals, terms
from kfac_viz.studies.pde.descent import Method, training
from kfac_viz.studies.pde.rivals import Rival

SEEDS, TUNING_SEED = range(5), 99
DAMPINGS = (1.0, 1e-2, 1e-4, 1e-6, 1e-8)
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
SECONDS, TUNING = 4.0, 2.0
MARKS = [0.1 * 2 ** (k / 2) for k in range(20)]  # seconds at which a run is looked at

PROBLEMS: dict[str, Callable[[int], kv.problems.Equation]] = {
    "Poisson 2D": lambda seed: kv.problems.poisson(2, (40, 40, 40), 800, 200, seed),
    "heat 1+1D": lambda seed: kv.problems.heat(1, (40, 40, 40), 800, 200, seed),
    "Burgers 1+1D": lambda seed: kv.problems.burgers((40, 40, 40), 800, 200, seed),
    "Poisson 5D": lambda seed: kv.problems.poisson(5, (40, 40, 40), 800, 200, seed),
    "Poisson 10D": lambda seed: kv.problems.poisson(10, (40, 40, 40), 800, 200, seed),
}
ADAM_FIRST = "Adam, then L-BFGS"  # a third of the time
SIZES = (4, 16, 64)
CORE = {
    "Adam": Method("adam"),
    "L-BFGS": Method("lbfgs"),
    ADAM_FIRST: Method("adam"),
    "K-FAC": Method("kfac"),
    "K-FAC, quadratic": Method("kfac", length="quadratic"),
    "exact": Method("exact"),
    **{f"coarse alone, {k}": Method("coarse", per_layer=k) for k in SIZES},
    **{f"two levels, {k}": Method("both", per_layer=k) for k in SIZES},
}
FURTHER = {  # on the first problem: other columns, corrections, uses and lengths
    **{f"two levels, {name} 16": Method("both", name, 16) for name in ("nicolaides", "random")},
    "two levels, krylov 4": Method("both", "krylov", 4),
    **{f"two levels, {name} 16": Method("both", "spectral", 16, name) for name in ("additive", "a-def1", "a-def2")},
    "coarse alone, random 16": Method("coarse", "random", 16),
    "5 CG iterations, K-FAC": Method("kfac", iterations=5),
    "5 CG iterations, two levels 16": Method("both", per_layer=16, iterations=5),
    "two levels 16, quadratic": Method("both", per_layer=16, length="quadratic"),
    "two levels 16, least of a grid": Method("both", per_layer=16, length="least"),
    "K-FAC, least of a grid": Method("kfac", length="least"),
    "two levels 16, λ follows the loss": Method("both", per_layer=16, follow=True),
    "two levels, 16 on average": Method("both", "spectral in all", 16),
    "coarse alone, 16 on average": Method("coarse", "spectral in all", 16),
}
MAP_DAMPINGS = (1e-4, 1e-6)
MAP_SECONDS = {("1e3", 500): 3, ("1e3", 2500): 3, ("1e3", 10_000): 15, ("1e4", 500): 5, ("1e4", 2500): 8,
               ("1e4", 10_000): 25, ("1e5", 500): 10, ("1e5", 2500): 20}  # fmt: skip
WIDTHS, POINTS = {"1e3": (20, 20, 20), "1e4": (68, 68, 68), "1e5": (220, 220, 220)}, (500, 2500, 10_000)
MAP = {
    "K-FAC": Method("kfac"),
    "exact": Method("exact"),
    **{f"{name}, {k}": Method(kind, per_layer=k)
       for k in SIZES for name, kind in (("coarse alone", "coarse"), ("two levels", "both"))},
}  # fmt: skip

PEER_WIDTHS = (64, 64, 48, 48)
PEER_SECONDS, PEER_TUNING = 120.0, 20.0
PEER_MARKS = (1, 2, 3, 5, 7, 10, 14, 20, 30, 40, 60, 80, 100, 120)
PEERS = {  # the first setting is the published one
    "ENGD-W": [Rival("engd-w", λ) for λ in (3.2e-12, 1e-10, 1e-8, 1e-6)],
    "SPRING": [Rival("spring", λ, momentum=μ)
               for λ, μ in ((2.1e-10, 0.063), (6.8e-10, 0.83), (1e-8, 0.3), (1e-8, 0.8))],
    "K-FAC for PINNs": [
        Rival("kfac-pinns", λ, average=β)
        for λ, β in ((2.8e-10, 0.9), (1e-8, 0.9), (1e-6, 0.9), (1e-4, 0.9), (1e-6, 0.97), (1e-8, 0.99))
    ],
    "Nyström": [Rival("nystrom", λ, rank=100) for λ in (1e-7, 1e-6, 1e-4, 1e-2)],
}  # fmt: skip
FULL = {"likelihood": "gaussian", "fisher": "exact", "step_rule": "line_search", "observe_every": 1, "refresh_every": 1,
        "coarse_window": 1}  # fmt: skip
COLUMNS = FULL | {"rule": "eigen", "per_layer": 64}
OWN = {  # only the first setting is run on five seeds; that of the exact step is TwoLevelKFAC.for_equations
    "two levels": [COLUMNS | {"damping": 1e-2}]
    + [COLUMNS | {"iterations": i, "damping": λ} for λ, i in ((1e-6, 0), (1e-6, 5), (1e-8, 5), (1e-8, 10))],
    "exact step": [FULL | {"first_level": "exact", "damping": λ} for λ in (1e-6, 1e-8)],
    "K-FAC": [FULL | {"damping": λ} for λ in (1e-2, 1.0)],
}
PEER_POINTS = {  # and seeds of each
    1000: {"ENGD-W": 5, "SPRING": 5, "K-FAC for PINNs": 5, "two levels": 5, "exact step": 5, "K-FAC": 5, "Nyström": 5},
    500: {"exact step": 5, "ENGD-W": 5, "SPRING": 5, "K-FAC for PINNs": 5, "two levels": 5},
    3500: {"exact step": 5, "ENGD-W": 5, "SPRING": 5, "K-FAC for PINNs": 5, "two levels": 5},
}


def run(problem: kv.problems.Equation, name: str, method: Method, damping: float, seconds: float) -> Iterator[dict]:
    """What is seen at the marks, and at the end of the run."""
    used, step, evaluations, marks = 0.0, 0, 0, iter(MARKS)
    mark, ended, steps = next(marks), "", training(problem, method, damping)
    while used < seconds and not ended:
        start = clock()
        try:
            evaluations = next(steps)
            step += 1
        except StopIteration:
            ended = "up at every length"
        except ValueError as error:
            ended = str(error).split(";")[0]
        used += clock() - start
        if name == ADAM_FIRST and method.kind == "adam" and used > seconds / 3:
            method = Method("lbfgs")
            steps = training(problem, method, damping)
        if used >= mark or used >= seconds or ended:
            yield {
                "step": step,
                "evaluations": evaluations,
                "seconds": round(used, 3),
                "loss": f"{float(problem.loss().detach()):.4g}",
                "error": f"{problem.error():.4g}",
                "ended": ended,
            }
            while used >= mark:
                mark = next(marks, 1e9)


def remembered(method: Method, folder: Path) -> str:
    """The name of a method's options in the folder's options.json; λ, or the rate, has a column of its own."""
    asked = {name: value for name, value in method._asdict().items() if value != Method._field_defaults.get(name)}
    return remember(entry("Method", asked, ("damping",)), folder)


def tuned(table: Table, setting: dict, problem: Callable, name: str, method: Method, seconds: float) -> float:
    """The λ, or the rate, of the grid with the lowest loss on the seed that is not measured."""
    grid = {"adam": RATES, "lbfgs": (1.0,)}.get(method.kind, DAMPINGS)
    if len(grid) == 1:
        return grid[0]
    final = {}
    for damping in grid:
        here = {**setting, "method": name, "damping": damping, "seed": TUNING_SEED}
        if table.missing(**here):
            rows = list(run(problem(TUNING_SEED), name, method, damping, seconds))[-1:]
            table.add(rows, **here, options=remembered(method, table.path.parent))
        final[damping] = float(table.found(**here)[-1]["loss"])
    return min(final, key=lambda d: final[d] if final[d] == final[d] else float("inf"))


def runs(out: Path, machine: dict, deadline: float, problems: tuple[str, ...]) -> None:
    table = Table(out / "pde_runs.csv", ("problem", "method", "damping", "seed"), machine, deadline)
    for problem in problems:
        build = PROBLEMS[problem]
        for name, method in (CORE | FURTHER if problem == "Poisson 2D" else CORE).items():
            damping = tuned(table, {"problem": problem}, build, name, method, TUNING)
            for seed in SEEDS:
                here = {"problem": problem, "method": name, "damping": damping, "seed": seed}
                if table.missing(**here):
                    rows = run(build(seed), name, method, damping, SECONDS)
                    table.add(rows, **here, options=remembered(method, out))


def the_map(out: Path, machine: dict, deadline: float) -> None:
    """Columns × points × parameters, one seed, the better of two λ; cells with larger products have more time."""
    key = ("parameters", "points", "method", "damping", "seed")
    table = Table(out / "pde_map.csv", key, machine, deadline)
    for parameters, widths in WIDTHS.items():
        for points in POINTS:
            if (parameters, points) not in MAP_SECONDS:
                continue  # a step takes as long as all of a run
            for name, method in MAP.items():
                for damping in MAP_DAMPINGS:
                    here = {"parameters": parameters, "points": points, "method": name, "damping": damping, "seed": 0}
                    if table.missing(**here):
                        problem = kv.problems.poisson(2, widths, points * 4 // 5, points // 5, 0)
                        seconds = MAP_SECONDS[parameters, points]
                        rows = list(run(problem, name, method, damping, seconds))[-1:]
                        table.add(rows, **here, options=remembered(method, out))


def peer_problem(points: int, seed: int) -> kv.problems.Equation:
    """Theirs: so many points in all, a fifth of them on the boundary."""
    return kv.problems.poisson(5, PEER_WIDTHS, points - points // 5, points // 5, seed, term_weights=(1.0, 1.0))


def peer_steps(problem: kv.problems.Equation, setting: Rival | dict, seed: int) -> Iterator[object]:
    """Train on points that are drawn anew for each step, the same ones for every method."""

    def drawn(step: int) -> kv.problems.Equation:
        return problem.resampled(1_000_003 * (seed + 1) + step)

    if isinstance(setting, Rival):
        yield from rivals.training(problem, setting, lambda step: drawn(step).inputs, seed)
        return
    opt = kv.TwoLevelKFAC(problem.model, **setting)
    for step in count():
        batch = drawn(step)
        opt.observe(batch.inputs)
        yield opt.step(batch.closure(opt))


def peer_run(points: int, setting: Rival | dict, seed: int, seconds: float) -> Iterator[dict]:
    """Step, seconds and error at the marks, and at the end."""
    problem = peer_problem(points, seed)
    used, step, ended, marks = 0.0, 0, "", iter(PEER_MARKS)
    mark, steps = next(marks), peer_steps(problem, setting, seed)
    while used < seconds and not ended:
        start = clock()
        try:
            next(steps)
            step += 1
        except (ValueError, torch.linalg.LinAlgError):
            ended = "singular"
        used += clock() - start
        if used >= mark or used >= seconds or ended:
            yield {"step": step, "seconds": round(used, 3), "error": f"{problem.error():.4g}", "ended": ended}
            while used >= mark:
                mark = next(marks, 1e9)


def label(setting: Rival | dict) -> str:
    """λ, and SPRING's momentum, the weight of K-FAC's averages, or the iterations of two levels."""
    if isinstance(setting, Rival):
        return f"{setting.damping:g}, {setting.momentum or setting.average:g}"
    return f"{setting['damping']:g}, {setting.get('iterations', 0)}"


def peer_entry(setting: Rival | dict) -> dict:
    """What options.json says of a run with this setting."""
    return entry("Rival", setting._asdict()) if isinstance(setting, Rival) else entry("TwoLevelKFAC", setting)


def peers(
    out: Path, machine: dict, deadline: float, asked: tuple[str, ...], points: tuple[int, ...], seeds: tuple[int, ...]
) -> None:
    """Every method on the peers' problem; the setting is chosen with 1,000 points."""
    table = Table(out / "pde_peers.csv", ("points", "method", "setting", "seed"), machine, deadline)

    def made(points: int, name: str, setting: Rival | dict, seed: int, seconds: float) -> list[dict[str, str]]:
        here = {"points": points, "method": name, "setting": label(setting), "seed": seed}
        if table.missing(**here):
            options = remember(peer_entry(setting), out)
            table.add(list(peer_run(points, setting, seed, seconds)), **here, options=options)
        return table.found(**here)

    def tuned(name: str) -> Rival | dict:
        settings = (PEERS | OWN)[name]
        last = [made(1000, name, setting, TUNING_SEED, PEER_TUNING)[-1] for setting in settings]
        errors = [float("inf") if row["ended"] or row["error"] == "nan" else float(row["error"]) for row in last]
        return settings[0 if name in OWN else errors.index(min(errors))]

    for size in points:
        for seed in seeds:
            for name, measured in PEER_POINTS[size].items():
                if name in asked and seed < measured:
                    setting = tuned(name)
                    made(size, name, setting, seed, PEER_SECONDS)


def small(out: Path) -> None:
    """Losses and errors after each of some steps on small networks, without times: a test makes this table again."""
    rows = [{"equation": equation, "method": name, "step": step, "loss": f"{loss:.3g}", "error": f"{error:.3g}"}
            for equation, name, seen in small_runs() for step, (loss, error) in enumerate(seen, 1)]  # fmt: skip
    write(out / "pde_small.csv", rows, {}, quiet=True)


def small_runs() -> Iterator[tuple[str, str, list[tuple[float, float]]]]:
    """Equation, method, and loss and error after each step."""
    builders = {"poisson": lambda: kv.problems.poisson(2, (8, 8), 30),
                "burgers": lambda: kv.problems.burgers((8, 8), 30)}  # fmt: skip
    methods = {"K-FAC": Method("kfac"), "coarse alone, 4": Method("coarse", per_layer=4),
               "two levels, 4": Method("both", per_layer=4), "exact": Method("exact")}  # fmt: skip
    rivals_on_small = {"ENGD-W": Rival("engd-w", 1e-4), "SPRING": Rival("spring", 1e-4, momentum=0.3),
                       "K-FAC for PINNs": Rival("kfac-pinns", 1e-2, average=0.9)}  # fmt: skip
    for equation, build in builders.items():
        for name, method in methods.items():
            problem = build()
            steps = training(problem, method, 1e-4)
            yield equation, name, [(float(problem.loss().detach()), problem.error())
                                   for _ in zip(range(6), steps, strict=False)]  # fmt: skip
        for name, rival in rivals_on_small.items():
            problem = build()
            steps = rivals.training(problem, rival, lambda _: problem.inputs)  # noqa: B023
            yield equation, name, [(terms.loss(problem, problem.inputs), problem.error())
                                   for _ in zip(range(6), steps, strict=False)]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    options, machine = arguments(__doc__, argv), describe()
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=1e6)
    parser.add_argument("--only", default="small,two,map,more,peers")
    parser.add_argument("--methods", default=",".join(PEERS | OWN), help="of the part peers")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="of the part peers")
    parser.add_argument("--points", default=",".join(map(str, PEER_POINTS)), help="of the part peers")
    own = parser.parse_known_args(argv)[0]
    deadline = time.monotonic() + 60 * own.minutes
    warnings.simplefilter("ignore")
    names = tuple(PROBLEMS)
    for part in own.only.split(","):
        if part == "small":
            small(options.out)
        elif part == "map":
            the_map(options.out, machine, deadline)
        elif part == "peers":
            points, seeds = (tuple(map(int, x.split(","))) for x in (own.points, own.seeds))
            peers(options.out, machine, deadline, tuple(own.methods.split(",")), points, seeds)
        else:
            runs(options.out, machine, deadline, {"two": names[:3], "more": names[3:]}[part])


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
