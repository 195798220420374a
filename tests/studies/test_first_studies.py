"""Studies of the Fisher's flavours, of K-FAC's error and of damping: identities, limits, tables, pictures."""

import itertools
import re

import matplotlib
import numpy as np
import pytest
import torch

import kfac_viz as kv
from kfac_viz.show.style import rc
from kfac_viz.studies.common.result import curve, rounded
from kfac_viz.studies.common.setting import Setting
from kfac_viz.studies.damping import STAGES, _follow, loss_after
from kfac_viz.studies.fisher import sampling_error, small_problem
from kfac_viz.studies.kfac import PIECES, factored_excess, kronecker_blocks, split

SMALL = dict(n=40, widths=(5, 4), repeats=2)
STUDIES = {
    "fisher": (kv.studies.fisher.run, dict(steps=3), dict(damping=0.1, weight=-1.0, samples=2)),
    "hessian": (kv.studies.hessian.run, dict(steps=3), dict(damping=0.1, steps=5)),
    "kfac": (kv.studies.kfac.run, dict(steps=3), dict(damping=0.1, steps=5, samples=3)),
    "damping": (kv.studies.damping.run, dict(steps=3), dict(damping=0.1, steps=5)),
}
PLOTS = {name: getattr(kv.studies, name).Plot for name in STUDIES}
PROBLEMS = {
    "digits": lambda: kv.problems.digits((6, 5), n=60, side=4).trained(20),
    "autoencoder": lambda: kv.problems.autoencoder((4,), n=40, side=4).trained(5),
    "planted": lambda: kv.problems.planted(3, 6, n=50, activation="relu").trained(5),
}


def square(matrix):
    return float(matrix.square().sum())


# ---- the error of K-FAC ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROBLEMS)
def test_pieces_are_what_they_are_called_and_add_up(name):
    F = PROBLEMS[name]().capture()
    dense, K = F.dense(), kronecker_blocks(F)
    blocks = torch.block_diag(*(F.block(l, l) for l in range(len(F.partition))))
    ekfac = torch.linalg.inv(kv.EKFAC(F, 1.0).dense()) - F.eye()
    dropped, basis, eigenvalues = split(F, dense)
    total = square(dense - K)
    for piece, matrix in ((dropped, dense - blocks), (basis, blocks - ekfac), (eigenvalues, ekfac - K)):
        assert piece == pytest.approx(square(matrix), rel=1e-8, abs=1e-12 * total)
        assert piece > 1e-6 * total  # each of them is there, or the test would show nothing
    assert dropped + basis + eigenvalues == pytest.approx(total, rel=1e-12)


def test_only_dropped_blocks_are_lost_in_a_deep_linear_network():
    F = kv.problems.deep_linear().capture()
    dropped, basis, eigenvalues = split(F, F.dense())
    assert dropped > 0.01 * square(F.dense())
    assert basis + eigenvalues < 1e-13 * dropped  # a difference of squares, to rounding


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("λ", [1e-3, 2.0])
def test_the_factored_rule_adds_what_the_formula_says(name, λ):
    F = PROBLEMS[name]().capture()
    inverse = kronecker_blocks(F, λ)
    torch.testing.assert_close(kv.KFAC(F, λ, "factored").dense() @ inverse, F.eye(), rtol=0, atol=1e-9)
    excess = square(inverse - kronecker_blocks(F) - λ * F.eye())
    assert λ * factored_excess(F) == pytest.approx(excess, rel=1e-10)


def test_sampled_factors_are_unbiased_so_their_piece_is_orthogonal_on_average():
    problem = kv.problems.digits((3,), n=2, side=4)
    F = problem.capture()
    K = kronecker_blocks(F)
    mean, spread, whole = torch.zeros_like(K), 0.0, 0.0
    for probability, drawn in label_draws(problem):
        sampled = kronecker_blocks(drawn)
        mean += probability * sampled
        spread += probability * square(sampled - K)
        whole += probability * square(F.dense() - sampled)
    torch.testing.assert_close(mean, K, rtol=1e-10, atol=1e-14)
    assert whole == pytest.approx(square(F.dense() - K) + spread, rel=1e-10)


def test_methods_have_the_errors_of_their_own_matrices():
    result = kv.studies.kfac.run(**SMALL | {"repeats": 1}, steps=3)
    problem = kv.problems.digits((5, 4), n=40, side=4).trained(3)
    F = problem.capture()
    drawn = problem.capture("mc", generator=torch.Generator().manual_seed(0))
    methods = {
        "block-diagonal": kv.BlockDiagonal(F, 1.0),
        "ekfac": kv.EKFAC(F, 1.0),
        "kfac": kv.KFAC(F, 1.0),
        "sampled": kv.KFAC(drawn, 1.0),
        "factored": kv.KFAC(F, 1.0, "factored"),
        "block-tridiagonal": kv.BlockTridiagonal(F, 1.0),
    }
    for name, c in result.of("error").items():
        for λ, y in zip(c.x[[4, -1]], c.y[[4, -1]], strict=True):
            inverse = torch.linalg.inv(methods[name].with_damping(λ).dense())
            error = (F.damped(λ).dense() - inverse).norm() / F.dense().norm()
            assert y == pytest.approx(float(error), rel=6e-4)  # rounded to 4 digits, λ too


def test_shares_of_the_error_add_up_and_kept_blocks_can_only_be_seen_in_misfit():
    result = kv.studies.kfac.run(**SMALL, steps=3)
    assert result.lost.sum() == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(result.lost, result.lost.T)
    np.testing.assert_allclose(result.misfit, result.misfit.T)
    assert (result.misfit > 0).all()
    pieces = {name: c.y for name, c in result.of("piece").items()}
    assert list(pieces) == list(PIECES)
    grown = kv.studies.kfac.run(**SMALL, steps=3, damping=1.0).of("piece")
    np.testing.assert_allclose(grown["damping"].y, 100 * pieces["damping"], rtol=1e-3)
    np.testing.assert_array_equal(grown["sampling"].y, pieces["sampling"])


# ---- flavours --------------------------------------------------------------------------------------------


def label_draws(problem):
    """Every way in which the labels can fall, with its probability and the Fisher that it gives."""
    with torch.no_grad():
        p = problem.model(problem.inputs).softmax(1)
    for labels in itertools.product(range(p.shape[1]), repeat=len(p)):
        labels = torch.tensor(labels)
        drawn = kv.capture(problem.model, problem.inputs, labels, likelihood="categorical", fisher="empirical")
        yield float(p[torch.arange(len(p)), labels].prod()), drawn


def test_expected_error_of_sampling_is_exact():
    problem = kv.problems.digits((3,), n=2, side=4)
    F = problem.capture()
    mean_square = sum(p * square(drawn.dense() - F.dense()) for p, drawn in label_draws(problem))
    with torch.no_grad():
        predicted = sampling_error(F, problem.model(problem.inputs).softmax(1))
    assert predicted == pytest.approx(mean_square**0.5, rel=1e-10)


def test_monte_carlo_falls_with_the_root_of_the_samples_and_empirical_does_not():
    errors = kv.studies.fisher.run(n=100, widths=(6,), steps=5, repeats=8).of("error")
    slope = np.polyfit(np.log(errors["mc"].x), np.log(errors["mc"].y), 1)[0]
    assert slope == pytest.approx(-0.5, abs=0.07)
    np.testing.assert_allclose(errors["mc"].y, errors["theory"].y, rtol=0.25)
    assert len(set(errors["empirical"].y)) == 1
    assert errors["empirical"].y[0] > 10 * errors["mc"].y[-1]


def test_two_parameters_against_closed_forms():
    λ, point = 0.3, (0.5, -1.0)
    result = kv.studies.fisher.run(**SMALL, steps=0, damping=λ, weight=point[0], bias=point[1])
    problem = small_problem("gaussian", 0, weight=point[0], bias=point[1])
    x, y = (t.numpy() for t in (problem.inputs, problem.targets))
    X = np.hstack([x, np.ones_like(x)])
    residual = X @ np.array(point)[:, None] - y
    np.testing.assert_allclose(result.plane.metrics["exact"], X.T @ X / len(x) + λ * np.eye(2), rtol=1e-12)
    scores = residual * X
    np.testing.assert_allclose(
        result.plane.metrics["empirical"], scores.T @ scores / len(x) + λ * np.eye(2), rtol=1e-12
    )
    np.testing.assert_allclose(result.plane.minimum, np.linalg.lstsq(X, y)[0][:, 0], rtol=1e-3)
    assert result.plane.shares["exact"] == 1
    loss = result.plane.loss[20, 50]  # bias first
    at = result.plane.axis[50], result.plane.axis[20]
    expected = 0.5 * np.mean((X @ np.array(at)[:, None] - y) ** 2)
    assert loss == pytest.approx(expected, rel=1e-3)


def test_logistic_regression_finds_its_minimum():
    result = kv.studies.fisher.run(**SMALL, steps=0, likelihood="bernoulli")
    weight, bias = result.plane.minimum
    assert float(small_problem("bernoulli", 0, weight=weight, bias=bias).gradient().norm()) < 1e-3


# ---- the Hessian -----------------------------------------------------------------------------------------


def test_curves_of_the_hessian_are_what_they_say():
    from kfac_viz.studies.hessian import COMPARED, MARGIN, MOMENTS

    result = kv.studies.hessian.run(**SMALL | {"repeats": 1}, steps=10)
    problem = kv.problems.digits((5, 4), n=40, side=4).trained(10)
    F, E, g = problem.capture().dense(), problem.capture("empirical").dense(), problem.gradient()
    now = float(problem.loss().detach())
    H = kv.Hessian(problem.model, problem.inputs, problem.targets, likelihood=problem.likelihood).dense()
    d, P = torch.linalg.eigvalsh(H), problem.partition
    within = torch.block_diag(*(H[s, s] for s in P.slices))
    blocks, at = torch.linalg.eigvalsh(within), MOMENTS.index(10)
    apart = (H - F).square().sum() - sum((H - F)[s, s].square().sum() for s in P.slices)
    expected = {
        ("distance", "exact"): (H - F).norm() / H.norm(),
        ("distance", "empirical"): (H - E).norm() / H.norm(),
        ("negative", "hessian"): -d[d < 0].sum() / d.abs().sum(),
        ("negative", "blocks"): -blocks[blocks < 0].sum() / blocks.abs().sum(),
        ("between", "residual"): apart / (H - F).square().sum(),
    }
    for key, value in expected.items():
        assert result.curves[key].y[at] == pytest.approx(float(value), rel=6e-4), key
    assert float(-d[0]) > COMPARED[0]  # so that the Hessian lacks steps that the Fishers have
    for name, B in (("exact", F), ("empirical", E), ("hessian", H)):
        c = result.curves["decrease", name]
        assert c.x[0] > (MARGIN * float(-d[0]) if name == "hessian" else 0) and c.x[-1] == COMPARED[-1]
        assert len(c.x) == sum(λ > MARGIN * float(-d[0]) for λ in COMPARED) if name == "hessian" else len(COMPARED)
        for λ, y in zip(c.x, c.y, strict=True):
            step = torch.linalg.solve(B + λ * torch.eye(len(B), dtype=B.dtype), g)
            assert y == pytest.approx(1 - loss_after(problem, step) / now, rel=1e-3, abs=1e-6)
        assert result.curves["best", name].y[at] == c.y.max()
        np.testing.assert_allclose(result.matrices[name], B, atol=1e-12)
    seen = np.concatenate([-result.curves["spectrum", "negative"].y, result.curves["spectrum", "hessian"].y])
    np.testing.assert_allclose(np.sort(seen[seen != 0]), d[d.abs() > 1e-9], rtol=1e-3)


# ---- damping ---------------------------------------------------------------------------------------------


def test_a_quadratic_loss_is_trusted_at_every_damping():
    s = Setting(kv.problems.planted(1, 10, n=50, activation=None))
    length, captured, best, ratio, decrease = _follow(s, "exact", np.array([1e-3, 1.0, 50.0]))
    np.testing.assert_allclose(ratio, 1, rtol=1e-8)
    np.testing.assert_allclose([captured, best], 1, rtol=1e-10)
    assert (np.diff(length) < 0).all() and (np.diff(decrease) < 0).all()


def test_damping_turns_every_direction_into_the_gradient():
    problem = PROBLEMS["digits"]()
    F, g = problem.capture(), problem.gradient()
    for rule in ("eigen", "factored"):
        off = [float((λ * (kv.KFAC(F, λ, rule) @ g) - g).norm() / g.norm()) for λ in (1e4, 1e6, 1e8)]
        assert off[0] < 0.3 and off[1] < off[0] / 5 and off[2] < off[1] / 5
    exact = 1e6 * F.damped(1e6).solve(g)
    assert float((exact - g).norm() / g.norm()) <= float(F.eigen.d.max()) / 1e6


def test_without_damping_both_rules_are_one():
    problem = kv.problems.planted(1, n=50, activation=None)
    F, g = problem.capture(), problem.gradient()
    torch.testing.assert_close(kv.KFAC(F, 0.0) @ g, kv.KFAC(F, 0.0, "factored") @ g, rtol=1e-8, atol=1e-12)


def test_curves_of_damping_are_what_they_say():
    result = kv.studies.damping.run(**SMALL | {"repeats": 1}, steps=3)
    problem = kv.problems.digits((5, 4), n=40, side=4).trained(3)
    F, g, trained = problem.capture(), problem.gradient(), STAGES[1]
    c = result.curves["decrease", f"{trained}, exact"]
    λ = c.x[12]
    v = F.damped(λ).solve(g)
    now = float(problem.loss().detach())
    assert c.y[12] == pytest.approx(1 - loss_after(problem, v) / now, rel=1e-2)
    assert result.curves["length", f"{trained}, exact"].y[12] == pytest.approx(float(v.norm()), rel=1e-3)
    d = F.eigen.d.numpy()
    assert result.curves["dimension", trained].y[12] == pytest.approx((d / (d + λ)).sum(), rel=1e-3)
    for stage in STAGES:
        assert (np.diff(result.curves["dimension", stage].y) < 0).all()
        assert result.curves["ratio", f"{stage}, exact"].y[-1] == pytest.approx(1, abs=5e-3)


def test_loss_after_leaves_the_model_alone():
    problem = PROBLEMS["digits"]()
    before = problem.partition.pack(problem.model)
    loss_after(problem, torch.ones_like(before))
    torch.testing.assert_close(problem.partition.pack(problem.model), before, rtol=0, atol=0)
    assert loss_after(problem, torch.zeros_like(before)) == float(problem.loss().detach())


@pytest.mark.parametrize("name", STUDIES)
def test_networks_that_are_too_large_or_have_no_width_are_refused(name):
    run = STUDIES[name][0]
    with pytest.raises(ValueError, match="at most 2500"):
        run(data="digits8", widths=(64,), n=20)
    if name not in ("fisher", "hessian"):
        with pytest.raises(ValueError, match="at least one"):
            run(data="planted", widths=(), n=20)


# ---- tables, pictures, exercises -------------------------------------------------------------------------


@pytest.mark.parametrize("name", STUDIES)
def test_tables_are_tidy_and_rounded(name):
    run, first, _ = STUDIES[name]
    table = run(**SMALL, **first).table()
    assert list(table) == ["quantity", "series", "x", "median", "low", "high"]
    assert not table.isna().to_numpy().any()
    assert not table.duplicated(["quantity", "series", "x"]).any()
    numbers = table[["median", "low", "high"]].to_numpy()
    assert np.isfinite(numbers).all()
    assert (numbers[:, 1] <= numbers[:, 0]).all() and (numbers[:, 0] <= numbers[:, 2]).all()
    np.testing.assert_array_equal(numbers, rounded(numbers))
    assert run(**SMALL, **first).table().equals(table)


@pytest.mark.parametrize("name", STUDIES)
def test_an_updated_plot_is_a_fresh_plot(name):
    run, first, then = STUDIES[name]
    before, after = run(**SMALL, **first), run(**SMALL, **first | then)
    plot, fresh = PLOTS[name](before), PLOTS[name](after)
    old = pixels(plot)
    plot.update(after)
    assert plot.fits(after)
    np.testing.assert_array_equal(pixels(plot), pixels(fresh))
    assert (pixels(plot) != old).any()
    assert plot.figure.get_label() == fresh.figure.get_label()
    assert not plot.fits(run(**SMALL | {"widths": (5, 4, 3)}, **first))


def pixels(plot):
    with matplotlib.rc_context(rc()):  # paths are made when they are drawn
        plot.figure.canvas.draw()
    return np.asarray(plot.figure.canvas.buffer_rgba()).copy()


@pytest.mark.parametrize("name", ["fisher", "hessian", "kfac"])
def test_every_block_of_every_matrix_tells_its_layers(name):
    run, first, _ = STUDIES[name]
    result = run(**SMALL, **first)
    plot = PLOTS[name](result)
    views = {"fisher": lambda: plot.matrices, "hessian": lambda: [*plot.matrices.values()],
             "kfac": lambda: [plot.F, plot.error]}[name]()  # fmt: skip
    regions = plot.regions(result)
    assert len(regions) == len(views) * len(result.partition) ** 2
    for i, view in enumerate(views):
        boxes = np.array([region[:4] for region in regions[9 * i : 9 * i + 9]])
        x, y, width, height = view.ax.get_position().bounds
        assert (boxes[:, 2] * boxes[:, 3]).sum() == pytest.approx(width * height)
        np.testing.assert_allclose(boxes[0, :2], [x, 1 - y - height])
        np.testing.assert_allclose(boxes[-1, :2] + boxes[-1, 2:], [x + width, 1 - y])
    assert re.search(r"ayers 1( .*)? and 2", regions[1][4])


def test_curves_take_the_median_and_the_range():
    c = curve([1, 2], [[3.0, 1.0], [1.0, 2.0], [2.0, 12345.6]])
    np.testing.assert_array_equal(c.y, [2, 2])
    np.testing.assert_array_equal(c.low, [1, 1])
    np.testing.assert_array_equal(c.high, [3, 12350])


@pytest.mark.parametrize("name", ["01a", "01b", "01c", "01d", "02a", "02b", "04a", "04b"])
def test_exercises_know_right_from_wrong(name):
    truth = kv.exercises.TRUTHS[name].truth()
    assert "right" in kv.exercises.check(name, truth)
    assert "not yet" in kv.exercises.check(name, np.multiply(truth, 1.5))
    assert "put your answer" in kv.exercises.check(name, None)
    assert "numbers" in kv.exercises.check(name, "a word")
