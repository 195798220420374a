"""The study of differential equations: its numbers, against the objects that it is made of and a table made before."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import benchmark

import kfac_viz as kv
from kfac_viz.parameters import number
from kfac_viz.studies import pde
from kfac_viz.studies.pde import Cell, cells, measured_curves
from kfac_viz.studies.pde.cost import counted_curves, multiplications
from kfac_viz.studies.pde.descent import Method, direction, exact_step, training

ROOT = Path(__file__).parents[2]
SMALL = dict(widths=(6, 5), points=24, steps=5, at_step=4, per_layer=2)


def problem(seed=0):
    return kv.problems.poisson(2, (6, 5), 24, seed=seed)


def test_the_small_table_is_made_again():
    small_runs = benchmark("pde").small_runs
    with (ROOT / "figures" / "benchmarks" / "pde_small.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    key = ("equation", "method")
    kept = {(*(row[k] for k in key), int(row["step"])): (float(row["loss"]), float(row["error"])) for row in rows}
    found = {(e, m, k): both for e, m, seen in small_runs() for k, both in enumerate(seen, 1)}
    assert found.keys() == kept.keys() and len(kept) == 84
    for key, both in kept.items():
        assert found[key] == pytest.approx(both, rel=0.02), key


@pytest.mark.parametrize("points", [10, 200])  # fewer and more than parameters
def test_the_exact_step_solves_the_system(points):
    p = kv.problems.poisson(2, (6, 5), points)
    F, g = p.capture(), p.gradient()
    with torch.no_grad():
        residuals = p.model(p.inputs)[:, 0]
    v = exact_step(F, residuals, 1e-4)
    assert float((F.damped(1e-4) @ v - g).norm() / g.norm()) < 1e-9
    for method in (Method("kfac"), Method("both", per_layer=2)):
        solved = direction(method._replace(iterations=400), F, g, residuals, 1.0)
        torch.testing.assert_close(solved, exact_step(F, residuals, 1.0), rtol=1e-5, atol=1e-7)


def test_the_quadratic_rule_starts_gently_and_takes_the_steps_of_the_optimizer():
    one, other = (kv.problems.poisson(2, (16, 16), 60) for _ in range(2))
    opt = kv.TwoLevelKFAC(other.model, likelihood="gaussian", fisher="exact", rule="eigen", step_rule="quadratic",
                          damping=1e-2, decay=0.0, observe_every=1, refresh_every=1, per_layer=2)  # fmt: skip
    steps, losses = training(one, Method("both", per_layer=2, length="quadratic"), 1e-2), []
    for _ in range(8):
        losses.append(float(one.loss().detach()))
        next(steps)
        opt.observe(other.inputs)
        opt.step(other.closure(opt))
        mine, theirs = (p.partition.pack(p.model) for p in (one, other))
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] and opt.diagnostics["rejected"] > 0


def test_training_goes_down_at_every_step_and_counts_evaluations():
    p = problem()
    losses, counts = [float(p.loss())], []
    for _, evaluations in zip(range(6), training(p, Method("both", per_layer=2), 1e-5), strict=False):
        losses.append(float(p.loss()))
        counts.append(evaluations)
    assert losses == sorted(losses, reverse=True) and counts == sorted(counts) and counts[0] >= 1


def test_the_result_is_what_the_objects_say():
    result = pde.run(**SMALL)
    p = problem()
    steps = training(p, Method("both", per_layer=2), 1e-6)
    for k in range(1, 5):
        next(steps)
        assert result.of("loss")["both"].y[k] == pytest.approx(float(p.loss()), rel=1e-3)
    assert result.errors["both"] == pytest.approx(p.error(), rel=1e-6)
    assert result.curves["error", "both"].y[4] == pytest.approx(p.error(), rel=1e-3)
    F = p.capture()
    assert result.dimension == pytest.approx(F.damped(1e-6).effective_dimension(), rel=1e-3)
    assert result.sizes == (F.partition.size, F.N, 6)
    A = F.damped(1e-6)
    expected = kv.spectrum(kv.Dense(A.dense(), F.partition), kv.KFAC(F, 1e-6)).flip(0)
    np.testing.assert_allclose(result.of("eigenvalues")["kfac"].y[:10], expected[:10], rtol=1e-3)
    coarse = result.of("eigenvalues")["coarse"].y
    assert (np.abs(coarse[:6] - 1) < 1e-3).all() and (coarse[6:] < 1e-6).all()  # exact on the columns, nothing beyond
    assert result.solution.shape == result.fields["both"].shape and abs(result.solution.max() - 1) < 0.01


def test_without_columns_both_levels_are_kfac_and_the_coarse_level_stays():
    result = pde.run(**SMALL | dict(per_layer=0))
    losses = result.of("loss")
    np.testing.assert_allclose(losses["both"].y, losses["kfac"].y, rtol=1e-3)
    assert (losses["coarse"].y == losses["coarse"].y[0]).all()
    assert "coarse" not in result.of("eigenvalues")
    pde.Plot(result)


@pytest.mark.parametrize("equation", ["heat", "burgers"])
def test_every_equation_can_be_drawn_and_moved(equation):
    plot = pde.Plot(pde.run(**SMALL | dict(equation=equation)))
    plot.update(pde.run(**SMALL | dict(equation=equation, damping=1e-4, at_step=2)))
    assert equation in plot.subtitle.get_text().lower()


def test_the_measured_tables_say_what_the_picture_shows():
    curves = measured_curves()
    assert {name for quantity, name in curves if quantity == "peers, 1000"} >= {"kfac-pinns", "spring", "engd-w"}
    assert {name for quantity, name in curves if quantity == "errors, Poisson 2D"} >= {"kfac", "coarse", "both"}
    for c in curves.values():
        assert (c.low <= c.y).all() and (c.y <= c.high).all()
    found = cells()
    assert len({(c.parameters, c.points) for c in found}) == len(found) >= 6
    for cell in found:
        assert cell.errors[cell.first] == min(cell.errors.values())
    assert Cell("1e3", 5, {"a": 2.0, "b": 1.0}).first == "b"


def test_a_step_costs_what_its_products_say():
    exact = [multiplications("engd-w", n) for n in (20_000, 40_000)]
    assert exact[1] / exact[0] == pytest.approx(8, rel=0.4)  # N² P and N³ in the end
    for method in ("kfac-pinns", "ours"):
        few, many = (multiplications(method, n) for n in (20_000, 40_000))
        assert many / few == pytest.approx(2, rel=0.05)
    for (_, name), c in counted_curves().items():
        measured = measured_curves()["step", name]
        for n, seconds in zip(measured.x, measured.y, strict=True):
            assert 1 / 3 < c.at(n, ("log", "log")) / seconds < 3  # a count of products, not a model of the machine


def test_powers_of_ten_are_written_for_readers():
    assert [number(x, 1) for x in (0.0, 1.0, 40.4, 0.0399, 3.4e-9)] == ["0", "1", "40", "0.04", "3·10⁻⁹"]


def test_the_page_has_every_run_at_every_moment(tmp_path):
    from kfac_viz.pages.race import EVERY, SIZES

    page = kv.pages.save_race(pde.run, "race", tmp_path, **SMALL)
    text = page.read_text(encoding="utf-8")
    assert "{{" not in text and not re.findall(r'(?:src|href)="(?!data:|\$)|@import|https?://', text)
    data = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text)[1])
    assert data["shown"] == [0, EVERY, SMALL["steps"]] and data["sizes"] == list(SIZES)
    assert data["start"] == [SIZES.index(SMALL["per_layer"]), 1]
    assert set(data["errors"]) == {"kfac 0", "exact 0", *(f"{m} {k}" for m in ("coarse", "both") for k in SIZES)}
    result = pde.run(**SMALL)
    for name, k in (("kfac", 0), ("coarse", 2), ("both", 2), ("exact", 0)):
        np.testing.assert_allclose(data["errors"][f"{name} {k}"], result.curves["error", name].y, rtol=5e-3)
        assert len(data["fields"][f"{name} {k}"]) == 3
    assert data["errors"]["both 0"] == data["errors"]["kfac 0"]
    assert kv.pages.save_race(pde.run, "race", "", **SMALL) is None
