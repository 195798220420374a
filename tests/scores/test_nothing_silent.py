"""What was once wrong without a word, or ended in somebody else's error: each now right, or refused in a sentence."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers import assert_close, exact_fisher, mlp, normal, opened
from torch import nn

import kfac_viz as kv
from kfac_viz.method.checks import check_room

X, Y = normal(20, 4), torch.arange(20) % 3
TRAIN = {"likelihood": "categorical", "step_rule": "fixed", "lr": 0.1, "damping": 0.05, "observe_every": 1,
         "per_layer": 4}  # fmt: skip


class Forward(nn.Module):
    """Layers by name, and any function of them."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.double()

    def forward(self, x):
        return self.function(self, x)


def backward(model, x, y, likelihood="categorical"):
    model.zero_grad()
    kv.nll(model(x), y, likelihood).backward()


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# ---- models whose scores are not what their layers show ------------------------------------------------


def contracted():
    """A layer whose weight also meets a function of which nothing is known."""
    torch.manual_seed(0)
    run = lambda s, x: s.head(torch.tanh(s.one(x)) + torch.einsum("ni,oi->no", x, s.one.weight))  # noqa: E731
    return Forward(run, one=nn.Linear(4, 5), head=nn.Linear(5, 3))


@pytest.mark.filterwarnings("ignore:Outside the Fisher", "ignore:Adam's steps", "ignore:Left out")
def test_an_unknown_use_is_refused_with_advice_that_works():
    x, y = normal(6, 4), torch.arange(6) % 3
    for refuses in (
        lambda **given: kv.capture(contracted(), x, likelihood="categorical", **given),
        lambda **given: kv.TwoLevelKFAC(contracted(), **TRAIN, **given).observe(x),
    ):
        with pytest.raises(ValueError, match="Parameter 'one.weight' is also used by einsum.* layer 'one'") as told:
            refuses()
        layers = eval(str(told.value).split("layers=")[1].rstrip("."))
        assert layers == ["head"]
        refuses(layers=layers)
    model = contracted()
    F = kv.capture(model, x, likelihood="categorical", layers=layers)
    assert_close(F.dense(), exact_fisher(model.eval(), x, "categorical", layers), 1e-10)
    opt, before = kv.TwoLevelKFAC(model, **TRAIN, layers=layers), copy.deepcopy(model.state_dict())
    backward(model, x, y)
    opt.observe(x)
    opt.step()
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert moved == [name for name, _ in model.named_parameters()], "the other layer follows Adam's rule"


class Unseen(torch.autograd.Function):
    """A product that no mode sees."""

    @staticmethod
    def forward(ctx, x, W):
        ctx.save_for_backward(x, W)
        return x @ W.T

    @staticmethod
    def backward(ctx, g):
        x, W = ctx.saved_tensors
        return g @ W, g.mT @ x


COUPLED = {
    "penalised": (lambda s, x: s.one(x) + s.one.weight.square().sum(), "used by square"),
    "unseen": (lambda s, x: s.one(x) + Unseen.apply(x, s.one.weight), "used outside the calls"),
    "some columns": (lambda s, x: s.one(x) + x[:, :2] @ s.one.weight[:, :2].T, "used by matmul"),
    "shifted by the others": (lambda s, x: s.one(x).cumsum(0), "do not belong to one example"),
    "shifted the other way": (lambda s, x: s.one(x).flip(0).cumsum(0).flip(0), "do not belong to one example"),
    "shared by the examples": (lambda s, x: x + s.one(x.mean(0, keepdim=True)), "where the model returned 20 examples"),
}


@pytest.mark.parametrize("name", COUPLED)
def test_uses_that_are_no_sum_of_products_and_examples_that_mix_are_refused(name):
    torch.manual_seed(0)
    run, words = COUPLED[name]
    with pytest.raises(ValueError, match=words):
        kv.capture(Forward(run, one=nn.Linear(4, 4)), X, likelihood="gaussian")


@pytest.mark.parametrize("activation", [nn.ReLU(inplace=True), nn.ReLU()])
def test_an_activation_in_place_hides_no_layer_with_positions(activation):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(2, 3), activation, nn.Linear(3, 2)).double(), normal(3, 4, 2)
    assert_close(
        kv.capture(model, x, likelihood="gaussian").dense(), exact_fisher(model, x, "gaussian", ("0", "2")), 1e-10
    )


@pytest.mark.parametrize("end, likelihood", [(nn.Softmax(-1), "categorical"), (nn.Sigmoid(), "bernoulli")])
def test_probabilities_where_logits_are_expected_are_told_once(end, likelihood):
    model = nn.Sequential(*mlp(), end)
    with pytest.warns(UserWarning, match="seems to end in s.*expects logits") as told:
        kv.capture(model, X, likelihood=likelihood)
        kv.capture(model, X, likelihood=likelihood)
    assert len(told) == 1


def test_torchscript_is_refused_by_name():
    with pytest.warns(DeprecationWarning):
        script = torch.jit.script(nn.Sequential(nn.Linear(4, 3)).double())
    with pytest.raises(TypeError, match="TorchScript"):
        kv.capture(script, X, likelihood="categorical")


# ---- numbers out of range ----------------------------------------------------------------------------


def test_an_overflow_of_the_fisher_is_refused_at_its_door():
    model = mlp().float()
    with pytest.raises(ValueError, match="overflows torch.float32 in layer '0'"):
        kv.capture(model, 1e20 * X.float(), likelihood="gaussian")
    a, g = torch.full((3, 1, 2), 1e30), torch.full((1, 3, 1, 1), 1e10)
    F = kv.Fisher(kv.Partition.from_sizes([2]), [a.new_ones(3, 1, 1)], [torch.full((1, 3, 1, 2), 1e25)])
    with pytest.raises(ValueError, match="matrix of Fisher overflows torch.float32"):
        F.dense()
    with pytest.raises(ValueError, match="product of Fisher overflows torch.float32"):
        F @ torch.ones(2)
    assert torch.isfinite(a).all() and torch.isfinite(g).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("step_rule", ["fixed", "kl_clip", "quadratic"])
def test_a_step_writes_finite_numbers_or_nothing(step_rule, dtype):
    model, size = mlp().to(dtype), 1e20 if dtype != torch.float64 else 1e160
    opt = kv.TwoLevelKFAC(model, likelihood="gaussian", step_rule=step_rule, observe_every=1, lr=1.0)
    for y in (normal(20, 3), size * normal(20, 3)):
        backward(model, X.to(dtype), y.to(dtype), "gaussian")
        opt.observe(X.to(dtype))
        before, state = weights(model), str(opened(opt.state_dict()))
        try:
            opt.step()
        except ValueError as told:
            assert "overflow" in str(told) or "NaN or inf" in str(told)
            assert torch.equal(weights(model), before) and str(opened(opt.state_dict())) == state
        assert torch.isfinite(weights(model)).all()


def test_half_precision_is_checked_in_what_is_written():
    model = mlp().half()
    opt = kv.TwoLevelKFAC(model, **TRAIN | {"damping": 1e-6, "lr": 0.0, "momentum": 0.9})
    for p in model.parameters():
        p.grad = torch.full_like(p, 100.0)
    opt.observe(X.half())
    before = weights(model)
    with pytest.raises(ValueError, match="would overflow parameters of torch.float16"):
        opt.step()
    assert torch.equal(weights(model), before)


@pytest.mark.parametrize("size", [1e-30, 1e-24, 1.0, 1e20, 1e30])
def test_conjugate_gradients_have_no_scale(size):
    F = kv.capture(mlp().float(), X.float(), likelihood="categorical")
    A, g = F.damped(0.1), normal(F.partition.size).float()
    x, expected = kv.pcg(A, size * g, rtol=1e-4), kv.pcg(A, g, rtol=1e-4)
    assert x.iterations == expected.iterations and x.converged
    assert_close(x.solution.double() / size, expected.solution.double(), 1e-3)


def test_converged_means_the_true_residual():
    F = kv.capture(mlp().float(), X.float(), likelihood="categorical")
    A, g = F.damped(1e-4), normal(F.partition.size).float()
    x = kv.pcg(A, g, rtol=1e-12)
    true = float((g.double() - A.dense().double() @ x.solution.double()).norm() / g.double().norm())
    assert x.residuals[-1] <= 1e-12 < 1e-7 < true and not x.converged
    assert x.residual == pytest.approx(true, rel=0.3)
    assert "not converged" in repr(x) and f"{x.residual:.2g}" in repr(x)


@pytest.mark.parametrize("scale", [1e-160, 1.0, 1e150])
@pytest.mark.parametrize("damping", [1e-3, 1e150])
def test_captured_decrease_has_no_scale(scale, damping):
    F = kv.capture(mlp(), X, likelihood="categorical")
    A, g = F.damped(damping), scale * normal(F.partition.size)
    if scale / damping < 1e-290:
        return  # the direction itself is zero
    assert kv.captured_decrease(A, g, A.solve(g)) == pytest.approx(1.0, rel=1e-6)


# ---- sentences in place of raw errors ------------------------------------------------------------------

F32 = kv.capture(mlp().float(), X.float(), likelihood="categorical")
V = normal(F32.partition.size).float()


def drawn(samples):
    return kv.capture(mlp(), X, likelihood="categorical", fisher="mc", samples=samples)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: F32 @ V.clone().requires_grad_(), ValueError, r"v\.detach\(\)"),
        (lambda: F32 @ V.to_sparse(), TypeError, r"to_dense\(\)"),
        (lambda: F32.damped(10**400), ValueError, "damping must be finite"),
        (lambda: F32.damped(1e39), ValueError, "damping 1e[+]39 overflows torch.float32"),
        (lambda: kv.KFAC(F32, 1e-200), ValueError, "choose a larger damping"),
        (lambda: drawn(2**70), ValueError, "samples must be"),
        (lambda: drawn(2**45), ValueError, "GiB.*are left"),
        (lambda: kv.coarse.random(F32, 1, seed=2**60 + 1), ValueError, "seed must be .* at most 2.60"),
        (lambda: kv.coarse.random(F32, 1, seed=0.5), ValueError, "seed must be a whole number"),
        (lambda: kv.TwoLevelKFAC(mlp(), **TRAIN, seed=2**61), ValueError, "seed must be .* at most 2.60"),
        (lambda: kv.problems.digits(n=10, seed=2**61), ValueError, "seed must be .* at most 2.60"),
        (lambda: kv.pcg(F32.damped(0.1), V, rtol=None), TypeError, "rtol must be a number; got None"),
        (lambda: kv.nll(X, X.to(torch.complex128), "gaussian"), TypeError, "complex128"),
        (lambda: kv.nll(X, Y.to(torch.complex64), "categorical"), TypeError, "complex64"),
    ],
)  # fmt: skip
def test_sentences(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_classes_may_be_integers_of_any_kind(dtype):
    model = mlp()
    assert kv.nll(model(X), Y.to(dtype), "categorical") == kv.nll(model(X), Y, "categorical")
    mine, theirs = (
        kv.capture(model, X, y, likelihood="categorical", fisher="empirical").dense() for y in (Y.to(dtype), Y)
    )
    assert torch.equal(mine, theirs)


def test_what_does_not_fit_says_how_much_it_needs_before_it_takes_any():
    wide = nn.Linear(3000, 3000)
    F = kv.capture(wide, torch.ones(2, 3000), likelihood="gaussian", fisher="mc")
    with pytest.raises(ValueError, match=r"[0-9,.]+ GiB of memory and .* are left; apply it with @"):
        F.dense()
    with pytest.raises(ValueError, match="GiB .*fewer examples, or labels drawn from the model"):
        kv.capture(nn.Linear(1, 20_000), torch.ones(2_000, 1), likelihood="gaussian")
    check_room("A small thing", 100, torch.ones(1), "")


def test_inputs_made_in_inference_mode_are_observed():
    model = mlp()
    opt, twin = kv.TwoLevelKFAC(model, **TRAIN), kv.TwoLevelKFAC(mlp(), **TRAIN)
    with torch.inference_mode():
        x = X.clone()
    opt.observe(x)
    twin.observe(X)
    assert torch.equal(opt.preconditioner.dense(), twin.preconditioner.dense())


def test_the_published_choice_takes_parameters_as_the_constructor_does():
    model = mlp()
    opt = kv.TwoLevelKFAC.as_published_2020(model, [{"params": list(model.parameters()), "lr": 0.5}], **TRAIN)
    assert opt.param_groups[0]["lr"] == 0.5 and opt.options.coarse == "nicolaides"


def test_a_small_layer_does_not_refuse_the_space():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1, bias=False)).double()
    F = kv.capture(model, X, likelihood="gaussian")
    for build in (kv.coarse.nicolaides, kv.coarse.spectral, kv.coarse.smooth, kv.coarse.random):
        assert build(F, 8).per_layer == (8, 5)


# ---- states and options edited on the way --------------------------------------------------------------


def trained():
    model = mlp()
    opt = kv.TwoLevelKFAC(model, **TRAIN, momentum=0.9)
    for _ in range(2):
        backward(model, X, Y)
        opt.observe(X)
        opt.step()
    return model, opt


TAMPERED = {
    "no window": lambda s: s["curvature"].pop("window"),
    "no level": lambda s: s["curvature"].pop("level"),
    "damping -1": lambda s: s["curvature"].update(damping=-1),
    "damping nan": lambda s: s["curvature"].update(damping=math.nan),
    "steps a": lambda s: s["curvature"].update(steps="a"),
    "a factor of another shape": lambda s: s["curvature"]["factors"]["2"].reverse(),
    "a factor with nan": lambda s: s["curvature"]["factors"]["0"][0].fill_(math.nan),
    "vectors of another shape": lambda s: s["curvature"]["window"][0]["g"].reverse(),
    "lr nan": lambda s: s["param_groups"][0].update(lr=math.nan),
    "no lr": lambda s: s["param_groups"][0].pop("lr"),
    "momentum of another shape": lambda s: s["state"][0].update(momentum_buffer=torch.ones(2)),
    "another number of parameters": lambda s: s["param_groups"][0]["params"].pop(),
}


@pytest.mark.parametrize("way", TAMPERED)
def test_a_state_is_checked_whole_before_any_of_it_is_taken(way):
    _, opt = trained()
    state = opened(copy.deepcopy(opt.state_dict()))
    TAMPERED[way](state)
    model, other = trained()
    other.param_groups[0]["lr"] = 0.7
    before, T = str(opened(other.state_dict())), other.preconditioner
    with pytest.raises((ValueError, TypeError)):
        other.load_state_dict(state)
    assert str(opened(other.state_dict())) == before and other.preconditioner is T


def test_a_checkpoint_between_freezing_and_observing_can_be_loaded():
    model, opt = trained()
    model[2].requires_grad_(False)
    state = copy.deepcopy(opt.state_dict())
    twin = mlp()
    twin.load_state_dict(model.state_dict())
    twin[2].requires_grad_(False)
    with pytest.warns(UserWarning, match="Left out of the curvature"):
        again = kv.TwoLevelKFAC(twin, list(twin.parameters()), **TRAIN, momentum=0.9)
    again.load_state_dict(state)
    for m, o in ((model, opt), (twin, again)):
        backward(m, X, Y)
        o.step()
    assert torch.equal(weights(twin), weights(model))


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("lr", math.nan, "lr must be finite"), ("lr", -1.0, "lr must be finite and at least 0"),
        ("momentum", math.nan, "momentum must lie"), ("weight_decay", math.nan, "weight_decay must be finite"),
        ("lr", "fast", "lr must be a number; got 'fast'"),
    ],
)  # fmt: skip
def test_groups_edited_out_of_range_are_told_by_their_name(name, value, words):
    model, opt = trained()
    backward(model, X, Y)
    opt.param_groups[0][name] = value
    before = weights(model)
    with pytest.raises((ValueError, TypeError), match=words):
        opt.step()
    assert torch.equal(weights(model), before)


def test_a_closure_that_fails_the_second_time_leaves_everything():
    model, opt = mlp(), None
    opt = kv.TwoLevelKFAC(model, likelihood="categorical", step_rule="quadratic", observe_every=1)
    calls = []

    def closure():
        calls.append(1)
        if len(calls) > 1:
            raise KeyError("mine")
        backward(model, X, Y)
        return kv.nll(model(X), Y, "categorical")

    closure()
    opt.observe(X)
    calls.clear()
    before, state = weights(model), str(opened(opt.state_dict()))
    with pytest.raises(KeyError, match="mine"):
        opt.step(closure)
    assert torch.equal(weights(model), before) and str(opened(opt.state_dict())) == state


@pytest.mark.parametrize("fails", ["raises", "answers NaN"])
def test_eigenvalues_are_found_where_lapack_gives_up(monkeypatch, fails):
    """It does on some matrices of low rank with rows of zeros, as inputs that are constant make them."""
    F = kv.capture(mlp().float(), X.float(), likelihood="categorical")
    expected, original = kv.KFAC(F, 0.1).dense(), torch.linalg.eigh

    def gives_up(matrix):
        if matrix.dtype == torch.float64:
            return original(matrix)
        if fails == "raises":
            raise torch.linalg.LinAlgError("linalg.eigh: failed to converge")
        return tuple(x * torch.nan for x in original(matrix))

    monkeypatch.setattr(torch.linalg, "eigh", gives_up)
    again = kv.capture(mlp().float(), X.float(), likelihood="categorical")
    assert_close(kv.KFAC(again, 0.1).dense(), expected, 1e-4)


@pytest.mark.filterwarnings("ignore:Outside the Fisher")
def test_exploring_takes_the_layers_that_the_refusal_names():
    with pytest.raises(ValueError, match=r"layers=\['head'\]"):
        kv.explore(contracted(), normal(6, 4), likelihood="categorical")
    panel = kv.explore(contracted(), normal(6, 4), likelihood="categorical", layers=["head"])
    assert "layers=['head']" in panel.command
    panel.close()
