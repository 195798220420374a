"""What a capture leaves as it was, and what surrounds it without reaching in."""

import copy
import threading
import warnings

import pytest
import torch
from helpers import (
    DEVICES,
    LIKELIHOODS,
    ZOO,
    Residual,
    assert_close,
    batch_norm,
    exact_fisher,
    mlp,
    normal,
    targets_for,
)
from torch import nn

import kfac_viz as kv
from kfac_viz.scores.likelihood import output_vectors

FLAVOURS = ("exact", "mc", "empirical")


class Everything(nn.Module):
    """Batch norm, dropout, an embedding-like free parameter, nesting and one layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(inplace=True))
        self.scale = nn.Parameter(torch.ones(2, 1, 1))
        self.head = nn.ModuleList([nn.Dropout(0.3), nn.Linear(8, 4), nn.LayerNorm(4), nn.Linear(4, 3)])

    def forward(self, x):
        x = (self.conv(x) * self.scale.exp()).flatten(1)
        for module in self.head:
            x = module(x)
        return x


def everything():
    torch.manual_seed(0)
    model = Everything().double()
    for i, module in enumerate(model.modules()):
        module.training = i % 2 == 0  # a pattern that no plain train() restores
    return model, normal(6, 1, 4, 4)


def snapshot(model):
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "training": [module.training for module in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
        "hooks": [[len(v) for k, v in vars(module).items() if k.endswith("hooks")] for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "versions": [p._version for p in model.parameters()],
    }


def assert_same(before, after):
    for key in ("values", "grad"):
        torch.testing.assert_close(after.pop(key), before.pop(key), rtol=0, atol=0)
    assert after == before


def run(model, inputs, fisher, likelihood="categorical"):
    targets = targets_for(copy.deepcopy(model).eval()(inputs).detach(), likelihood) if fisher == "empirical" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kv.capture(model, inputs, targets, likelihood=likelihood, fisher=fisher)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fisher", FLAVOURS)
def test_model_inputs_and_random_state_are_as_before(fisher, device):
    model, inputs = everything()
    model, inputs = model.to(device), inputs.to(device)
    copy.deepcopy(model)(inputs).square().mean().backward()
    model.scale.requires_grad_(False)
    for i, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, float(i)) if i % 2 else None
    before, batch, version = snapshot(model), inputs.clone(), inputs._version
    state = torch.random.get_rng_state()
    cuda = torch.cuda.get_rng_state() if device == "cuda" else None
    run(model, inputs, fisher)
    assert_same(before, snapshot(model))
    assert torch.equal(inputs, batch) and inputs._version == version and not inputs.requires_grad
    assert torch.equal(torch.random.get_rng_state(), state)
    assert cuda is None or torch.equal(torch.cuda.get_rng_state(), cuda)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("look", [
    lambda model, x: kv.capture(model, x, likelihood="gaussian"),
    lambda model, x: kv.TwoLevelKFAC(model, likelihood="gaussian").observe(x),
], ids=["capture", "observe"])  # fmt: skip
def test_a_look_beside_the_main_thread_takes_back_nothing_that_was_drawn_there_meanwhile(look):
    entered, drawn = threading.Event(), threading.Event()

    class Waits(nn.Linear):
        def forward(self, x):
            entered.set()
            assert drawn.wait(30)
            return super().forward(x)

    other = threading.Thread(target=look, args=(Waits(3, 2), torch.ones(4, 3)))
    other.start()
    assert entered.wait(30)
    torch.rand(1)
    state = torch.random.get_rng_state()
    drawn.set()
    other.join()
    assert torch.equal(torch.random.get_rng_state(), state)


class Raises(nn.Module):
    """Fails in the middle of a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)
        self.when = "forward"

    def forward(self, x):
        x = self.norm(self.first(x))
        if self.when == "forward":
            raise RuntimeError("the model's own error")
        x = self.last(x)
        return x / 0 if self.when == "non-finite" else x


@pytest.mark.filterwarnings("ignore:Outside the Fisher")
@pytest.mark.parametrize(("when", "error"), [("forward", RuntimeError), ("non-finite", ValueError)])
def test_a_failing_capture_leaves_everything_as_before_too(when, error):
    model = Raises().double()
    model.when = when
    model.norm.eval()
    before, state = snapshot(model), torch.random.get_rng_state()
    with pytest.raises(error):
        kv.capture(model, normal(5, 4), likelihood="categorical", fisher="mc")
    assert_same(before, snapshot(model))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_evaluation_ignores_dropout_and_batch_statistics():
    """A model left in training mode is captured as in eval mode."""
    model, inputs = ZOO["batch norm, dropout"].make()
    expected = exact_fisher(model, inputs, "categorical", ("0", "1", "4"))
    F = kv.capture(model.train(), inputs, likelihood="categorical")
    assert model.training
    assert_close(F.dense(), expected)


def test_the_fisher_does_not_see_later_changes():
    """Inputs, weights, an in-place activation and what comes out of F.a: nothing aliases."""
    model, inputs = mlp((4, 3, 3), activation=lambda: nn.ReLU(inplace=True), bias=False), normal(5, 4)
    F = kv.capture(model, inputs, likelihood="gaussian")
    before = F.dense()
    inputs.zero_()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(F.dense(), before)
    assert not any(x.requires_grad for x in (*F.a, *F.g))


def test_results_cannot_be_changed_through_what_was_handed_out():
    F = kv.capture(mlp(), normal(5, 4), likelihood="categorical")
    matrix = F.dense()
    B = kv.Dense(matrix, F.partition)
    matrix.zero_()
    assert torch.equal(B.dense(), F.dense())
    M = kv.KFAC(F, 0.1)
    A, D = F.damped(0.1), kv.Diagonal(F, 0.1)
    for operator in (F, M, A, D, B, kv.KroneckerFisher(F)):
        before = operator.dense()
        for out in (
            operator.dense(),
            operator.diagonal(),
            operator.block(0, 0),
            operator.block(0, 1),
            operator @ A.eye(),
        ):
            out.fill_(7.0)
        assert torch.equal(operator.dense(), before)


def test_surroundings_do_not_reach_in():
    """no_grad, inference mode and autocast around a capture change nothing inside."""
    model, inputs = ZOO["residual"].make()
    expected = kv.capture(model, inputs, likelihood="categorical").dense()
    with torch.no_grad():
        assert torch.equal(kv.capture(model, inputs, likelihood="categorical").dense(), expected)
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        inner = inputs * 1
        F = kv.capture(model, inner, likelihood="categorical")
    assert inner.is_inference() and not F.a[0].is_inference()
    assert torch.equal(F.dense(), expected)
    model, inputs = model.float(), inputs.float()
    expected = kv.capture(model, inputs, likelihood="categorical").dense()
    with torch.autocast("cpu", torch.bfloat16):
        F = kv.capture(model, inputs, likelihood="categorical")
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(F.dense(), expected)


def test_inputs_that_require_grad_keep_no_gradient():
    model, inputs = ZOO["tanh"].make()
    inputs.requires_grad_()
    F = kv.capture(model, inputs, likelihood="categorical")
    assert inputs.grad is None and not F.dense().requires_grad


def test_hooks_of_the_model_run_and_are_seen():
    """A hook that changes an output is part of the model: the score is that of the changed network."""

    class Scaled(Residual):
        def forward(self, x):
            h = torch.relu(3 * self.body["one"](x))
            return self.head(torch.sin(x + self.body["two"](h)))

    torch.manual_seed(1)
    hooked = Residual().double()
    hooked.body["one"].register_forward_hook(lambda module, args, output: 3 * output)
    written = Scaled().double()
    written.load_state_dict(hooked.state_dict())
    x = normal(5, 4)
    assert_close(
        kv.capture(hooked, x, likelihood="categorical").dense(),
        kv.capture(written, x, likelihood="categorical").dense(),
    )


def test_other_parameters_are_reported_once_by_name():
    model, inputs = everything()
    with pytest.warns(
        UserWarning, match="Outside the Fisher, which covers 83 of 85 parameters.*left to the identity: scale."
    ) as told:
        kv.capture(model, inputs, likelihood="gaussian")
    assert len(told) == 1 and told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kv.capture(model, inputs, likelihood="gaussian")
        kv.capture(mlp(), normal(5, 4), likelihood="gaussian")
    with pytest.warns(UserWarning, match="Outside"):
        kv.capture(everything()[0], inputs, likelihood="gaussian")  # another model


def test_frozen_parameters_outside_the_layers_are_not_reported():
    model, inputs = everything()
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(("conv.0", "head.1", "head.3")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kv.capture(model, inputs, likelihood="gaussian")


def test_batch_norm_statistics_survive_a_capture_in_training_mode():
    model = batch_norm().double().train()
    before = model[1].running_mean.clone(), model[1].running_var.clone(), model[1].num_batches_tracked.clone()
    run(model, normal(5, 4), "exact")
    assert all(
        torch.equal(x, y)
        for x, y in zip(
            before, (model[1].running_mean, model[1].running_var, model[1].num_batches_tracked), strict=True
        )
    )


def test_sampling_takes_nothing_from_the_global_generator():
    torch.manual_seed(0)
    first = run(*ZOO["tanh"].make(), "mc").dense()
    torch.manual_seed(99)
    assert torch.equal(run(*ZOO["tanh"].make(), "mc").dense(), first)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_a_generator_on_the_cpu_draws_the_same_labels_for_every_device(likelihood, device):
    outputs = normal(6, 4)
    here, there = (
        output_vectors(outputs.to(d), likelihood, "mc", samples=3, generator=torch.Generator().manual_seed(5))
        for d in ("cpu", device)
    )
    assert there.device.type == device
    assert_close(there.cpu(), here, 1e-14)
    by_default = (output_vectors(outputs.to(d), likelihood, "mc", samples=3).cpu() for d in ("cpu", device))
    assert_close(*by_default, 1e-14)


def test_a_model_that_draws_in_eval_mode_does_not_move_the_callers_generator():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(x + torch.randn_like(x))

    torch.manual_seed(5)
    kv.capture(Noisy().double(), normal(5, 4), likelihood="gaussian")
    after = torch.randn(3)
    torch.manual_seed(5)
    Noisy().double()
    assert torch.equal(torch.randn(3), after)


def test_one_forward_and_one_backward_pass(monkeypatch):
    """No weight gradient is formed, and the number of passes does not grow with the outputs."""
    model, inputs = ZOO["tanh"].make()
    forwards, backwards = [], []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    original = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: backwards.append(a[1]) or original(*a, **k))
    kv.capture(model, inputs, likelihood="categorical")
    assert (len(forwards), len(backwards)) == (1, 7), "the first sight of a model compares with autograd"
    forwards.clear(), backwards.clear()
    kv.capture(model, inputs, likelihood="categorical")
    assert len(forwards) == len(backwards) == 1
    assert all(isinstance(edge, torch.autograd.graph.GradientEdge) for edge in backwards[0])


def test_the_pass_that_captures_is_deterministic_in_its_vectors():
    outputs = normal(4, 3)
    first, second = (output_vectors(outputs, "gaussian", "mc") for _ in range(2))
    assert torch.equal(first, second)


def test_compiled_models_are_captured_through_their_original():
    model, inputs = ZOO["tanh"].make()
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(
        kv.capture(compiled, inputs, likelihood="gaussian").dense(),
        kv.capture(model, inputs, likelihood="gaussian").dense(),
    )
