"""Studies of coarse spaces: Poisson's equation, ridge regression, sizes and depth; their tables and pictures."""

import inspect
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch

import kfac_viz as kv
from kfac_viz.method.two_level import CORRECTIONS
from kfac_viz.show.style import rc
from kfac_viz.studies import depth, layer_overlap
from kfac_viz.studies.coarse_space_sizes import nested
from kfac_viz.studies.common.result import curve, rounded
from kfac_viz.studies.common.setting import setting, shares
from kfac_viz.studies.depth import largest_eigenvalue, methods
from kfac_viz.studies.two_levels import _errors, _ridge, poisson

ROOT = Path(__file__).parents[2]
STUDIES = {
    "origin": (
        kv.studies.two_levels.run, kv.studies.two_levels.Plot,
        dict(local=8, subdomains=(2, 4), shown=3, clusters=(2, 5), n=60, repeats=2),
        dict(damping=0.1, per_subdomain=2, sweeps=3), dict(shown=4),
    ),
    "sizes": (
        kv.studies.coarse_space_sizes.run, kv.studies.coarse_space_sizes.Plot,
        dict(sizes=(0, 1, 3), widths=(5, 4), n=40, repeats=2), dict(), dict(sizes=(0, 2)),
    ),
    "depth": (
        kv.studies.depth.run, kv.studies.depth.Plot,
        dict(layers=(2, 3), width=6, n=40, steps=2, repeats=2, networks=("planted",), damping_shares=(1e-3, 1e-2),
             measured=""),
        dict(damping_share=0.05, per_layer=2), dict(layers=(2, 4)),
    ),
}  # fmt: skip


# ---- Poisson's equation ----------------------------------------------------------------------------------


def test_poisson_is_the_matrix_of_second_differences():
    A = poisson(3, 4)
    x = torch.linspace(0, 1, 14, dtype=torch.float64)[1:-1]
    u = x * (1 - x)  # −u″ = 2, and second differences of a parabola are exact
    torch.testing.assert_close(A @ u * 13**2, torch.full_like(u, 2.0), rtol=1e-10, atol=0)
    assert A.partition.slices[1] == slice(4, 8)


@pytest.mark.parametrize("subdomains", [2, 5, 9])
def test_block_jacobi_differs_from_the_identity_in_pairs_at_inner_boundaries(subdomains):
    A = poisson(subdomains, 6)
    values = kv.spectrum(A, kv.BlockDiagonal(A, 0.0))
    assert int(((values - 1).abs() > 1e-9).sum()) == 2 * (subdomains - 1)
    torch.testing.assert_close(values + values.flip(0), torch.full_like(values, 2.0), rtol=0, atol=1e-12)


def test_iterations_on_the_interval():
    study = kv.studies.two_levels.run(subdomains=(2, 4, 8), local=8, clusters=(2,), n=50, shown=2, repeats=3)
    found = study.of("poisson")
    np.testing.assert_array_equal(found["none"].y, [16, 32, 64])  # as many as points
    for s, low, high in zip((2, 4, 8), found["blocks"].low, found["blocks"].high, strict=True):
        assert s - 1 <= low and high <= 2 * s - 1  # news crosses one boundary at a time; 2s − 1 eigenvalues differ
    assert (found["balanced"].high <= 3).all()
    A = poisson(8, 8)
    values = kv.spectrum(A, kv.TwoLevel(A, kv.BlockDiagonal(A, 0.0), kv.coarse.nicolaides(A, 1)))
    assert len(np.unique(np.round(values.numpy(), 8))) == 3


def test_sweeps_remove_energy_and_two_levels_more_of_it():
    start = _errors(4, 8, 1, 0, 0, "cpu")[1]
    for modes in start.values():
        np.testing.assert_allclose(modes, 1.0, rtol=1e-9)
    energy = {n: {k: (m**2).sum() for k, m in _errors(4, 8, 1, n, 0, "cpu")[1].items()} for n in (1, 5, 20)}
    for name in ("blocks", "balanced"):
        assert 32 > energy[1][name] > energy[5][name] > energy[20][name]
    assert all(e["balanced"] < e["blocks"] for e in energy.values())


# ---- ridge regression ------------------------------------------------------------------------------------


def test_the_dual_ridge_regression_is_the_primal_one():
    from sklearn.datasets import load_digits

    ridge, λ = _ridge(4, 80, 3, "cpu"), 1e-2
    chosen = np.random.default_rng(3).permutation(1797)[:80]
    pixels, labels = load_digits(return_X_y=True)
    x, y = pixels[chosen] / 16, np.where(labels[chosen] == 3, 1.0, -1.0)
    x /= np.linalg.norm(x, 2)  # λ is a share of the largest eigenvalue
    alpha = kv.pcg(ridge.B.damped(λ), ridge.b, rtol=1e-12).solution
    weights = np.linalg.solve(x.T @ x + λ * np.eye(64), x.T @ y)
    dual = (ridge.B @ alpha).numpy()  # X w, in the order of the clusters
    np.testing.assert_allclose(np.sort(dual), np.sort(x @ weights), rtol=1e-8)


def test_clusters_and_random_groups_have_the_same_sizes_and_spectrum():
    ridge = _ridge(6, 90, 0, "cpu")
    R, r = ridge.random
    assert ridge.B.partition == R.partition and ridge.B.partition.size == 90
    assert len(ridge.B.partition) == len(ridge.means) == 6
    torch.testing.assert_close(kv.spectrum(ridge.B), kv.spectrum(R), rtol=0, atol=1e-12)
    assert float(kv.spectrum(R)[-1]) == pytest.approx(1, abs=1e-12)
    assert float(r.sum()) == float(ridge.b.sum())


# ---- sizes and depth -------------------------------------------------------------------------------------


def network():
    return setting("digits4", (5, 4), 60, 1, 3)


def test_every_space_is_nested_and_the_optimal_one_lowest():
    sizes = (0, 1, 2, 3)
    result = kv.studies.coarse_space_sizes.run(sizes=sizes, widths=(5, 4), n=60, steps=2, seed=1, repeats=1)
    largest = {name: c.y for name, c in result.of("largest").items() if name.endswith("balanced")}
    for name, values in largest.items():
        assert (np.diff(values) <= 0).all(), name
        assert (values >= 1).all() and (largest["optimal, balanced"] <= values * (1 + 1e-3)).all(), name
    assert largest["optimal, balanced"][-1] < largest["optimal, balanced"][0]
    first = {c.y[0] for name, c in result.of("captured").items() if name != "factored"}
    assert len(first) == 1  # size 0 is K-FAC, whatever the space and the correction


@pytest.mark.parametrize("rule", ["eigen", "factored"])
def test_kfac_alone_stands_beside_the_columns_with_either_rule(rule):
    result = kv.studies.coarse_space_sizes.run(sizes=(0, 2), widths=(5, 4), n=60, steps=3, seed=1, repeats=1, rule=rule)
    one = network()
    A, g = one.F.damped(1e-2), one.g
    for name, each in (("kfac", "eigen"), ("factored", "factored")):
        M = kv.KFAC(one.F, 1e-2, each)
        expected = {"captured": kv.captured_decrease(A, g, M @ g), "largest": float(kv.spectrum(A, M)[-1])}
        for quantity, value in expected.items():
            np.testing.assert_allclose(result.of(quantity)[name].y, value, rtol=1e-3)
        assert (result.of("captured")["spectral, balanced"].y[0] == result.of("captured")[name].y[0]) == (each == rule)


def test_sizes_can_be_set_in_the_panel():
    one = dict(widths=(5, 4), n=40, repeats=1)
    study = kv.studies.coarse_space_sizes
    panel = kv.panel(study.run, study.Plot, ["sizes"], sizes=(0, 1), **one)
    panel.controls["sizes"].value = "[0,2]"
    assert panel.error == "" and panel.result.parameters["sizes"] == (0, 2)
    assert panel.result.table().equals(kv.studies.coarse_space_sizes.run(sizes=(0, 2), **one).table())


@pytest.mark.parametrize("name", kv.coarse.SPACES)
def test_sizes_measure_what_the_first_figure_does(name):
    shared = dict(damping=0.02, widths=(5, 4), n=60, steps=2, seed=1)
    one = kv.studies.coarse_space.run(coarse=name, per_layer=2, correction="additive", **shared)
    many = kv.studies.coarse_space_sizes.run(sizes=(1, 2), repeats=1, **shared)
    for correction in ("additive", "balanced"):
        for quantity in ("captured", "at_best_length", "at_layer_lengths"):
            found = many.of(quantity)[f"{name}, {correction}"].y[1]
            assert found == pytest.approx(getattr(one, quantity)[correction], rel=1e-3)
    for alone in ("kfac", "factored"):
        assert many.of("captured")[alone].y[0] == pytest.approx(one.captured[alone], rel=1e-3)
    assert many.of("largest")[f"{name}, additive"].y[1] == pytest.approx(float(one.spectra["additive"][-1]), rel=1e-3)


def test_nested_spaces_are_those_that_the_builders_give():
    one = network()
    A, M = kv.Dense(one.dense, one.F.partition).damped(0.1), kv.KFAC(one.F, 0.1)
    for Z, k in zip(nested("optimal", A, M, one, (0, 1, 2)), (0, 1, 2), strict=True):
        own = kv.coarse.optimal(A, M, k)
        assert Z.size == own.size
        for T in (kv.TwoLevel(A, M, space, "additive").dense() for space in (Z, own)):
            torch.testing.assert_close(T, kv.TwoLevel(A, M, own, "additive").dense(), rtol=1e-8, atol=1e-8)


def test_lanczos_finds_the_end_of_the_spectrum():
    one = network()
    A, M = one.F.damped(1e-3), kv.KFAC(one.F, 1e-3)
    L = torch.linalg.cholesky(A.dense())
    compared = [*methods(A, M, one.g, 0).values(), *methods(A, M, one.g, 3).values()]
    for T in (T for T in compared if T.symmetric):
        assert largest_eigenvalue(T.dense(), L) == pytest.approx(float(kv.spectrum(A, T)[-1]), rel=1e-7)


@pytest.mark.parametrize(("two", "told"), [
    (0.7, "more than K-FAC by either rule"), (0.5, "more than K-FAC by one rule"), (0.4, "no more than K-FAC"),
])  # fmt: skip
def test_depth_titles_one_seed_by_the_order_of_the_methods(two, told):
    best = zip(depth.SEPARATED, (0.6, 0.4, two), strict=True)
    curves = {("at_best_length", name): curve([4], [share]) for name, share in best}
    result = depth.Result(dict(repeats=1, layers=(4,), per_layer=2), curves, {})
    assert f"2 eigenvectors capture {told}" in result.headline and "0." not in result.headline


@pytest.mark.parametrize("data", depth.NETWORKS)
def test_depth_is_what_the_objects_say(data):
    chosen = dict(width=7, n=50, steps=2, seed=4, rtol=0.1, per_layer=2)  # few iterations, before rounding counts
    result = kv.studies.depth.run(layers=(4,), data=data, damping_share=0.01, repeats=1, networks=(), damping_shares=(),
                                  measured="", **chosen)  # fmt: skip
    if data == "digits4":
        problem = kv.problems.digits((7, 7, 7), 50, 4, side=4).trained(2)
    else:
        extras = dict(batch_norm="bn" in data, residual="residual" in data)
        problem = kv.problems.planted(4, 7, 50, 4, **extras).trained(2)
    with pytest.warns(UserWarning) if "bn" in data else matplotlib.rc_context():
        F = problem.capture()
    values, g = torch.linalg.eigvalsh(F.dense()), problem.gradient()
    λ = 0.01 * float(values[-1])
    A = F.damped(λ)
    assert result.of("above")["eigenvalues"].y[0] == int((values > λ).sum())
    M, leading = kv.KFAC(F, λ), kv.coarse.spectral(F, 2)
    expected = {
        "none": kv.Identity(F),
        "diagonal": kv.Diagonal(F, λ),
        "block-diagonal": kv.BlockDiagonal(F, λ),
        "kfac": M,
        "factored": kv.KFAC(F, λ, "factored"),
        "constants, additive": kv.TwoLevel(A, M, kv.coarse.nicolaides(F, 1), "additive"),
        "constants, balanced": kv.TwoLevel(A, M, kv.coarse.nicolaides(F, 1)),
        **{f"leading, {name}": kv.TwoLevel(A, M, leading, name) for name in CORRECTIONS},
        "krylov, balanced": kv.TwoLevel(A, M, kv.coarse.krylov(A, M, g, 2)),
    }
    assert result.of("captured").keys() == expected.keys()
    for name, T in expected.items():
        v = T @ g
        best = v * (g @ v) / (v @ (A @ v))
        for quantity, direction in (("captured", v), ("at_best_length", best)):
            share = kv.captured_decrease(A, g, direction)
            assert result.of(quantity)[name].y[0] == pytest.approx(share, rel=1e-3, abs=1e-9)
        if T.symmetric:
            assert result.of("iterations")[name].y[0] == kv.pcg(A, g, T, rtol=0.1).iterations


def test_the_overlap_is_the_largest_eigenvalue_of_what_the_layers_do_to_the_outputs():
    """``K_l (K_l + λ)⁻¹`` from the scores, in sample space, summed over the layers."""
    case = depth.Case("planted", 5, 6, 40, 3, 1, 1e-2, 1, 1e-6)
    F = kv.problems.planted(5, 6, 40, 1).trained(3).capture()
    λ = 1e-2 * float(F.eigen.d[-1])
    J = torch.stack([F.pull(row.view(1, 40)) for row in torch.eye(40, dtype=torch.float64)]) / 40**0.5
    total = torch.zeros(40, 40, dtype=torch.float64)
    for s in F.partition.slices:
        K = J[:, s] @ J[:, s].T
        total += K @ torch.linalg.inv(K + λ * torch.eye(40))
    overlap = float(torch.linalg.eigvals(total).real.max())
    assert 1 < overlap < 5
    assert depth.measure(case, True)["layer_overlap", "layers"] == pytest.approx(overlap, rel=1e-3)


# ---- length and direction --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_best_lengths_are_best(seed):
    """One length, and one for each layer, against least squares in the metric A."""
    generator = torch.Generator().manual_seed(seed)
    X, g, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((9, 9), (9,), (9,)))
    v[3:5] = 0  # a layer that does not move
    partition = kv.Partition.from_sizes([3, 2, 4])
    A = kv.Dense(X @ X.T, partition).damped(1.0)
    pieces = torch.zeros(9, 3, dtype=torch.float64)
    for l, s in enumerate(partition.slices):
        pieces[s, l] = v[s]
    L = torch.linalg.cholesky(A.dense())
    exact = torch.linalg.solve(A.dense(), g)

    def best(columns):  # the share that their span captures: a projection of Lᵀ A⁻¹ g
        x = torch.linalg.lstsq(L.T @ columns, (L.T @ exact)[:, None], driver="gelsd").solution
        return float(1 - (L.T @ (columns @ x)[:, 0] - L.T @ exact).square().sum() / (exact @ g))

    found = shares(A, g, v)
    assert found.captured == pytest.approx(kv.captured_decrease(A, g, v), rel=1e-12)
    assert found.at_best_length == pytest.approx(best(v[:, None]), rel=1e-10)
    assert found.at_layer_lengths == pytest.approx(best(pieces), rel=1e-10)
    assert found.captured <= found.at_best_length <= found.at_layer_lengths <= 1


def test_one_length_per_layer_is_the_coarse_problem_over_the_pieces():
    one = network()
    A, M = one.F.damped(0.01), kv.KFAC(one.F, 0.01)
    pieces = kv.CoarseCorrection(A, kv.coarse.krylov(A, M, one.g, 1))
    share = kv.captured_decrease(A, one.g, pieces @ one.g)
    assert shares(A, one.g, M @ one.g).at_layer_lengths == pytest.approx(share, rel=1e-10)


# ---- the measured table ----------------------------------------------------------------------------------


def test_the_table_holds_all_that_is_published_and_a_small_part_of_it_recomputes():
    p = {name: parameter.default for name, parameter in kv.parameters.read(kv.studies.depth.run).items()}
    table, wanted = depth.read(ROOT / "figures" / "benchmarks" / "depth.csv"), depth.cases(p)
    for case, whole in wanted.items():
        assert len(table[case]) >= (len(depth.MAPPED) if not whole else 50), case
    small = [case for case in wanted if case.layers <= 3 and case.seed == 1 and case.damping_share >= 1e-3]
    assert len(small) > 20
    for case in small:
        for key, value in depth.measure(case, wanted[case]).items():
            slack = dict(abs=1) if key[0] in ("iterations", "above") else dict(rel=5e-3, abs=2e-3)
            assert table[case][key] == pytest.approx(value, **slack), (case, key)


def test_what_is_measured_is_not_computed_again(tmp_path, monkeypatch):
    small = STUDIES["depth"][2]
    live = kv.studies.depth.run(**small)
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "benchmarks"))
    import depth as benchmark

    sys.modules.pop("depth"), sys.modules.pop("machine")
    wanted = depth.cases(live.parameters)
    benchmark.extend(tmp_path / "depth.csv", wanted, seconds=0)
    assert depth.read(tmp_path / "depth.csv") == {}
    benchmark.extend(tmp_path / "depth.csv", dict(list(wanted.items())[:5]))
    benchmark.extend(tmp_path / "depth.csv", wanted)
    whole = (tmp_path / "depth.csv").read_bytes()
    benchmark.extend(tmp_path / "depth.csv", wanted)
    assert (tmp_path / "depth.csv").read_bytes() == whole
    monkeypatch.setattr(depth, "measure", None)  # whoever calls it fails
    again = kv.studies.depth.run(**small | {"measured": str(tmp_path / "depth.csv")})
    assert again.table().equals(live.table())
    with pytest.raises(ValueError, match="measured must name a table"):
        kv.studies.depth.run(**small | {"measured": "none.csv"})


def test_block_jacobi_exceeds_the_number_of_layers_never():
    for layers in (2, 5):
        F = kv.problems.planted(layers, 6, n=60).trained(10).capture()
        A = F.damped(1e-3)
        values = kv.spectrum(A, kv.BlockDiagonal(F, 1e-3))
        assert 1 < float(values[-1]) <= layers * (1 + 1e-10)


# ---- tables, pictures, exercises, verdicts ---------------------------------------------------------------


@pytest.mark.parametrize("name", STUDIES)
def test_tables_are_tidy_and_rounded(name):
    run, _, small, *_ = STUDIES[name]
    table = run(**small).table()
    network = ["data", "steps", "damping_share"] * (name == "depth")
    assert list(table) == [*network, "quantity", "series", "x", "median", "low", "high"]
    assert not table.duplicated([*network, "quantity", "series", "x"]).any()
    numbers = table[["median", "low", "high"]].to_numpy()
    assert np.isfinite(numbers).all()
    assert (numbers[:, 1] <= numbers[:, 0]).all() and (numbers[:, 0] <= numbers[:, 2]).all()
    np.testing.assert_array_equal(numbers, rounded(numbers))


@pytest.mark.parametrize("name", STUDIES)
def test_an_updated_plot_is_a_fresh_plot(name):
    run, Plot, small, moved, other = STUDIES[name]
    before, after = run(**small), run(**small | moved)
    plot, fresh = Plot(before), Plot(after)
    old = pixels(plot)
    plot.update(after)
    assert plot.fits(after)
    np.testing.assert_array_equal(pixels(plot), pixels(fresh))
    assert not moved or (pixels(plot) != old).any()
    assert plot.figure.get_label() == fresh.figure.get_label()
    assert not plot.fits(run(**small | other | {"repeats": 1}))


def pixels(plot):
    with matplotlib.rc_context(rc()):  # paths are made when they are drawn
        plot.figure.canvas.draw()
    return np.asarray(plot.figure.canvas.buffer_rgba()).copy()


@pytest.mark.parametrize("name", STUDIES)
def test_studies_take_lists_and_refuse_what_is_out_of_range(name):
    run, _, small, *_ = STUDIES[name]
    lists = {key: list(value) if isinstance(value, tuple) else value for key, value in small.items()}
    assert run(**lists).table().equals(run(**small).table())
    with pytest.raises(ValueError, match="repeats must be a whole number from 1 to 20; got 0"):
        run(**small | {"repeats": 0})


@pytest.mark.parametrize("name", sorted({study.__name__.rpartition(".")[2] for study in kv.studies.NOTEBOOKS.values()}))
def test_every_study_refuses_what_is_out_of_range_in_words(name):
    run = getattr(kv.studies, name).run
    takes = inspect.signature(run).parameters
    if "seed" in takes:
        with pytest.raises(ValueError, match="seed must be a whole number from 0 to 2147483647; got -1"):
            run(seed=-1)
    if "device" in takes:
        with pytest.raises(ValueError, match="device must be one of cpu, cuda, mps; got abacus"):
            run(device="abacus")
    with pytest.raises(TypeError, match="unexpected keyword argument 'abacus'"):
        run(abacus=1)


@pytest.mark.parametrize("name", ["05a", "05b", "07b", "08a", "08b", "10a"])
def test_exercises_know_right_from_wrong(name):
    truth = kv.exercises.TRUTHS[name].truth()
    assert "right" in kv.exercises.check(name, truth)
    assert "not yet" in kv.exercises.check(name, 1.5 * truth)


def test_exercises_that_ask_for_a_name_and_a_size():
    assert "right" in kv.exercises.check("07a", " Krylov")
    assert "not yet" in kv.exercises.check("07a", "optimal")


# ---- conjugate gradients in exact arithmetic -------------------------------------------------------------


def test_orthogonal_residuals_end_after_as_many_iterations_as_there_are_eigenvalues():
    Q = torch.linalg.qr(torch.randn(60, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    d = torch.tensor([1.0, 3.0, 10.0, 40.0, 100.0], dtype=torch.float64).repeat(12)
    A = kv.Dense((Q * d) @ Q.T, kv.Partition.from_sizes([30, 30]))
    found = kv.pcg(A, Q.sum(1), rtol=1e-10, reorthogonalize=True)
    assert found.iterations == 5
    torch.testing.assert_close(A @ found.solution, Q.sum(1), rtol=1e-9, atol=1e-9)
    plain = kv.pcg(A, Q.sum(1), rtol=1e-10)
    np.testing.assert_allclose(found.residuals[:4], plain.residuals[:4], rtol=1e-10)


def test_the_last_bits_do_not_change_their_number():
    one = setting("planted", (8,) * 4, 200, 1, 20)
    λ = 1e-4 * float(one.F.eigen.d[-1])
    counts = {True: set(), False: set()}
    for seed in range(4):
        noise = torch.randn(one.dense.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        matrix = one.dense + 1e-16 * float(one.dense.abs().max()) * (noise + noise.T)
        A, M = kv.Dense(matrix, one.F.partition).damped(λ), kv.KFAC(one.F, λ)
        for orthogonal, found in counts.items():
            found.add(kv.pcg(A, one.g, M, rtol=1e-6, reorthogonalize=orthogonal).iterations)
    assert len(counts[True]) == 1
    assert max(counts[True]) < min(counts[False])


def test_how_many_of_two_layers_take_the_same_step_is_the_count_for_those_two():
    from kfac_viz.studies.common.setting import setting
    from kfac_viz.studies.layer_overlap import _pairs

    s = setting("digits4", (5, 4), 30, 0, 3)
    pairs = _pairs(s, 0.01)
    for l in range(3):
        for m in range(l):
            layers = [s.F.partition.names[i] for i in (m, l)]
            two = kv.capture(s.problem.model, s.problem.inputs, likelihood="categorical", layers=layers)
            assert pairs[l, m] == pytest.approx(two.damped(0.01).layer_overlap(), rel=2e-3)
    result = layer_overlap.run(widths=(5, 4), n=30, repeats=2, steps=3)
    for stage in ("untrained", "trained"):  # the count bounds the best factor from below
        assert (result.of("length")[stage].low >= result.of("inverse")[stage].low * (1 - 1e-3)).all()
        assert (result.of("layer_overlap")[stage].y <= 3 + 1e-9).all()
