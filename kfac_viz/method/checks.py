"""What a caller can get wrong, told in a sentence: what was expected, what came, what to do."""

from __future__ import annotations

import math
import os
import sys
import warnings
from numbers import Integral

import torch

_HOME = os.path.dirname(os.path.dirname(__file__))  # the package, all rooms of it
_INSIDE = tuple(os.path.join(path, "") for path in (_HOME, os.path.dirname(torch.__file__)))


def check_damping(damping: float) -> float:
    """λ as a float; a sentence where it is not a finite number of at least 0."""
    try:
        if isinstance(damping, (bool, str)):
            raise TypeError
        value = float(damping)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"damping must be a number; got {damping!r}.") from None
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"damping must be finite and at least 0; got {damping!r}.")
    return value


def check_choice(what: str, value: str, choices: tuple[str, ...]) -> str:
    """Refuse an unknown name, listing the known ones."""
    if value not in choices:
        raise ValueError(f"{what} must be one of {', '.join(map(repr, choices))}; got {value!r}.")
    return value


def check_count(what: str, value: int, least: int) -> int:
    """Refuse what is not a whole number of at least ``least``."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{what} must be a whole number of at least {least}; got {value!r}.")
    return int(value)


def check_type(what: str, value: object, *kinds: type) -> None:
    """Refuse an argument of another kind, by name."""
    if not isinstance(value, kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"{what} must be of type {expected}; got {type(value).__name__}.")


def check_number(
    what: str, value: float, low: float, high: float, *, open_low: bool = False, open_high: bool = False
) -> float:
    """A float in the interval, or a sentence."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{what} must be a number; got {value!r}.") from None
    inside = (number > low if open_low else number >= low) and (number < high if open_high else number <= high)
    if not (inside and math.isfinite(number)):
        interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high or high == math.inf else ']'}"
        raise ValueError(f"{what} must lie in {interval}; got {value!r}.")
    return number


def warn(message: str) -> None:
    """A warning that points at the caller's line, outside this package and PyTorch."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
