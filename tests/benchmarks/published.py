"""The comparisons of the 2020 paper and the 2023 study: their methods as published, with their faults mended one at a
time, and ours.

The toy problem of the paper's code (25,000 points, batches of 500, statistics of every batch, a refresh every five
steps, as in that code's own grid search for the autoencoder): three depths, linear and tanh, ten seeds, 150 steps. The
deep autoencoder on 5,000 digits of MNIST: three seeds, a budget of processor seconds, L2 of 1e-5, once as in Martens'
demonstration (tanh, sparse weights, a batch that grows) and once as in Goldfarb et al. 2020 (ReLU, batches of 1,000).
The loss there is a sum over pixels, 784 times the mean that the code of 2020 takes; λ and the clip are as much larger.

One rule tunes every method: the settings of a grid with the lowest loss of the whole set at the end, on a seed that is
not measured. Processor seconds on one core; what is there already is not measured again.

    python tests/benchmarks published [--minutes M] [--part toy]
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from machine import Table, arguments, clock, describe, write
from optimizers import muon

import kfac_viz as kv
from kfac_viz.studies.common.options import entry, remember
from kfac_viz.studies.published import deep_autoencoder, toy
from kfac_viz.studies.published.optimizer import FAULTS, Published

TUNING_SEED = 99
TOYS = {(name, depth): act for name, act in (("linear", None), ("tanh", "tanh")) for depth in (4, 10, 18)}
TOY_STEPS, TOY_EVERY, TOY_BATCH, TOY_SEEDS = 150, 15, 500, range(10)
KL_CLIP = 1e-2  # of that code's arguments, and for ours as well
REGIMES = {"tanh, growing batch": ("tanh", True), "ReLU, batches of 1,000": ("relu", False)}
SECONDS, TUNING_SECONDS, SEEDS = 60.0, 20.0, range(3)

PLAIN = {
    "SGD": (torch.optim.SGD, {"momentum": 0.9}),
    "SGD, no momentum": (torch.optim.SGD, {"momentum": 0.0}),
    "Adam": (torch.optim.Adam, {}),
}
LADDER = {"as published": ()} | {f"+ {fault}": FAULTS[: i + 1] for i, fault in enumerate(FAULTS)}
EXHIBITS = {
    "K-FAC": {"coarse": None},
    "K-FAC, no momentum": {"coarse": None, "momentum": 0.0},
    **{name: {"mended": mended} for name, mended in LADDER.items()},
    "2023, smallest eigenvector": {"coarse": "smooth", "mended": FAULTS[:3]},
    "2023, residual": {"coarse": "krylov", "mended": FAULTS[:3]},
}
OURS = {"ours, one level": {"per_layer": 0}, "ours, two levels": {"per_layer": 4}}
METHODS = (*PLAIN, "Muon", *EXHIBITS, *OURS)
FEW = ("SGD", "Adam", "Muon", "K-FAC", "as published", f"+ {FAULTS[-1]}", *OURS)  # for the autoencoder
RATES = {"SGD": (0.01, 0.03, 0.1, 0.3, 1.0), "Adam": (1e-3, 3e-3, 1e-2, 3e-2), "Muon": (1e-3, 3e-3, 1e-2, 3e-2)}
RATES["SGD, no momentum"] = RATES["SGD"]
LARGE_RATES = dict.fromkeys(("SGD", "Adam"), (3e-4, 1e-3, 3e-3, 1e-2)) | {"Muon": (3e-3, 1e-2, 3e-2)}


def given(problem, method: str, lr: float, damping: float, weight_decay: float = 0.0, **options) -> dict:
    """All options that :func:`build` gives to the optimizer of this name."""
    common = {"lr": lr, "weight_decay": weight_decay}
    if method in PLAIN or method == "Muon":
        return common | (PLAIN[method][1] if method in PLAIN else {})
    common |= {"likelihood": problem.likelihood, "damping": damping} | options
    ours = {"observe_every": 1, "refresh_every": 5}
    return common | (EXHIBITS[method] if method in EXHIBITS else OURS[method] | ours)


def build(problem, method: str, *args, **options):
    """An optimizer by its name; ``options`` are those of K-FAC's kind."""
    chosen = given(problem, method, *args, **options)
    if method in PLAIN:
        return PLAIN[method][0](problem.model.parameters(), **chosen)
    if method == "Muon":
        return muon(problem.model, **chosen)
    if method in EXHIBITS:
        return Published(problem.model, **chosen)
    return kv.TwoLevelKFAC(problem.model, layers=problem.layers, **chosen)


def remembered(problem, folder: Path, method: str, *args, **options) -> str:
    """The name of these options in the folder's options.json; rate and λ have columns of their own."""
    opt = method if method == "Muon" else build(problem, method, *args, **options)
    return remember(entry(opt, given(problem, method, *args, **options), ("lr", "damping")), folder)


def train(problem, opt, size: Callable[[int], int], seed: int, *, every: int = 0, steps: int = 10**9,
          seconds: float = math.inf) -> Iterator[dict]:  # fmt: skip
    """Losses on the whole set, so many steps apart, or fifteen in all over a budget of seconds."""
    generator, spent, told = torch.Generator().manual_seed(seed), 0.0, 0
    for step in range(1, steps + 1):
        chosen = torch.randperm(len(problem.inputs), generator=generator)[: size(step)]
        x, y = problem.inputs[chosen], problem.targets[chosen]
        start = clock()
        opt.zero_grad()
        kv.nll(problem.model(x), y, problem.likelihood).backward()
        if hasattr(opt, "observe"):
            opt.observe(x)
        opt.step()
        spent += clock() - start
        over = step == steps or spent >= seconds
        if over or (step % every == 0 if every else spent * 15 / seconds >= told + 1):
            told += 1
            with torch.no_grad():
                loss = float(problem.loss())
            yield {"step": step, "seconds": round(spent, 3), "loss": f"{loss:.4g}",
                   "coarse": f"{getattr(opt, 'coarse_share', 0.0):.3g}"}  # fmt: skip
        if over:
            return


def whole(rows: Iterator[dict]) -> list[dict]:
    """The rows of a run; one that stops in words ends with inf."""
    found = []
    try:
        for row in rows:
            found.append(row)
    except ValueError:
        last = found[-1] if found else {"step": 0, "seconds": 0.0, "loss": "inf", "coarse": 0.0}
        found.append({**last, "loss": "inf"})
    return found


def run(table: Table, here: dict, rows: Callable[[], tuple[str, Iterator[dict]]]) -> float:
    """Make a run, of which ``rows`` knows the options and the rows, unless it is there; its last loss."""
    if table.missing(**here):
        name, made = rows()
        found = whole(made)
        table.add(found[-1:] if here["seed"] == TUNING_SEED else found, **here, options=name)
    last = table.found(**here)[-1]["loss"]
    return math.inf if last == "nan" else float(last)


def grid(method: str, rates: dict, curved_rates: tuple, dampings: tuple) -> list[tuple[float, float]]:
    if method in rates:
        return [(lr, 0.0) for lr in rates[method]]
    return list(itertools.product(curved_rates, dampings))


def toys(table: Table) -> None:
    for (name, depth), method in itertools.product(TOYS, METHODS):
        pairs = grid(method, RATES, (0.03, 0.3), (1e-4, 1e-3, 1e-2, 1e-1))
        one = partial(toy_run, table, name, depth, method)
        best = min(pairs, key=lambda pair: one(*pair, TUNING_SEED))
        for seed in TOY_SEEDS:
            one(*best, seed)


def toy_run(table: Table, name: str, depth: int, method: str, lr: float, damping: float, seed: int) -> float:
    def rows() -> tuple[str, Iterator[dict]]:
        problem = toy(depth, TOYS[name, depth], seed=seed)
        options = remembered(problem, table.path.parent, method, lr, damping, kl_clip=KL_CLIP)
        opt = build(problem, method, lr, damping, kl_clip=KL_CLIP)
        return options, train(problem, opt, lambda step: TOY_BATCH, seed, every=TOY_EVERY, steps=TOY_STEPS)

    here = {"problem": name, "layers": depth, "method": method, "lr": lr, "damping": damping, "seed": seed}
    return run(table, here, rows)


def autoencoder(regime: str, table: Table) -> None:
    for method in FEW:
        pairs = grid(method, LARGE_RATES, (0.01, 0.1), (0.1, 1.0, 10.0))
        one = partial(autoencoder_run, table, regime, method)
        best = min(pairs, key=lambda pair: one(*pair, TUNING_SEED))
        for seed in SEEDS:
            one(*best, seed)


def autoencoder_run(table: Table, regime: str, method: str, lr: float, damping: float, seed: int) -> float:
    def size(step: int) -> int:
        return min(int(500 * 10 ** (step / 100)), 5000) if "growing" in regime else 1000

    def rows() -> tuple[str, Iterator[dict]]:
        problem, options = deep_autoencoder(*REGIMES[regime], seed), {"rule": "factored", "kl_clip": 78.4 * KL_CLIP}
        name = remembered(problem, table.path.parent, method, lr, damping, 1e-5, **options)
        opt = build(problem, method, lr, damping, 1e-5, **options)
        return name, train(problem, opt, size, seed, seconds=TUNING_SECONDS if seed == TUNING_SEED else SECONDS)

    here = {"problem": regime, "method": method, "lr": lr, "damping": damping, "seed": seed}
    return run(table, here, rows)


def small_runs() -> Iterator[tuple[str, list[float]]]:
    """Losses of short runs in double precision, without times: a test makes this table again."""
    for method in METHODS:
        problem = toy(3, "tanh", n=60).to(dtype=torch.float64)
        rate = {"Adam": 0.01, "Muon": 0.01}.get(method, 0.1)
        rows = train(problem, build(problem, method, rate, 0.1, kl_clip=KL_CLIP), lambda step: 30, 0, every=4, steps=12)
        yield method, [float(row["loss"]) for row in whole(rows)]


def small(out: Path) -> None:
    rows = [{"method": method, "step": 4 * i, "loss": loss} for method, losses in small_runs()
            for i, loss in enumerate(losses, 1)]  # fmt: skip
    write(out / "published_small.csv", rows, {}, quiet=True)


def main(argv: list[str] | None = None) -> None:
    options, machine = arguments(__doc__, argv), describe()
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=1e6)
    parser.add_argument("--part", choices=("toy", *REGIMES), action="append", help="all of them by default")
    own = parser.parse_known_args(argv)[0]
    deadline = time.monotonic() + 60 * own.minutes
    warnings.simplefilter("ignore")
    small(options.out)
    parts = own.part or ["toy", *REGIMES]
    if "toy" in parts:
        key = ("problem", "layers", "method", "lr", "damping", "seed")
        toys(Table(options.out / "published_toy.csv", key, machine, deadline))
    for regime in REGIMES:
        if regime in parts:
            key = ("problem", "method", "lr", "damping", "seed")
            autoencoder(regime, Table(options.out / "published_autoencoder.csv", key, machine, deadline))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
