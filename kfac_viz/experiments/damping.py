"""What does damping do? The spectrum, the length of the step, and where the quadratic model can be trusted."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
from torch import Tensor

from ..parameters import Device, Range, Seed
from ..preconditioner import KFAC
from ..problems import Problem
from .curves import Study, captured, curve
from .setting import Data, Setting, Widths, setting
from .threads import one_thread

if TYPE_CHECKING:
    from numpy.typing import NDArray

DAMPINGS = Range(1e-4, 1e2, log=True, steps=61)  # the positions of the slider; every second carries the curves
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
    parameters = dict(locals())
    with one_thread():
        curves, size = _curves(data, tuple(widths), n, steps, repeats, seed, device)
    return DampingResult(parameters, curves, size)


def loss_after(problem: Problem, v: Tensor) -> float:
    """The loss once ``v`` (P,) is subtracted from the parameters of a copy; inf where it overflows."""
    twin = replace(problem, model=copy.deepcopy(problem.model))
    twin.partition.add_(twin.model, v, alpha=-1.0)
    with torch.no_grad():
        loss = float(twin.loss())
    return loss if np.isfinite(loss) else np.inf


@lru_cache(maxsize=4)
def _curves(data, widths, n, steps, repeats, seed, device):
    λs = np.array(DAMPINGS.positions[::2])
    found: dict[tuple[str, str], list] = {}
    for moment, step in zip(MOMENTS, (0, steps), strict=True):
        for r in range(repeats):
            s = setting(data, widths, n, seed + r, step, "exact", device)
            d = s.F.eigen.d.flip(0).cpu().numpy()
            d = np.where(d < 1e-12 * d[0], 0, d)
            found.setdefault(("spectrum", moment), []).append(d)
            found.setdefault(("dimension", moment), []).append((d / (d + λs[:, None])).sum(1))
            found.setdefault(("gradient", moment), []).append(float(s.g.norm()) / λs)
            for method in METHODS:
                for quantity, values in zip(QUANTITIES, _follow(s, method, λs), strict=True):
                    found.setdefault((quantity, f"{moment}, {method}"), []).append(values)
    curves = {
        key: curve(1 + np.arange(len(values[0])) if key[0] == "spectrum" else λs, values)
        for key, values in found.items()
    }
    return curves, s.F.partition.size


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
