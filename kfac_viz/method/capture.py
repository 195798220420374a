"""One pass through a network gives everything: layer inputs, and output vectors pulled back to the layers.

Normal form, whatever the layer was: inputs ``a`` (N, T, features) with a 1 appended where there is a bias,
output-side vectors ``g`` (S, N, T, out). T counts the positions at which one example uses the layer: 1 for a
plain MLP, the product of the extra axes, the pixels of a convolution, or the number of calls. The score of
(s, n) is ``Σ_t g[s, n, t] a[n, t]ᵀ``.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from .checks import check_choice, check_count, check_type, warn
from .fisher import Fisher
from .likelihood import FLAVOURS, LIKELIHOODS, check_outputs, output_vectors
from .partition import Partition, all_finite

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
    """The Fisher of ``model`` on ``inputs``, as an operator over its Linear (and Conv2d) layers.

    One forward pass in eval mode and one batched backward pass to the pre-activations; no weight gradient is
    formed. Training flags, ``.grad``, ``requires_grad``, batch-norm statistics and the caller's random state
    are afterwards what they were. Autocast is off inside; half precisions are kept in float32 once captured.

    Args:
        model: weights and ``inputs`` share one floating dtype and one device.
        inputs: a batch (N, …), or a tuple of arguments of the model.
        targets: the true labels, for ``fisher="empirical"`` only (shapes: see :func:`kfac_viz.nll`).
        likelihood: ``"categorical"``, ``"bernoulli"`` or ``"gaussian"``.
        fisher: ``"exact"`` (equal to the GGN for these likelihoods), ``"mc"`` (labels drawn from the model)
            or ``"empirical"``.
        samples: draws per example for ``"mc"``.
        generator: source of those draws, on the model's device; a fresh one seeded with 0 by default.
        layers: names of the layers to keep; all of them by default.

    Raises:
        ValueError, TypeError: what cannot be captured, in words: no layer, frozen layers, an empty batch,
            NaN or inf (naming the layer), wrong shapes, mixed dtype or device, targets missing or unasked for,
            batch norm without running statistics (it couples the examples).

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
    model = getattr(model, "_orig_mod", model)  # a compiled model runs without hooks; its original has them
    partition = Partition.from_model(model, layers)
    inputs = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    check_inputs(model, partition, inputs)
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"Batch norm {name!r} keeps no running statistics and couples the examples, so that no per-example "
                "Fisher exists; build it with track_running_stats=True."
            )
    if generator is not None:
        check_type("generator", generator, torch.Generator)
        if generator.device.type != inputs[0].device.type:
            raise ValueError(f"The generator is on {generator.device}, the inputs are on {inputs[0].device}.")
    tell_others(model, partition)
    device = inputs[0].device
    with (
        evaluation(model),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        torch.inference_mode(False),
        torch.autocast(device.type, enabled=False),
    ):
        inputs = tuple(x.clone() if x.is_inference() else x for x in inputs)
        return observed(
            model,
            inputs,
            partition,
            likelihood=likelihood,
            fisher=fisher,
            targets=targets,
            samples=samples,
            generator=generator,
        )[0]


def observed(
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
) -> tuple[Fisher, tuple[str, ...]]:
    """The Fisher in the mode that the model is in, and the names of the layers that took part.

    With ``partial``, a layer that took none has zero vectors, which is its exact share; otherwise it is refused.
    Vectors are kept in the precision of the parameters and at least in float32.
    """
    outputs, a, edges = record(model, inputs, partition, partial=partial)
    check_finite(partition, a, "the inputs")
    if not all_finite(outputs):
        raise ValueError("The model's outputs hold NaN or inf; look at its inputs and weights.")
    vectors = output_vectors(outputs, likelihood, fisher, targets=targets, samples=samples, generator=generator)
    pulled = iter(pull_back(outputs, vectors, [calls for calls in edges if calls]))
    g = [
        next(pulled) if calls else vectors.new_zeros(*vectors.shape[:2], 1, layer.out)
        for calls, layer in zip(edges, partition.layers, strict=True)
    ]
    check_finite(partition, g, "the output-side vectors")
    seen = tuple(name for name, calls in zip(partition.names, edges, strict=True) if calls)
    dtype = torch.promote_types(model.get_submodule(partition.names[0]).weight.dtype, torch.float32)
    a, g = [x.to(dtype) for x in a], [x.to(dtype) for x in g]
    return Fisher(partition, a, g, likelihood=likelihood, flavour=fisher), seen


def record(
    model: nn.Module, inputs: tuple[Tensor, ...], partition: Partition, *, partial: bool = False
) -> tuple[Tensor, list[Tensor], list[list]]:
    """Run the model once; return outputs, layer inputs (N, T, features) and the edges of the pre-activations.

    A gradient edge, unlike the tensor, still means the pre-activation after an in-place ``ReLU``. With
    ``partial``, a layer that took no part has inputs of zeros and no edges; otherwise it is refused.
    """
    calls: dict[str, list] = {name: [] for name in partition.names}

    def keep(name: str):
        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            _check_layer_input(name, module, args[0] if args else kwargs["input"])

        def after(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            if not output.requires_grad:
                raise ValueError(f"Layer {name!r} runs without gradients (torch.no_grad); no score can be had there.")
            edge = torch.autograd.graph.get_gradient_edge(output)
            x = args[0] if args else kwargs["input"]
            calls[name].append((_positions_in(module, x.detach()), edge, output.shape, isinstance(module, nn.Conv2d)))

        return before, after

    with ExitStack() as stack, torch.enable_grad():
        for name in partition.names:
            module, (before, after) = model.get_submodule(name), keep(name)
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            # First among the hooks: one of the model's own may change the output, and edge would not be g's.
            stack.callback(module.register_forward_hook(after, with_kwargs=True, prepend=True).remove)
        outputs = model(*inputs)
    unused = [name for name, made in calls.items() if not made]
    if unused and not (partial and len(unused) < len(calls)):
        raise ValueError(f"Layers {unused} took no part in the forward pass; name the others with layers=[...].")
    check_outputs(outputs)
    N, a = outputs.shape[0], []
    for layer, (name, made) in zip(partition.layers, calls.items(), strict=True):
        if not made:
            a.append(outputs.new_zeros(N, 1, layer.features).detach())
            continue
        for x, *_ in made:
            if x.shape[0] != N:
                raise ValueError(
                    f"Layer {name!r} saw {x.shape[0]} rows where the model returned {N} examples: keep "
                    "the examples on the first axis, so that scores can be told apart."
                )
        a.append(made[0][0] if len(made) == 1 else torch.cat([x for x, *_ in made], dim=1))
    return outputs, a, [[call[1:] for call in made] for made in calls.values()]


def pull_back(outputs: Tensor, vectors: Tensor, edges: list[list]) -> list[Tensor]:
    """Gradients of ``outputs`` along ``vectors`` (S, *outputs.shape) at the pre-activations: (S, N, T, out)."""
    flat = [call for calls in edges for call in calls]
    targets = [edge for edge, *_ in flat]
    if vectors.shape[0] == 1:
        grads = torch.autograd.grad(outputs, targets, vectors[0], allow_unused=True)
        grads = [None if grad is None else grad[None] for grad in grads]
    else:
        grads = torch.autograd.grad(outputs, targets, vectors, is_grads_batched=True, allow_unused=True)
    pieces = iter(
        _positions_out(vectors.new_zeros(len(vectors), *shape) if grad is None else grad, conv)
        for grad, (_, shape, conv) in zip(grads, flat, strict=True)
    )
    layers = [[next(pieces) for _ in calls] for calls in edges]
    return [made[0] if len(made) == 1 else torch.cat(made, dim=2) for made in layers]


def _check_layer_input(name: str, module: nn.Module, x: Tensor) -> None:
    """Say in words, before PyTorch does, that an input does not fit its layer."""
    if isinstance(module, nn.Conv2d):
        fits, expected = x.ndim == 4 and x.shape[1] == module.in_channels, f"(N, {module.in_channels}, height, width)"
    else:
        fits, expected = x.ndim >= 2 and x.shape[-1] == module.in_features, f"(N, …, {module.in_features})"
    if not fits or not x.is_floating_point():
        raise ValueError(
            f"Layer {name!r} expects floating point inputs of shape {expected}; got {tuple(x.shape)}, {x.dtype}."
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


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Eval mode, with every module's own training flag restored."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in flags:
            if module.training != training:
                module.training = training


def check_inputs(model: nn.Module, partition: Partition, inputs: tuple[Tensor, ...]) -> None:
    """Refuse an empty batch, non-finite data or weights, and mixed dtypes or devices."""
    if not inputs or not all(isinstance(x, Tensor) for x in inputs):
        raise TypeError(f"inputs must be tensors; got {[type(x).__name__ for x in inputs]}.")
    if inputs[0].ndim < 1 or inputs[0].shape[0] == 0:
        raise ValueError(f"The batch is empty: inputs have shape {tuple(inputs[0].shape)}.")
    weights = {name: model.get_submodule(name).weight for name in partition.names}
    first = next(iter(weights.values()))
    for name, p in weights.items():
        if (p.dtype, p.device) != (first.dtype, first.device):
            raise ValueError(
                f"Layer {name!r} is {p.dtype} on {p.device}, layer {partition.names[0]!r} is {first.dtype} on "
                f"{first.device}; one dtype and device are needed."
            )
        bias = model.get_submodule(name).bias
        if not all_finite(p) or (bias is not None and not all_finite(bias)):
            raise ValueError(f"The weights of layer {name!r} hold NaN or inf.")
    for x in inputs:
        if x.device != first.device or (x.is_floating_point() and x.dtype != first.dtype):
            raise ValueError(f"The model is {first.dtype} on {first.device}, the inputs {x.dtype} on {x.device}.")
        if x.is_floating_point() and not all_finite(x):
            raise ValueError("The inputs of the model hold NaN or inf.")


def check_finite(partition: Partition, tensors: list[Tensor], what: str) -> None:
    """Refuse captured tensors with NaN or inf, naming the first layer that has them."""
    for name, x in zip(partition.names, tensors, strict=True):
        if not all_finite(x):
            raise ValueError(f"{what[0].upper()}{what[1:]} of layer {name!r} hold NaN or inf.")


def tell_others(model: nn.Module, partition: Partition) -> tuple[str, ...]:
    """Names of the trainable parameters outside the partition; a warning says them once per model."""
    mine = {id(p) for name in partition.names for p in model.get_submodule(name).parameters(recurse=False)}
    others = tuple(name for name, p in model.named_parameters() if p.requires_grad and id(p) not in mine)
    if others and model not in _told:
        _told.add(model)
        warn(
            f"Outside the Fisher, which covers {', '.join(partition.names)}, and left to the identity: "
            f"{', '.join(others)}."
        )
    return others
