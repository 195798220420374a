"""Conjugate gradients, spectra and captured decrease against direct formulas."""

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from helpers import CORRECTIONS, DEVICES, ZOO, assert_close, captured, normal, space

import kfac_viz as kv

pytestmark = pytest.mark.filterwarnings("ignore:Outside the Fisher")


def setting(case="residual", damping=0.05):
    F = captured(case)
    return F.damped(damping), kv.KFAC(F, damping), normal(F.shape[0], seed=3)


def preconditioners(A, M, g):
    spectral = space("spectral", A, M, g, 2)
    return [None, M, kv.BlockTridiagonal(A.operator, 0.05)] + [
        kv.TwoLevel(A, M, spectral, correction) for correction in ("additive", "balanced")
    ]


# ---- conjugate gradients -----------------------------------------------------------------------------


@pytest.mark.parametrize("which", range(5))
def test_pcg_solves(which):
    A, M, g = setting()
    x = kv.pcg(A, g, M=preconditioners(A, M, g)[which], rtol=1e-12)
    assert x.converged and x.residuals[0] == 1.0 and x.iterations == len(x.residuals) - 1
    assert_close(x.solution, torch.linalg.solve(A.dense(), g), 1e-9)
    assert float((g - A @ x.solution).norm() / g.norm()) < 1e-11
    assert abs(x.residuals[-1] - float((g - A @ x.solution).norm() / g.norm())) < 1e-13


@pytest.mark.parametrize("which", range(5))
def test_pcg_needs_one_iteration_for_each_distinct_eigenvalue(which):
    A, M, g = setting()
    M = preconditioners(A, M, g)[which]
    values = kv.spectrum(A, M)
    distinct = 1 + int((values.diff() > 1e-9 * values[-1]).sum())
    assert kv.pcg(A, g, M=M, rtol=1e-8).iterations <= distinct


@pytest.mark.parametrize("which", range(5))
def test_pcg_is_scipys_cg(which):
    A, M, g = setting()
    M = preconditioners(A, M, g)[which]
    history = []
    scipy.sparse.linalg.cg(
        A.to_scipy(),
        g.numpy(),
        M=None if M is None else M.to_scipy(),
        rtol=1e-6,
        callback=lambda x: history.append(x.copy()),
    )
    ours = []
    found = kv.pcg(A, g, M=M, rtol=1e-6, callback=lambda x, residual: ours.append((x, residual)))
    assert found.iterations == len(history) == len(ours)
    for theirs, (x, _) in zip(history, ours, strict=True):
        assert_close(x, torch.as_tensor(theirs), 1e-7)
    assert [residual for _, residual in ours] == list(found.residuals[1:])


def test_callback_gets_iterates_that_stay_what_they_were():
    A, _, g = setting()
    kept = []
    kv.pcg(A, g, callback=lambda x, _: kept.append(x.zero_() if len(kept) == 1 else x))
    assert not torch.equal(kept[0], kept[-1])
    assert_close(kept[-1], torch.linalg.solve(A.dense(), g), 1e-6)


def test_pcg_starts_where_it_is_told():
    A, M, g = setting()
    exact = torch.linalg.solve(A.dense(), g)
    x0 = exact + 1e-3 * normal(len(g))
    before = x0.clone()
    warm = kv.pcg(A, g, M=M, x0=x0)
    assert abs(warm.residuals[0] - float((g - A @ x0).norm() / g.norm())) < 1e-14
    assert warm.iterations < kv.pcg(A, g, M=M).iterations
    assert_close(warm.solution, exact, 1e-7)
    assert torch.equal(x0, before)
    assert kv.pcg(A, g, x0=exact, rtol=1e-6).iterations == 0


def test_pcg_stops_at_the_limit_and_says_so():
    A, _, g = setting()
    x = kv.pcg(A, g, max_iterations=2)
    assert x.iterations == 2 and not x.converged and "not converged, 2 iterations" in repr(x)
    assert kv.pcg(A, g, max_iterations=0).iterations == 0


def test_pcg_of_zero_is_zero():
    A, M, g = setting()
    x = kv.pcg(A, 0 * g, M=M)
    assert x.converged and x.iterations == 0 and not x.solution.any()


@pytest.mark.parametrize("correction", ["a-def1", "a-def2"])
def test_pcg_refuses_a_preconditioner_that_is_not_symmetric_by_its_name(correction):
    A, M, g = setting()
    with pytest.raises(ValueError, match=f"pcg needs a symmetric operator and '{correction}' is not"):
        kv.pcg(A, g, M=kv.TwoLevel(A, M, space("spectral", A, M, g, 2), correction))


def test_pcg_refuses_an_indefinite_matrix():
    A = kv.Dense(torch.diag(torch.tensor([1.0, -1.0, 2.0])), kv.Partition.from_sizes([3]))
    with pytest.raises(ValueError, match="must be positive definite"):
        kv.pcg(A, torch.ones(3))


# ---- spectra -----------------------------------------------------------------------------------------


def test_spectrum_is_that_of_the_product():
    A, M, g = setting()
    assert_close(kv.spectrum(A), torch.linalg.eigvalsh(A.dense()))
    for P in preconditioners(A, M, g)[1:]:
        expected = torch.linalg.eigvals(P.dense() @ A.dense()).real.sort().values
        assert_close(kv.spectrum(A, P), expected, 1e-10)
        assert abs(kv.condition_number(A, P) / float(expected[-1] / expected[0]) - 1) < 1e-9


def test_trace_of_the_preconditioned_fisher():
    """K-FAC without damping on its own block-diagonal: all eigenvalues are 1."""
    partition = kv.Partition.from_sizes([2, 3])
    A = kv.Dense(torch.block_diag(torch.eye(2) * 3, torch.eye(3) * 5).double(), partition)
    assert_close(kv.spectrum(A, kv.BlockDiagonal(A, 0.0)), torch.ones(5, dtype=torch.float64), 1e-14)


def test_condition_number_of_a_singular_matrix_is_inf():
    F = captured("tanh", n=1)
    assert kv.condition_number(F) > 1e15


# ---- captured decrease -------------------------------------------------------------------------------


def test_captured_decrease_is_its_definition():
    A, M, g = setting()
    v, matrix = M @ g, A.dense()
    best = torch.linalg.solve(matrix, g)

    def q(v):
        return float(g @ v - v @ matrix @ v / 2)

    found = kv.captured_decrease(A, g, v)
    assert abs(found - q(v) / q(best)) < 1e-12
    distance = (v - best) @ matrix @ (v - best) / (best @ matrix @ best)
    assert abs(found - (1 - float(distance))) < 1e-12
    assert abs(kv.captured_decrease(A, g, best) - 1) < 1e-12
    assert kv.captured_decrease(A, g, 0 * g) == 0.0
    assert abs(kv.captured_decrease(A, g, 2 * best)) < 1e-12
    assert kv.captured_decrease(A, g, 3 * best) < 0 and kv.captured_decrease(A, g, -best) < 0


@pytest.mark.parametrize("seed", range(3))
def test_nothing_captures_more_than_the_natural_gradient(seed):
    A, _, g = setting()
    best = kv.exact_direction(A, g)
    assert kv.captured_decrease(A, g, best + 0.1 * normal(len(g), seed=seed)) < 1


def test_exact_direction_of_damped_and_other_operators():
    A, _, g = setting()
    exact = torch.linalg.solve(A.dense(), g)
    assert_close(kv.exact_direction(A, g), exact, 1e-11)
    other = kv.Dense(A.dense(), A.partition)
    assert_close(kv.exact_direction(other, g), exact, 1e-11)
    assert abs(kv.captured_decrease(other, g, exact) - 1) < 1e-11


def test_predicted_decrease_is_the_true_one_on_a_quadratic():
    """A linear model with Gaussian likelihood is its own quadratic model: q(v) is what the loss goes down."""
    problem = kv.problems.planted(depth=1, activation=None, n=40)
    A, g = problem.capture().damped(0.0), problem.gradient()
    v, best, before = 0.3 * g, kv.exact_direction(A, g), problem.loss().item()
    share = kv.captured_decrease(A, g, v)
    A.partition.add_(problem.model, v, alpha=-1.0)
    went_down = before - problem.loss().item()
    A.partition.add_(problem.model, v - best)
    assert abs(went_down / (before - problem.loss().item()) - share) < 1e-12


# ---- words and devices -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda A, M, g: kv.pcg(A.dense(), g), TypeError, "A must be of type Operator; got Tensor"),
        (lambda A, M, g: kv.pcg(A, g, M=lambda r: r), TypeError, "M must be of type Operator; got function"),
        (lambda A, M, g: kv.pcg(A, g.float()), ValueError, "holds torch.float64.*vector is torch.float32"),
        (lambda A, M, g: kv.pcg(A, g, x0=g.float()), ValueError, "vector is torch.float32"),
        (lambda A, M, g: kv.pcg(A, g, x0=g[:5]), ValueError, r"\(51,\).*got \(5,\)"),
        (lambda A, M, g: kv.pcg(A, g[:, None]), ValueError, r"got \(51, 1\)"),
        (lambda A, M, g: kv.pcg(A, g * torch.nan), ValueError, "NaN or inf in layer 'body.one'"),
        (lambda A, M, g: kv.pcg(A, g, rtol=0.0), ValueError, "rtol must be finite and greater than 0; got 0.0"),
        (lambda A, M, g: kv.pcg(A, g, rtol=float("nan")), ValueError, "got nan"),
        (lambda A, M, g: kv.pcg(A, g, max_iterations=-1), ValueError, "max_iterations.*got -1"),
        (lambda A, M, g: kv.spectrum(A.dense()), TypeError, "A must be of type Operator"),
        (lambda A, M, g: kv.spectrum(A, M.dense()), TypeError, "M must be of type Operator"),
        (lambda A, M, g: kv.captured_decrease(A, g, g[:3]), ValueError, r"got \(3,\)"),
        (lambda A, M, g: kv.captured_decrease(A, g, M @ g.float()), ValueError, "torch.float32"),
        (lambda A, M, g: kv.captured_decrease(A, 0 * g, g), ValueError, "gradient is zero"),
        (lambda A, M, g: kv.exact_direction(A, g.tolist()), TypeError, "got list"),
        (lambda A, M, g: kv.spectrum(captured("tanh"), M), ValueError, "differ in partition"),
        (lambda A, M, g: kv.spectrum(captured("residual", n=1), M), ValueError, "not positive definite"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call(*setting())


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_spectrum_refuses_a_matrix_that_is_not_symmetric(correction):
    A, M, g = setting()
    T = kv.TwoLevel(A, M, space("nicolaides", A, M, g, 1), correction)
    if T.symmetric:
        assert_close(kv.spectrum(T), torch.linalg.eigvalsh(T.dense()))
    else:
        with pytest.raises(ValueError, match=correction):
            kv.spectrum(T)


@pytest.mark.parametrize("device", DEVICES)
def test_float32_and_devices(device):
    model, inputs = ZOO["residual"].make()
    F = kv.capture(model.to(device, torch.float32), inputs.to(device, torch.float32), likelihood="categorical")
    A, M, g = F.damped(0.05), kv.KFAC(F, 0.05), normal(F.shape[0], seed=3).to(device, torch.float32)
    T = kv.TwoLevel(A, M, kv.coarse.spectral(F, 2))
    x = kv.pcg(A, g, M=T, rtol=1e-5)
    reference, _, _ = setting()
    assert x.converged and x.solution.dtype == torch.float32 and x.solution.device.type == device
    assert_close(x.solution.cpu().double(), kv.exact_direction(reference, normal(F.shape[0], seed=3)), 1e-4)
    assert np.isfinite(kv.condition_number(A, T))


@pytest.mark.parametrize("damping", [1e-12, 1e-9])
def test_spectrum_when_the_damping_is_below_round_off(damping):
    """Cholesky fails on F + λI, where F has round-off below −λ; the eigenvalues of M A are still there."""
    model, inputs = ZOO["residual"].make(3)
    F = kv.capture(model, 1e5 * inputs, likelihood="gaussian")
    A = F.damped(damping)
    assert int(torch.linalg.cholesky_ex(A.dense())[1]) > 0
    values = kv.spectrum(A, kv.Identity(F))
    assert_close(values, A.eigen.d, 1e-12)
