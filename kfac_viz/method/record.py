"""What one forward pass shows of every layer, in one normal form whatever the layer was.

Inputs ``a`` (N, T, features) with a 1 appended where there is a bias, output-side vectors ``g`` (S, N, T, out). T
counts the positions at which one example uses the layer: 1 for a plain MLP, the product of the extra axes, the pixels
of a convolution, or the number of uses. The score of (s, n) is ``Σ_t g[s, n, t] a[n, t]ᵀ``. Where a matrix is used
transposed its inputs and vectors change places: such layers have ``a`` (S, N, T, features), those positions last.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .layers import Layer
from .likelihood import check_outputs
from .partition import Partition
from .uses import Foreign, Use, Watch


class Layout(NamedTuple):
    """Which axis of a use counts the examples, as its outer part (all of it, if no positions share it) or its inner."""

    axis: int
    inner: bool = False

    def by_example(self, x: Tensor, lead: Sequence[int], N: int) -> Tensor:
        """x (..., *lead, c) with examples and positions as two axes, (..., N, T, c)."""
        before = x.ndim - len(lead) - 1
        x = x.movedim(before + self.axis, before).unflatten(before, (-1, N) if self.inner else (N, -1))
        x = x.movedim(before + 1, before) if self.inner else x
        return x.flatten(before + 1, -2)


def layouts(lead: Sequence[int], N: int) -> list[Layout]:
    """All that these sizes allow, the usual one first."""
    if N == 1:  # every row belongs to the one example there is
        return [Layout(0)] if lead else []
    whole = [Layout(k) for k, n in enumerate(lead) if n == N]
    shared = [Layout(k, inner) for k, n in enumerate(lead) if n > N and n % N == 0 for inner in (False, True)]
    return whole + shared


@dataclass(frozen=True)
class Record:
    """A forward pass: the model's outputs (N, …), and the uses of every layer of the partition.

    Attributes:
        layouts: where the examples are in each of the uses; the usual place until somebody has looked.
        silent: layers that were used without gradients (``torch.no_grad``).
    """

    partition: Partition
    outputs: Tensor
    uses: list[Use]
    foreign: list[Foreign]
    layouts: list[Layout] = field(default_factory=list)
    silent: frozenset[str] = frozenset()

    @property
    def unused(self) -> list[str]:
        """Layers that were not used."""
        used = {use.layer for use in self.uses}
        return [name for l, name in enumerate(self.partition.names) if l not in used]

    @property
    def form(self) -> tuple:
        """What stays when the batch changes: who is used, and how, one after another."""
        return tuple((use.layer, use.kind, use.top, use.left, len(use.lead)) for use in self.uses)

    def without(self, names: Sequence[str]) -> Record:
        """The same pass, seen by a partition without these layers."""
        partition = self.partition.without(names)
        number = {l: partition.index(name) for l, name in enumerate(self.partition.names) if name not in names}
        kept = [(replace(use, layer=number[use.layer]), at) for use, at in zip(self.uses, self.layouts, strict=True)
                if use.layer in number]  # fmt: skip
        return Record(partition, self.outputs, [use for use, _ in kept], [], [at for _, at in kept], self.silent)

    def positions(self) -> tuple[list[int], list[int]]:
        """T of every layer, and how many of its positions come from uses of its transpose."""
        T, swapped = ([0] * len(self.partition) for _ in range(2))
        for use in self.uses:
            count = 1 if use.kind == "pointwise" else prod(use.lead) // len(self.outputs)
            T[use.layer] += count
            swapped[use.layer] += count if use.kind == "transposed" else 0
        return [1 if layer.vector else max(1, t) for layer, t in zip(self.partition.layers, T, strict=True)], swapped

    def pull_back(self, vectors: Tensor, *, also: Sequence[Tensor] = ()) -> tuple[list[Tensor], list[Tensor | None]]:
        """The gradients (S, *lead, channels) at every use for ``vectors`` (S, *outputs.shape), and those of the tensors
        in ``also``. With such further tensors S is 1, and the graph is kept for another pass."""
        ends = [*(use.edge for use in self.uses), *also]
        if len(vectors) == 1:
            grads = torch.autograd.grad(self.outputs, ends, vectors[0], allow_unused=True, retain_graph=bool(also))
        else:
            try:
                grads = torch.autograd.grad(self.outputs, ends, vectors, is_grads_batched=True, allow_unused=True)
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                raise ValueError(
                    f"This model does not pull back {len(vectors)} vectors at once; take fisher='mc' with one sample. "
                    f"PyTorch says: {error}"
                ) from error
        shapes = [(len(vectors), *use.shape) for use in self.uses]
        own = [
            use.rows(vectors.new_zeros(shape) if grad is None else grad.reshape(shape))
            for grad, use, shape in zip(grads, self.uses, shapes, strict=False)
        ]
        return own, list(grads[len(self.uses) :])

    def normal_form(
        self, grads: Sequence[Tensor], dtype: torch.dtype | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """``a`` and ``g`` of every layer from the gradients at every use."""
        a, g = [], []
        N, S = len(self.outputs), len(grads[0])
        by_layer: list[list[tuple[Use, Layout, Tensor]]] = [[] for _ in self.partition.layers]
        for use, layout, grad in zip(self.uses, self.layouts, grads, strict=True):
            by_layer[use.layer].append((use, layout, grad))
        for layer, uses in zip(self.partition.layers, by_layer, strict=True):
            if not uses:
                like = grads[0]
                a_l = like.new_ones(N, 1, 1) if layer.vector else like.new_zeros(N, 1, layer.features)
                g_l = like.new_zeros(S, N, 1, layer.out)
            else:
                uses.sort(key=lambda x: x[0].kind == "transposed")
                pairs = [_pair(use, layout, grad, layer, N) for use, layout, grad in uses]
                if layer.vector:
                    a_l, g_l = pairs[0][0], sum((g for _, g in pairs[1:]), pairs[0][1])
                else:
                    dims = max(a.ndim for a, _ in pairs)
                    a_l = _joined([a if a.ndim == dims else a.expand(S, *a.shape) for a, _ in pairs])
                    g_l = _joined([g.expand(S, *g.shape[1:]) for _, g in pairs])
            a.append(a_l if dtype is None else a_l.to(dtype))
            g.append(g_l if dtype is None else g_l.to(dtype))
        return a, g


def _pair(use: Use, layout: Layout, grad: Tensor, layer: Layer, N: int) -> tuple[Tensor, Tensor]:
    """Inputs (N, T, features) or (S, N, T, features) and vectors (S, N, T, out) of one use."""
    x = None if use.x is None else layout.by_example(use.x, use.lead, N)
    g = layout.by_example(grad, use.lead, N)
    if use.kind == "pointwise":
        g = (g if x is None else g * x).sum(-2, keepdim=True)
        a = g.new_zeros(N, 1, layer.features)
        a[..., use.left] = 1
        return a, _placed(g, use.top, layer.out)
    if use.kind == "transposed":
        return _placed(g, use.left, layer.features), _placed(x, use.top, layer.out)[None]
    return _placed(x, use.left, layer.features), _placed(g, use.top, layer.out)


def _placed(x: Tensor, start: int, size: int) -> Tensor:
    """x (..., n) as the entries from ``start`` on of vectors (..., size)."""
    return x if x.shape[-1] == size else functional.pad(x, (start, size - start - x.shape[-1]))


def _joined(pieces: list[Tensor]) -> Tensor:
    """All positions, one use after another."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -2)


def record(model: nn.Module, inputs: tuple[Tensor, ...], partition: Partition) -> Record:
    """Run the model once and watch the parameters of the partition.

    Raises:
        ValueError: an input that does not fit its layer; a layer of whose rows there are not so many for each example.
        TypeError: the model does not return one floating point tensor.
        Exception: whatever the model itself raises.
    """
    watch = Watch(model, partition)
    with torch.enable_grad(), _eager(), watch:
        outputs = model(*inputs)
    check_outputs(outputs)
    if not outputs.requires_grad and not watch.silent:
        raise ValueError("The model's outputs do not depend on its parameters in any way that autograd knows.")
    found = []
    for use in watch.uses:
        possible = layouts(use.lead, len(outputs))
        if not possible or not prod(use.lead):
            raise ValueError(
                f"Layer {partition.names[use.layer]!r} saw {prod(use.lead)} rows, of shape {tuple(use.lead)}, where "
                f"the model returned {len(outputs)} examples: one axis there has to count the examples, so that scores "
                "can be told apart."
            )
        found.append(possible[0])
    silent = frozenset(partition.names[l] for l in watch.silent)
    return Record(partition, outputs, watch.uses, watch.foreign, found, silent)


def _eager() -> AbstractContextManager:
    """Compiled parts of a model run as they were written: inside of them nothing could be watched."""
    compiled = "torch._dynamo" in sys.modules  # else nothing has been compiled, and loading it takes seconds
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
