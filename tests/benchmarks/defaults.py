"""The evidence behind the optimizer's defaults: each option varied alone beside 4 eigenvectors per layer.

The tasks of the benchmark ``training`` in mini-batches, on seeds that it does not use. The loss is that of the whole
training set after the last step.

    python tests/benchmarks defaults
"""

from __future__ import annotations

import statistics
import warnings
from pathlib import Path

from machine import arguments, describe, write
from training import CAUSE_PROBLEMS, PROBLEMS, build, given, train

from kfac_viz.studies.common.options import entry, remember

STEPS, BATCH, SEEDS = 1000, 128, (100, 101, 102)
BASE = {"per_layer": 4}
VARIED: dict[str, tuple] = {
    "lr": (0.1, 1.0),
    "damping": (0.03, 0.3, 1.0),
    "momentum": (0.5, 0.95),
    "kl_clip": (2e-4, 1e-3, 3e-3),
    "rule": ("eigen",),
    "coarse": ("nicolaides", "random", "krylov"),
    "per_layer": (0, 1, 8),
    "correction": ("additive", "a-def1", "a-def2"),
    "coarse_operator": ("kronecker",),
    "samples": (4,),
    "decay": (0.9, 0.99),
    "observe_every": (1, 10),
    "refresh_every": (20,),
    "coarse_window": (1, 8),
    "coarse_examples": (256,),
}


def remembered(task: str, variant: dict, folder: Path) -> str:
    """The name of the options of these runs in the folder's options.json."""
    problem, options = PROBLEMS[task](SEEDS[0]), BASE | variant
    return remember(entry(build(problem, "", options), given(problem, "", options)), folder)


def main(argv: list[str] | None = None) -> None:
    options, machine, rows = arguments(__doc__, argv), describe(), []
    warnings.simplefilter("ignore")
    variants = [{}, *({option: value} for option, values in VARIED.items() for value in values)]
    for variant in variants:
        for task in CAUSE_PROBLEMS:
            make, ends = PROBLEMS[task], []
            for seed in SEEDS:
                problem = make(seed)
                try:
                    ends += list(train(problem, build(problem, "", BASE | variant), STEPS, BATCH, seed, STEPS))
                except ValueError as error:  # told in words: the run blew up
                    print(f"{task}, {variant}, seed {seed}: {error}")
                    ends.append({"loss": "inf", "seconds": float("nan")})
            losses = [float(end["loss"]) for end in ends]
            rows.append(
                {
                    "task": task,
                    "option": next(iter(variant), "base"),
                    "value": next(iter(variant.values()), ""),
                    "median_loss": statistics.median(losses),
                    "least_loss": min(losses),
                    "largest_loss": max(losses),
                    "seconds": round(statistics.median(end["seconds"] for end in ends), 2),
                    "options": remembered(task, variant, options.out),
                }
            )
    write(options.out / "defaults.csv", rows, machine)


if __name__ == "__main__":
    main()
