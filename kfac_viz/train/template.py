"""Read what was saved by a template, which says what each value has to be: all is checked before any is used."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..method.checks import finite


@dataclass(frozen=True)
class Array:
    """The template of a tensor of real numbers, or of ``whole`` ones.

    Attributes:
        shape: its shape, with None for an axis of any length; None where any shape will do.
        whole: whether it holds indices (int64).
    """

    shape: tuple[int | None, ...] | None = None
    whole: bool = False

    def read(self, x: Any, what: str, like: Tensor | None) -> Tensor:
        """The tensor on the device of ``like``, real numbers in its dtype; as it is for None.

        Raises:
            ValueError: no tensor, or one of another shape or kind.
        """
        if not isinstance(x, Tensor):
            raise ValueError(f"In the saved state {what} must be a tensor; got {type(x).__name__}.")
        wanted = tuple(x.shape) if self.shape is None else self.shape
        if len(wanted) != x.ndim or any(n not in (None, m) for n, m in zip(wanted, x.shape, strict=True)):
            expected = "(" + ", ".join("…" if n is None else str(n) for n in wanted) + ")"
            raise ValueError(f"In the saved state {what} must have shape {expected}; got {tuple(x.shape)}.")
        kind = x.dtype == torch.int64 if self.whole else x.is_floating_point()
        has_values = not x.is_meta or (like is not None and like.is_meta)
        if not (kind and has_values and x.layout == torch.strided):
            raise ValueError(f"In the saved state {what} is a tensor of {x.dtype}, {x.layout}, on {x.device}.")
        if like is None:
            return x
        return x.to(like.device) if self.whole else x.to(like)


@dataclass(frozen=True)
class Each:
    """The template of a dictionary whose values, under any names, all fit one template."""

    value: Any


@dataclass(frozen=True)
class Maybe:
    """The template of None, or of what fits another template."""

    value: Any


def read(value: Any, template: Any, what: str, like: Tensor | None = None) -> Any:
    """``value`` as ``template`` describes it, its tensors as ``like`` has dtype and device, or as they are.

    A template is a type (bool, str; int and float stand for finite numbers of at least 0), an :class:`Array`, a list of
    one template (a list of any length), a tuple of templates (a list of just these), a dictionary (one that has these
    keys; others are left out), :class:`Each`, :class:`Maybe`, or a function that looks at the value and returns its
    template.

    >>> read({"steps": 3, "seen": ["a"], "more": 1}, {"steps": int, "seen": [str]}, "it")
    {'steps': 3, 'seen': ['a']}
    >>> read({"steps": 3}, {"steps": int, "seen": [str]}, "it")
    Traceback (most recent call last):
    ...
    ValueError: In the saved state it has no 'seen'.

    Raises:
        ValueError: what is missing, of another kind or shape, or holds NaN or inf; the sentence says where.
    """
    tensors: dict[str, Tensor] = {}
    found = _walk(value, template, what, like, tensors)
    for name, fine in zip(tensors, finite(list(tensors.values())), strict=True):
        if not fine:
            raise ValueError(f"In the saved state {name} holds NaN or inf.")
    return found


def _walk(value: Any, template: Any, what: str, like: Tensor | None, tensors: dict[str, Tensor]) -> Any:
    """:func:`read` without the look at NaN and inf; the tensors of real numbers are noted under their names."""

    def inner(item: Any, of: Any, name: Any) -> Any:
        return _walk(item, of, f"{what}[{name!r}]", like, tensors)

    if isinstance(template, Maybe):
        return None if value is None else _walk(value, template.value, what, like, tensors)
    if isinstance(template, Array):
        x = template.read(value, what, like)
        if not template.whole:
            tensors[what] = x
        return x
    if isinstance(template, Each):
        _check_kind(value, dict, what)
        return {name: inner(item, template.value, name) for name, item in value.items()}
    if isinstance(template, dict):
        _check_kind(value, dict, what)
        if missing := [name for name in template if name not in value]:
            raise ValueError(f"In the saved state {what} has no {missing[0]!r}.")
        return {name: inner(value[name], of, name) for name, of in template.items()}
    if isinstance(template, (list, tuple)):
        _check_kind(value, (list, tuple), what)
        each = template * len(value) if isinstance(template, list) else template
        if len(each) != len(value):
            raise ValueError(f"In the saved state {what} must have {len(each)} entries; got {len(value)}.")
        return [inner(item, of, i) for i, (item, of) in enumerate(zip(value, each, strict=True))]
    if isinstance(template, type):
        _check_kind(value, (int, float) if template is float else template, what)
        if template in (int, float) and (isinstance(value, bool) or not 0 <= value < math.inf):
            raise ValueError(f"In the saved state {what} must be a finite number of at least 0; got {value!r}.")
        return template(value)
    choose: Callable[[Any], Any] = template
    return _walk(value, choose(value), what, like, tensors)


def _check_kind(value: Any, kind: type | tuple[type, ...], what: str) -> None:
    if not isinstance(value, kind):
        expected = (kind[-1] if isinstance(kind, tuple) else kind).__name__
        raise ValueError(f"In the saved state {what} must be a {expected}; got {type(value).__name__}.")
