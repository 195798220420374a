"""How the cost of a step grows with width, depth, batch and coarse size, beside the counted limit.

Plain multilayer perceptrons with equal hidden layers, optimizers at the same schedule. The counted limit is the
time that the matrix products of a step would take at this machine's rate for large products. Every size is measured
in three rounds; the table has their median, least and largest.

    python tests/benchmarks growth [--device cuda]
"""

from __future__ import annotations

import statistics

import torch
from machine import arguments, clock, describe, rate, write
from speed import counted, network, peak_cuda, training_step

import kfac_viz as kv
from kfac_viz.studies.common.options import entry, remember

REFRESH = 20  # and half that between observations
CYCLE = 8  # steps between refreshes while measuring: kinds of steps are timed apart, and weighed by the above
ROUNDS = 3
BASE = {"width": 256, "depth": 8, "batch": 256, "per_layer": 4}
SWEEPS = {
    "cpu": {
        "width": (32, 64, 128, 256, 512, 1024),
        "depth": (4, 8, 16, 32, 64),
        "batch": (64, 128, 256, 512, 1024),
        "per_layer": (1, 2, 4, 8, 16),
    },
    "cuda": {
        "width": (128, 256, 512, 1024, 2048, 4096),
        "depth": (4, 8, 16, 32, 64),
        "batch": (128, 512, 2048, 8192),
        "per_layer": (1, 2, 4, 8, 16),
    },
}
METHODS = ("Adam", "K-FAC", "constants, additive", "leading, balanced")
COMMON = {
    "likelihood": "gaussian", "lr": 1e-4, "damping": 1.0, "step_rule": "fixed", "observe_every": CYCLE // 2,
    "refresh_every": CYCLE, "coarse_examples": 128, "coarse_window": 1,
}  # fmt: skip


def stepper(method: str, width: int, depth: int, batch: int, per_layer: int, device: str):
    torch.manual_seed(0)
    widths = (width,) * (depth + 1)
    model = network(widths).to(device)
    x = torch.rand(batch, width, device=device)
    advance = training_step(model, build(model, method, per_layer), "gaussian")
    return lambda: advance(x)


def given(method: str, per_layer: int) -> dict:
    """All options that :func:`build` gives to the optimizer of this name."""
    if method == "Adam":
        return {"lr": 1e-3}
    return (
        COMMON
        | {
            "K-FAC": {"per_layer": 0},
            "constants, additive": {"coarse": "nicolaides", "per_layer": 1, "correction": "additive"},
            "leading, balanced": {"per_layer": per_layer},
        }[method]
    )


def build(model: torch.nn.Module, method: str, per_layer: int) -> torch.optim.Optimizer:
    options = given(method, per_layer)
    return torch.optim.Adam(model.parameters(), **options) if method == "Adam" else kv.TwoLevelKFAC(model, **options)


def amortised(step, device: str) -> float:
    """Milliseconds per step of a cycle: medians of plain, observing and refreshing steps, weighed."""
    times: dict[str, list[float]] = {"plain": [], "observe": [], "refresh": []}
    for i in range(2 * CYCLE + 1):
        kind = "refresh" if i % CYCLE == 0 else "observe" if i % (CYCLE // 2) == 0 else "plain"
        start = clock(device)
        step()
        if i:  # the first step warms up
            times[kind].append(clock(device) - start)
    medians = {kind: statistics.median(found) for kind, found in times.items()}
    return 1e3 * ((REFRESH - 2) * medians["plain"] + medians["observe"] + medians["refresh"]) / REFRESH


def limit(method: str, width: int, depth: int, batch: int, per_layer: int) -> float:
    """Floating point operations of the products that a step cannot do without."""
    needed = counted((width,) * (depth + 1), batch)
    total = needed["gradient"]
    if method != "Adam":
        total += needed["apply"] + needed["observe"] + needed["refresh"]
    if method == "leading, balanced":
        total += needed["A, 128 examples"] * min(batch, 128) / 128
    return total


def configurations(device: str) -> list[dict]:
    """Every method at every size; the columns of a space concern the one method that has them."""
    return [
        {"axis": axis, "value": value, **BASE, axis: value, "method": method}
        for axis, values in SWEEPS[device].items()
        for value in values
        for method in METHODS
        if axis != "per_layer" or method == "leading, balanced"
    ]


def main(argv: list[str] | None = None) -> None:
    options = arguments(__doc__, argv)
    device = options.device
    machine, rates, rows = describe(device), [], configurations(device)
    times: list[list[float]] = [[] for _ in rows]
    for _ in range(ROUNDS):  # far apart in time, so that a busy minute shows as spread
        for row, found in zip(rows, times, strict=True):
            rates.append(rate(device, 4000 if device != "cpu" else 1000, repeats=3))
            step = stepper(row["method"], **{key: row[key] for key in BASE}, device=device)
            found.append(amortised(step, device))
            if device != "cpu":
                row["peak_mib"] = round(peak_cuda(step), 1)
    speed = statistics.median(rates)
    for row, found in zip(rows, times, strict=True):
        for name, pick in (("ms", statistics.median), ("low_ms", min), ("high_ms", max)):
            row[name] = round(pick(found), 3)
        opt = build(network((4, 3)), row["method"], row["per_layer"])
        row["options"] = remember(entry(opt, given(row["method"], row["per_layer"])), options.out)
        row["counted_ms"] = round(1e3 * limit(row["method"], **{key: row[key] for key in BASE}) / speed, 4)
    write(options.out / f"growth_{device}.csv", rows, machine | {"gflops": round(speed / 1e9, 1)})


if __name__ == "__main__":
    main()
