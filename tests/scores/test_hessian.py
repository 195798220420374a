"""The Hessian as an operator: against ``torch.func.hessian``, and the Fisher with its residual term."""

import numpy as np
import pytest
import torch
from helpers import (
    DEVICES,
    LIKELIHOODS,
    ZOO,
    Model,
    _rows,
    assert_close,
    blocks,
    exact_fisher,
    loss,
    normal,
    targets_for,
)
from torch import nn
from torch.func import functional_call, grad, hessian

import kfac_viz as kv

CASES = list(ZOO)


def second_derivatives(model, function, names):
    """The Hessian (P, P) of ``function(model with these parameters)``, laid out as [W b] row-major, by torch.func."""
    shapes = {name: p.shape for name, p in model.named_parameters()}
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])

    def of(flat):
        pieces = flat.split([shape.numel() for shape in shapes.values()])
        return function({name: x.view(shapes[name]) for name, x in zip(shapes, pieces, strict=True)})

    numbers = torch.arange(len(flat)).split([shape.numel() for shape in shapes.values()])
    order = _rows({name: x.view(shapes[name]) for name, x in zip(shapes, numbers, strict=True)}, names, lead=0)
    return hessian(of)(flat)[order][:, order]


def mean_loss(model, inputs, targets, likelihood):
    def of(parameters):
        outputs = functional_call(model, parameters, (inputs,))
        return sum(loss(f, y, likelihood) for f, y in zip(outputs, targets, strict=True)) / len(inputs)

    return of


@pytest.mark.filterwarnings("ignore:Outside the Fisher")
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("case", CASES)
def test_the_matrix_is_that_of_nested_derivatives_and_the_fisher_with_its_residual_term(case, likelihood):
    model, inputs = ZOO[case].make(4)
    outputs = model(inputs).detach()
    targets = targets_for(outputs, likelihood)
    H, F = kv.Hessian(model, inputs, targets, likelihood=likelihood), kv.capture(model, inputs, likelihood=likelihood)
    names, dense = H.partition.names, H.dense()
    assert H.partition == F.partition
    assert_close(dense, second_derivatives(model, mean_loss(model, inputs, targets, likelihood), names), 1e-11)
    gauss_newton = exact_fisher(model, inputs, likelihood, names)
    assert_close(F.dense(), gauss_newton, 1e-11)
    pairs = zip(outputs, targets, strict=True)
    residuals = torch.stack([grad(lambda f, y=y: loss(f, y, likelihood))(f) for f, y in pairs])

    def residual_term(parameters):  # whose second derivatives are Σ_n Σ_c (∂ℓ/∂f_c) ∇² f_c / N
        return (residuals * functional_call(model, parameters, (inputs,))).sum() / len(inputs)

    residual = second_derivatives(model, residual_term, names)
    assert float((dense - gauss_newton - residual).abs().max()) <= 1e-11 * float(dense.abs().max())


@pytest.mark.parametrize("case", ["tanh", "conv", "called twice"])
def test_products_blocks_and_norms_are_those_of_the_matrix(case):
    model, inputs = ZOO[case].make()
    H = kv.Hessian(model, inputs, targets_for(model(inputs), "categorical"), likelihood="categorical")
    dense, P = H.dense(), H.partition
    assert torch.equal(dense, dense.T) and H.shape == dense.shape and H.symmetric and not H.semidefinite
    V = normal(P.size, 3)
    assert_close(H @ V, dense @ V)
    assert_close(H @ V[:, 1], dense @ V[:, 1])
    for l, row in enumerate(blocks(P, dense)):
        for m, block in enumerate(row):
            assert_close(H.block(l, m), block)
    assert_close(H.block(P.names[0], P.names[-1]), dense[P.slices[0], P.slices[-1]])
    assert_close(H.norms(), P.norms(dense))
    assert_close(H.diagonal(), dense.diagonal())
    A = H.damped(0.3)
    assert_close(A @ V, dense @ V + 0.3 * V)
    assert_close(A.dense(), dense + 0.3 * H.eye())


def test_negative_curvature_is_shown_and_no_system_is_solved_that_has_none():
    model, inputs = ZOO["tanh"].make()
    H = kv.Hessian(model, inputs, targets_for(model(inputs), "categorical"), likelihood="categorical")
    d, dense, g = H.eigen.d, H.dense(), normal(H.shape[0])
    np.testing.assert_allclose(d, np.linalg.eigvalsh(dense), rtol=0, atol=1e-13)
    assert d[0] < -0.01 and d[-1] > 0.01
    enough = 2 * float(-d[0])
    assert_close(H.damped(enough).solve(g), torch.linalg.solve(dense + enough * H.eye(), g), 1e-11)
    assert kv.captured_decrease(H.damped(enough), g, H.damped(enough).solve(g)) == pytest.approx(1)
    for call in (lambda A: A.solve(g), lambda A: kv.captured_decrease(A, g, g)):
        with pytest.raises(ValueError, match="indefinite"):
            call(H.damped(0.5 * float(-d[0])))
    with pytest.raises(ValueError, match="Hessian is indefinite"):
        H.damped(enough).effective_dimension()


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_where_the_residual_term_is_zero(likelihood):
    """In the last layer, in which the outputs are linear; without smooth activations in every layer by itself."""
    for case in ("tanh", "relu, no bias", "one layer"):
        model, inputs = ZOO[case].make()
        targets = targets_for(model(inputs).detach(), likelihood)
        H = kv.Hessian(model, inputs, targets, likelihood=likelihood)
        F = kv.capture(model, inputs, likelihood=likelihood)
        norms = H.partition.norms(H.dense() - F.dense()) / H.dense().norm()
        assert norms[-1, -1] < 1e-14
        assert bool((norms.diagonal() < 1e-14).all()) == (case != "tanh")
        assert case == "one layer" or norms.max() > 0.1


def attention():
    problem = kv.problems.attention(6, 5)
    return problem.model, problem.arguments, problem.targets


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.2, batch_first=True, activation="gelu")
    model = nn.Sequential(nn.Embedding(6, 4), layer, nn.Linear(4, 3)).double().eval()
    return model, (torch.arange(12).view(3, 4) % 6,), torch.arange(12).view(3, 4) % 3


def tied():
    torch.manual_seed(0)
    model = Model(lambda m, i: torch.tanh(m.words(i)) @ m.words.weight.T, words=nn.Embedding(5, 3)).double()
    return model, (torch.tensor([[0, 1], [4, 2]]),), torch.tensor([[1, 1], [3, 0]])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("build", [attention, encoder, tied])
def test_attention_packed_and_tied_weights_against_differences_of_the_gradient(build, device):
    model, inputs, targets = build()
    model, inputs, targets = model.to(device), tuple(x.to(device) for x in inputs), targets.to(device)
    H = kv.Hessian(model, inputs, targets, likelihood="categorical")
    assert H.partition == kv.capture(model, inputs, likelihood="categorical").partition

    def gradient(v):
        moved = kv.problems.Problem(model, inputs, targets, "categorical").twin()
        H.partition.add_(moved.model, v)
        return moved.gradient()

    for seed in range(3):
        v = normal(H.shape[0], seed=seed).to(device)
        difference = (gradient(1e-5 * v) - gradient(-1e-5 * v)) / 2e-5
        assert_close(H @ v, difference, 1e-7)


def test_a_layer_that_is_listed_twice_keeps_its_parameters():
    torch.manual_seed(0)
    inner = nn.Linear(4, 4)
    model = nn.Sequential(inner, nn.Tanh(), inner, nn.Tanh(), nn.Linear(4, 2)).double()
    before, x, y = dict(model.named_parameters()), normal(3, 4), normal(3, 2, seed=1)
    H = kv.Hessian(model, x, y, likelihood="gaussian").dense()
    assert all(p is before[name] for name, p in model.named_parameters())

    def moved(weights):
        return kv.nll(functional_call(model, weights, (x,)), y, "gaussian")

    expected = second_derivatives(model, moved, ["0", "4"])
    model[0], model[2] = inner, inner  # functional_call has left a copy of its own in this layer
    assert_close(H, expected)


def test_one_parameter_of_a_packed_weight_is_one_block():
    model, inputs, targets = attention()
    whole = kv.Hessian(model, inputs, targets, likelihood="categorical")
    name = next(name for name in whole.partition.names if name.endswith(".q"))
    alone = kv.Hessian(model, inputs, targets, likelihood="categorical", layers=[name])
    assert_close(alone.dense(), whole.block(name, name))


def test_the_model_is_left_as_it_was_and_may_move_on():
    model, inputs = ZOO["batch norm, dropout"].make()
    model.train()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    calls = []
    model[0].weight.register_hook(lambda g: calls.append(1))
    targets = targets_for(model.eval()(inputs), "categorical")
    model.train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    state = torch.get_rng_state()
    H = kv.Hessian(model, inputs, targets, likelihood="categorical")
    dense, v = H.dense(), normal(H.shape[0])
    assert model.training and all(m.training for m in model.modules()) and not calls
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight)) and model[0].bias.grad is None
    with torch.no_grad():
        for p in model.parameters():
            p.data.mul_(3)
        model[1].running_mean.add_(1)
        inputs.zero_()
    targets.zero_()
    with torch.inference_mode():
        assert_close(H @ v, dense @ v)


def test_a_buffer_that_the_forward_pass_writes_into_is_untouched():
    def run(m, x):
        m.calls.add_(1)
        return m.one(x)

    model = Model(run, one=nn.Linear(4, 3)).double()
    model.register_buffer("calls", torch.zeros((), dtype=torch.float64))
    kv.Hessian(model, normal(5, 4), torch.zeros(5, dtype=torch.int64), likelihood="categorical")
    assert model.calls == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_callers_grad_mode_and_autocast_change_nothing(dtype):
    model, inputs = ZOO["tanh"].make()
    model, inputs = model.to(dtype), inputs.to(dtype)
    targets = targets_for(model(inputs).double(), "categorical")
    dense = kv.Hessian(model, inputs, targets, likelihood="categorical").dense()
    assert dense.dtype == dtype
    for context in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            H = kv.Hessian(model, inputs, targets, likelihood="categorical")
        assert torch.equal(H.dense(), dense)


# ---- what is refused ---------------------------------------------------------------------------------------


class Cube(torch.autograd.Function):
    """x³, with a backward pass that autograd sees."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


class BlindCube(Cube):
    """The same, with a derivative that comes from elsewhere, as from a kernel of one's own."""

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * torch.from_numpy(x.detach().numpy() ** 2) * g


class OnceCube(Cube):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


def of(run, dtype=torch.float64):
    torch.manual_seed(1)
    model = Model(run, one=nn.Linear(4, 4), two=nn.Linear(4, 3)).to(dtype)
    return lambda: kv.Hessian(model, normal(5, 4).to(dtype), torch.arange(5) % 3, likelihood="categorical")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_function_of_ones_own_is_taken_where_it_can_be_differentiated_twice(dtype):
    found = of(lambda m, x: m.two(Cube.apply(m.one(x))), dtype)().dense()
    assert_close(found, of(lambda m, x: m.two(m.one(x) ** 3), dtype)().dense(), 100 * torch.finfo(dtype).eps)
    with pytest.raises(ValueError, match="uses BlindCube, whose second derivative autograd does not know: .* off by"):
        of(lambda m, x: m.two(BlindCube.apply(m.one(x))), dtype)()
    with pytest.raises(ValueError, match="once_differentiable|uses OnceCube"):
        of(lambda m, x: m.two(OnceCube.apply(m.one(x))), dtype)()


def overwritten(m, x):
    h = torch.tanh(m.one(x))
    return m.two(h.mul_(2)) + h.sum()


def checkpointed(m, x):
    return m.two(torch.utils.checkpoint.checkpoint(m.one, x, use_reentrant=True))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(
    ("run", "said"),
    [
        (overwritten, "cannot differentiate this model: .*modified by an inplace operation"),
        (checkpointed, "cannot differentiate this model|No gradient reaches layers"),
        (lambda m, x: m.two(m.one(x).detach()), r"No gradient reaches layers \['one'\] .*layers=\['two'\]"),
        (lambda m, x: m.two(m.one(x).argmax(1, keepdim=True) * x), r"No gradient reaches layers \['one'\]"),
        (lambda m, x: m.two(x), r"No gradient reaches layers \['one'\]"),
        (lambda m, x: m.two(m.one(x)) / 0, "The gradient holds NaN or inf"),
        (lambda m, x: m.two(m.one(x)).argmax(1), "must return one floating point tensor"),
    ],
)
def test_what_has_no_second_derivative_is_refused_with_the_reason(run, said):
    with pytest.raises((ValueError, TypeError), match=said):
        of(run)()


def test_a_parameter_from_elsewhere_is_refused():
    model = Model(lambda m, x: m.two(m.one(x)) + kept[0].sum(), one=nn.Linear(4, 4), two=nn.Linear(4, 3)).double()
    kept = [model.one.weight]
    with pytest.raises(ValueError, match=r"takes parameter 'one.weight' from elsewhere than its module"):
        kv.Hessian(model, normal(5, 4), torch.arange(5) % 3, likelihood="categorical")


def test_bad_arguments_are_refused_and_change_nothing():
    model, inputs = ZOO["tanh"].make()
    targets = targets_for(model(inputs), "categorical")

    def made(model=model, inputs=inputs, targets=targets, likelihood="categorical", **options):
        return lambda: kv.Hessian(model, inputs, targets, likelihood=likelihood, **options)

    frozen, broken = ZOO["tanh"].make()[0], ZOO["tanh"].make()[0]
    frozen[0].weight.requires_grad_(False)
    broken[2].bias.data[0] = float("nan")
    model.train()
    for call, kind, said in [
        (made(model=nn.Tanh()), ValueError, "has no nn.Linear"),
        (made(model=frozen), ValueError, "are frozen"),
        (made(model=broken), ValueError, "weights of layer '2' hold NaN"),
        (made(inputs=inputs * float("inf")), ValueError, "inputs of the model hold NaN or inf"),
        (made(inputs=inputs[:0]), ValueError, "batch is empty"),
        (made(inputs=inputs.float()), ValueError, "float32"),
        (made(targets=None), TypeError, "targets must be a tensor"),
        (made(targets=targets[:-1]), ValueError, "targets must have shape"),
        (made(likelihood="poisson"), ValueError, "likelihood must be one of"),
        (made(layers=["9"]), ValueError, "not among the model's layers"),
        (made(model=ZOO["tanh"].make()[0].bfloat16(), inputs=inputs.bfloat16()), TypeError, "float32 or float64"),
    ]:
        with pytest.raises(kind, match=said):
            call()
    assert model.training
    H = made()()
    for v in (normal(3), normal(H.shape[0]).float(), float("nan") * normal(H.shape[0])):
        with pytest.raises(ValueError):
            H @ v
