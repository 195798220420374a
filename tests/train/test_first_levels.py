"""First levels of the optimizer: four Kronecker products of averages, and what is made of the captured vectors."""

import copy

import pytest
import torch
from helpers import Model, assert_close, captured, mlp, normal
from torch import nn

import kfac_viz as kv
from kfac_viz.method import products
from kfac_viz.method.partition import Layer
from kfac_viz.method.products import FACTORS, FLOOR_OF_AVERAGE, Scores, unit_trace
from kfac_viz.train import statistics
from kfac_viz.train.options import FIRST_LEVELS
from kfac_viz.train.statistics import RunningFactors

X, Y = normal(12, 4), torch.arange(12) % 3
FULL = {"likelihood": "categorical", "fisher": "exact", "damping": 0.05, "observe_every": 1, "refresh_every": 1}
MADE = {
    "ekfac": kv.EKFAC,
    "blocks": kv.BlockDiagonal,
    "diagonal": kv.Diagonal,
    "identity": lambda F, λ: kv.Identity(F, λ, power=1.0),
    "none": kv.Nothing,
}


def observed(model, opt, x=X, y=Y):
    opt.zero_grad()
    kv.nll(model(x), y, "categorical").backward()
    opt.observe(x)
    return opt


def train(model, opt, steps, first=0):
    for k in range(first, first + steps):
        i = torch.randperm(len(X), generator=torch.Generator().manual_seed(k))[:8]
        observed(model, opt, X[i], Y[i]).step()


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def averaged(F, decay, rule, times, weight=None):
    running = RunningFactors(decay, "expand", rule)
    for _ in range(times):
        running.add(F, F.partition.names)
        own = running.weight
        running.weight = own if weight is None else dict.fromkeys(own, weight)
        running.renew_inverses()
        running.weight = own
    return running


# ---- averages of the four products -------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.7])
@pytest.mark.parametrize("case", ["residual", "positions, T² ≤ S", "conv"])
def test_turns_on_one_batch_lead_to_the_product_of_that_batch(case, decay):
    """Of KL with a floor that is as low as the dtype allows, which an average of many examples has."""
    F = captured(case, 40)
    for rule, tol in (("shampoo", 1e-14), ("nearest", 1e-9), ("kl", 1e-5)):
        running = averaged(F, decay, rule, 150, weight=1e12)
        expected = F.kronecker(factors=rule).blocks()
        for mine, theirs in zip(running.factors(F.partition).blocks(), expected, strict=True):
            assert_close(mine, theirs, tol)


def test_the_floor_of_a_turn_is_the_share_of_one_example():
    """The equations that a settled KL average solves, with ``r = tr X / (n N)`` in each inverse."""
    F = captured("tanh", 20)
    running = averaged(F, 0.0, "kl", 300)
    for name, a, g in zip(F.partition.names, F.a, F.g, strict=True):
        A, G = running.A[name], running.G[name]
        damped = [X + FLOOR_OF_AVERAGE * X.trace() / (len(X) * F.N) * torch.eye(len(X), dtype=X.dtype) for X in (A, G)]
        inverse = [torch.linalg.inv(X) for X in damped]
        rank = float((A @ inverse[0]).trace())
        assert_close(Scores(a, g).left(inverse[0]) / rank, G, 1e-8)
        assert_close(unit_trace(Scores(a, g).right(inverse[1])), A, 1e-8)


def divergence_of_a_running_product(batch=8, batches=60):
    """Mean over batches of the divergence from the product that the scores ``g aᵀ`` are drawn from."""
    generator = torch.Generator().manual_seed(0)
    G, A = (torch.logspace(0, -2, n, dtype=torch.float64) for n in (6, 10))
    layers, true, found = kv.Partition((Layer("one", 6, 10),)), torch.kron(G, A).diag(), []
    running = RunningFactors(0.95, "expand", "kl")
    for _ in range(batches):
        a, g = (torch.randn(batch, len(d), generator=generator, dtype=d.dtype) * d.sqrt() for d in (A, G))
        running.add(kv.Fisher(layers, [a[:, None]], [g[None, :, None]]), ["one"])
        running.renew_inverses()
        ratio = torch.linalg.solve(torch.kron(running.G["one"], running.A["one"]), true)
        found.append(float(ratio.trace() - torch.linalg.slogdet(ratio)[1]) - len(true))
    return sum(found[20:]) / len(found[20:])


def test_the_floor_of_known_scores_is_too_low_for_an_average_of_few(monkeypatch):
    with_own = divergence_of_a_running_product()
    monkeypatch.setattr(statistics, "FLOOR_OF_AVERAGE", 0.0)  # what is left is the root of the dtype's precision
    assert torch.finfo(torch.float64).eps ** 0.5 < products.FLOOR
    assert divergence_of_a_running_product() > 20 * with_own


def test_directions_at_the_floor_are_counted_saved_and_resumed():
    model = mlp((4, 5, 5, 3))
    opt, N, raised = kv.TwoLevelKFAC(model, **FULL, factors="kl", decay=0.0), len(X), 0
    for _ in range(2):
        own = observed(model, opt).curvature.factors
        pairs = ((own.A[name], own.G[name]) for name in opt.partition.names)
        d = [torch.linalg.eigvalsh(F) for pair in pairs for F in pair]
        raised += round(float(sum((1 / (1 + N * x.clamp_min(0) / x.mean())).sum() for x in d)))
        assert opt.preconditioner and opt.diagnostics["directions at the floor"] == raised > 0
        opt.curvature.step += 1
    assert f"directions at the floor {raised}" in repr(opt)
    again = kv.TwoLevelKFAC(mlp((4, 5, 5, 3)), **FULL, factors="kl")
    again.load_state_dict(opt.state_dict())
    assert again.diagnostics == opt.diagnostics
    for factors in ("kfac", "nearest"):
        other = observed(model, kv.TwoLevelKFAC(model, **FULL, factors=factors))
        assert other.preconditioner and not other.diagnostics["directions at the floor"]


def test_layers_without_a_nearest_product_are_counted(monkeypatch):
    """All of them, as an alternation of one turn has not settled."""
    monkeypatch.setattr(products, "TURNS", 1)
    model = mlp((4, 5, 5, 3))
    opt = observed(model, kv.TwoLevelKFAC(model, **FULL, first_level="ekfac", factors="kl"))
    assert opt.preconditioner.M.factors.undetermined == opt.partition.names
    assert opt.diagnostics["undetermined layers"] == len(opt.partition)


@pytest.mark.parametrize("rule", FACTORS[1:])
def test_the_first_observation_gives_shampoos_factors(rule):
    F = captured("conv", 6)
    running = averaged(F, 0.9, rule, 1)
    expected = F.kronecker(factors="shampoo").blocks()
    for mine, theirs in zip(running.factors(F.partition).blocks(), expected, strict=True):
        assert_close(mine, theirs, 1e-12)


def test_shampoos_average_is_that_of_all_examples():
    F = captured("conv", 6)
    parts = [F.like([a[s] for a in F.a], [g[:, s] for g in F.g]) for s in (slice(0, 2), slice(2, 6))]
    running = RunningFactors(1.0, "expand", "shampoo")
    for part in parts:
        running.add(part, F.partition.names)
    expected = F.kronecker(factors="shampoo").blocks()
    for mine, theirs in zip(running.factors(F.partition).blocks(), expected, strict=True):
        assert_close(mine, theirs, 1e-12)


@pytest.mark.parametrize("rule", FACTORS[1:])
def test_a_layer_that_wakes_up_late_is_finite_throughout(rule):
    F = captured("tanh", 6)
    asleep = F.like(F.a, [torch.zeros_like(F.g[0]), F.g[1]])
    running = RunningFactors(0.5, "expand", rule)
    for batch in (asleep, asleep, F, F, F):
        running.add(batch, F.partition.names)
        running.renew_inverses()
        M = kv.KFAC(running.factors(F.partition), 0.1)
        assert torch.isfinite(M.dense()).all()
    assert all(block.any() for block in running.factors(F.partition).blocks())


@pytest.mark.parametrize("rule", FACTORS)
def test_the_optimizer_has_the_products_of_its_batch(rule):
    model = mlp((4, 5, 5, 3))
    opt = observed(model, kv.TwoLevelKFAC(model, **FULL, factors=rule, step_rule="line_search"))
    F = kv.capture(model, X, likelihood="categorical")
    expected = kv.KFAC(F, 0.05, "factored", factors="kfac" if rule == "kfac" else "shampoo")  # of the first turn
    assert_close(opt.preconditioner.M.dense(), expected.dense(), 1e-10)
    for _ in range(60):
        opt.curvature.step += 1
        observed(model, opt)
        M = opt.preconditioner.M
    if rule != "kl":  # whose floor is another
        assert_close(M.dense(), kv.KFAC(F, 0.05, "factored", factors=rule).dense(), 1e-6)


@pytest.mark.filterwarnings("ignore:Adam's steps", "ignore:Left out of")
@pytest.mark.parametrize("rule", FACTORS)
def test_layers_that_were_never_seen_do_not_move(rule):
    """An embedding and a matrix that no batch has reached yet."""
    model = Model(
        lambda s, x: s.head(torch.tanh(s.inner(x))) if s.training else s.head(s.table((x[:, 0] > 0).long())),
        inner=nn.Linear(4, 3), table=nn.Embedding(2, 3), spare=nn.Linear(3, 3), head=nn.Linear(3, 3),
    ).double().train()  # fmt: skip
    opt = kv.TwoLevelKFAC(model, likelihood="categorical", factors=rule, observe_every=1, refresh_every=1)
    before = weights(model.table), weights(model.spare), weights(model.inner)
    train(model, opt, 3)
    after = weights(model.table), weights(model.spare), weights(model.inner)
    assert [torch.equal(*pair) for pair in zip(before, after, strict=True)] == [True, True, False]
    assert torch.isfinite(opt.preconditioner.M.dense()).all()
    model.eval()
    train(model, opt, 3, first=3)
    assert not torch.equal(weights(model.table), before[0])
    assert torch.isfinite(weights(model)).all()


# ---- levels made of the captured vectors -------------------------------------------------------------


@pytest.mark.parametrize("first", MADE)
def test_other_first_levels_are_made_of_the_vectors_of_A(first):
    model = mlp((4, 5, 5, 3))
    opt = observed(model, kv.TwoLevelKFAC(model, **FULL, first_level=first, per_layer=2))
    T = opt.preconditioner
    F = kv.capture(model, X, likelihood="categorical")
    Z = kv.coarse.spectral(F, 2)
    for damping in (0.05, 0.2):
        opt.damping = damping
        T, A = opt.preconditioner, F.damped(damping)
        assert_close(T.dense(), kv.TwoLevel(A, MADE[first](F, damping), Z).dense(), 1e-7)


@pytest.mark.parametrize("examples", [4, 12])  # fewer and more scores than parameters
def test_the_exact_level_is_the_inverse_at_every_damping(examples):
    model, x = mlp((4, 3, 3)), X[:examples]
    opt = observed(model, kv.TwoLevelKFAC(model, **FULL | {"damping": 1e-3}, first_level="exact"), x, Y[:examples])
    F = kv.capture(model, x, likelihood="categorical")
    for damping in (1e-3, 0.2):
        opt.damping = damping
        inverse = torch.linalg.inv(F.damped(damping).dense())
        assert_close(opt.preconditioner.dense(), inverse, 1e-7)
        assert_close(opt.preconditioner @ normal(F.partition.size, 2), inverse @ normal(F.partition.size, 2), 1e-7)


@pytest.mark.parametrize("first", ["kfac", "blocks", "diagonal"])
def test_iterations_are_of_conjugate_gradients_that_both_levels_precondition(first):
    options = FULL | {"step_rule": "fixed", "lr": 1.0, "momentum": 0.0, "first_level": first, "per_layer": 2}
    for iterations in (1, 3, 200):
        model = mlp((4, 5, 5, 3))
        opt = observed(model, kv.TwoLevelKFAC(model, **options, iterations=iterations))
        before, T = opt.partition.pack(model), opt.preconditioner
        g, A = opt.partition.pack_grad(model), T.A.dense()
        x, r, p = torch.zeros_like(g), g.clone(), T @ g  # the textbook's recursion
        z = p.clone()
        for _ in range(iterations):
            if float(r.norm() / g.norm()) < 1e-10:
                break
            α = (r @ z) / (p @ A @ p)
            x, new = x + α * p, r - α * (A @ p)
            z, old = T @ new, r @ z
            p, r = z + ((new @ z) / old) * p, new
        opt.step()
        assert_close(before - opt.partition.pack(model), x, 1e-6)
        if iterations == 200:
            assert_close(x, torch.linalg.solve(A, g), 1e-6)
    assert "200 CG iterations" in repr(opt)


@pytest.mark.parametrize("coarse", ["nicolaides", "smooth", "krylov", "random"])
def test_every_coarse_space_goes_with_another_first_level(coarse):
    model = mlp((4, 5, 5, 3))
    opt = kv.TwoLevelKFAC(model, likelihood="categorical", first_level="diagonal", coarse=coarse, per_layer=2)
    train(model, opt, 3)
    assert opt.preconditioner.Z.name == coarse
    assert isinstance(opt.preconditioner.M, kv.Diagonal)


@pytest.mark.parametrize("per_layer", [0, 2])
@pytest.mark.parametrize("first", FIRST_LEVELS)
def test_every_first_level_trains(first, per_layer):
    if (first == "none" and not per_layer) or (first == "exact" and per_layer):
        return
    model = mlp((4, 5, 5, 3))
    opt = kv.TwoLevelKFAC(model, **FULL, first_level=first, per_layer=per_layer, step_rule="line_search")
    losses = []

    def closure():
        opt.zero_grad()
        losses.append(kv.nll(model(X), Y, "categorical"))
        losses[-1].backward()
        return losses[-1]

    closure()
    for _ in range(5):
        opt.observe(X)
        opt.step(closure)
    assert losses[-1] < losses[0]


# ---- saved and resumed -------------------------------------------------------------------------------


CHOSEN = [
    *({"factors": rule} for rule in FACTORS[1:]),
    *({"first_level": first} for first in MADE),
    {"first_level": "ekfac", "factors": "shampoo"},
    {"first_level": "exact", "per_layer": 0},
    {"iterations": 3},
]
SAVED = {"likelihood": "categorical", "observe_every": 2, "refresh_every": 3, "coarse_window": 2, "per_layer": 2}


@pytest.mark.parametrize("options", CHOSEN, ids=str)
def test_a_run_goes_on_bit_for_bit(options):
    straight, model = mlp((4, 5, 5, 3)), mlp((4, 5, 5, 3), seed=1)
    opt, again = (kv.TwoLevelKFAC(m, **SAVED | options) for m in (straight, model))
    train(straight, opt, 5)
    model.load_state_dict(straight.state_dict())
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(straight, opt, 6, first=5)
    train(model, again, 6, first=5)
    assert torch.equal(weights(model), weights(straight))


@pytest.mark.filterwarnings("ignore:The state was saved with")
def test_a_state_with_another_first_level_is_loaded_and_that_level_made_anew():
    model, twin = mlp((4, 5, 5, 3)), mlp((4, 5, 5, 3))
    opt = kv.TwoLevelKFAC(model, **SAVED)
    train(model, opt, 5)
    for first in MADE:
        again = kv.TwoLevelKFAC(twin, **SAVED, first_level=first)
        again.load_state_dict(opt.state_dict())
        T = again.preconditioner
        assert_close(T.M.dense(), MADE[first](T.A.operator, 0.1).dense(), 1e-5)
        back = kv.TwoLevelKFAC(mlp((4, 5, 5, 3)), **SAVED)
        back.load_state_dict(again.state_dict())
        expected = kv.KFAC(back.curvature.factors.factors(back.partition), 0.1, "factored")
        assert_close(back.preconditioner.M.dense(), expected.dense(), 1e-5)


def test_averages_of_another_rule_are_refused():
    model = mlp((4, 5, 5, 3))
    opt = kv.TwoLevelKFAC(model, **SAVED, factors="kl")
    train(model, opt, 3)
    again = kv.TwoLevelKFAC(model, **SAVED)
    with pytest.raises(ValueError, match="averages for factors='kl'; this optimizer has factors='kfac'"):
        again.load_state_dict(opt.state_dict())
    assert again.curvature.observed_at is None


# ---- what is refused ---------------------------------------------------------------------------------

REFUSED = {
    "a rule that is none": ({"factors": "soap"}, "factors must be one of"),
    "a level that is none": ({"first_level": "lbfgs"}, "first_level must be one of"),
    "a convention without meaning": ({"factors": "kl", "convention": "reduce"}, "convention='reduce' says what"),
    "factors of a diagonal": ({"factors": "kl", "first_level": "diagonal"}, "factors='kl' belong to first_level="),
    "another clock": ({"first_level": "blocks", "per_layer": 2, "coarse_every": 5}, "leave out coarse_every"),
    "no level at all": ({"first_level": "none"}, "nothing would move"),
    "nothing to correct": ({"first_level": "exact", "total": 3}, "leaves nothing to a coarse level"),
    "no preconditioner": ({"iterations": 3, "per_layer": 2, "correction": "a-def1"}, "'a-def1' is not: take"),
    "nothing to iterate": ({"iterations": 3, "first_level": "exact"}, "solves the system, where iterations change"),
    "a singular preconditioner": ({"iterations": 3, "first_level": "none", "per_layer": 1}, "the coarse space alone"),
    "iterations on the device": ({"iterations": 3, "capturable": True}, "set iterations=0"),
    "a fraction": ({"iterations": 0.5}, "iterations must be a whole number"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_meaning_is_refused_when_the_optimizer_is_built(name):
    options, sentence = REFUSED[name]
    with pytest.raises(ValueError, match=sentence):
        kv.TwoLevelKFAC(mlp(), likelihood="categorical", **options)


def test_a_large_embedding_keeps_kfac():
    model = nn.Sequential(nn.Embedding(2000, 3), nn.Flatten(), nn.Linear(6, 3))
    kv.TwoLevelKFAC(model, likelihood="categorical")
    with pytest.raises(ValueError, match="embedding '0' as a matrix, and has it up to 1024 words; got 2000"):
        kv.TwoLevelKFAC(model, likelihood="categorical", factors="nearest")
