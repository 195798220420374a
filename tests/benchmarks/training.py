"""Training on small data: K-FAC, its KL product and two levels beside SGD, Adam, Muon, SOAP and Shampoo, tuned alike.

Rate, and λ where there is one, are those of a grid with the lowest loss of the whole training set at the end, on a seed
that is not measured; the grid is extended until its best is not at an end. Then five seeds. The digits that a network
is not trained on are its test. Mini-batches of 100 and full batches. The full batch takes the quadratic rule, whose
length is its own, so that K-FAC is tuned by its first λ alone. ``cause`` says what a run is for: ``tuning``,
``method``, or one of the variations that separate a better solve from heuristics and noise. A second table has the
steps to a target over the size of the batch, the rate tuned for each size. Processor seconds on one core; what is
there already is not measured again.

    python tests/benchmarks training [--minutes M] [--regimes …] [--problems …] [--methods …] [--skip-others]
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import torch
from machine import Table, arguments, clock, describe, write
from optimizers import muon, shampoo, soap
from tuning import Axis, tune

import kfac_viz as kv
from kfac_viz.studies.common.options import entry, remember

SEEDS, TUNING_SEED = range(5), 99
BATCH, STEPS = 100, {"mini": 600, "full": 100}
EVERY = {"mini": 30, "full": 5}
N, DIGITS = 1500, 1797  # to train on, and in all


KNOWN = {"standardised_on": N, "dtype": torch.float32}
PROBLEMS: dict[str, Callable[[int], kv.problems.Problem]] = {
    "classifier": lambda seed: kv.problems.digits((40, 40, 40), DIGITS, seed, **KNOWN),
    "autoencoder": lambda seed: kv.problems.autoencoder((40, 20, 8, 20, 40), DIGITS, seed, dtype=torch.float32),
    "deep classifier": lambda seed: kv.problems.digits((16,) * 12, DIGITS, seed, **KNOWN),
    "attention": lambda seed: kv.problems.attention(8, DIGITS, seed, **KNOWN),
    "convolutional": lambda seed: kv.problems.convolutional((8, 16), DIGITS, seed, **KNOWN),
}
OTHERS = {  # how each is made, and its options beside the rate
    "SGD": (lambda model, **options: torch.optim.SGD(model.parameters(), **options), {"momentum": 0.9}),
    "Adam": (lambda model, **options: torch.optim.Adam(model.parameters(), **options), {}),
    "Muon": (muon, {}),
    "SOAP": (soap, {"weight_decay": 0.0}),
    "Shampoo": (shampoo, {
        "betas": (0.9, 0.95), "moving_average_for_momentum": True, "graft_type": 3, "start_preconditioning_step": 1,
        "preconditioning_compute_steps": 10, "shape_interpretation": False,
    }),
}  # fmt: skip
LEVELS = {"K-FAC": {"per_layer": 0}, "K-FAC, KL": {"per_layer": 0, "factors": "kl"}, "two-level": {"per_layer": 4}}
METHODS = (*OTHERS, *LEVELS)


def _grid(*exponents: float) -> Axis:
    """Powers of ten, half a decade apart, and at most five more to each side."""
    start = tuple(10**exponent for exponent in exponents)
    return Axis(start, 10**0.5, (start[0] / 10**2.5, start[-1] * 10**2.5))


RATES = {"SGD": _grid(-1.5, -1.0, -0.5), "Shampoo": _grid(-3.0, -2.5, -2.0)}
RATES |= dict.fromkeys(("Adam", "Muon", "SOAP"), _grid(-2.5, -2.0, -1.5))
RATES |= dict.fromkeys(LEVELS, _grid(-1.0, -0.5, 0.0))
DAMPINGS = _grid(-2.0, -1.5, -1.0, -0.5)
UNUSED = {"rate": Axis((1.0,), ends=(1.0, 1.0)), "λ": Axis((0.0,), ends=(0.0, 0.0))}
QUADRATIC = {"step_rule": "quadratic", "observe_every": 1, "refresh_every": 1, "decay": 0.5, "coarse_window": 1,
             "coarse_examples": N}  # fmt: skip
CAUSES = {  # of K-FAC and of two levels, with their tuned rate and λ
    "exact vectors": {"fisher": "exact"},
    "λ adapted": QUADRATIC,
    "λ adapted, exact vectors": QUADRATIC | {"fisher": "exact"},
    "curvature of every batch": {"observe_every": 1, "refresh_every": 1, "coarse_window": 1},
}
CAUSE_PROBLEMS, CAUSE_METHODS = ("autoencoder", "deep classifier"), ("K-FAC", "two-level")
TARGETS = {"classifier": 0.05, "autoencoder": 20.0}
BATCHES, MOST_STEPS = (25, 100, 400, N), 1000
ALONG_BATCHES = ("SGD", "Adam", "K-FAC", "two-level")


def given(problem: kv.problems.Problem, method: str, options: dict) -> dict:
    """All options that :func:`build` gives to the optimizer of this name."""
    return (OTHERS[method][1] if method in OTHERS else {"likelihood": problem.likelihood}) | options


def build(problem: kv.problems.Problem, method: str, options: dict):
    """An optimizer by its name; every other name is a :class:`kfac_viz.TwoLevelKFAC` with these options."""
    options = given(problem, method, options)
    make = OTHERS[method][0] if method in OTHERS else kv.TwoLevelKFAC
    return make(problem.model, **options)


def remembered(problem: kv.problems.Problem, method: str, options: dict, folder: Path) -> str:
    """The name of these options in the folder's options.json; rate and λ have columns of their own."""
    opt = method if method in OTHERS else build(problem, method, options)
    return remember(entry(opt, given(problem, method, options), ("lr", "damping")), folder)


def train(problem: kv.problems.Problem, test: kv.problems.Problem, opt, steps: int, batch: int | None, seed: int,
          every: int, target: float = -math.inf) -> Iterator[dict]:  # fmt: skip
    """Losses on the whole training set and on the test set after every so many steps, gradient evaluations and the
    seconds that the steps took."""
    generator, seconds, evaluations = torch.Generator().manual_seed(seed), 0.0, 0
    curved = isinstance(opt, kv.TwoLevelKFAC)
    judged = curved and opt.options.step_rule == "quadratic"
    for step in range(1, steps + 1):
        chosen = slice(None) if batch is None else torch.randperm(len(problem.inputs), generator=generator)[:batch]
        x, y = problem.inputs[chosen], problem.targets[chosen]

        def closure(x=x, y=y) -> torch.Tensor:
            nonlocal evaluations
            evaluations += len(y)
            opt.zero_grad()
            loss = kv.nll(problem.model(x), y, problem.likelihood)
            loss.backward()
            return loss

        start = clock()
        if not judged:
            closure()
        if curved:
            opt.observe(x)
        opt.step(*[closure] if judged else [])
        seconds += clock() - start
        if step == steps or step % every == 0:
            loss, test_loss = (float(x.loss().detach()) for x in (problem, test))
            yield {"step": step, "gradients": evaluations, "seconds": round(seconds, 4), "loss": f"{loss:.4g}",
                   "test_loss": f"{test_loss:.4g}"}  # fmt: skip
            if not loss > target:
                return


def safely(rows: Iterator[dict]) -> list[dict]:
    """The rows of a run; one that blows up, which is told in words, ends with inf."""
    found = []
    try:
        for row in rows:
            found.append(row)
    except (ValueError, torch.linalg.LinAlgError):
        last = found[-1] if found else {"step": 0, "gradients": 0, "seconds": 0.0}
        found.append(last | {"loss": "inf", "test_loss": "inf"})
    return found


class Runs:
    """The first table: runs of a problem in a regime, and the settings that tuning finds."""

    def __init__(self, table: Table) -> None:
        self.table = table

    def run(self, cause: str, regime: str, problem: str, method: str, lr: float, damping: float, seed: int,
            extra: dict | None = None) -> float:  # fmt: skip
        """Make the run unless it is there; its last loss."""
        here = {"cause": cause, "regime": regime, "problem": problem, "method": method, "lr": lr, "damping": damping,
                "seed": seed}  # fmt: skip
        if self.table.missing(**here):
            options, (task, test) = self.options(regime, method, lr, damping, extra), PROBLEMS[problem](seed).split(N)
            batch = None if regime == "full" else BATCH
            name = remembered(task, method, options, self.table.path.parent)
            torch.manual_seed(seed)  # Shampoo's power iteration draws from it
            opt = build(task, method, options)
            rows = safely(train(task, test, opt, STEPS[regime], batch, seed, EVERY[regime]))
            self.table.add(rows[-1:] if cause == "tuning" else rows, **here, options=name)
        last = float(self.table.found(**here)[-1]["loss"])
        return last if last == last else math.inf

    @staticmethod
    def options(regime: str, method: str, lr: float, damping: float, extra: dict | None) -> dict:
        """What the optimizer is given, but for its likelihood."""
        if method not in LEVELS:
            return {"lr": lr}
        options = {"damping": damping, **LEVELS[method]} | (QUADRATIC if regime == "full" else {"lr": lr})
        options |= extra or {}
        if options.get("step_rule") == "quadratic":
            options.pop("lr", None)
        return options

    def tuned(self, regime: str, problem: str, method: str) -> tuple[float, float]:
        """Rate and λ with the lowest last loss on the seed that is not measured; the rate is 1 where it is unused."""
        free = method in LEVELS and regime == "full"
        axes = UNUSED["rate"] if free else RATES[method], DAMPINGS if method in LEVELS else UNUSED["λ"]
        best = tune(lambda *x: self.run("tuning", regime, problem, method, *map(told, x), TUNING_SEED), *axes)
        return tuple(map(told, best))


def told(x: float) -> float:
    """Rates and λ have one digit, as the table shows them: 0.1, 0.3, 1."""
    return float(f"{x:.1g}")


def batches(table: Table, runs: Runs) -> None:
    """Steps to a target over the size of the batch."""
    for problem, target in TARGETS.items():
        for method in ALONG_BATCHES:
            damping = runs.tuned("mini", problem, method)[1]
            for size in BATCHES:
                (best,) = tune(lambda lr, method=method, damping=damping, size=size, problem=problem, target=target:
                               steps_to(table, problem, method, told(lr), damping, size, TUNING_SEED, target),
                               RATES[method])  # fmt: skip
                best = told(best)
                for seed in SEEDS[:3]:
                    steps_to(table, problem, method, best, damping, size, seed, target)


def steps_to(table: Table, problem: str, method: str, lr: float, damping: float, size: int, seed: int,
             target: float) -> float:  # fmt: skip
    here = {"problem": problem, "method": method, "batch": size, "lr": lr, "damping": damping, "seed": seed}
    if table.missing(**here):
        task, test = PROBLEMS[problem](seed).split(N)
        options = {"lr": lr} | ({"damping": damping, **LEVELS[method]} if method in LEVELS else {})
        batch = None if size == N else size
        rows = safely(train(task, test, build(task, method, options), MOST_STEPS, batch, seed, 5, target))
        reached = float(rows[-1]["loss"]) <= target
        name = remembered(task, method, options, table.path.parent)
        last = {name: x for name, x in rows[-1].items() if name != "test_loss"}
        table.add([{**last, "target": target, "reached": int(reached)}], **here, options=name)
    row = table.found(**here)[-1]
    return float(row["step"]) if row["reached"] == "1" else math.inf


def small_runs() -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """Losses in training and test of short runs in double precision, without times: a test makes this table again."""
    settings = {"SGD": {"lr": 0.1}, "Adam": {"lr": 0.01}, "Muon": {"lr": 0.01}} | LEVELS
    for method, options in settings.items():
        problem, test = kv.problems.digits((6, 5), 90, side=4).split(60)
        rows = train(problem, test, build(problem, method, options), 12, 20, 0, 3)
        yield method, [(float(row["loss"]), float(row["test_loss"])) for row in rows]


def small(out: Path) -> None:
    rows = [{"method": method, "step": 3 * i, "loss": loss, "test_loss": test}
            for method, losses in small_runs() for i, (loss, test) in enumerate(losses, 1)]  # fmt: skip
    write(out / "training_small.csv", rows, {}, quiet=True)


def main(argv: list[str] | None = None) -> None:
    options, machine = arguments(__doc__, argv), describe()
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=1e6)
    parser.add_argument("--problems", nargs="*", default=list(PROBLEMS))
    parser.add_argument("--regimes", nargs="*", default=list(STEPS))
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--skip-others", action="store_true")
    own = parser.parse_known_args(argv)[0]
    deadline = time.monotonic() + 60 * own.minutes
    warnings.simplefilter("ignore")
    small(options.out)
    key = ("cause", "regime", "problem", "method", "lr", "damping", "seed")
    runs = Runs(Table(options.out / "training.csv", key, machine, deadline))
    for regime, problem, method in product(own.regimes, own.problems, own.methods):
        best = runs.tuned(regime, problem, method)
        for seed in SEEDS:
            runs.run("method", regime, problem, method, *best, seed)
    if own.skip_others:
        return
    for problem in CAUSE_PROBLEMS:
        for cause, extra in CAUSES.items():
            for method in CAUSE_METHODS:
                best = runs.tuned("mini", problem, method)
                for seed in SEEDS[:3]:
                    runs.run(cause, "mini", problem, method, *best, seed, extra)
    key = ("problem", "method", "batch", "lr", "damping", "seed")
    batches(Table(options.out / "training_batches.csv", key, machine, deadline), runs)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
