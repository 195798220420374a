"""What an observation and a refresh cost with each of four Kronecker products, beside K-FAC's.

The 2020 paper's autoencoder has one position per example in each layer; the two smaller networks have several. Medians
over rounds in which the four take turns, single precision.

Where each layer has one position, products of matrices are nearly all of the cost. In units of 2N, for N examples,
layers with ``i`` inputs and ``o`` outputs, and one sampled label, K-FAC's observation takes ``Σ 2io`` for the forward
and the backward pass, less the first layer's part of the latter, and ``Σ (i² + o²)`` for A and G. The two nearest
products need a quadratic form of each input and each vector as well. Their matrices are symmetric, or have triangular
roots, so that half of ``Σ (i² + o²)`` is enough. For the autoencoder that makes 1.29 times K-FAC's products: a ratio of
1.3 leaves a hundredth for all else. In strips of 96 columns the half comes to 0.56, and the ratio to 1.32.

    python tests/benchmarks products [--device cuda]
"""

from __future__ import annotations

import statistics

import torch
from machine import arguments, clock, describe, write
from speed import BATCH, WIDTHS, network
from training import PROBLEMS

import kfac_viz as kv
from kfac_viz.method.products import FACTORS

ROUNDS = 15


def cases(device: str) -> dict[str, tuple[torch.nn.Module, torch.Tensor, str]]:
    """Model, batch and likelihood, by network."""
    torch.manual_seed(0)
    found = {"autoencoder 784-1000-…": (network().to(device), torch.rand(BATCH, WIDTHS[0], device=device), "bernoulli")}
    for name in ("classifier", "convolutional", "attention"):
        problem = PROBLEMS[name](0).to(device, torch.float32)
        found[name] = problem.model, problem.inputs[:BATCH], problem.likelihood
    return found


def measured(model: torch.nn.Module, x: torch.Tensor, likelihood: str, device: str) -> dict[str, tuple[float, float]]:
    """Milliseconds of an observation and of a refresh, for each product; the optimizer takes no steps."""
    optimizers = {
        rule: kv.TwoLevelKFAC(model, likelihood=likelihood, factors=rule, observe_every=1, refresh_every=1)
        for rule in FACTORS
    }
    times: dict[str, tuple[list[float], list[float]]] = {rule: ([], []) for rule in FACTORS}
    for _ in range(ROUNDS + 2):
        for rule, opt in optimizers.items():
            for found, act in zip(times[rule], (lambda: opt.observe(x), lambda: opt.preconditioner), strict=True):  # noqa: B023
                start = clock(device)
                act()
                if device != "cpu":
                    torch.cuda.synchronize()
                found.append(1e3 * (clock(device) - start))
            opt.curvature.step += 1
    return {rule: tuple(statistics.median(t[2:]) for t in both) for rule, both in times.items()}  # the first warm up


def main(argv: list[str] | None = None) -> None:
    options, rows = arguments(__doc__, argv), []
    for name, (model, x, likelihood) in cases(options.device).items():
        found = measured(model, x, likelihood, options.device)
        observation, refresh = found["kfac"]
        for rule, (observe, renew) in found.items():
            rows.append({
                "network": name, "examples": len(x), "factors": rule,
                "observe_ms": round(observe, 2), "refresh_ms": round(renew, 2),
                "observe_times_kfac": round(observe / observation, 2), "refresh_times_kfac": round(renew / refresh, 2),
            })  # fmt: skip
    write(options.out / f"products_{options.device}.csv", rows, describe(options.device))


if __name__ == "__main__":
    main()
