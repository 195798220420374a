"""Every use of a parameter in a forward pass: what meets it there, and where the gradient of the result will arrive.

A use of a matrix multiplies rows x by it: its score is ``g xᵀ``, with the gradient g of the result, or ``x gᵀ`` where
the transpose is used. A use of a vector (a bias by itself, the scale or shift of a norm) multiplies by it, or adds it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from types import FunctionType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction
from torch.utils.weak import WeakIdKeyDictionary

from ..method.names import parameters_of
from ..method.partition import Partition, Piece

Rows = Callable[[Tensor], Tensor]
Kind = Literal["product", "transposed", "pointwise"]


@dataclass(frozen=True)
class Use:
    """One use of one layer.

    Attributes:
        layer: its number in the partition.
        kind: ``"product"`` of rows with the matrix, ``"transposed"`` with its transpose, ``"pointwise"`` with a vector.
        x: what meets the parameter, (*lead, channels), a copy; None where a vector is added. To the rows of a product
            a 1 is appended where the layer's own bias was added, and a 0 where it was not. Where rows of the parameter
            are looked up x is whole numbers, of shape ``lead``: the number of each row, -1 for a row of zeros.
        edge, shape: where the gradient of the result arrives. An edge, unlike the tensor, still means the
            pre-activation after an in-place ``ReLU``.
        rows: brings that gradient (S, *shape) into the form (S, *lead, channels).
        lead: sizes of the axes that count examples and positions.
        top, left: where the part that is used lies in the matrix of the layer.
        dtype: of the result: under an autocast inside of the model, its half precision.
        arrivals: where the result, if it has no axis of examples, meets tensors that have one: each as a use by itself,
            by which a score of every example is known.
        groups: of the layer and of x. In a product of several the channels of x are those of one group after another,
            each of which meets its own rows of the layer.
    """

    layer: int
    kind: Kind
    x: Tensor | None
    edge: GradientEdge
    shape: torch.Size
    rows: Rows
    lead: tuple[int, ...]
    top: int
    left: int
    dtype: torch.dtype
    groups: int = 1
    arrivals: list[Use] = field(default_factory=list)


class Foreign(NamedTuple):
    """A parameter that met a function of which nothing is known here, and where the gradients of its results arrive."""

    layers: tuple[int, ...]
    parameter: str
    function: str
    edges: list[GradientEdge]
    reason: str = "which is no sum of products g aᵀ that could be seen"


class Place(NamedTuple):
    """A tensor as so many rows of a parameter from ``start`` on, or as their transpose."""

    p: Tensor
    start: int
    transposed: bool


class Watch(TorchFunctionMode):
    """While it is entered, notes in ``uses``, ``foreign`` and ``silent`` how the layers of ``partition`` are used.

    PyTorch hands each of its functions to a mode like this one before it runs. What happens inside a function that is
    itself written in Python stays unseen; of these attention alone receives matrices, and runs from a copy.

    Batch norm in training mode runs with the statistics of the batch held constant: then each output depends on its own
    example alone, and every example has a score. This is K-FAC's usual approximation.

    Attributes:
        derivative: how the forward pass differentiated (``torch.autograd.grad``, …), or None. Derivatives use the
            weights a second time, where no function is called.
        batch_statistics: whether batch norm took the mean and variance of the batch.
    """

    def __init__(self, model: nn.Module, partition: Partition) -> None:
        super().__init__()
        parameters = parameters_of(model)
        self.layers = partition.layers
        self.uses: list[Use] = []
        self.foreign: list[Foreign] = []
        self.silent: dict[int, str] = {}  # where layers run whose result has no gradient
        self.derivative: str | None = None
        self.batch_statistics = False
        self._results: WeakIdKeyDictionary = WeakIdKeyDictionary()  # uses by the tensor that came out of them
        self._pieces = [[(piece, parameters[piece.parameter]) for piece in layer.pieces] for layer in self.layers]
        self._owners: dict[int, list[tuple[int, Piece]]] = {}
        for l, pieces in enumerate(self._pieces):
            for piece, p in pieces:
                self._owners.setdefault(id(p), []).append((l, piece))

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name == "multi_head_attention_forward":
            with self:
                return _attention(*args, **kwargs)
        if func is torch.autograd.grad:
            self.derivative = "torch.autograd.grad"
        watched = [x for x in _tensors((*args, *kwargs.values())) if self.parameter(x) is not None]
        transform = _differentiation() if watched else None
        if transform is not None:  # inside of it a result has no gradient that could be asked for later
            self.derivative = transform
            self.silent |= {l: f"inside {transform}" for x in watched for l, _ in self._owners[id(self.parameter(x))]}
            return func(*args, **kwargs)
        known = _KNOWN.get(name) if watched or func is functional.batch_norm else None
        out, noted = known(self, func, *args, **kwargs) if known and _fits(known, args, kwargs) else _UNKNOWN
        if out is NotImplemented:
            out = func(*args, **kwargs)
        if len(noted) < len(watched):
            edges = [_edge(y) for y in _tensors((out,)) if y.requires_grad and self.parameter(y) is None]
            for x in watched if edges else ():
                if not any(x is y for y in noted):
                    owners = self._owners[id(self.parameter(x))]
                    foreign = Foreign(tuple(l for l, _ in owners), owners[0][1].parameter, name, edges)
                    self.foreign.append(foreign._replace(reason=_reason(func, args, kwargs) or foreign.reason))
        if name in _SPREADS and not kwargs:
            self._note_arrivals(name, args, out)
        return out

    def parameter(self, x: Tensor) -> Tensor | None:
        """The watched parameter that x is, or is a view of."""
        if id(x) in self._owners:
            return x
        base = x._base
        return base if base is not None and id(base) in self._owners else None

    def name_of(self, x: Tensor) -> str:
        """Of the first layer that x belongs to."""
        return self.layers[self._owners[id(self.parameter(x))][0][0]].name

    def place(self, x: Tensor | None) -> Place | None:
        """Which rows of a watched parameter x is; None where it is anything else."""
        p = None if x is None else self.parameter(x)
        if p is None or x is p:
            return None if p is None else Place(p, 0, False)
        if not p.is_contiguous():
            return None
        start, rest = divmod(x.storage_offset() - p.storage_offset(), p.stride(0))
        if rest == 0 and x.shape[1:] == p.shape[1:] and x.stride() == p.stride():
            return Place(p, start, False)
        if rest == 0 and x.ndim == p.ndim == 2 and len(x) == p.shape[1] and x.stride() == p.stride()[::-1]:
            return Place(p, start, True)
        return None

    # ---- what is noted, each time with the tensors whose use is understood ------------------------------------

    def in_groups(self, W: Tensor, groups: int) -> bool:
        """Whether W is all of a parameter whose layers have so many groups, more than one."""
        place = self.place(W)
        owners = () if place is None or groups == 1 or W.numel() < place.p.numel() else self._owners[id(place.p)]
        return bool(owners) and all(self.layers[l].groups == groups for l, _ in owners)

    def product(
        self,
        W: Tensor,
        b: Tensor | None,
        x: Tensor,
        out: Tensor,
        rows: Rows,
        lead: Sequence[int],
        groups: int = 1,
        *,
        flipped: bool = False,
    ) -> list[Tensor]:
        """Note ``out = x Wᵀ + b``, with rows x (*lead, in) and W (out, in); or with the numbers of columns, (*lead).

        ``flipped`` for ``out = x W``, with W (in, …). With ``groups`` of a weight that is :meth:`in_groups`, x is
        (*lead, groups · in).
        """
        place, bias = self.place(W), self.place(b)
        own: set[int] = set()
        if place is not None:
            count = W.shape[1] if place.transposed else len(W)
            parts = self._parts(place, count)
            if groups > 1:  # the pieces of all groups are used at once
                parts = {l: (l, piece, slice(0, count), 0) for l, piece, *_ in parts if piece.first == 0}.values()
            place = place._replace(transposed=place.transposed != flipped)
            for l, piece, here, at in parts:
                transposed = place.transposed != piece.transposed
                has_bias = bias is not None and not transposed and self._is_own(l, bias, piece.first - place.start)
                own |= {l} if has_bias else set()
                kind = "transposed" if transposed else "product"
                mine = self._kept(l, _of_these(x, here) if place.transposed else x, transposed, has_bias, groups)
                of_these = rows if place.transposed else _only(rows, here, count)
                top, left = (0, at) if piece.transposed else (at, 0)
                self._note(l, kind, mine, out, of_these, lead, top, left, groups)
        return [W] * (place is not None) + self.pointwise(b, None, out, rows, lead, but=own)

    def pointwise(
        self,
        b: Tensor | None,
        x: Tensor | None,
        out: Tensor,
        rows: Rows,
        lead: Sequence[int],
        but: set[int] = frozenset(),
    ) -> list[Tensor]:
        """Note that the vector b meets x (*lead, size), or is added; for all layers ``but`` some, where it is known."""
        place = self.place(b)
        if place is None or place.transposed or any(piece.width > 1 for _, piece in self._owners[id(place.p)]):
            return []
        for l, piece, here, at in self._parts(place, b.numel()):
            if l not in but:
                mine = None if x is None else x[..., here].detach()
                of_these = _only(rows, here, b.numel())
                self._note(l, "pointwise", mine, out, of_these, lead, piece.top + at, piece.left)
        return [b]

    def _parts(self, place: Place, count: int) -> Iterator[tuple[int, Piece, slice, int]]:
        """The layers that have some of these ``count`` rows: layer, piece, which rows, and where in the piece they
        begin."""
        for l, piece in self._owners[id(place.p)]:
            length = piece.width if piece.transposed else piece.height
            low, high = max(place.start, piece.first), min(place.start + count, piece.first + length)
            if low < high:
                yield l, piece, slice(low - place.start, high - place.start), low - piece.first

    def _kept(self, l: int, x: Tensor, transposed: bool, has_bias: bool, groups: int) -> Tensor:
        """A copy of the rows x, before anything is done to them in place."""
        if transposed or not self.layers[l].bias or not x.is_floating_point():
            return x.detach().clone()
        x = x.detach().unflatten(-1, (groups, -1)) if groups > 1 else x.detach()
        x = torch.cat([x, (x.new_ones if has_bias else x.new_zeros)(*x.shape[:-1], 1)], dim=-1)
        return x.flatten(-2) if groups > 1 else x

    def _is_own(self, l: int, bias: Place, shift: int) -> bool:
        """Whether a bias that was added with W is that of layer l, row for row."""
        if not self.layers[l].bias:
            return False
        piece, p = self._pieces[l][-1]
        return p is bias.p and piece.first - bias.start == shift

    def _note(
        self,
        l: int,
        kind: Kind,
        x: Tensor | None,
        out: Tensor,
        rows: Rows,
        lead: Sequence[int],
        top: int,
        left: int,
        groups: int = 1,
    ) -> None:
        edge = _edge(out)
        if edge is None:
            self.silent[l] = _silence()
        else:
            use = Use(l, kind, x, edge, out.shape, rows, tuple(lead), top, left, out.dtype, groups)
            self.uses.append(use)
            self._results.setdefault(out, []).append(use)

    # ---- tables: rows that are the same for every example -------------------------------------------------------

    def table(self, p: Tensor, x: Tensor | None, out: Tensor) -> list[Tensor]:
        """Note that rows p of a parameter meet x (of the shape of ``out``), or are added, and are broadcast to ``out``.

        The score of such a row is the gradient that comes back to it. In the matrix of the layer it is a product of
        that gradient with the row of an identity matrix.
        """
        found = self._table_rows(p)
        if found is None or out.shape[-p.ndim :] != p.expand(out.shape[-p.ndim :]).shape:
            return []
        parameter, start, count = found
        l, piece = self._owners[id(parameter)][0]
        axes = [out.ndim - p.ndim + k for k, n in enumerate(p.shape) if n > 1]
        features = axes[1:] if count > 1 else axes
        lead = [k for k in range(out.ndim) if k not in features]
        sizes = [out.shape[k] for k in lead]
        at = [count if count > 1 and k == axes[0] else 1 for k in lead]
        rows = torch.arange(count, device=p.device).view(at).expand(sizes)

        def brought(g: Tensor) -> Tensor:
            g = g if x is None else g * x
            return g.movedim([k + 1 for k in features], list(range(-len(features), 0))).flatten(1 + len(lead))

        if piece.transposed:
            self._note(l, "product", rows, out, brought, sizes, 0, start)
        else:
            self._note(l, "transposed", rows, out, brought, sizes, start, 0)
        return [p]

    def _table_rows(self, p: Tensor) -> tuple[Tensor, int, int] | None:
        """The parameter whose rows p is, all axes of length 1 aside; the first row, and how many."""
        parameter = self.parameter(p)
        owners = self._owners[id(parameter)]
        if len(owners) > 1 or owners[0][1].width == 1 or owners[0][1].rows is not None or not parameter.is_contiguous():
            return None
        whole, part = (([n for n in x.shape if n > 1], [s for n, s in zip(x.shape, x.stride(), strict=True) if n > 1])
                       for x in (parameter, p))  # fmt: skip
        start, rest = divmod(p.storage_offset() - parameter.storage_offset(), whole[1][0])
        if rest or part[0][1 - len(whole[0]) :] != whole[0][1:] or part[1][1 - len(whole[1]) :] != whole[1][1:]:
            return None
        if len(part[0]) == len(whole[0]) - 1:
            return parameter, start, 1
        if len(part[0]) == len(whole[0]) and part[1][0] == whole[1][0]:
            return parameter, start, part[0][0]
        return None

    def as_input(self, p: Tensor) -> tuple[Tensor, list[Tensor]]:
        """A copy of a watched parameter that a known function takes as its input, and p if that use is understood."""
        copied = p.clone()
        if _is_vector(p):
            noted = _along(self, p, None, copied, _axis(p, copied))
            return copied, noted or self.table(p, None, copied)
        return copied, self.table(p, None, copied)

    def _note_arrivals(self, name: str, args: tuple, out: Any) -> None:
        """Note where the result of a use is broadcast over more examples, by a sum, a product or an expansion: in the
        gradient there each example has its own rows."""
        operands = [x for x in args[:2] if isinstance(x, Tensor)]
        if not isinstance(out, Tensor) or not out.requires_grad or name == "mul" and len(operands) < 2:
            return
        for y in operands:
            base = y if y in self._results or y._base is None else y._base
            uses = self._results.get(base, ())
            if not uses or y.numel() != base.numel() or out.numel() <= y.numel() or out.shape[-1:] != y.shape[-1:]:
                continue
            if any(n not in (1, m) for n, m in zip(y.shape[::-1], out.shape[::-1])) or y.ndim > out.ndim:  # noqa: B905
                continue  # tiled, not broadcast
            other = next((x.detach() for x in operands if x is not y), None) if name == "mul" else None
            for use in uses:
                if use.shape[:-1] == use.lead and [n for n in y.shape if n > 1] == [n for n in use.shape if n > 1]:
                    use.arrivals.append(_arrival(use, y, other, out))


def _silence() -> str:
    """Where the calling layer runs, if its result has no gradient."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is CheckpointFunction.forward.__code__:
            return "in torch.utils.checkpoint with use_reentrant=True (use_reentrant=False computes the same)"
        frame = frame.f_back
    if torch.is_grad_enabled():
        return "on a result of which the gradient was taken away"
    return "in torch.no_grad, or in the forward of an autograd.Function"


def _arrival(use: Use, y: Tensor, other: Tensor | None, out: Tensor) -> Use:
    """The use whose result y, times ``other``, is broadcast to ``out``, as a use of the rows there."""
    lead, x = tuple(out.shape[:-1]), use.x
    if x is not None:
        channels = x.shape[len(use.lead) :]  # none if x holds the numbers of rows
        x = x.reshape(*y.shape[:-1], *channels).expand(*lead, *channels)
    rows = use.rows if other is None else lambda g: use.rows(g * other)
    return replace(use, x=x, edge=_edge(out), shape=out.shape, rows=rows, lead=lead, dtype=out.dtype, arrivals=[])


def _differentiation() -> str | None:
    """The transform of ``torch.func``, or forward-mode derivative, inside of which this is called."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func (jvp, grad, jacrev, vmap, …)"
    return "torch.autograd.forward_ad" if torch.autograd.forward_ad._current_level >= 0 else None


def _only(rows: Rows, here: slice, of: int) -> Rows:
    return rows if here == slice(0, of) else lambda g: rows(g)[..., here]


def _of_these(x: Tensor, here: slice) -> Tensor:
    """Of rows x those columns; of numbers of columns theirs, counted from the first of them, and -1 for all others."""
    if x.is_floating_point():
        return x[..., here]
    return torch.where((x >= here.start) & (x < here.stop), x - here.start, -1)


def _tensors(values: Any) -> Iterator[Tensor]:
    for x in values:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from _tensors(x)


def _edge(out: Tensor) -> GradientEdge | None:
    """Where the gradient of a result arrives, whatever is done to it in place later.

    For inputs with extra axes the result is a view; an in-place function makes a new history for it, and only that of
    the tensor that it views goes on being part of the graph.
    """
    if not out.requires_grad:
        return None
    base = out._base
    whole = base is not None and base.numel() == out.numel() and base.is_contiguous() and out.is_contiguous()
    return torch.autograd.graph.get_gradient_edge(base if whole else out)


def _attention(*args: Any, **kwargs: Any) -> Any:
    """PyTorch's attention as it runs when nothing overrides it, so that the functions that it calls are seen."""
    f = functional.multi_head_attention_forward
    names = {**f.__globals__, "has_torch_function": lambda _: False}
    copy = FunctionType(f.__code__, names, f.__name__, f.__defaults__)
    copy.__kwdefaults__ = f.__kwdefaults__
    return copy(*args, **kwargs)


# ---- the functions that are known: each returns the result and the tensors whose use is understood ------------------

Known = tuple[Any, list[Tensor]]


def _fits(known: Callable, args: tuple, kwargs: dict) -> bool:
    """Whether a function was called in the way that is understood here."""
    try:
        _signature(known).bind(None, None, *args, **kwargs)
    except TypeError:
        return False
    return True


_signature = cache(inspect.signature)  # of the few functions below, read for every use of every layer otherwise
_UNKNOWN: Known = (NotImplemented, [])


def _linear(watch: Watch, func: Callable, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Known:
    if weight.ndim != 2:
        return _UNKNOWN
    if watch.parameter(weight) is not None:
        fits = input.ndim >= 2 and input.shape[-1] == weight.shape[-1]
        _check_input(watch, weight, input, fits, f"(N, …, {weight.shape[-1]})")
    input, noted = (input, []) if watch.parameter(input) is None else watch.as_input(input)
    out = func(input, weight, bias)
    return out, noted + watch.product(weight, bias, input, out, lambda g: g, out.shape[:-1])


def _addmm(watch: Watch, func: Callable, input: Tensor, mat1: Tensor, mat2: Tensor) -> Known:
    """``input + mat1 @ mat2`` with a bias and a weight (in, out)."""
    if watch.parameter(mat1) is not None:
        return _UNKNOWN
    out = func(input, mat1, mat2)
    if watch.parameter(mat2) is not None:
        return out, watch.product(mat2.mT, input, mat1, out, lambda g: g, out.shape[:-1])
    return out, watch.pointwise(input, None, out, lambda g: g, out.shape[:-1])


def _matmul(watch: Watch, func: Callable, input: Tensor, other: Tensor) -> Known:
    if watch.parameter(other) is None or other.ndim != 2:
        return _UNKNOWN
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
        return _UNKNOWN
    words = len(weight)
    x = input.long()
    if padding_idx is not None and padding_idx >= -words:
        x = torch.where(x == padding_idx % words, -1, x)
    out = func(input, weight, padding_idx, None, norm_type, False, sparse)
    if max_norm is not None:
        shortened = func(input, weight.detach().clone(), padding_idx, max_norm, norm_type)
        out = out + (shortened - out.detach())
    return out, [weight] * bool(watch.product(weight.mT, None, x, out, lambda g: g, out.shape[:-1]))


def _norm(watch: Watch, func: Callable, *args: Any, **kwargs: Any) -> Known:
    """Any norm: ``x̂ ∘ weight + bias`` with the normalised x̂, whose channels are last or on axis 1."""
    if func is not getattr(functional, func.__name__):  # PyTorch's inner function of the same name
        return _UNKNOWN
    bound = _signature(func).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    weight, bias = given.get("weight"), given.get("bias")
    noted = []
    if watch.parameter(given["input"]) is not None:
        given["input"], noted = watch.as_input(given["input"])
    if func is functional.batch_norm and given["training"]:
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
        return _UNKNOWN
    first, second = (watch.parameter(x) is not None for x in (one, other))
    p, x = (one, other) if first else (other, one)
    if first == second or (func.__name__ == "add_" and first):
        return _UNKNOWN
    x = x.detach().clone() if func.__name__ == "mul" else None
    out = func(one, other)
    return out, _spread(watch, p, x, out) if out.requires_grad else [p]


def _copies(watch: Watch, func: Callable, p: Tensor, *sizes: Any) -> Known:
    """``p.expand(N, …)`` and ``p.repeat(N, …)`` for a vector or a table p that every example gets."""
    if watch.parameter(p) is None:
        return _UNKNOWN
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


def _check_input(watch: Watch, weight: Tensor, x: Tensor, fits: bool, expected: str) -> None:
    """Say in words, before PyTorch does, that an input does not fit its layer."""
    if not fits or not x.is_floating_point() or x.numel() == 0:
        raise ValueError(
            f"Layer {watch.name_of(weight)!r} expects floating point inputs, not empty, of shape {expected}; got "
            f"{tuple(x.shape)}, {x.dtype}."
        )


def _reason(func: Callable, args: tuple, kwargs: dict) -> str | None:
    """Why a known function is refused as it was called."""
    if func is functional.embedding and _signature(func).bind(*args, **kwargs).arguments.get("scale_grad_by_freq"):
        return "which divides its gradient by how often a word is in the batch (scale_grad_by_freq=True)"
    return None


_KNOWN: dict[str, Callable[..., Known]] = {
    "linear": _linear,
    **dict.fromkeys(("matmul", "mm"), _matmul),
    "addmm": _addmm,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _transposed_convolution),
    "embedding": _embedding,
    **dict.fromkeys(("layer_norm", "rms_norm", "batch_norm", "group_norm", "instance_norm"), _norm),
    **dict.fromkeys(("add", "add_", "mul"), _broadcast),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to", "repeat"), _copies),
}
_SPREADS = ("add", "add_", "mul", "expand", "expand_as", "broadcast_to", "repeat")  # after which rows may be many

