"""The options of measured rows: what a script gave, what its optimizer made of it, and what would be another today."""

from pathlib import Path

import pytest
import torch
from helpers import benchmark

import kfac_viz as kv
from kfac_viz.studies import NOTEBOOKS, published
from kfac_viz.studies.common import options
from kfac_viz.studies.common.measured import MEASURED, measured_rows
from kfac_viz.studies.common.options import changed, entries, entry, outdated, remember, resolved, told
from kfac_viz.train.options import USUAL

TABLES = (
    "training.csv", "training_batches.csv", "defaults.csv", "published_toy.csv", "published_autoencoder.csv",
    "pde_runs.csv", "pde_map.csv", "pde_peers.csv", "depth.csv", "speed_cpu.csv", "speed_cuda.csv", "growth_cpu.csv",
    "growth_cuda.csv",
    "ladder_runs.csv", "ladder_shares.csv", "ladder_before.csv",
)  # fmt: skip
WITHOUT = {  # of the cost of single operations, and small ones that tests make again
    "exact_cpu.csv", "exact_cuda.csv", "fisher_cpu.csv", "products_cpu.csv", "classroom.csv", "training_small.csv",
    "published_small.csv", "pde_small.csv", "ranks_counted.csv", "ranks_cpu.csv",
}  # fmt: skip
FIGURES = {  # and the tables that they are drawn from
    "10_depth": ("depth.csv",),
    "11_solving": ("ladder_runs.csv", "ladder_shares.csv", "ladder_before.csv"),
    "12_training": ("training.csv", "training_batches.csv"),
    "13_published": ("published_toy.csv", "published_autoencoder.csv"),
    "14_speed": ("speed_cpu.csv", "growth_cpu.csv"),
    "15_pde": ("pde_runs.csv", "pde_map.csv", "pde_peers.csv"),
    "16_which_method": ("training.csv", "published_autoencoder.csv", "pde_runs.csv"),
}
# What today's options no longer match. Measure such a table anew, or name here what has changed.
OLD = {
    "published_toy.csv": {
        "TwoLevelKFAC": {
            "batch norm": ("derivatives through the statistics of the batch", "statistics of the batch held constant"),
            "plain steps": ("heavy ball with lr", "Adam's rule with plain_lr = 0.001"),
        }
    }
}


def test_which_tables_todays_options_no_longer_match():
    assert {table: found for table in TABLES if (found := outdated(table))} == OLD


def test_every_row_names_its_options_and_no_entry_is_left_over():
    tables = {file.name for file in MEASURED.glob("*.csv")}
    assert tables == {*TABLES, *WITHOUT}
    named = {row["options"] for table in TABLES for row in measured_rows(table)}
    assert named == set(entries())


@pytest.mark.parametrize("stem", FIGURES)
def test_a_figure_from_such_a_table_says_so_in_its_second_line(stem):
    small = {"15_pde": dict(widths=(4,), points=20, steps=2, at_step=1, per_layer=4)}
    where = NOTEBOOKS[stem].run(**small.get(stem, {})).where
    older = told(*FIGURES[stem])
    assert where.endswith(older) and bool(older) == any(table in OLD for table in FIGURES[stem])
    assert older or " before changes in " not in where


@pytest.fixture
def another_default(monkeypatch):
    """As if the usual decay had been changed after all tables were measured."""
    outdated.cache_clear()
    monkeypatch.setitem(USUAL, "kl_clip", USUAL["kl_clip"] | {"decay": 0.5})
    yield
    monkeypatch.undo()
    outdated.cache_clear()


def test_a_changed_default_shows_in_every_figure_that_it_concerns(another_default):
    assert "decay" in outdated("training.csv")["TwoLevelKFAC"] and not outdated("speed_cpu.csv")  # of fixed steps
    for stem in ("12_training", "16_which_method"):
        assert NOTEBOOKS[stem].run().where.endswith("; TwoLevelKFAC before changes in decay")
    assert " decay" in NOTEBOOKS["13_published"].run().where


@pytest.mark.parametrize("name", ["ours, one level", "ours, two levels"])
@pytest.mark.parametrize("make", [lambda: published.toy(3, "tanh", n=60), lambda: kv.problems.digits((4,), 60, side=4)])
def test_an_entry_holds_what_the_optimizer_has(name, make):
    script, problem = benchmark("published"), make()
    asked = script.given(problem, name, 0.1, 0.2, 0.3, kl_clip=0.4)
    opt = script.build(problem, name, 0.1, 0.2, 0.3, kl_clip=0.4)
    found = entry(opt, asked)["resolved"]
    group = opt.param_groups[0]
    for option, value in found.items():
        if option not in ("batch norm", "plain steps"):
            assert value == (group[option] if option in group else getattr(opt.options, option)), option
    assert found["lr"] == 0.1 and found["damping"] == 0.2 and found["kl_clip"] == 0.4 and found["observe_every"] == 1
    toy = isinstance(problem.model[1], torch.nn.BatchNorm1d)
    assert ("plain steps" in found) == ("batch norm" in found) == toy
    assert ("correction" in found) == (name == "ours, two levels")


def test_scripts_give_what_the_rows_say_that_they_gave(tmp_path):
    """Each way in which a table was tuned, against the names in the table: the entry is made again, but for options
    that came or went since."""

    def given_of(name: str, folder: Path) -> dict:
        return {key: value for key, value in entries(folder)[name].items() if key != "resolved"}

    def same(made: str, name: str) -> bool:
        entries.cache_clear()
        return given_of(made, tmp_path) == given_of(name, MEASURED) and not changed(entries(MEASURED)[name])

    training, pde, growth, speed = map(benchmark, ("training", "pde", "growth", "speed"))
    problem = training.PROBLEMS["deep classifier"](0)
    for row in {(r["cause"], r["regime"], r["method"]): r for r in measured_rows("training.csv")
                if r["problem"] == "deep classifier"}.values():  # fmt: skip
        asked = training.Runs.options(row["regime"], row["method"], float(row["lr"]), float(row["damping"]),
                                      training.CAUSES.get(row["cause"]))  # fmt: skip
        assert same(training.remembered(problem, row["method"], asked, tmp_path), row["options"]), row
    methods = pde.CORE | pde.FURTHER
    for row in {r["method"]: r for r in measured_rows("pde_runs.csv")}.values():
        assert same(pde.remembered(methods[row["method"]], tmp_path), row["options"])
    for row in {r["options"]: r for r in measured_rows("pde_peers.csv")}.values():
        settings = (pde.PEERS | pde.OWN)[row["method"]]
        (setting,) = [setting for setting in settings if pde.label(setting) == row["setting"]]
        assert same(remember(pde.peer_entry(setting), tmp_path), row["options"])
    for row in measured_rows("growth_cpu.csv"):
        k = int(row["per_layer"])
        opt = growth.build(growth.network((4, 3)), row["method"], k)
        assert same(remember(entry(opt, growth.given(row["method"], k)), tmp_path), row["options"])
    for row in measured_rows("speed_cpu.csv"):
        opt = speed.build(speed.network((4, 3)), row["method"])
        assert same(remember(entry(opt, speed.given(row["method"])), tmp_path), row["options"])


def test_an_option_that_is_no_more_or_refused_now_has_changed():
    then = entry("TwoLevelKFAC", {"likelihood": "gaussian", "lr": 0.1}, ("lr",))
    assert changed(then) == {} and "lr" not in then["resolved"]
    for given in ({"likelihood": "gaussian", "gone": 1}, {"likelihood": "gaussian", "damping": -1.0}):
        assert changed(then | {"given": given, "resolved": {"rule": "factored"}}) == {"rule": ("factored", None)}


def test_options_without_effect_are_no_change():
    one_level = resolved("TwoLevelKFAC", {"likelihood": "gaussian", "per_layer": 0, "step_rule": "fixed"})
    assert not {"coarse", "correction", "kl_clip"} & one_level.keys() and one_level["per_layer"] == 0
    exact = resolved("TwoLevelKFAC", {"likelihood": "gaussian", "per_layer": 2, "fisher": "exact"})
    assert "samples" not in exact and exact["coarse"] == "spectral" and exact["kl_clip"] == 5e-4


def test_an_option_that_came_later_is_a_change_unless_it_is_said_what_was_done_before(monkeypatch):
    then = entry("TwoLevelKFAC", {"likelihood": "gaussian"})
    del then["resolved"]["decay"]
    assert changed(then) == {"decay": (None, 0.95)}
    monkeypatch.setitem(options.BEFORE, "decay", 0.95)
    assert changed(then) == {}
    monkeypatch.setitem(options.BEFORE, "decay", 0.5)
    assert changed(then) == {"decay": (0.5, 0.95)}


def test_an_option_that_went_is_a_change_unless_it_did_what_is_done_now():
    then = entry("TwoLevelKFAC", {"likelihood": "gaussian"})
    assert changed(then | {"resolved": then["resolved"] | {"overshoot": "count"}}) == {}
    assert changed(then | {"resolved": then["resolved"] | {"overshoot": "off"}}) == {"overshoot": ("off", None)}
