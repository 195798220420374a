"""Small networks of every kind that people write, and data for them."""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .judge import F64, Try, seeded


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


# Networks that nobody has a reason to refuse.
ORDINARY = ("stack", "conv", "called twice", "positions", "residual", "changed in place", "in pieces", "bare",
            "listed twice")  # fmt: skip
SHORT = (torch.int32, torch.int16, torch.uint8)  # integers that may be class indices too
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
            parts.append(lambda m=m: nn.LayerNorm(m) if m > 2 else nn.Identity())  # of few numbers it is round-off
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
        "changed in place with positions": (
            lambda: Forward(lambda s, x: s.head(torch.relu_(s.one(x))).sum(1), one=L(n, m, bias=bias), head=L(m, c)),
            (T, n),
        ),
        "patched forward": (lambda: patched(nn.Sequential(L(n, m), nn.Tanh(), L(m, c))), (n,)),
        "in pieces": (
            lambda: Forward(lambda s, x: s.head(torch.tanh(s.one(x)) * s.one(x).flip(1)), one=L(n, m), head=L(m, c)),
            (n,),
        ),
        "some rows": (
            lambda: Forward(lambda s, x: s.head(x).index_add(0, (x[:, 0] > 0).nonzero()[:, 0], s.one(x[x[:, 0] > 0])),
                            one=L(n, c), head=L(n, c)), (n,),
        ),
        "chosen by data": (
            lambda: Forward(lambda s, x: torch.where(x[:, :1] > 0, s.one(x), s.two(x)), one=L(n, c), two=L(n, c)), (n,),
        ),
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
        name = "two inputs"
        nets[name] = (lambda: Forward(multiplied, one=L(n, m), two=L(n, m), head=L(m, c)), (n,))
        return Net(name, *nets[name], inputs=2, seed=t.whole(0, 2**31))
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


def multiplied(s: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return s.head(torch.tanh(s.one(x)) * s.two(y))


def in_place(s: nn.Module, x: Tensor) -> Tensor:
    h = s.one(x)
    h += 1
    h.mul_(2)
    h[:, 0] = 0
    return s.head(torch.tanh(h))


def patched(model: nn.Sequential) -> nn.Module:
    """A forward pass put onto one module and not its class."""
    model[0].forward = types.MethodType(lambda s, x: 2 * functional.linear(x, s.weight, s.bias), model[0])
    return model


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
        return y.to(t.pick(*SHORT)) if t.chance(0.1) else y
    y = t.uniform(*shape) if likelihood == "bernoulli" else 3 * t.normal(*shape)
    return y.to(outputs.dtype)
