"""Values that callers should not give, and ways to spoil those that they should."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .judge import F64, Try
from .oracles import real

DTYPES = (F64, F64, F64, torch.float32, torch.float32, torch.float16, torch.bfloat16)
DAMPINGS = (0, 0.0, 1e-200, 1e-30, 1e-12, 1e-6, 1e-3, 1e-2, 1e-2, 0.1, 0.1, 1.0, 1, 1e3, 1e6, 1e12)
NO_NUMBERS = ("0.1", "a", "", None, [], {}, (1.0,), 1j, b"1", object(), float, torch.ones(2), torch.tensor(1j), True)
BAD_DAMPINGS = (math.nan, math.inf, -math.inf, -1, -1e-300, 10**400, -(10**400), torch.tensor(math.nan), *NO_NUMBERS)
ODD_DAMPINGS = (np.float32(0.1), np.int64(1), torch.tensor(0.1), Fraction(1, 3), Decimal("0.1"), np.float64(1e-3))
BAD_COUNTS = (-1, 1.5, 2.0, math.nan, "1", None, True, [], 1j, torch.ones(2), -(10**400))
WORDS = ("", "nope", None, 3, [], ("categorical",), b"exact", torch.ones(2), np.ones(2), {}, object)


def damping(t: Try) -> Any:
    return t.pick(*DAMPINGS) if t.chance(0.9) else t.pick(*BAD_DAMPINGS, *ODD_DAMPINGS)


def number(value: Any) -> float | None:
    """The λ that a value means; None where it means none, and has to be refused."""
    if any(value is bad for bad in BAD_DAMPINGS):
        return None
    return float(value)


def spoiled(t: Try, x: Tensor) -> Any:
    """Something that is not quite the tensor x."""
    flat = x.numel() > 0 and x.ndim > 0
    floating = x.is_floating_point()

    def with_(value: float) -> Tensor:
        place = tuple(torch.tensor(t.whole(0, n - 1)) for n in x.shape)
        return x.clone().index_put_(place, torch.tensor(value, dtype=x.dtype))

    options: list[Callable[[], Any]] = [
        lambda: x[..., :-1] if x.ndim else x,
        lambda: x[None],
        lambda: x.flatten(),
        lambda: x[..., None],
        lambda: x[:0] if x.ndim else x,
        lambda: x.to(t.pick(torch.float16, torch.bfloat16, torch.float32, F64, torch.int64, torch.bool, torch.uint8)),
        lambda: x.to(torch.complex64),
        lambda: x.to_sparse(),
        lambda: x.to("meta"),
        lambda: real(x).numpy(),
        lambda: x.tolist(),
        lambda: t.pick(None, 3, "x", (), [], {}, object()),
        lambda: inference(x),
        lambda: torch.stack([x, x]),
        lambda: nn.Parameter(x.clone()) if floating else x,
        lambda: x.clone().requires_grad_() * 1 if floating else x,
        lambda: x.mT.contiguous().mT if x.ndim > 1 else x,
        lambda: x[..., :1].expand(x.shape) if flat else x,
    ]
    if floating and flat:
        options += [lambda: with_(math.nan), lambda: with_(t.pick(math.inf, -math.inf)), lambda: with_(1e30)]
        options += [lambda: x * 1e30, lambda: x * (1e-310 if x.dtype == F64 else 1e-40), lambda: x * 0]
        options += [lambda: with_(torch.finfo(x.dtype).max), lambda: x * torch.finfo(x.dtype).max ** 0.6]
    return t.pick(*options)()


def inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


@contextlib.contextmanager
def surroundings(t: Try) -> Iterator[str]:
    """A context that a caller may be in, by name."""
    contexts = {
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu"),
    }
    name = t.pick(*contexts)
    t.benign = t.benign and name != "autocast"  # what computes more than a product asks to be called outside of it
    with contexts[name]():
        yield f" under {name}"
