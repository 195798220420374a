"""What a caller can get wrong, told in a sentence: what was expected, what came, what to do."""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from numbers import Integral
from threading import current_thread, main_thread

import torch
from torch import Tensor, nn

_HOME = os.path.dirname(os.path.dirname(__file__))  # the package, all rooms of it
_INSIDE = tuple(os.path.join(path, "") for path in (_HOME, os.path.dirname(torch.__file__)))
_SMALL = 2**28  # bytes that are not worth a look at what is left
LARGEST_COUNT = 2**60  # also of seeds, so that a generator can take what is derived from one


def check_number(
    what: str, value: float, low: float, high: float, *, open_low: bool = False, open_high: bool = False
) -> float:
    """A finite float in the interval, or a sentence. Text and truth values are no numbers."""
    try:
        if isinstance(value, (bool, str, bytes)):
            raise TypeError
        number = float(value.detach() if isinstance(value, Tensor) else value)
    except OverflowError:
        number = math.inf
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{what} must be a number; got {_short(value)}.") from None
    inside = (number > low if open_low else number >= low) and (number < high if open_high else number <= high)
    if not (inside and math.isfinite(number)):
        if low == -math.inf:
            expected = "be finite"
        elif high == math.inf:
            expected = f"be finite and {'greater than' if open_low else 'at least'} {low:g}"
        else:
            expected = f"lie in {'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
        raise ValueError(f"{what} must {expected}; got {_short(value)}.")
    return number


def check_damping(damping: float, dtype: torch.dtype | None = None) -> float:
    """λ as a float; a sentence where it is not a finite number of at least 0, or more than ``dtype`` can hold."""
    value = check_number("damping", damping, 0.0, math.inf)
    if dtype is not None and value > torch.finfo(dtype).max:
        raise ValueError(f"damping {value:g} overflows {dtype}; choose a smaller damping, or a wider dtype.")
    return value


def check_count(what: str, value: int, least: int) -> int:
    """A whole number of at least ``least`` and at most 2⁶⁰."""
    if not isinstance(value, Integral) or isinstance(value, bool) or not least <= value <= LARGEST_COUNT:
        most = " and at most 2^60" if isinstance(value, Integral) and value > LARGEST_COUNT else ""
        raise ValueError(f"{what} must be a whole number of at least {least}{most}; got {_short(value)}.")
    return int(value)


def check_seed(seed: int) -> int:
    """A seed: a whole number from 0 to 2⁶⁰."""
    return check_count("seed", seed, 0)


def check_choice(what: str, value: str, choices: tuple[str, ...]) -> str:
    """Refuse an unknown name, listing the known ones."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{what} must be one of {', '.join(map(repr, choices))}; got {_short(value)}.")
    return value


def check_type(what: str, value: object, *kinds: type) -> None:
    """Refuse an argument of another kind, by name."""
    if not isinstance(value, kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"{what} must be of type {expected}; got {type(value).__name__}.")


def finite(tensors: Sequence[Tensor]) -> list[bool]:
    """Which of these tensors hold neither NaN nor inf, in one look at the device.

    Both survive a sum. Only where a sum is not finite is a second look needed: it may have overflowed by itself.
    """
    sums = [x.sum(dtype=torch.promote_types(x.dtype, torch.float32)).double() for x in tensors]
    if not sums or sums[0].is_meta:  # which has shapes and no numbers
        return [True] * len(sums)
    read = torch.stack(sums).tolist()
    return [math.isfinite(s) or bool(x.isfinite().all()) for s, x in zip(read, tensors, strict=True)]


def own_precision(device: torch.device) -> AbstractContextManager:
    """A context without the caller's autocast: what is computed here has a precision of its own."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def same_random_state(device: torch.device) -> AbstractContextManager:
    """A context after which the random state is what it was, in the main thread.

    In any other thread the state is left as it comes out: restoring it there would undo what the main thread has drawn
    meanwhile.
    """
    devices = [device] if device.type == "cuda" else []
    return torch.random.fork_rng(devices, enabled=current_thread() is main_thread())


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Eval mode, with every module's own training flag restored."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in flags:
            if module.training != training:
                module.training = training


def check_room(what: str, numbers: int, like: Tensor, advice: str) -> None:
    """Refuse, before anything is allocated, what does not fit into the memory that is left where ``like`` is."""
    needed = numbers * like.element_size()
    room = _room(like.device) if needed > _SMALL else math.inf
    if needed > room:
        raise ValueError(f"{what} needs {_gib(needed)} of memory and {_gib(room)} are left; {advice}.")


def _room(device: torch.device) -> float:
    """Bytes that can still be had on a device, inf where nobody says."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    meminfo = dict(line.split()[:2] for line in _read("/proc/meminfo").splitlines())
    left = [1024 * int(meminfo["MemAvailable:"])] if "MemAvailable:" in meminfo else []
    limit, used = (_read(f"/sys/fs/cgroup/memory.{name}").strip() for name in ("max", "current"))  # of a container
    return min([*left, *([int(limit) - int(used)] if limit.isdigit() and used.isdigit() else [])], default=math.inf)


def _read(path: str) -> str:
    """The text of a file of the system, empty where there is none."""
    try:
        with open(path, encoding="ascii") as file:
            return file.read()
    except OSError:
        return ""


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB" if size < 1e18 else f"{size / 2**30:.1e} GiB"


def _short(value: object) -> str:
    """A value as it was written, unless that fills the screen."""
    if isinstance(value, Integral) and not isinstance(value, bool) and abs(value) > 10**30:
        return f"a whole number of {value.bit_length()} bits" if isinstance(value, int) else "a very large number"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def warn(message: str) -> None:
    """A warning that points at the caller's line, outside this package and PyTorch."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
