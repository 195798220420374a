"""Cost of a training step: two-level K-FAC against SGD, Adam, one-level K-FAC and the method as published.

The network of the 2020 paper's autoencoder, batch 512, curvature observed every 10 steps and refreshed every 20,
all in one process. A step's time is a median by kind of step (plain, observing, refreshing); the amortised mean
weighs the kinds as they occur. Steps of the methods take turns, so that a noisy moment hits all of them.

    python tests/benchmarks speed [--device cuda]
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path

import torch
from machine import arguments, clock, describe, rate, write
from torch import nn

import kfac_viz as kv

WIDTHS = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
BATCH, OBSERVE, REFRESH, CYCLES = 512, 10, 20, 2
COMMON = {
    "likelihood": "bernoulli",
    "lr": 1e-3,
    "damping": 0.1,
    "rule": "factored",
    "fisher": "mc",
    "observe_every": OBSERVE,
    "refresh_every": REFRESH,
    "coarse_window": 1,
    "momentum": 0.9,
    "step_rule": "fixed",
}
TWO_LEVEL = {
    "one-level K-FAC": {"per_layer": 0},
    "nicolaides additive": {"coarse": "nicolaides", "per_layer": 1, "correction": "additive"},
    "spectral-4 balanced, 128 examples": {"coarse": "spectral", "per_layer": 4, "coarse_examples": 128},
    "spectral-4 balanced, 512 examples": {"coarse": "spectral", "per_layer": 4, "coarse_examples": 512},
}
METHODS = ("SGD", "Adam", *TWO_LEVEL, "as published")


def network(widths: tuple[int, ...] = WIDTHS) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class AsPublished:
    """The arithmetic of the 2020 method done the direct way, for its cost: a full second backward pass for sampled
    labels, LU inverses, and every cross-layer product formed and summed for the coarse operator."""

    def __init__(self, model: nn.Module, damping: float = 0.1, decay: float = 0.95) -> None:
        self.model, self.damping, self.decay, self.steps = model, damping, decay, 0
        self.layers = [m for m in model if isinstance(m, nn.Linear)]
        self.a: dict[nn.Module, torch.Tensor] = {}
        self.g: dict[nn.Module, torch.Tensor] = {}
        self.A: dict[tuple[int, int], torch.Tensor] = {}
        self.G: dict[tuple[int, int], torch.Tensor] = {}
        for m in self.layers:
            m.register_forward_hook(lambda m, args, out: self.a.__setitem__(m, args[0].detach()))
            m.register_full_backward_hook(lambda m, gi, go: self.g.__setitem__(m, go[0].detach()))

    def observe(self, x: torch.Tensor) -> None:
        if self.steps % OBSERVE:
            return
        kept = [p.grad for p in self.model.parameters()]
        f = self.model(x)
        labels = torch.bernoulli(f.detach().sigmoid())
        kv.nll(f, labels, "bernoulli").backward()
        for p, grad in zip(self.model.parameters(), kept, strict=True):
            p.grad = grad
        a = [nn.functional.pad(self.a[m], (0, 1), value=1.0) for m in self.layers]
        g = [self.g[m] * len(x) for m in self.layers]
        for l in range(len(a)):
            for m in range(l, len(a)):
                for kept, v in ((self.A, a), (self.G, g)):
                    fresh = v[l].T @ v[m] / len(x)
                    kept[l, m] = fresh if (l, m) not in kept else kept[l, m].lerp(fresh, 1 - self.decay)

    @torch.no_grad()
    def step(self) -> None:
        L = range(len(self.layers))
        if self.steps % REFRESH == 0:
            root = self.damping**0.5
            self.inverses = []
            for l in L:
                A, G = (X[l, l] + root * torch.eye(len(X[l, l]), device=X[l, l].device) for X in (self.A, self.G))
                self.inverses.append((torch.linalg.inv(G), torch.linalg.inv(A)))
            E = torch.stack(
                [
                    torch.stack([self.A[min(l, m), max(l, m)].sum() * self.G[min(l, m), max(l, m)].sum() for m in L])
                    for l in L
                ]
            )
            sizes = torch.tensor([float(m.weight.numel() + m.bias.numel()) for m in self.layers], device=E.device)
            self.E = torch.linalg.inv(E + self.damping * sizes.diag())
        grads = [torch.cat([m.weight.grad, m.bias.grad[:, None]], dim=1) for m in self.layers]
        coarse = self.E @ torch.stack([V.sum() for V in grads])
        for m, V, (G, A), c in zip(self.layers, grads, self.inverses, coarse, strict=True):
            V = G @ V @ A + c
            m.weight.sub_(V[:, :-1], alpha=1e-3)
            m.bias.sub_(V[:, -1], alpha=1e-3)
        self.steps += 1


def method(name: str, device: str, widths: tuple[int, ...] = WIDTHS):
    """A function that makes one training step and the number of steps in a cycle."""
    torch.manual_seed(0)
    model = network(widths).to(device)
    if name == "SGD":
        opt = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    elif name == "Adam":
        opt = torch.optim.Adam(model.parameters(), lr=1e-3)
    elif name == "as published":
        opt = AsPublished(model)
    else:
        opt = kv.TwoLevelKFAC(model, **COMMON, **TWO_LEVEL[name])

    def step(x: torch.Tensor) -> None:
        for p in model.parameters():
            p.grad = None
        kv.nll(model(x), x, "bernoulli").backward()
        if hasattr(opt, "observe"):
            opt.observe(x)
        opt.step()
        if device != "cpu":
            torch.cuda.synchronize()

    return step


def counted(widths: tuple[int, ...] = WIDTHS, batch: int = BATCH) -> dict[str, float]:
    """Multiply-adds ×2 of the products that a step cannot do without, by what they are for."""
    layers = [(i + 1, o) for i, o in zip(widths[:-1], widths[1:], strict=True)]
    P = sum(i * o for i, o in layers)
    first = layers[0][0] * layers[0][1]  # nobody needs the gradient of the data
    cubes = sum(i**3 + o**3 for i, o in layers)
    return {
        "gradient": 2 * batch * (3 * P - first),
        "apply": sum(2 * (o * o * i + o * i * i) for i, o in layers),
        "observe": (2 * batch * (2 * P - first) + 2 * batch * sum(i * i + o * o for i, o in layers)) / OBSERVE,
        "refresh": cubes / REFRESH,
        "A, 128 examples": 2 * 2 * 128 * P,
        "A, 512 examples": 2 * 2 * 512 * P,
    }


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
    times: dict[str, dict[str, list[float]]] = {name: {"plain": [], "observe": [], "refresh": []} for name in METHODS}
    for i in range(REFRESH * CYCLES):
        kind = "refresh" if i % REFRESH == 0 else "observe" if i % OBSERVE == 0 else "plain"
        rates.append(rate(options.device, repeats=1))  # between the steps: what is left over on a shared machine
        for name in METHODS:
            start = clock(options.device)
            steps[name](x)
            times[name].setdefault(kind, []).append(1e3 * (clock(options.device) - start))
    limit, speed = counted(), statistics.median(rates)
    rows = []
    for name, found in times.items():
        plain, observe, refresh = (statistics.median(found[k][1:] or found[k]) for k in ("plain", "observe", "refresh"))
        if name in ("SGD", "Adam"):
            observe = refresh = plain
        needed = limit["gradient"]
        if name in TWO_LEVEL:
            needed += limit["apply"] + limit["observe"] + limit["refresh"]
            needed += sum(v for k, v in limit.items() if k.startswith("A,") and k[3:] in name)
        rows.append(
            {
                "method": name,
                "plain_ms": round(plain, 2),
                "observe_ms": round(observe, 2),
                "refresh_ms": round(refresh, 2),
                "amortised_ms": round(((REFRESH - 2) * plain + observe + refresh) / REFRESH, 2),
                "counted_ms": round(needed / speed * 1e3, 2) if name != "as published" else "",
                "peak_mib": round(peak_memory(name, options.device), 1),
            }
        )
    one = next(r for r in rows if r["method"] == "one-level K-FAC")
    for row in rows:
        row["times_one_level"] = round(row["amortised_ms"] / one["amortised_ms"], 3)
        row["memory_times_one_level"] = round(row["peak_mib"] / one["peak_mib"], 3)
    write(options.out / f"speed_{options.device}.csv", rows, machine | {"gflops": round(speed / 1e9, 1)})


if __name__ == "__main__":
    measure_memory(sys.argv[1])
