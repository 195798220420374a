"""What does damping do? The spectrum, the length of the step, and where the quadratic model can be trusted."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
from torch import Tensor

from ..method.kfac import KFAC
from ..parameters import Device, Range, Seed, check
from ..problems import Problem
from .curves import Curve, Study, by_key, captured, curve
from .setting import DAMPINGS, Data, Setting, Widths, setting
from .threads import one_thread

if TYPE_CHECKING:
    from numpy.typing import NDArray

METHODS = ("exact", "kfac", "factored")
QUANTITIES = ("length", "captured", "ratio", "decrease")
MOMENTS = ("at the start", "after training")


@dataclass(frozen=True, eq=False)
class DampingResult(Study):
    """Curves over λ, series ``moment, method``, at two moments of training.

    Quantities: ``length`` ‖v‖; ``captured``, the share of the best decrease of the damped quadratic model;
    ``ratio``, actual decrease of the loss over the decrease that the undamped model predicts; ``decrease``, the actual
    one as a share of the loss. K-FAC's directions are rescaled to their best length in the last two. Series of a
    moment alone: ``spectrum`` (x: rank), ``dimension`` Σ d/(d + λ), and ``gradient``, ‖g‖/λ.
    """

    size: int  # P


@one_thread()
def run_damping(
    *,
    damping: Annotated[float, DAMPINGS] = 1e-2,
    steps: Annotated[int, Range(1, 2000)] = 100,
    data: Data = "digits4",
    widths: Widths = (12, 12, 12),
    n: Annotated[int, Range(10, 1797)] = 500,
    repeats: Annotated[int, Range(1, 20)] = 5,
    seed: Seed = 0,
    device: Device = "cpu",
) -> DampingResult:
    """Follow spectrum, step and loss over all dampings, before and after training.

    Args:
        damping: λ, marked in the curves.
        steps: of Adam that count as training.
        data: which data, and with it the likelihood.
        widths: of the hidden layers.
        n: examples.
        repeats: networks, each with its own data and weights: seed, seed + 1, …
        seed: of the first of them.
        device: where to compute.
    """
    parameters = check(run_damping, locals())
    curves = _curves(data, tuple(widths), n, steps, repeats, seed, device)
    return DampingResult(parameters, curves, len(curves["spectrum", MOMENTS[0]].x))


def loss_after(problem: Problem, v: Tensor) -> float:
    """The loss once ``v`` (P,) is subtracted from the parameters of a copy; inf where it overflows."""
    twin = replace(problem, model=copy.deepcopy(problem.model))
    twin.partition.add_(twin.model, v, alpha=-1.0)
    with torch.no_grad():
        loss = float(twin.loss())
    return loss if np.isfinite(loss) else np.inf


@lru_cache(maxsize=4)
def _curves(data, widths, n, steps, repeats, seed, device) -> dict[tuple[str, str], Curve]:
    λs = np.array(DAMPINGS.positions[::2])

    def measure(seed: int) -> dict[tuple[str, str], NDArray]:
        found = {}
        for moment, step in zip(MOMENTS, (0, steps), strict=True):
            s = setting(data, widths, n, seed, step, "exact", device)
            d = s.F.eigen.d.flip(0).cpu().numpy()
            found["spectrum", moment] = d = np.where(d < 1e-12 * d[0], 0, d)
            found["dimension", moment] = (d / (d + λs[:, None])).sum(1)
            found["gradient", moment] = float(s.g.norm()) / λs
            for method in METHODS:
                for quantity, values in zip(QUANTITIES, _follow(s, method, λs), strict=True):
                    found[quantity, f"{moment}, {method}"] = values
        return found

    rows = by_key(measure(seed + r) for r in range(repeats))
    return {key: curve(1 + np.arange(len(y[0])) if key[0] == "spectrum" else λs, y) for key, y in rows.items()}


def _follow(s: Setting, method: str, λs: NDArray) -> NDArray:
    """QUANTITIES of one method at every λ, (4, n)."""
    F, g, now = s.F, s.g, float(s.problem.loss().detach())
    M = None if method == "exact" else KFAC(F, 1.0, "factored" if method == "factored" else "eigen")
    rows = []
    for λ in λs.tolist():
        A = F.damped(λ)
        v = A.solve(g) if M is None else M.with_damping(λ) @ g
        Av = A @ v
        best = v * float(g @ v) / float(v @ Av)
        undamped = float(g @ best) - 0.5 * float(best @ (F @ best))
        decrease = now - loss_after(s.problem, best)
        rows.append((float(v.norm()), captured(A, g, v)[0], decrease / undamped, decrease / now))
    return np.array(rows).T
