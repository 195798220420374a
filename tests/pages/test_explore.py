"""``kv.explore`` takes what ``kv.capture`` takes, under the names of the plain model, and leaves the model as it is."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from helpers import assert_close, exact_fisher, loss, mlp, normal
from torch import Tensor, nn
from torch.func import functional_call, grad

import kfac_viz as kv

pytestmark = pytest.mark.filterwarnings("ignore:Outside the Fisher", "ignore:.torch.jit.script")
CONSTANT = torch.linspace(0.5, 1.5, 3)
SMALL = 2e-6  # round-off of float32 in the captured vectors


class Attributes(nn.Module):
    """Tensors that are neither parameters nor buffers, of the default dtype, where ``.to`` does not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 3), nn.Linear(3, 3)
        self.scale, self.mix = torch.linspace(1, 2, 3), {"turns": [torch.eye(3).roll(1, 0)]}

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.linear(torch.tanh(self.one(x)) * self.scale.to(x), self.mix["turns"][0].to(x))
        return self.two(h)


class Strict(Attributes):
    """The same, and products with these tensors take one dtype only."""

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)) @ self.mix["turns"][0] * self.scale)


class Keeps(Attributes):
    """Keeps its activations, which are part of a graph."""

    def forward(self, x: Tensor) -> Tensor:
        self.h = torch.tanh(self.one(x))
        self.all = [self.h, {"outputs": self.two(self.h)}]
        return self.all[1]["outputs"]


class Single(Attributes):
    """Says float where it means its own precision."""

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x.float())) * CONSTANT @ torch.full((3, 3), 0.5))


class Closure(Attributes):
    """A function that was written inside, and something that no copy can be taken of."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.lock = lambda x: torch.tanh(self.one(x)), threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.first(x))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(7, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.words(x)).flatten(1))


X, Y = normal(8, 4).float(), torch.arange(8) % 3
MODELS = {
    "attributes": (Attributes, X),
    "strict": (Strict, X),
    "keeps activations": (Keeps, X),
    "float in forward": (Single, X),
    "closure": (Closure, X),
    "words": (Words, torch.arange(16).view(8, 2) % 7),
    "words, other integers": (Words, torch.arange(16, dtype=torch.int32).view(8, 2) % 7),
    "inputs in double": (Attributes, X.double()),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    kind, x = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind()
    model(x.float() if x.is_floating_point() else x)
    return model, x


def reference(model: nn.Module, x: Tensor, names: list[str]) -> tuple[Tensor, Tensor]:
    """The exact Fisher and the gradient, one example at a time by autodiff, in the model's own precision."""
    x = x.float() if x.is_floating_point() else x
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def mean(parameters):
        losses = [loss(functional_call(model, parameters, (one[None],))[0], y, "categorical")
                  for one, y in zip(x, Y, strict=True)]  # fmt: skip
        return torch.stack(losses).mean()

    tree = grad(mean)(parameters)
    pieces = [torch.cat([tree[f"{name}.weight"], tree[f"{name}.bias"][:, None]], 1).flatten() for name in names]
    return exact_fisher(model, x, "categorical", names).double(), torch.cat(pieces).double()


@pytest.mark.parametrize("name", [name for name in MODELS if "words" not in name])
def test_what_capture_takes_is_shown(name):
    model, x = build(name)
    before = copy.deepcopy(model.state_dict())
    panel = kv.explore(model, x, Y, likelihood="categorical", per_layer=1)
    F, g = reference(build(name)[0], x, ["one", "two"])
    assert panel.result.fisher.dtype == torch.float64 and panel.result.partition.names == ("one", "two")
    assert_close(panel.result.fisher, F, SMALL)
    assert_close(panel.result.gradient, g, SMALL)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and model.training
    panel.close()


@pytest.mark.parametrize("name", [name for name in MODELS if "words" in name])
def test_whole_numbers_as_inputs(name):
    model, x = build(name)
    panel = kv.explore(model, x, Y, likelihood="categorical", per_layer=1, layers=["head"])
    head = nn.Sequential(copy.deepcopy(model.head)).double()
    h = torch.tanh(model.words(x)).flatten(1).detach().double()
    assert_close(panel.result.fisher, exact_fisher(head, h, "categorical", ["0"]), SMALL)
    both = kv.explore(model, x, Y, likelihood="categorical", per_layer=1)
    assert both.result.partition.names == ("words", "head")
    part = both.result.partition.slices[1]
    assert_close(both.result.fisher[part, part], panel.result.fisher, 1e-12)


def test_a_model_in_half_precision_is_shown_as_capture_sees_it():
    model, x = mlp().to(torch.bfloat16), normal(8, 4).to(torch.bfloat16)
    panel = kv.explore(model, x, Y, likelihood="categorical", per_layer=1)
    assert panel.error == "" and panel.result.fisher.dtype == torch.float64
    assert_close(panel.result.fisher, kv.capture(model, x, likelihood="categorical").dense().double(), SMALL)
    exact = exact_fisher(copy.deepcopy(model).double(), x.double(), "categorical", ["0", "2"])
    assert_close(panel.result.fisher, exact, 0.05)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def parts(wrap):
    def wrapped(model: nn.Module) -> nn.Module:
        return nn.Sequential(*(wrap(module) for module in model))

    return wrapped


WRAPPED = {
    "compiled": compiled,
    "data parallel": nn.DataParallel,
    "parts": parts(compiled),
    "parallel parts": parts(nn.DataParallel),
    "both": lambda model: nn.DataParallel(compiled(model)),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrapped_models_have_the_names_of_the_plain_one(kind):
    plain, x = mlp(), normal(8, 4)
    model = WRAPPED[kind](copy.deepcopy(plain))
    panel = kv.explore(model, x, Y, likelihood="categorical", per_layer=1, layers=["2"])
    names = dict(kv=kv, model=model, inputs=x, targets=Y)
    exec(panel.command, names)
    assert panel.result.partition.names == names["F"].partition.names == ("2",)
    assert_close(panel.result.fisher, exact_fisher(plain, x, "categorical", ["2"]), 1e-12)


@pytest.mark.parametrize("kind", WRAPPED)
def test_checkpoints_of_wrapped_and_of_plain_models(kind):
    plain, x = mlp(), normal(8, 4)
    other = mlp(seed=5)
    for model, source in ((plain, WRAPPED[kind](other)), (WRAPPED[kind](plain), other), (plain, other)):
        before = copy.deepcopy(model.state_dict())
        states = [source.state_dict(), model.state_dict()]  # the last one is no copy, but the weights themselves
        panel = kv.explore(model, x, Y, likelihood="categorical", per_layer=1, checkpoints=states)
        for i, network in ((0, other), (1, plain)):
            panel.controls["checkpoint"].value = i
            assert panel.error == ""
            assert_close(panel.result.fisher, exact_fisher(network, x, "categorical", ["0", "2"]), 1e-12)
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
        panel.close()


def test_checkpoints_of_a_model_that_cannot_be_copied():
    """Its function goes on to mean the model itself, whose weights are lent for a moment."""
    model, other = build("closure")[0], Closure()
    panel = kv.explore(model, X, Y, likelihood="categorical", per_layer=1,
                       checkpoints=[other.state_dict(), model.state_dict()])  # fmt: skip
    for i, network in enumerate((other, model)):
        panel.controls["checkpoint"].value = i
        assert_close(panel.result.fisher, reference(network, X, ["one", "two"])[0], SMALL)


def test_a_checkpoint_that_is_refused_leaves_the_model_as_it_was():
    model, x = mlp(), normal(8, 4)
    before = copy.deepcopy(model.state_dict())
    wide, broken = mlp((4, 6, 3)).state_dict(), mlp(seed=2).state_dict()
    broken["2.bias"][0] = torch.nan
    for states, words in (([wide], "Checkpoint 0 does not fit the model"), ([{1: x}], "are state dictionaries"),
                          ([before, broken], "weights of layer '2' hold NaN")):  # fmt: skip
        with pytest.raises(ValueError, match=words) as caught:
            kv.explore(model, x, Y, likelihood="categorical", checkpoints=states)
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert caught.value.__notes__ == ["This was with the weights of checkpoint 1."]


def test_a_panel_goes_on_showing_what_it_was_opened_on():
    model, x = mlp(), normal(8, 4)
    panel = kv.explore(model, x, Y, likelihood="categorical", per_layer=1)
    expected = exact_fisher(model, x, "categorical", ["0", "2"])
    with torch.no_grad():
        model[0].weight += 1
    panel.controls["per_layer"].value = 2
    assert panel.error == ""
    assert_close(panel.result.fisher, expected, 1e-12)
