"""Networks that solve differential equations: jets, scores and solutions against autograd, and bad input in words."""

import pytest
import torch
from helpers import assert_close, normal
from torch import nn

import kfac_viz as kv
from kfac_viz.problems.equations import Jet, forward_mode

EQUATIONS = {
    "poisson 1": lambda **o: kv.problems.poisson(1, (5, 4), 12, **o),
    "poisson 2": lambda **o: kv.problems.poisson(2, (5, 4), 12, **o),
    "poisson 5": lambda **o: kv.problems.poisson(5, (4,), 12, **o),
    "poisson 10": lambda **o: kv.problems.poisson(10, (3, 3), 12, **o),
    "heat": lambda **o: kv.problems.heat(1, (5, 4), 12, **o),
    "heat 2": lambda **o: kv.problems.heat(2, (5, 4), 12, **o),
    "burgers": lambda **o: kv.problems.burgers((5, 4), 12, **o),
}


def by_autograd(function, x, space):
    """The jet of any function of points (n, d), by differentiating twice."""
    x = x.clone().requires_grad_()
    value = function(x)
    (first,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    second = [torch.autograd.grad(first[:, i].sum(), x, create_graph=True, retain_graph=True)[0][:, i] for i in space]
    return Jet(value, first, sum(second))


@pytest.mark.parametrize("name", EQUATIONS)
def test_the_jet_is_what_autograd_finds_by_differentiating_twice(name):
    problem = EQUATIONS[name]()
    x, space = problem.inputs[:, :-1], problem.model.space
    expected = by_autograd(lambda x: problem.model.net(x)[:, 0], x, space)
    for found, truth in zip(forward_mode(problem.model.net, x, space), expected, strict=True):
        assert_close(found, truth)


@pytest.mark.parametrize("name", EQUATIONS)
def test_the_known_solution_solves_the_equation(name):
    problem = EQUATIONS[name]()
    x, model = problem.inputs[:, :-1], problem.model
    u = by_autograd(model.solution, x, model.space)
    size = max(float(part.abs().max()) for part in u)
    assert float(model.operator(x, u).abs().max()) <= 1e-12 * size


@pytest.mark.parametrize("name", EQUATIONS)
def test_the_output_is_the_residual_inside_and_the_weighted_difference_on_the_boundary(name):
    problem = EQUATIONS[name](weight=3.0)
    x, boundary = problem.inputs[:, :-1], problem.inputs[:, -1] == 1
    found = problem.model(problem.inputs)[:, 0]
    u = by_autograd(lambda x: problem.model.net(x)[:, 0], x, problem.model.space)
    assert_close(found[~boundary], problem.model.operator(x, u)[~boundary])
    assert_close(found[boundary], 3.0 * (u.value - problem.model.solution(x))[boundary])


@pytest.mark.parametrize("name", EQUATIONS)
def test_scores_of_single_examples_are_those_of_autograd(name):
    """With random biases, so that a bias which reaches a derivative would be seen."""
    problem = EQUATIONS[name]()
    with torch.no_grad():
        for i, p in enumerate(problem.model.parameters()):
            p.copy_(normal(*p.shape, seed=i))
    F, d = problem.capture(), problem.dim
    rows = []
    for r in problem.model(problem.inputs)[:, 0]:
        problem.model.zero_grad()
        r.backward(retain_graph=True)
        rows.append(problem.partition.pack_grad(problem.model))
    J = torch.stack(rows)
    assert_close(F.scores(torch.eye(F.partition.size, dtype=torch.float64))[:, 0].T, J)
    assert_close(F.dense(), J.T @ J / len(J))
    residuals = problem.model(problem.inputs).detach()[:, 0]
    assert_close(problem.gradient(), J.T @ residuals / len(J))
    assert all(a.shape[1] == d + 2 for a in F.a)  # positions: the cost is linear in the dimension


@pytest.mark.parametrize("name", EQUATIONS)
def test_points_are_where_they_should_be(name):
    problem = EQUATIONS[name]()
    x, boundary = problem.inputs[:, :-1], problem.inputs[:, -1] == 1
    low, high = torch.tensor(problem.box, dtype=torch.float64).T
    at_low, at_high = x == low, x == high
    if problem.model.space[0] == 1:  # the last moment is not given
        assert not at_high[:, 0].any()
    assert (at_low | at_high)[boundary].any(1).all() and not (at_low | at_high)[~boundary].any()
    assert (boundary.sum(), len(x)) == (3, 15)
    assert problem.inputs.dtype == torch.float64 and not problem.targets.any()


@pytest.mark.parametrize("name", EQUATIONS)
def test_other_points_are_those_of_another_seed_for_the_same_network(name):
    problem, other = EQUATIONS[name](), EQUATIONS[name](seed=5)
    again = problem.resampled(5)
    assert again.model is problem.model and torch.equal(again.inputs, other.inputs)
    assert torch.equal(problem.inputs, EQUATIONS[name]().inputs) and again.error() == problem.error()


def test_each_term_has_its_mean_whatever_the_number_of_its_points():
    problem = kv.problems.poisson(2, (5, 4), 12, term_weights=(2.0, 0.5))
    plain = kv.problems.poisson(2, (5, 4), 12, weight=1.0)
    for seed, few in ((0, slice(None)), (3, slice(None)), (4, slice(4, None))):
        x = problem.resampled(seed).inputs[few]
        boundary, r = x[:, -1] == 1, plain.model(x)[:, 0]
        expected = 0.5 * (2.0 * r[~boundary].square().mean() + 0.5 * r[boundary].square().mean())
        assert_close(0.5 * problem.model(x).square().mean(), expected)
    assert problem.capture().N == 15  # kinds are no parameters


def test_the_error_is_relative_and_zero_for_the_solution_itself():
    net = kv.problems.poisson(2, (5,), 10, seed=4).model.net
    problem = kv.problems.equation(lambda x, u: u.laplacian, lambda x: net(x)[:, 0], widths=(5,), points=10, seed=4)
    assert problem.error() < 1e-15
    assert not problem.model(problem.inputs)[-2:].any()
    with torch.no_grad():
        for p in list(problem.model.net[-1].parameters()):
            p.mul_(1.5)  # the network and its solution were apart: deep copies of one seed
    assert problem.error() == pytest.approx(0.5, rel=1e-12)
    assert problem.error(seed=1) == problem.error(seed=1)


def test_a_zero_network_has_the_error_one_and_an_untrained_one_the_same_numbers_twice():
    problem = kv.problems.poisson(points=20)
    nn.init.zeros_(problem.model.net[-1].weight), nn.init.zeros_(problem.model.net[-1].bias)
    assert problem.error() == 1.0
    first, second = kv.problems.burgers(points=20, seed=3), kv.problems.burgers(points=20, seed=3)
    assert torch.equal(first.inputs, second.inputs) and first.error() == second.error()


def test_other_precisions_and_own_points():
    problem = kv.problems.poisson(points=20, dtype=torch.float32)
    assert problem.inputs.dtype == torch.float32 and problem.capture().dtype == torch.float32 and problem.error() > 0
    inside, edge = torch.full((3, 2), 0.5), torch.zeros(2, 2)
    own = kv.problems.poisson(points=inside, boundary=edge)
    assert_close(own.inputs, torch.tensor([[0.5, 0.5, 0]] * 3 + [[0, 0, 1]] * 2).double())
    assert len(kv.problems.poisson(points=20, boundary=0).inputs) == 20


def test_what_a_reader_can_get_wrong_is_said_in_words():
    def build(operator=lambda x, u: u.laplacian, solution=lambda x: x[:, 0], box=((0, 1), (0, 1)), **options):
        return kv.problems.equation(operator, solution, box, points=options.pop("points", 8), **options)

    with pytest.raises(ValueError, match=r"operator must return one number for each of 10 points, \(10,\); got \(10, "):
        build(lambda x, u: u.gradient)
    with pytest.raises(ValueError, match=r"operator must return .* got \(10, 1\)"):
        build(lambda x, u: u.laplacian[:, None])
    with pytest.raises(TypeError, match="operator must return a tensor; got float"):
        build(lambda x, u: 1.0)
    with pytest.raises(TypeError, match="operator must be a function; got str"):
        build("laplace")
    with pytest.raises(ValueError, match="operator returns NaN or inf"):
        build(lambda x, u: u.value / 0)
    with pytest.raises(ValueError, match=r"solution must return one number .* got \(10, 2\)"):
        build(solution=lambda x: x)
    with pytest.raises(ValueError, match="solution returns NaN or inf"):
        build(solution=lambda x: torch.log(-x[:, 0]))
    with pytest.raises(ValueError, match=r"1 of 2 points lie outside the box .* the first is number 1, \[2.0, 0.5\]"):
        build(points=torch.tensor([[0.5, 0.5], [2.0, 0.5]]))
    with pytest.raises(ValueError, match="1 of 1 points lie outside"):
        build(boundary=torch.tensor([[0.5, float("nan")]]))
    with pytest.raises(ValueError, match=r"Points in 2 coordinates have shape \(n, 2\); got \(4, 3\)"):
        build(points=torch.zeros(4, 3))
    with pytest.raises(ValueError, match="goes from low to a greater high"):
        build(box=((0, 1), (1, 1)))
    with pytest.raises(TypeError, match="box holds"):
        build(box=3)
    for name, value in (("weight", 0.0), ("points", 0), ("boundary", -1), ("seed", -1)):
        with pytest.raises(ValueError, match=name):
            build(**{name: value})
    problem = kv.problems.poisson(points=8)
    for wrong in (problem.inputs[:, :-1], problem.inputs[0]):
        with pytest.raises(ValueError, match=r"have shape \(N, 3\); got"):
            problem.model(wrong)
    with pytest.raises(ValueError, match="0 inside, 1 on the boundary"):
        problem.model(problem.inputs / 2)
    for weights in ((1.0,), 3, (1.0, 0.0), (1.0, float("nan"))):
        with pytest.raises(ValueError, match="term_weights"):
            build(term_weights=weights)
    with pytest.raises(ValueError, match="lie outside"):
        kv.problems.poisson(points=8).values(torch.tensor([[0.5, 1.5]], dtype=torch.float64))
    with pytest.raises(ValueError, match="dim"):
        kv.problems.poisson(0)
