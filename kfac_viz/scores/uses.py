"""Every use of a parameter in a forward pass: what meets it there, and where the gradient of the result will arrive.

A use of a matrix multiplies rows x by it: its score is ``g xᵀ``, with the gradient g of the result, or ``x gᵀ`` where
the transpose is used. A use of a vector (a bias by itself, the scale or shift of a norm) multiplies by it, or adds it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
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
from .functions import KNOWN, SPREADS, UNKNOWN, fits, reason

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
            self.derivative = self.derivative or "torch.autograd.grad"
        elif name == "backward" and kwargs.get("create_graph"):
            self.derivative = self.derivative or "backward(create_graph=True)"
        watched = [x for x in _tensors((*args, *kwargs.values())) if self.parameter(x) is not None]
        transform = _differentiation() if watched else None
        if transform is not None:  # inside of it a result has no gradient that could be asked for later
            self.derivative = self.derivative or transform
            self.silent |= {l: f"inside {transform}" for x in watched for l, _ in self._owners[id(self.parameter(x))]}
            return func(*args, **kwargs)
        known = KNOWN.get(name) if watched or func is functional.batch_norm else None
        out, noted = known(self, func, *args, **kwargs) if known and fits(known, args, kwargs) else UNKNOWN
        if out is NotImplemented:
            out = func(*args, **kwargs)
        if len(noted) < len(watched):
            edges = [_edge(y) for y in _tensors((out,)) if y.requires_grad and self.parameter(y) is None]
            for x in watched if edges else ():
                if not any(x is y for y in noted):
                    owners = self._owners[id(self.parameter(x))]
                    foreign = Foreign(tuple(l for l, _ in owners), owners[0][1].parameter, name, edges)
                    self.foreign.append(foreign._replace(reason=reason(func, args, kwargs) or foreign.reason))
        if name in SPREADS and not kwargs:
            self._note_arrivals(name, args, out)
        in_place = name.endswith("_") and not name.endswith("__")
        return self._alias(out) if noted and isinstance(out, Tensor) and not in_place else out

    def _alias(self, out: Tensor) -> Tensor:
        """A view of a result, for the model to go on with: hooks that it registers on that act before the gradient
        arrives at the result, as they do before it goes on to the weight."""
        if not out.requires_grad:
            return out
        alias = out.view_as(out)
        if out in self._results:
            self._results[alias] = self._results[out]
        return alias

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
