"""Tries of operators and preconditioners on a made-up Fisher, against dense formulas."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

import kfac_viz as kv
from kfac_viz.method.partition import Layer
from kfac_viz.method.products import FACTORS

from .hostile import damping, number, spoiled, surroundings
from .judge import F64, Refused, Try
from .oracles import (
    allowance,
    condition,
    gram,
    kfac_inverse,
    kronecker_model,
    norm,
    pinv,
    real,
    tridiagonal,
)


def made_up(t: Try, *, tame: bool = False) -> kv.Fisher:
    """A Fisher of random inputs and vectors, of one to four small layers."""
    dtype = t.pick(F64, F64, torch.float32)
    N, S = t.pick(1, 2, 3, 5, 8), t.pick(1, 1, 2, 3)
    shared = t.pick(None, None, (t.whole(1, 3), t.whole(1, 3)))  # layers of one shape go through one product
    same_T = t.pick(1, 1, 1, t.whole(1, 3), None)
    layers, a, g = [], [], []
    wide = t.chance(0.02)  # more than some LAPACK treats in one block
    for l in range(t.pick(1, 2, 2, 3, 4)):
        out, features = shared if shared and t.chance(0.8) else (t.whole(1, 4), t.whole(1, 4))
        T = same_T or t.whole(1, 3)
        if wide and l == 0:
            out, features = 1, t.whole(30, 90)
        layers.append(Layer(t.pick(f"{l}", f"body.{l}"), out, features, bias=features > 1 and t.chance(0.5)))
        a.append(t.normal(N, T, features))
        g.append(t.normal(S, N, T, out))
    if wide:  # such as an image with an empty border
        a[0][..., torch.randperm(a[0].shape[2], generator=t.source)[10:]] = 0
    t.benign = True
    if not tame and t.chance(0.5):
        t.benign = False
        l, side = t.whole(0, len(layers) - 1), t.pick(a, g)
        way = t.whole(0, 5)
        if way == 0:
            side[l] = side[l] * 0
        elif way == 1:
            side[l] = side[l][..., :1].expand_as(side[l]).clone()
        elif way == 2:
            side[l] = side[l] * 10.0 ** t.whole(-8, 8)
        elif way == 3:
            power = t.pick(
                *((15, -15, 75, 150, -75, -150, -300, 300) if dtype == F64 else (9, 18, 30, -9, -18, -30, -40))
            )
            side[l] = side[l] * 10.0**power
        elif way == 4:
            scale = 10.0 ** t.pick(*((-5, 5, 50, -50, -80, 100) if dtype == F64 else (-5, 5, 9, -9, -12, 15)))
            a, g = [x * scale for x in a], [x * scale for x in g]
        else:
            a, g = [x.round() for x in a], [x.round() for x in g]
    return kv.Fisher(kv.Partition(tuple(layers)), [x.to(dtype) for x in a], [x.to(dtype) for x in g])


def take_damping(t: Try, build: Callable[[Any], Any], what: str) -> tuple[Any, float]:
    """Something built with some λ, and what λ is."""
    asked = damping(t)
    λ = number(asked)
    t.benign = t.benign and λ is not None and 1e-3 <= λ <= 1e6 and not isinstance(asked, (Fraction, Decimal))
    built = t.call(lambda: build(asked))
    if λ is None:
        t.wrong(f"accepted the damping {asked!r}"[:60], what)
        raise Refused
    return built, λ


def operators(t: Try) -> None:
    """One-level operators and preconditioners against dense formulas."""
    F = made_up(t)
    P, eye, exact = F.partition.size, torch.eye(F.partition.size, dtype=F64), gram(F)
    s, layers = F.partition.slices, range(len(F.partition))
    size = float(exact.trace())
    convention = t.pick("expand", "expand", "reduce")
    what = t.pick("Fisher", "damped", "KFAC", "KFAC", "KFAC", "EKFAC", "BlockDiagonal", "BlockTridiagonal", "Diagonal",
                  "Identity", "Nothing", "KroneckerFisher", "Dense")  # fmt: skip
    λ, moves, power, factors = 0.0, [1.0] * len(F.partition), 0.0, t.pick("kfac", "kfac", *FACTORS)
    if factors != "kfac" and t.chance(0.9):
        convention = "expand"  # the others have none
    if what == "Fisher":
        op, expected = F, exact
    elif what == "damped":
        op, λ = take_damping(t, F.damped, what)
        expected = exact + λ * eye
    elif what == "KFAC":
        rule = t.pick("eigen", "factored")
        given = t.pick(
            F, kv.KroneckerFactors(F.partition, *map(tuple, zip(*(F.factors(l, l) for l in layers), strict=True)))
        )
        convention, factors = (convention, factors) if given is F else ("expand", "kfac")
        t.benign = t.benign and (convention == "expand" or factors == "kfac")
        what = f"KFAC {rule}"
        op, λ = take_damping(t, lambda x: kv.KFAC(given, x, rule, *([convention, factors] if given is F else [])), what)
        blocks, moves = kfac_inverse(F, convention, λ, rule, factors)
        expected = torch.block_diag(*blocks)
    elif what == "EKFAC":
        t.benign = t.benign and (convention == "expand" or factors == "kfac")
        op, λ = take_damping(t, lambda x: kv.EKFAC(F, x, convention, factors), what)
        blocks = []
        for l in layers:
            U = torch.kron(op.factors.eigen_G[l].U.to(F64), op.factors.eigen_A[l].U.to(F64))
            d = torch.einsum("pi,pq,qi->i", U, exact[s[l], s[l]], U)
            blocks.append((U / (d + λ)) @ U.T)
            moves[l] = float((exact[s[l], s[l]].trace() + λ) / (d.min() + λ)) if float(d.min() + λ) > 0 else math.inf
        expected = torch.block_diag(*blocks)
    elif what == "BlockDiagonal":
        op, λ = take_damping(t, lambda x: kv.BlockDiagonal(F, x), what)
        damped = [exact[i, i] + λ * torch.eye(i.stop - i.start, dtype=F64) for i in s]
        expected, moves = torch.block_diag(*map(pinv, damped)), [condition(X) for X in damped]
    elif what == "BlockTridiagonal":
        t.benign = False  # a chain may be determined at any λ
        op, λ = take_damping(t, lambda x: kv.BlockTridiagonal(F, x), what)
        expected, worst = tridiagonal(F, λ)
        moves = [worst] * len(s)
    elif what == "Diagonal":
        power = t.pick(1.0, 1, 0.5, 0.0, 0.3, *((math.nan, -1, 2, None, "1", True, 1j) if t.chance(0.2) else ()))
        t.benign = t.benign and power in (1.0, 0.5, 0.0, 0.3)
        op, λ = take_damping(t, lambda x: kv.Diagonal(F, x, power), what)
        expected = (exact.diagonal() + λ).pow(-float(power)).diag()
    elif what == "Identity":
        power = t.pick(0.0, 0, 1.0, 1, 0.5, *((math.nan, -1, 2, None, "1", True, 1j) if t.chance(0.2) else ()))
        t.benign = t.benign and power in (0.0, 1.0, 0.5)
        op, λ = take_damping(t, lambda x: kv.Identity(F, x, power), what)
        expected = λ ** -float(power) * eye
    elif what == "Nothing":
        op, λ = take_damping(t, lambda x: kv.Nothing(F, x), what)
        expected = 0 * eye
    elif what == "KroneckerFisher":
        t.benign = False  # refused where positions differ
        op = t.call(lambda: kv.KroneckerFisher(F, convention))
        expected = kronecker_model(F, convention)
        size = float(expected.trace())
    else:
        matrix = t.call(F.dense)
        if t.chance(0.3):
            t.benign, matrix = False, spoiled(t, matrix)
        op = t.call(lambda: kv.Dense(matrix, F.partition))
        expected = real(matrix)
        t.check(norm(expected - expected.T) <= 1e-3 * norm(expected), "Dense took a matrix that is not symmetric")
    inverse = what not in ("Fisher", "damped", "KroneckerFisher", "Dense")
    judge_matrix(t, what, op, expected, (size + λ, moves) if not inverse else (None, moves))
    if hasattr(op, "with_damping") and t.chance(0.4):
        other, λ = take_damping(t, op.with_damping, f"{what}.with_damping")
        fresh = {"damped": lambda: F.damped(λ), "BlockDiagonal": lambda: kv.BlockDiagonal(F, λ),
                 "Identity": lambda: kv.Identity(F, λ, power),
                 "EKFAC": lambda: kv.EKFAC(F, λ, convention, factors), "Nothing": lambda: kv.Nothing(F, λ)}  # fmt: skip
        if what in fresh:
            again = t.call(fresh[what]).dense().to(F64)
            t.close(f"{what}.with_damping: dense()", other.dense(), again, allowance(F.dtype, 1, norm(again)))
        if what.startswith("KFAC"):
            blocks, moves = kfac_inverse(F, convention, λ, rule, factors)
            judge_matrix(t, f"{what}.with_damping", other, torch.block_diag(*blocks), (None, moves))
    if what == "damped":
        λ = op.damping
        v = t.normal(P, dtype=F.dtype) if t.chance(0.6) else t.normal(P, 2, dtype=F.dtype)
        x = t.call(lambda: op.solve(v))
        A = exact + λ * eye
        target = pinv(A) @ v.to(F64)
        t.close("damped.solve", x, target, allowance(F.dtype, condition(A), norm(pinv(A)) * float(v.norm())))
        judge_numbers(t, F, op, exact)


def judge_numbers(t: Try, F: kv.Fisher, A: kv.Damped, exact: Tensor) -> None:
    """Norms of blocks, effective dimension and the overlap of layers."""
    slices, whole = F.partition.slices, norm(exact)
    norms = torch.tensor([[norm(exact[rows, cols]) for cols in slices] for rows in slices], dtype=F64)
    t.close("norms", t.call(F.norms), norms, allowance(F.dtype, 1, whole) + allowance(F.dtype, 1, 1) ** 0.5 * whole)
    if not A.damping > 0:
        t.benign = False  # refused in words
    d, most = torch.linalg.eigvalsh(exact).clamp_min(0), len(slices)
    loose = allowance(F.dtype, condition(exact + A.damping * torch.eye(len(exact), dtype=F64)), 1.0)
    found = torch.tensor(t.call(A.effective_dimension), dtype=F64)
    t.close("effective dimension", found, (d / (d + A.damping)).sum(), len(d) * loose)
    claims = t.call(A.layer_overlap)
    t.check(-loose <= claims <= most + loose, "the overlap is not between 0 and the number of layers", claims)


def judge_matrix(
    t: Try, what: str, op: kv.Operator, expected: Tensor, bounds: tuple[float | None, list[float]]
) -> None:
    """dense(), products, blocks and the diagonal of an operator; bounds are (size or None, condition of each layer).
    Without a size, entries may be off by the condition of their layer times the norm of its block."""
    size, moves = bounds
    dtype, slices, dense = op.dtype, op.partition.slices, t.call(op.dense)
    if not t.close(f"{what}: dense()", dense, expected, math.inf):
        return
    sizes = [norm(expected[i, i]) if size is None else size for i in slices]
    for l, m in itertools.product(range(len(slices)), repeat=2):
        allowed = max(allowance(dtype, moves[i], sizes[i]) for i in (l, m))
        t.close(f"{what}: dense()", dense[slices[l], slices[m]], expected[slices[l], slices[m]], allowed)
    found, P = dense.to(F64), op.partition.size
    largest = norm(found) * (
        max(moves) if what.startswith("BlockTridiagonal") else 1.0
    )  # not symmetric to the last bit
    v = t.normal(P, dtype=dtype) if t.chance(0.5) else t.normal(P, t.whole(0, 3), dtype=dtype)
    if t.chance(0.25):
        t.benign, v = False, spoiled(t, v)
    with surroundings(t) if t.chance(0.1) else contextlib.nullcontext("") as where:
        product = t.call(lambda: op @ v)
    v64 = real(v)
    if "autocast" in where:
        what = "an operator"
    if where:  # what was computed there is kept, and has to serve elsewhere too
        t.benign, w = False, t.normal(P, dtype=dtype).requires_grad_()
        t.call(lambda: (op @ w).sum().backward())
        t.finite("the gradient of a product", w.grad)
    if t.check(product.dtype == dtype, f"{what} @ v{where} has another dtype", f"{product.dtype}, {dtype}"):
        t.close(f"{what} @ v{where}", product, found @ v64, allowance(dtype, 1, largest * norm(v64), norm(v64)))
    l, m = t.whole(0, len(slices) - 1), t.whole(0, len(slices) - 1)
    block = t.call(lambda: op.block(op.partition.names[l] if t.chance(0.3) else l, m))
    t.close(f"{what}.block", block, found[slices[l], slices[m]], allowance(dtype, 1, largest))
    if t.chance(0.1):
        product = t.call(lambda: op.to_scipy() @ found.sum(1).numpy())
        t.close(
            f"{what}.to_scipy", torch.as_tensor(product), found @ found.sum(1), allowance(dtype, 1, largest * largest)
        )
    t.close(f"{what}.diagonal", t.call(op.diagonal), found.diagonal(), allowance(dtype, 1, largest))
