"""Does solving better train better? The runs of the ladder, and what one step of each rung captures.

Three tables: ``ladder_runs`` has every run, ``ladder_shares`` what the direction of each rung captures of the best
decrease on common networks, ``ladder_before`` what can be known of a network before it is trained. λ is that of a grid
with the lowest last training loss on a seed that is not measured; the grid is extended until its best is not at an end.
Then five seeds. What is there already is not made again.

    python tests/benchmarks ladder [--minutes M] [--count]
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from itertools import product
from pathlib import Path

import torch
from machine import Table, arguments, describe
from tuning import Axis, tune

from kfac_viz.method import products
from kfac_viz.studies.common.options import entry, remember
from kfac_viz.studies.common.setting import all_shares
from kfac_viz.studies.solving.before import known_before, least_loss
from kfac_viz.studies.solving.ladder import REGIMES, RUNGS, train
from kfac_viz.studies.solving.networks import CHOSEN_ON, JUDGED_ON

SEEDS, TUNING_SEED, STEPS, EVERY = range(5), 99, 40, 5
DAMPINGS = Axis((0.01, 0.1, 1.0), 10.0, (1e-7, 1e4))
RATES = Axis((0.3, 1.0, 3.0), 3.0)  # of the KL bound
VARIED = ("autoencoder", "attention", "deep classifier")  # on which the other regimes are run
NETWORKS = CHOSEN_ON | JUDGED_ON
LAMBDAS = (1e-3, 1e-2, 1e-1)  # of the shares
TURNS = 30  # of the alternation to the KL product: the step is that of 500 turns to four digits


def remembered(regime: str, folder: Path) -> str:
    """The name of the options of a regime's runs; what differs within a regime stands in the rows."""
    return remember(entry("ladder", REGIMES[regime]._asdict() | {"steps": STEPS}), folder)


class Runs:
    """The runs of one table, and the settings that tuning finds."""

    def __init__(self, table: Table) -> None:
        self.table, self.folder = table, table.path.parent

    def run(self, regime: str, network: str, rung: str, damping: float, lr: float, seed: int) -> float:
        """Make the run unless it is there; its last training loss."""
        here = {"regime": regime, "network": network, "rung": rung, "damping": f"{damping:g}", "lr": f"{lr:g}",
                "seed": seed}  # fmt: skip
        if self.table.missing(**here):
            task = NETWORKS[network](seed)
            try:
                points = list(train(task.train, task.test, RUNGS[rung], damping, STEPS, regime=REGIMES[regime], lr=lr,
                                    seed=seed, every=EVERY))  # fmt: skip
                rows = [
                    {"step": x.step, "loss": f"{x.loss:.4g}", "test_loss": f"{x.test_loss:.4g}",
                     "damping_now": f"{x.damping:.3g}", "seconds": f"{x.seconds:.3f}"} for x in points
                ]  # fmt: skip
            except ValueError as error:  # a step that overflows, or a matrix that is no longer positive
                print(f"{network}, {rung}: {error}", flush=True)
                rows = [{"step": 0, "loss": "inf", "test_loss": "inf", "damping_now": "", "seconds": ""}]
            options = {"options": remembered(regime, self.folder)}
            self.table.add([row | options for row in (rows[-1:] if seed == TUNING_SEED else rows)], **here)
        loss = float(self.table.found(**here)[-1]["loss"])
        return loss if loss == loss else math.inf

    def tuned(self, regime: str, network: str, rung: str) -> tuple[float, float]:
        """λ and rate with the lowest last loss on the seed apart, neither at an end of its grid."""
        rates = RATES if REGIMES[regime].step_rule == "kl_clip" else Axis((1.0,), ends=(1.0, 1.0))
        return tune(lambda *point: self.run(regime, network, rung, *point, TUNING_SEED), DAMPINGS, rates)


def shares(table: Table, runs: Runs) -> None:
    """What each rung captures on networks that all share: untrained, and after 20 steps of K-FAC."""
    for network, seed, state in product(NETWORKS, SEEDS, ("untrained", "after 20 steps")):
        here = {"network": network, "seed": seed, "state": state}
        if not table.missing(**here):
            continue
        problem = NETWORKS[network](seed).train.twin()
        if state != "untrained":
            list(train(problem, problem, RUNGS["kfac"], runs.tuned("core", network, "kfac")[0], 20))
        F, g = problem.capture(), problem.gradient()
        rows = []
        for damping in LAMBDAS:
            A = F.damped(damping)
            found = all_shares(A, g, {name: rung(F, damping, g) for name, rung in RUNGS.items()})
            options = {"options": remembered("core", table.path.parent)}
            rows += [{"damping": damping, "rung": name, "as_it_is": f"{x[0]:.4g}", "best": f"{x[1]:.4g}"} | options
                     for name, x in found.items()]  # fmt: skip
        table.add(rows, **here)


def before(table: Table) -> None:
    """What can be known of each network before it is trained."""
    for network, seed in product(NETWORKS, SEEDS):
        here = {"network": network, "seed": seed}
        if table.missing(**here):
            problem = NETWORKS[network](seed).train
            found = {"least loss": least_loss(problem)} | known_before(problem)
            options = {"options": remembered("core", table.path.parent)}
            table.add([{"name": name, "value": f"{x:.4g}"} | options for name, x in found.items()], **here)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--minutes", type=float, default=480.0)
    parser.add_argument("--rungs", nargs="*", default=list(RUNGS))
    parser.add_argument("--regimes", nargs="*", default=list(REGIMES))
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--skip-shares", action="store_true")
    own, rest = parser.parse_known_args(argv)
    out = arguments(__doc__, rest).out
    torch.set_num_threads(1)
    products.TURNS = TURNS
    warnings.simplefilter("ignore")
    deadline = time.monotonic() + 60 * own.minutes
    machine = describe()
    key = ("regime", "network", "rung", "damping", "lr", "seed")
    runs = Runs(Table(out / "ladder_runs.csv", key, machine, deadline))
    for regime, network in product(own.regimes, own.networks):
        if regime == "core" or network in VARIED:
            for rung in own.rungs:
                damping, lr = runs.tuned(regime, network, rung)
                for seed in SEEDS:
                    runs.run(regime, network, rung, damping, lr, seed)
    if own.skip_shares:
        return
    before(Table(out / "ladder_before.csv", ("network", "seed"), machine, deadline))
    shares(Table(out / "ladder_shares.csv", ("network", "seed", "state"), machine, deadline), runs)


if __name__ == "__main__":
    main()
