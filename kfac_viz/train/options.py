"""The choices that one optimizer makes for all of its layers, checked and frozen, and those of each group."""

from __future__ import annotations

import dataclasses
import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..method.checks import check_choice, check_count, check_damping, check_number, check_seed, check_type
from ..method.kfac import RULES
from ..method.kronecker import CONVENTIONS
from ..method.products import FACTORS, check_factors
from ..method.two_level import CORRECTIONS
from ..scores.likelihood import FLAVOURS, LIKELIHOODS
from .search import SEARCHES

SPACES = ("nicolaides", "spectral", "smooth", "krylov", "random")
FIRST_LEVELS = ("kfac", "ekfac", "blocks", "diagonal", "identity", "none", "exact")
COARSE_OPERATORS = ("captured", "kronecker")
USUAL = {  # what goes with each step rule where nothing else is asked for; a heavy ball destroys what a search gains
    "fixed": {"lr": 0.1, "momentum": 0.9, "decay": 0.95, "coarse_examples": 512},
    "kl_clip": {"lr": 0.3, "momentum": 0.9, "decay": 0.95, "coarse_examples": 512},
    "quadratic": {"lr": 1.0, "momentum": 0.9, "decay": 0.95, "coarse_examples": 512},
    "line_search": {"lr": 1.0, "momentum": 0.0, "decay": 0.0, "coarse_examples": None},
}
STEP_RULES = tuple(USUAL)

_CHOICES = {
    "likelihood": LIKELIHOODS,
    "first_level": FIRST_LEVELS,
    "factors": FACTORS,
    "rule": RULES,
    "coarse": SPACES,
    "correction": CORRECTIONS,
    "coarse_operator": COARSE_OPERATORS,
    "fisher": FLAVOURS,
    "convention": CONVENTIONS,
    "step_rule": STEP_RULES,
    "search": SEARCHES,
}
_LEAST = {"per_layer": 0, "iterations": 0} | dict.fromkeys(
    ("samples", "observe_every", "refresh_every", "coarse_every", "coarse_examples", "coarse_window"), 1
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What :class:`kfac_viz.TwoLevelKFAC` explains and passes on, one for one.

    Raises:
        ValueError, TypeError: an option out of range.
    """

    likelihood: str
    damping: float = 0.1
    first_level: str = "kfac"
    factors: str = "kfac"
    rule: str = "factored"
    coarse: str = "spectral"
    per_layer: int = 0
    total: int | None = None
    correction: str = "balanced"
    iterations: int = 0
    coarse_operator: str = "captured"
    fisher: str = "mc"
    samples: int = 1
    decay: float | None = None
    observe_every: int = 5
    refresh_every: int = 10
    coarse_every: int | None = None
    coarse_examples: int | None = None
    coarse_window: int = 4
    convention: str = "expand"
    seed: int = 0
    step_rule: str = "kl_clip"
    kl_clip: float = 5e-4
    search: str = "parabola"
    decoupled: bool = False
    capturable: bool = False

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        self._check_first_level()
        for name in ("decay", "coarse_examples"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, self.usual(name))
        checked: dict[str, Any] = {
            "damping": check_damping(self.damping),
            "decay": check_number("decay", self.decay, 0.0, 1.0),
            "kl_clip": check_number("kl_clip", self.kl_clip, 0.0, math.inf, open_low=True),
            "seed": check_seed(self.seed),
            "decoupled": bool(self.decoupled),
            "capturable": bool(self.capturable),
        }
        for name, least in _LEAST.items():
            if not (name in ("coarse_every", "coarse_examples") and getattr(self, name) is None):
                checked[name] = check_count(name, getattr(self, name), least)
        if self.total is not None:
            checked["total"] = check_count("total", self.total, least=0)
            if self.coarse != "spectral":
                raise ValueError(f"total= spreads the columns of coarse='spectral'; {self.coarse!r} takes per_layer.")
        self._check_iterations()
        for name, value in checked.items():  # plain numbers, whatever kind they came as
            object.__setattr__(self, name, value)

    def _check_first_level(self) -> None:
        """Refuse what says something about another first level than this one."""
        check_factors(self.factors, self.convention)
        first = f"first_level={self.first_level!r}"
        if self.factors != "kfac" and self.first_level not in ("kfac", "ekfac"):
            raise ValueError(f"factors={self.factors!r} belong to first_level='kfac' or 'ekfac'; {first} has none.")
        if self.first_level != "kfac" and self.coarse_every is not None:
            raise ValueError(f"{first} is made of the vectors that A holds, together with it: leave out coarse_every.")
        if self.first_level == "none" and not self.columns:
            raise ValueError(f"{first} leaves the coarse level alone, and per_layer=0 has none: nothing would move.")
        if self.first_level == "exact" and self.columns:
            raise ValueError(f"{first} leaves nothing to a coarse level: set per_layer=0 and total=None.")

    def _check_iterations(self) -> None:
        """Refuse conjugate gradients without a symmetric preconditioner, and where they would not change the step."""
        if not self.iterations:
            return
        if self.columns and self.correction not in ("additive", "balanced"):
            raise ValueError(
                f"iterations= are of conjugate gradients, whose preconditioner is symmetric, and correction="
                f"{self.correction!r} is not: take 'balanced'."
            )
        if self.first_level in ("none", "exact"):
            has = {"none": "moves within the coarse space alone", "exact": "solves the system"}[self.first_level]
            raise ValueError(f"first_level={self.first_level!r} {has}, where iterations change nothing: set them to 0.")
        if self.capturable:
            raise ValueError("capturable=True decides nothing on the host; conjugate gradients do: set iterations=0.")

    @classmethod
    def read(cls, given: dict[str, Any]) -> Options:
        """From keywords; a TypeError names one that does not exist, or a missing ``likelihood``."""
        unknown = [name for name in given if name not in NAMES]
        if unknown:
            raise TypeError(f"TwoLevelKFAC has no option {unknown[0]!r}; it has {', '.join(NAMES)}.")
        if "likelihood" not in given:
            raise TypeError(f"Name the likelihood of the loss: likelihood= one of {', '.join(map(repr, LIKELIHOODS))}.")
        return cls(**given)

    def usual(self, name: str) -> Any:
        """The value of ``lr``, ``momentum``, ``decay`` or ``coarse_examples`` that goes with the step rule."""
        return USUAL[self.step_rule][name]

    @property
    def columns(self) -> int:
        """How many each layer has at most, or all of them in total; 0 is one-level K-FAC."""
        return self.per_layer if self.total is None else self.total

    @property
    def shaping(self) -> dict[str, Any]:
        """Those that shape the curvature, which a saved state remembers."""
        return {name: getattr(self, name) for name in SHAPING}


NAMES = tuple(field.name for field in dataclasses.fields(Options))
SHAPING = (
    *("likelihood", "first_level", "factors", "rule", "coarse", "per_layer", "total", "correction"),
    *("coarse_operator", "fisher", "samples", "convention"),
)


def check_group(group: dict[str, Any]) -> None:
    """Refuse options of a group that are missing or out of range: they may be edited at any time."""
    missing = [name for name in ("lr", "plain_lr", "momentum", "weight_decay", "maximize") if name not in group]
    if missing:
        raise ValueError(f"A group of parameters has no {missing[0]!r}.")
    check_type("maximize", group["maximize"], bool)
    check_number("lr", group["lr"], 0.0, math.inf)
    check_number("plain_lr", group["plain_lr"], 0.0, math.inf)
    check_number("momentum", group["momentum"], 0.0, 1.0, open_high=True)
    check_number("weight_decay", group["weight_decay"], 0.0, math.inf)
    for dtype in {p.dtype for p in group["params"] if isinstance(p, Tensor) and p.is_floating_point()}:
        for name in ("lr", "plain_lr", "weight_decay"):
            if float(group[name]) > torch.finfo(dtype).max:
                raise ValueError(f"{name} {group[name]:.3g} overflows parameters of {dtype}; choose a smaller one.")


def shows_options(method: Any) -> Any:
    """Give a method that passes ``**options`` on the signature that its callers see: every option by name."""
    signature = inspect.signature(method)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    options = inspect.signature(Options).parameters.values()
    method.__signature__ = signature.replace(parameters=[*own, *options])
    return method
