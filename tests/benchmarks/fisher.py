"""Cost of looking at a network: the dense exact Fisher, one product, a new damping, and the import.

The dense Fisher of digits networks (500 examples, 10 classes) is measured against ``vmap(jacrev)`` followed by
JᵀHJ, and against curvlinops' dense GGN. Contestants take turns in one process, after a warm-up; times are medians.
On a CPU everybody has one thread and processor time is measured, so that other work on the machine counts little.

    python tests/benchmarks fisher [--device cuda]
"""

from __future__ import annotations

import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from machine import arguments, describe, write
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

import kfac_viz as kv

NETWORKS = ({"side": 4, "widths": (12, 12, 12)}, {"side": 8, "widths": (14, 14, 14)})
EXAMPLES = 500


def milliseconds(contestants: dict[str, Callable[[], object]], device: str, turns: int = 7) -> dict[str, list[float]]:
    """Times of calls that take turns: one to warm up, then as many as fit into 0.2 s, at least one."""

    def now() -> float:
        if device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    times: dict[str, list[float]] = {name: [] for name in contestants}
    gc.collect()
    gc.freeze()
    for _ in range(turns):
        for name, call in contestants.items():
            call()
            gc.collect()  # what one leaves behind is not paid by another
            gc.disable()
            end = time.perf_counter() + 0.2
            while True:
                start = now()
                call()
                times[name].append(1e3 * (now() - start))
                if time.perf_counter() > end:
                    break
            gc.enable()
    return times


def by_jacobians(problem: kv.problems.Problem) -> Tensor:
    """``(1/N) Σ JᵀHJ`` from the Jacobian of every example, in the order of the parameters."""
    parameters = {name: p.detach() for name, p in problem.model.named_parameters()}

    def outputs(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(problem.model, parameters, (x,))

    J = vmap(jacrev(outputs), (None, 0))(parameters, problem.inputs)
    J = torch.cat([block.flatten(2) for block in J.values()], dim=2)
    p = problem.model(problem.inputs).detach().softmax(1)
    root = p.sqrt()[..., None] * (torch.eye(p.shape[1], dtype=p.dtype, device=p.device) - p[:, None, :])
    rows = (root @ J).flatten(0, 1)
    return rows.T @ rows / len(p)


def by_curvlinops(problem: kv.problems.Problem) -> Tensor:
    """The dense GGN of curvlinops: their operator times the identity."""
    from curvlinops import GGNLinearOperator

    data = [(problem.inputs, problem.targets)]
    parameters = list(problem.model.parameters())
    operator = GGNLinearOperator(problem.model, nn.CrossEntropyLoss(), parameters, data, check_deterministic=False)
    return operator @ torch.eye(operator.shape[0], dtype=problem.inputs.dtype, device=problem.inputs.device)


def slide(T: kv.TwoLevel, g: Tensor, damping: float) -> None:
    """All that a panel shows of a new damping, except the full spectrum."""
    T = T.with_damping(damping)
    A, M = T.A, T.M
    directions = (g, M @ g, T @ g, A.solve(g))
    for v in directions:
        kv.captured_decrease(A, g, v)
    M.dense()
    T.contribution()


def contestants(problem: kv.problems.Problem) -> dict[str, Callable[[], Tensor]]:
    """Three ways to the dense exact Fisher; the norms say that it is the same matrix."""
    calls = {
        "kfac_viz: capture and dense": lambda: problem.capture().dense(),
        "vmap(jacrev), then JᵀHJ": lambda: by_jacobians(problem),
        "curvlinops dense GGN": lambda: by_curvlinops(problem),
    }
    norms = torch.stack([call().norm() for call in calls.values()])
    torch.testing.assert_close(norms, norms[:1].expand_as(norms))
    return calls


def parts(problem: kv.problems.Problem) -> dict[str, Callable[[], object]]:
    F, g = problem.capture(), problem.gradient()
    A = F.damped(1e-2)
    T = kv.TwoLevel(A, kv.KFAC(F, 1e-2), kv.coarse.spectral(F, 4), "balanced")
    A.solve(g)  # the eigenvectors of F and the coarse columns, which every damping shares
    T.contribution()
    dampings = iter(10 ** torch.linspace(-6, 2, 100_000).double())
    return {
        "capture": problem.capture,
        "dense alone": F.dense,
        "F @ v": lambda: F @ g,
        "T @ g": lambda: T @ g,
        "T.with_damping": lambda: T.with_damping(float(next(dampings))),
        "a new damping, all that is shown": lambda: slide(T, g, float(next(dampings))),
    }


def import_times(repeats: int = 9) -> dict[str, list[float]]:
    """Processor time in fresh processes: torch, and what kfac_viz costs on top of it."""
    code = (
        "from time import process_time as now; a = now(); import torch; b = now(); import kfac_viz; c = now(); "
        "print(1e3 * (b - a), 1e3 * (c - b))"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, check=True) for _ in range(repeats)]
    before, after = zip(*(map(float, run.stdout.split()) for run in runs), strict=True)
    return {"import torch": list(before), "import kfac_viz after torch": list(after)}


def main(argv: list[str] | None = None) -> None:
    options = arguments(__doc__, argv)
    torch.set_num_threads(1)
    rows: list[dict] = []

    def report(what: str, times: dict[str, list[float]], compare: bool, **facts: object) -> None:
        ours = statistics.median(next(iter(times.values())))
        for method, values in times.items():
            median = statistics.median(values)
            rows.append(
                {
                    "what": what,
                    **facts,
                    "method": method,
                    "median_ms": f"{median:.3g}",
                    "fastest_ms": f"{min(values):.3g}",
                    "times_ours": f"{median / ours:.1f}" if compare else "",
                    "repeats": len(values),
                }
            )

    for dtype in (torch.float64, torch.float32):
        for network in NETWORKS:
            problem = kv.problems.digits(n=EXAMPLES, dtype=dtype, device=options.device, **network)
            facts = {"parameters": problem.partition.size, "dtype": str(dtype).removeprefix("torch.")}
            report("dense Fisher", milliseconds(contestants(problem), options.device), True, **facts)
            report("parts", milliseconds(parts(problem), options.device), False, **facts)
    report("import", import_times(), False, parameters="", dtype="")
    write(options.out / f"fisher_{options.device}.csv", rows, describe(options.device))


if __name__ == "__main__":
    main()
