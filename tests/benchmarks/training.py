"""Training on small data: two levels beside one, Adam and SGD, every method tuned by one rule on one budget.

Rate, and λ where there is one, are those of a grid with the lowest loss of the whole training set at the end, on a seed
that is not measured; then five seeds. Mini-batches of 100 and full batches. The full batch takes the quadratic rule,
whose length is its own, so that K-FAC is tuned by its first λ alone. ``cause`` says what a run is for: ``tuning``,
``method``, or one of the variations that separate a better solve from heuristics and noise. A second table has the
steps to a target over the size of the batch, the rate tuned for each size. Processor seconds on one core; what is
there already is not measured again.

    python tests/benchmarks training [--minutes M]
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from machine import Table, arguments, clock, describe, write

import kfac_viz as kv
from kfac_viz.studies.common.options import entry, remember

SEEDS, TUNING_SEED = range(5), 99
BATCH, STEPS = 100, {"mini": 600, "full": 100}
EVERY = {"mini": 30, "full": 5}
N = 1500


PROBLEMS: dict[str, Callable[[int], kv.problems.Problem]] = {
    "classifier": lambda seed: kv.problems.digits((40, 40, 40), N, seed, dtype=torch.float32),
    "autoencoder": lambda seed: kv.problems.autoencoder((40, 20, 8, 20, 40), N, seed, dtype=torch.float32),
    "deep classifier": lambda seed: kv.problems.digits((16,) * 12, N, seed, dtype=torch.float32),
    "attention": lambda seed: kv.problems.attention(8, N, seed, dtype=torch.float32),
    "convolutional": lambda seed: kv.problems.convolutional((8, 16), N, seed, dtype=torch.float32),
}
RATES = {"SGD": (0.03, 0.1, 0.3), "Adam": (1e-3, 3e-3, 1e-2, 3e-2), "K-FAC": (0.1, 0.3, 1.0)}
DAMPINGS = (0.01, 0.03, 0.1, 0.3)
LEVELS = {"K-FAC": {"per_layer": 0}, "two-level": {"per_layer": 4}}
METHODS = ("SGD", "Adam", *LEVELS)
QUADRATIC = {"step_rule": "quadratic", "observe_every": 1, "refresh_every": 1, "decay": 0.5, "coarse_window": 1,
             "coarse_examples": N}  # fmt: skip
CAUSES = {  # of K-FAC and of two levels, with their tuned rate and λ
    "exact vectors": {"fisher": "exact"},
    "λ adapted": QUADRATIC,
    "λ adapted, exact vectors": QUADRATIC | {"fisher": "exact"},
    "curvature of every batch": {"observe_every": 1, "refresh_every": 1, "coarse_window": 1},
}
CAUSE_PROBLEMS = ("classifier", "autoencoder", "deep classifier")
TARGETS = {"classifier": 0.05, "autoencoder": 20.0}
BATCHES, MOST_STEPS = (25, 100, 400, N), 1000


def given(problem: kv.problems.Problem, method: str, options: dict) -> dict:
    """All options that :func:`build` gives to the optimizer of this name."""
    own = {"Adam": {}, "SGD": {"momentum": 0.9}}
    return own.get(method, {"likelihood": problem.likelihood}) | options


def build(problem: kv.problems.Problem, method: str, options: dict) -> torch.optim.Optimizer:
    """An optimizer by its name; every other name is a :class:`kfac_viz.TwoLevelKFAC` with these options."""
    options = given(problem, method, options)
    if method in ("Adam", "SGD"):
        return getattr(torch.optim, method)(problem.model.parameters(), **options)
    return kv.TwoLevelKFAC(problem.model, **options)


def remembered(problem: kv.problems.Problem, method: str, options: dict, folder: Path) -> str:
    """The name of these options in the folder's options.json; rate and λ have columns of their own."""
    opt = build(problem, method, options)
    return remember(entry(opt, given(problem, method, options), ("lr", "damping")), folder)


def train(problem: kv.problems.Problem, opt, steps: int, batch: int | None, seed: int, every: int,
          target: float = -math.inf) -> Iterator[dict]:  # fmt: skip
    """Losses on the whole set after every so many steps, gradient evaluations and the seconds that the steps took."""
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
        opt.step(closure if judged else None)
        seconds += clock() - start
        if step == steps or step % every == 0:
            loss = float(problem.loss().detach())
            yield {"step": step, "gradients": evaluations, "seconds": round(seconds, 4), "loss": f"{loss:.4g}"}
            if not loss > target:
                return


def safely(rows: Iterator[dict]) -> list[dict]:
    """The rows of a run; one that blows up, which is told in words, ends with inf."""
    found = []
    try:
        for row in rows:
            found.append(row)
    except ValueError:
        pass
    return found or [{"step": 0, "gradients": 0, "seconds": 0.0, "loss": "inf"}]


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
            options, task = self.options(regime, method, lr, damping, extra), PROBLEMS[problem](seed)
            batch = None if regime == "full" else BATCH
            opt = build(task, method, options)
            rows = safely(train(task, opt, STEPS[regime], batch, seed, EVERY[regime]))
            name = remembered(task, method, options, self.table.path.parent)
            self.table.add(rows[-1:] if cause == "tuning" else rows, **here, options=name)
        last = self.table.found(**here)[-1]["loss"]
        return float(last) if last != "nan" else math.inf

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
        if method in LEVELS:
            rates = (1.0,) if regime == "full" else RATES["K-FAC"]
            grid = [(lr, damping) for lr in rates for damping in DAMPINGS]
        else:
            grid = [(lr, 0.0) for lr in RATES[method]]
        losses = {pair: self.run("tuning", regime, problem, method, *pair, TUNING_SEED) for pair in grid}
        return min(losses, key=losses.get)


def batches(table: Table, runs: Runs) -> None:
    """Steps to a target over the size of the batch."""
    for problem, target in TARGETS.items():
        for method in METHODS:
            damping = runs.tuned("mini", problem, method)[1]
            for size in BATCHES:
                steps = {lr: steps_to(table, problem, method, lr, damping, size, TUNING_SEED, target)
                         for lr in RATES.get(method, RATES["K-FAC"])}  # fmt: skip
                best = min(steps, key=steps.get)
                for seed in SEEDS[:3]:
                    steps_to(table, problem, method, best, damping, size, seed, target)


def steps_to(table: Table, problem: str, method: str, lr: float, damping: float, size: int, seed: int,
             target: float) -> float:  # fmt: skip
    here = {"problem": problem, "method": method, "batch": size, "lr": lr, "damping": damping, "seed": seed}
    if table.missing(**here):
        task = PROBLEMS[problem](seed)
        options = {"lr": lr} | ({"damping": damping, **LEVELS[method]} if method in LEVELS else {})
        batch = None if size == N else size
        rows = safely(train(task, build(task, method, options), MOST_STEPS, batch, seed, 5, target))
        reached = float(rows[-1]["loss"]) <= target
        name = remembered(task, method, options, table.path.parent)
        table.add([{**rows[-1], "target": target, "reached": int(reached)}], **here, options=name)
    row = table.found(**here)[-1]
    return float(row["step"]) if row["reached"] == "1" else math.inf


def small_runs() -> Iterator[tuple[str, list[float]]]:
    """Losses of short runs in double precision, without times: a test makes this table again."""
    settings = {"SGD": {"lr": 0.1}, "Adam": {"lr": 0.01}, "K-FAC": {"per_layer": 0}, "two-level": {"per_layer": 4}}
    for method, options in settings.items():
        problem = kv.problems.digits((6, 5), 60, side=4)
        rows = train(problem, build(problem, method, options), 12, 20, 0, 3)
        yield method, [float(row["loss"]) for row in rows]


def small(out: Path) -> None:
    rows = [{"method": method, "step": 3 * i, "loss": loss} for method, losses in small_runs()
            for i, loss in enumerate(losses, 1)]  # fmt: skip
    write(out / "training_small.csv", rows, {}, quiet=True)


def main(argv: list[str] | None = None) -> None:
    options, machine = arguments(__doc__, argv), describe()
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=1e6)
    deadline = time.monotonic() + 60 * parser.parse_known_args(argv)[0].minutes
    warnings.simplefilter("ignore")
    small(options.out)
    key = ("cause", "regime", "problem", "method", "lr", "damping", "seed")
    runs = Runs(Table(options.out / "training.csv", key, machine, deadline))
    for problem in PROBLEMS:
        for regime in STEPS:
            for method in METHODS:
                best = runs.tuned(regime, problem, method)
                for seed in SEEDS:
                    runs.run("method", regime, problem, method, *best, seed)
    for problem in CAUSE_PROBLEMS:
        for cause, extra in CAUSES.items():
            for method in LEVELS:
                best = runs.tuned("mini", problem, method)
                for seed in SEEDS[:3]:
                    runs.run(cause, "mini", problem, method, *best, seed, extra)
    key = ("problem", "method", "batch", "lr", "damping", "seed")
    batches(Table(options.out / "training_batches.csv", key, machine, deadline), runs)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
