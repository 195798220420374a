"""What one forward pass shows of every layer: its inputs, and where the gradient of its outputs will arrive.

Normal form, whatever the layer was: inputs ``a`` (N, T, features) with a 1 appended where there is a bias,
output-side vectors ``g`` (S, N, T, out). T counts the positions at which one example uses the layer: 1 for a
plain MLP, the product of the extra axes, the pixels of a convolution, or the number of calls. The score of
(s, n) is ``Σ_t g[s, n, t] a[n, t]ᵀ``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn import functional

from .likelihood import check_outputs
from .partition import Partition


class Call(NamedTuple):
    """One call of a layer: inputs in normal form, and the gradient edge, shape and kind of its output.

    An edge, unlike the tensor, still means the pre-activation after an in-place ``ReLU``.
    """

    a: Tensor
    edge: GradientEdge
    shape: torch.Size
    conv: bool


@dataclass(frozen=True)
class Record:
    """A forward pass: the model's outputs (N, …), and the calls of every layer of the partition."""

    partition: Partition
    outputs: Tensor
    calls: list[list[Call]]

    @property
    def unused(self) -> list[str]:
        """Layers that were not called."""
        return [name for name, calls in zip(self.partition.names, self.calls, strict=True) if not calls]

    def inputs(self) -> list[Tensor]:
        """``a`` of every layer, calls one after another along the positions; zeros where there was none."""
        zeros = self.outputs.detach().new_zeros
        return [
            _joined([call.a for call in calls], 1) if calls else zeros(len(self.outputs), 1, layer.features)
            for layer, calls in zip(self.partition.layers, self.calls, strict=True)
        ]

    def positions(self) -> list[int]:
        """T of every layer."""
        return [sum(call.a.shape[1] for call in calls) or 1 for calls in self.calls]

    def pull_back(self, vectors: Tensor, *, also: Sequence[Tensor] = ()) -> tuple[list[Tensor], list[Tensor | None]]:
        """``g`` of every layer for ``vectors`` (S, *outputs.shape), and the gradients of the tensors in ``also``.

        With such further tensors S is 1, and the graph is kept for another pass.
        """
        flat = [call for calls in self.calls for call in calls]
        ends = [*(call.edge for call in flat), *also]
        if len(vectors) == 1:
            grads = torch.autograd.grad(self.outputs, ends, vectors[0], allow_unused=True, retain_graph=bool(also))
            lone = [None if grad is None else grad[None] for grad in grads[: len(flat)]]
        else:
            try:
                lone = torch.autograd.grad(self.outputs, ends, vectors, is_grads_batched=True, allow_unused=True)
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                raise ValueError(
                    f"This model does not pull back {len(vectors)} vectors at once; take fisher='mc' with one sample. "
                    f"PyTorch says: {error}"
                ) from error
            grads = lone
        pieces = iter(
            _positions_out(
                vectors.new_zeros(len(vectors), *call.shape) if grad is None else grad.reshape(-1, *call.shape),
                call.conv,
            )
            for grad, call in zip(lone, flat, strict=False)
        )
        g = [
            _joined([next(pieces) for _ in calls], 2) if calls else vectors.new_zeros(*vectors.shape[:2], 1, layer.out)
            for layer, calls in zip(self.partition.layers, self.calls, strict=True)
        ]
        return g, list(grads[len(flat) :])


def record(model: nn.Module, inputs: tuple[Tensor, ...], partition: Partition) -> Record:
    """Run the model once and watch the layers of the partition.

    Raises:
        ValueError: an input that does not fit its layer; a layer that runs without gradients, or that does not have
            the examples on its first axis.
        TypeError: the model does not return one floating point tensor.
        Exception: whatever the model itself raises.
    """
    calls: dict[str, list[Call]] = {name: [] for name in partition.names}

    def watch(name: str):
        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            _check_layer_input(name, module, args[0] if args else kwargs["input"])

        def after(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            if not output.requires_grad:
                raise ValueError(f"Layer {name!r} runs without gradients (torch.no_grad); no score can be had there.")
            x = args[0] if args else kwargs["input"]
            call = Call(_positions_in(module, x.detach()), _edge(output), output.shape, isinstance(module, nn.Conv2d))
            calls[name].append(call)

        return before, after

    with ExitStack() as stack, torch.enable_grad():
        for name in partition.names:
            module, (before, after) = model.get_submodule(name), watch(name)
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            # First among the hooks: one of the model's own may change the output, and edge would not be g's.
            stack.callback(module.register_forward_hook(after, with_kwargs=True, prepend=True).remove)
        outputs = model(*inputs)
    check_outputs(outputs)
    if not outputs.requires_grad:
        raise ValueError("The model's outputs do not depend on its parameters in any way that autograd knows.")
    for name, made in calls.items():
        for call in made:
            if len(call.a) != len(outputs):
                raise ValueError(
                    f"Layer {name!r} saw {len(call.a)} rows where the model returned {len(outputs)} examples: keep "
                    "the examples on the first axis (batch_first=True), so that scores can be told apart."
                )
    return Record(partition, outputs, list(calls.values()))


def _edge(output: Tensor) -> GradientEdge:
    """Where the gradient of a layer's output arrives, whatever is done to the output in place later.

    For inputs with extra axes the output is a view; an in-place function makes a new history for it, and only that of
    the tensor that it views goes on being part of the graph.
    """
    base = output._base
    whole = base is not None and base.numel() == output.numel() and base.is_contiguous() and output.is_contiguous()
    return torch.autograd.graph.get_gradient_edge(base if whole else output)


def _joined(pieces: list[Tensor], axis: int) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, axis)


def _check_layer_input(name: str, module: nn.Module, x: Tensor) -> None:
    """Say in words, before PyTorch does, that an input does not fit its layer."""
    if isinstance(module, nn.Conv2d):
        fits, expected = x.ndim == 4 and x.shape[1] == module.in_channels, f"(N, {module.in_channels}, height, width)"
    else:
        fits, expected = x.ndim >= 2 and x.shape[-1] == module.in_features, f"(N, …, {module.in_features})"
    if not fits or not x.is_floating_point() or x.numel() == 0:
        raise ValueError(
            f"Layer {name!r} expects floating point inputs, not empty, of shape {expected}; got {tuple(x.shape)}, "
            f"{x.dtype}."
        )


def _positions_in(module: nn.Module, x: Tensor) -> Tensor:
    """Layer input in normal form (N, T, features): a copy, which later in-place changes do not reach."""
    if isinstance(module, nn.Conv2d):
        patches = functional.unfold(
            _padded(module, x), module.kernel_size, dilation=module.dilation, stride=module.stride
        )
        x = patches.transpose(1, 2)
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    return x.clone() if module.bias is None else torch.cat([x, x.new_ones(*x.shape[:2], 1)], dim=2)


def _padded(module: nn.Conv2d, x: Tensor) -> Tensor:
    pad = module._reversed_padding_repeated_twice
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return functional.pad(x, pad, mode=mode)


def _positions_out(g: Tensor, conv: bool) -> Tensor:
    """Pre-activation gradients in normal form (S, N, T, out); a convolution has its channels in front."""
    if conv:
        return g.flatten(3).transpose(2, 3)
    return g.reshape(*g.shape[:2], -1, g.shape[-1])
