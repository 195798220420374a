"""Corrections: dense formulas, and the facts that hold when the coarse operator is built from A itself."""

import copy
import pickle

import pytest
import torch
from helpers import CORRECTIONS, DEVICES, SPACES, ZOO, assert_close, captured, error, normal, space

import kfac_viz as kv

pytestmark = pytest.mark.filterwarnings("ignore:Outside the Fisher")

SYMMETRIC = ("additive", "balanced")


def setting(case="residual", damping=0.05, rule="eigen"):
    F = captured(case)
    return F, F.damped(damping), kv.KFAC(F, damping, rule), normal(F.shape[0], seed=3)


def written_out(A, M, Z, correction, coarse=None):
    """Tang et al. 2009, with dense matrices."""
    E = Z.T @ (A if coarse is None else coarse) @ Z
    Q, I = Z @ torch.linalg.solve(E, Z.T), torch.eye(len(A), dtype=A.dtype)
    P = I - A @ Q
    return {
        "additive": M + Q,
        "a-def1": Q + M @ P,
        "a-def2": M + Q @ (I - A @ M),
        "balanced": Q + P.T @ M @ P,
    }[correction]


# ---- against dense formulas --------------------------------------------------------------------------


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("case", ["residual", "positions, T² > S", "sigmoid, some bias"])
def test_apply_and_dense_are_the_formula(case, name, correction):
    F, A, M, g = setting(case)
    Z = space(name, A, M, g, 2)
    T = kv.TwoLevel(A, M, Z, correction)
    expected = written_out(A.dense(), M.dense(), Z.dense(), correction)
    assert_close(T.dense(), expected, 1e-11)
    assert_close(T @ T.eye(), expected, 1e-11)
    assert_close(T @ g, expected @ g, 1e-11)
    assert_close(T.contribution(), expected - M.dense(), 1e-10)
    first = F.partition.slices[0]
    assert_close(T.block(0, 0), expected[first, first], 1e-11)
    assert (T @ g[:, None][:, :0]).shape == (F.shape[0], 0)


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("name", ["nicolaides", "krylov", "optimal"])
def test_another_operator_can_be_coarsened(name, correction):
    F, A, M, g = setting()
    K, Z = kv.KroneckerFisher(F).damped(0.05), space(name, A, M, g, 2)
    T = kv.TwoLevel(A, M, Z, correction, coarse_operator=K)
    expected = written_out(A.dense(), M.dense(), Z.dense(), correction, coarse=K.dense())
    assert_close(T.dense(), expected, 1e-10)
    assert_close(T @ T.eye(), expected, 1e-10)
    assert "coarsens another operator" in repr(T)


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_matrices_that_are_not_fishers(correction):
    """Block Jacobi for a Poisson matrix with one constant per subdomain."""
    n, partition = 12, kv.Partition.from_sizes([3] * 4)
    poisson = 2 * torch.eye(n) - torch.diag(torch.ones(n - 1), 1) - torch.diag(torch.ones(n - 1), -1)
    A = kv.Dense(poisson.double(), partition)
    M, Z = kv.BlockDiagonal(A, 0.0), kv.coarse.nicolaides(A)
    T = kv.TwoLevel(A, M, Z, correction)
    assert_close(T.dense(), written_out(A.dense(), M.dense(), Z.dense(), correction), 1e-12)
    assert_close(T @ A.eye(), T.dense(), 1e-12)
    with pytest.raises(ValueError, match=r"A \(Dense\) has no damping to move"):
        T.with_damping(1.0)


# ---- facts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("name", SPACES)
def test_an_empty_space_gives_m_back_to_the_bit(name, correction):
    F, A, M, g = setting()
    T = kv.TwoLevel(A, M, space(name, A, M, g, 0), correction)
    assert torch.equal(T @ g, M @ g) and torch.equal(T.dense(), M.dense())
    assert T.symmetric and not T.contribution().any() and T.contribution().shape == F.shape


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_the_identity_as_space_is_the_exact_solve(correction):
    F, A, M, _ = setting()
    T = kv.TwoLevel(A, M, kv.CoarseSpace(F.partition, F.eye()), correction)
    exact = torch.linalg.inv(A.dense())
    assert_close(T.dense(), exact + M.dense() if correction == "additive" else exact, 1e-10)


@pytest.mark.parametrize("coarse", ["itself", "kronecker"])
def test_q_is_unchanged_when_columns_are_rescaled_or_mixed(coarse):
    F, A, M, _ = setting()
    B = A if coarse == "itself" else kv.KroneckerFisher(F).damped(0.05)
    columns, mix = normal(F.shape[0], 4), normal(4, 4, seed=7)
    Q = kv.CoarseCorrection(B, kv.CoarseSpace(F.partition, columns))
    for other in (columns * torch.tensor([1e-6, 1.0, 1e3, -1e6], dtype=torch.float64), columns @ mix):
        assert_close(kv.CoarseCorrection(B, kv.CoarseSpace(F.partition, other)).dense(), Q.dense(), 1e-8)


def test_q_is_a_projection_of_the_inverse():
    F, A, M, g = setting()
    Z = space("spectral", A, M, g, 2)
    Q = kv.CoarseCorrection(A, Z)
    matrix, c = Q.dense(), normal(2, Z.size)
    assert_close(matrix @ A.dense() @ Z.dense(), Z.dense(), 1e-11)
    assert_close(matrix @ A.dense() @ matrix, matrix, 1e-11)
    assert_close(Q @ F.eye(), matrix, 1e-12)
    assert_close(Q.E.solve(c), torch.linalg.solve(Q.E.dense(), c.T).T, 1e-11)
    assert_close(Q.E.solve(c[0]), Q.E.solve(c)[0], 1e-14)


@pytest.mark.parametrize("name", SPACES)
def test_after_a_def2_the_residual_is_orthogonal_to_z(name):
    _, A, M, g = setting()
    Z = space(name, A, M, g, 2)
    columns = Z.dense() / Z.dense().norm(dim=0)

    def left(correction):
        return float((columns.T @ (g - A @ (kv.TwoLevel(A, M, Z, correction) @ g))).abs().max() / g.norm())

    assert left("a-def2") < 1e-11 and left("balanced") < 1e-11
    assert left("a-def1") > 1e-3 or name == "optimal"  # negative control; M keeps eigenvectors apart by itself
    assert left("additive") > 1e-3


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("rule", ["eigen", "factored"])
def test_a_def2_never_captures_less_than_m_alone(name, seed, rule):
    F, A, M, _ = setting(damping=1e-3, rule=rule)
    g = F @ normal(F.shape[0], seed=seed)
    T = kv.TwoLevel(A, M, space(name, A, M, g, 2), "a-def2")
    assert kv.captured_decrease(A, g, T @ g) >= kv.captured_decrease(A, g, M @ g) - 1e-10


def test_additive_counts_twice_what_m_already_solved():
    """On a column of Z that M solves exactly, the step is twice the right one, and balanced is exact."""
    partition = kv.Partition.from_sizes([2, 2])
    A = kv.Dense(torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0])).double(), partition)
    M = kv.BlockDiagonal(A, 0.0)  # exact here
    Z = kv.CoarseSpace(partition, torch.eye(4, dtype=torch.float64)[:, :1])
    r = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    assert_close(kv.TwoLevel(A, M, Z, "additive") @ r, 2 * r, 1e-14)
    for correction in ("a-def1", "a-def2", "balanced"):
        assert_close(kv.TwoLevel(A, M, Z, correction) @ r, r, 1e-14)


@pytest.mark.parametrize("name", SPACES)
def test_deflated_forms_share_a_spectrum_with_an_eigenvalue_one_for_every_column(name):
    _, A, M, g = setting()
    Z = space(name, A, M, g, 2)
    T = {correction: kv.TwoLevel(A, M, Z, correction) for correction in CORRECTIONS}
    values = {}
    for correction in ("a-def1", "a-def2", "balanced"):
        found = torch.linalg.eigvals(T[correction].dense() @ A.dense())
        assert float(found.imag.abs().max()) < 1e-6
        values[correction] = found.real.sort().values
        assert_close(kv.spectrum(A, T[correction]), values[correction], 1e-7)
        assert int(((values[correction] - 1).abs() < 1e-7).sum()) >= Z.size
    additive = torch.linalg.eigvals(T["additive"].dense() @ A.dense()).real.sort().values
    assert_close(kv.spectrum(A, T["additive"]), additive, 1e-10)
    assert error(additive, values["balanced"]) > 1e-3  # negative control


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_symmetry_is_what_it_says(correction):
    _, A, M, g = setting()
    T = kv.TwoLevel(A, M, space("krylov", A, M, g, 2), correction)
    matrix = T.dense()
    assert T.symmetric == (correction in SYMMETRIC) == (error(matrix, matrix.T) < 1e-10)
    if T.symmetric:
        assert float(torch.linalg.eigvalsh(matrix)[0]) > 0


@pytest.mark.parametrize("correction", ["a-def1", "a-def2"])
def test_facts_fail_with_another_coarse_operator_and_spectrum_refuses_it(correction):
    """Negative control: the Kronecker model is not A."""
    F, A, M, g = setting()
    Z = space("spectral", A, M, g, 2)
    T = kv.TwoLevel(A, M, Z, correction, coarse_operator=kv.KroneckerFisher(F).damped(0.05))
    left = Z.restrict(g - A @ (T @ g))
    assert float(left.abs().max()) > 1e-3 * float(g.norm())
    with pytest.raises(ValueError, match=f"'{correction}' is not symmetric"):
        kv.spectrum(A, T)


@pytest.mark.parametrize("correction", ["a-def1", "a-def2"])
def test_spectrum_refuses_a_def_that_coarsened_another_damping(correction):
    F, A, M, g = setting()
    T = kv.TwoLevel(A, M, space("spectral", A, M, g, 2), correction)
    assert torch.isfinite(kv.spectrum(F.damped(0.05), T)).all()  # the same matrix, built anew
    with pytest.raises(ValueError, match="not symmetric"):
        kv.spectrum(F.damped(0.5), T)


# ---- another λ, another correction -------------------------------------------------------------------


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("coarse", ["itself", "kronecker"])
def test_with_damping_moves_a_m_and_e_together(correction, coarse):
    F, A, M, g = setting()
    Z = space("spectral", A, M, g, 2)

    def build(damping):
        K = kv.KroneckerFisher(F).damped(damping) if coarse == "kronecker" else None
        return kv.TwoLevel(F.damped(damping), kv.KFAC(F, damping), Z, correction, coarse_operator=K)

    T = build(0.05)
    before, _ = T.dense(), T.contribution()
    other = T.with_damping(2.0)
    fresh = build(2.0)
    assert other.damping == other.A.damping == other.M.damping == other.Q.damping == 2.0
    assert_close(other.dense(), fresh.dense(), 1e-13)
    assert_close(other @ g, fresh @ g, 1e-13)
    assert_close(other.contribution(), fresh.contribution(), 1e-12)
    assert_close(other.Q.E.dense(), fresh.Q.E.dense(), 1e-13)
    assert T.damping == 0.05 and torch.equal(T.dense(), before)
    with pytest.raises(ValueError, match="finite and at least 0"):
        T.with_damping(float("nan"))
    assert torch.equal(T.dense(), before)


def test_eigenvectors_of_an_old_damping_or_correction_are_forgotten():
    _, A, M, g = setting()
    T = kv.TwoLevel(A, M, space("spectral", A, M, g, 2), "balanced")
    first = T.eigen.d
    for other in (T.with_damping(1.0), T.with_correction("additive"), T.M.with_damping(1.0), T.Q.with_damping(1.0)):
        assert_close(other.eigen.d, torch.linalg.eigvalsh(other.dense()).clamp_min(0), 1e-10)
    assert torch.equal(T.eigen.d, first)
    with pytest.raises(ValueError, match="'a-def1' is not symmetric"):
        T.with_correction("a-def1").eigen  # noqa: B018


def test_another_damping_costs_no_factorisation_and_no_pass_over_the_data(monkeypatch):
    _, A, M, g = setting()
    T = kv.TwoLevel(A, M, space("spectral", A, M, g, 2), "balanced")
    for routine in ("eigh", "cholesky", "cholesky_ex", "inv", "solve", "solve_triangular"):
        monkeypatch.setattr(torch.linalg, routine, None)
    monkeypatch.setattr(kv.Fisher, "_apply", None)
    monkeypatch.setattr(kv.Fisher, "block", None)
    assert torch.isfinite(T.with_damping(1.0) @ g).all()
    assert torch.isfinite(T.with_damping(1.0).contribution()).all()


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_with_correction_is_a_fresh_one(correction):
    _, A, M, g = setting()
    Z = space("nicolaides", A, M, g, 2)
    for first in CORRECTIONS:
        T = kv.TwoLevel(A, M, Z, first).with_correction(correction)
        assert_close(T.dense(), kv.TwoLevel(A, M, Z, correction).dense(), 1e-14)
    with pytest.raises(ValueError, match="'additive', 'a-def1', 'a-def2', 'balanced'; got 'hybrid'"):
        T.with_correction("hybrid")


def test_refreshing_twice_on_the_same_data_changes_nothing():
    def build():
        _, A, M, g = setting()
        return kv.TwoLevel(A, M, space("spectral", A, M, g, 3), "balanced").dense()

    assert torch.equal(build(), build())


def test_an_undamped_coarse_operator_is_not_damped_in_silence():
    F, A, M, g = setting("tanh")
    B = kv.Dense(A.dense(), F.partition)
    T = kv.TwoLevel(A, M, space("spectral", A, M, g, 1), coarse_operator=B)
    with pytest.raises(ValueError, match=r"The coarse operator \(Dense\) has no damping to move"):
        T.with_damping(1.0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_float32_and_devices(device, name, correction):
    _, A, M, g = setting()
    expected = kv.TwoLevel(A, M, space(name, A, M, g, 2), correction) @ g
    model, inputs = ZOO["residual"].make()
    F = kv.capture(model.to(device, torch.float32), inputs.to(device, torch.float32), likelihood="categorical")
    A, M, g = F.damped(0.05), kv.KFAC(F, 0.05), g.to(device, torch.float32)
    T = kv.TwoLevel(A, M, space(name, A, M, g, 2), correction)
    assert (T @ g).dtype == torch.float32 and T.dense().device.type == device
    if name not in ("random", "smooth"):  # eigenvectors of eigenvalue 0 are any basis of the null space
        assert_close((T @ g).cpu().double(), expected, 1e-3)


def test_repr_tells_levels_correction_space_and_dimension():
    _, A, M, g = setting()
    T = kv.TwoLevel(A, M, space("spectral", A, M, g, 2), "a-def2")
    for words in ("KFAC + spectral", "a-def2", "coarse dimension 6", "λ = 0.05", "(20 + 16 + 15)", "float64 on cpu"):
        assert words in repr(T)
    assert "λ of A = 0.05, λ of M = 2, λ of E = 0.05" in repr(kv.TwoLevel(A, M.with_damping(2.0), T.Z))
    for words in ("CoarseCorrection", "spectral", "6 columns", "λ = 0.05"):
        assert words in repr(T.Q)


def test_levels_survive_pickling_and_copying():
    _, A, M, g = setting()
    T = kv.TwoLevel(A, M, space("spectral", A, M, g, 2), "a-def1")
    for twin in (pickle.loads(pickle.dumps(T)), copy.deepcopy(T)):
        assert torch.equal(twin @ g, T @ g) and torch.equal(twin.with_damping(1.0).dense(), T.with_damping(1.0).dense())
        assert torch.equal(kv.spectrum(twin.A, twin), kv.spectrum(A, T))


# ---- any first level ---------------------------------------------------------------------------------

FIRST_LEVELS = {
    "diagonal": kv.Diagonal,
    "blocks": kv.BlockDiagonal,
    "ekfac": kv.EKFAC,
    "shampoo": lambda F, λ: kv.KFAC(F, λ, factors="shampoo"),
    "nearest, factored": lambda F, λ: kv.KFAC(F, λ, "factored", factors="nearest"),
    "kl": lambda F, λ: kv.KFAC(F, λ, factors="kl"),
    "identity": lambda F, λ: kv.Identity(F, λ, power=1.0),
    "nothing": kv.Nothing,
}


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("first", FIRST_LEVELS)
def test_every_first_level_goes_with_the_damping(first, correction):
    F, A, _, g = setting()
    Z, build = kv.coarse.spectral(F, 2), FIRST_LEVELS[first]
    T = kv.TwoLevel(A, build(F, 0.05), Z, correction)
    for damping, moved in ((0.05, T), (0.3, T.with_damping(0.3))):
        M = build(F, damping)
        expected = written_out(F.damped(damping).dense(), M.dense(), Z.dense(), correction)
        assert_close(moved.dense(), expected, 1e-10)
        assert_close(moved @ g, expected @ g, 1e-10)


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_without_a_first_level_the_coarse_one_is_alone(correction):
    F, A, _, g = setting()
    Z = kv.coarse.spectral(F, 2)
    T = kv.TwoLevel(A, kv.Nothing(F, 0.05), Z, correction)
    assert_close(T @ g, kv.CoarseCorrection(A, Z) @ g, 1e-12)


def test_the_identity_over_the_damping_is_exact_where_the_coarse_space_has_all_of_f():
    F, A, _, g = setting("one layer")
    d, U = F.eigen
    Z = kv.CoarseSpace(F.partition, U[:, d > 1e-12 * d[-1]])
    assert_close(kv.TwoLevel(A, kv.Identity(F, 0.05, power=1.0), Z) @ g, A.solve(g), 1e-9)


def test_the_identity_over_no_damping_is_refused():
    F = captured("tanh")
    with pytest.raises(ValueError, match="identity over λ needs a damping above 0"):
        kv.Identity(F, 0.0, power=1.0)
    with pytest.raises(ValueError, match="power must lie in"):
        kv.Identity(F, 0.1, power=2.0)
