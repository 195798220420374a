"""``step_rule="line_search"``: full batches, the loss goes down in every step or nothing moves."""

import copy
import dataclasses
import math
import warnings

import pytest
import torch
from helpers import mlp, normal
from torch import nn

import kfac_viz as kv
from kfac_viz.studies.pde.descent import Method, training

FULL = dict(likelihood="gaussian", fisher="exact", rule="eigen", step_rule="line_search", observe_every=1,
            refresh_every=1)  # fmt: skip


def poisson(seed=0):
    return kv.problems.poisson(2, (10, 10), 40, 10, seed)


def step(problem, opt, closure=None):
    opt.observe(problem.inputs)
    return opt.step(closure or problem.closure(opt))


def parameters(problem):
    return torch.cat([p.detach().flatten() for p in problem.model.parameters()])


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (Method("kfac", length="first"), {"per_layer": 0, "search": "first"}),
        (Method("both", per_layer=3, length="parabola"), {"per_layer": 3}),
        (
            Method("both", "smooth", 2, "a-def1", length="least"),
            {"coarse": "smooth", "per_layer": 2, "correction": "a-def1", "search": "least"},
        ),
        (Method("both", "spectral in all", 3, length="parabola"), {"total": 9}),
    ],
)
def test_it_takes_the_steps_of_the_study(method, options):
    one, other = poisson(), poisson()
    steps = training(one, method, 1e-5)
    opt = kv.TwoLevelKFAC(other.model, damping=1e-5, **FULL, **options)
    for _ in range(5):
        evaluations = next(steps)
        step(other, opt)
    torch.testing.assert_close(parameters(other), parameters(one), rtol=1e-5, atol=1e-7)
    assert opt.diagnostics["evaluations"] == evaluations and opt.diagnostics["stuck"] == 0


def test_the_loss_goes_down_in_every_step():
    problem = poisson()
    opt = kv.TwoLevelKFAC(problem.model, damping=1e-7, per_layer=4, **FULL)
    losses = [float(step(problem, opt).detach()) for _ in range(12)]
    assert all(later < earlier for earlier, later in zip(losses, losses[1:], strict=False))
    assert 0 < opt.diagnostics["step length"] <= 32 and opt.diagnostics["evaluations"] >= 24


def test_momentum_and_averages_are_off_unless_asked_for():
    opt = kv.TwoLevelKFAC(poisson().model, **FULL)
    assert opt.param_groups[0]["momentum"] == 0.0 and opt.options.decay == 0.0 and opt.param_groups[0]["lr"] == 1.0
    opt = kv.TwoLevelKFAC(poisson().model, momentum=0.5, decay=0.3, **FULL)
    assert opt.param_groups[0]["momentum"] == 0.5 and opt.options.decay == 0.3
    opt = kv.TwoLevelKFAC(mlp(), likelihood="categorical")
    assert opt.param_groups[0]["momentum"] == 0.9 and opt.options.decay == 0.95


def test_a_holds_the_whole_batch_and_a_part_of_it_is_told_once():
    problem = kv.problems.poisson(2, (4,), 800, 200)
    opt = kv.TwoLevelKFAC(problem.model, **FULL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):  # of the last batch alone, since older ones weigh nothing
            step(problem, opt)
        assert opt.preconditioner.A.operator.N == 1000 and "every example of the last 1" in repr(opt)
        fixed = kv.TwoLevelKFAC(problem.model, likelihood="gaussian")
        problem.loss().backward()
        fixed.observe(problem.inputs)
    assert fixed.preconditioner.A.operator.N == 512 and "(512 of the 1000 of the newest)" in repr(fixed)
    for rule in ("line_search", "quadratic"):
        opt = kv.TwoLevelKFAC(problem.model, **FULL | {"step_rule": rule, "coarse_examples": 600, "lr": 1e-3})
        with pytest.warns(UserWarning, match=r"A holds 600 of the 1000 examples .* Pass coarse_examples=1000"):
            step(problem, opt)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            step(problem, opt)


def test_a_closure_is_told_that_no_gradient_is_needed_and_a_plain_one_does_as_well():
    told, plain = [], poisson()
    problem = poisson()
    opts = [kv.TwoLevelKFAC(p.model, damping=1e-7, per_layer=2, **FULL) for p in (problem, plain)]
    inner = problem.closure(opts[0])

    def telling(backward=True):
        told.append(backward)
        return inner(backward)

    def old():
        opts[1].zero_grad()
        loss = plain.loss()
        loss.backward()
        return loss

    gradients = []
    for _ in range(4):
        step(problem, opts[0], telling)
        gradients.append(problem.model.net[0].weight.grad.clone())
        step(plain, opts[1], old)
        assert torch.equal(plain.model.net[0].weight.grad, gradients[-1])  # that of the start of the step
    torch.testing.assert_close(parameters(problem), parameters(plain), rtol=0, atol=0)
    assert told.count(True) == 4 and told.count(False) == opts[0].diagnostics["evaluations"]


def test_where_the_loss_goes_up_at_every_length_nothing_moves():
    problem = poisson()
    opt = kv.TwoLevelKFAC(problem.model, damping=1e-5, momentum=0.5, **FULL)
    step(problem, opt)
    before, buffers = parameters(problem), copy.deepcopy(opt.state_dict()["state"])
    losses = iter(range(1000))

    def rising():
        problem.model.zero_grad()
        loss = problem.loss()
        loss.backward()
        return loss.detach() + next(losses)

    with pytest.warns(UserWarning, match="goes up at every length of the step"):
        step(problem, opt, rising)
    assert torch.equal(parameters(problem), before) and opt.diagnostics["stuck"] == 1
    for i, own in opt.state_dict()["state"].items():
        assert torch.equal(own["momentum_buffer"], buffers[i]["momentum_buffer"])
    assert opt.diagnostics["step length"] == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # told once, counted always
        step(problem, opt, rising)
    assert opt.diagnostics["stuck"] == 2
    step(problem, opt)
    assert not torch.equal(parameters(problem), before)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_closure_that_fails_leaves_everything_as_it_was(at):
    problem = poisson()
    opt = kv.TwoLevelKFAC(problem.model, damping=1e-5, **FULL)
    step(problem, opt)
    before, counters, calls = parameters(problem), dict(opt.diagnostics), []
    inner = problem.closure(opt)

    def failing():
        calls.append(1)
        if len(calls) == at + 1:
            raise RuntimeError("the disk is full")
        return inner() * (1 if len(calls) == 1 else 1e9)  # up, so that more lengths are tried

    opt.observe(problem.inputs)
    counters["observations"] += 1
    with pytest.raises(RuntimeError, match="disk is full"):
        opt.step(failing)
    assert torch.equal(parameters(problem), before)
    assert {k: v for k, v in opt.diagnostics.items() if k in counters} == counters


def test_a_loss_that_is_no_number_is_refused_and_one_on_the_way_is_too_long():
    problem = poisson()
    opt = kv.TwoLevelKFAC(problem.model, damping=1e-5, **FULL)
    before, inner = parameters(problem), problem.closure(opt)
    opt.observe(problem.inputs)
    with pytest.raises(ValueError, match="The closure returned nan: there is no lower loss"):
        opt.step(lambda: inner() * math.nan)
    assert torch.equal(parameters(problem), before)
    calls = []

    def overflows_once():
        calls.append(1)
        return inner() * (math.nan if len(calls) == 2 else 1.0)

    opt.step(overflows_once)
    assert not torch.equal(parameters(problem), before) and opt.diagnostics["step length"] <= 0.5


def test_twice_the_step_that_overflows_is_too_long():
    model = nn.Linear(1, 1, bias=False, dtype=torch.float16)
    x, y = torch.full((4, 1), 1e-4).half(), torch.full((4, 1), 4.0)
    opt = kv.TwoLevelKFAC(model, damping=0.0, **FULL)

    def closure():
        opt.zero_grad()
        loss = 0.5 * (model(x).float() - y).square().sum(1).mean()
        loss.backward()
        return loss

    before = float(closure().detach())
    opt.observe(x)
    opt.step(closure)
    assert float(closure().detach()) < before and opt.diagnostics["step length"] <= 2 and opt.diagnostics["stuck"] == 0


def test_a_damping_below_precision_is_refused_and_nothing_moves():
    """Every point stands there twice, so that the matrix of inner products is singular."""
    x = poisson().inputs[:20, :2]
    problem = kv.problems.poisson(2, (10, 10), torch.cat([x, x]), 10)
    opt = kv.TwoLevelKFAC(problem.model, damping=1e-18, first_level="exact", **FULL)
    before = parameters(problem)
    with pytest.raises(ValueError, match="choose a larger damping"):
        step(problem, opt)
    assert torch.equal(parameters(problem), before)
    opt.damping = 1e-6  # the advice works
    opt.step(problem.closure(opt))
    assert not torch.equal(parameters(problem), before)


def test_it_trains_on_points_that_change_also_in_number():
    problem = kv.problems.poisson(2, (10, 10), 60, 20)
    opt = kv.TwoLevelKFAC(problem.model, damping=1e-2, per_layer=8, **FULL)
    first, sizes = problem.error(), []
    for seed in range(12):
        other = kv.problems.poisson(2, (10, 10), 60 + 10 * (seed % 3), 20, seed)
        now = dataclasses.replace(problem, inputs=other.inputs, targets=other.targets)
        step(now, opt)
        sizes.append(opt.preconditioner.A.operator.N)
    assert sizes == [80 + 10 * (seed % 3) for seed in range(12)]
    assert problem.error() < 0.5 * first and opt.diagnostics["stuck"] == 0


def test_the_choice_for_equations_is_the_exact_step():
    problem = poisson()
    opt = kv.TwoLevelKFAC.for_equations(problem.model)
    before = parameters(problem)
    weights = {name: p.detach().clone() for name, p in problem.model.named_parameters()}
    J = torch.func.jacrev(lambda w: torch.func.functional_call(problem.model, w, problem.inputs)[:, 0])(weights)
    J = torch.cat([J[name].flatten(1) for name in weights], 1)  # (N, P)
    step(problem, opt)
    g = torch.cat([p.grad.flatten() for p in problem.model.parameters()])
    v = (before - parameters(problem)) / opt.diagnostics["step length"]
    assert torch.linalg.vector_norm(J.mT @ (J @ v) / len(J) + 1e-6 * v - g) < 1e-8 * torch.linalg.vector_norm(g)
    two = kv.TwoLevelKFAC.for_equations(problem.model, first_level="kfac", per_layer=4, damping=0.01)
    step(problem, two)
    assert two.preconditioner.Z.size > 0 and two.damping == 0.01


def test_it_needs_a_closure_and_decides_on_the_host():
    problem = poisson()
    opt = kv.TwoLevelKFAC(problem.model, **FULL)
    problem.loss().backward()
    opt.observe(problem.inputs)
    with pytest.raises(ValueError, match=r"call step\(closure\)"):
        opt.step()
    opt = kv.TwoLevelKFAC(problem.model, capturable=True, **FULL)
    opt.observe(problem.inputs)
    with pytest.raises(ValueError, match="capturable=True decides nothing on the host; .*'line_search' needs to"):
        opt.step(problem.closure(opt))


def test_it_goes_on_from_a_saved_state_as_if_nothing_had_been():
    one, other = poisson(), poisson()
    first = kv.TwoLevelKFAC(one.model, damping=1e-6, total=12, **FULL)
    for _ in range(3):
        step(one, first)
    other.model.load_state_dict(one.model.state_dict())
    second = kv.TwoLevelKFAC(other.model, damping=1e-6, total=12, **FULL)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for problem, opt in ((one, first), (other, second)):
        for _ in range(3):
            step(problem, opt)
    assert torch.equal(parameters(one), parameters(other))
    assert second.diagnostics["evaluations"] == first.diagnostics["evaluations"]


def test_parameters_without_curvature_are_searched_along_too():
    """Also where the closure writes its gradients over those of the step."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.scale = mlp(), nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, x):
            return self.inner(x) * self.scale.exp()

    def trained(set_to_none):
        torch.manual_seed(0)
        model, y, losses = Scaled(), torch.randint(3, (20,)), []
        x = normal(20, next(model.inner.parameters()).shape[1])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opt = kv.TwoLevelKFAC(model, **FULL | dict(likelihood="categorical"))

        def closure():
            opt.zero_grad(set_to_none=set_to_none)
            loss = kv.nll(model(x), y, "categorical")
            loss.backward()
            losses.append(float(loss.detach()))
            return loss

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(4):
                opt.observe(x)
                opt.step(closure)
        assert float(model.scale.detach()) != 1.0 and kv.nll(model(x), y, "categorical") < losses[0]
        assert opt.diagnostics["evaluations"] > 4  # some steps were halved
        return torch.nn.utils.parameters_to_vector(model.parameters())

    assert torch.equal(trained(True), trained(False))


def test_columns_go_where_the_eigenvalues_are():
    problem = poisson()
    F = problem.capture()
    Z = kv.coarse.spectral(F, total=17)
    assert Z.size == 17
    eigenvalues = [torch.outer(G.d, A.d).flatten() for G, A in zip(F.kronecker().eigen_G, F.kronecker().eigen_A,
                                                                   strict=True)]  # fmt: skip
    least = min(d.sort(descending=True).values[W.shape[1] - 1] for d, (W, _) in zip(eigenvalues, Z.factors, strict=True)
                if W.shape[1])  # fmt: skip
    assert sum(int((d >= least).sum()) for d in eigenvalues) == 17
    assert kv.coarse.spectral(F, total=10**6).size == F.partition.size and kv.coarse.spectral(F, total=0).size == 0
    smaller = kv.coarse.spectral(F, total=5)
    for (w, u), (W, U) in zip(smaller.factors, Z.factors, strict=True):
        assert torch.equal(w, W[:, : w.shape[1]]) and torch.equal(u, U[:, : u.shape[1]])
    for rule in ("eigen", "factored"):
        opt = kv.TwoLevelKFAC(problem.model, total=17, **FULL | dict(rule=rule))
        step(problem, opt)
        assert opt.preconditioner.Z.size == 17 and "spectral-17 in all balanced" in repr(opt)


def test_bad_totals_are_refused():
    F = poisson().capture()
    for arguments in ({}, {"per_layer": 1, "total": 2}):
        with pytest.raises(ValueError, match="either per_layer or total"):
            kv.coarse.spectral(F, **arguments)
    with pytest.raises(ValueError, match="total must be a whole number"):
        kv.coarse.spectral(F, total=-1)
    with pytest.raises(ValueError, match="'krylov' takes per_layer"):
        kv.TwoLevelKFAC(poisson().model, total=4, coarse="krylov", **FULL)
    with pytest.raises(ValueError, match="total must be a whole number"):
        kv.TwoLevelKFAC(poisson().model, total=1.5, **FULL)
