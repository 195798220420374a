"""The study of training: a small table made again, and what the measured one is made into."""

import csv
from pathlib import Path

import numpy as np
import pytest
from helpers import benchmark

from kfac_viz.studies import training
from kfac_viz.studies.training import CURVED, PROBLEMS, REGIMES, TOLD

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "figures" / "benchmarks"


def rows_of(name):
    with (TABLE / name).open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_small_table_is_made_again():
    small_runs = benchmark("training").small_runs
    kept = {(row["method"], int(row["step"])): float(row["loss"]) for row in rows_of("training_small.csv")}
    found = {(method, 3 * i): loss for method, losses in small_runs() for i, loss in enumerate(losses, 1)}
    assert found.keys() == kept.keys() and len(kept) == 16
    for key, loss in kept.items():
        assert found[key] == pytest.approx(loss, rel=0.02), key


def test_every_method_is_tuned_on_the_seed_apart_and_measured_on_five_others():
    rows = [row for row in rows_of("training.csv") if row["cause"] == "method"]
    for regime in REGIMES:
        for problem in PROBLEMS:
            for method in ("SGD", "Adam", *CURVED):
                which = [regime, problem, method]
                mine = [row for row in rows if [row["regime"], row["problem"], row["method"]] == which]
                assert {row["seed"] for row in mine} == set("01234")
                (lr,), (damping,) = ({row[name] for row in mine} for name in ("lr", "damping"))
                grid = {
                    (row["lr"], row["damping"]): float(row["loss"])
                    for row in rows_of("training.csv")
                    if (row["cause"], row["seed"]) == ("tuning", "99")
                    and [row["regime"], row["problem"], row["method"]] == which
                }
                assert grid[lr, damping] == min(loss for loss in grid.values() if loss == loss)


def test_last_losses_and_ratios_are_those_of_the_table():
    result = training.run(problem="attention", regime="mini")
    ends = {}
    for row in rows_of("training.csv"):
        if (row["cause"], row["regime"], row["problem"]) == ("method", "mini", "attention"):
            ends.setdefault(row["method"], {})[row["seed"]] = float(row["loss"])  # the last row of a run stays
    for method, by_seed in ends.items():
        assert result.ends["mini", "attention", method][0] == pytest.approx(np.median(list(by_seed.values())), rel=1e-3)
        assert result.of("step")[method].y[-1] == pytest.approx(np.median(list(by_seed.values())), rel=1e-3)
    assert result.ratio("mini", "attention", "K-FAC") == 1
    lower = sum(result.ratio("mini", problem) < 1 for problem in PROBLEMS)
    assert f"{lower} of {len(PROBLEMS)} problems in mini-batches" in result.headline


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_every_choice_can_be_drawn(problem, regime):
    plot = training.Plot(training.run(problem=problem, regime=regime))
    assert TOLD[problem] in plot.subtitle.get_text() and "Last loss" in plot.figure.get_label()
