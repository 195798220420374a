"""Tries of the optimizer: steps with what can go wrong in between, and states that are saved and loaded."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import kfac_viz as kv

from .captures import outputs_of
from .hostile import BAD_COUNTS, BAD_DAMPINGS, NO_NUMBERS, ODD_DAMPINGS, WORDS, number, spoiled, tampered
from .judge import F64, Mishap, Raw, Refused, Try, difference, seeded
from .networks import batch, examples, labels, network
from .oracles import allowance, flat_layer, gram, matrices, norm, truth


GOOD: dict[str, tuple] = {
    "lr": (None, 0.0, 1e-3, 0.1, 0.1, 1.0, 1),
    "damping": (0.1, 0.1, 1e-2, 1.0, 1, 1e3, 1e12, 1e-8, 0),
    "rule": ("factored", "eigen"),
    "coarse": ("nicolaides", "spectral", "smooth", "krylov", "random"),
    "per_layer": (0, 1, 1, 2, 4, 20),
    "correction": ("additive", "a-def1", "a-def2", "balanced"),
    "coarse_operator": ("captured", "captured", "kronecker"),
    "fisher": ("exact", "exact", "mc", "empirical"),
    "samples": (1, 2),
    "decay": (0.95, 0.5, 1.0, 1, 0.0),
    "observe_every": (1, 1, 1, 2, 3),
    "refresh_every": (1, 1, 1, 2, 3),
    "coarse_every": (None, None, 1, 2),
    "coarse_examples": (512, 512, 1, 3),
    "coarse_window": (1, 2, 4),
    "momentum": (0.9, 0.0, 0, 0.5),
    "weight_decay": (0.0, 0.0, 1e-2, 1.0),
    "decoupled": (False, False, True),
    "maximize": (False, False, False, True),
    "step_rule": ("fixed", "fixed", "kl_clip", "kl_clip", "quadratic", "quadratic"),
    "kl_clip": (5e-4, 1e-2, 1e300, 1e-8),
    "overshoot": ("count", "off", "shorten"),
    "convention": ("expand", "expand", "expand", "reduce"),
    "seed": (0, 1, 7),
}
BAD_NUMBERS = (math.nan, math.inf, -math.inf, -1, -1e-300, 10**400, *NO_NUMBERS[:-2])
BAD: dict[str, tuple] = {
    **dict.fromkeys(("lr", "weight_decay", "momentum", "decay", "kl_clip"), BAD_NUMBERS),
    **dict.fromkeys(("rule", "coarse", "correction", "coarse_operator", "fisher", "step_rule", "overshoot", "convention"),
                    WORDS),
    **dict.fromkeys(("samples", "observe_every", "refresh_every", "coarse_every", "coarse_examples", "coarse_window"),
                    (*BAD_COUNTS[:5], True, [], 1j, 0)),
    "per_layer": (*BAD_COUNTS, 10**400), "seed": (*BAD_COUNTS, 10**400), "damping": BAD_DAMPINGS, "likelihood": WORDS,
    "layers": ("0", [], [0], ["nope"], [None], 3, [[]], ["0", "0"], iter(["0"]), "", {"0": 1}),
    "decoupled": ("x",), "maximize": ("x", None), "nonsense": (1,),
}  # fmt: skip


class Training:
    """A model, its optimizer, and what they should be."""

    def __init__(self, t: Try) -> None:
        self.t, self.net = t, network(t)
        self.dtype = t.pick(F64, F64, F64, torch.float32, torch.float32, torch.float16, torch.bfloat16)
        self.N = examples(t)
        self.model = self.net.build(self.dtype).train(t.chance(0.3))
        self.likelihood = t.pick("categorical", "bernoulli", "gaussian", "gaussian")
        self.options = {name: t.pick(*values) for name, values in GOOD.items() if t.chance(0.4)}
        self.shapes = outputs_of(self.net, batch(t, self.net, self.N, self.dtype), self.dtype)
        self.seen: list[tuple[int, Tensor]] = []  # examples and true Fisher of every observation
        self.simple = True  # nothing has happened that the oracle of A does not follow
        self.watched = True  # nor that of the step

    def data(self) -> tuple[list[Tensor], Tensor]:
        x = batch(self.t, self.net, self.N, self.dtype)
        return x, labels(self.t, outputs_of(self.net, x, self.dtype), self.likelihood)

    def build(self, **others: Any) -> kv.TwoLevelKFAC:
        return self.t.call(lambda: kv.TwoLevelKFAC(self.model, **{"likelihood": self.likelihood} | self.options | others))

    def copied(self) -> nn.Module:
        """The model as it is now, as a new one."""
        try:
            return copy.deepcopy(self.model)
        except RuntimeError:  # the older weight norm leaves weights that cannot be copied
            twin = self.net.build(self.dtype)
            with contextlib.suppress(RuntimeError):  # a layer was replaced
                twin.load_state_dict(self.model.state_dict())
            return twin.train(self.model.training)

    def backward(self, x: list[Tensor], y: Tensor) -> Tensor | None:
        """The gradient of the loss that fits; None where the network cannot be trained at all, whoever tries."""
        try:
            for p in self.model.parameters():
                p.grad = None
            loss = self.t.call(lambda: kv.nll(self.model(*x), y, self.likelihood))
            if loss.requires_grad:
                loss.backward()
            return loss.detach()
        except Raw:
            return None

    def snapshot(self, opt: kv.TwoLevelKFAC, buffers: bool) -> dict[str, Any]:
        curvature = None
        with contextlib.suppress(Exception):  # a state that was tampered with
            curvature = copy.deepcopy(opt.curvature.state())
        return {
            "parameters": [p.detach().clone() for p in self.model.parameters()],
            "buffers": [b.clone() for b in self.model.buffers()] if buffers else [],
            "param_groups": [{k: v for k, v in group.items() if k != "params"} for group in opt.param_groups],
            "momentum": [copy.deepcopy(opt.state.get(p)) for p in self.model.parameters()],
            "curvature": curvature,
        }

    def atomic(self, opt: kv.TwoLevelKFAC, what: str, act: Callable[[], Any], excuse: Any = None, buffers: bool = True) -> Any:
        """A call that, where it raises, changes nothing."""
        before = self.snapshot(opt, buffers)
        try:
            return self.t.call(act, excuse)
        except (Refused, Raw):
            changed = difference(before, self.snapshot(opt, buffers))
            place = re.sub(r"\[\].*", "", ".".join((changed or "").split(".")[1:3]))
            self.t.check(changed is None, f"{what} raised and changed {place}", changed)
            raise

    # one step

    def observe(self, opt: kv.TwoLevelKFAC, x: list[Any], y: Any, context: Any = contextlib.nullcontext) -> None:
        given = {"targets": y} if opt.curvature.fisher == "empirical" else {}
        twin = self.copied()
        before = told(opt, "observations")
        with context():
            self.atomic(opt, "observe", lambda: opt.observe(*x, **given), lambda: twin(*x))
        if told(opt, "observations") == before:
            return
        names = ("transformer", "coupled by batch norm")  # where a score of one example is an approximation
        noisy = any(isinstance(m, (nn.BatchNorm1d, nn.Dropout)) for m in twin.modules()) or self.net.name in names
        if not self.simple or opt.curvature.fisher == "mc" or noisy or self.dtype not in (F64, torch.float32):
            self.simple = False
            return
        exact = [v.detach().to(F64) if v.is_floating_point() else v for v in x]
        true = truth(twin.to(F64), exact, opt.partition)
        if true.coupled or len(true.outputs) != len(x[0]):
            self.t.wrong(f"observe({self.net.name}) accepted a model that couples the examples")
            self.simple = False
            return
        self.seen.append((len(x[0]), true.fisher(self.likelihood, y if given else None)))

    def judge_levels(self, opt: kv.TwoLevelKFAC, T: kv.TwoLevel) -> None:
        """A against the weighted mean of the true Fishers."""
        c, window = opt.curvature, opt.curvature.window
        if not self.simple or not self.seen or window.batches < len(self.seen):
            return
        if window.examples < len(self.seen) * max(N for N, _ in self.seen):
            return
        if c._coarse_at != c.step or c._coarse_stale or c.window.entries[-1]["batch"] != len(self.seen):
            return  # A is an older one
        weights = [N * window.decay ** (len(self.seen) - 1 - k) for k, (N, _) in enumerate(self.seen)]
        if not sum(weights):
            return
        expected = sum(w * F for w, (_, F) in zip(weights, self.seen, strict=True)) / sum(weights)
        found = gram(T.A.operator)
        eps = torch.finfo(self.dtype).eps
        if not self.t.finite("the optimizer's A", found) or not bool(torch.isfinite(expected).all()):
            return
        off, size = float((found - expected).abs().max()), max(float(expected.abs().max()), 1e-30)
        self.t.check(off <= eps**0.5 * size, f"the optimizer's A is not the mean Fisher ({self.net.name})", f"{off:.3g} of {size:.3g}")

    def step(self, opt: kv.TwoLevelKFAC, closure: Any = None, context: Any = contextlib.nullcontext, watch: bool = True) -> None:
        t, model = self.t, self.model
        before = {p: p.detach().clone() for p in model.parameters()}
        was_finite = all(bool(p.isfinite().all()) for p in before)
        grads = {p: p.grad for p in model.parameters() if p.grad is not None}
        expected = None
        if watch and closure is None:
            T = self.atomic(opt, "preconditioner", lambda: opt.preconditioner)
            self.judge_levels(opt, T)
            expected = self.expected(opt, T)
        marks = {k: told(opt, k) for k in ("shortened", "rejected")}
        with context():
            self.atomic(opt, "step", lambda: opt.step(closure) if closure is not None else opt.step(), buffers=False)
        finite = all(bool(p.isfinite().all()) for p in model.parameters())
        if not t.check(finite or not was_finite, "a step left NaN or inf in the parameters"):
            return
        for name in ("clip", "step length", "momentum coefficient"):
            t.finite(f"diagnostics[{name!r}]", told(opt, name))
        if any(told(opt, k) != v for k, v in marks.items()) or not finite:
            return
        if closure is None or not model.training:  # drawn again, dropout gives another gradient
            self.judge_moves(opt, before, grads)
        if expected is not None:
            for p, (target, allowed) in expected.items():
                t.close(f"a {opt.step_rule} step", p, target, allowed)

    def judge_moves(self, opt: kv.TwoLevelKFAC, before: dict[Tensor, Tensor], grads: dict[Tensor, Tensor]) -> None:
        """No layer with a gradient stands still while others go."""
        moved = {p: not torch.equal(p, old) for p, old in before.items()}
        given = {
            p for group in opt.param_groups if isinstance(group.get("lr"), float) and group["lr"] > 0
            for p in group["params"] if p.requires_grad
        }  # fmt: skip
        sizes = {p: float(g.abs().max()) if g.layout == torch.strided and g.numel() else 0.0 for p, g in grads.items()}
        most = max(sizes.values(), default=0.0)
        if not any(moved.values()) or self.dtype not in (F64, torch.float32) or told(opt, "clip", 1.0) < 1e-4:
            return
        if not (isinstance(opt.damping, float) and opt.damping < 1e3):
            return  # the step may be less than a unit in the last place
        for name, module in self.model.named_modules():
            mine = [p for p in module.parameters(recurse=False) if p in given and p in grads]
            if mine and not any(moved[p] for p in mine) and max(sizes[p] for p in mine) > 0.01 * most:
                if all(float(p.abs().max()) < 1e6 for p in mine):
                    kind = type(module).__name__
                    self.t.wrong(f"a {kind} with a gradient is not moved ({self.net.name})", name)

    def expected(self, opt: kv.TwoLevelKFAC, T: kv.TwoLevel) -> dict[Tensor, tuple[Tensor, float]] | None:
        """Where a step takes every parameter, and how far off it may be, from the table and the formulas."""
        model, c = self.model, opt.curvature
        groups = {p: group for group in opt.param_groups for p in group["params"]}
        if self.dtype not in (F64, torch.float32) or opt.step_rule == "quadratic":
            return None
        if any(q not in groups for name in opt.partition.names for q in model.get_submodule(name).parameters(recurse=False)):
            return None
        if any(name not in c.factors.weight for name in opt.partition.names):
            return None
        if any(not isinstance(group[k], (int, float)) for group in opt.param_groups for k in ("lr", "momentum", "weight_decay")):
            return None
        if not all(bool(p.isfinite().all()) and (p.grad is None or p.grad.layout == torch.strided) for p in model.parameters()):
            return None
        g64: dict[Tensor, Tensor] = {}
        for p, group in groups.items():
            if p.grad is not None:
                g64[p] = p.grad.to(F64) * (-1 if group["maximize"] else 1)
                if not opt.decoupled:
                    g64[p] = g64[p] + group["weight_decay"] * p.detach().to(F64)
        layers = []
        for layer in opt.partition.layers:
            module = model.get_submodule(layer.name)
            layers.append([q for q in (module.weight, module.bias) if q is not None])
        flat = lambda of: torch.cat([flat_layer(*(of(q) for q in qs), *([None] if len(qs) == 1 else [])) for qs in layers])
        g = flat(lambda q: g64.get(q, torch.zeros_like(q, dtype=F64)))
        A64, T64, size, κ = matrices(T)
        v = T64 @ g
        v = v * flat(lambda q: torch.full_like(q, float(q in g64), dtype=F64))
        off, scale, relative = allowance(self.dtype, κ, size * float(g.norm())), 1.0, 0.0
        if opt.step_rule == "kl_clip":
            moved = v * flat(lambda q: torch.full_like(q, groups[q]["lr"], dtype=F64))
            form = float(moved @ A64 @ moved)
            scale = min(1.0, (opt.kl_clip / form) ** 0.5) if form > 0 else 1.0
            relative = norm(A64) * float(moved.norm()) * off * max(x["lr"] for x in groups.values()) / form if form > 0 else math.inf
        if not math.isfinite(off) or not relative < 0.1:
            return None
        places: dict[Tensor, Tensor] = {}
        for layer, qs, piece in zip(opt.partition.layers, layers, v.split([x.size for x in opt.partition.layers]), strict=True):
            W = piece.view(layer.shape)
            places[qs[0]] = (W[:, :-1] if len(qs) == 2 else W).reshape(qs[0].shape)
            if len(qs) == 2:
                places[qs[1]] = W[:, -1]
        targets = {}
        for p, direction in g64.items():
            group, loose = groups[p], 0.0
            if p in places:
                direction, loose = scale * places[p], scale * (off + relative * float(v.abs().max()))
            old = opt.state.get(p, {}).get("momentum_buffer")
            along = direction + (group["momentum"] * old.to(F64) if old is not None and group["momentum"] else 0)
            start = p.detach().to(F64) * (1 - group["lr"] * group["weight_decay"] if opt.decoupled else 1)
            target = start - group["lr"] * along
            eps = torch.finfo(self.dtype).eps
            bound = group["lr"] * loose + 1e2 * eps * float(target.abs().max() + start.abs().max() + (group["lr"] * along).abs().max())
            targets[p] = (target, bound)
        return targets


def told(opt: kv.TwoLevelKFAC, name: str, default: float = 0.0) -> float:
    """One of the diagnostics, whatever has become of them."""
    value = opt.diagnostics.get(name, default) if isinstance(opt.diagnostics, dict) else default
    return value if isinstance(value, (int, float)) else default


def events(t: Try, run: Training, opt: kv.TwoLevelKFAC, x: list[Any], y: Any) -> dict[str, Any]:
    """Something that a caller may do before a step; what is returned goes to observe and step."""
    model, group = run.model, t.pick(*opt.param_groups)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    parameters = list(model.parameters())
    p = t.pick(*parameters)
    way = t.pick("option", "option", "key", "damping", "gradient", "gradient", "gradient", "freeze", "freeze", "unfreeze", "targets",
                 "inputs", "inputs", "blind", "twice", "another batch", "dtype", "replaced", "group", "group", "closure", "closure", "closure",
                 "context", "weights", "mode", "taken out", "observe targets", "no batch")  # fmt: skip
    run.simple = False
    run.watched = way in ("gradient", "freeze", "unfreeze", "targets", "blind", "twice", "another batch", "mode")
    if way == "option":
        name = t.pick("lr", "momentum", "weight_decay")
        value = t.pick(*BAD_NUMBERS, torch.tensor(0.1), 1e300, 1e30, 2.0)
        group[name] = value
        bad = not isinstance(value, Tensor) and not isinstance(value, (int, float)) or isinstance(value, float) and not math.isfinite(value)
        return {"refuse": f"{name} of {value!r}"[:40] if bad or (isinstance(value, (int, float)) and (value < 0 or value > 1e300)) else None}
    if way == "key":
        del group[t.pick("lr", "momentum", "weight_decay", "maximize")]
    elif way == "damping":
        asked = t.pick(*BAD_DAMPINGS, *ODD_DAMPINGS, 1e12, 1e300)
        run.atomic(opt, "damping", lambda: setattr(opt, "damping", asked))
        t.check(number(asked) is not None, f"accepted the damping {asked!r}"[:60])
    elif way == "gradient" and p.grad is not None and p.grad.numel():
        how = t.whole(0, 6)
        if how == 0:
            p.grad.view(-1)[0] = t.pick(math.nan, math.inf)
        elif how == 1:
            p.grad = None
        elif how == 2:
            for q in parameters:
                q.grad = None
        elif how == 3:
            for q in parameters:
                q.grad = None if q.grad is None else q.grad * 0
        elif how == 4:
            p.grad = p.grad * t.pick(1e30, 1e-30, 1e200, 1e-300)
        elif how == 5:
            p.grad = p.grad.to_sparse()
        else:
            p.grad = p.grad.clone().requires_grad_()
    elif way == "freeze" and layers:
        for q in t.pick(*layers).parameters():
            q.requires_grad_(False)
    elif way == "unfreeze":
        for q in parameters:
            q.requires_grad_(True)
    elif way == "targets" and run.likelihood == "gaussian":
        return {"y": y * t.pick(1e20, 1e15, 1e150) if run.dtype == F64 else y * t.pick(1e3, 1e10)}
    elif way == "inputs":
        return {"x": [spoiled(t, x[0]), *x[1:]]}
    elif way == "no batch":
        return {"x": t.pick([], [None], ["x"], [x], [x[0], x[0], x[0]])}
    elif way == "observe targets":
        return {"observe_y": spoiled(t, y)}
    elif way == "another batch":
        return {"x": run.data()[0]}
    elif way in ("blind", "twice"):
        return {"observe": {"blind": 0, "twice": 2}[way]}
    elif way == "dtype":
        model.to(t.pick(F64, torch.float32, torch.float16, torch.bfloat16))
        run.dtype = next(model.parameters()).dtype
        return {"stop": True}
    elif way == "replaced" and isinstance(model, nn.Sequential):
        model[0] = t.pick(nn.Linear(3, 3), nn.Identity(), nn.Linear(2, 2, bias=False)).to(run.dtype)
    elif way == "group":
        new = t.pick(nn.Parameter(torch.ones(2)), p, None, "x", torch.ones(2), [], nn.Parameter(torch.ones(3, 3)))
        more = t.pick({}, {}, {"lr": -1}, {"lr": "a"}, {"momentum": math.nan}, {"weight_decay": None}, {"lr": 10**400}, {"nonsense": 1})
        asked = t.pick({"params": new} | more, {"params": [new]} | more, {"lr": 1.0}, 3, None, [])
        run.atomic(opt, "add_param_group", lambda: opt.add_param_group(asked))
    elif way == "closure":
        return {"closure": t.pick("good", "good", "good", "raises", "raises later", "none", "float", "nan", "vector", "integer", "worse",
                                  "nan later")}  # fmt: skip
    elif way == "context":
        return {"context": t.pick(torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu"))}
    elif way == "weights" and p.numel():
        with torch.no_grad():
            p.view(-1)[0] = t.pick(math.nan, math.inf, 1e30, 1e-30)
    elif way == "mode":
        model.train(not model.training)
    elif way == "taken out" and len(group["params"]) > 1:
        group["params"].pop(t.whole(0, len(group["params"]) - 1))
    return {}


def closure_of(run: Training, how: str, x: list[Tensor], y: Tensor) -> Callable[[], Any]:
    """A closure, good or bad."""
    calls = itertools.count(1)

    def closure() -> Any:
        n = next(calls)
        if how == "raises" or (how == "raises later" and n > 1):
            raise Mishap
        for p in run.model.parameters():
            p.grad = None
        loss = kv.nll(run.model(*x), y, run.likelihood)
        loss.backward()
        if how == "worse" and n > 1:
            return loss + 1e3
        if how == "nan" or (how == "nan later" and n > 1):
            return loss * math.nan
        return {"none": None, "float": float(loss), "vector": loss.expand(2), "integer": 3}.get(how, loss)

    return closure


def training(t: Try) -> None:
    """A few steps of the optimizer, with what can go wrong in between."""
    run = Training(t)
    others: dict[str, Any] = {}
    if t.chance(0.2):
        name = t.pick(*BAD)
        others[name] = t.pick(*BAD[name])
        run.simple = False
    elif t.chance(0.2):
        parameters = list(run.model.parameters()) or [nn.Parameter(torch.ones(2))]
        half = parameters[: len(parameters) // 2]
        others["params"] = t.pick(
            lambda: parameters, lambda: parameters[::-1], lambda: half, lambda: parameters[-2:], lambda: iter(parameters), list,
            lambda: [{"params": half, "lr": 0.5}, {"params": parameters[len(half):], "momentum": 0.0}],
            lambda: [{"params": parameters, "weight_decay": 0.1, "lr": 0.01}], lambda: list(run.model.named_parameters()),
            lambda: parameters[0], lambda: 0.1, lambda: "x", lambda: [None], lambda: [{"params": parameters, "lr": -1}],
            lambda: [nn.Parameter(torch.ones(2))], lambda: [*parameters, parameters[0]], lambda: [{}], lambda: [1.0],
            lambda: [{"params": [nn.Parameter(torch.ones(2, dtype=run.dtype))]}, {"params": parameters}], lambda: {"params": parameters},
        )()  # fmt: skip
    x, y = run.data()
    if run.backward(x, y) is None:
        return
    opt = run.build(**others)
    for _ in range(t.pick(1, 1, 2, 3)):
        if t.chance(0.7):
            x, y = run.data()
        if run.backward(x, y) is None:
            return
        did = events(t, run, opt, x, y) if t.chance(0.3) else None
        ordinary, did = did is None, did or {}
        if "y" in did:
            y = did["y"]
            run.backward(x, y)
        context = did.get("context", contextlib.nullcontext)
        try:
            for _ in range(did.get("observe", 1)):
                run.observe(opt, did.get("x", x), did.get("observe_y", y), context)
            if did.get("stop"):
                x, y = run.data()
                if run.backward(x, y) is None:
                    return
            how = did.get("closure", "good" if t.chance(0.3) else None)
            closure = closure_of(run, how, x, y) if how else None
            run.step(opt, closure, context, watch=run.watched and t.chance(0.5))
            t.check(not did.get("refuse"), f"a step was taken with {did.get('refuse')}")
        except Refused:
            if ordinary:
                raise
            run.simple = False
        t.call(lambda: repr(opt))
        run.seen = run.seen if run.simple else []


def states(t: Try) -> None:
    """A state saved, loaded elsewhere, and gone on with; often tampered with on the way."""
    run = Training(t)
    run.simple = False
    x, y = run.data()
    if run.backward(x, y) is None:
        return
    opt = run.build()
    for _ in range(t.pick(0, 1, 1, 2, 3)):
        x, y = run.data()
        run.backward(x, y)
        run.observe(opt, x, y)
        run.step(opt, watch=False)
    saved = t.call(opt.state_dict)
    other = copy.copy(run)
    other.model = run.copied()
    seed = 0
    way = t.pick("same", "same", "disk", "copied", "tampered", "tampered", "tampered", "tampered", "options", "another net")
    if way == "another net":
        other = Training(t)
        other.simple = False
    if way == "copied":
        other.model, again = t.call(lambda: copy.deepcopy((run.model, opt)))
    else:
        if way == "options":
            name = t.pick(*(name for name in GOOD if name not in ("lr", "momentum", "weight_decay")))
            other.options = other.options | {name: t.pick(*GOOD[name])}
        again = other.build()
        if way == "disk":
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = t.call(lambda: torch.load(file, weights_only=True))
        if way == "tampered":
            saved = tampered(t, saved)
        before = copy.deepcopy(saved) if way == "same" else None
        other.atomic(again, "load_state_dict", lambda: again.load_state_dict(saved))
        if before is not None:
            t.check(difference(before, saved) is None, "load_state_dict changed the dictionary that it was given")
            t.check((changed := difference(before, again.state_dict())) is None, f"a loaded state differs in {changed}")
    for _ in range(2):
        x, y = other.data()
        seed += 1
        seeded(seed)
        if other.backward(x, y) is None:
            return
        other.observe(again, x, y)
        other.step(again, watch=False)
        if way in ("same", "disk", "copied"):
            seeded(seed)
            run.backward(x, y)
            run.observe(opt, x, y)
            run.step(opt, watch=False)
            t.check(difference(list(run.model.parameters()), list(other.model.parameters())) is None,
                    "a run that was resumed goes on differently")  # fmt: skip
        else:
            t.call(again.state_dict)
            t.call(lambda: repr(again))
