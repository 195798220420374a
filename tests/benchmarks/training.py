"""Training with the defaults: stability of long mini-batch runs, and steps and seconds of full-batch runs.

Digits classifier and digits autoencoder, five seeds. Mini-batch: two-level defaults, one-level K-FAC with the same
defaults, the 2020 choice, and Adam and SGD with the best of a grid of learning rates; also on a classifier of 12
narrow layers, which few methods train reliably. Full batch: the quadratic rule with closure. The losses are those of
the whole training set.

    python tests/benchmarks training
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable

import torch
from machine import arguments, clock, describe, show, write

import kfac_viz as kv

SEEDS = range(5)
RATES = {"Adam": (1e-3, 3e-3, 1e-2, 3e-2), "SGD": (0.03, 0.1, 0.3, 1.0)}
PROBLEMS: dict[str, Callable[[int], kv.problems.Problem]] = {
    "classifier": lambda seed: kv.problems.digits((40, 40, 40), 1500, seed, dtype=torch.float32),
    "autoencoder": lambda seed: kv.problems.autoencoder((40, 20, 8, 20, 40), 1500, seed, dtype=torch.float32),
    "deep classifier": lambda seed: kv.problems.digits((16,) * 12, 1500, seed, dtype=torch.float32),
}
FULL = {
    "step_rule": "quadratic",
    "observe_every": 1,
    "refresh_every": 1,
    "coarse_window": 1,
    "coarse_examples": 1500,  # all of them
    "decay": 0.5,
}
VECTORS = {"exact vectors": {"fisher": "exact"}, "1 label": {}, "10 labels": {"samples": 10}}  # of every example
GOALS = {  # the losses to which steps and seconds are counted
    "mini_batch": {"classifier": 1e-4, "autoencoder": 17.5, "deep classifier": 0.5},
    "full_batch": {"classifier": 1e-3, "autoencoder": 18.0},
}
MINI = {"two-level defaults": {}, "one-level K-FAC": {"per_layer": 0}, "as published 2020": {"published": True}}


def build(problem: kv.problems.Problem, method: str, options: dict) -> torch.optim.Optimizer:
    parameters = problem.model.parameters()
    if method == "Adam":
        return torch.optim.Adam(parameters, **options)
    if method == "SGD":
        return torch.optim.SGD(parameters, momentum=0.9, **options)
    options = dict(options)
    kind = kv.TwoLevelKFAC.as_published_2020 if options.pop("published", False) else kv.TwoLevelKFAC
    return kind(problem.model, likelihood=problem.likelihood, **options)


def train(problem: kv.problems.Problem, opt, steps: int, batch: int | None, seed: int, every: int) -> list[dict]:
    """Losses on the whole set after every so many steps, and the seconds that the steps took so far."""
    generator, rows, seconds = torch.Generator().manual_seed(seed), [], 0.0
    two_level = isinstance(opt, kv.TwoLevelKFAC)
    for step in range(1, steps + 1):
        chosen = slice(None) if batch is None else torch.randperm(len(problem.inputs), generator=generator)[:batch]
        x, y = problem.inputs[chosen], problem.targets[chosen]

        def closure(x=x, y=y) -> torch.Tensor:
            opt.zero_grad()
            loss = kv.nll(problem.model(x), y, problem.likelihood)
            loss.backward()
            return loss

        start = clock()
        if batch or not two_level:
            closure()
        if two_level:
            opt.observe(x)
        opt.step(closure if two_level and not batch else None)
        seconds += clock() - start
        if step == steps or step % (every if batch or step <= 200 else 10 * every) == 0:
            rows.append(
                {"step": step, "loss": float(f"{float(problem.loss().detach()):.4g}"), "seconds": round(seconds, 3)}
            )
    return rows


def best_rate(task: str, method: str, steps: int, batch: int | None) -> float:
    """The rate of the grid with the lowest loss at the end, on a seed that is not measured."""
    final = {}
    for lr in RATES[method]:
        problem = PROBLEMS[task](99)
        final[lr] = train(problem, build(problem, method, {"lr": lr}), steps, batch, 99, steps)[-1]["loss"]
    return min(final, key=lambda lr: final[lr] if final[lr] == final[lr] else float("inf"))


def summary(rows: list[dict], goals: dict[str, float]) -> list[dict]:
    """Per task and method over the seeds: loss at the end, worst loss of the second half, steps and seconds to the
    goal where it is reached."""
    table = []
    for task, goal in goals.items():
        mine = [row for row in rows if row["task"] == task]
        runs = {
            (r["method"], r["seed"]): [x for x in mine if (x["method"], x["seed"]) == (r["method"], r["seed"])]
            for r in mine
        }
        methods = list(dict.fromkeys(method for method, _ in runs))
        for m in methods:
            ends = [runs[m, s][-1]["loss"] for s in SEEDS]
            reached = [next((x for x in runs[m, s] if x["loss"] <= goal), None) for s in SEEDS]
            found = [x for x in reached if x]
            table.append(
                {
                    "task": task,
                    "method": m,
                    "median_end": statistics.median(ends),
                    "least_end": min(ends),
                    "worst_end": max(ends),
                    "worst_second_half": max(x["loss"] for s in SEEDS for x in runs[m, s][len(runs[m, s]) // 2 :]),
                    "goal": goal,
                    "seeds_reaching": len(found),
                    "steps": statistics.median(x["step"] for x in found) if found else "",
                    "seconds": statistics.median(x["seconds"] for x in found) if found else "",
                }
            )
    return table


def main(argv: list[str] | None = None) -> None:
    options, machine = arguments(__doc__, argv), describe()
    warnings.simplefilter("ignore")
    full = {
        f"{level}, {vectors}": FULL | options | chosen
        for vectors, chosen in VECTORS.items()
        for level, options in (("two-level", {}), ("one-level K-FAC", {"per_layer": 0}))
    }
    for regime, methods, steps, batch, every in (
        ("mini_batch", MINI, 1500, 128, 50),
        ("full_batch", full, 60, None, 2),
    ):
        rows = []
        for task in GOALS[regime]:
            todo = {k: v for k, v in methods.items() if task == "classifier" or "exact" not in k}
            for method in RATES:  # twenty times the steps for methods whose steps are cheap
                scale = 20 if batch is None else 1
                todo[method] = {"lr": best_rate(task, method, steps * scale, batch)}
            for method, settings in todo.items():
                scale = 20 if batch is None and method in RATES else 1
                for seed in SEEDS:
                    problem = PROBLEMS[task](seed)
                    opt = build(problem, method, settings)
                    found = train(problem, opt, steps * scale, batch, seed, every)
                    label = f"{method}, lr {settings['lr']:g}" if method in RATES else method
                    rows += [{"task": task, "method": label, "seed": seed, **row} for row in found]
        show(summary(rows, GOALS[regime]))
        write(options.out / f"training_{regime}.csv", rows, machine, quiet=True)


if __name__ == "__main__":
    main()
