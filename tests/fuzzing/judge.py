"""One try: where its choices come from, and how answers and refusals are judged."""

from __future__ import annotations

import dis
import math
import os
import random
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

import kfac_viz as kv

F64 = torch.float64
HOME = os.path.join(os.path.dirname(os.path.abspath(kv.__file__)), "")
RAISE = dis.opmap["RAISE_VARARGS"]
ROOM = 1e3  # what is larger than the largest number over this may overflow on the way


class Refused(Exception):
    """The package declined in a sentence of its own."""


class Raw(Exception):
    """Something else came out of the package; the cause is that error."""


class Hanging(BaseException):
    """A try took longer than :data:`PATIENCE`."""


@dataclass
class Outcome:
    """What became of one try. ``failures`` are pairs (what kind of failure, text that is the same for all alike)."""

    kind: str
    seed: int
    accepted: bool = False
    refused: bool = False
    failures: list[tuple[str, str]] = field(default_factory=list)
    details: list[str] = field(default_factory=list)


class Try:
    """One random case: the source of all choices, and the judge of all answers."""

    def __init__(self, kind: str, seed: int) -> None:
        self.random = random.Random(f"{kind} {seed}")
        self.outcome = Outcome(kind, seed)
        self.refusals = 0
        self.benign = False  # nothing about this try gives a reason to refuse it
        seeded(self.random.getrandbits(32))
        self.source = torch.Generator().manual_seed(self.random.getrandbits(32))

    # choices

    def pick(self, *options: Any) -> Any:
        return self.random.choice(options)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def whole(self, low: int, high: int) -> int:
        return self.random.randint(low, high)

    def normal(self, *shape: int, dtype: torch.dtype = F64) -> Tensor:
        return torch.randn(shape, generator=self.source, dtype=F64).to(dtype)

    def uniform(self, *shape: int, dtype: torch.dtype = F64) -> Tensor:
        return torch.rand(shape, generator=self.source, dtype=F64).to(dtype)

    # judgements

    def call(self, function: Callable[[], Any], excuse: Callable[[], Any] | None = None) -> Any:
        """What ``function`` returns. ``excuse`` is the same thing without the package: where it raises the same
        error, that error is the model's own."""
        try:
            return function()
        except Hanging:
            raise
        except Exception as error:
            if own_sentence(error) or isinstance(error, Mishap):
                self.refusals += 1
                raise Refused from error
            if excuse is not None and same_error(error, excuse):
                self.refusals, self.benign = self.refusals + 1, False
                raise Refused from error
            raise Raw from error

    def wrong(self, what: str, detail: object = "") -> None:
        """Note a silent difference."""
        self.outcome.failures.append(("silent", what))
        self.outcome.details.append(f"{what}: {detail}")

    def check(self, holds: bool, what: str, detail: object = "") -> bool:
        if not holds:
            self.wrong(what, detail)
        return bool(holds)

    def finite(self, what: str, found: object) -> bool:
        values = found.detach() if isinstance(found, Tensor) else torch.tensor(found, dtype=F64)
        if values.layout != torch.strided:
            return self.check(False, f"{what} is a {values.layout} tensor")
        return self.check(bool(torch.isfinite(values).all()), f"{what} holds NaN or inf", found)

    def close(self, what: str, found: Tensor, expected: Tensor, allowed: float) -> bool:
        """``|found − expected| ≤ allowed`` in every entry, found being finite; an ``allowed`` that is not finite
        or as large as the values themselves asks for finiteness alone."""
        if found.layout != torch.strided or found.device.type == "meta":
            return self.check(False, f"{what} is a {found.layout} tensor on {found.device}")
        if tuple(found.shape) != tuple(expected.shape):
            return self.check(False, f"{what} has another shape", f"{tuple(found.shape)}, {tuple(expected.shape)}")
        if not bool(torch.isfinite(found).all()):
            largest = float(expected.abs().max())
            beyond = not largest < torch.finfo(found.dtype).max / ROOM
            return self.check(
                False, f"{what} overflows without a sentence" if beyond else f"{what} holds NaN or inf", found
            )
        if not found.numel() or not math.isfinite(allowed) or not bool(torch.isfinite(expected).all()):
            return True
        off = float((found.detach().to(F64) - expected).abs().max())
        return self.check(off <= allowed, f"{what} is wrong", f"off by {off:.3g}, allowed {allowed:.3g}")

    def record(self, error: BaseException) -> None:
        self.outcome.failures.append(("raw", f"{type(error).__name__} in {place(error)}"))
        self.outcome.details.append("".join(traceback.format_exception(error)).split("Exception raised from")[0])


def seeded(seed: int) -> None:
    """Seed what PyTorch draws on the CPU: much faster than ``torch.manual_seed``, which looks at every device."""
    torch.default_generator.manual_seed(seed)


class Mishap(Exception):
    """Raised by a closure of ours, to see what is left behind."""


def own_sentence(error: BaseException) -> bool:
    """Whether the innermost frame is one of the package, at a ``raise`` statement, with the right type."""
    if type(error) not in (ValueError, TypeError) or error.__traceback__ is None:
        return False
    last = innermost(error.__traceback__)
    code = last.tb_frame.f_code
    return code.co_filename.startswith(HOME) and code.co_code[last.tb_lasti] == RAISE


def innermost(tb: TracebackType) -> TracebackType:
    while tb.tb_next is not None:
        tb = tb.tb_next
    return tb


def place(error: BaseException) -> str:
    """The last function of the package that the error went through; the first one where the input was sparse."""
    names, tb = [], error.__traceback__
    while tb is not None:
        code = tb.tb_frame.f_code
        if code.co_filename.startswith(HOME):
            name = code.co_qualname.split(".<locals>")[0]
            names.append(f"{os.path.basename(code.co_filename).removesuffix('.py')}.{name}")
        tb = tb.tb_next
    return names["parse" not in str(error) and -1] if names else "no frame of the package"


def gist(message: str) -> str:
    """A message without what differs from one try to the next."""
    if "parse" in message:  # a sparse tensor, whichever operation met it first
        return "sparse tensor"
    first = message.strip().split("\n")[0] if message.strip() else ""
    return re.sub(r"0x[0-9a-f]+|[-+]?\d[\d.e+-]*|not '?\w+'?$|'\w+' object", "#", first)[:90]


def same_error(error: BaseException, excuse: Callable[[], Any]) -> bool:
    with torch.random.fork_rng(devices=[]):
        try:
            excuse()
        except Exception as other:
            return type(other) is type(error) and gist(str(other)) == gist(str(error))
    return False


def difference(a: Any, b: Any, path: str = "") -> str | None:
    """Where two nests of dictionaries, lists and tensors differ, bit for bit; None where they do not."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        if same and a.device.type != "meta":
            a, b = a.to_dense(), b.to_dense()
            same = bool(((a == b) | ((a != a) & (b != b))).all())
        return None if same else path
    if type(a) is not type(b):
        return path
    if isinstance(a, np.ndarray):
        return None if np.array_equal(a, b) else path
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return path
        return next((d for key in a if (d := difference(a[key], b[key], f"{path}.{key}"))), None)
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return path
        return next((d for x, y in zip(a, b, strict=True) if (d := difference(x, y, f"{path}[]"))), None)
    return None if a is b or a == b or (a != a and b != b) else path
