"""Random tries of the public API: whatever it is given, it answers rightly or refuses in a sentence of its own.

One seed is one small random case of one kind, held against oracles in float64 that share no code with the package.

    python tests/fuzz.py --tries 100000 --jobs 2
    python tests/fuzz.py --only capture --seed 17 --tries 1     # one try again, with its traceback

A failure is a *raw error*, an exception that is no ValueError or TypeError raised by a ``raise`` of this package; or a
*silent difference*, something accepted whose result is wrong, NaN or inf, or something refused that left a trace.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dis
import io
import itertools
import math
import multiprocessing
import os
import random
import re
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from types import TracebackType
from typing import Any

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional  # noqa: E402

import kfac_viz as kv  # noqa: E402
from kfac_viz.method.partition import Layer  # noqa: E402

HOME = os.path.join(os.path.dirname(os.path.abspath(kv.__file__)), "")
RAISE = dis.opmap["RAISE_VARARGS"]
PATIENCE = 30  # seconds that one try may take before it counts as hanging
F64 = torch.float64
ROUND_OFF = 1e3  # factor on eps · condition that no correct result exceeds
HOPELESS = 0.1  # where eps · condition is larger, only finiteness is asked for


# ---- one try and its outcome -------------------------------------------------------------------------


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
                self.refusals += 1
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
        values = found if isinstance(found, Tensor) else torch.tensor(found, dtype=F64)
        return self.check(bool(torch.isfinite(values.detach()).all()), f"{what} holds NaN or inf", found)

    def close(self, what: str, found: Tensor, expected: Tensor, allowed: float) -> bool:
        """``|found − expected| ≤ allowed`` in every entry, found being finite; an ``allowed`` that is not finite
        or as large as the values themselves asks for finiteness alone."""
        if found.layout != torch.strided or found.device.type == "meta":
            return self.check(False, f"{what} is a {found.layout} tensor on {found.device}")
        if tuple(found.shape) != tuple(expected.shape):
            return self.check(False, f"{what} has another shape", f"{tuple(found.shape)}, {tuple(expected.shape)}")
        if not self.finite(what, found):
            return False
        if not found.numel() or not math.isfinite(allowed) or not bool(torch.isfinite(expected).all()):
            return True
        off = float((found.detach().to(F64) - expected).abs().max())
        return self.check(off <= allowed, f"{what} is wrong", f"off by {off:.3g}, allowed {allowed:.3g}")

    def record(self, error: BaseException) -> None:
        self.outcome.failures.append(("raw", f"{type(error).__name__} in {place(error)}"))
        self.outcome.details.append("".join(traceback.format_exception(error)))


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
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return path
        return next((d for key in a if (d := difference(a[key], b[key], f"{path}.{key}"))), None)
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return path
        return next((d for x, y in zip(a, b, strict=True) if (d := difference(x, y, f"{path}[]"))), None)
    return None if a is b or a == b or (a != a and b != b) else path


# ---- hostile values ----------------------------------------------------------------------------------

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
    with_ = lambda value: x.clone().index_put_(tuple(torch.tensor(t.whole(0, n - 1)) for n in x.shape), like(x, value))
    floating = x.is_floating_point()
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


def real(x: Any) -> Tensor:
    """What was accepted for a vector or matrix, in float64; NaN for a tensor without numbers."""
    x = torch.as_tensor(x).detach()
    x = torch.full(x.shape, math.nan) if x.device.type == "meta" else x.to_dense()
    return (x.real if x.is_complex() else x).to(F64).contiguous()


def like(x: Tensor, value: float) -> Tensor:
    return torch.tensor(value, dtype=x.dtype)


def inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


@contextlib.contextmanager
def surroundings(t: Try) -> Iterator[str]:
    """A context that a caller may be in, by name."""
    contexts = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "autocast": lambda: torch.autocast("cpu")}
    name = t.pick(*contexts)
    with contexts[name]():
        yield f" under {name}"


# ---- networks ----------------------------------------------------------------------------------------


class Forward(nn.Module):
    """Modules by name and a forward pass written as a function of them."""

    def __init__(self, run: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.run = run

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(self, *inputs)


class Scaled(nn.Linear):
    """A subclass with a forward pass of its own, which has no K-FAC."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@dataclass
class Net:
    """A way to build a network, again and again the same, and the shape of one of its examples."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    words: int = 0  # inputs are class indices below this number
    inputs: int = 1
    seed: int = 0

    def build(self, dtype: torch.dtype = F64) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            seeded(self.seed)
            return self.make().to(dtype)


ACTIVATIONS = (nn.Tanh, nn.ReLU, lambda: nn.ReLU(inplace=True), nn.Sigmoid, nn.GELU, nn.ELU, nn.SiLU, nn.Identity)


def stack(t: Try, first: int, last: int, *, plain: bool = False) -> Callable[[], nn.Module]:
    """One to four Linear layers with what goes between them."""
    widths = [first, *(t.whole(1, 6) for _ in range(t.pick(0, 1, 1, 2, 3))), last]
    parts: list[Callable[[], nn.Module]] = []
    for n, m in itertools.pairwise(widths):
        bias = t.chance(0.75)
        parts.append(lambda n=n, m=m, bias=bias: nn.Linear(n, m, bias=bias))
        if not plain and t.chance(0.1):
            parts.append(lambda m=m: batch_norm(m))
        if not plain and t.chance(0.1):
            parts.append(lambda m=m: nn.LayerNorm(m))
        parts.append(t.pick(*ACTIVATIONS))
        if not plain and t.chance(0.1):
            parts.append(lambda: nn.Dropout(0.3))
    if t.chance(0.9):  # mostly nothing behind the last layer
        while len(parts) > 1 and not isinstance(parts[-1](), nn.Linear):
            parts.pop()
    if t.chance(0.06):
        parts.append(t.pick(lambda: nn.Softmax(-1), lambda: nn.LogSoftmax(-1), nn.Sigmoid))
    return lambda: nn.Sequential(*(part() for part in parts))


def batch_norm(width: int) -> nn.Module:
    layer = nn.BatchNorm1d(width)
    nn.init.uniform_(layer.running_mean, -0.5, 0.5)
    nn.init.uniform_(layer.running_var, 0.5, 2.0)
    return layer


def frozen(model: nn.Module, which: int, half: bool) -> nn.Module:
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    layer = layers[which % len(layers)]
    layer.weight.requires_grad_(False)
    if layer.bias is not None and not half:
        layer.bias.requires_grad_(False)
    return model


def network(t: Try) -> Net:
    """Any network."""
    n, m, c, T = t.whole(1, 5), t.whole(1, 5), t.pick(1, 2, 2, 3, 3, 4), t.pick(1, 2, 2, 3, 4)
    act = t.pick(torch.tanh, torch.relu, torch.sigmoid)
    bias = t.chance(0.7)
    L = nn.Linear
    if t.chance(0.4):
        return Net("stack", stack(t, n, c), t.pick((n,), (n,), (n,), (T, n)), seed=t.whole(0, 2**31))
    depth, even = t.whole(1, 2), 2 * t.whole(1, 2)
    kernel, stride, padding = t.pick(1, 2), t.pick(1, 2), t.pick(0, 1)
    mode, groups = t.pick("zeros", "circular", "reflect", "replicate"), t.pick(1, 1, 1, depth)
    side = t.pick(2, 3)
    size = ((side + 2 * padding - kernel) // stride + 1) ** 2
    batch_first, old = t.chance(0.5), t.chance(0.5)
    inner = stack(t, n, c)
    which, half = t.whole(0, 3), t.chance(0.5)
    nets = {
        "conv": (
            lambda: nn.Sequential(
                nn.Conv2d(depth, m, kernel, stride, padding, padding_mode=mode, bias=bias),
                nn.Tanh(), nn.Flatten(), L(m * size, c),
            ), (depth, side, side),
        ),
        "grouped conv": (
            lambda: nn.Sequential(nn.Conv2d(depth, depth * m, kernel, groups=groups), nn.Flatten(), nn.LazyLinear(c)),
            (depth, side, side),
        ),
        "called twice": (
            lambda: Forward(lambda s, x: s.head(act(s.inner(act(s.inner(x))))), inner=L(n, n, bias=bias), head=L(n, c)),
            (n,),
        ),
        "tied by function": (
            lambda: Forward(lambda s, x: s.head(functional.linear(act(s.enc(x)), s.enc.weight.t())), enc=L(n, m),
                            head=L(n, c)), (n,),
        ),
        "function alone": (
            lambda: Forward(lambda s, x: s.head(act(functional.linear(x, s.one.weight, s.one.bias))), one=L(n, m),
                            head=L(m, c)), (n,),
        ),
        "module and function": (
            lambda: Forward(lambda s, x: s.head(act(s.one(x)) + x @ s.one.weight.T), one=L(n, m), head=L(m, c)), (n,),
        ),
        "bias elsewhere": (
            lambda: Forward(lambda s, x: s.head(act(s.one(x)) * s.one.bias), one=L(n, m), head=L(m, c)), (n,),
        ),
        "weights penalised": (
            lambda: Forward(lambda s, x: s.one(x) + s.one.weight.square().sum(), one=L(n, c, bias=bias)), (n,),
        ),
        "tied modules": (lambda: tied(L(n, n), L(n, n), L(n, c)), (n,)),
        "positions": (
            lambda: Forward(lambda s, x: s.head(act(s.one(x)).mean(1)), one=L(n, m, bias=bias), head=L(m, c)), (T, n),
        ),
        "tokens first inside": (
            lambda: Forward(lambda s, x: s.head(act(s.one(x.transpose(0, 1))).transpose(0, 1).mean(1)),
                            one=L(n, m, bias=bias), head=L(m, c)), (T, n),
        ),
        "tokens first": (
            lambda: Forward(lambda s, x: s.head(act(s.one(x)).mean(0)), one=L(n, m), head=L(m, c)), (T, n),
        ),
        "flattened tokens": (
            lambda: Forward(lambda s, x: s.head(act(s.one(x.flatten(0, 1))).view(*x.shape[:2], -1).sum(1)),
                            one=L(n, m), head=L(m, c)), (T, n),
        ),
        "attention": (
            lambda: Forward(lambda s, x: s.head(s.mix(x, x, x)[0].mean(1)),
                            mix=nn.MultiheadAttention(even, depth, batch_first=batch_first), head=L(even, c)),
            (T, even),
        ),
        "attention between layers": (
            lambda: Forward(lambda s, x: s.head(s.mix(*3 * (act(s.one(x)),))[0].mean(1)), one=L(n, even),
                            mix=nn.MultiheadAttention(even, depth, batch_first=batch_first), head=L(even, c)), (T, n),
        ),
        "transformer": (
            lambda: Forward(lambda s, x: s.head(s.block(x).mean(1)), block=nn.TransformerEncoderLayer(
                even, depth, m, batch_first=batch_first), head=L(even, c)), (T, even),
        ),
        "weight norm": (lambda: normed(nn.Sequential(L(n, m), nn.Tanh(), L(m, c)), old, which), (n,)),
        "frozen": (lambda: frozen(inner(), which, half), (n,)),
        "unused layer": (lambda: Forward(lambda s, x: s.one(x), one=L(n, c), idle=L(n, m)), (n,)),
        "unused input": (
            lambda: Forward(lambda s, x: s.head(act(s.one(x)).detach()), one=L(n, m), head=L(m, c)), (n,),
        ),
        "without gradients": (lambda: Forward(silenced, one=L(n, m), head=L(m, c)), (n,)),
        "coupled": (lambda: Forward(lambda s, x: s.head(act(s.one(x - x.mean(0)))), one=L(n, m), head=L(m, c)), (n,)),
        "coupled outputs": (lambda: Forward(lambda s, x: s.one(x).cumsum(0), one=L(n, c)), (n,)),
        "coupled by batch norm": (
            lambda: nn.Sequential(L(n, m), nn.BatchNorm1d(m, track_running_stats=False), L(m, c)), (n,),
        ),
        "residual": (
            lambda: Forward(lambda s, x: s.head(x + torch.relu_(s.one(x))), one=L(n, n, bias=bias), head=L(n, c)), (n,),
        ),
        "changed in place": (lambda: Forward(in_place, one=L(n, m), head=L(m, c)), (n,)),
        "hooked": (lambda: hooked(nn.Sequential(L(n, m), nn.Tanh(), L(m, c)), half), (n,)),
        "own forward": (lambda: nn.Sequential(L(n, m), Scaled(m, c)), (n,)),
        "only own forward": (lambda: nn.Sequential(Scaled(n, c)), (n,)),
        "recurrent": (lambda: Forward(lambda s, x: s.head(s.mix(x)[0][:, -1]), mix=nn.GRU(n, m, batch_first=True),
                                      head=L(m, c)), (T, n)),
        "checkpointed": (
            lambda: Forward(lambda s, x: s.head(torch.utils.checkpoint.checkpoint(
                lambda y: act(s.one(y)), x, use_reentrant=half)), one=L(n, m), head=L(m, c)), (n,),
        ),
        "listed twice": (lambda: listed_twice(L(n, n), L(n, c)), (n,)),
        "bare": (lambda: L(n, c, bias=bias), (n,)),
        "no layer": (lambda: nn.Sequential(nn.Tanh()), (n,)),
        "lazy": (lambda: nn.Sequential(nn.LazyLinear(m), nn.Tanh(), L(m, c)), (n,)),
        "flat output": (lambda: Forward(lambda s, x: s.one(x)[:, 0], one=L(n, c)), (n,)),
        "scalar output": (lambda: Forward(lambda s, x: s.one(x).sum(), one=L(n, c)), (n,)),
        "many outputs": (lambda: Forward(lambda s, x: (s.one(x), x), one=L(n, c)), (n,)),
        "no batch out": (lambda: Forward(lambda s, x: s.one(x).T, one=L(n, c)), (n,)),
        "grown batch": (lambda: Forward(lambda s, x: torch.cat([s.one(x), s.one(x)]), one=L(n, c)), (n,)),
        "doubled batch": (lambda: Forward(lambda s, x: s.one(torch.cat([x, x])), one=L(n, c)), (n,)),
        "shuffled batch": (lambda: Forward(lambda s, x: s.one(x.flip(0)), one=L(n, c)), (n,)),
        "shuffled inside": (
            lambda: Forward(lambda s, x: s.head(act(s.one(x.flip(0))).flip(0)), one=L(n, m), head=L(m, c)), (n,),
        ),
        "slow precision": (lambda: Forward(lambda s, x: s.one(x).float(), one=L(n, c)), (n,)),
    }  # fmt: skip
    if t.chance(0.12):
        words = t.whole(1, 5)
        tie = t.chance(0.3)
        return Net("embedding", lambda: embedding(words, n, c, tie), (T,), words=words, seed=t.whole(0, 2**31))
    if t.chance(0.06):
        make = lambda: Forward(lambda s, x, y: s.head(act(s.one(x)) * s.two(y)), one=L(n, m), two=L(n, m), head=L(m, c))
        return Net("two inputs", make, (n,), inputs=2, seed=t.whole(0, 2**31))
    name = t.pick(*nets)
    return Net(name, *nets[name], seed=t.whole(0, 2**31))


def tied(first: nn.Linear, second: nn.Linear, head: nn.Linear) -> nn.Module:
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), head)


def normed(model: nn.Sequential, old: bool, which: int) -> nn.Module:
    place = 2 * (which % 2)
    if which == 3:
        model[place] = nn.utils.parametrizations.spectral_norm(model[place])
    else:
        norm = nn.utils.weight_norm if old else nn.utils.parametrizations.weight_norm
        model[place] = norm(model[place])
    return model


def silenced(s: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = s.one(x)
    return s.head(h)


def in_place(s: nn.Module, x: Tensor) -> Tensor:
    h = s.one(x)
    h += 1
    h.mul_(2)
    h[:, 0] = 0
    return s.head(torch.tanh(h))


def hooked(model: nn.Sequential, before: bool) -> nn.Module:
    if before:
        model[0].register_forward_pre_hook(lambda module, args: (2 * args[0],))
    else:
        model[0].register_forward_hook(lambda module, args, output: 3 * output)
    return model


def listed_twice(one: nn.Linear, head: nn.Linear) -> nn.Module:
    return nn.Sequential(one, nn.Tanh(), one, nn.Tanh(), head)


def embedding(words: int, n: int, c: int, tie: bool) -> nn.Module:
    table, head = nn.Embedding(words, n), nn.Linear(n, words if tie else c, bias=False)
    if tie:
        head.weight = table.weight
    return Forward(lambda s, x: s.head(torch.tanh(s.table(x)).mean(1)), table=table, head=head)


def batch(t: Try, net: Net, N: int, dtype: torch.dtype) -> list[Tensor]:
    """Inputs of N examples."""
    made = []
    for _ in range(net.inputs):
        if net.words:
            made.append(torch.randint(0, net.words, (N, *net.shape), generator=t.source))
            continue
        x = t.normal(N, *net.shape)
        way = t.whole(0, 11)
        if way == 0:
            x = x * 10.0 ** t.whole(-3, 3)
        elif way == 1:
            x = x[:1].expand_as(x).clone()  # one example again and again
        elif way == 2:
            x = x * 0
        elif way == 3:
            x = (x > 0).to(F64)
        made.append(x.to(dtype))
    return made


def examples(t: Try) -> int:
    return t.pick(1, 2, 2, 3, 3, 4, 5, 8)


def labels(t: Try, outputs: Tensor, likelihood: str) -> Tensor:
    """Targets that fit."""
    shape = outputs.shape
    if likelihood == "categorical":
        y = torch.randint(0, max(1, shape[-1]), shape[:-1], generator=t.source)
        return y.to(t.pick(torch.int32, torch.int16, torch.uint8)) if t.chance(0.1) else y
    y = t.uniform(*shape) if likelihood == "bernoulli" else 3 * t.normal(*shape)
    return y.to(outputs.dtype)


# ---- oracles: one example at a time, in float64 ------------------------------------------------------


@dataclass
class Truth:
    """Jacobians of every example by autograd on the weights, and what the outputs make of them."""

    J: Tensor  # (N, outputs, P)
    outputs: Tensor  # (N, …)
    precision: torch.dtype  # of the outputs that the model returns
    coupled: bool  # whether an example's output depends on the others

    def fisher(self, likelihood: str, targets: Tensor | None = None) -> Tensor:
        """``(1/N) Σ JᵀHJ``, or with targets ``(1/N) Σ Jᵀ r rᵀ J``."""
        f = self.outputs.flatten(1)
        if targets is not None:
            scores = torch.einsum("no,nop->np", residuals(self.outputs, targets, likelihood).flatten(1), self.J)
            return scores.T @ scores / len(f)
        return torch.einsum("nop,noq,nqr->pr", self.J, output_hessian(self.outputs, likelihood), self.J) / len(f)


def output_hessian(outputs: Tensor, likelihood: str) -> Tensor:
    """Second derivatives of the loss by the flattened outputs, (N, outputs, outputs)."""
    f = outputs.flatten(1)
    if likelihood == "gaussian":
        return torch.eye(f.shape[1], dtype=F64).expand(len(f), -1, -1)
    if likelihood == "bernoulli":
        return torch.diag_embed(f.sigmoid() * (-f).sigmoid())
    p = outputs.softmax(-1).flatten(1, -2) if outputs.ndim > 2 else outputs.softmax(-1)[:, None]
    H = torch.diag_embed(p) - p[..., :, None] * p[..., None, :]  # (N, R, C, C)
    return torch.stack([torch.block_diag(*position) for position in H])


def residuals(outputs: Tensor, targets: Tensor, likelihood: str) -> Tensor:
    """Derivatives of the loss by the outputs, written out."""
    if likelihood == "categorical":
        hot = torch.zeros_like(outputs).scatter_(-1, targets.long()[..., None], 1.0)
        return outputs.softmax(-1) - hot
    return (outputs.sigmoid() if likelihood == "bernoulli" else outputs) - targets.to(F64)


def truth(model: nn.Module, inputs: list[Tensor], partition: kv.Partition) -> Truth:
    """Of a model in float64 and in the mode that counts; the model is the oracle's own."""
    parameters, layout = [], []
    for layer in partition.layers:
        module = model.get_submodule(layer.name)
        here = [p for p in (module.weight, module.bias) if p is not None]
        parameters += here
        layout.append((layer, len(here)))
    rows, values = [], []
    N = len(inputs[0])
    for n in range(N):
        with torch.enable_grad():
            out = model(*(x[n : n + 1].clone() for x in inputs))
        values.append(out.detach())
        flat = out.flatten()
        for k in range(len(flat)):
            grads = torch.autograd.grad(flat[k], parameters, retain_graph=True, allow_unused=True)
            grads = iter([torch.zeros_like(p) if g is None else g for g, p in zip(grads, parameters, strict=True)])
            pieces = []
            for layer, count in layout:
                W = next(grads).reshape(layer.out, -1)
                if count == 2:
                    W = torch.cat([W, next(grads)[:, None]], 1)
                pieces.append(W.flatten())
            rows.append(torch.cat(pieces))
    outputs = torch.cat(values)
    precision = outputs.dtype
    with torch.no_grad():
        together = model(*(x.clone() for x in inputs))
    coupled = together.shape != outputs.shape or bool(
        ((together - outputs).abs() > 1e3 * torch.finfo(precision).eps * (1 + outputs.abs().max())).any()
    )
    return Truth(torch.stack(rows).view(len(outputs), -1, partition.size).to(F64), outputs.to(F64), precision, coupled)


def perturbed(t: Try, model: nn.Module, inputs: list[Tensor], eps: float) -> tuple[nn.Module, list[Tensor]]:
    """Weights and inputs moved by a few units in the last place: what moves with them is not known better."""
    jitter = lambda x: x * (1 + 4 * eps * t.normal(*x.shape)) if x.is_floating_point() else x
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.copy_(jitter(p))
    return twin, [jitter(x) for x in inputs]


def scores(F: kv.Fisher) -> Tensor:
    """(S, N, P), from the captured vectors."""
    layers = zip(F.g, F.a, strict=True)
    return torch.cat([torch.einsum("snto,nti->snoi", g.to(F64), a.to(F64)).flatten(2) for g, a in layers], -1)


def gram(F: kv.Fisher) -> Tensor:
    J = scores(F).flatten(0, 1)
    return J.T @ J / F.N


def kron_factors(F: kv.Fisher, convention: str = "expand") -> list[tuple[Tensor, Tensor]]:
    """(A, G) of every layer in float64."""
    pairs = []
    for a, g in zip(F.a, F.g, strict=True):
        a, g = a.to(F64), g.to(F64)
        if convention == "reduce":
            a, g = a.mean(1), g.sum(2)
            pairs.append((a.T @ a / F.N, torch.einsum("sno,snp->op", g, g) / F.N))
        else:
            pairs.append((
                torch.einsum("nti,ntj->ij", a, a) / (F.N * a.shape[1]), torch.einsum("snto,sntp->op", g, g) / F.N,
            ))  # fmt: skip
    return pairs


def kfac_inverse(
    pairs: list[tuple[Tensor, Tensor]], λ: float, rule: str, dtype: torch.dtype
) -> tuple[list[Tensor], list[float]]:
    """The blocks of K-FAC's M, and how far a change of one unit in the factors' last place moves each."""
    blocks, moves = [], []
    for A, G in pairs:
        if rule == "eigen":
            K = torch.kron(G, A) + λ * torch.eye(len(A) * len(G), dtype=F64)
            block = pinv(K)
            moves.append(condition(K))
        else:
            ratio = float(A.trace() / len(A)) / float(G.trace() / len(G)) if float(G.trace()) else 0.0
            π = ratio**0.5 if 0 < ratio < math.inf else 1.0
            left = G + λ**0.5 / π * torch.eye(len(G), dtype=F64)
            right = A + λ**0.5 * π * torch.eye(len(A), dtype=F64)
            block = torch.kron(pinv(left), pinv(right))
            moves.append(condition(left) + condition(right))
        if underflows(dtype, A, G, *([K] if rule == "eigen" else [])):
            moves[-1] = math.inf
        blocks.append(block)
    return blocks, moves


def underflows(dtype: torch.dtype, *matrices: Tensor) -> bool:
    """Whether one of them is so small that its entries, or products of them, are not known in this dtype."""
    info = torch.finfo(dtype)
    return any(0 < norm(X) < 1e3 * info.tiny / info.eps for X in matrices)


def pinv(X: Tensor) -> Tensor:
    inverse, info = torch.linalg.inv_ex(X)
    return inverse.contiguous() if int(info) == 0 else torch.full_like(X, math.inf)


def condition(X: Tensor) -> float:
    """Of a symmetric matrix; inf where it is singular or not finite."""
    if not X.numel():
        return 1.0
    if not bool(torch.isfinite(X).all()):
        return math.inf
    d = torch.linalg.eigvalsh(X).abs()
    return float(d.max() / d.min()) if float(d.min()) > 0 else math.inf


def norm(X: Tensor) -> float:
    """Root of the sum of squares, without their overflow or underflow."""
    largest = float(X.detach().abs().max()) if X.numel() else 0.0
    if not 0 < largest < math.inf:
        return largest
    return largest * float((X.detach().to(F64) / largest).square().sum().sqrt())


def allowance(dtype: torch.dtype, condition: float, size: float, unit: float = 1.0) -> float:
    """Round-off that a correct result of this size may have; inf where precision is hopeless. What underflows is
    lost, times what it is multiplied with, ``unit``."""
    eps, lost = torch.finfo(dtype).eps, torch.finfo(dtype).tiny / torch.finfo(dtype).eps
    if not eps * condition <= HOPELESS or not math.isfinite(size):
        return math.inf
    return ROUND_OFF * (eps * max(condition, 1.0) * size + max(unit, 1.0) * lost)


# ---- kinds of tries: capture -------------------------------------------------------------------------


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
    twin = lambda: net.build(dtype).to(F64).eval()
    context = surroundings(t) if t.chance(0.1) else contextlib.nullcontext()
    arguments = given if isinstance(given, (tuple, list)) else (given,)
    with untouched(t, asked, "capture"), context:
        F = t.call(lambda: kv.capture(asked, given, **options), excuse=lambda: net.build(dtype).eval()(*arguments))
    if asked is not model:
        if isinstance(asked, nn.Sequential) and len(asked) == 1:
            twin = lambda: nn.Sequential(net.build(dtype)).to(F64).eval()
        else:
            return t.wrong("capture accepted what is no model", type(asked))
    judge_fisher(t, "capture", F, twin, inputs, options, dtype, net.name)


def outputs_of(net: Net, inputs: list[Tensor], dtype: torch.dtype) -> Tensor:
    """What the network returns, or something of the usual shape where it fails or returns something else."""
    with contextlib.suppress(Exception), torch.no_grad():
        out = net.build(dtype).eval()(*(x.clone() for x in inputs))
        if isinstance(out, Tensor) and out.ndim > 1:
            return out
    return torch.zeros(len(inputs[0]), 2, dtype=dtype)


def judge_fisher(
    t: Try,
    what: str,
    F: kv.Fisher,
    twin: Callable[[], nn.Module],
    inputs: list[Tensor],
    options: dict[str, Any],
    dtype: torch.dtype,
    name: str,
) -> None:
    """A Fisher against per-example autograd."""
    where = f"{what}({name})"
    model = twin()
    exact = [x.detach().clone() if not x.is_floating_point() else x.detach().to(F64).clone() for x in inputs]
    found = t.call(F.dense)
    if not t.finite(f"{what}: F.dense()", found):
        return
    true = truth(model, exact, F.partition)
    if true.coupled:
        return t.wrong(f"{where} accepted a model that couples the examples")
    if F.N != len(exact[0]):
        return t.wrong(f"{where} counts other examples than there are", f"{F.N}, {len(exact[0])}")
    if options["fisher"] == "mc":
        return judge_labels(t, where, F, true, options)
    of = lambda truth: truth.fisher(options["likelihood"], options.get("targets"))
    expected = of(true)
    eps = max(torch.finfo(kind).eps for kind in (dtype, true.precision))
    size = norm(true.J.flatten(0, 1)) ** 2 / F.N
    largest = float(expected.abs().max())
    off = float((found.to(F64) - expected).abs().max())
    allowed = ROUND_OFF * eps * (largest + eps * size + (largest * size) ** 0.5 * eps**0.5) + torch.finfo(dtype).tiny
    if not off <= allowed and math.isfinite(size):
        moved = [truth(*perturbed(t, model, exact, eps), F.partition) for _ in range(6)]
        allowed += 50 * max(float((of(other) - expected).abs().max()) for other in moved)
        t.check(off <= allowed, f"{where}: F.dense() is wrong", f"off by {off:.3g}, allowed {allowed:.3g}")
    v = t.normal(F.partition.size, dtype=F.dtype)
    dense = found.to(F64)
    t.close(f"{what}: F @ v", t.call(lambda: F @ v), dense @ v.to(F64), allowance(F.dtype, 1, norm(dense) * norm(v), norm(v)))


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


# ---- kinds of tries: operators on a made-up Fisher ---------------------------------------------------


def made_up(t: Try, *, tame: bool = False) -> kv.Fisher:
    """A Fisher of random inputs and vectors, of one to four small layers."""
    dtype = t.pick(F64, F64, torch.float32)
    N, S = t.pick(1, 2, 3, 5, 8), t.pick(1, 1, 2, 3)
    shared = t.pick(None, None, (t.whole(1, 3), t.whole(1, 3)))  # layers of one shape go through one product
    same_T = t.pick(1, 1, 1, t.whole(1, 3), None)
    layers, a, g = [], [], []
    for l in range(t.pick(1, 2, 2, 3, 4)):
        out, features = shared if shared and t.chance(0.8) else (t.whole(1, 4), t.whole(1, 4))
        T = same_T or t.whole(1, 3)
        layers.append(Layer(t.pick(f"{l}", f"body.{l}"), out, features, bias=features > 1 and t.chance(0.5)))
        a.append(t.normal(N, T, features))
        g.append(t.normal(S, N, T, out))
    t.benign = True
    if not tame and t.chance(0.5):
        t.benign = False
        l, side = t.whole(0, len(layers) - 1), t.pick(a, g)
        way = t.whole(0, 5)
        if way == 0:
            side[l] = side[l] * 0
        elif way == 1:
            side[l] = side[l][..., :1].expand_as(side[l]).clone()
        elif way == 2:
            side[l] = side[l] * 10.0 ** t.whole(-8, 8)
        elif way == 3:
            power = t.pick(*((15, -15, 75, 150, -75, -150, -300, 300) if dtype == F64 else (9, 18, 30, -9, -18, -30, -40)))
            side[l] = side[l] * 10.0**power
        elif way == 4:
            scale = 10.0 ** t.pick(*((-5, 5, 50, -50, -80, 100) if dtype == F64 else (-5, 5, 9, -9, -12, 15)))
            a, g = [x * scale for x in a], [x * scale for x in g]
        else:
            a, g = [x.round() for x in a], [x.round() for x in g]
    return kv.Fisher(kv.Partition(tuple(layers)), [x.to(dtype) for x in a], [x.to(dtype) for x in g])


def take_damping(t: Try, build: Callable[[Any], Any], what: str) -> tuple[Any, float]:
    """Something built with some λ, and what λ is."""
    asked = damping(t)
    λ = number(asked)
    t.benign = t.benign and λ is not None and 1e-3 <= λ <= 1e6 and not isinstance(asked, (Fraction, Decimal))
    built = t.call(lambda: build(asked))
    if λ is None:
        t.wrong(f"accepted the damping {asked!r}"[:60], what)
        raise Refused
    return built, λ


def tridiagonal(F: kv.Fisher, λ: float) -> tuple[Tensor, float]:
    """The Gaussian chain of K-FAC's section 4.3 written out, and its condition."""
    pairs, s = kron_factors(F), F.partition.slices
    K, Ks = [], []
    for A, G in pairs:
        ratio = float(A.trace() / len(A)) / float(G.trace() / len(G)) if float(G.trace()) else 0.0
        π = ratio**0.5 if 0 < ratio < math.inf else 1.0
        K.append(torch.kron(G + λ**0.5 / π * torch.eye(len(G), dtype=F64), A + λ**0.5 * π * torch.eye(len(A), dtype=F64)))
    Ξ, Λ = torch.eye(F.partition.size, dtype=F64), torch.zeros(F.shape, dtype=F64)
    worst = math.inf if underflows(F.dtype, *itertools.chain(*pairs)) else max(condition(X) for X in K)
    for l, block in enumerate(K):
        Σ = block
        if l + 1 < len(K):
            a, b = (F.a[i].to(F64).flatten(0, 1) / F.a[i].shape[1] ** 0.5 for i in (l, l + 1))
            g, h = (F.g[i].to(F64).flatten(0, 2) for i in (l, l + 1))
            cross = torch.kron(g.T @ h / F.N, a.T @ b / F.N)
            Ψ = cross @ pinv(K[l + 1])
            Ξ[s[l], s[l + 1]] = -Ψ
            Σ = block - Ψ @ cross.T
            worst *= max(1.0, norm(Ψ))
        worst = max(worst, norm(block) * norm(pinv(Σ)) * max(condition(X) for X in K))
        Λ[s[l], s[l]] = pinv(Σ)
    del Ks
    return Ξ.T @ Λ @ Ξ, worst


def operators(t: Try) -> None:
    """One-level operators and preconditioners against dense formulas."""
    F = made_up(t)
    P, eye, exact = F.partition.size, torch.eye(F.partition.size, dtype=F64), gram(F)
    s, layers = F.partition.slices, range(len(F.partition))
    size = float(exact.trace())
    convention = t.pick("expand", "expand", "reduce")
    what = t.pick("Fisher", "damped", "KFAC", "KFAC", "KFAC", "EKFAC", "BlockDiagonal", "BlockTridiagonal", "Diagonal",
                  "Identity", "KroneckerFisher", "Dense")  # fmt: skip
    λ, moves = 0.0, [1.0] * len(F.partition)
    if what == "Fisher":
        op, expected = F, exact
    elif what == "damped":
        op, λ = take_damping(t, F.damped, what)
        expected = exact + λ * eye
    elif what == "KFAC":
        rule = t.pick("eigen", "factored")
        given = t.pick(F, kv.KroneckerFactors(F.partition, *map(tuple, zip(*(F.factors(l, l) for l in layers), strict=True))))
        convention = convention if given is F else "expand"
        what = f"KFAC {rule}"
        op, λ = take_damping(t, lambda x: kv.KFAC(given, x, rule, *([convention] if given is F else [])), what)
        blocks, moves = kfac_inverse(kron_factors(F, convention), λ, rule, F.dtype)
        expected = torch.block_diag(*blocks)
    elif what == "EKFAC":
        op, λ = take_damping(t, lambda x: kv.EKFAC(F, x, convention), what)
        blocks = []
        for l in layers:
            U = torch.kron(op.factors.eigen_G[l].U.to(F64), op.factors.eigen_A[l].U.to(F64))
            d = torch.einsum("pi,pq,qi->i", U, exact[s[l], s[l]], U)
            blocks.append((U / (d + λ)) @ U.T)
            moves[l] = float((exact[s[l], s[l]].trace() + λ) / (d.min() + λ)) if float(d.min() + λ) > 0 else math.inf
        expected = torch.block_diag(*blocks)
    elif what == "BlockDiagonal":
        op, λ = take_damping(t, lambda x: kv.BlockDiagonal(F, x), what)
        damped = [exact[i, i] + λ * torch.eye(i.stop - i.start, dtype=F64) for i in s]
        expected, moves = torch.block_diag(*map(pinv, damped)), [condition(X) for X in damped]
    elif what == "BlockTridiagonal":
        t.benign = False  # a chain may be determined at any λ
        op, λ = take_damping(t, lambda x: kv.BlockTridiagonal(F, x), what)
        expected, worst = tridiagonal(F, λ)
        moves = [worst] * len(s)
    elif what == "Diagonal":
        power = t.pick(1.0, 1, 0.5, 0.0, 0.3, *((math.nan, -1, 2, None, "1", True, 1j) if t.chance(0.2) else ()))
        t.benign = t.benign and power in (1.0, 0.5, 0.0, 0.3)
        op, λ = take_damping(t, lambda x: kv.Diagonal(F, x, power), what)
        expected = (exact.diagonal() + λ).pow(-float(power)).diag()
    elif what == "Identity":
        op, λ = take_damping(t, lambda x: kv.Identity(F, x), what)
        expected = eye
    elif what == "KroneckerFisher":
        t.benign = False  # refused where positions differ
        op = t.call(lambda: kv.KroneckerFisher(F, convention))
        expected = kronecker_model(F, convention)
        size = float(expected.trace())
    else:
        matrix = F.dense()
        if t.chance(0.3):
            t.benign, matrix = False, spoiled(t, matrix)
        op = t.call(lambda: kv.Dense(matrix, F.partition))
        expected = real(matrix)
        t.check(norm(expected - expected.T) <= 1e-3 * norm(expected), "Dense took a matrix that is not symmetric")
    inverse = what not in ("Fisher", "damped", "KroneckerFisher", "Dense", "Identity")
    judge_matrix(t, what, op, expected, (size + λ, moves) if not inverse else (None, moves))
    if hasattr(op, "with_damping") and t.chance(0.4):
        other, λ = take_damping(t, op.with_damping, f"{what}.with_damping")
        fresh = {"damped": lambda: F.damped(λ), "BlockDiagonal": lambda: kv.BlockDiagonal(F, λ),
                 "Identity": lambda: kv.Identity(F, λ), "EKFAC": lambda: kv.EKFAC(F, λ, convention)}  # fmt: skip
        if what in fresh:
            again = t.call(fresh[what]).dense().to(F64)
            t.close(f"{what}.with_damping: dense()", other.dense(), again, allowance(F.dtype, 1, norm(again)))
        if what.startswith("KFAC"):
            blocks, moves = kfac_inverse(kron_factors(F, convention), λ, rule, F.dtype)
            judge_matrix(t, f"{what}.with_damping", other, torch.block_diag(*blocks), (None, moves))
    if what == "damped":
        λ = op.damping
        v = t.normal(P, dtype=F.dtype) if t.chance(0.6) else t.normal(P, 2, dtype=F.dtype)
        x = t.call(lambda: op.solve(v))
        A = exact + λ * eye
        target = pinv(A) @ v.to(F64)
        t.close("damped.solve", x, target, allowance(F.dtype, condition(A), norm(pinv(A)) * float(v.norm())))


def kronecker_model(F: kv.Fisher, convention: str) -> Tensor:
    """All blocks ``G_lm ⊗ A_lm``."""
    A, G = [], []
    for a, g in zip(F.a, F.g, strict=True):
        a, g = a.to(F64), g.to(F64)
        A.append(a.mean(1) if convention == "reduce" else a.flatten(0, 1) / a.shape[1] ** 0.5)
        G.append(g.sum(2).flatten(0, 1) if convention == "reduce" else g.flatten(0, 2))
    rows = [torch.cat([torch.kron(g.T @ h / F.N, a.T @ b / F.N) for b, h in zip(A, G, strict=True)], 1)
            for a, g in zip(A, G, strict=True)]  # fmt: skip
    return torch.cat(rows)


def judge_matrix(
    t: Try, what: str, op: kv.Operator, expected: Tensor, bounds: tuple[float | None, list[float]]
) -> None:
    """dense(), products, blocks and the diagonal of an operator; bounds are (size or None, condition of each layer).
    Without a size, entries may be off by the condition of their layer times the norm of its block."""
    size, moves = bounds
    dtype, slices, dense = op.dtype, op.partition.slices, t.call(op.dense)
    if not t.finite(f"{what}: dense()", dense):
        return
    sizes = [norm(expected[i, i]) if size is None else size for i in slices]
    for l, m in itertools.product(range(len(slices)), repeat=2):
        allowed = max(allowance(dtype, moves[i], sizes[i]) for i in (l, m))
        t.close(f"{what}: dense()", dense[slices[l], slices[m]], expected[slices[l], slices[m]], allowed)
    found, P = dense.to(F64), op.partition.size
    largest = norm(found)
    v = t.normal(P, dtype=dtype) if t.chance(0.5) else t.normal(P, t.whole(0, 3), dtype=dtype)
    if t.chance(0.25):
        t.benign, v = False, spoiled(t, v)
    with surroundings(t) if t.chance(0.1) else contextlib.nullcontext("") as where:
        product = t.call(lambda: op @ v)
    v64 = real(v)
    if "autocast" in where:
        what = "an operator"
    if t.check(product.dtype == dtype, f"{what} @ v{where} has another dtype", f"{product.dtype}, {dtype}"):
        t.close(f"{what} @ v{where}", product, found @ v64, allowance(dtype, 1, largest * norm(v64), norm(v64)))
    l, m = t.whole(0, len(slices) - 1), t.whole(0, len(slices) - 1)
    block = t.call(lambda: op.block(op.partition.names[l] if t.chance(0.3) else l, m))
    t.close(f"{what}.block", block, found[slices[l], slices[m]], allowance(dtype, 1, largest))
    t.close(f"{what}.diagonal", t.call(op.diagonal), found.diagonal(), allowance(dtype, 1, largest))


# ---- kinds of tries: two levels, and what they are worth ---------------------------------------------

BUILDERS = ("nicolaides", "spectral", "smooth", "krylov", "random", "optimal", "columns")


def coarse_space(t: Try, F: kv.Fisher, A: kv.Operator, M: kv.Operator) -> kv.CoarseSpace:
    name = t.pick(*BUILDERS)
    k = t.pick(0, 1, 1, 2, 2, 3, 5, 20) if t.chance(0.95) else t.pick(*BAD_COUNTS, 10**400, 2**70, np.int64(2))
    t.benign = t.benign and type(k) is int and 0 <= k < 2
    if name == "columns":
        columns = t.normal(F.partition.size, t.whole(0, 6), dtype=F.dtype)
        if columns.shape[1] and t.chance(0.5):
            columns[:, -1] = columns[:, 0] * t.pick(1, -2, 0, 1e-200) + t.pick(0, 0, 1e-9, 1e-14) * columns[:, -1]
        if t.chance(0.2):
            columns = columns * 10.0 ** t.pick(-300, -30, -15, 15, 30, 150)
        if t.chance(0.1):
            columns = spoiled(t, columns)
        t.benign = False
        return t.call(lambda: kv.CoarseSpace(F.partition, columns))
    if name in ("krylov", "optimal"):
        g = t.normal(F.partition.size, dtype=F.dtype)
        if t.chance(0.15):
            t.benign, g = False, spoiled(t, g)
        rest = (M, g, k) if name == "krylov" else (M, k)
        return t.call(lambda: getattr(kv.coarse, name)(A, *rest))
    rest = (k, t.whole(0, 9)) if name == "random" else (k,)
    return t.call(lambda: getattr(kv.coarse, name)(F, *rest))


def two_level_matrix(A: Tensor, M: Tensor, Z: Tensor, E: Tensor, correction: str) -> Tensor:
    """Table of Tang et al. 2009, written with matrices."""
    Q, I = Z @ pinv(E) @ Z.T, torch.eye(len(A), dtype=F64)
    if correction == "additive":
        return M + Q
    if correction == "a-def1":
        return Q + M @ (I - A @ Q)
    if correction == "a-def2":
        return M + Q @ (I - A @ M)
    return Q + (I - A @ Q).T @ M @ (I - A @ Q)


def coarse_condition(Z: Tensor, E: Tensor, size: float) -> float:
    """How far round-off in a matrix of this size, seen through normalised columns Z, moves the inverse of E."""
    if not bool(torch.isfinite(E).all()):
        return math.inf
    smallest = float(torch.linalg.eigvalsh(E).abs().min())
    return condition(Z.T @ Z) * max(condition(E), size / smallest if smallest else math.inf)


@dataclass
class Levels:
    """Two levels, and the same in float64."""

    T: kv.TwoLevel
    A: kv.Operator
    M: kv.Operator
    A64: Tensor
    T64: Tensor
    size: float  # of the terms that make up T
    condition: float  # of what is inverted for the coarse level


def levels(t: Try) -> Levels:
    F = made_up(t)
    A, λ = take_damping(t, F.damped, "damped")
    M_λ = λ if t.chance(0.9) else number(t.pick(*DAMPINGS))
    t.benign = t.benign and M_λ >= 1e-3
    M = t.call(lambda: t.pick(kv.KFAC, kv.KFAC, kv.EKFAC, kv.BlockDiagonal, kv.Diagonal, kv.Identity)(F, M_λ))
    Z = coarse_space(t, F, A, M)
    correction = t.pick("additive", "a-def1", "a-def2", "balanced")
    options: dict[str, Any] = {}
    E_base, E_λ = gram(F), λ
    if t.chance(0.15):
        t.benign = False
        K = t.call(lambda: kv.KroneckerFisher(F))
        E_base = kronecker_model(F, "expand")
        options["coarse_operator"] = K.damped(λ)
    if t.chance(0.05):
        t.benign, correction = False, t.pick(*WORDS)
    T = t.call(lambda: kv.TwoLevel(A, M, Z, correction, **options))
    eye = torch.eye(F.partition.size, dtype=F64)
    with_damping = t.chance(0.3)
    if with_damping:
        T, λ = take_damping(t, T.with_damping, "TwoLevel.with_damping")
        A, M, E_λ = T.A, T.M, λ
    if t.chance(0.2):
        correction = t.pick("additive", "a-def1", "a-def2", "balanced")
        T = t.call(lambda: T.with_correction(correction))
    A64, M64, Z64 = gram(F) + λ * eye, M.dense().to(F64), Z.dense().to(F64)
    t.finite(f"coarse.{Z.name}", Z64)
    E = Z64.T @ (E_base + E_λ * eye) @ Z64
    scaled = Z64 / Z64.norm(dim=0).clamp_min(1e-300) if Z64.numel() else Z64
    Es = scaled.T @ (E_base + E_λ * eye) @ scaled
    worst = coarse_condition(scaled, Es, norm(E_base)) if Z64.numel() else 1.0
    q = norm(scaled @ pinv(Es) @ scaled.T) if Z64.numel() else 0.0
    grow = 1 + norm(A64) * q
    size = q + grow * grow * norm(M64)
    return Levels(T, A, M, A64, two_level_matrix(A64, M64, scaled, Es, correction), size, worst)


def twolevel(t: Try) -> None:
    """Corrections and coarse spaces against the table."""
    x = levels(t)
    T, P, dtype = x.T, x.A.partition.size, x.A.dtype
    what = f"TwoLevel {T.correction}"
    dense = t.call(T.dense)
    allowed = allowance(dtype, x.condition, x.size)
    if t.close(f"{what}: dense()", dense, x.T64, allowed):
        v = t.normal(P, dtype=dtype) if t.chance(0.5) else t.normal(P, t.whole(0, 3), dtype=dtype)
        if t.chance(0.2):
            t.benign, v = False, spoiled(t, v)
        product = t.call(lambda: T @ v)
        v64 = real(v)
        t.close(f"{what} @ v", product, x.T64 @ v64, allowance(dtype, x.condition, x.size * norm(v64), norm(v64)))
    if t.chance(0.2):
        t.close(f"{what}: Q.dense()", t.call(T.Q.dense), T.Q.dense().T.to(F64), allowed)
        Z = T.Z
        r = t.normal(P, dtype=dtype)
        t.close("Z.restrict", t.call(lambda: Z.restrict(r)), Z.dense().to(F64).T @ r.to(F64),
                allowance(dtype, 1, norm(Z.dense().to(F64)) * float(r.to(F64).norm())))  # fmt: skip


def worth(t: Try) -> None:
    """pcg, spectra, captured decrease and exact directions."""
    x = levels(t)
    A, T, dtype, P = x.A, t.pick(x.T, x.T, x.M, None), x.A.dtype, x.A.partition.size
    T64 = {id(x.T): x.T64, id(None): torch.eye(P, dtype=F64)}.get(id(T), x.M.dense().to(F64))
    eps, κ = torch.finfo(dtype).eps, condition(x.A64)
    g = t.normal(P, dtype=dtype)
    way = t.whole(0, 9)
    if way == 0:
        t.benign, g = False, spoiled(t, g)
    elif way == 1:
        t.benign, g = False, g * 10.0 ** t.pick(*((-300, -160, 100, 160) if dtype == F64 else (-38, -20, 15, 25)))
    what = t.pick("pcg", "pcg", "spectrum", "condition_number", "captured_decrease", "captured_decrease", "exact")
    t.benign = t.benign and (T is None or T.symmetric)
    g64 = real(g) if isinstance(g, Tensor) and g.shape == (P,) else None
    if what == "pcg":
        t.benign = False  # positive definite in exact arithmetic only
        options: dict[str, Any] = {}
        if t.chance(0.5):
            options["rtol"] = t.pick(1e-2, 1e-4, 1e-10, 1e-14, 1e-300, 0, 0.0, None, math.nan, math.inf, -1, "a", True, 1,
                                     torch.tensor(1e-3), 10**400, 1j, [])  # fmt: skip
        if t.chance(0.3):
            options["max_iterations"] = t.pick(0, 1, 3, *BAD_COUNTS, 10**400)
        if t.chance(0.3):
            options["x0"] = t.normal(P, dtype=dtype) * t.pick(1, 1, 0, 1e8, 1e-300)
            if t.chance(0.3):
                options["x0"] = spoiled(t, options["x0"])
        if t.chance(0.3):
            options["reorthogonalize"] = True
        calls: list[tuple[Tensor, float]] = []
        if t.chance(0.2):
            options["callback"] = t.pick(lambda *both: calls.append(both), lambda *both: calls.append(both), "x", 3)
        s = t.call(lambda: kv.pcg(A, g, M=T, **options))
        t.finite("pcg: solution", s.solution)
        t.finite("pcg: residuals", list(s.residuals))
        true = float((g64 - x.A64 @ s.solution.detach().to(F64)).norm()) / max(float(g64.norm()), 1e-300)
        rtol = options.get("rtol", 1e-8)
        if t.check(isinstance(rtol, (int, float, Tensor)) and 0 < rtol < math.inf, f"pcg accepted rtol {rtol!r}"):
            longest = max(float(s.solution.to(F64).norm()), *(float(c.to(F64).norm()) for c, _ in calls), 0.0) + (
                float(options["x0"].detach().to(F64).norm()) if options.get("x0") is not None else 0.0)  # fmt: skip
            slack = 100 * eps * P * (1 + s.iterations) * (1 + norm(x.A64) * longest / max(float(g64.norm()), 1e-300))
            if s.converged and rtol < 1e300:
                t.check(not true > 2 * float(rtol) + slack, "pcg converged, and the residual is large", f"{true:.3g}")
        t.check(not calls or len(calls) == s.iterations, "pcg called back another number of times", len(calls))
    elif what in ("spectrum", "condition_number"):
        if T is not None and not T.symmetric and x.T.galerkin and x.T.M.symmetric:
            t.benign = False
        d = t.call(lambda: kv.spectrum(A, T))
        size = norm(x.A64) * (x.size if T is x.T else norm(T64))
        allowed = allowance(dtype, x.condition if T is x.T else 1, size)
        product = T64 @ x.A64
        if bool(torch.isfinite(product).all()) and math.isfinite(allowed):
            expected = torch.linalg.eigvals(product).real.sort().values
            t.close("spectrum", d, expected, allowed + eps**0.5 * size)
        else:
            t.finite("spectrum", d)
        if what == "condition_number":
            c = t.call(lambda: kv.condition_number(A, T))
            t.check(c >= 1 - 1e-6, "condition_number is below 1 or NaN", c)
            if math.isfinite(c):
                t.check(abs(c - float(d[-1] / d[0])) <= 1e-3 * c, "condition_number is wrong", c)
    elif what == "exact":
        v = t.call(lambda: kv.exact_direction(A, g))
        t.close("exact_direction", v, pinv(x.A64) @ g64, allowance(dtype, κ, norm(pinv(x.A64)) * float(g64.norm())))
    else:
        v = t.normal(P, dtype=dtype)
        if t.chance(0.5) and g64 is not None:
            v = (pinv(x.A64) @ g64).to(dtype)
        if t.chance(0.15):
            t.benign, v = False, spoiled(t, v)
        with surroundings(t) if t.chance(0.1) else contextlib.nullcontext():
            share = t.call(lambda: kv.captured_decrease(A, g, v))
        if t.finite("captured_decrease", share):
            v64 = real(v)
            a, b = float(v64.abs().max()), float(g64.abs().max())
            v1, g1 = v64 / a if a else v64, g64 / b if b else g64
            best = float(g1 @ pinv(x.A64) @ g1)
            ratio = a / b if b else math.inf
            expected = (2 * float(g1 @ v1) * ratio - float(v1 @ x.A64 @ v1) * ratio**2) / best if best else math.nan
            terms = (2 * float(g1.abs() @ v1.abs()) * ratio + norm(x.A64) * float(v1 @ v1) * ratio**2) / best if best else 0
            t.close("captured_decrease", torch.tensor(share, dtype=F64), torch.tensor(expected, dtype=F64),
                    allowance(dtype, κ, terms + abs(expected)))  # fmt: skip


# ---- kinds of tries: partitions and losses -----------------------------------------------------------


def partitions(t: Try) -> None:
    """Vectors to layers, parameters and back."""
    net, dtype = network(t), t.pick(*DTYPES)
    model = net.build(dtype)
    with contextlib.suppress(Exception), torch.no_grad():
        model(*batch(t, net, 2, dtype))  # gives lazy layers their shape
    way = t.pick("sizes", "flat", "flat", "add", "add", "gradient", "layers")
    if way == "sizes":
        sizes = t.pick([2, 3], [1], [], [0], [-1], [2.0], ["a"], None, 3, [np.int64(2)], (4, 1), [True], iter([1, 2]), "12",
                       [10**400], [2**62, 2**62])  # fmt: skip
        names = t.pick(None, None, ["x", "y"], ["x", "x"], "xy", [1, 2], [None, None], 3, [[], []])
        p = t.call(lambda: kv.Partition.from_sizes(sizes, names))
        return void(t.check(p.size == p.offsets[-1] and len(p) == len(p.names), "Partition.from_sizes is wrong"))
    if way == "layers":
        given = t.pick((), [], None, 3, "x", (None,), ((1, 2),), (Layer("a", 0, 1),), (Layer("a", 1, 1), Layer("a", 2, 1)),
                       (Layer("a", 2, 2, True),), (Layer("a", -1, -1),), (Layer("a", 1.5, 2),))  # fmt: skip
        p = t.call(lambda: kv.Partition(given))
        return void(t.check(isinstance(p.size, int) and p.size > 0, "Partition accepted layers without a size", given))
    p = t.call(lambda: kv.Partition.from_model(model))
    θ = t.call(lambda: p.pack(model))
    expected = torch.cat([flat_layer(model.get_submodule(n).weight, model.get_submodule(n).bias) for n in p.names]).detach()
    t.check(torch.equal(θ, expected), "Partition.pack is wrong")
    v: Any = t.normal(p.size, dtype=dtype)
    if t.chance(0.4):
        v = spoiled(t, v)
    if way == "flat":
        pieces = t.call(lambda: p.split(v))
        if t.chance(0.3):
            pieces = t.pick(pieces[:-1], [*pieces, pieces[0]], pieces[::-1], None, 3, [None] * len(p), tuple(pieces),
                            [x.flatten() for x in pieces], [[1.0]] * len(p))  # fmt: skip
        joined = t.call(lambda: p.join(pieces))
        if isinstance(pieces, list) and len(pieces) == len(p) and joined.device.type != "meta":
            flat = torch.cat([piece.flatten(0, 1) for piece in pieces])
            t.check(difference(joined, flat) is None, "Partition.join is wrong")
    elif way == "gradient":
        for q in model.parameters():
            q.grad = t.normal(*q.shape, dtype=dtype) if q.requires_grad and t.chance(0.95) else None
        g = t.call(lambda: p.pack_grad(model))
        modules = [model.get_submodule(n) for n in p.names]
        t.check(torch.equal(g, torch.cat([flat_layer(m.weight.grad, None if m.bias is None else m.bias.grad) for m in modules])),
                "Partition.pack_grad is wrong")  # fmt: skip
    else:
        alpha: Any = t.pick(1.0, -1, 0.5, 0, 1e-3) if t.chance(0.7) else t.pick(1e300, 1e30, -math.inf, *BAD_DAMPINGS)
        before = {k: q.detach().clone() for k, q in model.state_dict().items()}
        try:
            t.call(lambda: p.add_(model, v, alpha))
        except (Refused, Raw):
            t.check(difference(before, dict(model.state_dict())) is None, "Partition.add_ raised and changed the model")
            raise
        found = p.pack(model)
        if t.finite("Partition.add_: parameters", found):
            target = θ.to(F64) + float(alpha) * real(v)
            t.close("Partition.add_", found, target, 8 * torch.finfo(dtype).eps * (1 + float(target.abs().max())))


def void(_: object) -> None:
    return None


def flat_layer(weight: Tensor, bias: Tensor | None) -> Tensor:
    W = weight.flatten(1)
    return (W if bias is None else torch.cat([W, bias[:, None]], 1)).flatten()


def losses(t: Try) -> None:
    """nll against formulas."""
    dtype, likelihood = t.pick(*DTYPES), t.pick("categorical", "bernoulli", "gaussian")
    shape = (examples(t), *(t.whole(1, 4) for _ in range(t.pick(1, 1, 1, 2, 0, 3))))
    f = t.normal(*shape, dtype=dtype) * t.pick(1, 1, 1, 10, 100, 0)
    y = labels(t, f, likelihood) if f.ndim > 1 else t.normal(*shape, dtype=dtype)
    way = t.whole(0, 5)
    given: list[Any] = [f, y, likelihood]
    if way < 2:
        given[way] = spoiled(t, given[way])
    elif way == 2 and t.chance(0.3):
        given[2] = t.pick(*WORDS)
    f.requires_grad_(t.chance(0.5))
    loss = t.call(lambda: kv.nll(*given))
    f, y = real(given[0]), given[1].detach()
    if not bool(torch.isfinite(f).all()):
        return
    if likelihood == "categorical":
        total = (f.logsumexp(-1) - f.gather(-1, y.long()[..., None])[..., 0]).sum()
        size = f.abs().sum() + 1
    elif likelihood == "bernoulli":
        total, size = (torch.logaddexp(f, 0 * f) - y.to(F64) * f).sum(), f.abs().sum() + 1
    else:
        total = size = 0.5 * (y.to(F64) - f).square().sum()
        size = size + (y.to(F64).square() + f.square()).sum()
    expected = total / len(f)
    if float(size) > torch.finfo(loss.dtype).max / 4:
        return  # a loss may well overflow
    eps = max(torch.finfo(x.dtype).eps for x in (loss, given[0]))
    t.close(f"nll {likelihood}", loss, expected, ROUND_OFF * eps * float(size) + 1e-300)


# ---- kinds of tries: training ------------------------------------------------------------------------

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


def matrices(T: kv.TwoLevel) -> tuple[Tensor, Tensor, float, float]:
    """A and T in float64, the size of the terms that make up T, and the condition of what is inverted."""
    P = T.partition.size
    eye = torch.eye(P, dtype=F64)
    A = gram(T.A.operator) + T.A.damping * eye
    M, Z = T.M.dense().to(F64), T.Z.dense().to(F64)
    if not Z.numel():
        return A, M, norm(M), 1.0
    Z = Z / Z.norm(dim=0).clamp_min(1e-300)
    K = T.coarse_operator
    B = A if T.galerkin else kronecker_model(K.operator.F, K.operator.convention) + K.damping * eye
    E = Z.T @ B @ Z
    grow = 1 + norm(A) * norm(Z @ pinv(E) @ Z.T)
    size = grow + grow * grow * norm(M)
    return A, two_level_matrix(A, M, Z, E, T.correction), size, coarse_condition(Z, E, norm(B))


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


def tampered(t: Try, value: Any, depth: int = 0) -> Any:
    """The same nest with one thing changed in it."""
    if depth == 0:
        value = copy.deepcopy(value)
    if isinstance(value, dict) and value and (depth == 0 or t.chance(0.9)):
        key = "curvature" if depth == 0 and t.chance(0.7) and "curvature" in value else t.pick(*value)
        if t.chance(0.15):
            return {k: v for k, v in value.items() if k != key}
        return {k: tampered(t, v, depth + 1) if k == key else v for k, v in value.items()}
    if isinstance(value, list) and value and t.chance(0.8):
        i = t.whole(0, len(value) - 1)
        return [tampered(t, v, depth + 1) if j == i else v for j, v in enumerate(value)]
    if isinstance(value, Tensor):
        return spoiled(t, value)
    odd: tuple = (None, "a", -1, math.nan, math.inf, [], {}, 10**400, 1e300, 0, 1.5, torch.ones(2), (), True)
    if isinstance(value, list) and value:
        odd = (*odd, value[:-1], value + value[:1])
    return t.pick(*odd)


KINDS: dict[str, Callable[[Try], None]] = {
    function.__name__: function
    for function in (capture, operators, twolevel, worth, partitions, losses, training, states)
}


# ---- running -----------------------------------------------------------------------------------------


def attempt(kind: str, seed: int) -> Outcome:
    """One try of one kind."""
    t = Try(kind, seed)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        try:
            KINDS[kind](t)
            t.outcome.accepted = not t.refusals
        except Refused as error:
            if t.benign:
                t.wrong(f"an ordinary case is refused: {gist(str(error.__cause__))}", error.__cause__)
        except Raw as error:
            t.record(error.__cause__)
        except Hanging as error:
            t.record(error)
        except Exception as error:  # a mistake in this file
            t.outcome.failures.append(("fuzz", f"{type(error).__name__} {gist(str(error))}"))
            t.outcome.details.append("".join(traceback.format_exception(error)))
    t.outcome.refused = t.refusals > 0
    return t.outcome


def drawn_kind(seed: int) -> str:
    return random.Random(f"kind {seed}").choice(list(KINDS))


def _alarm(*_: object) -> None:
    raise Hanging(f"no answer within {PATIENCE} seconds")


def run(seeds: range, only: str | None = None) -> list[Outcome]:
    """Tries of these seeds, one after another in this process."""
    outcomes = []
    previous = signal.signal(signal.SIGALRM, _alarm)
    try:
        for seed in seeds:
            signal.alarm(PATIENCE)
            outcomes.append(attempt(only or drawn_kind(seed), seed))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    return outcomes


def _chunk(work: tuple[range, str | None]) -> list[Outcome]:
    torch.set_num_threads(1)
    outcomes = run(*work)
    for outcome in outcomes:
        outcome.details = [text[-2000:] for text in outcome.details]
    return outcomes


@dataclass
class Report:
    """Counts per kind, and every distinct failure with the first try that shows it."""

    counts: dict[str, Counter] = field(default_factory=dict)
    failures: dict[tuple[str, str], list[Outcome]] = field(default_factory=dict)

    def add(self, outcome: Outcome) -> None:
        count = self.counts.setdefault(outcome.kind, Counter())
        sorts = {sort for sort, _ in outcome.failures}
        count.update(tries=1, accepted=outcome.accepted, refused=outcome.refused)
        count.update(raw="raw" in sorts, silent="silent" in sorts)
        for sort, what in outcome.failures:
            self.failures.setdefault((sort, what), []).append(outcome)

    def __str__(self) -> str:
        heads = ("tries", "accepted", "refused", "raw", "silent")
        names = ("tries", "accepted", "refused by a sentence", "raw errors", "silent differences")
        lines = [f"{'kind of try':14}" + "".join(f"{name:>{len(name) + 3}}" for name in names)]
        total = Counter()
        for kind, count in sorted(self.counts.items()):
            total.update(count)
            lines.append(f"{kind:14}" + "".join(f"{count[h]:>{len(n) + 3}}" for h, n in zip(heads, names, strict=True)))
        lines.append(f"{'all':14}" + "".join(f"{total[h]:>{len(n) + 3}}" for h, n in zip(heads, names, strict=True)))
        for (sort, what), outcomes in sorted(self.failures.items(), key=lambda item: -len(item[1])):
            again = f"--only {outcomes[0].kind} --seed {outcomes[0].seed} --tries 1"
            lines.append(f"\n{sort}, {len(outcomes)} times: {what}\n    python tests/fuzz.py {again}")
            if sort != "silent":
                said = [text for (s, w), text in zip(outcomes[0].failures, outcomes[0].details, strict=True) if w == what]
                lines.append(f"    {said[0].strip().splitlines()[-1][:150]}")
        return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Random tries of the public API.")
    parser.add_argument("--tries", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first try; the others count up from it")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--only", choices=sorted(KINDS), help="one kind of try")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many")
    args = parser.parse_args(argv)
    report, started, seeds = Report(), time.monotonic(), range(args.seed, args.seed + args.tries)
    chunks = [(seeds[i : i + 100], args.only) for i in range(0, len(seeds), 100)]
    with contextlib.ExitStack() as stack_:
        if args.jobs > 1 and len(chunks) > 1:
            pool = stack_.enter_context(multiprocessing.get_context("spawn").Pool(min(args.jobs, len(chunks))))
            results = pool.imap_unordered(_chunk, chunks)
        else:
            results = map(_chunk, chunks)
        for outcomes in results:
            for outcome in sorted(outcomes, key=lambda o: o.seed):
                report.add(outcome)
                if args.tries == 1:
                    print(*outcome.details, sep="\n")
            if time.monotonic() - started > 60 * args.minutes:
                break
    print(report)
    print(f"\n{len(report.failures)} distinct failures in {time.monotonic() - started:.0f} seconds.")
    return bool(report.failures)


if __name__ == "__main__":
    sys.exit(main())
