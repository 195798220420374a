"""The Fisher of a model on a batch, from one forward pass and one batched backward pass to every use of a parameter."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..method.checks import (
    check_choice,
    check_count,
    check_room,
    check_type,
    evaluation,
    finite,
    own_precision,
    same_random_state,
    warn,
)
from ..method.fisher import Fisher
from ..method.names import modules_of, names_of, unwrapped
from ..method.one_hot import numbers
from ..method.partition import Partition
from .layers import named, partition_of
from .likelihood import FLAVOURS, LIKELIHOODS, count_vectors, output_vectors
from .record import Record, record
from .witness import advice, check_foreign, witnessed

_told: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models whose other parameters were reported


def capture(
    model: nn.Module,
    inputs: Tensor | tuple[Tensor, ...],
    targets: Tensor | None = None,
    *,
    likelihood: str,
    fisher: str = "exact",
    samples: int = 1,
    generator: torch.Generator | None = None,
    layers: Sequence[str] | None = None,
) -> Fisher:
    """The Fisher of ``model`` on ``inputs``, as an operator over its layers (:func:`partition_of`).

    One forward pass in eval mode and one batched backward pass to the results of every product with a weight, wherever
    in the model it is: in a module, a function, or PyTorch's own attention; reused, transposed (tied) or packed. No
    weight gradient is formed, so that hooks on parameters do not run; hooks on modules and activations do. Training
    flags, ``.grad``, ``requires_grad``, batch-norm statistics and, in the main thread, the random state are afterwards
    what they were. The caller's autocast is off inside, and the model's own is on; half precisions are kept in float32
    once captured.

    A table that every example uses whole, such as learned positions, is a layer like a table of words: its inputs are
    rows of the identity, so that K-FAC has a diagonal A and one G for all of its rows. Where the table is added,
    multiplied or copied to the examples, the score of an example is what comes back to that place. Where it passes
    through layers of its own first, each example is pulled back by itself: N passes, and a warning says so once.

    Args:
        model: weights and ``inputs`` share one floating dtype and one device.
        inputs: a batch (N, …), or a tuple of arguments of the model.
        targets: the true labels, for ``fisher="empirical"`` only (shapes: see :func:`kfac_viz.nll`).
        likelihood: ``"categorical"``, ``"bernoulli"`` or ``"gaussian"``.
        fisher: ``"exact"`` (equal to the GGN for these likelihoods), ``"mc"`` (labels drawn from the model)
            or ``"empirical"``.
        samples: draws per example for ``"mc"``.
        generator: source of those draws, on the CPU, so that every device gets the same, or on the model's device, so
            that nothing waits; by default a fresh one on the CPU, seeded with 0.
        layers: names of the layers to keep, or of the modules that hold them; all of them by default. Parameters
            that belong to no module of a known kind are left out where they are used otherwise than in sums of
            products, and a warning names them.

    Raises:
        ValueError, TypeError: what cannot be captured, with the reason: no layer, frozen layers, an empty batch, NaN,
            inf or an overflow (naming the layer), wrong shapes, mixed dtype or device, targets missing or unasked for,
            batch norm without running statistics (it couples the examples), a weight that also meets a function of
            which nothing is known (naming both), more vectors than memory can hold.

    >>> model = nn.Sequential(nn.Linear(2, 1, bias=False))
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> capture(model, x, likelihood="gaussian").dense()
    tensor([[0.5000, 0.0000],
            [0.0000, 2.0000]])
    """
    check_choice("likelihood", likelihood, LIKELIHOODS)
    check_choice("fisher", fisher, FLAVOURS)
    if (fisher == "empirical") != (targets is not None):
        raise ValueError(
            "fisher='empirical' needs the true labels as targets."
            if targets is None
            else f"targets belong to fisher='empirical' only; fisher={fisher!r} takes its labels from the model."
        )
    check_count("samples", samples, least=1)
    model = unwrapped(model)
    partition = partition_of(model, layers)
    inputs = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    check_inputs(model, partition, inputs)
    for name, module in modules_of(model):
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"Batch norm {name!r} keeps no running statistics and couples the examples, so that no per-example "
                "Fisher exists; build it with track_running_stats=True."
            )
    if generator is not None:
        check_type("generator", generator, torch.Generator)
        if generator.device.type not in ("cpu", inputs[0].device.type):
            raise ValueError(f"The generator is on {generator.device}, the inputs are on {inputs[0].device}.")
    device = inputs[0].device
    with evaluation(model), same_random_state(device), own_precision(device):
        F, _ = capture_layers(
            model,
            inputs,
            partition,
            likelihood=likelihood,
            fisher=fisher,
            targets=targets,
            samples=samples,
            generator=generator,
            batch_statistics=False,
        )
    _tell_others(model, F.partition)
    return F


def capture_layers(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    partition: Partition,
    *,
    likelihood: str,
    fisher: str,
    targets: Tensor | None,
    samples: int,
    generator: torch.Generator | None,
    partial: bool = False,
    batch_statistics: bool = True,
) -> tuple[Fisher, tuple[str, ...]]:
    """The Fisher in the mode that the model is in, and the names of the layers that took part.

    Where batch norm takes the mean and variance of the batch, scores are those with these held constant (K-FAC's usual
    approximation), or it is refused without ``batch_statistics``.
    With ``partial``, a layer that took none has zero vectors, which is its exact share; otherwise it is refused. Loose
    parameters that are used otherwise than in sums of products are left out of the partition.
    Vectors are kept in the precision of the parameters and at least in float32.
    """
    with torch.inference_mode(False):
        inputs = tuple(x.clone() if x.is_inference() else x for x in inputs)
        try:
            run = record(model, inputs, partition)
        except Exception:
            check_data(model, partition, inputs)  # NaN may be what it could not run on
            raise
        silent = [name for name in run.unused if name in run.silent]
        if silent:
            raise ValueError(
                f"Layer {silent[0]!r} runs {run.silent[silent[0]]}; no gradient reaches it there from the outputs, and "
                f"so it has no score. {advice(run, silent)}"
            )
        if run.batch_statistics and not batch_statistics:
            raise ValueError(
                "The model normalises with the statistics of the batch also in eval mode (functional.batch_norm with "
                "training=True), which couples the examples, so that no per-example Fisher exists; pass "
                "training=self.training and running statistics."
            )
        left_out = check_foreign(run)
        idle = [layer.name for layer in partition.layers if layer.loose and layer.name in run.unused]
        if left_out or (idle and not partial):
            run = run.without([*left_out, *idle])
            partition = run.partition
        if run.uses:
            run = witnessed(model, inputs, run, likelihood)
        if run.unused and not (partial and len(run.unused) < len(partition)):
            raise ValueError(
                f"Layers {run.unused} took no part in the forward pass; name the others: "
                f"{named([name for name in partition.names if name not in run.unused])}."
            )
        S = count_vectors(run.outputs, fisher, samples)
        positions, swapped = run.positions()
        sizes = [T * layer.out for T, layer in zip(positions, partition.layers, strict=True)]
        check_room(
            f"The {S} vectors of each of {len(run.outputs)} examples",
            2 * S * (run.outputs.numel() + len(run.outputs) * sum(sizes)),
            run.outputs,
            "take fewer examples, or labels drawn from the model (fisher='mc') in place of all outputs",
        )
        vectors = output_vectors(run.outputs, likelihood, fisher, targets=targets, samples=samples, generator=generator)
        grads, _ = run.pull_back(vectors)
        dtype = torch.promote_types(partition.own_parameters(model)[0][0].dtype, torch.float32)
        a, g = run.normal_form(grads, dtype)
    F = Fisher(partition, a, g, likelihood=likelihood, flavour=fisher, swapped=swapped)
    if not F.in_range():
        _tell_what_is_wrong(model, inputs, run, F)
    return F, tuple(name for name in partition.names if name not in run.unused)


def _tell_what_is_wrong(model: nn.Module, inputs: tuple[Tensor, ...], run: Record, F: Fisher) -> None:
    """Raise the sentence for a Fisher with NaN, inf or an overflow, where it comes in."""
    check_data(model, run.partition, inputs)
    names = run.partition.names
    inputs_of = [numbers(a) for a in F.a]
    named_tensors = [(f"The inputs of layer {name!r}", a) for name, a in zip(names, inputs_of, strict=True)]
    named_tensors.append(("The model's outputs", run.outputs.detach()))
    named_tensors += [(f"The output-side vectors of layer {name!r}", g) for name, g in zip(names, F.g, strict=True)]
    for (what, _), fine in zip(named_tensors, finite([x for _, x in named_tensors]), strict=True):
        if not fine:
            raise ValueError(f"{what} hold NaN or inf.")
    layers = zip(names, inputs_of, F.g, strict=True)
    name, a, g = max(layers, key=lambda layer: float(layer[1].norm() * layer[2].norm()))
    raise ValueError(
        f"The Fisher overflows {g.dtype} in layer {name!r}, with inputs up to {float(a.abs().max()):.1g} and "
        f"output-side vectors up to {float(g.abs().max()):.1g}; scale the inputs, or take a wider dtype."
    )


def check_data(model: nn.Module, partition: Partition, inputs: tuple[Tensor, ...]) -> None:
    """Refuse NaN and inf in weights and inputs, by name."""
    for name, own in zip(partition.names, partition.own_parameters(model), strict=True):
        if not all(finite([p.detach() for p in own])):
            raise ValueError(f"The weights of layer {name!r} hold NaN or inf.")
    if not all(finite([x for x in inputs if x.is_floating_point()])):
        raise ValueError("The inputs of the model hold NaN or inf.")


def check_inputs(model: nn.Module, partition: Partition, inputs: tuple[Tensor, ...]) -> None:
    """Refuse an empty batch, sparse or complex inputs, and mixed dtypes or devices."""
    if not inputs or not all(isinstance(x, Tensor) for x in inputs):
        raise TypeError(f"inputs must be tensors; got {[type(x).__name__ for x in inputs]}.")
    if inputs[0].ndim < 1 or inputs[0].shape[0] == 0:
        raise ValueError(f"The batch is empty: inputs have shape {tuple(inputs[0].shape)}.")
    weights = {name: own[0] for name, own in zip(partition.names, partition.own_parameters(model), strict=True)}
    first = next(iter(weights.values()))
    for name, p in weights.items():
        if (p.dtype, p.device) != (first.dtype, first.device):
            raise ValueError(
                f"Layer {name!r} is {p.dtype} on {p.device}, layer {partition.names[0]!r} is {first.dtype} on "
                f"{first.device}; one dtype and device are needed."
            )
    for x in inputs:
        if x.layout != torch.strided or x.is_complex():
            raise ValueError(f"inputs must be dense real tensors; got {x.dtype} of layout {x.layout}.")
        if x.device != first.device or (x.is_floating_point() and x.dtype != first.dtype):
            raise ValueError(f"The model is {first.dtype} on {first.device}, the inputs {x.dtype} on {x.device}.")


def _tell_others(model: nn.Module, partition: Partition) -> None:
    """Warn, once per model, of the trainable parameters outside the partition."""
    mine = {id(p) for own in partition.own_parameters(model) for p in own}
    others = [name for p, name in names_of(model).items() if p.requires_grad and id(p) not in mine]
    if others and model not in _told:
        _told.add(model)
        warn(
            f"Outside the Fisher, which covers {partition}: {', '.join(partition.names)}; and left to the identity: "
            f"{', '.join(others)}."
        )
