"""Whether a model's scores are what the uses of its parameters show, and where its examples are: told by autograd."""

from __future__ import annotations

import weakref
from dataclasses import replace
from math import inf, isfinite

import torch
from torch import Tensor, nn

from .checks import warn
from .record import Layout, Record, layouts

_trusted: weakref.WeakKeyDictionary[nn.Module, dict[tuple, list[Layout]]] = weakref.WeakKeyDictionary()  # by model
_told: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models of which only one example was seen
# Operations after which the numbers of a tensor are what they were.
_MOVES = ("View", "UnsafeView", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Permute", "Clone", "ToCopy", "Alias")


def witnessed(model: nn.Module, record: Record, likelihood: str) -> Record:
    """The record with the examples found in each use; refuses a model whose parameters act elsewhere as well, or that
    mixes the examples.

    A random cotangent that is zero on half of the examples is pulled back: the rows of the other half must be zero,
    which tells the axis of the examples, and ``Σ g aᵀ`` must be what autograd says of each parameter; and once more
    with the halves exchanged, since one example may act on another but not be acted on. Two backward passes at the
    first sight of a model, up to eight for a handful of examples. One example alone cannot tell: a warning says so, and
    the next batch is looked at.

    Raises:
        ValueError: what was found, by the layer's name, with the ``layers=[...]`` that leaves it out.
    """
    N, outputs, names = len(record.outputs), record.outputs, record.partition.names
    key = (names, model.training, record.form)
    known = _trusted.get(model, {}).get(key)
    if known is not None and all(at in layouts(use.lead, N) for at, use in zip(known, record.uses, strict=True)):
        return replace(record, layouts=known)
    if N == 1 and known is None and model not in _told:
        _told.add(model)
        warn("One example alone cannot show whether rows belong to one example each; a larger batch is checked.")
    weights = record.partition.own_parameters(model)
    halves = [half.to(outputs.device) for half in _halves(N)]
    flat = [p for own in weights for p in own]
    grads = [_pulled(record, half, flat) for half in halves]
    tolerance = _tolerance(outputs)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    mixes = any(norm.training or norm.running_mean is None for norm in norms)  # which is known, and no reason to refuse
    if not mixes and N > 1:
        record = _located(record, halves, [own for own, _ in grads], tolerance)
    facts = [_facts(record, half, own, told) for half, (own, told) in zip(halves, grads, strict=True)]
    read = torch.stack(facts).amax(0).tolist()
    for name, (worst, difference, told, others, all_rows) in zip(names, read, strict=True):
        if others > tolerance * all_rows and not mixes:
            raise ValueError(_mixed(name))
        if not (isfinite(worst) and isfinite(told)):
            continue  # this product overflows, and what is wrong in the vectors of the Fisher they are about to tell
        if worst > tolerance:
            share = f"{difference / told:.0%} of that gradient" if told else "the whole of it"
            raise ValueError(
                f"The weight of layer {name!r} is used outside the calls that could be watched as well, and what it "
                f"does there is not seen: {share} is missing from its scores. {advice(record, [name])}"
            )
    _warn_of_probabilities(outputs, likelihood)
    called = [told for name, (_, _, told, *_) in zip(names, read, strict=True) if name not in record.unused]
    if N > 1 and all(0 < told < inf for told in called):  # without a gradient, as behind a dead ReLU, nothing was seen
        _trusted.setdefault(model, {})[key] = record.layouts
    return record


def check_foreign(record: Record) -> list[str]:
    """Names of the loose layers that meet functions of which nothing is known, and lead to the outputs from there.

    Raises:
        ValueError: a layer that is not loose does so; its parameter and the function are named.
    """
    edges = [edge for use in record.foreign for edge in use.edges]
    # Free where none of them is in the graph: autograd visits only what leads to them.
    vector = torch.ones_like(record.outputs)
    grads = torch.autograd.grad(record.outputs, edges, vector, allow_unused=True, retain_graph=True) if edges else ()
    left = iter(grads)
    leading = [use for use in record.foreign if any([next(left) is not None for _ in use.edges])]
    layers = record.partition.layers
    for use in leading:
        firm = [layers[l].name for l in use.layers if not layers[l].loose]
        if firm:
            raise ValueError(
                f"Parameter {use.parameter!r} is also used by {use.function}, which is no sum of products g aᵀ that "
                f"could be seen; what it does there would be missing from the scores of layer {firm[0]!r}. "
                f"{advice(record, firm)}"
            )
    return sorted({layers[l].name for use in leading for l in use.layers})


def _located(record: Record, halves: list[Tensor], grads: list[list[Tensor]], tolerance: float) -> Record:
    """The record with the first layout of every use in which the rows of the other examples are zero."""
    N, uses = len(record.outputs), record.uses

    def of_others(i: int, at: Layout) -> Tensor:
        """The size of the rows of use i that must be zero if the examples are there, as a share of all."""
        passes = zip(halves, grads, strict=True)
        others = [at.by_example(own[i], uses[i].lead, N)[0][~half].norm() for half, own in passes]
        every = [own[i].norm() for own in grads]
        return torch.stack(others).double().max() / torch.stack(every).double().max().clamp_min(1e-300)

    candidates = [layouts(use.lead, N) for use in uses]
    open_ones = [(i, at) for i, options in enumerate(candidates) if len(options) > 1 for at in options]
    read = torch.stack([of_others(*one) for one in open_ones]).tolist() if open_ones else []  # the device, once
    shares = dict(zip(open_ones, read, strict=True))
    found = []
    for i, options in enumerate(candidates):
        fitting = [at for at in options if not shares.get((i, at), 0.0) > tolerance]
        if not fitting:
            raise ValueError(_mixed(record.partition.names[uses[i].layer]))
        found.append(fitting[0])
    return replace(record, layouts=found)


def _mixed(name: str) -> str:
    return (
        f"In layer {name!r} the rows do not belong to one example each: the model mixes the examples of a batch, or "
        "has them on no axis of their own there, and no per-example Fisher exists. Put the examples on the first axis "
        "(batch_first=True) of inputs and outputs."
    )


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


def _pulled(record: Record, half: Tensor, flat: list[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
    """Gradients at every use, and of every parameter, with a cotangent on ``half`` of the examples: the same random
    numbers whatever the half."""
    like = record.outputs
    generator = torch.Generator(like.device).manual_seed(0)
    cotangent = torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
    return record.pull_back((cotangent * half.view(-1, *[1] * (like.ndim - 1)))[None], also=flat)


def _facts(record: Record, half: Tensor, own: list[Tensor], told: list[Tensor | None]) -> Tensor:
    """Per layer, with a cotangent on ``half`` of the examples: how far the two gradients differ, in the column where
    that is most of what may round there; the norms of their difference and of autograd's; and the norms of the rows
    of g that must be zero, and of all."""
    a, g = record.normal_form(own)
    N, left, facts = len(half), iter(told), []
    rows = [torch.zeros(2, dtype=torch.float64, device=half.device) for _ in a]  # squares, of the others and of all
    for use, at, grad in zip(record.uses, record.layouts, own, strict=True):
        others = at.by_example(grad, use.lead, N)[0][~half]
        rows[use.layer] += torch.stack([others.norm(), grad.norm()]).double().square()
    for layer, a_l, g_l, (others, every) in zip(record.partition.layers, a, g, rows, strict=True):
        a_l, g_l = (x[0] if x.ndim == 4 else x for x in (a_l, g_l))
        a_l, g_l = (x.to(torch.promote_types(x.dtype, torch.float32)).flatten(0, 1) for x in (a_l, g_l))
        expected = g_l.new_zeros(layer.shape)
        for piece, grad in zip(layer.pieces, left, strict=False):
            if grad is not None:
                piece.view(expected).copy_(piece.of(grad))
        size = a_l.norm(dim=0) * g_l.norm()  # no less than a column, and than what rounds in it
        differences = (g_l.mT @ a_l - expected).norm(dim=0)
        worst = torch.where(differences > 0, differences / size.clamp_min(torch.finfo(size.dtype).tiny), 0.0).max()
        numbers = [worst.clamp_max(1.0), differences.norm(), expected.norm(), others.sqrt(), every.sqrt()]
        facts.append(torch.stack([x.double() for x in numbers]))
    return torch.stack(facts)


def advice(record: Record, hidden: list[str]) -> str:
    """What to do about these layers."""
    others = [name for name in record.partition.names if name not in [*hidden, *record.unused]]
    if not others:
        return "No other layer is left here; write the model with nn.Linear layers that are called."
    return f"Leave it out by naming the others: layers={others}."


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
