"""Cost of a training step: two-level K-FAC against SGD, Adam, one-level K-FAC and the method as published.

The network of the 2020 paper's autoencoder, batch 512, curvature observed every 10 steps and refreshed every 20,
all in one process. ``amortised_ms`` is the median over cycles of 20 steps of their mean, ``low_ms`` and ``high_ms``
the least and the largest; medians by kind of step (plain, observing, refreshing) stand beside it. Steps of the
methods take turns, so that a noisy moment hits all of them. ``counted_ms`` is the arithmetic of the products needed
at the machine's rate for a large square one; ``alone_ms`` the same products, each timed alone.

    python tests/benchmarks speed [--device cuda]
"""

from __future__ import annotations

import functools
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from machine import arguments, clock, describe, rate, write
from torch import nn

import kfac_viz as kv
from kfac_viz.studies.common.options import entry, remember

WIDTHS = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
BATCH, OBSERVE, REFRESH, CYCLES = 512, 10, 20, 9
COMMON = {
    "likelihood": "bernoulli",
    "lr": 1e-3,
    "damping": 0.1,
    "rule": "factored",
    "fisher": "mc",
    "observe_every": OBSERVE,
    "refresh_every": REFRESH,
    "coarse_window": 1,
    "coarse_examples": 128,
    "momentum": 0.9,
    "step_rule": "fixed",
}
TWO_LEVEL = {
    "one-level K-FAC": {"per_layer": 0},
    "nicolaides additive": {"coarse": "nicolaides", "per_layer": 1, "correction": "additive"},
    "spectral-4 balanced, 128 examples": {"coarse": "spectral", "per_layer": 4},
    "spectral-4 balanced, 512 examples": {"coarse": "spectral", "per_layer": 4, "coarse_examples": 512},
}
PUBLISHED = {"as published, eigenvectors": "eigen", "as published, LU inverses": "inverse"}
METHODS = ("SGD", "Adam", *TWO_LEVEL, *PUBLISHED)


def network(widths: tuple[int, ...] = WIDTHS) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class AsPublished:
    """The arithmetic of the authors' public code (github.com/ntselepidis/KFAC-Pytorch, ``optimizers/gkfac.py``),
    written anew for its cost.

    Sampled labels go through a full second backward pass; the products of every pair of layers are averaged. A
    refresh decomposes the factors (``eigen``, that code's default) or inverts them by LU, and sums every cross-layer
    block ``G ⊗ A`` with two matrix products. A step takes four or two products per layer, is clipped, and has
    momentum.
    """

    def __init__(self, model: nn.Module, solver: str, lr: float = 1e-3, damping: float = 0.1) -> None:
        self.model, self.solver, self.lr, self.damping, self.steps = model, solver, lr, damping, 0
        self.layers = [m for m in model if isinstance(m, nn.Linear)]
        self.a, self.g, self.means = {}, {}, {}
        self.buffers = [torch.zeros_like(p) for p in model.parameters()]
        for m in self.layers:
            m.register_forward_pre_hook(lambda m, args: self.a.__setitem__(m, args[0].detach()))

    def backward(self, x: torch.Tensor) -> None:
        """The gradient, and when it is due the averages, from one forward pass."""
        f, outputs = x, []
        for m in self.model:
            f = m(f)
            outputs += [f] if isinstance(m, nn.Linear) else []
        loss = kv.nll(f, x, "bernoulli")
        if self.steps % OBSERVE == 0:
            handles = [
                f.register_hook(lambda grad, m=m: self.g.__setitem__(m, grad.detach()))
                for m, f in zip(self.layers, outputs, strict=True)
            ]
            labels = torch.bernoulli(f.detach().sigmoid())
            kv.nll(f, labels, "bernoulli").backward(retain_graph=True)
            self.average(len(x))
            for handle in handles:
                handle.remove()
            for p in self.model.parameters():
                p.grad = None
        loss.backward()

    @torch.no_grad()
    def average(self, N: int) -> None:
        a = [nn.functional.pad(self.a[m], (0, 1), value=1.0) for m in self.layers]
        g = [self.g[m] * N for m in self.layers]
        for l in range(len(a)):
            for m in range(l + 1):
                for which, fresh in (("A", a[l].T @ (a[m] / N)), ("G", g[l].T @ (g[m] / N))):
                    kept = self.means.get((which, l, m))
                    self.means[which, l, m] = fresh if kept is None else kept.lerp_(fresh, 0.05)

    @torch.no_grad()
    def step(self) -> None:
        if self.steps % REFRESH == 0:
            self.refresh()
        grads = [torch.cat([m.weight.grad, m.bias.grad[:, None]], dim=1) for m in self.layers]
        coarse = self.E @ torch.stack([V.sum() for V in grads])
        steps = [self.fine(l, V) + c for l, (V, c) in enumerate(zip(grads, coarse, strict=True))]
        form = self.lr**2 * sum(float((V * v).sum()) for V, v in zip(grads, steps, strict=True))
        scale = min(1.0, (1e-3 / form) ** 0.5) if form > 0 else 1.0
        along = [part for v in steps for part in (v[:, :-1], v[:, -1])]
        for p, buffer, v in zip(self.model.parameters(), self.buffers, along, strict=True):
            p.sub_(buffer.mul_(0.9).add_(v, alpha=scale), alpha=self.lr)
        self.steps += 1

    def fine(self, l: int, V: torch.Tensor) -> torch.Tensor:
        (X, Y), weights = self.factors[l], self.weights[l]
        return X @ V @ Y if weights is None else X @ ((X.T @ V @ Y) * weights) @ Y.T

    def refresh(self) -> None:
        self.factors, self.weights = [], []
        L = range(len(self.layers))
        for l in L:
            A, G = self.means["A", l, l], self.means["G", l, l]
            if self.solver == "eigen":
                (d_A, U_A), (d_G, U_G) = torch.linalg.eigh(A), torch.linalg.eigh(G)
                self.factors.append((U_G, U_A))
                self.weights.append(1 / (d_G.clamp_min(0)[:, None] * d_A.clamp_min(0) + self.damping))
            else:
                damped = [X + self.damping**0.5 * torch.eye(len(X), device=X.device) for X in (G, A)]
                self.factors.append(tuple(torch.linalg.inv(X) for X in damped))
                self.weights.append(None)
        E = torch.zeros(len(L), len(L), device=self.means["A", 0, 0].device)
        for l in L:
            for m in range(l + 1):
                A, G = self.means["A", l, m], self.means["G", l, m]
                E[l, m] = E[m, l] = (G @ A.new_ones(G.shape[1], len(A)) @ A).sum()
        self.E = torch.linalg.inv(E + self.damping * torch.eye(len(L), device=E.device))


def method(name: str, device: str) -> Callable[[torch.Tensor], None]:
    """A function that makes one training step."""
    torch.manual_seed(0)
    model = network().to(device)
    return training_step(model, build(model, name), "bernoulli")


def given(name: str) -> dict:
    """All options that :func:`build` gives to the optimizer of this name."""
    if name in TWO_LEVEL:
        return COMMON | TWO_LEVEL[name]
    own = {"Adam": {"lr": 1e-3}, "SGD": {"lr": 1e-3, "momentum": 0.9}}
    return own.get(name) or {"solver": PUBLISHED[name]}


def build(model: nn.Sequential, name: str):
    if name in PUBLISHED:
        return AsPublished(model, **given(name))
    if name in TWO_LEVEL:
        return kv.TwoLevelKFAC(model, **given(name))
    return getattr(torch.optim, name)(model.parameters(), **given(name))


def training_step(model: nn.Module, opt, likelihood: str) -> Callable[[torch.Tensor], None]:
    """One step of ``opt`` on a batch that is its own target, finished when the function returns."""

    def step(x: torch.Tensor) -> None:
        for p in model.parameters():
            p.grad = None
        if isinstance(opt, AsPublished):
            opt.backward(x)
        else:
            kv.nll(model(x), x, likelihood).backward()
        if isinstance(opt, kv.TwoLevelKFAC):
            opt.observe(x)
        opt.step()
        if x.is_cuda:
            torch.cuda.synchronize()

    return step


Products = list[tuple[int, int, int]]  # (rows, inner, columns) of a matrix product


def needed(widths: tuple[int, ...] = WIDTHS, batch: int = BATCH) -> dict[str, tuple[float, Products]]:
    """The products that a step cannot do without, by what they are for, and how often per step they are due.

    A Cholesky inverse of n rows takes n³ multiply-adds and additions: half a product.
    """
    layers = [(i + 1, o) for i, o in zip(widths[:-1], widths[1:], strict=True)]
    forward = [(batch, i, o) for i, o in layers]
    back = [(batch, o, i) for i, o in layers[1:]]  # nobody needs the gradient of the data
    gradients = [(o, batch, i) for i, o in layers]
    grams = [shape for i, o in layers for shape in ((i, batch, i), (o, batch, o))]

    def with_A(n: int) -> Products:
        return [shape for i, o in layers for shape in ((o, n, i), (n, i, o))]

    return {
        "gradient": (1, forward + back + gradients),
        "apply": (1, [shape for i, o in layers for shape in ((o, i, i), (o, o, i))]),
        "observe": (1 / OBSERVE, forward + back + grams),
        "refresh": (0.5 / REFRESH, [(n, n, n) for layer in layers for n in layer]),
        "A, 128 examples": (1, with_A(128)),
        "A, 512 examples": (1, with_A(512)),
    }


def counted(widths: tuple[int, ...] = WIDTHS, batch: int = BATCH) -> dict[str, float]:
    """Floating point operations per step of :func:`needed`."""
    found = needed(widths, batch).items()
    return {what: often * sum(2 * m * k * n for m, k, n in shapes) for what, (often, shapes) in found}


def alone(device: str) -> dict[str, float]:
    """Milliseconds per step of :func:`needed`, each product timed by itself at its own shape, in place."""
    return {
        what: often * sum(1e3 * _time_product(shape, device) for shape in shapes)
        for what, (often, shapes) in needed().items()
    }


@functools.cache
def _time_product(shape: tuple[int, int, int], device: str, repeats: int = 15) -> float:
    m, k, n = shape
    x, y, out = (torch.rand(size, device=device) for size in ((m, k), (k, n), (m, n)))
    times = []
    for _ in range(repeats):
        start = clock(device)
        torch.mm(x, y, out=out)
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(clock(device) - start)
    return statistics.median(times)


def high_water() -> float:
    """Largest resident size of this process so far, MiB (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def peak_cuda(step) -> float:
    """Largest memory on the device during a cycle, MiB, all told."""
    torch.cuda.reset_peak_memory_stats()
    for _ in range(REFRESH):
        step()
    return torch.cuda.max_memory_allocated() / 2**20


def peak_memory(name: str, device: str) -> float:
    """MiB of a training run: on a CPU above what Python and PyTorch take, in a process of its own."""
    if device == "cpu":
        command = [sys.executable, __file__, name]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    torch.cuda.empty_cache()
    step, x = method(name, device), torch.rand(BATCH, WIDTHS[0], device=device)
    return peak_cuda(lambda: step(x))


def measure_memory(name: str) -> None:
    """Run some steps in this process and print its high-water mark."""
    torch.ones(100, 100) @ torch.ones(100, 100)
    before, x = high_water(), torch.rand(BATCH, WIDTHS[0])
    step = method(name, "cpu")
    for _ in range(OBSERVE + 2):
        step(x)
    print(high_water() - before)


def main(argv: list[str] | None = None) -> None:
    options = arguments(__doc__, argv)
    x = torch.rand(BATCH, WIDTHS[0], generator=torch.Generator().manual_seed(0)).to(options.device)
    machine, rates = describe(options.device), []
    steps = {name: method(name, options.device) for name in METHODS}
    times = {name: torch.zeros(CYCLES + 1, REFRESH) for name in METHODS}
    for i in range(REFRESH * (CYCLES + 1)):
        rates.append(rate(options.device, repeats=1))  # between the steps: what is left over on a shared machine
        for name in METHODS:
            start = clock(options.device)
            steps[name](x)
            times[name].view(-1)[i] = 1e3 * (clock(options.device) - start)
    limit, products, speed = counted(), alone(options.device), statistics.median(rates)
    rows = []
    for name, found in times.items():
        cycles = found[1:]  # the first warms up
        plain = cycles[:, [k for k in range(REFRESH) if k % OBSERVE]]
        row = {"plain_ms": plain.median(), "observe_ms": cycles[:, OBSERVE].median()}
        row |= {"refresh_ms": cycles[:, 0].median(), "amortised_ms": cycles.mean(1).median()}
        row |= {"low_ms": cycles.mean(1).min(), "high_ms": cycles.mean(1).max()}
        purposes = ["gradient"]
        if name in TWO_LEVEL:
            purposes += ["apply", "observe", "refresh"]
            purposes += [key for key in limit if key.startswith("A,") and key[3:] in name]
        row |= {"counted_ms": 1e3 * sum(limit[key] for key in purposes) / speed}
        row |= {"alone_ms": sum(products[key] for key in purposes)}
        rows.append({"method": name} | {key: round(float(value), 2) for key, value in row.items()})
        if name in PUBLISHED:  # not counted: what it needs is what the others show
            rows[-1] |= {"counted_ms": "", "alone_ms": ""}
    one = next(r for r in rows if r["method"] == "one-level K-FAC")
    for row in rows:
        row["peak_mib"] = round(peak_memory(row["method"], options.device), 1)
    for row in rows:
        opt = build(network((4, 3)), row["method"])
        row["options"] = remember(entry(opt, given(row["method"])), options.out)
        row["times_one_level"] = round(row["amortised_ms"] / one["amortised_ms"], 3)
        row["memory_times_one_level"] = round(row["peak_mib"] / one["peak_mib"], 3)
    write(options.out / f"speed_{options.device}.csv", rows, machine | {"gflops": round(speed / 1e9, 1)})


if __name__ == "__main__":
    measure_memory(sys.argv[1])
