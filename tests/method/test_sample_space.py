"""The exact step in the space of scores: the same numbers as from the P×P matrix, wherever both can be had."""

import copy
import math

import pytest
import torch
from helpers import DEVICES, captured, normal
from hypothesis import given, settings
from hypothesis import strategies as st

import kfac_viz as kv
from kfac_viz.method.krylov import MOST_SCORES, exact_direction
from kfac_viz.method.operator import ParameterSpace
from kfac_viz.method.sample_space import SampleSpace

CASES = ("tanh", "deep", "conv", "residual")
λ = 1e-2


def both(F):
    """The two spaces, whichever F would take."""
    return ParameterSpace(F), SampleSpace(F)


@pytest.fixture(params=["digits", "attention", "heat", "tied", "planted"])
def F(request):
    problems = {
        "digits": lambda: kv.problems.digits((5, 4), 12, side=4),
        "attention": lambda: kv.problems.attention(4, 8, side=4),
        "heat": lambda: kv.problems.heat(1, (8, 8), 20, 6),
        "planted": lambda: kv.problems.planted(3, 6, 15),
    }
    if request.param != "tied":
        return problems[request.param]().capture()

    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.Linear(5, 4, dtype=torch.float64)

        def forward(self, x):
            return torch.tanh(self.first(x)) @ self.first.weight

    return kv.capture(Tied(), normal(7, 5), likelihood="gaussian")


def test_the_kernel_is_the_table_of_inner_products_of_the_scores(F):
    space = SampleSpace(F)
    J = F.scores(torch.eye(F.partition.size, dtype=F.dtype)).flatten(1).T
    for l, s in enumerate(F.partition.slices):
        torch.testing.assert_close(space.kernel(l), J[:, s] @ J[:, s].T / F.N, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(space.matrix, J @ J.T / F.N, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("chunk", [1, 500, 2**24])
def test_the_kernel_is_the_same_in_chunks_of_any_size(F, chunk, monkeypatch):
    whole = SampleSpace(F).matrix
    monkeypatch.setattr("kfac_viz.method.sample_space._CHUNK", chunk)
    torch.testing.assert_close(SampleSpace(F).matrix, whole, rtol=1e-12, atol=1e-14)


def test_both_spaces_agree(F):
    parameters, samples = both(F)
    r = normal(F.partition.size, 3)
    torch.testing.assert_close(samples.solve(r, λ), parameters.solve(r, λ), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(samples.solve(r[:, 0], λ), samples.solve(r, λ)[:, 0], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(samples.norms(), parameters.norms(), rtol=1e-10, atol=1e-12)
    assert samples.layer_overlap(λ) == pytest.approx(parameters.layer_overlap(λ), rel=1e-9)
    k = min(samples.size, parameters.size)
    d, e = samples.eigenvalues.flip(0)[:k], parameters.eigenvalues.flip(0)[:k]
    torch.testing.assert_close(d, e, rtol=1e-9, atol=1e-12 * float(d[0]))
    assert samples.residual < 1e-12 and "residual of the last solution" in repr(samples)
    assert f"{samples.size} × {samples.size}" in repr(samples) and f"{parameters.size} ×" in repr(parameters)


def test_leading_eigenvectors_are_those_of_the_matrix(F):
    matrix = F.dense()
    for space in both(F):
        d, U = space.leading(4)
        assert (d[:-1] >= d[1:]).all()
        torch.testing.assert_close(matrix @ U, U * d, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(U.T @ U, torch.eye(4, dtype=U.dtype), rtol=0, atol=1e-8)


def test_a_pulled_vector_is_solved_with_the_vector_or_without_it(F):
    s = normal(F.S, F.N)
    g = F.pull(s) / F.N
    for small in (1e-2, 1e-9):
        space = SampleSpace(F)
        for found, enough in ((space.solve_pulled(s, small), 1e-9), (space.solve(g, small), 1e-14)):
            left = float((g - F @ found - small * found).norm() / g.norm())
            floor = 1e-15 * float(F.solver.eigenvalues[-1] * found.norm() / g.norm())  # of round-off in F @ found
            assert left <= 10 * floor + enough and space.residual == pytest.approx(left, rel=0.5, abs=20 * floor)


def test_a_gradient_is_solved_where_the_difference_alone_has_no_digit_left():
    """λ_max / λ = 4e13, against the solution from singular vectors of J."""
    problem = kv.problems.poisson(2, (8, 8), 30, 10)
    F, s, λ = problem.capture(), normal(40)[None], 1e-10
    J = F.scores(torch.eye(F.partition.size, dtype=F.dtype))[:, 0].T
    U, σ, Vh = torch.linalg.svd(J / F.N**0.5, full_matrices=False)
    exact = Vh.T @ (σ / (σ.square() + λ) * (U.T @ s[0])) / F.N**0.5
    for found in (SampleSpace(F).solve(F.pull(s) / F.N, λ), SampleSpace(F).solve_pulled(s, λ)):
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-5 * float(exact.norm()))


@settings(max_examples=25, deadline=None)
@given(power=st.floats(-8, 2), examples=st.integers(2, 9), layers=st.lists(st.integers(1, 6), max_size=3))
def test_a_solution_solves(power, examples, layers):
    problem = kv.problems.digits(tuple(layers), examples, side=4)
    A = problem.capture("mc").damped(10.0**power)
    g = problem.gradient()
    x = A.solve(g)
    floor = 1e-15 * float(A.operator.solver.eigenvalues[-1] * x.norm())  # of round-off in A @ x
    assert float((A @ x - g).norm()) <= 20 * floor + 1e-14 * float(g.norm())
    assert kv.captured_decrease(A, g, x) == pytest.approx(1.0, abs=1e-8)
    dimension, most = A.effective_dimension(), min(examples, A.partition.size)
    assert 0 <= dimension <= most + 1e-9
    assert 0 <= A.layer_overlap() <= len(A.partition) + 1e-9


def test_the_fisher_takes_the_smaller_space_and_says_which():
    wide, narrow = kv.problems.digits((12, 12), 6, side=4), kv.problems.digits((3,), 60, side=4)
    solver = wide.capture("mc").solver
    assert isinstance(solver, SampleSpace) and "sample space, 6 × 6" in repr(solver)
    F = narrow.capture()
    assert isinstance(F.solver, ParameterSpace) and f"{F.partition.size} × {F.partition.size}" in repr(F.solver)
    dense = kv.Dense(F.dense(), F.partition)
    assert isinstance(dense.solver, ParameterSpace)
    torch.testing.assert_close(dense.norms(), F.norms())
    assert dense.damped(λ).layer_overlap() == pytest.approx(F.damped(λ).layer_overlap())


def test_effective_dimension_and_layer_overlap_against_the_dense_matrix():
    problem = kv.problems.digits((6, 5), 10, side=4)
    F = problem.capture("mc")
    A, d = F.damped(λ), torch.linalg.eigvalsh(F.dense()).clamp_min(0)
    assert A.effective_dimension() == pytest.approx(float((d / (d + λ)).sum()), rel=1e-10)
    blocks = torch.block_diag(*(torch.linalg.inv(A.block(l, l)) for l in range(len(F.partition))))
    largest = torch.linalg.eigvals(blocks @ F.dense()).real.max()
    assert A.layer_overlap() == pytest.approx(float(largest), rel=1e-10)


def test_layers_that_see_the_same_take_the_same_step():
    """Two layers whose scores are multiples of each other take one and the same step twice."""
    partition = kv.partition_of(torch.nn.Sequential(*(torch.nn.Linear(3, 2) for _ in range(2))))
    F = captured("tanh")
    a, g = normal(5, 1, 4), normal(1, 5, 1, 2)
    same = type(F)(partition, [a, a], [g, 3 * g])
    tiny = float(same.solver.eigenvalues[-1]) * 1e-9
    assert same.damped(tiny).layer_overlap() == pytest.approx(2.0, rel=1e-5)
    other = type(F)(partition, [a, a], [torch.cat([g[:, :2], 0 * g[:, 2:]], 1), torch.cat([0 * g[:, :2], g[:, 2:]], 1)])
    assert other.damped(tiny).layer_overlap() == pytest.approx(1.0, rel=1e-5)


def test_with_lambda_that_is_too_small_it_says_so():
    problem = kv.problems.digits((8,), 5, side=4)
    F = problem.capture("mc")
    with pytest.raises(ValueError, match="singular .* choose a larger damping"):
        F.damped(0.0).solve(problem.gradient())
    noise = normal(F.partition.size)
    with pytest.warns(UserWarning, match="The exact step is not accurate, with a relative residual"):
        F.damped(1e-40).solve(noise * 1e30)


def test_bad_vectors_are_refused_as_everywhere():
    F = kv.problems.digits((8,), 5, side=4).capture("mc")
    A = F.damped(λ)
    with pytest.raises(ValueError, match="NaN or inf"):
        A.solve(torch.full((F.partition.size,), math.nan, dtype=F.dtype))
    with pytest.raises(ValueError):
        A.solve(torch.ones(3, dtype=F.dtype))
    with pytest.raises(ValueError, match="k must be a whole number"):
        F.leading(-1)


def test_beyond_both_sizes_conjugate_gradients_take_over(monkeypatch):
    problem = kv.problems.digits((6, 5), 30, side=4)
    F, g = problem.capture(), problem.gradient()
    A = F.damped(λ)
    expected = A.solve(g)
    monkeypatch.setattr("kfac_viz.method.krylov.MOST_SCORES", 10)
    torch.testing.assert_close(exact_direction(A, g), expected, rtol=1e-7, atol=1e-9)
    assert kv.captured_decrease(A, g, expected) == pytest.approx(1.0, abs=1e-9)
    assert MOST_SCORES > 1000
    with pytest.warns(UserWarning, match="known to a relative residual of"):
        exact_direction(A, g, rtol=1e-30)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_and_device_are_those_of_the_vectors(dtype, device):
    problem = kv.problems.digits((8,), 6, side=4).to(device, dtype)
    F, g = problem.capture("mc", generator=torch.Generator(device).manual_seed(0)), problem.gradient()
    x = F.damped(0.1).solve(g)
    assert (x.dtype, x.device) == (g.dtype, g.device)
    exact = copy.deepcopy(F).damped(0.1).dense().double()
    torch.testing.assert_close(exact @ x.double(), g.double(), rtol=1e-3, atol=1e-4)
    assert F.norms().dtype == dtype and F.leading(2).U.shape == (F.partition.size, 2)
