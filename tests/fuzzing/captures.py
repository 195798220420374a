"""Tries of capture: a network, data and a likelihood against per-example autograd."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import kfac_viz as kv

from .hostile import BAD_COUNTS, DTYPES, WORDS, spoiled, surroundings
from .judge import F64, Try, difference
from .networks import ORDINARY, SHORT, Net, batch, examples, labels, network
from .oracles import ROUND_OFF, Truth, allowance, norm, perturbed, residuals, scores, truth


@contextlib.contextmanager
def untouched(t: Try, model: nn.Module, what: str) -> Iterator[None]:
    """The model and the global random state are afterwards what they were, whatever happened."""

    def facts() -> dict[str, Any]:
        if not isinstance(model, nn.Module):
            return {}
        lazy = any(isinstance(p, nn.UninitializedParameter) for p in model.parameters())
        values = {} if lazy else {k: v.detach().clone() for k, v in model.state_dict().items()}
        return {
            "weights and buffers": values,
            "training flags": [m.training for m in model.modules()],
            "requires_grad": [p.requires_grad for p in model.parameters()],
            "gradients": [p.grad is None for p in model.parameters()],
            "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
            "random state": torch.get_rng_state(),
        }

    before = facts()
    try:
        yield
    finally:
        changed = difference(before, facts())
        t.check(changed is None, f"{what} changed the model's {(changed or '').split('.')[1:2]}", changed)


def capture(t: Try) -> None:
    """A network, data, a likelihood: the Fisher against per-example autograd."""
    net, dtype, N = network(t), t.pick(*DTYPES), examples(t)
    model, inputs = net.build(dtype), batch(t, net, N, dtype)
    likelihood = t.pick("categorical", "bernoulli", "gaussian")
    flavour = t.pick("exact", "exact", "exact", "mc", "empirical")
    model.train(t.chance(0.5))
    if t.chance(0.15):
        return hessian(t, net, model, inputs, likelihood, dtype)
    options: dict[str, Any] = {"likelihood": likelihood, "fisher": flavour}
    if flavour == "mc":
        options["samples"] = t.pick(1, 1, 2, 3)
    if flavour == "empirical":
        options["targets"] = labels(t, outputs_of(net, inputs, dtype), likelihood)
    given: Any = inputs[0] if len(inputs) == 1 else tuple(inputs)
    asked: Any = model
    if t.chance(0.3):
        way = t.whole(0, 9)
        if way <= 3:
            inputs[0] = given = spoiled(t, inputs[0])
            if net.inputs == 2:
                given = (given, inputs[1])
        elif way == 4 and "targets" in options:
            options["targets"] = spoiled(t, options["targets"])
        elif way == 4:
            options["targets"] = t.pick(torch.zeros(N).long(), 0, "x")
        elif way == 5:
            options[t.pick("likelihood", "fisher")] = t.pick(*WORDS)
        elif way == 6:
            options |= {"fisher": "mc", "samples": t.pick(*BAD_COUNTS, 0, np.int64(2), 10**400)}
            options.pop("targets", None)
        elif way == 7:
            names = [name for name, _ in model.named_modules()]
            options["layers"] = t.pick("0", [], [0], ["nope"], [None], 3, [[]], iter(names), names[-1:], names[1:2])
        elif way == 8:
            options["generator"] = t.pick(3, "x", torch.Generator(), random.Random(1))
        else:
            asked = t.pick(None, model.forward, list(model.parameters()), nn.Linear, nn.Sequential(), "model")
            if t.chance(0.5):
                asked = model.to("meta") if t.chance(0.5) else nn.Sequential(model)
    else:
        fits = likelihood != "categorical" or outputs_of(net, inputs, dtype).shape[-1] > 1
        t.benign = net.name in ORDINARY and dtype in (F64, torch.float32) and fits
        t.benign = t.benign and (flavour != "empirical" or options["targets"].dtype not in SHORT)
    context = surroundings(t) if t.chance(0.1) else contextlib.nullcontext()
    arguments = given if isinstance(given, (tuple, list)) else (given,)
    with untouched(t, asked, "capture"), context:
        alone = net.build(dtype) if asked is model else asked
        F = t.call(lambda: kv.capture(asked, given, **options), excuse=lambda: copy.deepcopy(alone).eval()(*arguments))
    twin = net.build(dtype).to(F64).eval()
    if asked is not model:
        if not (isinstance(asked, nn.Sequential) and len(asked) == 1):
            return t.wrong("capture accepted what is no model", type(asked))
        twin = nn.Sequential(twin)
    judge_fisher(t, F, twin, inputs, options, dtype, net.name)


def hessian(t: Try, net: Net, model: nn.Module, inputs: list[Tensor], likelihood: str, dtype: torch.dtype) -> None:
    """A Hessian's product against differences of the gradient, which per-example autograd of the outputs gives."""
    targets: Any = labels(t, outputs_of(net, inputs, dtype), likelihood)
    if t.chance(0.2):
        targets = spoiled(t, targets)
    given: Any = inputs[0] if len(inputs) == 1 else tuple(inputs)
    alone = net.build(dtype)
    with untouched(t, model, "Hessian"):
        H = t.call(lambda: kv.Hessian(model, given, targets, likelihood=likelihood),
                   excuse=lambda: copy.deepcopy(alone).eval()(*inputs))  # fmt: skip
    v = t.normal(H.partition.size, dtype=H.dtype)
    product = t.call(lambda: H @ v)
    if not t.finite("Hessian @ v", product) or H.dtype != F64:
        return
    twin, off = net.build(F64).eval(), math.inf

    def gradient(h: float) -> Tensor:
        moved = copy.deepcopy(twin)
        H.partition.add_(moved, h * v)
        at = truth(moved, inputs, H.partition)
        return torch.einsum("no,nop->p", residuals(at.outputs, targets, likelihood).flatten(1), at.J) / len(at.outputs)

    for h in (1e-5, 1e-6, 1e-7):  # less and less likely that a kink lies between
        ahead, behind = gradient(h), gradient(-h)
        allowed = 1e-4 * norm(product) + 1e-12 * norm(ahead) / h
        off = min(off, norm((ahead - behind) / (2 * h) - product) / max(allowed, 1e-300))
    t.check(off <= 1, f"Hessian @ v is wrong ({net.name})", off)


def outputs_of(net: Net, inputs: list[Tensor], dtype: torch.dtype) -> Tensor:
    """What the network returns, or something of the usual shape where it fails or returns something else."""
    with contextlib.suppress(Exception), torch.no_grad():
        out = net.build(dtype).eval()(*(x.clone() for x in inputs))
        if isinstance(out, Tensor) and out.ndim > 1:
            return out
    return torch.zeros(len(inputs[0]), 2, dtype=dtype)


def judge_fisher(
    t: Try,
    F: kv.Fisher,
    model: nn.Module,
    inputs: list[Tensor],
    options: dict[str, Any],
    dtype: torch.dtype,
    name: str,
) -> None:
    """A Fisher against per-example autograd of the model, which is in float64."""
    what, where = "capture", f"capture({name})"
    exact = [x.detach().clone() if not x.is_floating_point() else x.detach().to(F64).clone() for x in inputs]
    found = t.call(F.dense)
    if not t.finite(f"{what}: F.dense()", found):
        return
    true = truth(model, exact, F.partition)
    if F.N != len(true.outputs):
        return t.wrong(f"{where} counts other examples than there are", f"{F.N}, {len(true.outputs)}")
    if options["fisher"] == "mc":
        return judge_labels(t, where, F, true, options)
    expected = true.fisher(options["likelihood"], options.get("targets"))
    eps = max(torch.finfo(kind).eps for kind in (dtype, true.precision))
    size = norm(true.J.flatten(0, 1)) * norm(true.J.flatten(0, 1)) / F.N
    largest = float(expected.abs().max())
    off = float((found.to(F64) - expected).abs().max())
    allowed = ROUND_OFF * eps * (largest + eps * size + (largest * size) ** 0.5 * eps**0.5) + torch.finfo(dtype).tiny
    if not off <= allowed and math.isfinite(size):
        moved = [truth(*perturbed(t, model, exact, eps), F.partition) for _ in range(6)]
        moved = [other.fisher(options["likelihood"], options.get("targets")) - expected for other in moved]
        allowed += 50 * max(float(difference.abs().max()) for difference in moved)
        t.check(off <= allowed, f"{where}: F.dense() is wrong", f"off by {off:.3g}, allowed {allowed:.3g}")
    v, dense = t.normal(F.partition.size, dtype=F.dtype), found.to(F64)
    allowed = allowance(F.dtype, 1, norm(dense) * norm(v), norm(v))
    t.close(f"{what}: F @ v", t.call(lambda: F @ v), dense @ v.to(F64), allowed)


def judge_labels(t: Try, where: str, F: kv.Fisher, true: Truth, options: dict) -> None:
    """Every Monte Carlo score belongs to some label."""
    samples, outputs, likelihood = int(options["samples"]), true.outputs, options["likelihood"]
    found, (N, C) = scores(F) * samples**0.5, outputs.flatten(1).shape
    t.check(F.S == samples, f"{where}: another number of samples", F.S)
    eps = max(torch.finfo(kind).eps for kind in (F.dtype, true.precision))
    if eps > 1e-10:
        return  # what was pulled back through half or single precision is told apart by the Fisher's mean alone
    for n in range(N):
        J = true.J[n]
        if likelihood == "gaussian":
            fitted = J.T @ (torch.linalg.pinv(J.T, rtol=1e-12) @ found[:, n].T)
            off = float((fitted - found[:, n].T).abs().max())
            t.check(off <= 1e-6 * (1 + norm(J)), f"{where}: a sampled score lies outside the Jacobian", off)
            continue
        if likelihood == "categorical" and outputs.ndim > 2 or C > 4:
            continue
        choices = range(C) if likelihood == "categorical" else itertools.product((0.0, 1.0), repeat=C)
        y = torch.tensor(list(choices), dtype=F64 if likelihood == "bernoulli" else torch.long)
        f = outputs[n].flatten().expand(len(y), C)
        candidates = residuals(f, y.view(len(y), *(() if likelihood == "categorical" else (C,))), likelihood) @ J
        off = float(torch.cdist(found[:, n], candidates).amin(1).max())
        bound = ROUND_OFF * eps * (1 + norm(J)) * (1 + norm(outputs[n]))
        t.check(off <= bound, f"{where}: a sampled score belongs to no label", f"{off:.3g}")
