"""Whether a model's scores are what its layers show: told once, at the first sight of the model, by autograd itself."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from math import inf, isfinite

import torch
from torch import Tensor, nn

from .checks import warn
from .partition import own_parameters
from .record import Record

_trusted: weakref.WeakKeyDictionary[nn.Module, set] = weakref.WeakKeyDictionary()  # what was found in order, by model
_MOVES = ("View", "UnsafeView", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Permute", "Clone", "ToCopy", "Alias")


def check_witnessed(model: nn.Module, record: Record, likelihood: str) -> None:
    """Refuse a model whose weights act elsewhere than in the calls that were recorded, or that mixes the examples.

    A random cotangent that is zero on half of the examples is pulled back: ``Σ g aᵀ`` must then be what autograd says
    of each weight, and the rows of the other half must be zero; and once more with the halves exchanged, since one
    example may act on another but not be acted on. Two backward passes per model, up to eight for a handful of
    examples; a batch of one cannot tell examples apart, and the next one is looked at again.

    Raises:
        ValueError: what was found, by the layer's name, with the ``layers=[...]`` that leaves it out.
    """
    _check_unused(model, record)
    key = (record.partition.names, model.training, tuple(record.unused))
    if key in _trusted.get(model, ()):
        return
    N, outputs = len(record.outputs), record.outputs
    weights = [own_parameters(model.get_submodule(name)) for name in record.partition.names]
    halves = [half.to(outputs.device) for half in _halves(N)]
    read = torch.stack([_facts(record, weights, half) for half in halves]).amax(0).tolist()
    tolerance = _tolerance(outputs)
    mixes = any(module.training or module.running_mean is None for module in _batch_norms(model))
    for name, (worst, difference, told, others, all_rows) in zip(record.partition.names, read, strict=True):
        if others > tolerance * all_rows and not mixes:
            raise ValueError(
                f"In layer {name!r} the rows do not belong to one example each: either the examples are not on the "
                "first axis there (batch_first=True puts them there), or the model mixes the examples of a batch, and "
                "no per-example Fisher exists."
            )
        if not (isfinite(worst) and isfinite(told)):
            continue  # this product overflows, and what is wrong in the vectors of the Fisher they are about to tell
        if worst > tolerance:
            share = f"{difference / told:.0%} of that gradient" if told else "the whole of it"
            raise ValueError(
                f"The weight of layer {name!r} is used outside the calls of this layer as well (a tied weight, or "
                f"attention that reads it by itself), and what it does there is not seen: {share} is missing from its "
                f"scores. {_advice(record, [name])}"
            )
    _warn_of_probabilities(outputs, likelihood)
    called = [
        told for name, (_, _, told, *_) in zip(record.partition.names, read, strict=True) if name not in record.unused
    ]
    if N > 1 and all(0 < told < inf for told in called):  # without a gradient, as behind a dead ReLU, nothing was seen
        _trusted.setdefault(model, set()).add(key)


def _halves(N: int) -> list[Tensor]:
    """Halves of N examples, (N,) each, and the other halves.

    Of few examples every pair is apart in one of them, as the binary digits of their numbers are; of many, a random
    half has never been seen not to do.
    """
    n = torch.arange(N)
    if N <= 16:
        halves = [n // 2**digit % 2 == 1 for digit in range(max(1, (N - 1).bit_length()))]
    else:
        halves = [torch.randperm(N, generator=torch.Generator().manual_seed(0)) < N // 2]
    return [x for half in halves for x in (half, ~half)]


def _facts(record: Record, weights: list[list[Tensor]], half: Tensor) -> Tensor:
    """Per layer, with a cotangent on ``half`` of the examples: how far the two gradients differ, in the column where
    that is most of what may round there; the norms of their difference and of autograd's; and the norms of the rows
    of g that must be zero, and of all."""
    cotangent = _random_like(record.outputs) * half.view(-1, *[1] * (record.outputs.ndim - 1))
    g, grads = record.pull_back(cotangent[None], also=[p for own in weights for p in own])
    left, facts = iter(grads), []
    for own, a_l, g_l in zip(weights, record.inputs(), g, strict=True):
        a_l, g_l = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (a_l, g_l[0]))
        told = [torch.zeros_like(p) if grad is None else grad for p, grad in zip(own, left, strict=False)]
        told = torch.cat([x.flatten(1) if x.ndim > 1 else x[:, None] for x in told], dim=1).to(g_l.dtype)
        seen = g_l.flatten(0, 1).mT @ a_l.flatten(0, 1)
        size = a_l.flatten(0, 1).norm(dim=0) * g_l.norm()  # no less than a column, and than what rounds in it
        differences = (seen - told).norm(dim=0)
        worst = torch.where(differences > 0, differences / size.clamp_min(torch.finfo(size.dtype).tiny), 0.0).max()
        numbers = [worst.clamp_max(1.0), differences.norm(), told.norm(), g_l[~half].norm(), g_l.norm()]
        facts.append(torch.stack(numbers))
    return torch.stack(facts)


def _check_unused(model: nn.Module, record: Record) -> None:
    """Refuse layers whose weights lead to the outputs although the layers were never called."""
    unused = {name: own_parameters(model.get_submodule(name)) for name in record.unused}
    if not (unused and record.outputs.requires_grad):
        return
    flat, vector = [p for own in unused.values() for p in own], torch.ones_like(record.outputs)
    # Free where none of them is in the graph: autograd visits only what leads to them.
    grads = iter(torch.autograd.grad(record.outputs, flat, vector, allow_unused=True, retain_graph=True))
    hidden = [name for name, own in unused.items() if any([next(grads) is not None for _ in own])]
    if hidden:
        raise ValueError(
            f"Layers {hidden} have a gradient although they were never called: their weights are used without them, as "
            f"nn.MultiheadAttention and nn.TransformerEncoderLayer do with out_proj. {_advice(record, hidden)}"
        )


def _random_like(x: Tensor) -> Tensor:
    generator = torch.Generator(x.device).manual_seed(0)
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)


def _advice(record: Record, hidden: list[str]) -> str:
    others = [name for name in record.partition.names if name not in [*hidden, *record.unused]]
    if not others:
        return "No other layer is left here; write the model with nn.Linear layers that are called."
    return f"Leave it out by naming the others: layers={others}."


def _batch_norms(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))


def _tolerance(x: Tensor) -> float:
    """Round-off of one product of matrices, both sides of which come from the same backward pass."""
    if x.dtype in (torch.float16, torch.bfloat16):
        return 16 * torch.finfo(x.dtype).eps
    if x.device.type == "cuda" and x.dtype == torch.float32:
        return 1e-2  # TensorFloat-32, where it is switched on
    return 1000 * torch.finfo(x.dtype).eps


def _warn_of_probabilities(outputs: Tensor, likelihood: str) -> None:
    """The likelihoods read logits; a model that ends in softmax or sigmoid has them pass through twice."""
    node = outputs.grad_fn
    while node is not None and node.name().startswith(_MOVES) and node.next_functions:
        node = node.next_functions[0][0]
    last = "" if node is None else node.name()
    if likelihood != "gaussian" and last.startswith(("SoftmaxBackward", "SigmoidBackward")):
        end = "softmax" if last.startswith("Softmax") else "sigmoid"
        warn(f"The model seems to end in {end}; likelihood={likelihood!r} expects logits, and applies it itself.")
