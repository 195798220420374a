"""What people bring and other libraries refuse: it works, or the reason is the reason and the advice works."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from helpers import Model, assert_close, exact_fisher, normal
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import kfac_viz as kv

X = normal(6, 4)
Y = torch.arange(6) % 3
NAMES = ("one", "two")


def two(run: Callable[..., Tensor] = lambda s, x: s.two(torch.tanh(s.one(x)))) -> Model:
    torch.manual_seed(0)
    return Model(run, one=nn.Linear(4, 5), two=nn.Linear(5, 3)).double().eval()


def expected() -> Tensor:
    return exact_fisher(two(), X, "categorical", NAMES)


def advised(error: ValueError) -> list[str]:
    """The layers that a sentence says to name."""
    return eval(str(error).split("layers=")[1].split("]")[0] + "]")


# ---- hooks, autocast, checkpoints --------------------------------------------------------------------------


@pytest.mark.parametrize("hook", [lambda g: g.clamp(-1e-3, 1e-3), lambda g: torch.zeros_like(g), lambda g: None])
def test_a_hook_on_a_parameter_does_not_touch_scores_and_is_not_called(hook):
    model, calls = two(), []
    handle = model.one.weight.register_hook(lambda g: calls.append(1) or hook(g))
    assert_close(kv.capture(model, X, likelihood="categorical").dense(), expected())
    assert not calls
    kv.nll(model(X), Y, "categorical").backward()
    assert calls == [1], "the hook is there as before"
    handle.remove()
    model.zero_grad()
    kv.nll(model(X), Y, "categorical").backward()
    assert calls == [1]


def test_a_hook_on_an_activation_counts():
    plain = two(lambda s, x: s.two(3 * torch.tanh(s.one(x)) - 2 * torch.tanh(s.one(x)).detach()))

    def tripled(s: Model, x: Tensor) -> Tensor:
        h = torch.tanh(s.one(x))
        if h.requires_grad:
            h.register_hook(lambda g: 3 * g)
        return s.two(h)

    assert_close(
        kv.capture(two(tripled), X, likelihood="categorical").dense(),
        kv.capture(plain, X, likelihood="categorical").dense(),
    )


@pytest.mark.parametrize("part", ["all of it", "one layer", "the head"])
def test_an_autocast_inside_of_the_model_is_seen_to_half_precision(part):
    def run(s: Model, x: Tensor) -> Tensor:
        cast = torch.autocast("cpu", dtype=torch.bfloat16)
        if part == "all of it":
            with cast:
                h = s.two(torch.tanh(s.one(x)))
        elif part == "one layer":
            with cast:
                h = s.one(x)
            h = s.two(torch.tanh(h.float()))
        else:
            h = torch.tanh(s.one(x))
            with cast:
                h = s.two(h)
        return h.float()

    F = kv.capture(two(run).float(), X.float(), likelihood="categorical")
    assert F.dtype == torch.float32
    assert_close(F.dense().double(), expected(), tol=0.02)


def checkpointed(reentrant: bool) -> Model:
    return two(lambda s, x: s.two(checkpoint(lambda x: torch.tanh(s.one(x)), x, use_reentrant=reentrant)))


def test_a_checkpoint_works():
    F = kv.capture(checkpointed(False), X, likelihood="categorical")
    assert_close(F.dense(), expected())


class Inside(torch.autograd.Function):
    """A layer called in the forward of a function, where autograd is off."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: nn.Module) -> Tensor:
        return torch.tanh(layer(x))

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[None, None]:
        return None, None


@torch.no_grad()
def frozen_features(s: Model, x: Tensor) -> Tensor:
    return torch.tanh(s.one(x))


SILENT = {
    "checkpoint": (lambda: checkpointed(True), "torch.utils.checkpoint with use_reentrant=True"),
    "no_grad": (lambda: two(lambda s, x: s.two(frozen_features(s, x))), "torch.no_grad"),
    "function": (lambda: two(lambda s, x: s.two(Inside.apply(x, s.one))), "torch.no_grad, or in the forward of an aut"),
}


@pytest.mark.parametrize("name", SILENT)
@pytest.mark.filterwarnings("ignore:Outside the Fisher", "ignore:None of the inputs have requires_grad")
def test_a_layer_that_no_gradient_reaches_is_named_and_can_be_left_out(name):
    build, words = SILENT[name]
    with pytest.raises(ValueError, match=f"Layer 'one' runs in {words}") as told:
        kv.capture(build(), X, likelihood="categorical")
    F = kv.capture(build(), X, likelihood="categorical", layers=advised(told.value))
    assert_close(F.dense(), exact_fisher(two(), X, "categorical", ["two"]))


# ---- vectors that cannot be pulled back at once ------------------------------------------------------------


class TanhInNumpy(torch.autograd.Function):
    """An operation whose backward leaves PyTorch."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.from_numpy(g.numpy() * (1 - np.tanh(x.numpy()) ** 2))


class ReadsNumbers(torch.autograd.Function):
    """An operation whose backward looks at its numbers on the host."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return g if g.norm().item() < 1e30 else g.clamp(-1, 1)


def hooked() -> Model:
    def look(module, before, after):
        after[0].sum().item()

    model = two()
    model.two.register_full_backward_hook(look)
    return model


ONE_BY_ONE = {
    "numpy": lambda: two(lambda s, x: s.two(TanhInNumpy.apply(s.one(x)))),
    "item": lambda: two(lambda s, x: s.two(torch.tanh(ReadsNumbers.apply(s.one(x))))),
    "a hook that reads": hooked,
}


@pytest.mark.parametrize("name", ONE_BY_ONE)
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_vectors_that_cannot_be_batched_are_pulled_back_one_by_one_and_that_is_said_once(name):
    model = ONE_BY_ONE[name]()
    with pytest.warns(UserWarning, match="3 vectors at once, but one after another, which is slower"):
        F = kv.capture(model, X, likelihood="categorical")
    assert_close(F.dense(), expected())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message="Full backward hook")
        again = kv.capture(model, X, likelihood="categorical")
    assert_close(again.dense(), expected())


@pytest.mark.filterwarnings("ignore:Error detected")
def test_anomaly_detection_can_be_on():
    with torch.autograd.set_detect_anomaly(True), pytest.warns(UserWarning, match="one after another"):
        F = kv.capture(two(), X, likelihood="categorical")
    assert_close(F.dense(), expected())


def test_channels_last_with_a_group_norm():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(36, 3)).double()
    x = normal(3, 2, 5, 5)
    plain = kv.capture(model, x, likelihood="categorical").dense()
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*one after another")
        F = kv.capture(other, x.to(memory_format=torch.channels_last), likelihood="categorical")
    assert_close(F.dense(), plain)


def test_a_model_that_pytorch_cannot_differentiate_says_what_pytorch_says():
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx, g: Tensor) -> Tensor:
            raise RuntimeError("no rule for this")

    with pytest.raises(ValueError, match="PyTorch cannot differentiate this model: no rule for this"):
        kv.capture(two(lambda s, x: s.two(Broken.apply(s.one(x)))), X, likelihood="categorical")


# ---- layers by other names ---------------------------------------------------------------------------------


class Conv1D(nn.Module):
    """The linear layer of GPT-2's published code: its weight is (in, out)."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


def as_linear(layer: Conv1D) -> nn.Linear:
    linear = nn.Linear(*layer.weight.shape).double()
    linear.weight.data.copy_(layer.weight.T)
    linear.bias.data.copy_(layer.bias)
    return linear


def test_a_weight_that_is_in_times_out_is_a_linear_layer():
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(5, 4), nn.Tanh(), Conv1D(3, 5)).double()
    twin = nn.Sequential(as_linear(model[0]), nn.Tanh(), as_linear(model[2]))
    x = normal(6, 2, 4)
    F, expected = (kv.capture(m, x, likelihood="categorical") for m in (model, twin))
    assert_close(F.dense(), expected.dense())
    for l in range(2):
        for found, of_linear in zip(F.factors(l, l), expected.factors(l, l), strict=True):
            assert_close(found, of_linear)
    assert_close(F.partition.pack(model), expected.partition.pack(twin))


@pytest.mark.parametrize("options", [{"sparse": True}, {"max_norm": 0.5}, {"max_norm": 0.5, "norm_type": 1.0}])
def test_an_embedding_with_sparse_gradients_or_short_rows(options):
    words, run = torch.randint(0, 7, (6, 4)), lambda s, x: s.two(torch.tanh(s.one(x)).mean(1))
    torch.manual_seed(0)
    model = Model(run, one=nn.Embedding(7, 5, **options), two=nn.Linear(5, 3)).double()
    before = model.one.weight.clone()
    F = kv.capture(model, words, likelihood="categorical")
    assert torch.equal(model.one.weight, before)
    plain = Model(run, one=nn.Embedding(7, 5), two=model.two).double()
    with torch.no_grad():
        model(words)  # which shortens the rows
        plain.one.weight.copy_(model.one.weight)
    assert_close(F.dense(), kv.capture(plain, words, likelihood="categorical").dense())


def test_a_sparse_gradient_is_refused_by_the_step_with_advice_that_works():
    torch.manual_seed(0)
    words, run = torch.randint(0, 7, (6, 4)), lambda s, x: s.two(torch.tanh(s.one(x)).mean(1))
    model = Model(run, one=nn.Embedding(7, 5, sparse=True), two=nn.Linear(5, 3)).double()
    opt = kv.TwoLevelKFAC(model, likelihood="categorical")
    kv.nll(model(words), Y, "categorical").backward()
    opt.observe(words)
    with pytest.raises(ValueError, match="build the embedding with sparse=False"):
        opt.step()
    model.one.sparse = False
    opt.zero_grad()
    kv.nll(model(words), Y, "categorical").backward()
    opt.step()


def test_addmm_with_parameters_of_no_known_module():
    torch.manual_seed(0)
    run = lambda s, x: torch.addmm(s.b, torch.tanh(s.one(x)), s.W)  # noqa: E731
    model = Model(run, one=nn.Linear(4, 5), W=torch.randn(5, 3), b=torch.randn(3)).double()
    F = kv.capture(model, X, likelihood="categorical")
    twin = two()
    twin.one, twin.two.weight.data, twin.two.bias.data = model.one, model.W.T.detach(), model.b.detach()
    expected = kv.capture(twin, X, likelihood="categorical")
    for name, p in model.named_parameters():
        p.grad = normal(*p.shape, seed=len(name))
    one, W, b = torch.cat([model.one.weight.grad, model.one.bias.grad[:, None]], 1), model.W.grad, model.b.grad
    v = F.partition.pack_grad(model)
    twin_v = torch.cat([one.flatten(), torch.cat([W.T, b[:, None]], 1).flatten()])
    assert_close((v @ (F @ v))[None], (twin_v @ (expected @ twin_v))[None])


def test_a_model_whose_only_parameter_is_used_in_no_known_way_names_the_function():
    model = Model(lambda s, x: torch.einsum("ni,io->no", x, s.W), W=torch.randn(4, 3)).double()
    with pytest.raises(ValueError, match="Parameter 'W' is used by einsum"):
        kv.capture(model, X, likelihood="categorical")


# ---- derivatives inside of forward -------------------------------------------------------------------------


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def by_autograd(s: Model, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    u = s.net(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return torch.cat([u, slope], 1)


def by_forward_mode(s: Model, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(s.net(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def by_linearising(s: Model, x: Tensor) -> Tensor:
    """The derivative keeps the weights as constants: autograd gives them no gradient."""
    return torch.func.linearize(s.net, x)[1](torch.ones_like(x))


INSIDE = {
    "autograd.grad": (by_autograd, "torch.autograd.grad"),
    "jvp": (lambda s, x: torch.func.jvp(s.net, (x,), (torch.ones_like(x),))[1], "torch.func"),
    "jvp and the value": (lambda s, x: sum(torch.func.jvp(s.net, (x,), (x.cos(),)), s.net(x)), "torch.func"),
    "jacrev": (lambda s, x: torch.func.vmap(torch.func.jacrev(lambda t: s.net(t)[0]))(x), "torch.func|autograd.grad"),
    "forward mode": (by_forward_mode, "torch.autograd.forward_ad"),
    "a derivative without the weights": (by_linearising, "torch.autograd.forward_ad"),
}


@pytest.mark.parametrize("name", INSIDE)
def test_derivatives_inside_of_forward_are_named_and_the_lines_given_work(name):
    run, words = INSIDE[name]
    model = Model(run, net=network())
    with pytest.raises(ValueError, match=f"derivatives with .*({words}).*use the weights a second time") as told:
        kv.capture(model, normal(5, 2), likelihood="gaussian")
    lines = [line.strip() for line in str(told.value).splitlines() if line.startswith("    ")]
    assert len(lines) == 5
    scope = {"kv": kv, "torch": torch}
    exec("\n".join(lines[:-1]), scope)
    before = scope["problem"].loss().item()
    exec(lines[-1], scope)
    assert scope["problem"].loss().item() < before


def test_a_derivative_that_no_weight_depends_on_is_no_reason_to_refuse():
    def saliency(s: Model, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(s.one(x).sum(), x)
        return s.two(torch.tanh(s.one(x + slope)))

    F = kv.capture(two(saliency), X, likelihood="categorical")
    shift = two().one.weight.sum(0)
    assert_close(F.dense(), exact_fisher(two(), X + shift, "categorical", NAMES))


# ---- complex numbers ---------------------------------------------------------------------------------------


def fourier(kind: type = nn.Parameter) -> Model:
    model = two(lambda s, x: s.two(torch.fft.ifft(torch.fft.fft(s.one(x)) @ s.W).real))
    model.W = kind(torch.randn(5, 5, dtype=torch.complex128, generator=torch.Generator().manual_seed(0)))
    return model


@pytest.mark.parametrize("options", [{}, {"layers": ["one"]}, {"layers": ["one", "two"]}])
def test_a_complex_parameter_is_refused_by_the_optimizer_at_once(options):
    with pytest.raises(ValueError, match="Parameter 'W' is complex"):
        kv.TwoLevelKFAC(fourier(), likelihood="categorical", **options)


@pytest.mark.filterwarnings("ignore:Plain gradient", "ignore:Outside the Fisher")
def test_the_layers_beside_a_complex_parameter_are_captured_and_trained():
    model = fourier()
    F = kv.capture(model, X, likelihood="categorical")
    assert F.partition.names == NAMES
    assert_close(F.dense(), exact_fisher(fourier(nn.Buffer), X, "categorical", NAMES))
    with pytest.raises(ValueError, match=r"Layers \['W'\] have complex parameters"):
        kv.capture(model, X, likelihood="categorical", layers=["W"])
    opt = kv.TwoLevelKFAC(model, [p for p in model.parameters() if not p.is_complex()], likelihood="categorical")
    kv.nll(model(X), Y, "categorical").backward()
    before = copy.deepcopy(model.state_dict())
    opt.observe(X)
    opt.step()
    assert [n for n, p in model.state_dict().items() if not torch.equal(p, before[n])] == [
        "one.weight", "one.bias", "two.weight", "two.bias",
    ]  # fmt: skip


# ---- batch norm in training mode ---------------------------------------------------------------------------


def normed(run: Callable[..., Tensor], **options) -> Model:
    torch.manual_seed(0)
    parts = {"one": nn.Linear(4, 5), "norm": nn.BatchNorm1d(5, **options), "two": nn.Linear(5, 3)}
    return Model(run, **parts).double().train()


def observed_fisher(model: nn.Module, x: Tensor) -> kv.Fisher:
    """What the optimizer captures, in the mode that the model is in."""
    opt = kv.TwoLevelKFAC(model, likelihood="categorical", fisher="exact")
    opt.observe(x)
    return opt.curvature.window.fisher()


def frames_first(s: Model, x: Tensor) -> Tensor:
    z = s.norm(s.one(x.transpose(0, 1).flatten(0, 1))).unflatten(0, x.shape[1::-1])
    return s.two(torch.tanh(z).mean(0))


def examples_first(s: Model, x: Tensor) -> Tensor:
    z = s.norm(s.one(x.flatten(0, 1))).unflatten(0, x.shape[:2])
    return s.two(torch.tanh(z).mean(1))


def held(model: Model, x: Tensor, rows: Callable[[Tensor], Tensor]) -> Model:
    """The model in eval mode, its running statistics being those of this batch."""
    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        z = twin.one(rows(x)).flatten(0, -2)
        twin.norm.running_mean, twin.norm.running_var = z.mean(0), z.var(0, correction=0)
    return twin


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("run", [frames_first, examples_first])
def test_batch_norm_in_training_mode_has_scores_with_the_statistics_of_the_batch_held_constant(run, affine):
    model, x = normed(run, affine=affine), normal(6, 3, 4)
    gradient = torch.autograd.grad(kv.nll(model(x), Y, "categorical"), model.one.weight)
    buffers = copy.deepcopy(dict(model.named_buffers()))
    F, twin = observed_fisher(model, x), held(model, x, lambda x: x)
    names = ["one", "norm", "two"] if affine else NAMES
    assert_close(F.dense(), exact_fisher(twin, x, "categorical", names), 1e-10)
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    again = torch.autograd.grad(kv.nll(model(x), Y, "categorical"), model.one.weight)
    assert_close(again[0], gradient[0])  # the loss's own gradient goes through the statistics, as before


def test_a_forgotten_batch_first_is_refused_beside_batch_norm_in_training_mode():
    torch.manual_seed(0)
    run = lambda s, x: s.two(s.norm(s.mix(*[s.one(x)] * 3)[0].mean(1)))  # noqa: E731
    parts = {"mix": nn.MultiheadAttention(6, 2), "norm": nn.BatchNorm1d(6), "two": nn.Linear(6, 3)}
    model = Model(run, one=nn.Linear(4, 6), **parts).double().train()
    with pytest.raises(ValueError, match="the model mixes the examples"):
        observed_fisher(model, normal(6, 3, 4))
    model.mix.batch_first = True
    assert observed_fisher(model, normal(6, 3, 4)).partition.names[0] == "one"


def test_a_norm_by_hand_mixes_the_examples():
    def run(s: Model, x: Tensor) -> Tensor:
        z = s.one(x)
        return s.two((z - z.mean(0)) / z.std(0))

    with pytest.raises(ValueError, match="the model mixes the examples"):
        observed_fisher(two(run), X)


def test_a_function_that_normalises_by_the_batch_in_eval_mode_is_refused_by_capture():
    model = two(lambda s, x: s.two(functional.batch_norm(s.one(x), None, None, training=True)))
    with pytest.raises(ValueError, match="couples the examples"):
        kv.capture(model, X, likelihood="categorical")


def test_a_position_table_beside_batch_norm_in_training_mode():
    torch.manual_seed(0)
    run = lambda s, x: s.two(s.norm(torch.tanh(s.one(x) + s.table).mean(1)))  # noqa: E731
    model = Model(run, one=nn.Linear(4, 5), table=torch.randn(6, 5), norm=nn.BatchNorm1d(5), two=nn.Linear(5, 3))
    model, x = model.double().train(), normal(6, 6, 4)
    F = observed_fisher(model, x)
    with torch.no_grad():
        z = torch.tanh(model.one(x) + model.table).mean(1)
    twin = copy.deepcopy(model).eval()
    twin.norm.running_mean, twin.norm.running_var = z.mean(0), z.var(0, correction=0)
    assert_close(F.dense(), kv.capture(twin, x, likelihood="categorical").dense())


# ---- advice is followed ------------------------------------------------------------------------------------


class Ending(nn.Module):
    """A hidden part that is refused for one reason or another, and a head that is not."""

    def __init__(self, run: Callable[[Ending, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run, self.head = run, nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.run(self, x)))


def frozen_linear() -> nn.Linear:
    return nn.Linear(4, 5).requires_grad_(False)


def by_derivatives(s: Ending, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(torch.tanh(s.one(x)).sum(), x, create_graph=True)[0] @ torch.ones(4, 5).to(x)


HIDDEN = {
    "used by an unknown function": (lambda s, x: s.one(x) + s.one.weight.square().sum(), {"one": nn.Linear(4, 5)}),
    "two of them": (
        lambda s, x: s.two(s.one(x)) + s.one.weight.square().sum() + torch.einsum("ij->i", s.two.weight),
        {"one": nn.Linear(4, 5), "two": nn.Linear(5, 5)},
    ),
    "unseen": (lambda s, x: s.one(x) + torch.func.vmap(s.one)(x), {"one": nn.Linear(4, 5)}),
    "derivatives": (by_derivatives, {"one": nn.Linear(4, 5)}),
    "no gradient": (lambda s, x: frozen_features(s, x), {"one": nn.Linear(4, 5)}),
    "scaled by frequency": (
        lambda s, x: s.one(x[:, 0].abs().long()),
        {"one": nn.Embedding(9, 5, scale_grad_by_freq=True)},
    ),
    "frozen": (lambda s, x: s.one(x), {"one": frozen_linear()}),
    "idle": (lambda s, x: x @ torch.ones(4, 5).to(x), {"one": nn.Linear(4, 5)}),
    "computed": (lambda s, x: s.one(x), {"one": nn.utils.parametrizations.weight_norm(nn.Linear(4, 5, bias=False))}),
}


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.filterwarnings("ignore:Outside the Fisher", "ignore:Plain gradient", "ignore:Left out")
def test_the_layers_that_a_refusal_names_can_be_captured_and_trained(name):
    torch.manual_seed(0)
    run, parts = HIDDEN[name]
    model = Ending(run, **copy.deepcopy(parts)).double().eval()
    with pytest.raises(ValueError, match="layers=") as told:
        kv.capture(model, X, likelihood="categorical")
    layers = advised(told.value)
    assert layers == ["head"]
    h, outputs = torch.tanh(run(model, X)).detach(), model(X)
    F = kv.capture(model, X, likelihood="categorical", layers=layers)
    assert_close(F.dense(), of_head(h, outputs))
    opt = kv.TwoLevelKFAC(model, likelihood="categorical", layers=layers)
    kv.nll(model(X), Y, "categorical").backward()
    opt.observe(X)
    opt.step()


def of_head(h: Tensor, outputs: Tensor) -> Tensor:
    """The Fisher of a last linear layer with inputs h, ``E[(diag p − p pᵀ) ⊗ h hᵀ]``."""
    p, h = outputs.softmax(-1).detach(), torch.cat([h, h.new_ones(len(h), 1)], 1)
    blocks = [torch.kron(torch.diag(q) - torch.outer(q, q), torch.outer(a, a)) for q, a in zip(p, h, strict=True)]
    return torch.stack(blocks).mean(0)


# ---- neighbours of all these -------------------------------------------------------------------------------


def hooked_result(s: Model, x: Tensor) -> Tensor:
    h = s.one(x)
    if h.requires_grad:
        h.register_hook(lambda g: 2 * g)
    return s.two(torch.tanh(h))


def test_a_hook_on_the_result_of_a_layer_counts():
    plain = two(lambda s, x: s.two(torch.tanh(2 * s.one(x) - s.one(x).detach())))
    found, expected = (kv.capture(m, X, likelihood="categorical").dense() for m in (two(hooked_result), plain))
    assert_close(found, expected)


def test_batch_norm_over_one_example_each_is_no_batch_norm():
    """Instance norm written with batch norm: the statistics of an example belong to its own score."""
    torch.manual_seed(0)

    def by_batch_norm(s: Model, x: Tensor) -> Tensor:
        z = functional.batch_norm(s.one(x).flatten(0, 1)[None], None, None, training=True)
        return s.two(torch.tanh(z).view(len(x), -1))

    parts = {"one": nn.Conv1d(2, 4, 3), "two": nn.Linear(12, 3)}
    model = Model(by_batch_norm, **parts).double()
    twin = Model(lambda s, x: s.two(torch.tanh(functional.instance_norm(s.one(x))).flatten(1)), **parts).double()
    x = normal(6, 2, 5)
    assert_close(
        kv.capture(model, x, likelihood="categorical").dense(), kv.capture(twin, x, likelihood="categorical").dense()
    )


class Standardised(nn.Conv2d):
    """A convolution whose weight is standardised by batch norm."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        W = functional.batch_norm(rows, None, None, training=True, momentum=0.0).reshape_as(self.weight)
        return functional.conv2d(x, W, self.bias)


@pytest.mark.filterwarnings("ignore:Outside the Fisher")
def test_a_weight_that_is_standardised_is_named_and_the_others_are_captured():
    torch.manual_seed(0)
    model, x = nn.Sequential(Standardised(2, 3, 3), nn.Flatten(), nn.Linear(27, 3)).double().eval(), normal(6, 2, 5, 5)
    with pytest.raises(ValueError, match="Parameter '0.weight' is also used by batch_norm|used by batch_norm") as told:
        kv.capture(model, x, likelihood="categorical")
    assert advised(told.value) == ["2"]
    F = kv.capture(model, x, likelihood="categorical", layers=["2"])
    assert_close(F.dense(), of_head(model[:2](x).detach(), model(x)))


def test_batch_norm_in_training_mode_inside_a_checkpoint_has_a_reason_and_advice_that_works():
    def run(s: Model, x: Tensor) -> Tensor:
        return s.two(checkpoint(lambda x: torch.tanh(s.norm(s.one(x))), x, use_reentrant=False))

    model = normed(run)
    with pytest.raises(ValueError, match="inside of torch.utils.checkpoint.*this batch norm in eval mode"):
        observed_fisher(model, X)
    model.norm.eval()
    plain = Model(lambda s, x: s.two(torch.tanh(s.norm(s.one(x)))), one=model.one, norm=model.norm, two=model.two)
    assert_close(observed_fisher(model, X).dense(), kv.capture(plain, X, likelihood="categorical").dense())


def by_backward(s: Model, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    u = s.net(x)
    u.sum().backward(create_graph=True, inputs=[x])
    return torch.cat([u, x.grad], 1)


def test_a_backward_pass_inside_of_forward_is_named():
    with pytest.raises(ValueError, match=r"derivatives with backward\(create_graph=True\)"):
        kv.capture(Model(by_backward, net=network()), normal(5, 2), likelihood="gaussian")


LOOK_UP = {
    "index": lambda W, x: W[x],
    "index_select": lambda W, x: W.index_select(0, x.flatten()).unflatten(0, x.shape),
}


@pytest.mark.parametrize("look_up", LOOK_UP.values(), ids=LOOK_UP)
def test_rows_of_a_table_may_be_looked_up_by_an_index(look_up):
    torch.manual_seed(0)
    words = torch.randint(0, 7, (6, 4))
    parts = {"one": nn.Embedding(7, 5), "two": nn.Linear(5, 3)}
    found, expected = (
        kv.capture(Model(run, **parts).double(), words, likelihood="categorical").dense()
        for run in (
            lambda s, x: s.two(torch.tanh(look_up(s.one.weight, x)).mean(1)),
            lambda s, x: s.two(torch.tanh(s.one(x)).mean(1)),
        )
    )
    assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:Every example uses all rows")
def test_positions_through_a_layer_under_an_autocast():
    def run(s: Model, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            p = s.lin(s.position(torch.arange(x.shape[1])))
        return s.two(torch.tanh(s.word(x) + p.float()).mean(1))

    torch.manual_seed(0)
    parts = {"word": nn.Embedding(7, 4), "position": nn.Embedding(6, 4), "lin": nn.Linear(4, 4)}
    parts["two"] = nn.Linear(4, 3)
    F = kv.capture(Model(run, **parts), torch.randint(0, 7, (6, 4)), likelihood="categorical")
    assert set(F.partition.names) == set(parts)
