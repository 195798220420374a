"""Whether a model's scores are what the uses of its parameters show, and where its examples are: told by autograd."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import inf, isfinite, prod

import torch
from torch import Tensor, nn

from ..method.checks import evaluation, warn
from ..method.one_hot import OneHot, cross
from .layers import named
from .record import EveryExample, ExampleAxis, Record, layouts, record
from .uses import Use

Decision = ExampleAxis | EveryExample | list[ExampleAxis]  # of a use; a list has one for each of its arrivals

_trusted: weakref.WeakKeyDictionary[nn.Module, dict[tuple, list[Decision]]] = weakref.WeakKeyDictionary()  # by model
_told: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models of which only one example was seen
# Operations after which the numbers of a tensor are what they were.
_MOVES = ("View", "UnsafeView", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Permute", "Clone", "ToCopy", "Alias")


def witnessed(model: nn.Module, inputs: tuple[Tensor, ...], run: Record, likelihood: str) -> Record:
    """The record with the examples found in each use; refuses a model whose parameters act elsewhere as well, or that
    mixes the examples.

    A random cotangent that is zero on half of the examples is pulled back: the rows of the other half must be zero,
    which tells the axis of the examples, and ``Σ g aᵀ`` must be what autograd says of each parameter; and once more
    with the halves exchanged, since one example may act on another but not be acted on. Two backward passes at the
    first sight of a model, up to eight for a handful of examples. One example alone cannot tell: a warning says so, and
    the next batch is looked at.

    A use without an axis of examples, such as a table of positions, is replaced by the places where its result meets
    tensors that have one; where that does not account for its whole gradient, every example is pulled back by itself.

    Raises:
        ValueError: what was found, by the layer's name, with the ``layers=[...]`` that leaves it out.
    """
    N, outputs, names = len(run.outputs), run.outputs, run.partition.names
    key = (names, model.training, run.form)
    known = _trusted.get(model, {}).get(key)
    if known is not None and _possible(run, known):
        return _decided(run, known)
    if N == 1 and known is None and model not in _told:
        _told.add(model)
        warn("One example alone cannot show whether rows belong to one example each; a larger batch is checked.")
    passes = _passes(run)
    decisions = list(run.layouts) if N == 1 else _located(inputs, run, passes, max(_tolerances(run)))
    while True:
        found = _decided(run, decisions)
        tolerances = _tolerances(found)
        read = torch.stack([_facts(found, one) for one in passes]).amax(0).tolist()  # the device, once
        facts = dict(zip(names, read, strict=True))
        hidden = [name for name, tolerance in zip(names, tolerances, strict=True)
                  if all(map(isfinite, facts[name][:3])) and facts[name][0] > tolerance]  # fmt: skip
        again = [i for i, at in enumerate(decisions) if isinstance(at, list) and names[run.uses[i].layer] in hidden]
        if not again:
            break
        for i in again:
            decisions[i] = EveryExample()
    for name, tolerance in zip(names, tolerances, strict=True):
        *_, others, every = facts[name]
        if others > tolerance * every:
            raise ValueError(mixes(run, name))
    if hidden:  # where a product overflows, what is wrong in the vectors of the Fisher they are about to tell
        _, difference, whole, *_ = facts[hidden[0]]
        share = f"{difference / whole:.0%} of that gradient is" if whole else "the whole of it is"
        raise ValueError(
            f"The weight of layer {hidden[0]!r} is used outside the calls that could be watched as well, and what it "
            f"does there is not seen: {share} missing from its scores. {advice(run, hidden)}"
        )
    if run.silent and run.derivative is not None and not any(facts[name][2] for name in names):
        raise ValueError(f"Autograd gives every layer a gradient of zero. {advice(run, names)}")
    _warn_of_probabilities(outputs, likelihood)
    called = [facts[name][2] for name in names if name not in run.unused]
    if N > 1 and all(0 < norm < inf for norm in called):  # without a gradient, as behind a dead ReLU, nothing was seen
        _trusted.setdefault(model, {})[key] = decisions
    return found


def check_foreign(run: Record) -> list[str]:
    """Names of the loose layers that meet functions of which nothing is known, and lead to the outputs from there.

    Raises:
        ValueError: a layer that is not loose does so, or no other layer is left; parameter and function are named.
    """
    edges = [edge for use in run.foreign for edge in use.edges]
    # Free where none of them is in the graph: autograd visits only what leads to them.
    left = iter(run.gradients(edges, torch.ones_like(run.outputs)[None], keep=True) if edges else ())
    leading = [use for use in run.foreign if any([next(left) is not None for _ in use.edges])]
    layers = run.partition.layers
    concerned = {l for use in leading for l in use.layers}
    firm = [l for l in sorted(concerned) if not layers[l].loose]
    others = set(range(len(layers))) - concerned - {run.partition.index(name) for name in run.unused}
    if firm or (concerned and not others):
        first = firm[0] if firm else min(concerned)
        use = next(use for use in leading if first in use.layers)
        raise ValueError(
            f"Parameter {use.parameter!r} is {'also ' * (layers[first].name not in run.unused)}used by {use.function}, "
            f"{use.reason}; what it does there would be missing from the scores of layer {layers[first].name!r}. "
            f"{advice(run, [layers[l].name for l in firm or sorted(concerned)])}"
        )
    return sorted(layers[l].name for l in concerned)


# ---- where the examples are --------------------------------------------------------------------------------


def _places(use: Use, at: Decision) -> list[tuple[Use, ExampleAxis | EveryExample]]:
    """Where a use is read: at its own result, or at its arrivals."""
    return list(zip(use.arrivals, at, strict=False)) if isinstance(at, list) else [(use, at)]


def _possible(run: Record, decisions: Sequence[Decision]) -> bool:
    """Whether the sizes of this batch allow what was found in another."""
    N = len(run.outputs)
    for use, at in zip(run.uses, decisions, strict=True):
        if isinstance(at, list) and len(at) != len(use.arrivals):
            return False
        if not all(isinstance(x, EveryExample) or x in layouts(place.lead, N) for place, x in _places(use, at)):
            return False
    return True


def _decided(run: Record, decisions: Sequence[Decision]) -> Record:
    """The record with every use where its examples are."""
    places = [place for use, at in zip(run.uses, decisions, strict=True) for place in _places(use, at)]
    return replace(run, uses=[use for use, _ in places], layouts=[at for _, at in places])


def _located(inputs: tuple[Tensor, ...], run: Record, passes: list[Pass], tolerance: float) -> list[Decision]:
    """For every use the first layout in which the rows of the other examples are zero; for one that has none, and is
    the same for any batch, its arrivals, or else each example by itself."""
    N, places = len(run.outputs), run.places

    def of_others(i: int, at: ExampleAxis) -> Tensor:
        """The size of the rows at place i that must be zero if the examples are there, as a share of all."""
        grads = [(one.half, one.grads[id(places[i])]) for one in passes]
        others = [at.by_example(grad, places[i].lead, N)[0][~half].norm() for half, grad in grads]
        every = [grad.norm() for _, grad in grads]
        return torch.stack(others).double().max() / torch.stack(every).double().max().clamp_min(1e-300)

    tried = [(i, at) for i, place in enumerate(places) for at in layouts(place.lead, N)]
    read = torch.stack([of_others(*one) for one in tried]).tolist() if tried else []  # the device, once
    fitting: dict[int, ExampleAxis] = {}
    for (i, at), share in zip(tried, read, strict=True):
        if not share > tolerance:
            fitting.setdefault(i, at)
    number = {id(place): i for i, place in enumerate(places)}
    lost = [i for i in range(len(run.uses)) if i not in fitting]
    same = _same_for_any_batch(inputs, run) if lost else set()
    bad = [i for i in lost if i not in same]
    if bad:
        use = run.uses[bad[0]]
        name = run.partition.names[use.layer]
        if not layouts(use.lead, N):
            raise ValueError(
                f"Layer {name!r} saw {prod(use.lead)} rows, of shape {tuple(use.lead)}, where the model returned {N} "
                "examples: one axis there has to count the examples, so that scores can be told apart."
            )
        raise ValueError(mixes(run, name))
    decisions: list[Decision] = []
    for i, use in enumerate(run.uses):
        arrivals = [fitting.get(number[id(x)]) for x in use.arrivals]
        decisions.append(fitting.get(i) or (arrivals if arrivals and None not in arrivals else EveryExample()))
    return decisions


def _same_for_any_batch(inputs: tuple[Tensor, ...], run: Record) -> set[int]:
    """Numbers of the uses that have the same rows when the last example is left out: those of a table of positions."""
    N = len(run.outputs)
    fewer = tuple(x[:-1] if x.ndim and len(x) == N else x for x in inputs)
    try:
        with evaluation(run.model):
            one, other = (record(run.model, batch, run.partition) for batch in (inputs, fewer))
    except Exception:  # a model that takes batches of one size only
        return set()
    if not one.form == other.form == run.form or len(other.outputs) != N - 1:
        return set()
    pairs = enumerate(zip(one.uses, other.uses, strict=True))
    return {i for i, (u, v) in pairs if u.lead == v.lead and (u.x is v.x is None or torch.equal(u.x, v.x))}


def mixes(run: Record, name: str) -> str:
    """The sentence for a layer in whose rows the examples cannot be told apart."""
    if run.derivative is not None:
        return f"In layer {name!r} the rows do not belong to one example each. {advice(run, [name])}"
    return (
        f"In layer {name!r} the rows do not belong to one example each: the model mixes the examples of a batch, or "
        f"has them on no axis of their own there, and no per-example Fisher exists. Put the examples on the first axis "
        "(batch_first=True) of inputs and outputs."
    )


def _halves(N: int) -> list[Tensor]:
    """Halves of N examples, (N,) each, and the other halves.

    Of few examples every pair is apart in one of them, as the binary digits of their numbers are; of many, a random
    half has never been seen not to do.
    """
    n = torch.arange(N, device="cpu")
    if N <= 16:
        halves = [n // 2**digit % 2 == 1 for digit in range(max(1, (N - 1).bit_length()))]
    else:
        generator = torch.Generator("cpu").manual_seed(0)
        halves = [torch.randperm(N, generator=generator, device="cpu") < N // 2]
    return [x for half in halves for x in (half, ~half)]


# ---- what autograd says ------------------------------------------------------------------------------------


@contextmanager
def _without_hooks(parameters: list[Tensor]) -> Iterator[None]:
    """Gradients of these parameters as they come, not as hooks on the parameters would change them: scores are made of
    no such gradient. Hooks on modules and activations stay."""
    hooks = [(p, p._backward_hooks) for p in parameters if p._backward_hooks]
    try:
        for p, _ in hooks:
            p._backward_hooks = None
        yield
    finally:
        for p, own in hooks:
            p._backward_hooks = own


@dataclass
class Pass:
    """One pass with a random cotangent on ``half`` of the examples, the same random numbers whatever the half.

    Attributes:
        grads: (1, *lead, channels) at every place, by the ``id`` of its use.
        of_parameters: what autograd gives as the gradient of each parameter.
    """

    half: Tensor
    cotangent: Tensor
    grads: dict[int, Tensor]
    of_parameters: list[Tensor | None]


def _passes(run: Record) -> list[Pass]:
    """Passes for halves of the examples that tell every two of them apart."""
    like, passes = run.outputs, []
    flat = [p for own in run.partition.own_parameters(run.model) for p in own]
    wide = replace(run, uses=run.places, layouts=[ExampleAxis(0)] * len(run.places))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(like.shape, generator=generator, dtype=like.dtype, device="cpu").to(like.device)
    with _without_hooks(flat):
        for half in _halves(len(like)):
            half = half.to(like.device)
            cotangent = (noise * half.view(-1, *[1] * (like.ndim - 1)))[None]
            grads, of_parameters = wide.pull_back(cotangent, also=flat, keep=True)
            passes.append(Pass(half, cotangent, dict(zip(map(id, wide.uses), grads, strict=True)), of_parameters))
    return passes


def _facts(run: Record, one: Pass) -> Tensor:
    """Five numbers (L, 5) of one pass: how far the two gradients differ, as the largest share over the columns of what
    may round there; the norms of their difference and of autograd's; the norms of the rows of g that must be zero, and
    of all rows."""
    half, N, left, facts = one.half, len(one.half), iter(one.of_parameters), []
    own = run.gradients_of_uses(one.cotangent, one.grads)
    a, g = run.normal_form(own)
    rows = [torch.zeros(2, dtype=torch.float64, device=half.device) for _ in a]  # squares, of the others and of all
    for use, at, grad in zip(run.uses, run.layouts, own, strict=True):
        others = at.by_example(grad, use.lead, N)[0][~half]
        rows[use.layer] += torch.stack([others.norm(), grad.norm()]).double().square()
    for layer, a_l, g_l, (others, every) in zip(run.partition.layers, a, g, rows, strict=True):
        a_l, g_l = (x.select(-4, 0) if x.ndim == g_l.ndim else x for x in (a_l, g_l))  # the one vector of this pass
        a_l, g_l = (x.to(torch.promote_types(x.dtype, torch.float32)).flatten(-3, -2) for x in (a_l, g_l))
        expected = g_l.new_zeros(layer.shape)
        for piece, grad in zip(layer.pieces, left, strict=False):
            if grad is not None:
                piece.view(expected).copy_(piece.of(grad.to_dense()))
        inputs = a_l.squares().sqrt() if isinstance(a_l, OneHot) else a_l.norm(dim=-2)
        size = inputs * g_l.norm(dim=(-2, -1))[..., None]  # no less than a column, and than what rounds in it
        differences = cross(g_l, a_l).sub_(expected.view(*layer.axis, *layer.unit)).norm(dim=-2)
        worst = torch.where(differences > 0, differences / size.clamp_min(torch.finfo(size.dtype).tiny), 0.0).max()
        numbers = [worst.clamp_max(1.0), differences.norm(), expected.norm(), others.sqrt(), every.sqrt()]
        facts.append(torch.stack([x.double() for x in numbers]))
    return torch.stack(facts)


def _tolerances(run: Record) -> list[float]:
    """Of every layer: round-off of one product of matrices, both sides of which come from the same backward pass. Where
    each example has a pass by itself, what lies between the layer and the outputs rounds in another way as well."""
    everywhere = {run.outputs.dtype, *(use.dtype for use in run.uses)}
    dtypes = [{run.outputs.dtype} for _ in run.partition.layers]
    for use, at in zip(run.uses, run.layouts, strict=True):  # less than that of the outputs inside of an autocast
        dtypes[use.layer] |= everywhere if isinstance(at, EveryExample) else {use.dtype}
    return [max(_round_off(dtype, run.outputs.device) for dtype in each) for each in dtypes]


def _round_off(dtype: torch.dtype, device: torch.device) -> float:
    if dtype in (torch.float16, torch.bfloat16):
        return 16 * torch.finfo(dtype).eps
    if device.type == "cuda" and dtype == torch.float32:
        return 1e-2  # TensorFloat-32, where it is switched on
    return 1000 * torch.finfo(dtype).eps


# ---- what to say -------------------------------------------------------------------------------------------


EQUATION = """
    u = lambda x: torch.sin(torch.pi * x).prod(-1)  # the known solution: values on the boundary, and the error
    operator = lambda x, jet: jet.laplacian + 2 * torch.pi**2 * u(x)  # the residual; .value and .gradient too
    problem = kv.problems.equation(operator, u, box=((0, 1), (0, 1)), widths=(32, 32))
    opt = kv.TwoLevelKFAC(problem.model, likelihood="gaussian", fisher="exact", step_rule="line_search", damping=1e-6)
    problem.closure(opt)(); opt.observe(problem.inputs); opt.step(problem.closure(opt))"""


def advice(run: Record, hidden: list[str]) -> str:
    """What to do about these layers."""
    others = [name for name in run.partition.names if name not in [*hidden, *run.unused]]
    without = f"Leave it out by naming the others: {named(others)}."
    if run.derivative is not None:
        return (
            f"Forward takes derivatives with {run.derivative}, and these use the weights a second time. "
            f"{(without + ' ') * bool(others)}For a differential equation, kv.problems.equation takes the derivatives "
            f"where every use is seen:\n{EQUATION}"
        )
    if others:
        return without
    return "No other layer is left. Unfreeze others, give the optimizer others, or write this one as nn.Linear layers."


def _warn_of_probabilities(outputs: Tensor, likelihood: str) -> None:
    """The likelihoods read logits; a model that ends in softmax or sigmoid has them pass through twice."""
    node = outputs.grad_fn
    while node is not None and node.name().startswith(_MOVES) and node.next_functions:
        node = node.next_functions[0][0]
    last = "" if node is None else node.name()
    if likelihood != "gaussian" and last.startswith(("SoftmaxBackward", "SigmoidBackward")):
        end = "softmax" if last.startswith("Softmax") else "sigmoid"
        warn(f"The model seems to end in {end}; likelihood={likelihood!r} expects logits, and applies it itself.")
