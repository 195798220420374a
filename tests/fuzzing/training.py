"""Tries of the optimizer: steps with what can go wrong in between, and states that are saved and loaded."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import re
from collections.abc import Callable
from typing import Any

import torch
from helpers import opened
from torch import Tensor, nn

import kfac_viz as kv

from .captures import outputs_of, untouched
from .events import BAD, GOOD, STRICT, Events, closure_of, parameters_asked_for
from .judge import F64, Raw, Refused, Try, difference, seeded
from .networks import ORDINARY, batch, examples, labels, network
from .oracles import gram, truth
from .steps import expected_step


class Training:
    """A model, its optimizer, and what they should be."""

    def __init__(self, t: Try) -> None:
        self.t, self.net = t, network(t)
        self.dtype = t.pick(F64, F64, F64, torch.float32, torch.float32, torch.float16, torch.bfloat16)
        self.N = examples(t)
        self.model = self.net.build(self.dtype).train(t.chance(0.3))
        self.likelihood = t.pick("categorical", "bernoulli", "gaussian", "gaussian")
        self.options = {name: t.pick(*values) for name, values in GOOD.items() if t.chance(0.4)}
        if t.chance(0.9):
            self.options = together(self.options)
        self.seen: list[tuple[int, Tensor]] = []  # examples and true Fisher of every observation
        self.simple = True  # nothing has happened that the oracle of A does not follow

    def data(self) -> tuple[list[Tensor], Tensor]:
        x = batch(self.t, self.net, self.N, self.dtype)
        return x, labels(self.t, outputs_of(self.net, x, self.dtype), self.likelihood)

    def build(self, **others: Any) -> kv.TwoLevelKFAC:
        options = {"likelihood": self.likelihood} | self.options | others
        with untouched(self.t, self.model, "TwoLevelKFAC()"):
            return self.t.call(lambda: kv.TwoLevelKFAC(self.model, **options))

    def ordinary(self, opt: kv.TwoLevelKFAC) -> bool:
        """Whether nothing here gives a reason to refuse."""
        usual = self.net.name in ORDINARY and self.dtype in (F64, torch.float32) and self.likelihood == "gaussian"
        return usual and 1e-3 <= opt.damping <= 1e3

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
        return {
            "parameters": [p.detach().clone() for p in self.model.parameters()],
            "buffers": [b.clone() for b in self.model.buffers()] if buffers else [],
            "param_groups": [{k: v for k, v in group.items() if k != "params"} for group in opt.param_groups],
            "momentum": [copy.deepcopy(opt.state.get(p)) for p in self.model.parameters()],
            "curvature": opened(opt.state_dict())["curvature"],
        }

    def atomic(
        self, opt: kv.TwoLevelKFAC, what: str, act: Callable[[], Any], excuse: Any = None, buffers: bool = True
    ) -> Any:
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
        given = {"targets": y} if opt.options.fisher == "empirical" else {}
        twin = self.copied()
        before = told(opt, "observations")
        with context():
            self.atomic(opt, "observe", lambda: opt.observe(*x, **given), lambda: twin(*x))
        if told(opt, "observations") == before:
            return
        names = (
            "transformer",
            "coupled by batch norm",
            "slow precision",
        )  # where a score of one example is an approximation
        noisy = any(isinstance(m, (nn.BatchNorm1d, nn.Dropout)) for m in twin.modules()) or self.net.name in names
        if not self.simple or opt.options.fisher == "mc" or noisy or self.dtype not in (F64, torch.float32):
            self.simple = False
            return
        exact = [v.detach().to(F64) if v.is_floating_point() else v for v in x]
        true = truth(twin.to(F64), exact, opt.partition)
        self.seen.append((len(true.outputs), true.fisher(self.likelihood, y if given else None)))

    def round(self, opt: kv.TwoLevelKFAC, x: list[Tensor] | None = None, y: Tensor | None = None) -> bool:
        """A plain round of training; whether the network can be trained at all."""
        if x is None or y is None:
            x, y = self.data()
        if self.backward(x, y) is None:
            return False
        self.observe(opt, x, y)
        self.step(opt, watch=False)
        return True

    def judge_levels(self, opt: kv.TwoLevelKFAC, T: kv.TwoLevel) -> None:
        """A against the weighted mean of the true Fishers."""
        c, window = opt.curvature, opt.curvature.window
        if not self.simple or not self.seen or window.batches < len(self.seen):
            return
        if window.examples < len(self.seen) * max(N for N, _ in self.seen):
            return
        if c._coarse_at != c.step or c._coarse_stale or c.window.parts[-1].batch != len(self.seen):
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
        self.t.check(
            off <= eps**0.5 * size,
            f"the optimizer's A is not the mean Fisher ({self.net.name})",
            f"{off:.3g} of {size:.3g}",
        )

    def step(
        self, opt: kv.TwoLevelKFAC, closure: Any = None, context: Any = contextlib.nullcontext, watch: bool = True
    ) -> None:
        t, model = self.t, self.model
        before = {p: p.detach().clone() for p in model.parameters()}
        was_finite = all(bool(p.isfinite().all()) for p in before)
        grads = {p: p.grad for p in model.parameters() if p.grad is not None}
        expected = None
        if watch and closure is None:
            T = self.atomic(opt, "preconditioner", lambda: opt.preconditioner)
            self.judge_levels(opt, T)
            expected = expected_step(opt, T, self.dtype)
        rejected = told(opt, "rejected")
        with context():
            act = opt.step if closure is None else functools.partial(opt.step, closure)
            self.atomic(opt, "step", act, closure, buffers=False)
        finite = all(bool(p.isfinite().all()) for p in model.parameters())
        if not t.check(finite or not was_finite, "a step left NaN or inf in the parameters"):
            return
        for name in ("clip", "step length", "momentum coefficient"):
            t.finite(f"diagnostics[{name!r}]", told(opt, name))
        if told(opt, "rejected") != rejected or not finite:
            return
        if closure is None or not model.training:  # drawn again, dropout gives another gradient
            self.judge_moves(opt, before, grads)
        if expected is not None:
            for p, (target, allowed) in expected.items():
                t.close(f"a {opt.options.step_rule} step", p, target, allowed)

    def judge_moves(self, opt: kv.TwoLevelKFAC, before: dict[Tensor, Tensor], grads: dict[Tensor, Tensor]) -> None:
        """No layer with a gradient stands still while others go."""
        moved = {p: not torch.equal(p, old) for p, old in before.items()}
        given = {
            p for group in opt.param_groups if isinstance(group.get("lr"), float) and group["lr"] > 0
            for p in group["params"] if p.requires_grad
        }  # fmt: skip
        sizes = {p: float(g.abs().max()) if g.layout == torch.strided and g.numel() else 0.0 for p, g in grads.items()}
        most = max(sizes.values(), default=0.0)
        if (
            not any(moved.values())
            or not 1e-8 < most < 1e8  # or the step may be less than a unit in the last place
            or max(float(p.abs().max()) for p in before) > 1e6
            or max((float(A.abs().max()) for A in opt.curvature.factors.A.values()), default=0.0) > 1e8
            or self.dtype not in (F64, torch.float32)
            or told(opt, "clip", 1.0) < 1e-4
            or opt.options.first_level == "none"  # what lies outside the coarse space stands still
        ):
            return
        if not (isinstance(opt.damping, float) and opt.damping < 1e3):
            return  # the step may be less than a unit in the last place
        for name, module in self.model.named_modules():
            mine = [p for p in module.parameters(recurse=False) if p in given and p in grads]
            if mine and not any(moved[p] for p in mine) and max(sizes[p] for p in mine) > 0.01 * most:
                if all(float(p.abs().max()) < 1e6 for p in mine):
                    kind = type(module).__name__
                    self.t.wrong(f"a {kind} with a gradient is not moved ({self.net.name})", name)


def together(options: dict[str, Any]) -> dict[str, Any]:
    """These options without those that have no meaning beside the first level."""
    first = options.get("first_level", "kfac")
    without = {"coarse_every"} if first != "kfac" else set()
    if first not in ("kfac", "ekfac"):
        without.add("factors")
    elif options.get("factors", "kfac") != "kfac":
        without.add("convention")
    if first == "none" and not options.get("per_layer"):
        without.add("first_level")
    return {name: value for name, value in options.items() if name not in without}


def told(opt: kv.TwoLevelKFAC, name: str, default: float = 0.0) -> float:
    """One of the diagnostics, whatever has become of them."""
    value = opt.diagnostics.get(name, default) if isinstance(opt.diagnostics, dict) else default
    return value if isinstance(value, (int, float)) else default


def training(t: Try) -> None:
    """A few steps of the optimizer, with what can go wrong in between."""
    run = Training(t)
    others: dict[str, Any] = {}
    if t.chance(0.2):
        name = t.pick(*BAD)
        others[name] = t.pick(*BAD[name])
        run.simple = False
    elif t.chance(0.2):
        others["params"] = parameters_asked_for(t, run)
    x, y = run.data()
    if run.backward(x, y) is None:
        return
    opt = run.build(**others)
    for name, value in others.items():
        t.check(name not in STRICT or value is None, f"TwoLevelKFAC accepted {name}={value!r}"[:60])
    if any(len(set(group["params"])) < len(group["params"]) for group in opt.param_groups):
        return t.wrong("the optimizer accepted a parameter twice")  # which would be moved twice or four times
    eventless = True
    for _ in range(t.pick(1, 1, 2, 3)):
        if t.chance(0.7):
            x, y = run.data()
        if run.backward(x, y) is None:
            return
        t.benign = eventless and run.ordinary(opt) and not others
        if t.chance(0.3):
            t.benign = run.simple = eventless = False
            with contextlib.suppress(Refused):  # the next round has to go well all the same
                eventful(t, run, opt, x, y)
        else:
            run.observe(opt, x, y)
            run.step(opt, closure_of(run, "good", x, y) if t.chance(0.3) else None, watch=t.chance(0.5))
        t.call(lambda: repr(opt))
        run.seen = run.seen if run.simple else []


def eventful(t: Try, run: Training, opt: kv.TwoLevelKFAC, x: list[Tensor], y: Tensor) -> None:
    """A round in which something happens."""
    event = Events(t, run, opt, x, y)
    if event.targets is not None:
        y = event.targets
        run.backward(x, y)
    context = event.context or contextlib.nullcontext
    for _ in range(event.observations):
        run.observe(opt, event.x, event.y, context)
    if event.other_dtype:
        x, y = run.data()
        if run.backward(x, y) is None:
            return
    how = event.closure or t.pick(None, None, "good")
    watch = event.name in Events.SEEN and t.chance(0.5)
    run.step(opt, closure_of(run, how, x, y) if how else None, context, watch=watch)
    t.check(not event.must_refuse, f"a step was taken with {event.must_refuse}")


def states(t: Try) -> None:
    """A state saved, loaded elsewhere, and gone on with."""
    run = Training(t)
    run.simple = False
    x, y = run.data()
    if run.backward(x, y) is None:
        return
    opt = run.build()
    for _ in range(t.pick(0, 1, 1, 2, 3)):
        run.round(opt)
    saved, other = t.call(opt.state_dict), copy.copy(run)
    other.model = run.copied()
    way = t.pick("same", "same", "disk", "copied", "options", "another net")
    if way == "copied":
        other.model, again = t.call(lambda: copy.deepcopy((run.model, opt)), lambda: copy.deepcopy(run.model))
    else:
        if way == "another net":
            other = Training(t)
            other.simple = False
        elif way == "options":
            name = t.pick(*(name for name in GOOD if name not in ("lr", "momentum", "weight_decay")))
            other.options = other.options | {name: t.pick(*GOOD[name])}
        elif way == "disk":
            saved = from_disk(saved)
        again = other.build()
        before = copy.deepcopy(saved)
        other.atomic(again, "load_state_dict", lambda: again.load_state_dict(saved))
        t.check(difference(before, saved) is None, "load_state_dict changed the dictionary that it was given")
        if way in ("same", "disk"):
            changed = difference(opened(before), opened(again.state_dict()))
            t.check(changed is None, f"a loaded state differs in {changed}")
    for seed in range(2):
        seeded(seed)  # of dropout
        x, y = other.data()
        if not other.round(again, x, y):
            return
        if way in ("same", "disk", "copied"):
            seeded(seed)
            run.round(opt, x, y)
            same = difference(list(run.model.parameters()), list(other.model.parameters())) is None
            # A spectral norm goes on iterating wherever a weight is looked at.
            t.check(same or run.net.name == "weight norm", "a run that was resumed goes on differently")
        t.call(again.state_dict)
        t.call(lambda: repr(again))


def from_disk(saved: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
