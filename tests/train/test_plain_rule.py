"""Parameters without curvature follow Adam's rule, against ``torch.optim.Adam`` step by step."""

from __future__ import annotations

import copy
import io
import math
import warnings

import pytest
import torch
from counting import Counting
from helpers import assert_close, mlp, normal
from torch import Tensor, nn

import kfac_viz as kv
from kfac_viz.train.plain import adam, no_moments

pytestmark = pytest.mark.filterwarnings("ignore:Adam's steps", "ignore:Left out of the curvature")
EVERY = {"observe_every": 2, "refresh_every": 2, "damping": 0.1}
RULES = ("fixed", "kl_clip", "quadratic", "line_search")


class Autoencoder(nn.Module):
    """Convolutions with curvature and, behind them, two that are transposed and left out."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Tanh(),
            nn.Flatten(), nn.Linear(24, 5), nn.Linear(5, 24),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Tanh(), nn.Unflatten(1, (6, 2, 2)), nn.ConvTranspose2d(6, 4, 2, stride=2), nn.Tanh(),
            nn.ConvTranspose2d(4, 1, 2, stride=2), nn.Flatten(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


class Loose(nn.Module):
    """A parameter that reaches the outputs through an exponential and a logarithm."""

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.inner, self.scale = mlp((4, 5, 3)), nn.Parameter(torch.linspace(-0.5, 0.5, size, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * torch.log1p(self.scale.exp())


class Half(nn.Module):
    """A layer that is trained without its bias, and so has no curvature."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 3)
        self.one.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


def build(name: str, seed: int = 0) -> tuple[nn.Module, Tensor, Tensor, dict]:
    """A model, its inputs and targets, and the options of its optimizer."""
    torch.manual_seed(seed)
    x, y = normal(12, 4), torch.arange(12) % 3
    if name == "autoencoder":
        x = torch.sigmoid(normal(12, 2) @ normal(2, 64, seed=2)).view(12, 1, 8, 8)  # of two numbers each
        return Autoencoder().double(), x, x.flatten(1), {"likelihood": "gaussian", "layers": ["encoder"]}
    return {"loose": Loose, "half": Half}[name]().double(), x, y, {"likelihood": "categorical"}


MODELS = ("autoencoder", "loose", "half")


def closure_of(model: nn.Module, x: Tensor, y: Tensor, opt: kv.TwoLevelKFAC, sign: float = 1.0):
    def closure() -> Tensor:
        opt.zero_grad()
        loss = sign * kv.nll(model(x), y, opt.options.likelihood)
        loss.backward()
        return loss

    return closure


def optimizer(model: nn.Module, x: Tensor, **options) -> kv.TwoLevelKFAC:
    """One that has already told what has no curvature, and seen it."""
    params = [p for p in model.parameters() if p.requires_grad]
    opt = kv.TwoLevelKFAC(model, options.pop("params", params), **EVERY | options)
    opt.observe(x)
    return opt


def plain_of(opt: kv.TwoLevelKFAC) -> list[Tensor]:
    return [p for group in opt.param_groups for p in group["params"] if p not in opt._layout.covered]


def flat(params) -> Tensor:
    return torch.cat([p.detach().flatten() for p in params])


# ---- step by step --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "options, theirs, adam",
    [
        ({}, {}, torch.optim.Adam),
        ({"momentum": 0.0, "step_rule": "fixed", "lr": 0.01}, {"betas": (0.0, 0.999)}, torch.optim.Adam),
        (
            {"momentum": 0.5, "plain_lr": 0.02, "capturable": True}, {"betas": (0.5, 0.999), "lr": 0.02},
            torch.optim.Adam,
        ),
        ({"weight_decay": 0.1, "step_rule": "quadratic"}, {"weight_decay": 0.1}, torch.optim.Adam),
        ({"weight_decay": 0.1, "decoupled": True}, {"weight_decay": 0.1}, torch.optim.AdamW),
        ({"maximize": True, "weight_decay": 0.1}, {"weight_decay": 0.1, "maximize": True}, torch.optim.Adam),
    ],
)  # fmt: skip
def test_parameters_without_curvature_take_the_steps_of_adam(name, options, theirs, adam):
    model, x, y, given = build(name)
    opt = optimizer(model, x, **given | options)
    mine = plain_of(opt)
    assert mine and len(mine) < len(list(model.parameters()))
    twins = [p.detach().clone().requires_grad_() for p in mine]
    reference = adam(twins, **{"lr": 1e-3} | theirs)
    closure = closure_of(model, x, y, opt, -1.0 if options.get("maximize") else 1.0)
    for _ in range(5):
        closure()
        for p, twin in zip(mine, twins, strict=True):
            twin.grad = p.grad.clone()
        reference.step()
        opt.observe(x)
        opt.step()
        assert_close(flat(mine), flat(twins), 1e-12)
    assert set(opt.state[mine[0]]) == {"step", "exp_avg", "exp_avg_sq"}


def test_each_group_has_its_own_rate_which_can_be_edited():
    model, x, y, given = build("autoencoder")
    first, second = model.decoder[2], model.decoder[4]
    groups = [
        {"params": list(model.encoder.parameters())},
        {"params": list(first.parameters()), "plain_lr": 0.02},
        {"params": list(second.parameters()), "plain_lr": 0.0},
    ]
    opt = optimizer(model, x, params=groups, **given, plain_lr=0.3)
    assert [group["plain_lr"] for group in opt.param_groups] == [0.3, 0.02, 0.0]
    for rates in ((0.02, 0.0), (0.005, 0.04)):
        before = [flat(layer.parameters()) for layer in (first, second)]
        for group, rate in zip(opt.param_groups[1:], rates, strict=True):
            group["plain_lr"] = rate
        opt.state.clear()  # the first step of Adam is as long as its rate in every parameter
        closure_of(model, x, y, opt)()
        opt.step()
        for layer, old, rate in zip((first, second), before, rates, strict=True):
            g = flat(p.grad for p in layer.parameters())
            assert_close(flat(layer.parameters()) - old, -rate * g / (g.abs() + 1e-8), 1e-9)


@pytest.mark.parametrize(
    "value, words",
    [
        (-1.0, "plain_lr must be finite and at least 0"), ("fast", "plain_lr must be a number"),
        (math.nan, "plain_lr must be finite"), (1e300, "plain_lr 1e.300 overflows"),
    ],
)  # fmt: skip
def test_a_rate_out_of_range_is_refused_and_changes_nothing(value, words):
    with pytest.raises((ValueError, TypeError), match=words):
        kv.TwoLevelKFAC(mlp().float(), likelihood="categorical", plain_lr=value)
    model, x, y, given = build("loose")
    opt = optimizer(model, x, **given)
    model.float()
    closure_of(model, x.float(), y, opt)()
    before = flat(model.parameters())
    opt.param_groups[0]["plain_lr"] = value
    with pytest.raises((ValueError, TypeError), match=words):
        opt.step()
    assert torch.equal(flat(model.parameters()), before) and not opt.state
    with pytest.raises((ValueError, TypeError), match=words):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2))], "plain_lr": value})


@pytest.mark.parametrize("step_rule", RULES)
def test_a_convolutional_autoencoder_learns(step_rule):
    """Plain gradient steps with K-FAC's rate ended in inf here."""
    model, x, y, given = build("autoencoder")
    opt = optimizer(model, x, **given, step_rule=step_rule)
    losses = []
    for _ in range(60):
        losses.append(float(closure_of(model, x, y, opt)().detach()))
        opt.observe(x)
        opt.step(closure_of(model, x, y, opt) if step_rule in ("quadratic", "line_search") else None)
    assert losses[-1] < 0.5 * losses[0]


# ---- the judged step ----------------------------------------------------------------------------------


def test_the_predicted_change_counts_the_slope_of_adams_step():
    model, x, y, given = build("loose")
    opt = optimizer(model, x, **given, step_rule="quadratic", fisher="exact", lr=1e-3, plain_lr=1e-3)
    closure = closure_of(model, x, y, opt)
    closure()
    gradient, before = model.scale.grad.clone(), model.scale.detach().clone()
    opt.step(closure)
    told, slope = opt.diagnostics, float(gradient @ (model.scale.detach() - before))
    assert told["plain slope"] == pytest.approx(slope, rel=1e-9) and slope < 0.1 * (told["predicted"] - slope) < 0
    assert told["reduction ratio"] == pytest.approx(1.0, abs=0.05)  # without the slope it would be more than 1.1


def test_the_quadratic_rule_undoes_the_steps_without_curvature_alone_where_they_are_to_blame():
    model, x, y, given = build("loose")
    opt = optimizer(model, x, **given, step_rule="quadratic", fisher="exact", plain_lr=20.0)
    closure = closure_of(model, x, y, opt)
    loss = float(closure().detach())
    inner, scale, state = flat(model.inner.parameters()), model.scale.detach().clone(), copy.deepcopy(opt.state)
    opt.step(closure)
    assert opt.diagnostics["without plain steps"] == 1 and opt.diagnostics["rejected"] == 0
    assert torch.equal(model.scale, scale) and opt.state.get(model.scale) == state.get(model.scale)
    assert not torch.equal(flat(model.inner.parameters()), inner) and float(closure().detach()) < loss
    assert opt.diagnostics["reduction ratio"] > 0


def test_a_rejected_step_undoes_the_moments_too():
    model, x, y, given = build("loose")
    opt = optimizer(model, x, **given, step_rule="quadratic")
    closure = closure_of(model, x, y, opt)
    closure()
    opt.step(closure)
    before, moments, losses = flat(model.parameters()), copy.deepcopy(opt.state[model.scale]), iter(range(10, 100))
    opt.step(lambda: closure().detach() + next(losses))
    assert opt.diagnostics["rejected"] == 1 and torch.equal(flat(model.parameters()), before)
    assert moments.keys() == opt.state[model.scale].keys()
    assert all(torch.equal(opt.state[model.scale][name], x) for name, x in moments.items())
    assert not any(opt.state[p]["momentum_buffer"].any() for p in model.inner.parameters())


def test_the_line_search_halves_both_together():
    model, x, y, given = build("loose")
    opt = optimizer(model, x, **given, step_rule="line_search", search="first", plain_lr=0.01, fisher="exact", lr=1e-3)
    closure, calls = closure_of(model, x, y, opt), []
    scale, inner = model.scale.detach().clone(), opt.partition.pack(model)

    def twice_too_high() -> Tensor:
        calls.append(1)
        return closure().detach() + (10.0 if len(calls) in (2, 3) else 0.0)

    closure()
    gradient, v = model.scale.grad.clone(), opt.preconditioner @ opt.partition.pack_grad(model)
    opt.step(twice_too_high)
    assert opt.diagnostics["step length"] == 0.25
    assert_close(opt.partition.pack(model) - inner, -0.25 * 1e-3 * v, 1e-9)
    assert_close(model.scale.detach() - scale, -0.25 * 0.01 * gradient / (gradient.abs() + 1e-8), 1e-9)
    assert_close(opt.state[model.scale]["exp_avg"], gradient)  # of gradients, whatever the length
    assert float(opt.state[model.scale]["step"]) == 1
    before, losses = flat(model.parameters()), iter(range(10, 100))
    state = copy.deepcopy(opt.state[model.scale])
    with pytest.warns(UserWarning, match="goes up at every length"):
        opt.step(lambda: closure().detach() + next(losses))
    assert torch.equal(flat(model.parameters()), before)
    assert all(torch.equal(opt.state[model.scale][name], x) for name, x in state.items())


# ---- nothing half done ---------------------------------------------------------------------------------


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("bad", ["gradient of the plain parameter", "gradient of a layer", "square of the gradient"])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_refused_step_leaves_the_moments(capturable, bad, steps):
    model, x, y, given = build("loose")
    model.float()
    x = x.float()
    opt = optimizer(model, x, **given, capturable=capturable)
    closure = closure_of(model, x, y, opt)
    assert opt.preconditioner is not None  # a refresh looks at the gradient, capturable or not
    for _ in range(steps):
        closure()
        opt.step()
    closure()
    p = next(model.inner.parameters()) if "layer" in bad else model.scale
    p.grad.view(-1)[0] = 1e30 if "square" in bad else math.nan  # whose square overflows where the step would not
    before, state = flat(model.parameters()), copy.deepcopy(opt.state)
    if capturable:
        opt.step()
        assert float(opt.state[model.scale]["step"]) == steps
    else:
        with pytest.raises(ValueError, match="overflow" if "square" in bad else "NaN or inf in"):
            opt.step()
    assert torch.equal(flat(model.parameters()), before)
    for p, q in zip(opt.state, state, strict=False):
        assert all(torch.equal(opt.state[p][name], x) for name, x in state[q].items())
    assert capturable or len(opt.state) == len(state)
    closure()
    opt.step()
    assert torch.isfinite(flat(model.parameters())).all() and float(opt.state[model.scale]["step"]) == steps + 1


@pytest.mark.parametrize("step_rule", RULES)
@pytest.mark.parametrize("name", MODELS)
def test_the_moments_are_resumed_bit_for_bit(name, step_rule):
    def run(model, opt, steps):
        for _ in range(steps):
            closure = closure_of(model, x, y, opt)
            closure()
            opt.observe(x)
            opt.step(closure if step_rule in ("quadratic", "line_search") else None)

    straight, x, y, given = build(name)
    options = given | {"step_rule": step_rule, "plain_lr": 0.01, "per_layer": 2, "params": None}
    opt = optimizer(straight, x, **options)
    run(straight, opt, 3)
    file = io.BytesIO()
    torch.save([straight.state_dict(), opt.state_dict()], file)
    run(straight, opt, 3)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    model = build(name, seed=1)[0]
    model.load_state_dict(weights)
    again = kv.TwoLevelKFAC(model, **EVERY | options)
    again.load_state_dict(state)
    run(model, again, 3)
    assert torch.equal(flat(model.parameters()), flat(straight.parameters()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moments_of_low_precision_are_kept_in_float32_also_when_saved(dtype):
    """A square of 1e-4 is 0 in half precision, and the step would be infinite."""
    model, x, y, given = build("half")
    model.to(dtype)
    opt = optimizer(model, x.to(dtype), **given)
    for _ in range(2):
        (1e-4 * kv.nll(model(x.to(dtype)), y, "categorical")).backward()
        opt.step()
    again = optimizer(model, x.to(dtype), **given)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    for o in (opt, again):
        (weight,) = plain_of(o)
        assert {name: own.dtype for name, own in o.state[weight].items()} == dict.fromkeys(
            ("step", "exp_avg", "exp_avg_sq"), torch.float32
        )
        assert weight.isfinite().all() and torch.equal(o.state[weight]["exp_avg_sq"], opt.state[weight]["exp_avg_sq"])


def test_moments_follow_the_model_to_another_dtype():
    model, x, y, given = build("loose")
    opt = optimizer(model, x, **given)
    for dtype in (torch.float64, torch.float32, torch.float64):
        model.to(dtype)
        for _ in range(2):
            closure_of(model, x.to(dtype), y, opt)()
            opt.observe(x.to(dtype))
            opt.step()
        assert {own.dtype for own in opt.state[model.scale].values()} == {dtype}
    assert float(opt.state[model.scale]["step"]) == 6


# ---- changing sides ------------------------------------------------------------------------------------


def train(model, opt, x, y, steps=2):
    for _ in range(steps):
        closure_of(model, x, y, opt)()
        opt.observe(x)
        opt.step()


def test_a_weight_that_gains_and_loses_curvature_starts_anew_each_time():
    model, x, y, given = build("half")
    opt = kv.TwoLevelKFAC(model, [p for p in model.parameters() if p.requires_grad], **EVERY | given)
    weight, bias = model.one.weight, model.one.bias
    train(model, opt, x, y)
    assert opt.partition.names == ("two",) and set(opt.state[weight]) == {"step", "exp_avg", "exp_avg_sq"}
    bias.requires_grad_(True)
    opt.add_param_group({"params": [bias]})
    closure_of(model, x, y, opt)()
    opt.observe(x)
    assert opt.partition.names == ("one", "two") and not opt.state[weight]
    opt.step()
    assert set(opt.state[weight]) == {"momentum_buffer"}
    bias.requires_grad_(False)
    train(model, opt, x, y, 2)
    assert opt.partition.names == ("two",) and float(opt.state[weight]["step"]) == 1  # the next observation told it
    before, gradient = weight.detach().clone(), None
    opt.state[weight].clear()
    closure_of(model, x, y, opt)()
    gradient = weight.grad.clone()
    opt.step()
    assert_close(weight.detach() - before, -1e-3 * gradient / (gradient.abs() + 1e-8), 1e-9)


def test_a_parameter_that_is_left_out_after_an_observation_keeps_no_momentum():
    class Later(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.scale, self.known = mlp(), nn.Parameter(torch.ones(3, dtype=torch.float64)), True

        def forward(self, x):
            return self.inner(x) * (self.scale if self.known else self.scale.exp())

    model, x, y = Later(), normal(12, 4), torch.arange(12) % 3
    opt = kv.TwoLevelKFAC(model, likelihood="categorical", **EVERY)
    train(model, opt, x, y)
    assert set(opt.state[model.scale]) == {"momentum_buffer"}
    model.known = False
    closure_of(model, x, y, opt)()
    opt.observe(x)
    assert "scale" not in opt.partition.names and not opt.state[model.scale]
    twin = model.scale.detach().clone().requires_grad_()
    reference = torch.optim.Adam([twin])
    for _ in range(3):
        twin.grad = model.scale.grad.clone()
        reference.step()
        opt.step()
        assert_close(model.scale, twin, 1e-12)
        closure_of(model, x, y, opt)()


def test_nothing_is_said_and_nothing_is_kept_where_all_parameters_have_curvature():
    model = mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt = kv.TwoLevelKFAC(model, likelihood="categorical", **EVERY)
        train(model, opt, normal(12, 4), torch.arange(12) % 3)
    assert all(set(own) == {"momentum_buffer"} for own in opt.state.values())


# ---- where the numbers are -----------------------------------------------------------------------------


@pytest.mark.parametrize("capturable", [False, True])
def test_a_plain_step_reads_no_more_than_with_curvature_alone(capturable):
    model, x, y, given = build("loose")
    opt = optimizer(model, x, **given, capturable=capturable)
    closure_of(model, x, y, opt)()
    opt.step()
    addresses = {name: own.data_ptr() for name, own in opt.state[model.scale].items()}
    with Counting() as seen:
        opt.step()
    assert seen.reads == (0 if capturable else 1)
    assert {name: own.data_ptr() for name, own in opt.state[model.scale].items()} == addresses, "as CUDA graphs need it"


def test_the_rule_runs_where_there_are_no_numbers():
    p = torch.empty(3, 2, device="meta")
    (step,), (moments,) = adam([torch.empty_like(p)], [no_moments(p)], lr=0.1, beta1=0.9)
    assert step.is_meta and step.shape == p.shape and all(x.is_meta for x in moments)


@pytest.mark.parametrize("step_rule", RULES)
def test_another_default_device_changes_nothing(step_rule):
    """Tensors without a device of their own would come to be where nothing can be read."""

    def trained(context):
        model, x, y, given = build("loose")
        opt = optimizer(model, x, **given, step_rule=step_rule, coarse="nicolaides", per_layer=2, decay=0.5)
        closure = closure_of(model, x, y, opt)
        closure()
        F, names = opt.curvature.capture(model, (x[:7],), None, opt.partition)
        with context:
            for _ in range(3):
                opt.curvature.add_batch(F, names)
                opt.step(closure if step_rule in ("quadratic", "line_search") else None)
                opt.load_state_dict(copy.deepcopy(opt.state_dict()))
                closure()
        return flat(model.parameters())

    assert torch.equal(trained(torch.device("meta")), trained(torch.device("cpu")))
