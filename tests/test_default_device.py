"""Results are the same whatever PyTorch's default device is: what is made here goes where its tensors are.

On the default device ``meta`` a tensor has no numbers, so that one which was made without a device ends in an error.
"""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import CORRECTIONS, SPACES, ZOO, mlp, normal, space, targets_for
from torch import Tensor

import kfac_viz as kv
from kfac_viz import problems, studies
from kfac_viz.one_page import OnePage

X = normal(20, 4)  # more than 16 examples: random halves are compared


def elsewhere():
    return torch.device("meta")


def same(make) -> None:
    """The same tensors with and without another default device; nothing of the kind is asked for by its own."""
    expected = make()
    with elsewhere():
        found = make()
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one.device.type == "cpu" and torch.equal(one, other)


def test_the_default_device_is_another_one_here():
    with elsewhere():
        assert torch.ones(2).is_meta and torch.nn.Linear(1, 1).weight.is_meta


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
def test_capture_and_what_is_made_of_it(fisher, likelihood):
    model = mlp()
    options = {"targets": targets_for(model(X).detach(), likelihood)} if fisher == "empirical" else {}

    def make() -> list[Tensor]:
        F = kv.capture(copy.deepcopy(model), X, likelihood=likelihood, fisher=fisher, **options)
        v, A = X.new_ones(F.partition.size), F.damped(0.1)
        eigenvalues = A.operator.solver.eigenvalues
        M = [kv.KFAC(F, 0.1, rule) for rule in ("eigen", "factored")]
        M += [kv.EKFAC(F, 0.1), kv.BlockTridiagonal(F, 0.1), kv.BlockDiagonal(F, 0.1), kv.Diagonal(F, 0.1)]
        K = kv.KroneckerFisher(F)
        return [F @ v, F.dense(), F.diagonal(), A.solve(v), eigenvalues, K @ v, *(P @ v for P in M)]

    same(make)


@pytest.mark.parametrize("case", ZOO)
def test_every_kind_of_network(case):
    model, inputs = ZOO[case].make(20)
    same(lambda: [kv.capture(copy.deepcopy(model), inputs, likelihood="categorical").dense()])


@pytest.mark.filterwarnings("ignore:One example alone")
def test_few_examples_and_one():
    for n in (1, 2, 7):
        model = mlp()
        same(lambda: [kv.capture(copy.deepcopy(model), X[:n], likelihood="categorical").dense()])  # noqa: B023


@pytest.mark.parametrize("name", SPACES)
def test_two_levels(name):
    model = mlp()

    def make() -> list[Tensor]:
        F = kv.capture(copy.deepcopy(model), X, likelihood="categorical")
        A, M, g = F.damped(0.1), kv.KFAC(F, 0.1), F.diagonal()
        Z = space(name, A, M, g, 2)
        levels = [kv.TwoLevel(A, M, Z, correction) for correction in CORRECTIONS]
        solution = kv.pcg(A, g, levels[-1], rtol=1e-10)
        found = [T @ g for T in levels] + [Z.dense(), solution.solution, kv.exact_direction(A, g)]
        numbers = [kv.captured_decrease(A, g, levels[0] @ g), kv.condition_number(A, levels[-1])]
        return found + [kv.spectrum(A, levels[-1]), kv.CoarseCorrection(A, Z) @ g, g.new_tensor(numbers)]

    same(make)


def test_further_arguments_of_spaces():
    F = kv.capture(mlp((6, 9, 5, 3)), normal(20, 6), likelihood="categorical")
    f = F.kronecker()
    same(lambda: [kv.coarse.spectral(f, total=4).dense(), kv.coarse.random(F, 3, seed=7).dense()])
    same(lambda: [pair.d for pair in f.leading(1, full=1).eigen_A])
    same(lambda: [torch.from_numpy(F.to_scipy() @ f.A[0].new_ones(F.partition.size).numpy())])


PROBLEMS = {
    "digits": lambda: problems.digits((4,), 30, side=4),
    "autoencoder": lambda: problems.autoencoder((4,), 30, side=8),
    "attention": lambda: problems.attention(4, 30, side=4),
    "planted": lambda: problems.planted(4, 5, 30, batch_norm=True, residual=True),
    "deep linear": lambda: problems.deep_linear((3, 2, 2), 30),
    "poisson": lambda: problems.poisson(dim=2, widths=(4, 4), points=20),
    "heat": lambda: problems.heat(widths=(4,), points=20),
    "burgers": lambda: problems.burgers(widths=(4,), points=20),
    "toy": lambda: studies.published.toy(layers=3, activation="tanh", n=20),
}


@pytest.mark.filterwarnings("ignore:Outside the Fisher")
@pytest.mark.parametrize("name", PROBLEMS)
def test_problems(name):
    def make() -> list[Tensor]:
        problem = PROBLEMS[name]()
        trained = problem.trained(2)
        made = [*problem.arguments, problem.targets, problem.gradient(), trained.loss().detach()]
        made += [] if name == "toy" else [problem.capture("mc").dense()]
        return made + ([torch.tensor(problem.error(100), device="cpu")] if hasattr(problem, "error") else [])

    same(make)


def test_the_page():
    x, y, model = normal(20, 4), torch.arange(20) % 3, mlp()

    def make() -> list[Tensor]:
        page = OnePage(copy.deepcopy(model))
        for seed in range(2):
            page.step(x, y, torch.Generator().manual_seed(seed))
        return [p.detach() for p in page.model.parameters()]

    same(make)


def test_the_published_optimizer():
    start = studies.published.toy(layers=3, activation="tanh", n=20)

    def make() -> list[Tensor]:
        toy = start.twin()
        opt = studies.published.optimizer.Published(toy.model, "bernoulli", lr=1e-3, refresh_every=1)
        for _ in range(3):
            opt.zero_grad()
            toy.loss().backward()
            opt.observe(toy.inputs)
            opt.step()
        return [p.detach() for p in toy.model.parameters()]

    same(make)


@pytest.mark.filterwarnings("ignore:Outside the Fisher")
@pytest.mark.parametrize("fisher", ["exact", "mc"])
def test_explore(fisher):
    model = mlp()

    def make() -> list[Tensor]:
        panel = kv.explore(model, X, likelihood="categorical", fisher=fisher, per_layer=2, coarse="random")
        assert panel.error == ""
        result = panel.result
        panel.close()
        return [result.fisher, result.missed, result.added, result.left, result.gradient, *result.spectra.values()]

    same(make)


NETWORK = dict(widths=(4,), n=30)
STUDIES = {
    "fisher": (studies.fisher.run, NETWORK | dict(repeats=1)),
    "hessian": (studies.hessian.run, NETWORK | dict(repeats=1, steps=1)),
    "kfac": (studies.kfac.run, NETWORK | dict(repeats=1, steps=1)),
    "kronecker products": (studies.kronecker_products.run, dict(n=50, repeats=1, steps=1)),
    "damping": (studies.damping.run, NETWORK | dict(repeats=1, steps=1)),
    "two levels": (studies.two_levels.run, dict(local=8, subdomains=(2, 4), shown=3, clusters=(2, 5), n=50, repeats=1)),
    "coarse sizes": (studies.coarse_space_sizes.run, NETWORK | dict(sizes=(0, 1), repeats=1)),
    "one step": (studies.one_step.run, NETWORK | dict(per_layer=1)),
    "coarse space": (studies.coarse_space.run, NETWORK | dict(per_layer=1)),
    "layer overlap": (studies.layer_overlap.run, dict(widths=(4, 4), n=30, steps=1, repeats=1)),
    "depth": (studies.depth.run, dict(layers=(2, 3), width=6, n=30, steps=1, repeats=1, networks=("planted",),
                                      measured="")),
    "equations": (studies.pde.run, dict(widths=(4,), points=20, steps=2, at_step=1, per_layer=2)),
}  # fmt: skip


@pytest.mark.parametrize("name", STUDIES)
def test_studies(name):
    """Their caches are emptied: what was computed before must not help."""
    from kfac_viz.show.panel import _forget

    run, choices = STUDIES[name]

    def table():
        _forget()
        return run(**choices).table()

    expected = table()
    with elsewhere():
        found = table()
    assert found.equals(expected) and len(found)
