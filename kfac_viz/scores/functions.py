"""The functions of PyTorch through which a parameter is used in a way that is understood.

Each takes a watch, the function and its arguments; it calls the function, has the watch note what meets the
parameter, and returns the result and the tensors whose use is understood.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from .likelihood import INTEGERS

Known = tuple[Any, list[Tensor]]


class Watch(Protocol):
    """What a function needs of :class:`kfac_viz.scores.uses.Watch`: which parameter a tensor is, and where to note its
    use. What notes returns the tensors whose use is understood."""

    batch_statistics: bool

    def parameter(self, x: Tensor) -> Tensor | None: ...
    def name_of(self, x: Tensor) -> str: ...
    def in_groups(self, W: Tensor, groups: int) -> bool: ...
    def product(
        self, W: Tensor, b: Tensor | None, x: Tensor, out: Tensor, rows: Callable, lead: Sequence[int],
        groups: int = 1, flipped: bool = False,
    ) -> list[Tensor]: ...  # fmt: skip
    def pointwise(
        self, b: Tensor | None, x: Tensor | None, out: Tensor, rows: Callable, lead: Sequence[int]
    ) -> list[Tensor]: ...
    def table(self, p: Tensor, x: Tensor | None, out: Tensor) -> list[Tensor]: ...


def fits(known: Callable, args: tuple, kwargs: dict) -> bool:
    """Whether a function was called in the way that is understood here."""
    try:
        _signature(known).bind(None, None, *args, **kwargs)
    except TypeError:
        return False
    return True


_signature = cache(inspect.signature)  # of the few functions below, read for every use of every layer otherwise
UNKNOWN: Known = (NotImplemented, [])


def _linear(watch: Watch, func: Callable, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Known:
    if weight.ndim != 2:
        return UNKNOWN
    if watch.parameter(weight) is not None:
        fits = input.ndim >= 2 and input.shape[-1] == weight.shape[-1]
        _check_input(watch, weight, input, fits, f"(N, …, {weight.shape[-1]})")
    input, noted = (input, []) if watch.parameter(input) is None else _as_input(watch, input)
    out = func(input, weight, bias)
    return out, noted + watch.product(weight, bias, input, out, lambda g: g, out.shape[:-1])


def _addmm(watch: Watch, func: Callable, input: Tensor, mat1: Tensor, mat2: Tensor) -> Known:
    """``input + mat1 @ mat2`` with a bias and a weight (in, out)."""
    if watch.parameter(mat1) is not None:
        return UNKNOWN
    out = func(input, mat1, mat2)
    if watch.parameter(mat2) is not None:
        return out, watch.product(mat2.mT, input, mat1, out, lambda g: g, out.shape[:-1])
    return out, watch.pointwise(input, None, out, lambda g: g, out.shape[:-1])


def _matmul(watch: Watch, func: Callable, input: Tensor, other: Tensor) -> Known:
    if watch.parameter(other) is None or other.ndim != 2:
        return UNKNOWN
    out = func(input, other)
    return out, [other] * bool(watch.product(other.mT, None, input, out, lambda g: g, out.shape[:-1]))


def _convolution(
    watch: Watch,
    func: Callable,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Known:
    channels = weight.shape[1] * groups
    fits = input.ndim == weight.ndim and input.shape[1] == channels
    _check_input(watch, weight, input, fits, f"(N, {channels}, {_space(weight)})")
    x = _patches(input.detach(), weight.shape[2:], stride, padding, dilation)  # (N, L, channels, kernel)
    out = func(input, weight, bias, stride, padding, dilation, groups)
    if groups == 1 or watch.in_groups(weight, groups):
        x = x.flatten(2)  # (N, L, groups · features)
        return out, watch.product(weight, bias, x, out, lambda g: g.flatten(3).mT, x.shape[:2], groups)
    # A weight of no layer with such groups: they are further positions.
    x = x.unflatten(2, (groups, -1)).flatten(3).movedim(2, 1)  # (N, groups, L, features)

    def rows(g: Tensor) -> Tensor:
        g = g.flatten(3).unflatten(2, (groups, -1)).mT  # (S, N, groups, L, out / groups)
        # Rows of the other groups do not see this one.
        return torch.einsum("snglo,gh->snglho", g, torch.eye(groups, dtype=g.dtype, device=g.device)).flatten(-2)

    return out, watch.product(weight, bias, x, out, rows, x.shape[:3])


def _transposed_convolution(
    watch: Watch,
    func: Callable,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Known:
    """Each pixel of the input, a row (in,), times the weight (in, out · kernel) is added to a patch of the output."""
    fits = input.ndim == weight.ndim and input.shape[1] == len(weight)
    _check_input(watch, weight, input, fits, f"(N, {len(weight)}, {_space(weight)})")
    x, (N, _, *pixels) = input.detach().flatten(2).mT, input.shape
    out = func(input, weight, bias, stride, padding, output_padding, groups, dilation)

    def patches(g: Tensor) -> Tensor:
        of_all = _patches(g.flatten(0, 1), weight.shape[2:], stride, padding, dilation, pixels)
        return of_all.unflatten(0, g.shape[:2]).flatten(3)  # (S, N, L, out · kernel)

    noted = watch.pointwise(bias, None, out, lambda g: g.movedim(2, -1), (N, *out.shape[2:]))
    if groups == 1 or watch.in_groups(weight, groups):
        noted += watch.product(weight, None, x, out, patches, x.shape[:2], groups, flipped=True)
    return out, noted


def _space(weight: Tensor) -> str:
    """The axes of images for a convolution with this weight."""
    return ("length", "height, width", "depth, height, width")[weight.ndim - 3]


def _patches(
    x: Tensor, kernel: Sequence[int], stride: Any, padding: Any, dilation: Any, counts: Sequence[int] | None = None
) -> Tensor:
    """The windows of a convolution over x (N, channels, *space): (N, L, channels, kernel); on each axis the first
    ``counts`` of them, where these are given."""
    n = len(kernel)

    def for_each_axis(value: Any) -> tuple[int, ...]:
        values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
        return values * (n // len(values))

    stride, dilation = for_each_axis(stride), for_each_axis(dilation)
    if isinstance(padding, str):
        spare = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
        pad = [side for s in reversed(spare) for side in (s // 2, s - s // 2)]
    else:
        pad = [p for p in reversed(for_each_axis(padding)) for _ in range(2)]
    x = functional.pad(x, pad)
    for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        x = x.unfold(axis, d * (k - 1) + 1, s)[..., ::d]
        x = x if counts is None else x.narrow(axis, 0, counts[axis - 2])
    return x.flatten(2 + n).flatten(2, 1 + n).movedim(2, 1)


def _embedding(
    watch: Watch,
    func: Callable,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Known:
    """Rows of a table of words. With ``max_norm`` the rows of a copy are shortened and the table stays as it is: their
    gradient, as in training, is that of the shortened rows."""
    if scale_grad_by_freq or func is not functional.embedding:
        return UNKNOWN
    words = len(weight)
    x = input.long()
    if padding_idx is not None and padding_idx >= -words:
        x = torch.where(x == padding_idx % words, -1, x)
    out = func(input, weight, padding_idx, None, norm_type, False, sparse)
    if max_norm is not None:
        shortened = func(input, weight.detach().clone(), padding_idx, max_norm, norm_type)
        out = out + (shortened - out.detach())
    return out, [weight] * bool(watch.product(weight.mT, None, x, out, lambda g: g, out.shape[:-1]))


def _indexed(watch: Watch, func: Callable, weight: Tensor, index: Any) -> Known:
    """``weight[index]``: rows of a table by their numbers."""
    if watch.parameter(weight) is None or weight.ndim != 2 or not _is_index(index):
        return UNKNOWN
    out = func(weight, index)
    return out, [weight] * bool(watch.product(weight.mT, None, index.long(), out, lambda g: g, out.shape[:-1]))


def _index_select(watch: Watch, func: Callable, weight: Tensor, dim: int, index: Tensor) -> Known:
    if watch.parameter(weight) is None or weight.ndim != 2 or dim not in (0, -2) or not _is_index(index):
        return UNKNOWN
    out = func(weight, dim, index)
    return out, [weight] * bool(watch.product(weight.mT, None, index.long(), out, lambda g: g, out.shape[:-1]))


def _is_index(index: Any) -> bool:
    """Whether these are numbers of rows, counted from the first."""
    return isinstance(index, Tensor) and index.dtype in INTEGERS and index.ndim > 0 and not bool((index < 0).any())


def _norm(watch: Watch, func: Callable, *args: Any, **kwargs: Any) -> Known:
    """Any norm: ``x̂ ∘ weight + bias`` with the normalised x̂, whose channels are last or on axis 1."""
    if func is not getattr(functional, func.__name__):  # PyTorch's inner function of the same name
        return UNKNOWN
    bound = _signature(func).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    weight, bias = given.get("weight"), given.get("bias")
    noted, input = [], given["input"]
    if watch.parameter(input) is not None:
        if func is functional.batch_norm:  # of a weight: its statistics are part of what the weight does
            return UNKNOWN
        given["input"], noted = _as_input(watch, input)
    # Statistics over one row of the batch are those of one example, or of no example at all.
    if func is functional.batch_norm and given["training"] and len(input) > 1:
        watch.batch_statistics = True
        input = given["input"].detach()
        axes = [k for k in range(input.ndim) if k != 1]
        variance, mean = torch.var_mean(input, axes, correction=0)
        given |= {"running_mean": mean, "running_var": variance, "training": False}
    if weight is None and bias is None:
        return func(**given), noted
    plain = given | {"input": given["input"].detach(), "weight": None} | ({"bias": None} if "bias" in given else {})
    if given.get("use_input_stats"):
        plain |= {"running_mean": None, "running_var": None}  # which this second look must not move
    with torch.no_grad():
        x = func(**plain)
    out = func(**given)
    if "normalized_shape" in given:
        axes = len(given["normalized_shape"])
        lead, x = out.shape[: out.ndim - axes], x.flatten(-axes)

        def rows(g: Tensor) -> Tensor:
            return g.flatten(-axes)

    else:
        x, lead = x.movedim(1, -1), (len(x), *x.shape[2:])

        def rows(g: Tensor) -> Tensor:
            return g.movedim(2, -1)

    return out, noted + watch.pointwise(weight, x, out, rows, lead) + watch.pointwise(bias, None, out, rows, lead)


def _broadcast(watch: Watch, func: Callable, one: Any, other: Any) -> Known:
    """``x + p`` or ``x * p`` with a vector p, on whatever axis it lies, or with a table of rows."""
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return UNKNOWN
    first, second = (watch.parameter(x) is not None for x in (one, other))
    p, x = (one, other) if first else (other, one)
    if first == second or (func.__name__ == "add_" and first):
        return UNKNOWN
    x = x.detach().clone() if func.__name__ == "mul" else None
    out = func(one, other)
    return out, _spread(watch, p, x, out) if out.requires_grad else [p]


def _copies(watch: Watch, func: Callable, p: Tensor, *sizes: Any) -> Known:
    """``p.expand(N, …)`` and ``p.repeat(N, …)`` for a vector or a table p that every example gets."""
    if watch.parameter(p) is None:
        return UNKNOWN
    out = func(p, *sizes).clone()  # no view of p any longer, so that what comes next is no use of it
    if any(m > 1 and n != m for m, n in zip(p.shape[::-1], out.shape[::-1], strict=False)):  # tiled
        return out, []
    return out, _spread(watch, p, None, out)


def _spread(watch: Watch, p: Tensor, x: Tensor | None, out: Tensor) -> list[Tensor]:
    """Note the use of a vector or a table p that is broadcast to ``out``."""
    noted = _along(watch, p, x, out, _axis(p, out)) if _is_vector(p) else []
    return noted or watch.table(p, None if x is None else x.expand(out.shape), out)


def _is_vector(p: Tensor) -> bool:
    """Whether all numbers of p lie along one of its axes."""
    return p.numel() == max((*p.shape, 1))


def _axis(p: Tensor, out: Tensor) -> int | None:
    """The axis of a result along which a vector p lies; None for a single number."""
    return next((out.ndim - p.ndim + k for k, n in enumerate(p.shape) if n > 1), None)


def _along(watch: Watch, p: Tensor, x: Tensor | None, out: Tensor, axis: int | None) -> list[Tensor]:
    """Note the use of a vector that lies along ``axis`` of the result, or is a single number."""

    def last(y: Tensor, before: int) -> Tensor:
        return y.unsqueeze(-1) if axis is None else y.movedim(before + axis, -1)

    lead = tuple(n for k, n in enumerate(out.shape) if k != axis)
    x = None if x is None else last(x.expand(out.shape), 0)
    return watch.pointwise(p, x, out, lambda g: last(g, 1), lead)


def _as_input(watch: Watch, p: Tensor) -> tuple[Tensor, list[Tensor]]:
    """A copy of a watched parameter that a known function takes as its input, and p if that use is understood."""
    copied = p.clone()
    if _is_vector(p):
        noted = _along(watch, p, None, copied, _axis(p, copied))
        return copied, noted or watch.table(p, None, copied)
    return copied, watch.table(p, None, copied)


def _check_input(watch: Watch, weight: Tensor, x: Tensor, fits: bool, expected: str) -> None:
    """Raise an error that names the layer if an input does not fit it."""
    if not fits or not x.is_floating_point() or x.numel() == 0:
        raise ValueError(
            f"Layer {watch.name_of(weight)!r} expects floating point inputs, not empty, of shape {expected}; got "
            f"{tuple(x.shape)}, {x.dtype}."
        )


def reason(func: Callable, args: tuple, kwargs: dict) -> str | None:
    """Why a known function is refused as it was called."""
    if func is functional.embedding and _signature(func).bind(*args, **kwargs).arguments.get("scale_grad_by_freq"):
        return "which divides its gradient by how often a word is in the batch (scale_grad_by_freq=True)"
    return None


KNOWN: dict[str, Callable[..., Known]] = {
    "linear": _linear,
    **dict.fromkeys(("matmul", "mm"), _matmul),
    "addmm": _addmm,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _transposed_convolution),
    "embedding": _embedding,
    "__getitem__": _indexed,
    "index_select": _index_select,
    **dict.fromkeys(("layer_norm", "rms_norm", "batch_norm", "group_norm", "instance_norm"), _norm),
    **dict.fromkeys(("add", "add_", "mul"), _broadcast),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to", "repeat"), _copies),
}
SPREADS = ("add", "add_", "mul", "expand", "expand_as", "broadcast_to", "repeat")  # after which rows may be many
