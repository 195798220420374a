"""Tries of partitions and of the loss."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import numpy as np
import torch

import kfac_viz as kv
from kfac_viz.method.partition import Layer

from .hostile import BAD_DAMPINGS, DTYPES, WORDS, spoiled
from .judge import F64, Raw, Refused, Try, difference
from .networks import batch, examples, labels, network
from .oracles import ROUND_OFF, flat, real


def partitions(t: Try) -> None:
    """Vectors to layers, parameters and back."""
    net, dtype = network(t), t.pick(*DTYPES)
    model = net.build(dtype)
    with contextlib.suppress(Exception), torch.no_grad():
        model(*batch(t, net, 2, dtype))  # gives lazy layers their shape
    way = t.pick("sizes", "flat", "flat", "add", "add", "gradient", "layers")
    if way == "sizes":
        sizes = t.pick([2, 3], [1], [], [0], [-1], [2.0], ["a"], None, 3, [np.int64(2)], (4, 1), [True], iter([1, 2]),
                       "12", [10**400], [2**62, 2**62])  # fmt: skip
        names = t.pick(None, None, ["x", "y"], ["x", "x"], "xy", [1, 2], [None, None], 3, [[], []])
        p = t.call(lambda: kv.Partition.from_sizes(sizes, names))
        return void(t.check(p.size == p.offsets[-1] and len(p) == len(p.names), "Partition.from_sizes is wrong"))
    if way == "layers":
        given = t.pick((), [], None, 3, "x", (None,), ((1, 2),), (Layer("a", 0, 1),), (Layer("a", 2, 2, True),),
                       (Layer("a", 1, 1), Layer("a", 2, 1)), ("a", -1, -1), (Layer,))  # fmt: skip
        p = t.call(lambda: kv.Partition(given))
        return void(t.check(isinstance(p.size, int) and p.size > 0, "Partition accepted layers without a size", given))
    p = t.call(lambda: kv.partition_of(model))
    θ = t.call(lambda: p.pack(model))
    expected = flat(p, {name: q.detach() for name, q in model.named_parameters()})
    t.check(difference(θ, expected) is None, "Partition.pack is wrong")
    v: Any = t.normal(p.size, dtype=dtype)
    if t.chance(0.4):
        v = spoiled(t, v)
    if way == "flat":
        pieces = t.call(lambda: p.split(v))
        if t.chance(0.3):
            pieces = t.pick(pieces[:-1], [*pieces, pieces[0]], pieces[::-1], None, 3, [None] * len(p), tuple(pieces),
                            [x.flatten() for x in pieces], [[1.0]] * len(p))  # fmt: skip
        joined = t.call(lambda: p.join(pieces))
        if isinstance(pieces, list) and len(pieces) == len(p) and joined.device.type != "meta":
            whole = torch.cat([piece.flatten(0, 1) for piece in pieces])
            t.check(difference(joined, whole) is None, "Partition.join is wrong")
    elif way == "gradient":
        for q in model.parameters():
            q.grad = t.normal(*q.shape, dtype=dtype) if q.requires_grad and t.chance(0.95) else None
        g = t.call(lambda: p.pack_grad(model))
        expected = flat(p, {name: q.grad for name, q in model.named_parameters()})
        t.check(difference(g, expected) is None, "Partition.pack_grad is wrong")
    else:
        alpha: Any = t.pick(1.0, -1, 0.5, 0, 1e-3) if t.chance(0.7) else t.pick(1e300, 1e30, -math.inf, *BAD_DAMPINGS)
        before = {k: q.detach().clone() for k, q in model.state_dict().items()}
        try:
            t.call(lambda: p.add_(model, v, alpha))
        except (Refused, Raw):
            t.check(difference(before, dict(model.state_dict())) is None, "Partition.add_ raised and changed the model")
            raise
        found = p.pack(model)
        if t.finite("Partition.add_: parameters", found):
            target = θ.to(F64) + float(alpha) * real(v)
            t.close("Partition.add_", found, target, 8 * torch.finfo(dtype).eps * (1 + float(target.abs().max())))


def void(_: object) -> None:
    return None


def losses(t: Try) -> None:
    """nll against formulas."""
    dtype, likelihood = t.pick(*DTYPES), t.pick("categorical", "bernoulli", "gaussian")
    shape = (examples(t), *(t.whole(1, 4) for _ in range(t.pick(1, 1, 1, 2, 0, 3))))
    f = t.normal(*shape, dtype=dtype) * t.pick(1, 1, 1, 10, 100, 0)
    y = labels(t, f, likelihood) if f.ndim > 1 else t.normal(*shape, dtype=dtype)
    way = t.whole(0, 5)
    given: list[Any] = [f, y, likelihood]
    if way < 2:
        given[way] = spoiled(t, given[way])
    elif way == 2 and t.chance(0.3):
        given[2] = t.pick(*WORDS)
    f.requires_grad_(t.chance(0.5))
    loss = t.call(lambda: kv.nll(*given))
    f, y = real(given[0]), given[1].detach()
    if not bool(torch.isfinite(f).all()):
        return
    if likelihood == "categorical":
        total = (f.logsumexp(-1) - f.gather(-1, y.long()[..., None])[..., 0]).sum()
        size = f.abs().sum() + 1
    elif likelihood == "bernoulli":
        total, size = (torch.logaddexp(f, 0 * f) - y.to(F64) * f).sum(), f.abs().sum() + 1
    else:
        total = size = 0.5 * (y.to(F64) - f).square().sum()
        size = size + (y.to(F64).square() + f.square()).sum()
    expected = total / len(f)
    if float(size) > torch.finfo(loss.dtype).max / 4:
        return  # a loss may well overflow
    eps = max(torch.finfo(x.dtype).eps for x in (loss, given[0]))
    t.close(f"nll {likelihood}", loss, expected, ROUND_OFF * (eps * float(size) + torch.finfo(loss.dtype).tiny))
