"""TwoLevelKFAC: the same objects as everywhere, and an optimizer in every sense that PyTorch users rely on."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
import warnings

import pytest
import torch
from helpers import DEVICES, assert_close, mlp, normal, opened
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import kfac_viz as kv
from kfac_viz.method.two_level import CORRECTIONS
from kfac_viz.train.optimizer import TwoLevelKFAC as Optimizer
from kfac_viz.train.options import COARSE_OPERATORS, NAMES, SPACES
from kfac_viz.train.statistics import RunningFactors, Window

X, Y = normal(20, 4), torch.arange(20) % 3
EVERY = {"observe_every": 1, "refresh_every": 1}
FIXED = EVERY | {"likelihood": "categorical", "step_rule": "fixed", "momentum": 0.0, "lr": 0.1, "damping": 0.05}
QUADRATIC = EVERY | {
    "likelihood": "categorical",
    "step_rule": "quadratic",
    "lr": 1.0,
    "damping": 0.1,
    "fisher": "exact",
}


TwoLevelKFAC = functools.partial(Optimizer, per_layer=4)  # both levels, wherever a test says nothing else


def closure_of(opt, model, x=X, y=Y, likelihood="categorical"):
    def closure():
        opt.zero_grad()
        loss = kv.nll(model(x), y, likelihood)
        loss.backward()
        return loss

    return closure


def train(opt, model, steps=1, x=X, y=Y, likelihood="categorical", scheduler=None):
    losses = []
    for _ in range(steps):
        losses.append(float(closure_of(opt, model, x, y, likelihood)().detach()))
        opt.observe(x)
        opt.step()
        if scheduler is not None:
            scheduler.step()
    return losses


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# ---- the same objects --------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["eigen", "factored"])
@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("space", SPACES)
def test_the_first_preconditioner_is_that_of_the_batch(space, correction, rule):
    model = mlp((4, 5, 5, 3))
    opt = TwoLevelKFAC(model, **FIXED, rule=rule, coarse=space, per_layer=2, correction=correction, fisher="exact")
    closure_of(opt, model)()
    opt.observe(X)
    F = kv.capture(model, X, likelihood="categorical")
    A, M, g = F.damped(0.05), kv.KFAC(F, 0.05, rule), F.partition.pack_grad(model)
    Z = kv.coarse.krylov(A, M, g, 2) if space == "krylov" else getattr(kv.coarse, space)(F, 2)
    T = kv.TwoLevel(A, M, Z, correction)
    before = F.partition.pack(model)
    assert_close(opt.preconditioner.dense(), T.dense(), 1e-9)
    assert_close(opt.preconditioner @ g, T @ g, 1e-9)
    opt.step()
    assert_close(F.partition.pack(model), before - 0.1 * (T.dense() @ g), 1e-9)


@pytest.mark.parametrize("rule", ["eigen", "factored"])
def test_an_empty_space_is_one_level_kfac_bit_for_bit(rule):
    model = mlp((4, 5, 3))
    opt = TwoLevelKFAC(model, **FIXED, rule=rule, per_layer=0, fisher="exact")
    closure_of(opt, model)()
    opt.observe(X)
    g, before = opt.partition.pack_grad(model), opt.partition.pack(model)
    M = kv.KFAC(kv.capture(model, X, likelihood="categorical").kronecker(), 0.05, rule)
    opt.step()
    assert torch.equal(opt.partition.pack(model), before - 0.1 * (M @ g))
    assert torch.equal(opt.preconditioner @ g, opt.preconditioner.M @ g)


@pytest.mark.parametrize("rule", ["eigen", "factored"])
def test_cached_kfac_is_kfac(rule):
    F = kv.capture(mlp((4, 5, 5, 5, 5, 3)), X, likelihood="categorical")
    for damping in (0.3, 1e-6):
        cached = kv.KFAC(F.kronecker(), 0.1, rule).with_damping(damping)
        assert_close(cached.dense(), kv.KFAC(F, damping, rule).dense(), 1e-8)
        assert_close(cached @ torch.eye(F.partition.size).double(), cached.dense(), 1e-9)
    with pytest.raises(ValueError, match="singular"):
        kv.KFAC(F.kronecker(), 0.0, rule)


def test_a_factor_that_cholesky_cannot_invert_goes_through_eigenvalues():
    F = kv.capture(mlp((4, 5, 3)).float(), X.float(), likelihood="categorical")
    M = kv.KFAC(F.kronecker(), 1e-30, "factored")  # λ is lost in round-off, and the outputs' G is singular
    assert M.fallbacks > 0
    g = torch.ones(F.partition.size)
    assert torch.isfinite(M @ g).all()


def test_leading_eigenvectors_of_a_large_factor():
    torch.manual_seed(0)
    layer = kv.Partition.from_sizes([300])
    Q = torch.linalg.qr(torch.randn(300, 300, dtype=torch.float64)).Q
    G = (Q * 0.5 ** torch.arange(300)) @ Q.T
    factors = kv.KroneckerFactors(layer, (torch.ones(1, 1, dtype=torch.float64),), (G,))
    d, U = factors.leading(4).eigen_G[0]
    assert_close(d.flip(0)[:4], 0.5 ** torch.arange(4).double(), 1e-10)
    assert_close((U.T @ Q[:, :4]).square().sum(0), torch.ones(4).double(), 1e-10)


@pytest.mark.parametrize("operator", COARSE_OPERATORS)
def test_the_coarse_operator_can_be_the_kronecker_model(operator):
    model = mlp()
    opt = TwoLevelKFAC(model, **FIXED, coarse_operator=operator, fisher="exact", correction="additive")
    train(opt, model)
    F = opt.preconditioner.A.operator
    source = F if operator == "captured" else kv.KroneckerFisher(F)
    Z = opt.preconditioner.Z.dense()
    assert_close(opt.preconditioner.Q.E.dense(), Z.T @ source.damped(0.05).dense() @ Z, 1e-10)


def test_as_published_in_2020():
    c = Optimizer.as_published_2020(mlp(), **FIXED).options
    assert (c.coarse, c.per_layer, c.correction, c.coarse_operator) == ("nicolaides", 1, "additive", "kronecker")
    mended = Optimizer.as_published_2020(mlp(), **FIXED, correction="balanced")
    assert mended.options.correction == "balanced"


# ---- statistics --------------------------------------------------------------------------------------


def test_averages_are_weighted_means_of_the_batches_seen():
    model = mlp()
    opt = TwoLevelKFAC(model, **FIXED | {"lr": 0.0}, fisher="exact", decay=0.5, coarse_window=3)
    batches = [normal(n, 4, seed=n) for n in (6, 9, 12)]
    for x in batches:
        train(opt, model, x=x, y=torch.arange(len(x)) % 3)
    shares = torch.tensor([6 * 0.25, 9 * 0.5, 12.0]).double()
    shares = shares / shares.sum()
    Fs = [kv.capture(model, x, likelihood="categorical") for x in batches]
    expected = sum(w * F.dense() for w, F in zip(shares, Fs, strict=True))
    assert_close(opt.preconditioner.A.operator.dense(), expected)
    for l in range(2):
        A = sum(w * F.factors(l, l)[0] for w, F in zip(shares, Fs, strict=True))
        assert_close(opt.preconditioner.M.factors.A[l], A)


@pytest.mark.parametrize("batches", [1, 2, 5, 8])
def test_the_window_holds_the_last_batches_from_the_first_to_the_last(batches):
    window = Window(batches, 1000, decay=0.5)
    for k in range(2 * batches + 1):
        window.add(kv.capture(mlp(), X[: k + 1], likelihood="categorical"))
        expected = range(max(0, k + 1 - batches), k + 1)
        assert [part.N for part in window.parts] == [j + 1 for j in expected]


def test_the_window_keeps_few_batches_and_few_examples():
    model = mlp()
    opt = TwoLevelKFAC(model, **FIXED | {"lr": 0.0}, fisher="exact", coarse_window=2, coarse_examples=10)
    train(opt, model, x=X[:8], y=Y[:8])
    assert opt.preconditioner.A.operator.N == 8
    train(opt, model, 3)
    F = opt.preconditioner.A.operator
    assert F.N == 10
    half = kv.capture(model, X[::4], likelihood="categorical")
    assert_close(F.dense(), half.dense())


def numbered(start: int, n: int) -> kv.Fisher:
    """The Fisher of a batch whose examples carry their number in the first input."""
    return kv.capture(mlp(), torch.arange(start, start + n).double()[:, None].expand(n, 4), likelihood="categorical")


def test_parts_of_a_batch_share_its_room_evenly():
    window = Window(4, 512, 0.95)
    for _ in range(4):
        window.add(numbered(10_000, 128))
    for part in range(8):
        window.add(numbered(64 * part, 64), same_batch=part > 0)
    kept = torch.cat([part.F.a[0][:, 0, 0] for part in window.parts if part.batch == 5])
    assert torch.bincount(kept.long() // 64).tolist() == [16] * 8
    assert sum(part.F.N for part in window.parts) == 512


def test_a_window_with_room_for_few_examples_holds_few_batches():
    window = Window(4, 2, 0.95)
    for k in range(5):
        window.add(numbered(10 * k, 5))
    assert [float(part.F.a[0][0, 0, 0]) for part in window.parts] == [30.0, 40.0]


def test_a_layer_that_a_later_part_reaches_first_ages_like_the_others():
    factors, F = RunningFactors(0.5, "expand"), numbered(0, 10)
    first, second = F.partition.names
    factors.add(F, (first, second))
    factors.add(F, (first,))
    factors.add(F, (second,), same_batch=True)
    assert factors.weight == {first: 15.0, second: 15.0}


def test_the_kronecker_coarse_operator_weighs_batches_as_the_factors_do():
    model = mlp()
    options = FIXED | {"lr": 0.0, "fisher": "exact", "decay": 0.5, "coarse_operator": "kronecker"}
    opt = TwoLevelKFAC(model, **options, coarse="nicolaides", per_layer=1, correction="additive")
    for x in (3 * normal(8, 4, seed=5), X):
        train(opt, model, x=x, y=Y[: len(x)])
    K, M = opt.preconditioner.coarse_operator.operator, opt.preconditioner.M.factors
    for l in range(2):
        A, G = K.F.factors(l, l)
        assert_close(A, M.A[l], 1e-12)
        assert_close(G, M.G[l], 1e-12)
    again = TwoLevelKFAC(model, **options, coarse="nicolaides", per_layer=1, correction="additive")
    again.load_state_dict(opt.state_dict())
    assert torch.equal(again.preconditioner.Q.E.dense(), opt.preconditioner.Q.E.dense())


@pytest.mark.parametrize("convention", ["expand", "reduce"])
def test_the_kronecker_coarse_operator_does_not_count_positions_that_a_batch_lacks(convention):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    factors, window = RunningFactors(1.0, convention), Window(2, 100, 1.0)
    for positions in (2, 8):
        F = kv.capture(model, normal(6, positions, 4, seed=positions), likelihood="gaussian", fisher="mc")
        factors.add(F, F.partition.names)
        window.add(F)
    K = window.kronecker(convention)
    for l, name in enumerate(F.partition.names):
        A, G = K.F.factors(l, l, convention)
        assert_close(A, factors.A[name], 1e-12)
        assert_close(G, factors.G[name], 1e-12)


@pytest.mark.parametrize("space", ["spectral", "krylov"])
def test_layers_without_a_gradient_do_not_set_the_length_of_the_step(space):
    model = mlp((4, 5, 5, 3))
    opt = TwoLevelKFAC(
        model, **FIXED | {"step_rule": "kl_clip", "lr": 1.0, "damping": 1e-3}, fisher="exact", coarse=space
    )
    closure_of(opt, model)()
    opt.observe(X)
    for p in model[2].parameters():
        p.grad = None
    before, F = opt.partition.pack(model), kv.capture(model, X, likelihood="categorical").damped(1e-3)
    opt.step()
    step = opt.partition.pack(model) - before
    assert not step[opt.partition.slices[1]].any()
    assert float(step @ (F @ step)) == pytest.approx(opt.options.kl_clip, rel=1e-9)


def test_the_kl_clip_leaves_weight_decay_out():
    model = mlp()
    options = {"step_rule": "kl_clip", "lr": 1.0, "damping": 1e-3, "weight_decay": 0.5}
    opt = TwoLevelKFAC(model, **FIXED | options, fisher="exact")
    closure_of(opt, model)()
    opt.observe(X)
    before, F = opt.partition.pack(model), kv.capture(model, X, likelihood="categorical").damped(1e-3)
    opt.step()
    step = opt.partition.pack(model) - before
    assert float(step @ (F @ step)) == pytest.approx(opt.options.kl_clip, rel=1e-9)


def test_looking_before_the_step_with_a_krylov_space_and_weight_decay():
    model = mlp()
    opt = TwoLevelKFAC(model, **FIXED, coarse="krylov", per_layer=2, weight_decay=1e-2)
    closure_of(opt, model)()
    opt.observe(X)
    assert not opt.preconditioner.Z.dense().requires_grad and opt.diagnostics["refreshes"] == 1
    opt.step()


def test_the_quadratic_rule_moves_no_group_at_lr_zero_and_gives_momentum_where_it_is_wanted():
    model = mlp()
    groups = [{"params": list(model[0].parameters()), "momentum": 0.0}, {"params": list(model[2].parameters())}]
    opt = TwoLevelKFAC(model, groups, **QUADRATIC, momentum=0.9)
    first = opt.partition.slices[0]
    for _ in range(3):
        closure_of(opt, model)()
        opt.observe(X)
        before, v = opt.partition.pack(model), opt.preconditioner @ opt.partition.pack_grad(model)
        opt.step()
        step = opt.partition.pack(model) - before
        assert float(torch.cosine_similarity(step[first], -v[first], dim=0)) == pytest.approx(1)
    opt.param_groups[1]["lr"] = 0.0
    before = weights(model[2])
    train(opt, model)
    assert torch.equal(weights(model[2]), before)


def test_every_part_of_an_observed_batch_is_taken_in_and_the_clock_starts_there():
    model, seen = mlp((4, 5, 5, 3)), []
    opt = TwoLevelKFAC(model, **FIXED | {"observe_every": 5})
    for step in range(14):
        if step == 7:
            model[2].requires_grad_(False)
            opt.add_param_group({"params": [nn.Parameter(torch.zeros(1).double())]})
        closure_of(opt, model)()
        before = opt.diagnostics["observations"]
        opt.observe(X[:8])
        opt.observe(X[8:])
        seen += [step] * int(opt.diagnostics["observations"] - before)
        opt.step()
    assert seen == [0, 0, 5, 5, 7, 7, 12, 12]


def test_a_bad_batch_changes_nothing_even_when_a_layer_was_just_frozen():
    model = mlp((4, 5, 5, 3))
    opt = TwoLevelKFAC(model, **FIXED)
    train(opt, model)
    model[2].requires_grad_(False)
    state = str(opened(opt.state_dict()))
    with pytest.raises(ValueError, match="NaN or inf"):
        opt.observe(X * float("nan"))
    assert str(opened(opt.state_dict())) == state


def test_parts_of_an_accumulated_batch_make_one_batch():
    models = [mlp(), mlp()]
    opts = [TwoLevelKFAC(m, **FIXED, fisher="exact", decay=0.5) for m in models]
    for _ in range(3):
        train(opts[0], models[0])
        opts[1].zero_grad()
        for part in (slice(0, 8), slice(8, 20)):
            (kv.nll(models[1](X[part]), Y[part], "categorical") * len(X[part]) / 20).backward()
            opts[1].observe(X[part])
            assert opts[1].preconditioner.A.operator.N  # looking in between changes nothing
        opts[1].step()
    assert_close(weights(models[1]), weights(models[0]), 1e-9)
    assert opts[1].curvature.factors.weight == opts[0].curvature.factors.weight


def test_schedule_of_observations_and_refreshes():
    model = mlp()
    opt = TwoLevelKFAC(model, **FIXED | {"damping": 0.5, "observe_every": 2, "refresh_every": 4}, coarse_every=6)
    seen = []
    for _ in range(13):
        closure_of(opt, model)()
        opt.observe(X)
        T = opt.preconditioner
        seen.append((id(T.M.factors), id(T.BZ)))
        opt.step()
    changes = [[i for i in range(1, 13) if seen[i][j] != seen[i - 1][j]] for j in (0, 1)]
    assert changes == [[4, 8, 12], [6, 12]]
    assert opt.diagnostics["observations"] == 7


def test_a_refresh_on_unchanged_statistics_changes_nothing():
    model = mlp()
    opt = TwoLevelKFAC(model, **FIXED)
    train(opt, model)
    T = opt.preconditioner
    for _ in range(3):
        closure_of(opt, model)()
        opt.step()
        assert opt.preconditioner is T


def test_observing_touches_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(6, 3))
    model = model.double().train()
    opt = TwoLevelKFAC(model, **FIXED)
    assert opt.partition.names == ("0", "1", "4")
    closure_of(opt, model)()
    before = copy.deepcopy(model.state_dict()), [p.grad.clone() for p in model.parameters()], torch.get_rng_state()
    buffers = [id(b) for b in model.buffers()]
    opt.observe(X)
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), model.state_dict().values(), strict=True))
    assert all(torch.equal(g, p.grad) for g, p in zip(before[1], model.parameters(), strict=True))
    assert torch.equal(before[2], torch.get_rng_state())
    assert buffers == [id(b) for b in model.buffers()] and model.training
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())


def test_sampled_labels_have_their_own_seed():
    def E(seed):
        model = mlp()
        opt = TwoLevelKFAC(model, **FIXED, seed=seed)
        torch.manual_seed(seed + 17)
        train(opt, model, 2)
        return opt.preconditioner.Q.E.dense()

    assert torch.equal(E(0), E(0)) and not torch.equal(E(0), E(1))


def test_empirical_needs_targets_and_others_refuse_them():
    model = mlp()
    opt = TwoLevelKFAC(model, **FIXED, fisher="empirical")
    closure_of(opt, model)()
    with pytest.raises(ValueError, match="true labels"):
        opt.observe(X)
    opt.observe(X, targets=Y)
    F = kv.capture(model, X, Y, likelihood="categorical", fisher="empirical")
    assert_close(opt.preconditioner.A.operator.dense(), F.dense())
    with pytest.raises(ValueError, match="no other kind"):
        TwoLevelKFAC(model, **FIXED).observe(X, targets=Y)


# ---- layers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convention", ["expand", "reduce"])
def test_convolutions_agree_with_curvlinops(convention):
    theirs = pytest.importorskip("curvlinops").KFACLinearOperator
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)).double()
    x = normal(6, 2, 4, 4)
    opt = TwoLevelKFAC(model, **FIXED, fisher="exact", convention=convention, per_layer=0)
    opt.observe(x)
    kfac = theirs(
        model,
        nn.CrossEntropyLoss(),
        list(model.parameters()),
        [(x, Y[:6])],
        fisher_type="type-2",
        kfac_approx=convention,
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    factors = opt.preconditioner.M.factors
    mine = torch.block_diag(*(torch.kron(G, A) for G, A in zip(factors.G, factors.A, strict=True)))
    order = torch.cat([v.flatten() for v in opt._layout.split(torch.arange(opt.partition.size))])
    assert_close(mine[order][:, order], kfac @ torch.eye(opt.partition.size).double())


class Sequence(nn.Module):
    """Layers at several positions, one of them called twice, with a convolution behind them."""

    def __init__(self):
        super().__init__()
        self.mix, self.conv, self.head = nn.Linear(4, 4), nn.Conv2d(1, 2, 3, stride=2), nn.Linear(2, 3)

    def forward(self, x):
        x = torch.tanh(self.mix(torch.tanh(self.mix(x))))
        return self.head(self.conv(x[:, None]).flatten(2).mean(2))


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_layers_with_positions_apply_as_they_look(correction):
    torch.manual_seed(0)
    model, x = Sequence().double(), normal(20, 5, 4)
    opt = TwoLevelKFAC(model, **FIXED | {"fisher": "exact", "correction": correction})
    losses = train(opt, model, 8, x=x)
    g = opt.partition.pack_grad(model)
    assert_close(opt.preconditioner @ g, opt.preconditioner.dense() @ g, 1e-10)
    assert losses[-1] < losses[0]


def test_frozen_layers_are_left_out_and_said():
    model = mlp((4, 5, 5, 3))
    model[2].requires_grad_(False)
    with pytest.warns(UserWarning, match="Left out of the curvature.*: 2"):
        opt = TwoLevelKFAC(model, **FIXED)
    before = weights(model[2])
    train(opt, model, 2)
    assert opt.partition.names == ("0", "4") and torch.equal(weights(model[2]), before)
    model[2].requires_grad_(True)
    opt.add_param_group({"params": list(model[2].parameters())})
    train(opt, model, 2)
    assert opt.partition.names == ("0", "2", "4") and not torch.equal(weights(model[2]), before)
    model[0].requires_grad_(False)
    train(opt, model, 1)
    assert opt.partition.names == ("2", "4")


def test_a_weight_that_is_computed_from_others_is_left_out():
    model = mlp()
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.warns(UserWarning, match="Left out of the curvature.*: 0"):
        opt = TwoLevelKFAC(model, **FIXED)
    losses = train(opt, model, 5)
    assert opt.partition.names == ("2",) and losses[-1] < losses[0]


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 3)

        self.second = False

    def forward(self, x):
        return self.head(torch.tanh(self.two(x) if self.second else self.one(x)))


def test_a_layer_unused_in_this_batch():
    model = Branches().double()
    opt = TwoLevelKFAC(model, **FIXED, fisher="exact")
    before = weights(model.two)
    train(opt, model)
    assert torch.equal(weights(model.two), before)
    assert not opt.preconditioner.A.operator.block("two", "two").any()
    model.second = True
    kv.nll(model(X), Y, "categorical").backward()
    opt.step()  # a gradient, but no statistics of this layer yet: it stays
    assert torch.equal(weights(model.two), before) and opt.diagnostics["layers without statistics"] == 2
    kv.nll(model(X), Y, "categorical").backward()
    opt.observe(X)
    opt.step()
    assert not torch.equal(weights(model.two), before)
    kept = opt.curvature.factors.A["one"]
    model.second = False
    assert_close(kept, kv.capture(model, X, likelihood="categorical", layers=["one"]).factors("one", "one")[0])


# ---- step rules --------------------------------------------------------------------------------------


def test_momentum_lr_and_weight_decay_of_groups():
    """A weight and its bias in groups of their own, against a loop written out."""
    model, twin = mlp(), mlp()
    names = dict(model.named_parameters())
    groups = [
        {"params": [p for n, p in names.items() if "weight" in n], "lr": 0.1, "weight_decay": 0.2},
        {"params": [p for n, p in names.items() if "bias" in n], "lr": 0.05, "momentum": 0.5},
    ]
    opt = TwoLevelKFAC(model, groups, **FIXED | {"momentum": 0.9}, fisher="exact", coarse_window=1, decay=0.0)
    buffers = {}
    for _ in range(4):
        train(opt, model)
        twin.zero_grad()
        kv.nll(twin(X), Y, "categorical").backward()
        for n, p in twin.named_parameters():
            p.grad.add_(p.detach(), alpha=0.2 if "weight" in n else 0.0)
        F = kv.capture(twin, X, likelihood="categorical")
        T = kv.TwoLevel(F.damped(0.05), kv.KFAC(F, 0.05, "factored"), kv.coarse.spectral(F, 4))
        v = dict(zip(names, opt._layout.split(T @ F.partition.pack_grad(twin)), strict=True))
        with torch.no_grad():
            for n, p in twin.named_parameters():
                mu, lr = (0.9, 0.1) if "weight" in n else (0.5, 0.05)
                buffers[n] = mu * buffers.get(n, 0) + v[n]
                p.sub_(lr * buffers[n])
    assert_close(weights(model), weights(twin), 1e-8)


def test_decoupled_weight_decay_shrinks_weights():
    plain, decayed = mlp(), mlp()
    train(TwoLevelKFAC(plain, **FIXED), plain)
    train(TwoLevelKFAC(decayed, **FIXED, weight_decay=0.5, decoupled=True), decayed)
    assert_close(weights(decayed), weights(plain) - 0.1 * 0.5 * weights(mlp()))


def test_maximize_climbs_the_negated_loss():
    model, twin = mlp(), mlp()
    train(TwoLevelKFAC(model, **FIXED), model)
    opt = TwoLevelKFAC(twin, **FIXED, maximize=True)
    (-kv.nll(twin(X), Y, "categorical")).backward()
    opt.observe(X)
    opt.step()
    assert_close(weights(model), weights(twin))


def test_kl_clip_bounds_the_true_quadratic_form():
    model = mlp()
    opt = TwoLevelKFAC(
        model, **FIXED | {"step_rule": "kl_clip", "lr": 1.0, "damping": 1e-4}, kl_clip=1e-3, fisher="exact"
    )
    before = opt.partition.pack(model)
    F = kv.capture(model, X, likelihood="categorical")
    train(opt, model)
    step = opt.partition.pack(model) - before
    assert float(step @ (F.damped(1e-4) @ step)) == pytest.approx(1e-3, rel=1e-9)
    assert float(step @ (F @ step)) < 1e-3
    assert opt.diagnostics["clip"] < 1


def test_momentum_lengthens_clipped_steps():
    """Always from the same point, the n-th step is ``(1 − mⁿ) / (1 − m)`` times the clipped one."""
    model = mlp()
    options = {"step_rule": "kl_clip", "lr": 1.0, "damping": 1e-4, "momentum": 0.5}
    opt = TwoLevelKFAC(model, **FIXED | options, kl_clip=1e-3, fisher="exact")
    start = copy.deepcopy(model.state_dict())
    before, F = opt.partition.pack(model), kv.capture(model, X, likelihood="categorical").damped(1e-4)
    for n in range(1, 6):
        model.load_state_dict(start)
        train(opt, model)
        step = opt.partition.pack(model) - before
        assert float(step @ (F @ step)) == pytest.approx(1e-3 * (2 - 0.5 ** (n - 1)) ** 2, rel=1e-9)


@pytest.mark.parametrize("correction", ["a-def1", "a-def2", "balanced"])
def test_full_coarse_space_and_exact_fisher_solve_linear_regression_in_one_step(correction):
    model = nn.Sequential(nn.Linear(4, 2)).double()
    y = normal(20, 2, seed=5)
    opt = TwoLevelKFAC(
        model,
        likelihood="gaussian",
        fisher="exact",
        damping=1e-9,
        coarse="spectral",
        per_layer=10,
        correction=correction,
        step_rule="quadratic",
    )
    train(opt, model, x=X, y=y, likelihood="gaussian")
    ones = torch.cat([X, torch.ones(20, 1).double()], dim=1)
    best = torch.linalg.lstsq(ones, y).solution
    assert_close(torch.cat([model[0].weight, model[0].bias[:, None]], dim=1).detach(), best.T, 1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_predicted_decrease_is_the_true_one_on_a_quadratic(decay):
    model = nn.Sequential(nn.Linear(4, 2)).double()
    y = normal(20, 2, seed=5)
    opt = TwoLevelKFAC(
        model,
        likelihood="gaussian",
        fisher="exact",
        damping=0.0,
        rule="eigen",
        per_layer=1,
        weight_decay=decay,
        step_rule="quadratic",
        lr=0.5,
    )
    for _ in range(3):
        loss = closure_of(opt, model, X, y, "gaussian")
        loss()
        opt.observe(X)
        opt.step(loss)
        assert opt.diagnostics["reduction ratio"] == pytest.approx(1.0, abs=1e-6)


def test_quadratic_rule_minimises_over_step_and_momentum():
    model = mlp()
    opt = TwoLevelKFAC(model, **QUADRATIC, coarse_window=1, decay=0.0)
    train(opt, model, 2)
    closure_of(opt, model)()
    opt.observe(X)
    before, g = opt.partition.pack(model), opt.partition.pack_grad(model)
    A, previous = opt.preconditioner.A, opt._layout.joined({p: s["momentum_buffer"] for p, s in opt.state.items()})
    D = torch.stack([-(opt.preconditioner @ g), previous], dim=1)
    best = torch.linalg.solve(D.T @ (A @ D), -D.T @ g)
    opt.step()
    assert_close(opt.partition.pack(model) - before, D @ best, 1e-8)


def test_a_step_that_goes_up_is_undone():
    model = mlp()
    opt = TwoLevelKFAC(model, likelihood="categorical", damping=1e-8, lr=300.0, step_rule="quadratic")
    closure = closure_of(opt, model)
    before = weights(model)
    closure()
    opt.observe(X)
    opt.step(closure)
    assert torch.equal(weights(model), before)
    assert opt.diagnostics["rejected"] == 1 and opt.damping == pytest.approx(4e-8)
    assert opt.preconditioner.damping == opt.damping
    for group in opt.param_groups:
        group["lr"] = 1.0
    for _ in range(15):
        opt.step(closure)
    assert float(kv.nll(model(X), Y, "categorical")) < float(kv.nll(mlp()(X), Y, "categorical"))


def test_a_closure_that_fails_behind_the_step_leaves_everything_as_it_was():
    model = mlp()
    opt = TwoLevelKFAC(model, likelihood="categorical", step_rule="quadratic")
    closure, calls = closure_of(opt, model), []

    def failing():
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("the disk is full")
        return closure()

    closure()
    opt.observe(X)
    opt.step(closure)
    before, told = weights(model), opt.diagnostics
    with pytest.raises(RuntimeError, match="the disk is full"):
        opt.step(failing)
    assert torch.equal(weights(model), before) and opt.diagnostics == told


def test_overshooting_is_counted_and_told_once():
    model = mlp()
    opt = TwoLevelKFAC(model, **FIXED | {"lr": 500.0, "fisher": "exact", "observe_every": 1})
    closure_of(opt, model)()
    opt.observe(X)
    before, g, A = opt.partition.pack(model), opt.partition.pack_grad(model), opt.preconditioner.A
    with pytest.warns(UserWarning, match="too long"):
        opt.step()
    step = opt.partition.pack(model) - before
    assert opt.diagnostics["overshoot"] == pytest.approx(float(g @ step + step @ (A @ step) / 2), rel=1e-8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(opt, model)
    assert opt.diagnostics["overshoots"] == 2


# ---- an optimizer like any other ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.3, total_steps=10),
        lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.1, 0.3),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o,
            [torch.optim.lr_scheduler.ConstantLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
            milestones=[2],
        ),
    ],
)
def test_schedulers(make):
    model = mlp()
    opt = TwoLevelKFAC(model, **FIXED | {"momentum": 0.9})
    scheduler = make(opt)
    losses = train(opt, model, 5, scheduler=scheduler)
    assert losses[-1] < losses[0]
    assert opt.param_groups[0]["lr"] != 0.1


@pytest.mark.parametrize("step_rule", ["fixed", "kl_clip", "quadratic"])
@pytest.mark.parametrize("coarse", ["spectral", "krylov"])
@pytest.mark.parametrize("stop", range(1, 8))
def test_resumed_is_uninterrupted_bit_for_bit(stop, coarse, step_rule):
    options = {"likelihood": "categorical", "step_rule": step_rule, "damping": 0.1, "lr": 0.3, "coarse": coarse}
    options |= {"per_layer": 2, "observe_every": 2, "refresh_every": 3, "coarse_every": 4, "coarse_window": 2}

    def run(model, opt, steps, first=0):
        for i in range(first, steps):
            closure = closure_of(opt, model)
            closure()
            opt.observe(X)
            opt.step(closure if i % 2 else None)

    straight = mlp()
    run(straight, TwoLevelKFAC(straight, **options), 9)
    model = mlp()
    opt = TwoLevelKFAC(model, **options)
    run(model, opt, stop)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model = mlp(seed=3)
    model.load_state_dict(saved["model"])
    opt = TwoLevelKFAC(model, **options)
    opt.load_state_dict(saved["opt"])
    run(model, opt, 9, stop)
    assert torch.equal(weights(model), weights(straight))


def test_a_foreign_state_changes_nothing():
    model = mlp()
    opt = TwoLevelKFAC(model, **FIXED)
    train(opt, model)
    T = opt.preconditioner
    other = TwoLevelKFAC(mlp((4, 6, 3)), **FIXED)
    with pytest.raises(ValueError, match="belongs to layers"):
        opt.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="not a state of TwoLevelKFAC"):
        opt.load_state_dict(torch.optim.SGD(mlp().parameters(), lr=0.1).state_dict())
    assert opt.preconditioner is T


def test_a_state_saved_with_other_options_is_said():
    model = mlp()
    opt = TwoLevelKFAC(model, **FIXED, coarse="random", per_layer=2)
    train(opt, model, 2)
    state = opened(opt.state_dict())
    other = TwoLevelKFAC(model, **FIXED | {"damping": 7.0}, fisher="exact", per_layer=3, coarse="random")
    with pytest.warns(UserWarning) as told:
        other.load_state_dict(state)
    assert len(told) == 1 and told[0].filename == __file__
    assert "saved with per_layer=2 (here 3), fisher='mc' (here 'exact')" in str(told[0].message)
    assert other.damping == 0.05 and (other.options.per_layer, other.options.fisher) == (3, "exact")
    train(other, model, 2)
    assert other.preconditioner.Z.size == 6

    strict = TwoLevelKFAC(model, **FIXED | {"damping": 7.0}, rule="eigen")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="rule='factored' .here 'eigen'."):
            strict.load_state_dict(state)  # a refusal changes nothing
        assert strict.damping == 7.0 and not strict.state
        TwoLevelKFAC(model, **FIXED, coarse="random", per_layer=2).load_state_dict(state)  # alike: no warning
        del state["curvature"]["options"], state["curvature"]["version"]
        strict.load_state_dict(state)  # of an earlier version: none can be given
    assert strict.damping == 0.05


def test_warnings_point_at_the_users_line():
    model = mlp((4, 5, 5, 3))
    model[2].requires_grad_(False)
    with pytest.warns(UserWarning) as told:
        opt = Optimizer.as_published_2020(model, **FIXED | {"lr": 1e4})
        closure_of(opt, model)()
        opt.observe(X)
        torch.optim.lr_scheduler.StepLR(opt, 1)  # wraps step once more
        opt.step()
    assert [str(w.message).split()[0] for w in told] == ["Left", "By"] and {w.filename for w in told} == {__file__}


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_go_on_alike_and_apart(twin_of):
    model = mlp()
    opt = TwoLevelKFAC(model, **FIXED | {"momentum": 0.9})
    torch.optim.lr_scheduler.StepLR(opt, 1)  # wraps step, which must not travel
    train(opt, model, 2)
    model2, opt2 = twin_of((model, opt))
    train(opt, model, 2)
    assert not torch.equal(weights(model2), weights(model))
    train(opt2, model2, 2)
    assert torch.equal(weights(model2), weights(model))


def test_state_follows_the_model_to_another_dtype():
    model = mlp()
    opt = TwoLevelKFAC(model, **FIXED | {"momentum": 0.9})
    train(opt, model, 2)
    model.float()
    train(opt, model, 2, x=X.float())
    assert opt.preconditioner.dtype == torch.float32
    assert all(state["momentum_buffer"].dtype == torch.float32 for state in opt.state.values())


def test_a_parameter_is_left_out_in_the_step_in_which_the_model_moves_to_another_dtype():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.scale, self.otherwise = mlp(), nn.Parameter(torch.ones(3, dtype=torch.float64)), False

        def forward(self, x):
            return self.inner(x) * (self.scale.exp() if self.otherwise else self.scale)

    model = Scaled()
    opt = TwoLevelKFAC(model, **FIXED)
    train(opt, model, 2)
    assert "scale" in opt.partition.names
    model.float()
    model.otherwise = True
    with pytest.warns(UserWarning, match="scale"):
        train(opt, model, 2, x=X.float())
    assert "scale" not in opt.partition.names and opt.preconditioner.dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_cpu_and_cuda_agree_and_state_moves():
    models = [mlp(), mlp().cuda()]
    options = FIXED | {"momentum": 0.9, "fisher": "exact"}
    opts = [TwoLevelKFAC(m, **options) for m in models]
    for m, o in zip(models, opts, strict=True):
        x, y = X.to(next(m.parameters()).device), Y.to(next(m.parameters()).device)
        train(o, m, 3, x=x, y=y)
    assert_close(weights(models[1]).cpu(), weights(models[0]), 1e-8)
    models[0].cuda()
    for m, o in zip(models, opts, strict=True):
        train(o, m, 2, x=X.cuda(), y=Y.cuda())
    assert_close(weights(models[1]), weights(models[0]), 1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_have_float32_statistics(dtype):
    model = mlp().to(dtype)
    opt = TwoLevelKFAC(model, **FIXED)
    train(opt, model, 3, x=X.to(dtype))
    assert opt.preconditioner.dtype == torch.float32
    assert torch.isfinite(weights(model)).all()


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_and_grad_scaler(device):
    model = mlp((4, 16, 3)).float().to(device)
    x, y = X.float().to(device), Y.to(device)
    opt = TwoLevelKFAC(model, **FIXED)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**4)
    dtype = torch.bfloat16 if device == "cpu" else torch.float16
    losses = []
    for i in range(6):
        opt.zero_grad()
        with torch.autocast(device, dtype):
            loss = kv.nll(model(x).float(), y, "categorical")
            if i % 2:
                opt.observe(x)
        scaler.scale(loss).backward()
        if not i % 2:
            opt.observe(x)
        if i == 3:  # an overflow: the scaler skips the step
            before = weights(model)
            model[0].weight.grad[0, 0] = torch.inf
        scaler.step(opt)
        scaler.update()
        if i == 3:
            assert torch.equal(weights(model), before)
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert opt.preconditioner.dtype == torch.float32


def test_a_distributed_model_of_one_process_trains_like_the_plain_one(tmp_path):
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        model, twin = mlp(), mlp()
        wrapped = nn.parallel.DistributedDataParallel(model)
        train(TwoLevelKFAC(wrapped, **FIXED), wrapped, 3)
        train(TwoLevelKFAC(twin, **FIXED), twin, 3)
        assert torch.equal(weights(model), weights(twin))
    finally:
        dist.destroy_process_group()


def test_compiled_models_are_seen_through():
    model = mlp()
    compiled = torch.compile(model, backend="eager")
    opt = TwoLevelKFAC(compiled, **FIXED)
    twin = mlp()
    train(opt, compiled, 2)
    train(TwoLevelKFAC(twin, **FIXED), twin, 2)
    assert_close(weights(model), weights(twin), 1e-9)


def test_zero_grad_closure_and_repr():
    model = mlp()
    opt = TwoLevelKFAC(model, **FIXED)
    loss = closure_of(opt, model)
    loss()
    opt.observe(X)
    assert float(opt.step(loss).detach()) == pytest.approx(float(kv.nll(mlp()(X), Y, "categorical").detach()))
    opt.zero_grad(set_to_none=False)
    assert not model[0].weight.grad.any()
    opt.zero_grad()
    assert model[0].weight.grad is None
    for word in ("spectral-4 balanced", "mc with 1 label", "512 examples", "fixed", "observations 1"):
        assert word in repr(opt)


# ---- never wrong in silence --------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_gradient_names_its_layer_and_changes_nothing(value):
    model = mlp()
    opt = TwoLevelKFAC(model, **FIXED | {"momentum": 0.9})
    train(opt, model, 2)
    closure_of(opt, model)()
    model[2].bias.grad[0] = value
    state, before = str(opened(opt.state_dict())), weights(model)
    with pytest.raises(ValueError, match="layer '2'"):
        opt.step()
    assert torch.equal(weights(model), before)
    assert str(opened(opt.state_dict())) == state
    closure_of(opt, model)()
    with pytest.raises(ValueError, match="NaN or inf"):
        opt.observe(X.clone().fill_(value))
    assert str(opened(opt.state_dict())) == state


def test_what_is_missing_is_said():
    model = mlp()
    opt = TwoLevelKFAC(model, **FIXED)
    with pytest.raises(ValueError, match="backward"):
        opt.step()
    closure_of(opt, model)()
    with pytest.raises(ValueError, match="observe"):
        opt.step()
    with pytest.raises(ValueError, match="empty"):
        opt.observe(X[:0])
    with pytest.raises(ValueError, match="no trainable layer"):
        TwoLevelKFAC(mlp(), [mlp()[0].weight], **FIXED)
    with pytest.raises(ValueError, match="\\['nowhere'\\]"):
        TwoLevelKFAC(model, **FIXED, layers=["nowhere"])
    model[2] = nn.Linear(5, 3).double()
    with pytest.raises(ValueError, match="changed"):
        opt.observe(X)


def test_a_batch_of_one_and_dead_layers():
    model = mlp((4, 5, 3), nn.ReLU)
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    opt = TwoLevelKFAC(model, **FIXED)
    train(opt, model, 3, x=X[:1], y=Y[:1])
    assert torch.isfinite(weights(model)).all()


def test_zero_damping_is_an_error_or_a_counted_fallback():
    model = mlp()
    opt = TwoLevelKFAC(model, **FIXED | {"damping": 0.0})
    closure_of(opt, model)()
    opt.observe(X[:2])
    with pytest.raises(ValueError, match="singular"):
        opt.step()
    model = nn.Sequential(nn.Linear(3, 2)).double()  # invertible factors, but six columns of one score per example
    opt = TwoLevelKFAC(model, likelihood="gaussian", damping=0.0, per_layer=6, coarse_examples=4, momentum=0.0)
    kv.nll(model(X[:, :3]), normal(20, 2), "gaussian").backward()
    opt.observe(X[:, :3])
    with pytest.warns(UserWarning, match="coarse level is left out"):
        opt.step()
    assert opt.diagnostics["fallbacks to one level"] == 1 and opt.preconditioner.Z.size == 0


@pytest.mark.parametrize(
    "option, value",
    [
        ("lr", -1.0), ("lr", float("nan")), ("lr", "fast"), ("momentum", 1.0), ("momentum", -0.1),
        ("weight_decay", -1.0), ("damping", -1.0), ("damping", float("inf")), ("observe_every", 0),
        ("refresh_every", 1.5), ("coarse_every", 0), ("per_layer", -1), ("samples", 0), ("decay", 1.5),
        ("coarse_examples", 0), ("coarse_window", 0), ("kl_clip", 0.0), ("seed", -1), ("rule", "other"),
        ("coarse", "optimal"), ("correction", "other"), ("fisher", "other"), ("step_rule", "other"),
        ("convention", "other"), ("likelihood", "poisson"), ("coarse_operator", "other"),
    ],
)  # fmt: skip
def test_hyperparameters_are_checked(option, value):
    with pytest.raises((ValueError, TypeError), match=option):
        TwoLevelKFAC(mlp(), **FIXED | {option: value})


def test_every_option_is_in_the_signature_with_its_default():
    shown = inspect.signature(Optimizer).parameters
    assert [name for name in ("lr", "layers", *NAMES) if name not in shown] == []
    assert (shown["damping"].default, shown["per_layer"].default) == (0.1, 0)
    with pytest.raises(TypeError, match="no option 'dampening'; it has likelihood, damping"):
        TwoLevelKFAC(mlp(), **FIXED, dampening=1.0)
    with pytest.raises(TypeError, match="Name the likelihood"):
        TwoLevelKFAC(mlp())


@pytest.mark.parametrize(
    "arguments, options, error, sentence",
    [
        ((mlp().parameters(),), {}, TypeError, r"model comes first, not its parameters; got generator"),
        ((list(mlp().parameters()),), {}, TypeError, r"model comes first.*got list"),
        ((mlp(), 0.1), {}, TypeError, r"parameters or their groups; got 0\.1.*lr=0\.1"),
        ((mlp(),), {"layers": "02"}, ValueError, r"list of names out of \['0', '2'\]; got '02'"),
        ((mlp(),), {"layers": 2}, ValueError, r"list of names out of \['0', '2'\]; got 2"),
        ((mlp(),), {"layers": []}, ValueError, r"list of names out of \['0', '2'\]; got \[\]"),
    ],
)
def test_arguments_in_the_wrong_place_are_said(arguments, options, error, sentence):
    with pytest.raises(error, match=sentence):
        TwoLevelKFAC(*arguments, **FIXED, **options)


@pytest.mark.parametrize("space", ["nicolaides", "spectral", "smooth", "krylov", "random"])
def test_a_layer_with_fewer_parameters_than_columns_gives_what_it_has(space):
    model = mlp()  # layer "2" has 18 parameters, layer "0" has 25
    opt = TwoLevelKFAC(model, **FIXED | {"coarse": space, "per_layer": 19})
    train(opt, model)
    assert opt.preconditioner.Z.per_layer[1] <= 18 < opt.preconditioner.Z.per_layer[0] or space == "krylov"
    assert max(opt.preconditioner.Z.per_layer) <= 19
    tiny = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1, bias=False)).double()
    defaults = TwoLevelKFAC(tiny, likelihood="gaussian", per_layer=9)
    assert defaults.partition.names == ("0", "2")


@settings(max_examples=40)
@given(
    st.fixed_dictionaries(
        {
            "rule": st.sampled_from(["eigen", "factored"]),
            "coarse": st.sampled_from(SPACES),
            "per_layer": st.integers(0, 6),
            "correction": st.sampled_from(CORRECTIONS),
            "coarse_operator": st.sampled_from(COARSE_OPERATORS),
            "fisher": st.sampled_from(["mc", "exact"]),
            "samples": st.integers(1, 3),
            "decay": st.floats(0, 1),
            "observe_every": st.integers(1, 4),
            "refresh_every": st.integers(1, 4),
            "coarse_every": st.none() | st.integers(1, 4),
            "coarse_window": st.integers(1, 3),
            "coarse_examples": st.integers(5, 40),
            "momentum": st.floats(0, 0.9),
            "weight_decay": st.floats(0, 0.1),
            "decoupled": st.booleans(),
            "step_rule": st.sampled_from(["fixed", "kl_clip", "quadratic"]),
            "damping": st.floats(1e-2, 10),
            "lr": st.floats(0, 0.1),
        }
    )
)
def test_ten_steps_have_no_nan_whatever_the_options(options):
    model = mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(TwoLevelKFAC(model, likelihood="categorical", **options), model, 10)
    assert torch.isfinite(weights(model)).all()
