"""Small networks of every kind, and oracles that share no code with the package."""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev

import kfac_viz as kv

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")),
]
LIKELIHOODS = ("categorical", "bernoulli", "gaussian")
SPACES = kv.coarse.SPACES
CORRECTIONS = ("additive", "a-def1", "a-def2", "balanced")


def benchmark(name: str) -> ModuleType:
    """A module of tests/benchmarks, which import one another by their plain names."""
    folder = str(Path(__file__).parent / "benchmarks")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)


def error(found: Tensor, expected: Tensor) -> float:
    """Largest deviation, relative to the largest expected entry."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    if not expected.numel():
        return 0.0
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-300))


def assert_close(found: Tensor, expected: Tensor, tol: float = 1e-12) -> None:
    assert error(found, expected) <= tol, f"deviation {error(found, expected):.2e} > {tol:g}"


# ---- networks ----------------------------------------------------------------------------------------


def mlp(widths=(4, 5, 3), activation: Callable = nn.Tanh, bias: bool | tuple = True, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    biases = bias if isinstance(bias, tuple) else (bias,) * (len(widths) - 1)
    modules: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        modules += [nn.Linear(fan_in, fan_out, bias=biases[i]), activation()]
    return nn.Sequential(*modules[:-1]).double().eval()


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Model(nn.Module):
    """Modules and parameters by name, and a forward pass written as a function of them and the inputs."""

    def __init__(self, run: Callable[..., Tensor], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)
        self.run = run

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.run(self, *inputs)


class Residual(nn.Module):
    """A nested module with a skip connection, an in-place activation and a functional call."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"one": nn.Linear(4, 4), "two": nn.Sequential(nn.Linear(4, 4, bias=False))})
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu_(self.body["one"](x))
        return self.head(torch.sin(x + self.body["two"](h)))


class CalledTwice(nn.Module):
    """One Linear used at two depths: its score is the sum of two outer products."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(torch.tanh(self.inner(input=x)))))


class Positions(nn.Module):
    """Shared along an extra axis, then pooled: T positions of one example."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.each, self.also, self.head = nn.Linear(3, 3), nn.Linear(3, 2, bias=False), nn.Linear(2, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.also(torch.tanh(self.each(x)))).mean(1))


class Sequence(nn.Module):
    """Outputs at every position: the likelihood is summed over them."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.each(x)))


def conv(padding: int | str = 1, padding_mode: str = "zeros") -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
        nn.Tanh(),
        nn.Conv2d(3, 2, 2, bias=False, padding=padding, padding_mode=padding_mode),
        nn.Tanh(),
        nn.Flatten(),
        nn.LazyLinear(3),
    )


def batch_norm() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(5, 3))
    model.train()
    for seed in range(3):  # statistics that are neither 0 nor 1
        model.float()(normal(16, 4, seed=seed).float() * 2 + 1)
    return model


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (4,)

    def make(self, n: int = 5) -> tuple[nn.Module, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            model, inputs = self.build(), normal(n, *self.shape)
            model.to(torch.float32)(inputs.float())  # gives lazy layers their shape
        return model.double().eval(), inputs


ZOO = {
    "tanh": Case(mlp),
    "relu, no bias": Case(lambda: mlp(activation=nn.ReLU, bias=False)),
    "sigmoid, some bias": Case(lambda: mlp((4, 3, 2, 3), nn.Sigmoid, (True, False, True))),
    "one layer": Case(lambda: mlp((4, 3))),
    "width 1": Case(lambda: mlp((4, 1, 3), bias=(False, True))),
    "in-place relu": Case(lambda: mlp(activation=lambda: nn.ReLU(inplace=True))),
    "residual": Case(Residual),
    "called twice": Case(CalledTwice),
    "positions, T² > S": Case(lambda: Positions(3), (2, 3)),
    "positions, T² ≤ S": Case(lambda: Positions(5), (2, 3)),
    "two extra axes": Case(lambda: nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)), (2, 2, 3)),
    "sequence": Case(Sequence, (2, 3)),
    "conv": Case(conv, (2, 5, 5)),
    "conv, circular": Case(lambda: conv("same", "circular"), (2, 5, 5)),
    "batch norm, dropout": Case(batch_norm),
}


def targets_for(outputs: Tensor, likelihood: str, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if likelihood == "categorical":
        return torch.randint(0, outputs.shape[-1], outputs.shape[:-1], generator=generator).to(outputs.device)
    y = torch.rand(outputs.shape, generator=generator, dtype=torch.float64).to(outputs.device)
    return y if likelihood == "bernoulli" else 3 * y - 1


def captured(case: str = "tanh", n: int = 5, likelihood: str = "categorical", fisher: str = "exact", **options):
    """The Fisher of one network of the zoo; warnings about parameters outside it are not the subject."""
    model, inputs = ZOO[case].make(n)
    if fisher == "empirical":
        options["targets"] = targets_for(model(inputs).detach(), likelihood)
    return kv.capture(model, inputs, likelihood=likelihood, fisher=fisher, **options)


def space(name: str, A, M, g: Tensor, per_layer: int, F=None):
    """Any coarse space through one call."""
    if name == "krylov":
        return kv.coarse.krylov(A, M, g, per_layer)
    if name == "optimal":
        return kv.coarse.optimal(A, M, per_layer)
    return getattr(kv.coarse, name)(A.operator if F is None else F, per_layer)


# ---- oracles: one example at a time, by autodiff -----------------------------------------------------


def loss(outputs: Tensor, target: Tensor, likelihood: str) -> Tensor:
    """Negative log-likelihood of one example, written out."""
    if likelihood == "categorical":
        return (outputs.logsumexp(-1) - outputs.gather(-1, target[..., None])[..., 0]).sum()
    if likelihood == "bernoulli":
        return (torch.log1p(outputs.exp()) - target * outputs).sum()
    return ((target - outputs) ** 2).sum() / 2


def _rows(tree: dict[str, Tensor], names, lead: int) -> Tensor:
    """Derivatives by parameter, laid out as [W b] row-major, layer after layer."""
    pieces = []
    for name in names:
        W, b = tree[f"{name}.weight"], tree.get(f"{name}.bias")
        if W.ndim == lead + 1:  # a norm: scale, then shift
            pieces += [W, b]
            continue
        W = W.flatten(lead + 1)
        pieces.append((W if b is None else torch.cat([W, b[..., None]], dim=-1)).flatten(lead))
    return torch.cat(pieces, dim=-1)


def jacobian(model: nn.Module, inputs: Tensor, names) -> Tensor:
    """d outputs / d parameters, (N, outputs, P)."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def outputs(parameters, x):
        return functional_call(model, parameters, (x[None],))[0].flatten()

    return torch.stack([_rows(jacrev(outputs)(parameters, x), names, lead=1) for x in inputs])


def output_hessian(outputs: Tensor, likelihood: str) -> Tensor:
    """Second derivatives of the loss by the outputs, (N, outputs, outputs): for these losses, the Fisher there."""
    targets = targets_for(outputs, likelihood)
    return torch.stack(
        [
            hessian(lambda f, y=y, shape=f.shape: loss(f.view(shape), y, likelihood))(f.flatten())
            for f, y in zip(outputs.detach(), targets, strict=True)
        ]
    )


def exact_fisher(model: nn.Module, inputs: Tensor, likelihood: str, names) -> Tensor:
    """``(1/N) Σ_n J_nᵀ H_n J_n``, (P, P)."""
    J, H = jacobian(model, inputs, names), output_hessian(model(inputs), likelihood)
    return torch.einsum("nap,nab,nbq->pq", J, H, J) / len(inputs)


def empirical_fisher(model: nn.Module, inputs: Tensor, targets: Tensor, likelihood: str, names) -> Tensor:
    """Mean over examples of gradient times gradient transposed, (P, P)."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def one(parameters, x, y):
        return loss(functional_call(model, parameters, (x[None],))[0], y, likelihood)

    scores = torch.stack(
        [_rows(grad(one)(parameters, x, y), names, lead=0) for x, y in zip(inputs, targets, strict=True)]
    )
    return scores.T @ scores / len(inputs)


def blocks(partition: kv.Partition, matrix: Tensor) -> list[list[Tensor]]:
    return [[matrix[a, b] for b in partition.slices] for a in partition.slices]


def fisher_by_backward(model: nn.Module, inputs: Tensor, partition: kv.Partition, likelihood: str) -> Tensor:
    """``(1/N) Σ_n J_nᵀ H_n J_n`` as the layers of a partition have it, from ``backward()`` of one output at a time."""
    rows = []
    for x in inputs:
        for output in model(x[None]).flatten():
            model.zero_grad()
            output.backward(retain_graph=True)
            for p in model.parameters():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            rows.append(partition.pack_grad(model))
    model.zero_grad()
    J, H = torch.stack(rows).unflatten(0, (len(inputs), -1)), output_hessian(model(inputs), likelihood)
    return torch.einsum("nap,nab,nbq->pq", J, H, J) / len(inputs)


# ---- saved optimizers --------------------------------------------------------------------------------


def opened(state: dict) -> dict:
    """A saved state whose curvature is unpacked, so that a test can change it, under the key of earlier versions."""
    groups = [group | {"curvature": None} for group in state["param_groups"]]
    packed = io.BytesIO(state["param_groups"][0]["curvature"][0].cpu().numpy().tobytes())
    return {"state": state["state"], "param_groups": groups, "curvature": torch.load(packed, weights_only=True)}
