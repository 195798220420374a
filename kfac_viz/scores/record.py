"""What one forward pass shows of every layer, in one normal form whatever the layer was.

Inputs ``a`` (N, T, features) with a 1 appended where there is a bias, output-side vectors ``g`` (S, N, T, out). T
counts the positions at which one example uses the layer: 1 for a plain MLP, the product of the extra axes, the pixels
of a convolution, or the number of uses. The score of (s, n) is ``Σ_t g[s, n, t] a[n, t]ᵀ``. Where a matrix is used
transposed its inputs and vectors change places: such layers have ``a`` (S, N, T, features), those positions last. The
inputs of an embedding are one-hot, and kept as such. Where a layer has groups, ``a`` and ``g`` have an axis for them in
front of the others.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import compress
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import CheckpointError

from ..method.checks import warn
from ..method.one_hot import OneHot, Rows, cat, dense
from ..method.partition import Layer, Partition
from .likelihood import check_outputs
from .uses import Foreign, Use, Watch

_separate: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models whose examples are pulled back one by one
_unbatched: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models that pull vectors back one after another


class ExampleAxis(NamedTuple):
    """The axis of a use that holds the N examples; ``inner`` if it holds positions as well, flattened as (T, N)."""

    axis: int
    inner: bool = False

    def by_example(self, x: Tensor, lead: Sequence[int], N: int) -> Tensor:
        """x (..., *lead, c) with examples and positions as two axes, (..., N, T, c)."""
        before = x.ndim - len(lead) - 1
        x = x.movedim(before + self.axis, before).unflatten(before, (-1, N) if self.inner else (N, -1))
        x = x.movedim(before + 1, before) if self.inner else x
        return x.flatten(before + 1, -2)


@dataclass(frozen=True)
class EveryExample:
    """Every example uses all rows, as of a table of positions: the rows of g have an axis of examples of their own,
    (…, N, *lead, c), and those of x serve all examples."""

    def by_example(self, x: Tensor, lead: Sequence[int], N: int) -> Tensor:
        """x (*lead, c) or (…, N, *lead, c) as (…, N, T, c)."""
        shared = x.ndim == len(lead) + 1
        x = x.reshape(*x.shape[: x.ndim - len(lead) - 1], prod(lead), x.shape[-1])
        return x.expand(N, *x.shape) if shared else x


def layouts(lead: Sequence[int], N: int) -> list[ExampleAxis]:
    """All that these sizes allow, the usual one first."""
    if N == 1:  # every row belongs to the one example there is
        return [ExampleAxis(0)] if lead else []
    whole = [ExampleAxis(k) for k, n in enumerate(lead) if n == N]
    shared = [ExampleAxis(k, inner) for k, n in enumerate(lead) if n > N and n % N == 0 for inner in (False, True)]
    return whole + shared


@dataclass(frozen=True)
class Record:
    """A forward pass: the model's outputs (N, …), and the uses of every layer of the partition.

    Attributes:
        layouts: where the examples are in each of the uses; the usual place until somebody has looked.
        silent: where layers were used of which autograd records nothing, by their names.
        derivative: how the forward pass differentiated, or None.
        batch_statistics: whether batch norm took the mean and variance of the batch.
    """

    model: nn.Module
    partition: Partition
    outputs: Tensor
    uses: list[Use]
    foreign: list[Foreign]
    layouts: list[ExampleAxis | EveryExample] = field(default_factory=list)
    silent: dict[str, str] = field(default_factory=dict)
    derivative: str | None = None
    batch_statistics: bool = False

    @property
    def unused(self) -> list[str]:
        """Layers that were not used."""
        used = {use.layer for use in self.uses}
        return [name for l, name in enumerate(self.partition.names) if l not in used]

    @property
    def form(self) -> tuple:
        """Layer and kind of every use in order: the cache key of this model's structure."""
        return tuple((use.layer, use.kind, use.top, use.left, len(use.lead)) for use in self.uses)

    def without(self, names: Sequence[str]) -> Record:
        """The same pass, seen by a partition without these layers."""
        partition = self.partition.without(names)
        number = {l: partition.index(name) for l, name in enumerate(self.partition.names) if name not in names}

        def renumbered(use: Use) -> Use:
            return replace(use, layer=number[use.layer], arrivals=[renumbered(x) for x in use.arrivals])

        kept = [(renumbered(use), at) for use, at in zip(self.uses, self.layouts, strict=True) if use.layer in number]
        uses, layouts = [use for use, _ in kept], [at for _, at in kept]
        return replace(self, partition=partition, uses=uses, foreign=[], layouts=layouts)

    def positions(self) -> tuple[list[int], list[int]]:
        """T of every layer, and how many of its positions come from uses of its transpose."""
        T, swapped = ([0] * len(self.partition) for _ in range(2))
        for use, at in zip(self.uses, self.layouts, strict=True):
            rows = prod(use.lead) if isinstance(at, EveryExample) else prod(use.lead) // len(self.outputs)
            count = 1 if use.kind == "pointwise" else rows
            T[use.layer] += count
            swapped[use.layer] += count if use.kind == "transposed" else 0
        return [1 if layer.vector else max(1, t) for layer, t in zip(self.partition.layers, T, strict=True)], swapped

    @property
    def places(self) -> list[Use]:
        """All uses, and the arrivals of their results."""
        return [*self.uses, *(x for use in self.uses for x in use.arrivals)]

    def pull_back(
        self, vectors: Tensor, *, also: Sequence[Tensor] = (), keep: bool = False
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """The gradients (S, *lead, channels) at every use for ``vectors`` (S, *outputs.shape), and those of the tensors
        in ``also``. Of a use of all rows by every example they are (S, N, *lead, channels): one pass for each example.
        With such further tensors S is 1. ``keep`` keeps the graph for another pass."""
        together = [use for use, at in zip(self.uses, self.layouts, strict=True) if not isinstance(at, EveryExample)]
        alone = self.gradients_of_uses(vectors, dict.fromkeys(map(id, together)))  # first, as this keeps the graph
        grads = self.gradients([*(use.edge for use in together), *also], vectors, keep=keep)
        apart = iter([_rows(use, grad, vectors) for use, grad in zip(together, grads, strict=False)])
        own = [next(apart) if grad is None else grad for grad in alone]
        return own, [None if grad is None else grad[0] for grad in grads[len(together) :]]

    def gradients_of_uses(self, vectors: Tensor, known: dict[int, Tensor]) -> list[Tensor]:
        """As :meth:`pull_back`, where the gradients at all uses that have an axis of examples are ``known``, by the
        ``id`` of the use."""
        shared = [isinstance(at, EveryExample) for at in self.layouts]
        alone = iter(self._by_example(list(compress(self.uses, shared)), vectors))
        return [next(alone) if x else known[id(use)] for use, x in zip(self.uses, shared, strict=True)]

    def _by_example(self, uses: list[Use], vectors: Tensor) -> list[Tensor]:
        """The gradients (S, N, *lead, channels) at these uses, from one pass for each of the N examples."""
        if not uses:
            return []
        N, edges = len(self.outputs), [use.edge for use in uses]
        if N > 1 and self.model not in _separate:
            _separate.add(self.model)
            names = ", ".join(sorted({self.partition.names[use.layer] for use in uses}))
            warn(
                f"Every example uses all rows of {names}, and what is made of them meets the examples later: each "
                "example is pulled back by itself, which is slower."
            )
        found: list[list[Tensor]] = [[] for _ in uses]
        for n in range(N):
            only = torch.zeros_like(vectors)
            only[:, n] = vectors[:, n]
            grads = self.gradients(edges, only, keep=True)
            for mine, use, grad in zip(found, uses, grads, strict=True):
                mine.append(_rows(use, grad, vectors))
        return [torch.stack(mine, 1) for mine in found]

    def gradients(self, ends: Sequence, vectors: Tensor, *, keep: bool) -> list[Tensor | None]:
        """Gradients (S, …) at ``ends``: all vectors in one batched pass, or one after another where an operation of the
        model cannot be batched (one that reads numbers on the host, say); a warning then says once that this is slower.
        """
        if not ends:
            return []
        if len(vectors) > 1 and self.model not in _unbatched:
            try:  # with the graph kept, so that it is there for the other way
                return torch.autograd.grad(
                    self.outputs, ends, vectors, is_grads_batched=True, allow_unused=True, retain_graph=True
                )
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                reason = str(error).strip().partition("\n")[0]
        else:
            reason = None
        rows = []
        for i, v in enumerate(vectors):
            kept = keep or i < len(vectors) - 1
            try:
                rows.append(torch.autograd.grad(self.outputs, ends, v, allow_unused=True, retain_graph=kept))
            except torch.OutOfMemoryError:
                raise
            except CheckpointError as error:
                if not self.batch_statistics:
                    raise ValueError(f"PyTorch cannot differentiate this model: {error}") from error
                raise ValueError(
                    "Batch norm runs in training mode inside of torch.utils.checkpoint. Scores hold its statistics "
                    "constant, and the checkpoint computes the layer again without that. Observe without the "
                    "checkpoint, or put this batch norm in eval mode."
                ) from error
            except RuntimeError as error:
                raise ValueError(f"PyTorch cannot differentiate this model: {error}") from error
        if reason is not None:
            _unbatched.add(self.model)
            warn(
                f"This model does not pull back {len(vectors)} vectors at once, but one after another, which is "
                f"slower. PyTorch says: {reason}"
            )
        columns = zip(*rows, strict=True)
        return [None if x[0] is None else x[0][None] if len(x) == 1 else torch.stack(x) for x in columns]

    def normal_form(self, grads: Sequence[Tensor], dtype: torch.dtype | None = None) -> tuple[list[Rows], list[Tensor]]:
        """``a`` and ``g`` of every layer from the gradients at every use."""
        a, g = [], []
        N, S = len(self.outputs), len(grads[0])
        by_layer: list[list[tuple[Use, ExampleAxis | EveryExample, Tensor]]] = [[] for _ in self.partition.layers]
        for use, layout, grad in zip(self.uses, self.layouts, grads, strict=True):
            by_layer[use.layer].append((use, layout, grad))
        for layer, uses in zip(self.partition.layers, by_layer, strict=True):
            if not uses:
                like = grads[0]
                a_l = like.new_ones(N, 1, 1) if layer.vector else _none(layer, N, like)
                g_l = like.new_zeros(*layer.axis, S, N, 1, layer.unit[0])
            else:
                uses.sort(key=lambda x: x[0].kind == "transposed")
                pairs = [_pair(use, layout, grad, layer, N) for use, layout, grad in uses]
                if layer.vector:
                    a_l, g_l = pairs[0][0], sum((g for _, g in pairs[1:]), pairs[0][1])
                else:
                    dims = max(a.ndim for a, _ in pairs)
                    a_l = cat([a if a.ndim == dims else _for_each(S, dense(a).unsqueeze(-4)) for a, _ in pairs], -2)
                    g_l = cat([_for_each(S, g) for _, g in pairs], -2)
            a.append(a_l if dtype is None else a_l.to(dtype))
            g.append(g_l if dtype is None else g_l.to(dtype))
        return a, g


def _rows(use: Use, grad: Tensor | None, vectors: Tensor) -> Tensor:
    """A gradient (S, *shape) at a use as rows (S, *lead, channels); zeros where it is none."""
    shape = (len(vectors), *use.shape)
    return use.rows(vectors.new_zeros(shape) if grad is None else grad.reshape(shape))


def _none(layer: Layer, N: int, like: Tensor) -> Rows:
    """Inputs (N, 1, features) of a layer that was not used."""
    if layer.table:
        return OneHot.of(like.new_full((N, 1), -1, dtype=torch.long), layer.features, like.dtype)
    return like.new_zeros(*layer.axis, N, 1, layer.features)


def _for_each(S: int, x: Tensor) -> Tensor:
    """x (..., S, N, T, c), or what all vectors share, (..., 1, N, T, c), as the former."""
    return x.expand(*x.shape[:-4], S, *x.shape[-3:])


def _pair(use: Use, layout: ExampleAxis | EveryExample, grad: Tensor, layer: Layer, N: int) -> tuple[Rows, Tensor]:
    """Inputs (N, T, features) or (S, N, T, features) and vectors (S, N, T, out) of one use, by groups if it has any."""
    a, g = _sides(use, layout, grad, layer, N)
    if layer.groups > 1 and use.groups == 1:  # each group of rows has the same inputs
        a = dense(a)
        return a.expand(layer.groups, *a.shape), _by_group(g, layer.groups)
    return a, g


def _by_group(x: Tensor, groups: int) -> Tensor:
    """x (..., groups · c) with an axis for the groups in front, if there are several."""
    return x if groups == 1 else x.unflatten(-1, (groups, -1)).movedim(-2, 0)


def _sides(use: Use, layout: ExampleAxis | EveryExample, grad: Tensor, layer: Layer, N: int) -> tuple[Rows, Tensor]:
    """Inputs and vectors of one use, by groups if the use has any."""
    g = layout.by_example(grad, use.lead, N)
    if use.x is not None and use.kind != "pointwise" and not use.x.is_floating_point():
        index = layout.by_example(use.x[..., None], use.lead, N)[..., 0]
        if use.kind == "product":
            index = torch.where(index < 0, -1, index + use.left) if use.left else index
            return OneHot.of(index, layer.features, g.dtype), _placed(g, use.top, layer.out)
        index = torch.where(index < 0, -1, index + use.top)
        return _placed(g, use.left, layer.features), OneHot.of(index, layer.out, g.dtype).dense()[None]
    x = None if use.x is None else layout.by_example(use.x, use.lead, N)
    if use.kind == "pointwise":
        g = (g if x is None else g * x).sum(-2, keepdim=True)
        a = g.new_zeros(N, 1, layer.features)
        a[..., use.left] = 1
        return a, _placed(g, use.top, layer.out)
    if use.kind == "transposed":
        a, g = _by_group(g, use.groups), _by_group(_placed(x, use.top, layer.out)[None], use.groups)
    else:
        a, g = _by_group(x, use.groups), _by_group(_placed(g, use.top, layer.out), use.groups)
    return _placed(a, use.left, layer.features), g


def _placed(x: Tensor, start: int, size: int) -> Tensor:
    """x (..., n) as the entries from ``start`` on of vectors (..., size)."""
    return x if x.shape[-1] == size else functional.pad(x, (start, size - start - x.shape[-1]))


def record(model: nn.Module, inputs: tuple[Tensor, ...], partition: Partition) -> Record:
    """Run the model once and watch the parameters of the partition.

    Raises:
        ValueError: an input that does not fit its layer; a layer that saw no rows.
        TypeError: the model does not return one floating point tensor.
        Exception: whatever the model itself raises.
    """
    watch = Watch(model, partition)
    with torch.enable_grad(), eager(), watch:
        outputs = model(*inputs)
    check_outputs(outputs)
    if not outputs.requires_grad and not watch.silent:
        raise ValueError("The model's outputs do not depend on its parameters in any way that autograd knows.")
    empty = [use for use in watch.uses if not prod(use.lead)]
    if empty:
        raise ValueError(
            f"Layer {partition.names[empty[0].layer]!r} saw no rows, of shape {tuple(empty[0].lead)}, where the model "
            f"returned {len(outputs)} examples."
        )
    found = [next(iter(layouts(use.lead, len(outputs))), EveryExample()) for use in watch.uses]
    silent = {partition.names[l]: where for l, where in watch.silent.items()}
    return Record(
        model, partition, outputs, watch.uses, watch.foreign, found, silent, watch.derivative, watch.batch_statistics
    )


def eager() -> AbstractContextManager:
    """Compiled parts of a model run as they were written: inside of them nothing could be watched."""
    compiled = "torch._dynamo" in sys.modules  # else nothing has been compiled, and loading it takes seconds
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
