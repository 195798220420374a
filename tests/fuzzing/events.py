"""Options good and bad, and what a caller may do to a training run between two steps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import kfac_viz as kv
from kfac_viz.method.products import FACTORS
from kfac_viz.train.options import FIRST_LEVELS

from .hostile import BAD_COUNTS, BAD_DAMPINGS, NO_NUMBERS, ODD_DAMPINGS, WORDS, number, spoiled
from .judge import F64, Mishap, Try

if TYPE_CHECKING:
    from .training import Training

GOOD: dict[str, tuple] = {
    "lr": (None, 0.0, 1e-3, 0.1, 0.1, 1.0, 1),
    "damping": (0.1, 0.1, 1e-2, 1.0, 1, 1e3, 1e12, 1e-8, 0),
    "first_level": ("kfac", "kfac", *FIRST_LEVELS),
    "factors": ("kfac", *FACTORS),
    "rule": ("factored", "eigen"),
    "coarse": ("nicolaides", "spectral", "smooth", "krylov", "random"),
    "per_layer": (0, 1, 1, 2, 4, 20, 10**400),
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
    "convention": ("expand", "expand", "expand", "reduce"),
    "seed": (0, 1, 7),
}
BAD_NUMBERS = (math.nan, math.inf, -math.inf, -1, -1e-300, 10**400, *NO_NUMBERS[:-2])
BAD: dict[str, tuple] = {
    **dict.fromkeys(("lr", "weight_decay", "momentum", "decay", "kl_clip"), BAD_NUMBERS),
    **dict.fromkeys(("rule", "coarse", "correction", "coarse_operator", "fisher", "first_level", "factors"), WORDS),
    **dict.fromkeys(("step_rule", "convention"), WORDS),
    **dict.fromkeys(("samples", "observe_every", "refresh_every", "coarse_every", "coarse_examples", "coarse_window"),
                    (*BAD_COUNTS[:5], True, [], 1j, 0)),
    "per_layer": BAD_COUNTS, "seed": (*BAD_COUNTS, 10**400), "damping": BAD_DAMPINGS, "likelihood": WORDS,
    "layers": ("0", [], [0], ["nope"], [None], 3, [[]], ["0", "0"], "", {"0": 1}),
    "decoupled": ("x",), "maximize": ("x", None),
}  # fmt: skip


# Where none of the values above is right, so that to be taken is a failure. None is the default of two.
STRICT = tuple(name for name in BAD if name not in ("layers", "decoupled", "maximize"))


def parameters_asked_for(t: Try, run: Training) -> Any:
    """What may be given for the optimizer's second argument, and what may not."""
    all_ = list(run.model.parameters()) or [nn.Parameter(torch.ones(2))]
    half, foreign = len(all_) // 2, nn.Parameter(torch.ones(2, dtype=run.dtype))
    groups = (
        [{"params": all_[:half], "lr": 0.5}, {"params": all_[half:], "momentum": 0.0}],
        [{"params": all_, "weight_decay": 0.1, "lr": 0.01}],
        [{"params": all_, "lr": -1}],
        [{"params": [foreign]}, {"params": all_}],
        {"params": all_},
        [{}],
    )
    lists = (all_, all_, all_[::-1], all_[:half], all_[-2:], iter(all_), list(run.model.named_parameters()))
    return t.pick(*groups, *lists, [], [foreign], [*all_, all_[0]], all_[0], 0.1, "x", [None], [1.0])


class Events:
    """One thing that happens before a step. Its attributes say what observe and step are then given."""

    SEEN = ("gradient", "freeze", "unfreeze", "targets", "blind", "twice", "another batch", "mode", "completed")

    def __init__(self, t: Try, run: Training, opt: kv.TwoLevelKFAC, x: list[Tensor], y: Tensor) -> None:
        self.t, self.run, self.opt = t, run, opt
        self.x: list[Any] = x  # for observe
        self.y: Any = y
        self.targets: Tensor | None = None  # of the loss, where they change
        self.observations = 1
        self.closure: str | None = None
        self.context: Callable[[], Any] | None = None
        self.other_dtype = False
        self.must_refuse: str | None = None
        ways = {name: getattr(self, name) for name in dir(type(self)) if not name.startswith("_") and name.islower()}
        self.name = t.pick(*ways, "gradient", "gradient", "closures", "closures", "inputs", "option", "group")
        ways[self.name]()

    def option(self) -> None:
        name, group = self.t.pick("lr", "momentum", "weight_decay"), self.t.pick(*self.opt.param_groups)
        value = group[name] = self.t.pick(*BAD_NUMBERS, torch.tensor(0.1), 1e30, 2.0)
        if any(value is bad for bad in BAD_NUMBERS):
            self.must_refuse = f"{name} of {value!r}"[:40]

    def key(self) -> None:
        del self.t.pick(*self.opt.param_groups)[self.t.pick("lr", "momentum", "weight_decay", "maximize")]

    def damping(self) -> None:
        asked = self.t.pick(*BAD_DAMPINGS, *ODD_DAMPINGS, 1e12, 1e300)
        self.run.atomic(self.opt, "damping", lambda: setattr(self.opt, "damping", asked))
        self.t.check(number(asked) is not None, f"accepted the damping {asked!r}"[:60])

    def gradient(self) -> None:
        t, parameters = self.t, list(self.run.model.parameters())
        p, how = t.pick(*parameters), t.whole(0, 6)
        if how == 0:
            p.grad = None
        elif how == 1:
            for q in parameters:
                q.grad = None
        elif how == 2:
            for q in parameters:
                q.grad = None if q.grad is None else q.grad * 0
        elif p.grad is None or not p.grad.numel():
            return
        elif how == 3:
            p.grad.view(-1)[0] = t.pick(math.nan, math.inf)
        elif how == 4:
            p.grad = p.grad * t.pick(1e30, 1e-30, 1e200, 1e-300)
        elif how == 5:
            p.grad = p.grad.to_sparse()
        else:
            p.grad = p.grad.clone().requires_grad_()

    def freeze(self) -> None:
        layers = [m for m in self.run.model.modules() if isinstance(m, nn.Linear)] or [self.run.model]
        for q in self.t.pick(*layers).parameters():
            q.requires_grad_(False)

    def unfreeze(self) -> None:
        for q in self.run.model.parameters():
            q.requires_grad_(True)

    def large_targets(self) -> None:
        if self.run.likelihood == "gaussian":
            scales = (1e20, 1e15, 1e150) if self.run.dtype == F64 else (1e3, 1e10)
            self.y = self.targets = self.y * self.t.pick(*scales)

    def inputs(self) -> None:
        self.x = [spoiled(self.t, self.x[0]), *self.x[1:]]

    def other_arguments(self) -> None:
        x = self.x
        self.x = self.t.pick([], [None], ["x"], [x], [x[0], x[0], x[0]])

    def other_targets(self) -> None:
        self.y = spoiled(self.t, self.y)

    def another_batch(self) -> None:
        self.x, self.y = self.run.data()

    def blind(self) -> None:
        self.observations = 0

    def twice(self) -> None:
        self.observations = 2

    def dtype(self) -> None:
        self.run.model.to(self.t.pick(F64, torch.float32, torch.float16, torch.bfloat16))
        self.run.dtype = next(self.run.model.parameters()).dtype
        self.other_dtype = True

    def replaced(self) -> None:
        if isinstance(self.run.model, nn.Sequential):
            new = self.t.pick(nn.Linear(3, 3), nn.Identity(), nn.Linear(2, 2, bias=False))
            self.run.model[0] = new.to(self.run.dtype)

    def group(self) -> None:
        t, p = self.t, self.t.pick(*self.run.model.parameters())
        new = t.pick(nn.Parameter(torch.ones(2)), p, None, "x", torch.ones(2), [], nn.Parameter(torch.ones(3, 3)))
        more = t.pick({}, {}, {"lr": -1}, {"lr": "a"}, {"momentum": math.nan}, {"weight_decay": None}, {"lr": 10**400},
                      {"nonsense": 1})  # fmt: skip
        asked = t.pick({"params": new} | more, {"params": [new]} | more, {"lr": 1.0}, 3, None, [])
        self.run.atomic(self.opt, "add_param_group", lambda: self.opt.add_param_group(asked))

    def completed(self) -> None:
        """Parameters that were left out join, with options of their own."""
        given = {p for group in self.opt.param_groups for p in group["params"]}
        rest = [p for p in self.run.model.parameters() if p not in given]
        if rest:
            asked = {"params": rest, "lr": 0.01}
            self.run.atomic(self.opt, "add_param_group", lambda: self.opt.add_param_group(asked))

    def closures(self) -> None:
        self.closure = self.t.pick("good", "good", "raises", "raises later", "none", "float", "nan", "vector",
                                   "integer", "worse", "nan later")  # fmt: skip

    def contexts(self) -> None:
        self.context = self.t.pick(torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu"))

    def weights(self) -> None:
        p = self.t.pick(*self.run.model.parameters())
        with torch.no_grad():
            if p.numel():
                p.view(-1)[0] = self.t.pick(math.nan, math.inf, 1e30, 1e-30)

    def mode(self) -> None:
        self.run.model.train(not self.run.model.training)

    def taken_out(self) -> None:
        params = self.t.pick(*self.opt.param_groups)["params"]
        if len(params) > 1:
            params.pop(self.t.whole(0, len(params) - 1))


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
