"""Tries of anything in the place of one argument of anything public."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import kfac_viz as kv

from .judge import Try
from .operators import made_up


def arguments(t: Try) -> None:
    """A call that would be good, but for one argument: no raw error, and no NaN from what is accepted."""
    F, other = made_up(t, tame=True), made_up(t, tame=True)
    p, P = F.partition, F.partition.size
    A, M = t.call(lambda: F.damped(0.1)), t.call(lambda: kv.KFAC(F, 0.1))
    Z = kv.coarse.random(F, 1)
    T = t.call(lambda: kv.TwoLevel(A, M, Z))
    g, model = t.normal(P, dtype=F.dtype), nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    x, y = t.normal(3, 2, dtype=torch.float32), t.normal(3, 2, dtype=torch.float32)
    calls: dict[str, tuple[Callable[..., Any], list[Any]]] = {
        "KFAC": (kv.KFAC, [F, 0.1, "eigen", "expand", "nearest"]),
        "EKFAC": (kv.EKFAC, [F, 0.1, "expand", "kl"]),
        "BlockDiagonal": (kv.BlockDiagonal, [F, 0.1]),
        "BlockTridiagonal": (kv.BlockTridiagonal, [F, 0.1, "reduce"]),
        "Diagonal": (kv.Diagonal, [F, 0.1, 0.5]),
        "Identity": (kv.Identity, [F, 0.1, 1.0]),
        "Nothing": (kv.Nothing, [F, 0.1]),
        "Damped": (kv.Damped, [F, 0.1]),
        "Dense": (kv.Dense, [F.dense(), p]),
        "Fisher": (kv.Fisher, [p, list(F.a), list(F.g)]),
        "KroneckerFisher": (kv.KroneckerFisher, [F, "reduce"]),
        "KroneckerFactors": (kv.KroneckerFactors, [p, M.factors.A, M.factors.G]),
        "CoarseSpace": (kv.CoarseSpace, [p, Z.dense()]),
        "CoarseCorrection": (kv.CoarseCorrection, [A, Z]),
        "TwoLevel": (kv.TwoLevel, [A, M, Z, "balanced"]),
        "TwoLevel, another operator": (lambda E: kv.TwoLevel(A, M, Z, coarse_operator=E), [A]),
        "nicolaides": (kv.coarse.nicolaides, [F, 1]),
        "spectral": (kv.coarse.spectral, [F, 1]),
        "smooth": (kv.coarse.smooth, [M, 1]),
        "random": (kv.coarse.random, [F, 1, 0]),
        "krylov": (kv.coarse.krylov, [A, M, g, 1]),
        "optimal": (kv.coarse.optimal, [A, M, 1]),
        "pcg": (kv.pcg, [A, g, T]),
        "spectrum": (kv.spectrum, [A, M]),
        "condition_number": (kv.condition_number, [A, M]),
        "captured_decrease": (kv.captured_decrease, [A, g, g]),
        "exact_direction": (kv.exact_direction, [A, g]),
        "solve": (A.solve, [g]),
        "@": (T.__matmul__, [g]),
        "block": (t.pick(F, A, M, T).block, [0, 0]),
        "factors": (F.factors, [0, 0, "reduce"]),
        "kronecker": (F.kronecker, ["expand", "shampoo"]),
        "with_damping": (t.pick(A, M, T).with_damping, [0.1]),
        "with_correction": (T.with_correction, ["additive"]),
        "image": (F.image, [Z]),
        "galerkin": (F.galerkin, [Z]),
        "restrict": (Z.restrict, [g]),
        "prolong": (Z.prolong, [t.normal(Z.size, dtype=F.dtype)]),
        "partition_of": (kv.partition_of, [model, ["0", "2"]]),
        "pack": (kv.partition_of(model).pack, [model]),
        "pack_grad": (kv.partition_of(model).pack_grad, [model]),
        "index": (p.index, [0]),
        "split": (p.split, [g]),
        "join": (p.join, [p.split(g)]),
        "nll": (kv.nll, [x, y, "gaussian"]),
        "capture": (lambda m, x, l: kv.capture(m, x, likelihood=l), [model, x, "gaussian"]),
        "Hessian": (lambda m, x, y, l: kv.Hessian(m, x, y, likelihood=l), [model, x, model(x).detach(), "gaussian"]),
        "TwoLevelKFAC": (lambda m, p: kv.TwoLevelKFAC(m, p, likelihood="gaussian"), [model, list(model.parameters())]),
    }  # fmt: skip
    t.benign = False
    name = t.pick(*calls)
    function, given = calls[name]
    given[t.whole(0, len(given) - 1)] = t.pick(
        None, 0, -1, 1, 2.5, math.nan, 10**400, True, 1j, "x", b"x", "0", [], [0], [g], {}, (), object(), type,
        nn.Linear, np.ones(2), np.array(1.0), torch.tensor(1.0), torch.ones(2), g, g[:0], torch.float32, iter([1]),
        F, other, A, other.damped(0.1), M, T, Z, p, other.partition, model, model[0], nn.Sequential(), lambda *_: None,
    )  # fmt: skip
    result = t.call(lambda: function(*given))
    t.call(lambda: repr(result))
    if isinstance(result, kv.Operator) or isinstance(result, kv.CoarseSpace):
        result = t.call(result.dense)
    if isinstance(result, Tensor) and not t.outcome.failures and F.dtype == torch.float64:
        t.finite(f"{name} of odd arguments", result)
