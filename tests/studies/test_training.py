"""The study of training: a small table made again, and what the measured one is made into."""

import csv
import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from helpers import benchmark

from kfac_viz.studies import training
from kfac_viz.studies.training import OF_KFACS_KIND, PROBLEMS, REGIMES, STYLES, TOLD

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "figures" / "benchmarks"
CUT_SHORT = {("mini", "attention", "K-FAC"), ("mini", "convolutional", "two-level")}  # as notebook 12 says


def rows_of(name):
    with (TABLE / name).open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_small_table_is_made_again():
    small_runs = benchmark("training").small_runs
    kept = {(row["method"], int(row["step"])): (float(row["loss"]), float(row["test_loss"]))
            for row in rows_of("training_small.csv")}  # fmt: skip
    found = {(method, 3 * i): losses for method, each in small_runs() for i, losses in enumerate(each, 1)}
    assert found.keys() == kept.keys() and len(kept) == 24
    for key, losses in kept.items():
        assert found[key] == pytest.approx(losses, rel=0.02), key


@pytest.mark.parametrize("least", [(3e-4, 20.0), (1e3, 1e-3), (1.0, 1.0)])
def test_a_grid_is_extended_until_its_best_is_inside_or_at_the_end_of_its_axis(least):
    tuning = benchmark("tuning")
    asked = set()

    def loss(*point):
        asked.add(point)
        return sum(abs(math.log(x / wanted)) for x, wanted in zip(point, least, strict=True))

    assert tuning.tune(lambda x: 3.0, tuning.Axis((0.1, 1.0, 10.0))) == (0.1,)
    axes = tuning.Axis((0.1, 1.0, 10.0)), tuning.Axis((1.0,), 10.0, (0.01, math.inf))
    best = tuning.tune(loss, *axes)
    assert loss(*best) == min(loss(*point) for point in set(asked))
    for i, axis in enumerate(axes):
        values = {point[i] for point in asked}
        assert best[i] < max(values) and (best[i] > min(values) or best[i] <= axis.ends[0])


def test_every_method_is_tuned_on_the_seed_apart_and_measured_on_five_others():
    """The best of a grid is at no end of it, unless the axis ends there or the search was cut short."""
    script = benchmark("training")
    rows = [row for row in rows_of("training.csv") if row["cause"] == "method"]
    tuning = [row for row in rows_of("training.csv") if (row["cause"], row["seed"]) == ("tuning", "99")]
    there = {(row["regime"], row["problem"], row["method"]) for row in rows}
    assert there >= {*product(["mini", "full"], PROBLEMS, STYLES)}
    for which in there:
        mine, grid = ([row for row in each if (row["regime"], row["problem"], row["method"]) == which]
                      for each in (rows, tuning))  # fmt: skip
        assert {row["seed"] for row in mine} == set("01234")
        ((lr, damping),) = {(float(row["lr"]), float(row["damping"])) for row in mine}
        losses = {(float(row["lr"]), float(row["damping"])): float(row["loss"]) for row in grid}
        assert losses[lr, damping] == min(loss for loss in losses.values() if loss == loss)
        assert all(row["test_loss"] for row in mine)
        if which not in CUT_SHORT:
            curved = which[2] in OF_KFACS_KIND
            last = script.told(script.RATES[which[2]].ends[1])
            rates = [x for x, other in losses if other == damping]
            free = which[0] == "full" and curved  # whose rate is the quadratic rule's own
            assert free or (min(rates) < lr and (lr < max(rates) or lr == last)), which
            dampings = [other for x, other in losses if x == lr]
            assert not curved or min(dampings) < damping < max(dampings), which


def test_last_losses_and_ratios_are_those_of_the_table():
    result = training.run(problem="attention", regime="mini")
    ends = {}
    for row in rows_of("training.csv"):
        if (row["cause"], row["regime"], row["problem"]) == ("method", "mini", "attention"):
            ends.setdefault(row["method"], {})[row["seed"]] = float(row["loss"]), float(row["test_loss"])  # the last
    for method, by_seed in ends.items():
        loss, test = np.median(list(by_seed.values()), 0)
        end = result.ends["mini", "attention", method]
        assert (end.loss, end.test) == pytest.approx((loss, test), rel=1e-3)
        assert result.of("step")[method].y[-1] == pytest.approx(loss, rel=1e-3)
        assert result.of("test")[method].y[-1] == pytest.approx(test, rel=1e-3)
    assert all(result.ratio("mini", "attention", "K-FAC", of=what) == 1 for what in ("loss", "test", "seconds"))
    lowest = min(ends, key=lambda method: np.median([loss for loss, _ in ends[method].values()]))
    assert result.lowest("mini", "attention") == lowest
    lower = sum(result.ratio("mini", problem) < training.LOWER for problem in PROBLEMS)
    assert f"below K-FAC on {lower} of {len(PROBLEMS)} problems in mini-batches" in result.headline


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_every_choice_can_be_drawn(problem, regime):
    plot = training.Plot(training.run(problem=problem, regime=regime))
    assert TOLD[problem] in plot.subtitle.get_text() and "Last training loss" in plot.figure.get_label()
