"""The ladder trains as the optimizer does, and its measured runs are what a reader would measure."""

from __future__ import annotations

import copy

import pytest
import torch

import kfac_viz as kv
from kfac_viz.problems.problem import Problem
from kfac_viz.studies import solving
from kfac_viz.studies.common.measured import measured_rows
from kfac_viz.studies.common.setting import all_shares
from kfac_viz.studies.solving.before import NAMES, known_before, least_loss
from kfac_viz.studies.solving.ladder import RUNGS, train
from kfac_viz.studies.solving.networks import CHOSEN_ON


@pytest.mark.parametrize("rung, options", [
    ("kfac", {"rule": "eigen"}), ("factored", {}), ("kfac, 4", {"rule": "eigen", "per_layer": 4}),
])  # fmt: skip
@pytest.mark.parametrize("network, damping", [("classifier", 1e-3), ("attention", 0.1)])
def test_the_ladder_steps_as_the_optimizer_does(network, damping, rung, options):
    task = CHOSEN_ON[network](0)
    model = copy.deepcopy(task.train.model).eval()
    points = list(train(task.train, task.test, RUNGS[rung], damping, 12, every=1))
    opt = kv.TwoLevelKFAC(
        model, likelihood=task.train.likelihood, damping=damping, step_rule="quadratic", fisher="exact", decay=0.0,
        observe_every=1, refresh_every=1, coarse_window=1, coarse_examples=10_000, **options,
    )  # fmt: skip
    for point in points:

        def closure():
            opt.zero_grad()
            loss = kv.nll(model(task.train.inputs), task.train.targets, task.train.likelihood)
            loss.backward()
            return loss

        closure()
        opt.observe(task.train.inputs)
        opt.step(closure)
        loss = float(kv.nll(model(task.train.inputs), task.train.targets, task.train.likelihood))
        assert point.loss == pytest.approx(loss, rel=1e-6)
        assert point.damping == pytest.approx(opt.damping, rel=1e-9)


def row(table: str, **where: str) -> dict[str, str]:
    (found,) = (row for row in measured_rows(table) if all(row[name] == value for name, value in where.items()))
    return found


@pytest.mark.parametrize("rung", ["kfac", "blocks, 4"])
def test_a_measured_run_begins_as_it_does_today(rung):
    """Later points of a run move with the rounding of the machine."""
    start = {"regime": "core", "network": "classifier", "rung": rung, "seed": "0", "step": "5"}
    (found,) = (r for r in measured_rows("ladder_runs.csv") if all(r[k] == v for k, v in start.items()))
    task = CHOSEN_ON["classifier"](0)
    *_, point = train(task.train, task.test, RUNGS[rung], float(found["damping"]), 5)
    assert point.loss == pytest.approx(float(found["loss"]), rel=2e-3)
    assert point.test_loss == pytest.approx(float(found["test_loss"]), rel=2e-3)


def test_measured_shares_and_what_is_known_before_are_made_again():
    problem = CHOSEN_ON["autoencoder"](0).train
    F, g = problem.capture(), problem.gradient()
    where = {"network": "autoencoder", "seed": "0", "state": "untrained", "damping": "0.01"}
    A = F.damped(0.01)
    for rung, shares in all_shares(A, g, {name: RUNGS[name](F, 0.01, g) for name in ("diagonal", "kfac, 4")}).items():
        found = row("ladder_shares.csv", rung=rung, **where)
        assert shares.at_best_length == pytest.approx(float(found["best"]), abs=2e-3)
    for name, value in {"least loss": least_loss(problem), **known_before(problem)}.items():
        found = row("ladder_before.csv", network="autoencoder", seed="0", name=name)
        assert value == pytest.approx(float(found["value"]), rel=2e-3)


def test_no_loss_is_below_the_least_one():
    y = torch.rand(5, 3, dtype=torch.float64)
    problem = Problem(torch.nn.Linear(1, 3).double(), torch.zeros(5, 1), y, "bernoulli")
    assert least_loss(problem) == pytest.approx(float(kv.nll(torch.logit(y), y, "bernoulli")), rel=1e-12)


def test_only_the_worth_of_the_quadratic_model_tells_the_networks_apart():
    """On the five that it was chosen on, and with the two that it is judged by."""
    result = solving.run()
    assert [name for name in NAMES if result.separates(name)] == ["reduction ratio"]
    assert [name for name in NAMES if result.separates(name, result.networks)] == ["reduction ratio"]
    sides = {name: result.before["reduction ratio", name] > solving.TRUSTED for name in result.networks}
    assert sides == {name: result.agreement(name) >= solving.CLEAR for name in result.networks}
