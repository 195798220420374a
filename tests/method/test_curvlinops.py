"""Agreement with curvlinops, an independent library, in its own scaling and parameter order."""

import pytest
import torch
from helpers import ZOO, assert_close, normal, targets_for
from torch import nn

import kfac_viz as kv

curvlinops = pytest.importorskip("curvlinops")

CASES = ["tanh", "relu, no bias", "sigmoid, some bias", "residual", "batch norm, dropout"]
SHARED = ["conv", "two extra axes", "positions, T² > S"]

# Means over outputs too, and no ½ in the squared error: what one of their Fishers lacks to be one of ours.
LOSSES = {
    "categorical": (nn.CrossEntropyLoss(), lambda outputs: 1),
    "bernoulli": (nn.BCEWithLogitsLoss(), lambda outputs: outputs),
    "gaussian": (nn.MSELoss(), lambda outputs: outputs / 2),
}


def theirs(kind, model, inputs, likelihood, layers=None, **options):
    """Their matrix in our layout: [W b] row-major, layer after layer."""
    P = kv.partition_of(model, layers)
    parameters = [p for name in P.names for p in model.get_submodule(name).parameters(recurse=False)]
    outputs = model(inputs)
    loss, scale = LOSSES[likelihood]
    targets = targets_for(outputs, likelihood)
    targets = targets.round() if likelihood == "bernoulli" else targets  # they take 0 and 1 only
    operator = kind(model, loss, parameters, [(inputs, targets)], check_deterministic=False, **options)
    return operator, _order(P), scale(outputs.shape[-1])


def _order(P):
    """Numbers of our entries in their order: the whole weight of a layer, then its bias."""
    pieces = []
    for layer, numbers in zip(P.layers, P.split(torch.arange(P.size)), strict=True):
        pieces += [numbers[:, : layer.features - layer.bias].flatten()]
        pieces += [numbers[:, -1]] if layer.bias else []
    return torch.cat(pieces)


def dense(operator):
    return operator @ torch.eye(operator.shape[0], dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:Outside the Fisher")
@pytest.mark.parametrize("likelihood", LOSSES)
@pytest.mark.parametrize("case", CASES + SHARED + ["called twice", "positions, T² ≤ S"])
def test_exact_fisher_is_their_ggn(case, likelihood):
    model, inputs = ZOO[case].make()
    operator, order, scale = theirs(curvlinops.GGNLinearOperator, model, inputs, likelihood)
    F = kv.capture(model, inputs, likelihood=likelihood).dense()
    assert_close(F[order][:, order], scale * dense(operator))


@pytest.mark.filterwarnings("ignore:Outside the Fisher")
@pytest.mark.parametrize("case", CASES)
def test_empirical_fisher_is_theirs(case):
    model, inputs = ZOO[case].make()
    operator, order, _ = theirs(curvlinops.EFLinearOperator, model, inputs, "categorical")
    targets = targets_for(model(inputs), "categorical")
    F = kv.capture(model, inputs, targets, likelihood="categorical", fisher="empirical").dense()
    assert_close(F[order][:, order], dense(operator))


@pytest.mark.filterwarnings("ignore:Outside the Fisher")
@pytest.mark.parametrize("likelihood", LOSSES)
@pytest.mark.parametrize("case", ["tanh", "batch norm, dropout", "conv", "called twice"])
def test_hessian_is_theirs(case, likelihood):
    model, inputs = ZOO[case].make()
    operator, order, scale = theirs(curvlinops.HessianLinearOperator, model, inputs, likelihood)
    targets = targets_for(model(inputs), likelihood)
    targets = targets.round() if likelihood == "bernoulli" else targets
    H = kv.Hessian(model, inputs, targets, likelihood=likelihood).dense()
    assert_close(H[order][:, order], scale * dense(operator), 1e-11)


@pytest.mark.filterwarnings("ignore:Outside the Fisher")
@pytest.mark.parametrize("likelihood", LOSSES)
@pytest.mark.parametrize(
    ("case", "convention"), [*((c, "expand") for c in CASES + SHARED), *((c, "reduce") for c in SHARED)]
)
def test_kfac_blocks_are_theirs(case, convention, likelihood):
    model, inputs = ZOO[case].make()
    layers = [name for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]  # all that it knows
    operator, order, scale = theirs(
        curvlinops.KFACLinearOperator,
        model,
        inputs,
        likelihood,
        layers,
        fisher_type="type-2",
        kfac_approx=convention,
        separate_weight_and_bias=False,
    )
    F = kv.capture(model, inputs, likelihood=likelihood, layers=layers)
    factors = F.kronecker(convention)
    ours = torch.block_diag(*(torch.kron(G, A) for G, A in zip(factors.G, factors.A, strict=True)))
    assert_close(ours[order][:, order], scale * dense(operator))


@pytest.mark.parametrize("rule", ["eigen", "factored"])
def test_damped_inverses_are_theirs(rule):
    """Their "exact" damping is the eigen rule, their heuristic damping Martens and Grosse's factored one."""
    model, inputs = ZOO["tanh"].make(30)
    kfac, order, _ = theirs(
        curvlinops.KFACLinearOperator,
        model,
        inputs,
        "categorical",
        fisher_type="type-2",
        separate_weight_and_bias=False,
    )
    options = {"use_exact_damping": True} if rule == "eigen" else {"use_heuristic_damping": True, "min_damping": 0.0}
    inverse = curvlinops.KFACInverseLinearOperator(kfac, damping=1e-2, **options)
    M = kv.KFAC(kv.capture(model, inputs, likelihood="categorical"), 1e-2, rule).dense()
    assert_close(M[order][:, order], dense(inverse), 1e-10)


@pytest.mark.filterwarnings("ignore:Outside the Fisher")
@pytest.mark.parametrize("case", ["tanh", "residual"])
def test_ekfac_is_theirs(case):
    model, inputs = ZOO[case].make(30)
    ekfac, order, _ = theirs(
        curvlinops.EKFACLinearOperator,
        model,
        inputs,
        "categorical",
        fisher_type="type-2",
        separate_weight_and_bias=False,
    )
    M = kv.EKFAC(kv.capture(model, inputs, likelihood="categorical"), 1e-2)
    ours = torch.linalg.inv(M.dense()) - 1e-2 * M.eye()
    assert_close(ours[order][:, order], dense(ekfac), 1e-9)


def test_one_product_is_theirs():
    model, inputs = ZOO["tanh"].make(30)
    operator, order, scale = theirs(curvlinops.GGNLinearOperator, model, inputs, "gaussian")
    F = kv.capture(model, inputs, likelihood="gaussian")
    v = normal(F.shape[0])
    assert_close((F @ v)[order], scale * (operator @ v[order]))
