"""What a step of the optimizer should do, in float64, from the table and the formulas."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import kfac_viz as kv

from .judge import F64
from .oracles import allowance, apart, flat, matrices, norm

Targets = dict[Tensor, tuple[Tensor, float]]  # where a parameter comes to be, and how far off it may be


def expected_step(opt: kv.TwoLevelKFAC, T: kv.TwoLevel, dtype: torch.dtype) -> Targets | None:
    """The step along T without a closure; None where precision or something unusual makes no formula hold."""
    names = {piece.parameter for layer in opt.partition.layers for piece in layer.pieces}
    mine = {name: q for name, q in opt.model.named_parameters() if name in names}
    groups = {p: group for group in opt.param_groups for p in group["params"]}
    if len(mine) < len(names) or not _usual(opt, list(mine.values()), groups, dtype):
        return None  # another module is there by now

    def of_all(of) -> Tensor:
        return flat(opt.partition, {name: of(q) for name, q in mine.items()})

    def each(factor) -> Tensor:
        return of_all(lambda q: torch.full_like(q, factor(q), dtype=F64))

    grads = {p: _gradient(opt, p, group) for p, group in groups.items() if p.grad is not None}
    has, lr = each(lambda q: float(q in grads)), each(lambda q: groups[q]["lr"])
    g = of_all(lambda q: grads.get(q, torch.zeros_like(q, dtype=F64)))
    A, T64, size, κ = matrices(T)
    v = (T64 @ g) * has
    off = allowance(dtype, κ, size * norm(g))
    if not math.isfinite(off):
        return None
    if opt.options.step_rule == "quadratic":
        last = of_all(lambda q: _buffer(opt, q, groups[q])) * has * (lr > 0)
        ridge = each(lambda q: 0.0 if opt.options.decoupled else groups[q]["weight_decay"])
        found = _quadratic(A + ridge.diag(), g, v, last, lr, off, dtype)
    else:
        found = _clipped(opt, A, v, lr, off)
    if found is None:
        return None
    v, off = found
    eps, targets = torch.finfo(dtype).eps, {}
    pieces = {mine[name]: x for name, x in apart(opt.partition, v, mine).items()}
    for p, gradient in grads.items():
        group, known = groups[p], p in pieces
        if not known:
            step, loose = _adam(opt, p, gradient, group), 1e-2 * group["plain_lr"] * (dtype != F64)
        elif opt.options.step_rule == "quadratic":
            step, loose = pieces[p], off
        else:
            along = pieces[p] + group["momentum"] * _buffer(opt, p, group)
            step, loose = -group["lr"] * along, group["lr"] * off
        rate = group["lr" if known else "plain_lr"]
        start = p.detach().to(F64) * (1 - rate * group["weight_decay"] if opt.options.decoupled else 1)
        sizes = sum(float(x.abs().max()) for x in (start, step, group["lr"] * _buffer(opt, p, group)))
        targets[p] = (start + step, loose + 1e2 * eps * sizes)
    return targets


def _usual(opt: kv.TwoLevelKFAC, mine: list[Tensor], groups: dict[Tensor, dict], dtype: torch.dtype) -> bool:
    """Whether the formulas are all there is to it: numbers for options, every layer known and in a group."""
    options = [group.get(k) for group in opt.param_groups for k in ("lr", "momentum", "weight_decay")]
    return (
        dtype in (F64, torch.float32)
        and all(isinstance(x, (int, float)) and math.isfinite(x) for x in options)
        and all(q in groups for q in mine)
        and all(name in opt.curvature.factors.weight for name in opt.partition.names)
        and all(bool(p.isfinite().all()) for p in groups)
        and all(p.grad is None or p.grad.layout == torch.strided for p in groups)
    )


def _gradient(opt: kv.TwoLevelKFAC, p: Tensor, group: dict) -> Tensor:
    g = p.grad.detach().to(F64) * (-1 if group.get("maximize") else 1)
    return g if opt.options.decoupled else g + group["weight_decay"] * p.detach().to(F64)


def _buffer(opt: kv.TwoLevelKFAC, p: Tensor, group: dict) -> Tensor:
    buffer = opt.state.get(p, {}).get("momentum_buffer")
    return torch.zeros_like(p, dtype=F64) if buffer is None or not group["momentum"] else buffer.to(F64)


def _adam(opt: kv.TwoLevelKFAC, p: Tensor, g: Tensor, group: dict) -> Tensor:
    """The step of a parameter without curvature."""
    own, β = opt.state.get(p, {}), (group["momentum"], 0.999)
    t = float(own.get("step", 0)) + 1
    m, v = (
        (own[name].to(F64) if name in own else 0) * b + (1 - b) * x
        for name, b, x in zip(("exp_avg", "exp_avg_sq"), β, (g, g**2), strict=True)
    )
    return -group["plain_lr"] * m / (1 - β[0] ** t) / ((v / (1 - β[1] ** t)).sqrt() + 1e-8)


def _clipped(opt: kv.TwoLevelKFAC, A: Tensor, v: Tensor, lr: Tensor, off: float) -> tuple[Tensor, float] | None:
    """The direction as long as kl_clip lets it be."""
    if opt.options.step_rule == "fixed":
        return v, off
    largest = float(v.abs().max())
    if not largest or not bool((lr > 0).any()):
        return v, off
    u, off = v / largest, off / largest  # whose squares do not overflow
    form = float((lr * u) @ A @ (lr * u))
    relative = norm(A) * norm(lr * u) * off * float(lr.max()) / form if form > 0 else math.inf
    if not relative < 0.1:
        return None
    length = min(largest, (opt.options.kl_clip / form) ** 0.5)
    return length * u, length * (off + relative * norm(u))


def _quadratic(
    A: Tensor, g: Tensor, v: Tensor, last: Tensor, lr: Tensor, off: float, dtype: torch.dtype
) -> tuple[Tensor, float] | None:
    """The minimiser of the model over −v and the last step, times the largest lr."""
    top = float(lr.max())
    D = torch.stack([-v * lr / top if top else 0 * v, last])
    D = D[[norm(d) > 0 for d in D]]
    if not len(D):
        return 0 * v, off
    D = D / D.norm(dim=1, keepdim=True)
    B = D @ A @ D.T
    d = torch.linalg.eigvalsh(B)
    if not float(d[0]) > 1e-3 * float(d[-1]) or not off < 1e-6 * norm(v) or dtype != F64:
        return None
    return -top * torch.linalg.solve(B, D @ g) @ D, 1e-4 * top * norm(torch.linalg.solve(B, D @ g))
