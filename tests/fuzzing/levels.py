"""Tries of coarse spaces, corrections, solvers and what measures them, against dense formulas."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import kfac_viz as kv
from kfac_viz.method.products import FACTORS

from .hostile import BAD_COUNTS, DAMPINGS, WORDS, number, spoiled, surroundings
from .judge import F64, Try
from .operators import made_up, take_damping
from .oracles import allowance, condition, matrices, norm, pinv, real

BUILDERS = ("nicolaides", "spectral", "smooth", "krylov", "random", "optimal", "columns")


def coarse_space(t: Try, F: kv.Fisher, A: kv.Operator, M: kv.Operator) -> kv.CoarseSpace:
    name = t.pick(*BUILDERS)
    k = t.pick(0, 1, 1, 2, 2, 3, 5, 20) if t.chance(0.95) else t.pick(*BAD_COUNTS, 10**400, 2**70, np.int64(2))
    t.benign = t.benign and type(k) is int and 0 <= k < 2
    if name == "columns":
        columns = t.normal(F.partition.size, t.whole(0, 6), dtype=F.dtype)
        if columns.shape[1] and t.chance(0.5):
            columns[:, -1] = columns[:, 0] * t.pick(1, -2, 0, 1e-200) + t.pick(0, 0, 1e-9, 1e-14) * columns[:, -1]
        if t.chance(0.2):
            columns = columns * 10.0 ** t.pick(-300, -30, -15, 15, 30, 150)
        if t.chance(0.1):
            columns = spoiled(t, columns)
        t.benign = False
        return t.call(lambda: kv.CoarseSpace(F.partition, columns))
    if name in ("krylov", "optimal"):
        g = t.normal(F.partition.size, dtype=F.dtype)
        if t.chance(0.15):
            t.benign, g = False, spoiled(t, g)
        rest = (M, g, k) if name == "krylov" else (M, k)
        return t.call(lambda: getattr(kv.coarse, name)(A, *rest))
    rest = (k, t.whole(0, 9)) if name == "random" else (k,)
    return t.call(lambda: getattr(kv.coarse, name)(F, *rest))


@dataclass
class Levels:
    """Two levels, and the same in float64."""

    T: kv.TwoLevel
    A: kv.Operator
    M: kv.Operator
    A64: Tensor
    T64: Tensor
    size: float  # of the terms that make up T
    condition: float  # of what is inverted for the coarse level


def levels(t: Try) -> Levels:
    F = made_up(t)
    A, λ = take_damping(t, F.damped, "damped")
    M_λ = λ if t.chance(0.9) else number(t.pick(*DAMPINGS))
    t.benign = t.benign and M_λ >= 1e-3
    M = t.call(lambda: t.pick(kv.KFAC, kv.KFAC, kv.EKFAC, kv.BlockDiagonal, kv.Diagonal, kv.Identity, kv.Nothing,
                            lambda F, λ: kv.KFAC(F, λ, factors=t.pick(*FACTORS)),
                            lambda F, λ: kv.Identity(F, λ, power=1.0))(F, M_λ))  # fmt: skip
    Z = coarse_space(t, F, A, M)
    correction = t.pick("additive", "a-def1", "a-def2", "balanced")
    options: dict[str, Any] = {}
    if t.chance(0.15):
        t.benign = False
        K = t.call(lambda: kv.KroneckerFisher(F))
        options["coarse_operator"] = K.damped(λ)
    if t.chance(0.05):
        t.benign, correction = False, t.pick(*WORDS)
    T = t.call(lambda: kv.TwoLevel(A, M, Z, correction, **options))
    if t.chance(0.3):
        T, λ = take_damping(t, T.with_damping, "TwoLevel.with_damping")
    if t.chance(0.2):
        correction = t.pick("additive", "a-def1", "a-def2", "balanced")
        T = t.call(lambda: T.with_correction(correction))
    t.finite(f"coarse.{Z.name}", Z.dense())
    t.check(T.A.damping == λ and T.correction == correction, "TwoLevel has another λ or correction than was asked for")
    return Levels(T, T.A, T.M, *matrices(T))


def twolevel(t: Try) -> None:
    """Corrections and coarse spaces against the table."""
    x = levels(t)
    T, P, dtype = x.T, x.A.partition.size, x.A.dtype
    what = f"TwoLevel {T.correction}"
    dense = t.call(T.dense)
    allowed = allowance(dtype, x.condition, x.size)
    if t.close(f"{what}: dense()", dense, x.T64, allowed):
        v = t.normal(P, dtype=dtype) if t.chance(0.5) else t.normal(P, t.whole(0, 3), dtype=dtype)
        if t.chance(0.2):
            t.benign, v = False, spoiled(t, v)
        product = t.call(lambda: T @ v)
        v64 = real(v)
        t.close(f"{what} @ v", product, x.T64 @ v64, allowance(dtype, x.condition, x.size * norm(v64), norm(v64)))
    if t.chance(0.2):
        t.close(f"{what}: contribution()", t.call(T.contribution), x.T64 - x.M.dense().to(F64), allowed)
    if t.chance(0.2):
        judge_columns(t, T.Z, t.normal(P, dtype=dtype), t.normal(T.Z.size, dtype=dtype))


def judge_columns(t: Try, Z: kv.CoarseSpace, r: Any, c: Any) -> None:
    """Zᵀ r and Z c; r and c may be spoiled."""
    dense = Z.dense().to(F64)
    if t.chance(0.5):
        t.benign, r, c = False, spoiled(t, r), spoiled(t, c)
    for name, method, matrix, v in (("restrict", Z.restrict, dense.T, r), ("prolong", Z.prolong, dense, c)):
        found, v64 = t.call(lambda method=method, v=v: method(v)), real(v)
        if not float(v64.abs().sum()) < torch.finfo(Z.dtype).max / (1 + norm(dense)):
            continue  # linear maps within every product: NaN, inf and overflow go through, and are told outside
        t.close(f"Z.{name}", found, v64 @ matrix.T, allowance(Z.dtype, 1, norm(dense) * norm(v64), norm(v64)))


def worth(t: Try) -> None:
    """pcg, spectra, captured decrease and exact directions."""
    x = levels(t)
    A, T, dtype, P = x.A, t.pick(x.T, x.T, x.M, None), x.A.dtype, x.A.partition.size
    T64 = {id(x.T): x.T64, id(None): torch.eye(P, dtype=F64)}.get(id(T), x.M.dense().to(F64))
    eps, κ = torch.finfo(dtype).eps, condition(x.A64)
    g = t.normal(P, dtype=dtype)
    way = t.whole(0, 9)
    if way == 0:
        t.benign, g = False, spoiled(t, g)
    elif way == 1:
        t.benign, g = False, g * 10.0 ** t.pick(*((-300, -160, 100, 160) if dtype == F64 else (-38, -20, 15, 25)))
    what = t.pick("pcg", "pcg", "spectrum", "condition_number", "captured_decrease", "captured_decrease", "exact")
    t.benign = t.benign and (T is None or T.symmetric) and not isinstance(x.M, kv.Nothing)
    g64 = real(g) if isinstance(g, Tensor) and g.shape == (P,) else None
    if what == "pcg":
        t.benign = False  # positive definite in exact arithmetic only
        options: dict[str, Any] = {}
        if t.chance(0.5):
            options["rtol"] = t.pick(1e-2, 1e-4, 1e-10, 1e-14, 1e-300, 0, 0.0, None, math.nan, math.inf, -1, "a", True,
                                     1, torch.tensor(1e-3), 10**400, 1j, [])  # fmt: skip
        if t.chance(0.3):
            options["max_iterations"] = t.pick(0, 1, 3, *BAD_COUNTS, 1000)
        if t.chance(0.3):
            options["x0"] = t.normal(P, dtype=dtype) * t.pick(1, 1, 0, 1e8, 1e-300)
            if t.chance(0.3):
                options["x0"] = spoiled(t, options["x0"])
        if t.chance(0.3):
            options["reorthogonalize"] = True
        calls: list[tuple[Tensor, float]] = []
        if t.chance(0.2):
            options["callback"] = t.pick(lambda *both: calls.append(both), lambda *both: calls.append(both), "x", 3)
        s = t.call(lambda: kv.pcg(A, g, M=T, **options))
        if not t.finite("pcg: solution", s.solution):
            return
        t.finite("pcg: residuals", list(s.residuals))
        true = float((g64 - x.A64 @ s.solution.detach().to(F64)).norm()) / max(float(g64.norm()), 1e-300)
        rtol = options.get("rtol", 1e-8)
        if t.check(isinstance(rtol, (int, float, Tensor)) and 0 < rtol < math.inf, f"pcg accepted rtol {rtol!r}"):
            start = options.get("x0")
            longest = max(
                norm(real(y)) for y in (s.solution, *([] if start is None else [start]), *(c for c, _ in calls))
            )
            slack = 100 * eps * P * (1 + s.iterations) * (1 + norm(x.A64) * longest / max(norm(g64), 1e-300))
            if s.converged and rtol < 1e300:
                t.check(not true > 2 * float(rtol) + slack, "pcg converged, and the residual is large", f"{true:.3g}")
        t.check(not calls or len(calls) == s.iterations, "pcg called back another number of times", len(calls))
    elif what in ("spectrum", "condition_number"):
        if T is not None and not T.symmetric and x.T.coarsens_A and x.T.M.symmetric:
            t.benign = False
        d = t.call(lambda: kv.spectrum(A, T))
        size = norm(x.A64) * (x.size if T is x.T else norm(T64))
        allowed = allowance(dtype, x.condition if T is x.T else 1, size)
        product = T64 @ x.A64
        if bool(torch.isfinite(product).all()) and norm(product) < 1e100 and math.isfinite(allowed):
            expected = torch.linalg.eigvals(product).real.sort().values
            t.close("spectrum", d, expected, allowed + eps**0.5 * size)
        else:
            t.finite("spectrum", d)
        if what == "condition_number":
            c = t.call(lambda: kv.condition_number(A, T))
            t.check(c >= 1 - 1e-6, "condition_number is below 1 or NaN", c)
            if math.isfinite(c):
                t.check(abs(c - float(d[-1] / d[0])) <= 1e-3 * c, "condition_number is wrong", c)
    elif what == "exact":
        v = t.call(lambda: kv.exact_direction(A, g))
        t.close("exact_direction", v, pinv(x.A64) @ g64, allowance(dtype, κ, norm(pinv(x.A64)) * float(g64.norm())))
    else:
        v = t.normal(P, dtype=dtype)
        if t.chance(0.5) and g64 is not None:
            v = (pinv(x.A64) @ g64).to(dtype)
        if t.chance(0.15):
            t.benign, v = False, spoiled(t, v)
        with surroundings(t) if t.chance(0.1) else contextlib.nullcontext():
            share = t.call(lambda: kv.captured_decrease(A, g, v))
        expected, terms = true_share(x.A64, g64, real(v))
        allowed = allowance(dtype, κ, terms + abs(expected)) + 10 * eps
        t.close("captured_decrease", torch.tensor(share, dtype=F64), torch.tensor(expected, dtype=F64), allowed)


def true_share(A: Tensor, g: Tensor, v: Tensor) -> tuple[float, float]:
    """The captured decrease and the size of its terms, without the overflow and underflow of squares."""
    a, b = float(v.abs().max()), float(g.abs().max())
    v, g = v / a if a else v, g / b if b else g
    best, ratio = float(g @ pinv(A) @ g), a / b if b else math.inf
    if not best:
        return math.nan, math.nan
    expected = 2 * float(g @ v) * ratio - float(v @ A @ v) * ratio * ratio
    terms = 2 * float(g.abs() @ v.abs()) * ratio + norm(A) * float(v @ v) * ratio * ratio
    return expected / best, terms / best
