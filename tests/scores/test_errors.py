"""Bad input: a sentence that names what came, and nothing changed."""

import copy

import pytest
import torch
from helpers import captured, mlp, normal
from torch import nn

import kfac_viz as kv

X = normal(5, 4)


def poisoned(part, value=torch.nan):
    """A network with one bad number in one place."""
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        {
            "weight": model[3].weight[0],
            "bias": model[3].bias,
            "norm": model[1].weight,
            "statistics": model[1].running_var,
        }[part][0] = value
    return model


class Returns(nn.Module):
    """A linear model whose output is put through something else."""

    def __init__(self, change, width=3):
        super().__init__()
        self.layer, self.change = nn.Linear(4, width).double(), change

    def forward(self, x):
        return self.change(self.layer(x))


class Skips(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()

    def forward(self, x):
        return self.used(x)


class NoGrad(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4).double(), nn.Linear(4, 3).double()

    def forward(self, x):
        with torch.no_grad():
            x = self.first(x)
        return self.last(x)


def frozen():
    model = mlp()
    model[2].weight.requires_grad_(False)
    return model


def mixed():
    model = mlp()
    model[2].float()
    return model


def with_value(x, value, at=(2, 1)):
    x = x.clone()
    x[at] = value
    return x


CAPTURE = {
    # name: (model, arguments, options, error, words)
    "nan in inputs": (mlp, (with_value(X, torch.nan),), {}, ValueError, "inputs of the model hold NaN or inf"),
    "inf in inputs": (mlp, (with_value(X, torch.inf),), {}, ValueError, "inputs of the model hold NaN or inf"),
    "nan in a weight": (lambda: poisoned("weight"), (X,), {}, ValueError, "weights of layer '3' hold NaN"),
    "inf in a bias": (lambda: poisoned("bias", torch.inf), (X,), {}, ValueError, "weights of layer '3' hold NaN"),
    "nan in batch norm": (lambda: poisoned("norm"), (X,), {}, ValueError, "weights of layer '1' hold NaN"),
    "nan in statistics": (lambda: poisoned("statistics"), (X,), {}, ValueError, "inputs of layer '3' hold NaN"),
    "nan in outputs": (lambda: Returns(lambda f: f / 0 * 0), (X,), {}, ValueError, "outputs hold NaN or inf"),
    "nan on the way back": (
        lambda: Returns(lambda f: (f * 0).sqrt()), (X,), {}, ValueError, "vectors of layer 'layer' hold NaN",
    ),
    "empty batch": (mlp, (X[:0],), {}, ValueError, r"batch is empty: inputs have shape \(0, 4\)"),
    "too wide": (mlp, (normal(5, 7),), {}, ValueError, r"Layer '0' expects .* \(N, …, 4\); got \(5, 7\)"),
    "no batch axis": (mlp, (normal(4),), {}, ValueError, r"Layer '0' expects .* \(N, …, 4\); got \(4,\)"),
    "image without batch": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3)).double(), (normal(1, 4, 4),), {},
        ValueError, r"Layer '0' expects .*\(N, 1, height, width\); got \(1, 4, 4\)",
    ),
    "integers": (mlp, (torch.ones(5, 4, dtype=torch.long),), {}, ValueError, "Layer '0' expects floating.*torch.int64"),
    "booleans": (mlp, (torch.ones(5, 4, dtype=torch.bool),), {}, ValueError, "torch.bool"),
    "complex": (mlp, (torch.ones(5, 4, dtype=torch.complex128),), {}, ValueError, "torch.complex128"),
    "float32 into float64": (mlp, (X.float(),), {}, ValueError, "model is torch.float64.*inputs torch.float32"),
    "mixed model": (mixed, (X,), {}, ValueError, "Layer '2' is torch.float32 .* layer '0' is torch.float64"),
    "inputs are a list of numbers": (mlp, ([[1.0, 2.0]],), {}, TypeError, "inputs must be tensors; got .*list"),
    "inputs are numpy": (mlp, (X.numpy(),), {}, TypeError, "inputs must be tensors; got .*ndarray"),
    "no inputs": (mlp, ((),), {}, TypeError, "inputs must be tensors"),
    "not a model": (lambda: torch.tanh, (X,), {}, TypeError, "Expected a torch.nn.Module"),
    "no layer": (lambda: nn.Sequential(nn.Tanh()), (X,), {}, ValueError, "Sequential has no nn.Linear"),
    "frozen layer": (frozen, (X,), {}, ValueError, r"\['2'\] are frozen.*layers=\[...\]"),
    "unknown layer": (mlp, (X,), {"layers": ["9"]}, ValueError, r"\['9'\] are not among.*\['0', '2'\]"),
    "idle layer": (Skips, (X,), {}, ValueError, r"\['idle'\] took no part in the forward pass"),
    "no gradients": (NoGrad, (X,), {}, ValueError, "'first' runs in torch.no_grad.*no gradient reaches it"),
    "coupled examples": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)).double(), (X,), {},
        ValueError, "'1' keeps no running statistics and couples the examples",
    ),
    "rows that belong to nobody": (
        lambda: Returns(lambda f: f[:5] + f[6:]), (normal(11, 4),), {}, ValueError,
        "'layer' saw 11 rows, of shape .11,., where the model returned 5 examples",
    ),
    "scalar output": (lambda: Returns(torch.sum), (X,), {}, ValueError, r"got shape \(\)"),
    "flat output": (lambda: Returns(lambda f: f[:, 0]), (X,), {}, ValueError, r"got shape \(5,\)"),
    "tuple output": (lambda: Returns(lambda f: (f, f)), (X,), {}, TypeError, "one floating point tensor; got tuple"),
    "integer output": (lambda: Returns(lambda f: f.argmax(1, True)), (X,), {}, TypeError, "got torch.int64"),
    "one class": (lambda: Returns(lambda f: f, 1), (X,), {}, ValueError, "two classes.*'bernoulli'"),
    "unknown likelihood": (
        mlp, (X,), {"likelihood": "poisson"}, ValueError, "'categorical', 'bernoulli', 'gaussian'; got 'poisson'",
    ),
    "unknown fisher": (mlp, (X,), {"fisher": "emp"}, ValueError, "'exact', 'mc', 'empirical'; got 'emp'"),
    "targets missing": (mlp, (X,), {"fisher": "empirical"}, ValueError, "needs the true labels as targets"),
    "targets unasked for": (
        mlp, (X, torch.zeros(5).long()), {}, ValueError, "belong to fisher='empirical' only; fisher='exact'",
    ),
    "targets of another length": (
        mlp, (X, torch.zeros(4).long()), {"fisher": "empirical"}, ValueError, r"shape \(5,\).*got \(4,\)",
    ),
    "targets are floats": (mlp, (X, torch.zeros(5)), {"fisher": "empirical"}, TypeError, "class indices.*float32"),
    "targets out of range": (
        mlp, (X, torch.full((5,), 3)), {"fisher": "empirical"}, ValueError, "lie in 0…2; got 3…3",
    ),
    "targets one-hot": (
        mlp, (X, torch.zeros(5, 3).long()), {"fisher": "empirical"}, ValueError, r"shape \(5,\).*got \(5, 3\)",
    ),
    "targets a list": (mlp, (X, [0] * 5), {"fisher": "empirical"}, TypeError, "targets must be a tensor; got list"),
    "regression in another dtype": (
        mlp, (X, torch.zeros(5, 3)), {"fisher": "empirical", "likelihood": "gaussian"}, TypeError,
        "gaussian targets must be torch.float64 like the outputs; got torch.float32",
    ),
    "regression on nan": (
        mlp, (X, with_value(normal(5, 3), torch.nan)), {"fisher": "empirical", "likelihood": "gaussian"}, ValueError,
        "targets hold NaN",
    ),
    "probabilities beyond 1": (
        mlp, (X, with_value(torch.zeros(5, 3).double(), 1.5)), {"fisher": "empirical", "likelihood": "bernoulli"},
        ValueError, r"lie in \[0, 1\]",
    ),
    "no samples": (mlp, (X,), {"fisher": "mc", "samples": 0}, ValueError, "samples must be .* at least 1; got 0"),
    "half a sample": (mlp, (X,), {"fisher": "mc", "samples": 0.5}, ValueError, "got 0.5"),
    "a seed for a generator": (mlp, (X,), {"fisher": "mc", "generator": 3}, TypeError, "type Generator; got int"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Outside the Fisher")
@pytest.mark.parametrize("name", CAPTURE)
def test_capture(name):
    build, arguments, options, error, words = CAPTURE[name]
    model = build()
    before = copy.deepcopy(model.state_dict()) if isinstance(model, nn.Module) else {}
    state, generator = torch.random.get_rng_state(), torch.Generator().manual_seed(1)
    drawn = generator.get_state()
    options = {"generator": generator} | options
    with pytest.raises(error, match=words):
        kv.capture(model, *arguments, **{"likelihood": "categorical"} | options)
    torch.testing.assert_close(getattr(model, "state_dict", dict)(), before, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.random.get_rng_state(), state) and torch.equal(generator.get_state(), drawn)
    if isinstance(model, nn.Module):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_capture_refuses_layers_on_two_devices():
    model = mlp()
    model[2].to("meta")
    with pytest.raises(ValueError, match="Layer '2' is torch.float64 on meta, layer '0' is torch.float64 on cpu"):
        kv.capture(model, X, likelihood="categorical")
    with pytest.raises(ValueError, match="on cpu, the inputs torch.float64 on meta"):
        kv.capture(mlp(), X.to("meta"), likelihood="categorical")


@pytest.mark.parametrize(
    ("damping", "error"),
    [(-1e-3, ValueError), (float("nan"), ValueError), (float("inf"), ValueError), (None, TypeError), ("1", TypeError),
     (True, TypeError), ([1.0], TypeError), (1j, TypeError), (torch.ones(2), TypeError)],
)  # fmt: skip
@pytest.mark.parametrize(
    "build",
    [
        lambda F, damping: F.damped(damping),
        lambda F, damping: F.damped(1.0).with_damping(damping),
        lambda F, damping: kv.KroneckerFisher(F).damped(damping),
        kv.KFAC,
        lambda F, damping: kv.KFAC(F, damping, rule="factored"),
        kv.EKFAC,
        kv.BlockDiagonal,
        kv.BlockTridiagonal,
        kv.Diagonal,
        kv.Identity,
        lambda F, damping: kv.KFAC(F, 1.0).with_damping(damping),
        lambda F, damping: kv.TwoLevel(F.damped(1.0), kv.KFAC(F, 1.0), kv.coarse.spectral(F, 1)).with_damping(damping),
    ],
)
def test_damping(build, damping, error):
    with pytest.raises(error, match="damping must be (a number|finite and at least 0); got"):
        build(captured("tanh"), damping)


def test_numbers_of_numpy_and_torch_are_dampings_too():
    import numpy as np

    F = captured("tanh")
    for damping in (np.float32(0.5), torch.tensor(0.5), 1, np.int64(2)):
        assert F.damped(damping).damping == float(damping)


F = captured("residual")
A, M, Z = F.damped(0.1), kv.KFAC(F, 0.1), kv.coarse.spectral(F, 2)
G = normal(F.shape[0], seed=3)
OTHER = captured("tanh")
SINGLE = kv.capture(mlp((4, 5, 3)).float(), X.float(), likelihood="categorical")
DOUBLE = kv.capture(mlp((4, 5, 3)), X, likelihood="categorical")

CALLS = {
    "vector of another length": (lambda: F @ G[:3], ValueError, r"\(51,\) or \(51, k\).*got \(3,\)"),
    "three axes": (lambda: F @ G[:, None, None], ValueError, r"got \(51, 1, 1\)"),
    "no tensor": (lambda: F @ G.tolist(), TypeError, "got list"),
    "another dtype": (lambda: F @ G.float(), ValueError, "Fisher holds torch.float64 on cpu; the vector is .*32"),
    "integers": (lambda: M @ torch.ones(51).long(), ValueError, "KFAC holds torch.float64.*torch.int64"),
    "booleans": (lambda: A @ (G > 0), ValueError, "torch.bool"),
    "complex": (lambda: A @ (G + 0j), ValueError, "torch.complex128"),
    "another device": (lambda: F @ G.to("meta"), ValueError, "vector is torch.float64 on meta"),
    "nan": (lambda: M @ with_value(G, torch.nan, 20), ValueError, "NaN or inf in layer 'body.two.0'"),
    "inf": (lambda: A @ with_value(G, torch.inf, 50), ValueError, "NaN or inf in layer 'head'"),
    "unknown block": (lambda: F.block("nope", 0), ValueError, "'nope'.*'body.one', 'body.two.0', 'head'"),
    "block beyond": (lambda: M.block(0, 3), ValueError, "Layer 3 does not exist: there are 3"),
    "block by a fraction": (lambda: A.block(0.5, 0), TypeError, "0.5"),
    "unknown rule": (lambda: kv.KFAC(F, 0.1, rule="exact"), ValueError, "rule.*'eigen', 'factored'; got 'exact'"),
    "unknown convention": (lambda: kv.KFAC(F, 0.1, convention="sum"), ValueError, "'expand', 'reduce'; got 'sum'"),
    "factors, unknown convention": (lambda: F.factors(0, 1, "sum"), ValueError, "'expand', 'reduce'; got 'sum'"),
    "unknown correction": (lambda: kv.TwoLevel(A, M, Z, "bnn"), ValueError, "'additive', 'a-def1'.*got 'bnn'"),
    "KFAC of a matrix": (lambda: kv.KFAC(F.dense(), 0.1), TypeError, "F must be of type Fisher or KroneckerFactors"),
    "EKFAC of factors": (lambda: kv.EKFAC(F.kronecker(), 0.1), TypeError, "Fisher; got KroneckerFactors"),
    "tridiagonal of factors": (lambda: kv.BlockTridiagonal(F.kronecker(), 0.1), TypeError, "got KroneckerFactors"),
    "diagonal of a tensor": (lambda: kv.Diagonal(G, 0.1), TypeError, "operator must be of type Operator; got Tensor"),
    "blocks of a tensor": (lambda: kv.BlockDiagonal(G, 0.1), TypeError, "got Tensor"),
    "identity of a model": (lambda: kv.Identity(mlp(), 0.1), TypeError, "got Sequential"),
    "power": (lambda: kv.Diagonal(F, 0.1, power=-0.5), ValueError, "between 0 and 1; got -0.5"),
    "power by name": (lambda: kv.Diagonal(F, 0.1, power="half"), ValueError, "between 0 and 1; got 'half'"),
    "levels of two partitions": (lambda: kv.TwoLevel(A, kv.KFAC(OTHER, 0.1), Z), ValueError, "differ in partition"),
    "space of another partition": (
        lambda: kv.TwoLevel(A, M, kv.coarse.spectral(OTHER, 2)), ValueError, "differ in partition",
    ),
    "levels of two dtypes": (
        lambda: kv.TwoLevel(DOUBLE.damped(0.1), kv.KFAC(SINGLE, 0.1), kv.coarse.spectral(DOUBLE, 1)), ValueError,
        "Damped and KFAC differ in dtype: torch.float64 and torch.float32",
    ),
    "space of another dtype": (
        lambda: kv.TwoLevel(DOUBLE.damped(0.1), kv.KFAC(DOUBLE, 0.1), kv.coarse.spectral(SINGLE, 1)), ValueError,
        "differ in dtype",
    ),
    "coarse operator of another dtype": (
        lambda: kv.TwoLevel(
            DOUBLE.damped(0.1), kv.KFAC(DOUBLE, 0.1), kv.coarse.spectral(DOUBLE, 1), coarse_operator=SINGLE.damped(1.0)
        ),
        ValueError, "differ in dtype",
    ),
    "A is a tensor": (lambda: kv.TwoLevel(A.dense(), M, Z), TypeError, "A must be of type Operator; got Tensor"),
    "M is no preconditioner": (lambda: kv.TwoLevel(A, A, Z), TypeError, "M must be of type Preconditioner; got Damped"),
    "Z is a tensor": (lambda: kv.TwoLevel(A, M, Z.dense()), TypeError, "Z must be of type CoarseSpace; got Tensor"),
    "levels in the wrong order": (lambda: kv.TwoLevel(M, A, Z), TypeError, "M must be of type Preconditioner"),
    "spectral of a matrix": (lambda: kv.coarse.spectral(A, 2), TypeError, "spectral needs a Fisher.*got Damped"),
    "columns too short": (
        lambda: kv.CoarseSpace(F.partition, normal(50, 2)), ValueError, r"shape \(51, k\); got \(50, 2\)",
    ),
    "one column without an axis": (lambda: kv.CoarseSpace(F.partition, G), ValueError, r"got \(51,\)"),
    "integer columns": (lambda: kv.CoarseSpace(F.partition, torch.ones(51, 1).long()), TypeError, "torch.int64"),
    "columns of a list": (lambda: kv.CoarseSpace(F.partition, [[1.0]]), TypeError, "of type Tensor; got list"),
    "nan in a column": (
        lambda: kv.CoarseSpace(F.partition, with_value(G[:, None], torch.nan, 0)), ValueError, "layer 'body.one'",
    ),
    "restrict": (lambda: Z.restrict(G[:4]), ValueError, r"\(…, 51\).*got \(4,\)"),
    "restrict another dtype": (lambda: Z.restrict(G.float()), ValueError, "holds torch.float64.*is torch.float32"),
    "prolong": (lambda: Z.prolong(G), ValueError, r"\(…, 6\).*got \(51,\)"),
    "krylov of a matrix": (lambda: kv.coarse.krylov(A, M, A.dense(), 2), ValueError, r"\(51,\).*got \(51, 51\)"),
    "krylov of nan": (lambda: kv.coarse.krylov(A, M, G * torch.nan, 2), ValueError, "NaN or inf"),
    "optimal of a non-symmetric M": (
        lambda: kv.coarse.optimal(A, kv.TwoLevel(A, M, Z, "a-def1"), 1), ValueError, "'a-def1' is not symmetric",
    ),
    "dense of another shape": (
        lambda: kv.Dense(torch.eye(3), F.partition), ValueError, r"\(51, 51\) for 51 parameters.*got \(3, 3\)",
    ),
    "dense that is not symmetric": (
        lambda: kv.Dense(torch.ones(2, 2).tril(), kv.Partition.from_sizes([2])), ValueError, "not symmetric",
    ),
    "dense of integers": (
        lambda: kv.Dense(torch.eye(2).long(), kv.Partition.from_sizes([2])), TypeError, "torch.int64",
    ),
    "dense with nan": (
        lambda: kv.Dense(torch.diag(torch.tensor([1.0, torch.nan])), kv.Partition.from_sizes([1, 1], ["x", "y"])),
        ValueError, "layer 'y'",
    ),
    "indefinite matrix": (
        lambda: kv.BlockDiagonal(kv.Dense(-torch.eye(2), kv.Partition.from_sizes([2])), 2.0), ValueError,
        "block of layer '0' is not positive semi-definite.*-1 to -1",
    ),
    "indefinite coarse operator": (
        lambda: kv.CoarseCorrection(kv.Dense(-F.dense(), F.partition).damped(0.1), Z), ValueError, "indefinite",
    ),
    "singular coarse operator": (
        lambda: kv.CoarseCorrection(F.damped(0.0), kv.coarse.smooth(F, 2)), ValueError,
        "coarse operator is singular.*damping 0 does not mend it",
    ),
    "overflow": (lambda: kv.KFAC(SINGLE, 1e39), ValueError, "damping 1e.39 overflows torch.float32; choose a smaller"),
    "singular matrix": (lambda: F.damped(0.0).solve(G), ValueError, "singular.*choose a larger damping"),
    "loss of another shape": (
        lambda: kv.nll(torch.zeros(2, 3), torch.zeros(2, 2), "gaussian"), ValueError, r"\(2, 3\).*got \(2, 2\)",
    ),
    "loss in two dtypes": (
        lambda: kv.nll(torch.zeros(2, 3), torch.zeros(2, 3).double(), "gaussian"), TypeError, "torch.float64",
    ),
    "loss of nothing": (lambda: kv.nll(torch.zeros(0, 3), torch.zeros(0, 3), "gaussian"), ValueError, "batch is empty"),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_calls(name):
    call, error, words = CALLS[name]
    before = [F.dense(), A.dense(), M.dense(), Z.dense()]
    with pytest.raises(error, match=words):
        call()
    assert all(torch.equal(x, y.dense()) for x, y in zip(before, (F, A, M, Z), strict=True))


def test_a_refused_damping_leaves_a_two_level_preconditioner_as_it_was():
    dead = kv.capture(mlp((3, 2, 2)), torch.zeros(4, 3, dtype=torch.float64), likelihood="gaussian")
    T = kv.TwoLevel(dead.damped(0.1), kv.KFAC(dead, 0.1), kv.coarse.nicolaides(dead, 2))
    before = T.dense()
    with pytest.raises(ValueError, match="singular"):
        T.with_damping(0.0)
    assert torch.equal(T.dense(), before) and T.damping == T.A.damping == T.M.damping == T.Q.damping == 0.1
