"""What the exact step costs: in the space of the scores and in that of the parameters, where both can be had.

Multilayer perceptrons from some hundred parameters to the 2.8 million of the 2020 paper's autoencoder, one drawn label
for each example, double precision, median of three. ``residual`` is that of the system, ``apart`` the distance of
the two solutions.

    python tests/benchmarks exact [--device cuda]
"""

from __future__ import annotations

import statistics

import torch
from machine import arguments, clock, describe, write
from speed import WIDTHS, network

import kfac_viz as kv
from kfac_viz.method.operator import ParameterSpace
from kfac_viz.method.sample_space import SampleSpace

NETWORKS = {"16-20-10": (16, 20, 10), "64-40-40-10": (64, 40, 40, 10), "784-1000-500-250-30-…": WIDTHS}
EXAMPLES, DAMPING, ROUNDS, LARGEST = (128, 512), 1e-3, 3, 5000


def timed(function, device: str):
    """What it returns, and its time in seconds."""
    start = clock(device)
    found = function()
    if device != "cpu":
        torch.cuda.synchronize()
    return found, clock(device) - start


def row(name: str, widths: tuple[int, ...], examples: int, device: str) -> dict:
    torch.manual_seed(0)
    model, x = network(widths).double().to(device), torch.rand(examples, widths[0], dtype=torch.float64, device=device)
    times: dict[str, list[float]] = {}

    def measure(what: str, function):
        found, seconds = timed(function, device)
        times.setdefault(what, []).append(seconds)
        return found

    for _ in range(ROUNDS):
        generator = torch.Generator(device).manual_seed(0)
        F = measure("capture", lambda: kv.capture(model, x, likelihood="bernoulli", fisher="mc", generator=generator))  # noqa: B023
        g = F.pull(F.g[0].new_ones(1, examples)) / examples
        space = SampleSpace(F)
        v = measure("solve", lambda: space.solve(g, DAMPING))  # noqa: B023
        measure("spectrum", lambda: space.eigenvalues)  # noqa: B023
        measure("another_damping", lambda: space.solve(g, 10 * DAMPING))  # noqa: B023
        measure("norms", space.norms)
        claims = measure("layer_overlap", lambda: space.layer_overlap(DAMPING))  # noqa: B023
        other = None
        if F.partition.size <= LARGEST:
            other = measure("in_parameters", lambda: ParameterSpace(F).solve(g, DAMPING))  # noqa: B023
    apart = "" if other is None else f"{float((v - other).norm() / other.norm()):.1e}"
    residual = float((g - F.damped(DAMPING) @ v).norm() / g.norm())
    d = space.eigenvalues
    return {
        "network": name, "parameters": F.partition.size, "examples": examples,
        **{f"{what}_s": f"{statistics.median(t):.3g}" for what, t in times.items()},
        **({} if other is not None else {"in_parameters_s": ""}),
        "residual": f"{residual:.1e}", "apart": apart,
        "effective_dimension": f"{float((d / (d + DAMPING)).sum()):.4g}", "layer_overlap": f"{claims:.4g}",
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    options, machine = arguments(__doc__, argv), describe(arguments(__doc__, argv).device)
    rows = [row(name, widths, n, options.device) for name, widths in NETWORKS.items() for n in EXAMPLES]
    write(options.out / f"exact_{options.device}.csv", rows, machine)


if __name__ == "__main__":
    main()
