"""The evidence behind the optimizer's defaults: each option varied alone, the others left as they are.

Mini-batches of digits, on seeds that the benchmark ``training`` does not use: its classifier and its autoencoder, and
a classifier of 12 narrow layers, which few methods train reliably. The loss is that of the whole training set after
the last step.

    python tests/benchmarks defaults
"""

from __future__ import annotations

import statistics
import warnings

import torch
from machine import arguments, describe, write
from training import PROBLEMS, build, train

import kfac_viz as kv

TASKS = PROBLEMS | {"deep classifier": lambda seed: kv.problems.digits((16,) * 12, 1500, seed, dtype=torch.float32)}
STEPS, BATCH, SEEDS = 1000, 128, (100, 101, 102)
VARIED: dict[str, tuple] = {
    "lr": (0.1, 1.0),
    "damping": (0.01, 0.03, 0.3, 1.0),
    "momentum": (0.0, 0.5, 0.95),
    "kl_clip": (1e-4, 3e-4, 3e-3, 1e-2),
    "rule": ("eigen",),
    "coarse": ("nicolaides", "random", "krylov"),
    "per_layer": (0, 1, 2, 8),
    "correction": ("additive", "a-def1", "a-def2"),
    "coarse_operator": ("kronecker",),
    "samples": (2, 4),
    "decay": (0.9, 0.99),
    "observe_every": (1, 2, 10),
    "refresh_every": (5, 20, 50),
    "coarse_window": (1, 2, 8, 16),
    "coarse_examples": (128, 256),
}


def main(argv: list[str] | None = None) -> None:
    options, machine, rows = arguments(__doc__, argv), describe(), []
    warnings.simplefilter("ignore")
    variants = [{}, *({option: value} for option, values in VARIED.items() for value in values)]
    for variant in variants:
        for task, make in TASKS.items():
            ends = []
            for seed in SEEDS:
                problem = make(seed)
                try:
                    ends += train(problem, build(problem, "", variant), STEPS, BATCH, seed, STEPS)
                except ValueError as error:  # told in words: the run blew up
                    print(f"{task}, {variant}, seed {seed}: {error}")
                    ends.append({"loss": float("inf"), "seconds": float("nan")})
            losses = [end["loss"] for end in ends]
            rows.append(
                {
                    "task": task,
                    "option": next(iter(variant), "defaults"),
                    "value": next(iter(variant.values()), ""),
                    "median_loss": statistics.median(losses),
                    "least_loss": min(losses),
                    "largest_loss": max(losses),
                    "seconds": round(statistics.median(end["seconds"] for end in ends), 2),
                }
            )
    write(options.out / "defaults.csv", rows, machine)


if __name__ == "__main__":
    main()
