"""Seeded problems: the same numbers on every machine, real data, gradients that fit."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from helpers import DEVICES, assert_close
from torch import nn

import kfac_viz as kv
from kfac_viz.problems.problem import multilayer_perceptron
from kfac_viz.problems.rounding import VARIABLE, perturbed

PROBLEMS = {
    "digits": lambda **o: kv.problems.digits(n=60, **o),
    "digits 4×4": lambda **o: kv.problems.digits(side=4, n=60, **o),
    "autoencoder": lambda **o: kv.problems.autoencoder(side=4, n=60, **o),
    "planted": lambda **o: kv.problems.planted(n=60, **o),
    "planted, batch norm": lambda **o: kv.problems.planted(n=60, batch_norm=True, **o),
    "planted, residual": lambda **o: kv.problems.planted(n=60, residual=True, **o),
    "planted linear": lambda **o: kv.problems.planted(n=60, activation=None, **o),
    "deep linear": lambda **o: kv.problems.deep_linear(n=60, **o),
}
pytestmark = pytest.mark.filterwarnings("ignore:Outside the Fisher")


def state(problem):
    return [problem.inputs, problem.targets, *problem.model.state_dict().values()]


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_seed_decides_everything_and_the_global_generator_nothing(name):
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = state(PROBLEMS[name](seed=3))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert all(torch.equal(x, y) for x, y in zip(first, state(PROBLEMS[name](seed=3)), strict=True))
    other = state(PROBLEMS[name](seed=4))
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[2], other[2])


@pytest.mark.parametrize("widths", [[16, 12, 12, 10], [2, 48, 1], [6000, 2]])
def test_weights_are_those_that_pytorch_draws(widths):
    """From a generator of its own, since the process's may be in use in another thread."""
    mine = [m for m in multilayer_perceptron(widths, "tanh", seed=3) if isinstance(m, nn.Linear)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        theirs = [nn.Linear(*pair, dtype=torch.float64) for pair in pairwise(widths)]
    for one, other in zip(mine, theirs, strict=True):
        assert torch.equal(one.weight, other.weight) and torch.equal(one.bias, other.bias)


def test_numbers_do_not_depend_on_the_default_dtype():
    expected = state(PROBLEMS["planted"]())
    torch.set_default_dtype(torch.float64)
    try:
        assert all(torch.equal(x, y) for x, y in zip(expected, state(PROBLEMS["planted"]()), strict=True))
    finally:
        torch.set_default_dtype(torch.float32)


def test_residual_connections_add_what_comes_in():
    problem = kv.problems.planted(depth=4, width=10, residual=True, n=20)
    first, *hidden, last = (m for m in problem.model.modules() if isinstance(m, nn.Linear))
    x = torch.tanh(first(problem.inputs))
    for layer in hidden:
        x = x + torch.tanh(layer(x))
    assert len(hidden) == 2 and torch.equal(problem.model(problem.inputs), last(x))
    plain = kv.problems.planted(depth=4, width=10, n=20)  # the same weights, drawn in the same order
    weights = [p for p in plain.model.parameters()]
    assert all(torch.equal(p, q) for p, q in zip(problem.model.parameters(), weights, strict=True))


@pytest.mark.parametrize("name", PROBLEMS)
def test_gradient_is_that_of_the_loss_and_touches_nothing(name):
    problem = PROBLEMS[name]()
    flags = [module.training for module in problem.model.modules()]
    g = problem.gradient()
    assert all(p.grad is None for p in problem.model.parameters())
    assert [module.training for module in problem.model.modules()] == flags
    problem.loss().backward()
    assert torch.equal(problem.partition.pack_grad(problem.model), g)
    direction = torch.randn(g.shape, generator=torch.Generator().manual_seed(0), dtype=g.dtype)
    ends = []
    for step in (1e-6, -2e-6):
        problem.partition.add_(problem.model, direction, alpha=step)
        ends.append(problem.loss().item())
    assert abs((ends[0] - ends[1]) / 2e-6 - float(g @ direction)) < 1e-7 * max(1.0, float(g.norm()))


def test_loss_keeps_the_mode_of_every_module():
    problem = PROBLEMS["planted, batch norm"]()
    for i, module in enumerate(problem.model.modules()):
        module.training = i % 3 == 0
    flags = [module.training for module in problem.model.modules()]
    evaluated = problem.loss().item()
    problem.model.train()
    before = [buffer.clone() for buffer in problem.model.buffers()]
    assert problem.loss().item() == evaluated
    assert all(torch.equal(x, y) for x, y in zip(before, problem.model.buffers(), strict=True))
    for module, flag in zip(problem.model.modules(), flags, strict=True):
        module.training = flag
    problem.loss()
    assert [module.training for module in problem.model.modules()] == flags


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
def test_every_flavour_can_be_captured(name, fisher):
    problem = PROBLEMS[name]()
    F = problem.capture(fisher)
    assert F.partition == problem.partition and F.N == 60 and F.flavour == fisher


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    pixels, labels = (torch.as_tensor(x) for x in load_digits(return_X_y=True))
    problem = kv.problems.digits(n=1797)
    raw = problem.inputs * (pixels.std() / 16) + pixels.mean() / 16
    assert_close((raw * 16).round().sort(0).values, pixels.sort(0).values, 1e-12)
    assert torch.equal(problem.targets.bincount(), labels.bincount())
    assert abs(float(problem.inputs.mean())) < 1e-12 and abs(float(problem.inputs.std()) - 1) < 1e-12
    pooled = kv.problems.digits(n=1797, side=4).inputs.view(-1, 4, 4)
    whole = problem.inputs.view(-1, 4, 2, 4, 2).mean((2, 4))
    assert_close((whole - whole.mean()) / whole.std(), pooled, 1e-12)


def test_digits_without_replacement_and_nested_in_n():
    few, many = kv.problems.digits(n=50).targets, kv.problems.digits(n=200).targets
    assert torch.equal(many[:50], few)
    assert len(kv.problems.digits(n=1797).inputs.unique(dim=0)) == 1797


def test_the_autoencoder_sees_pixels_as_probabilities():
    problem = PROBLEMS["autoencoder"]()
    assert torch.equal(problem.inputs, problem.targets)
    assert float(problem.inputs.min()) >= 0 and float(problem.inputs.max()) <= 1


def test_planted_labels_are_linear_with_noise():
    problem = kv.problems.planted(n=4000)
    x = torch.linalg.lstsq(problem.inputs, problem.targets)
    residual = problem.targets - problem.inputs @ x.solution
    assert abs(float(residual.std()) - 0.1) < 0.005
    assert problem.inputs.shape == (4000, 10)


@pytest.mark.parametrize("depth", [1, 2, 7])
def test_depth_counts_linear_layers(depth):
    assert len(kv.problems.planted(depth=depth, width=3).partition) == depth


def test_settled_batch_norm_sees_in_evaluation_what_training_saw():
    problem = kv.problems.planted(depth=4, batch_norm=True, n=300)
    norms = [module for module in problem.model if isinstance(module, nn.BatchNorm1d)]
    assert len(norms) == 3 and not problem.model.training
    x = problem.inputs
    for module in problem.model:
        if isinstance(module, nn.BatchNorm1d):
            assert_close(module.running_mean, x.mean(0), 2 / 300)  # PyTorch evaluates with the unbiased variance
            assert_close(module.running_var, x.var(0), 2 / 300)
        x = module(x).detach()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_and_device(dtype, device):
    first, second = kv.problems.digits(n=30, dtype=dtype, device=device), kv.problems.digits(n=30).to(device, dtype)
    assert all(torch.equal(x, y) for x, y in zip(state(first), state(second), strict=True))
    F = first.capture()
    assert F.dtype == dtype and F.device.type == device and first.targets.dtype == torch.long


def test_training_lowers_the_loss_in_a_copy_and_is_deterministic():
    problem = PROBLEMS["digits 4×4"]()
    before = problem.loss().item()
    trained = problem.trained(20)
    assert problem.loss().item() == before and trained.loss().item() < 0.8 * before
    assert trained.loss().item() == problem.trained(20).loss().item()
    assert problem.trained(0).loss().item() == before
    stages = [stage.loss().item() for stage in problem.stages([0, 7, 20])]
    assert stages == [problem.trained(steps).loss().item() for steps in (0, 7, 20)]
    with pytest.raises(ValueError, match="steps"):
        list(problem.stages([7, 3]))
    assert all(p.grad is None for p in trained.model.parameters())


def test_repr_tells_data_and_size():
    for words in ("digits 4×4", "60 examples", "categorical", "646 parameters in 4 layers"):
        assert words in repr(PROBLEMS["digits 4×4"]())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: kv.problems.digits(side=5), "side must be 8, or 4.*got 5"),
        (lambda: kv.problems.digits(n=0), "n must be a whole number of at least 1; got 0"),
        (lambda: kv.problems.digits(n=1798), "between 1 and 1797; got 1798"),
        (lambda: kv.problems.digits(widths=(4, 0)), "Every width.*got 0"),
        (lambda: kv.problems.digits(widths=(4.5,)), "Every width.*got 4.5"),
        (lambda: kv.problems.digits(activation="gelu"), "'tanh', 'relu', 'sigmoid'; got 'gelu'"),
        (lambda: kv.problems.planted(depth=0), "depth must be .* at least 1; got 0"),
        (lambda: kv.problems.planted(n=-1), "n must be .* got -1"),
        (lambda: kv.problems.deep_linear(widths=(3,)), r"at least the input and the output; got \(3,\)"),
        (lambda: kv.problems.digits(n=20).trained(-1), "steps must be .* at least 0; got -1"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


PERTURBED = PROBLEMS | {
    "autoencoder 8×8": lambda **o: kv.problems.autoencoder(n=60, **o),
    "attention": lambda **o: kv.problems.attention(4, n=60, **o),
    "convolutional": lambda **o: kv.problems.convolutional((2, 3), n=60, **o),
    "poisson": lambda **o: kv.problems.poisson(widths=(4,), points=60, **o),
    "burgers": lambda **o: kv.problems.burgers(widths=(4,), points=60, **o),
}


@pytest.mark.parametrize("name", PERTURBED)
def test_inputs_move_in_their_last_bits_where_the_environment_asks_for_it(name, monkeypatch):
    problem = PERTURBED[name]()
    monkeypatch.setenv(VARIABLE, "3")
    moved, again = PERTURBED[name](), PERTURBED[name]()
    assert torch.equal(moved.inputs, again.inputs) and not torch.equal(moved.inputs, problem.inputs)
    bound = 4 * torch.finfo(torch.float64).eps * problem.inputs.abs().amax()
    assert ((moved.inputs - problem.inputs).abs() <= bound).all()
    assert_close(moved.loss(), problem.loss())  # which refuses targets out of range
    monkeypatch.setenv(VARIABLE, "4")
    assert not torch.equal(PERTURBED[name]().inputs, moved.inputs)


def test_about_half_of_the_entries_move_up(monkeypatch):
    monkeypatch.setenv(VARIABLE, "0")
    x = torch.full((1000,), 1.5, dtype=torch.float64)
    up = int((perturbed(x) > x).sum())
    assert 400 < up < 600 and int((perturbed(x) < x).sum()) == 1000 - up


@pytest.mark.parametrize("text", ["-1", "yes", "1.5", "99999999999999999999"])
def test_what_is_no_seed_is_refused(text, monkeypatch):
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(ValueError, match="seed"):
        perturbed(torch.ones(2))


MAKERS = {
    "digits": lambda n, **options: kv.problems.digits((5,), n, 3, side=4, **options),
    "attention": lambda n, **options: kv.problems.attention(4, n, 3, **options),
    "convolutional": lambda n, **options: kv.problems.convolutional((2, 3), n, 3, **options),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_what_tests_has_no_part_in_what_trains(make):
    train, test = make(50, standardised_on=30).split(30)
    alone = make(30)
    assert torch.equal(train.inputs, alone.inputs) and torch.equal(train.targets, alone.targets)
    assert len(test.inputs) == len(test.targets) == 20 and test.model is train.model
    whole = make(50)
    assert torch.equal(test.targets, whole.targets[30:]) and not torch.equal(test.inputs, whole.inputs[30:])


def test_a_split_of_several_arguments_cuts_each():
    problem = kv.problems.digits((5,), 20, side=4)
    both = replace(problem, inputs=(problem.inputs, problem.targets))
    train, test = both.split(12)
    for whole, first, last in zip(both.inputs, train.inputs, test.inputs, strict=True):
        assert torch.equal(torch.cat([first, last]), whole) and len(first) == 12


def test_a_split_that_leaves_nothing_is_refused():
    problem = kv.problems.digits((5,), 20, side=4)
    for examples, sentence in ((20, "20 examples leaves none to test on; got 20"), (0, "examples must be")):
        with pytest.raises(ValueError, match=sentence):
            problem.split(examples)
    with pytest.raises(ValueError, match="standardised_on must lie between 1 and n = 20; got 21"):
        kv.problems.digits((5,), 20, side=4, standardised_on=21)
