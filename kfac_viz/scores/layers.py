"""Which parameters of a model form a layer: for every kind of module, the matrix ``[W b]`` that it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..method.names import dotted, modules_of, parameters_of
from ..method.partition import Layer, Partition, Piece

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
MATRICES = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED, nn.Embedding)
Named = tuple[str, Tensor]  # a parameter with its name in the model


def layers_of(model: nn.Module) -> dict[str, Layer]:
    """Every layer that the parameters of a model make up, by name, in the order of its modules; trainable or not.

    Linear layers, convolutions and embeddings are a matrix each; so is the weight of a transposed convolution, whose
    bias is a vector of its own, called by its own name. Attention has ``q``, ``k``, ``v`` and its own ``out_proj``; the
    scale and shift of a norm are one vector. A parameter that two modules share belongs to the first of them.
    Parameters of other modules are layers by themselves, called by their own names. Those from which a weight is
    computed belong to none.

    Raises:
        ValueError: a parameter that is lazy and has no shape yet.
    """
    lazy = [name for name, p in parameters_of(model).items() if isinstance(p, nn.UninitializedParameter)]
    if lazy:
        raise ValueError(f"Parameter {lazy[0]!r} is lazy and has no shape yet; run the model once first.")
    claimed: set[int] = set()
    layers: dict[str, Layer] = {}
    for name, module in modules_of(model):
        if is_computed(module):
            claimed |= set(map(id, module.parameters()))
        own: dict[str, Named] = {}
        for key, p in module._parameters.items():
            if p is not None and id(p) not in claimed:
                claimed.add(id(p))
                own[key] = dotted(name, key), p
        for layer in _layers_in(name, module, own):
            layers[layer.name] = layer
    return layers


def partition_of(model: nn.Module, layers: Sequence[str] | None = None) -> Partition:
    """The trainable layers of ``model`` (see ``layers_of``), in registration order.

    Args:
        model: any module; layers may be nested at any depth.
        layers: names of the layers to keep, or of modules, which stand for all layers inside; all by default.
            They are those of the plain model, also where it or a part of it is compiled or wrapped.

    >>> partition_of(nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)))
    Partition(11 parameters: 0: 3+1→2, 2: 2+1→1)

    Raises:
        ValueError: no such layer, or a frozen or half-frozen one.
        TypeError: no module, or one of TorchScript, which cannot be watched.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected a torch.nn.Module; got {type(model).__name__}.")
    modules = dict(modules_of(model))
    scripts = [name for name, module in modules.items() if isinstance(module, torch.jit.ScriptModule)]
    scripted = scripts if layers is None else scripts[: "" in scripts]
    if scripted:
        raise TypeError(
            f"{f'Module {scripted[0]!r}' if scripted[0] else 'The model'} is TorchScript, inside which nothing can "
            "be watched; pass the module that it was made from."
        )
    parameters, found = parameters_of(model), layers_of(model)
    elsewhere = computed(model)
    if layers is not None and found:
        if not isinstance(layers, (list, tuple)) or not layers or not all(isinstance(x, str) for x in layers):
            raise ValueError(f"layers must be a list of names out of {list(found)}; got {layers!r}.")
        known = [*found, *elsewhere]
        unknown = [name for name in layers if not any(inside(x, name) for x in known)]
        if unknown:
            raise ValueError(f"Layers {unknown} are not among the model's layers {list(found)}.")
        found = {x: layer for x, layer in found.items() if any(inside(x, name) for name in layers)}
        elsewhere = [x for x in elsewhere if any(inside(x, name) for name in layers)]
    complex_ones = {
        name for name, layer in found.items() if any(parameters[x.parameter].is_complex() for x in layer.pieces)
    }
    real = {x: layer for x, layer in found.items() if x not in complex_ones}
    if complex_ones and (layers is not None or not real):
        raise ValueError(
            f"Layers {sorted(complex_ones)} have complex parameters, for which no Fisher is defined here. Keep "
            "real and imaginary part in a real parameter (torch.view_as_real), or name the others: "
            f"{named([*real])}."
        )
    found = real
    trainable = {
        name: [parameters[piece.parameter].requires_grad for piece in layer.pieces] for name, layer in found.items()
    }
    if layers is None:  # what has no inputs of its own is left where it is if it is frozen
        found = {x: layer for x, layer in found.items() if any(trainable[x]) or not (layer.vector or layer.loose)}
    kept = [name for name in found if all(trainable[name])]
    if elsewhere:
        raise ValueError(
            f"A parameter of layer {elsewhere[0]!r} is computed from others (weight norm, spectral norm, pruning). "
            f"Make it a plain one first, or name the others: {named(kept)}."
        )
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no nn.Linear, convolution, embedding, norm or attention layer, nor any "
            "parameter of its own."
        )
    frozen = [name for name in found if name not in kept]
    if frozen:
        raise ValueError(
            f"Layers {frozen} are frozen, in whole or in part (requires_grad=False). Unfreeze them, or name "
            f"the others: {named(kept)}."
        )
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Partition(tuple(found.values()), total)


def inside(layer: str, name: str) -> bool:
    """Whether a layer is the one of this name, or in the module of this name."""
    return layer == name or layer.startswith(f"{name}.") or not name


def _layers_in(name: str, module: nn.Module, own: dict[str, Named]) -> Iterator[Layer]:
    """The layers of one module; ``own`` are its parameters that no module before has."""
    left = dict(own)
    if isinstance(module, nn.Embedding) and "weight" in own:
        weight_name, weight = left.pop("weight")
        words, out = weight.shape
        piece = Piece(weight_name, (words, out), 0, 0, out, words, transposed=True)
        yield Layer(name, out, words, pieces=(piece,), table=True)
    elif is_gpt2_linear(module) and "weight" in own:
        yield _matrix(name, left.pop("weight"), left.pop("bias", None), transposed=True)
    elif isinstance(module, TRANSPOSED) and "weight" in own:
        yield _transposed_convolution(name, left.pop("weight"), module.groups)
        if "bias" in left:
            bias = left.pop("bias")
            yield _vector(bias[0], bias)
    elif isinstance(module, MATRICES) and "weight" in own:
        groups = getattr(module, "groups", 1)
        yield _matrix(name, left.pop("weight"), left.pop("bias", None), groups=groups)
    elif isinstance(module, NORMS) and own:
        yield _vector(name, *own.values())
        left = {}
    elif isinstance(module, nn.MultiheadAttention):
        bias, E = left.pop("in_proj_bias", None), module.embed_dim
        for i, part in enumerate("qkv"):
            rows, weight = (i * E, (i + 1) * E), left.pop(f"{part}_proj_weight", None)
            layer = dotted(name, part)
            if "in_proj_weight" in own:
                yield _matrix(layer, own["in_proj_weight"], bias, rows, rows)
            elif weight is not None:
                yield _matrix(layer, weight, bias, bias_rows=rows)
        left.pop("in_proj_weight", None)
        if bias is not None and not {"in_proj_weight", "q_proj_weight"} & own.keys():  # of shared weights
            left["in_proj_bias"] = bias
    for parameter, p in left.values():
        if p.numel():
            yield _loose(parameter, p)


def _matrix(
    name: str,
    weight: Named,
    bias: Named | None = None,
    rows: tuple[int, int] | None = None,
    bias_rows: tuple[int, int] | None = None,
    *,
    transposed: bool = False,
    groups: int = 1,
) -> Layer:
    """``[W b]`` of a weight (out, …), or ``transposed`` (in, out), and a bias (out,), or of some of their rows."""
    weight_name, W = weight
    out, width = W.shape[0] if rows is None else rows[1] - rows[0], W.shape[1:].numel()
    shape = (out, *W.shape[1:])
    if transposed:
        out, width = width, out
    pieces = [Piece(weight_name, shape, 0, 0, out, width, rows, transposed)]
    if bias is not None:
        pieces.append(Piece(bias[0], (out,), 0, width, out, 1, bias_rows))
    features, has_bias = width + (bias is not None), bias is not None
    return Layer(name, out, features, has_bias, groups=groups, pieces=tuple(pieces))


def _transposed_convolution(name: str, weight: Named, groups: int) -> Layer:
    """A weight (in, out / groups, *kernel) as the matrix (out · kernel, in / groups) that spreads each pixel of the
    input over a patch of the output: a convolution's with the roles of inputs and outputs exchanged.

    Its bias is added to pixels of the output, not to patches, and belongs to no column of it.
    """
    weight_name, W = weight
    features, height = len(W) // groups, W.shape[1:].numel()
    shape, pieces = (features, *W.shape[1:]), []
    for i in range(groups):
        rows = (i * features, (i + 1) * features) if groups > 1 else None
        pieces.append(Piece(weight_name, shape, i * height, 0, height, features, rows, transposed=True))
    return Layer(name, groups * height, features, groups=groups, pieces=tuple(pieces))


def _vector(name: str, *parameters: Named, loose: bool = False) -> Layer:
    """Parameters of any shape, one below the other in a column."""
    pieces, top = [], 0
    for key, p in parameters:
        pieces.append(Piece(key, tuple(p.shape), top, 0, p.numel(), 1))
        top += p.numel()
    return Layer(name, top, 1, vector=True, pieces=tuple(pieces), loose=loose)


def _loose(name: str, p: Tensor) -> Layer:
    """A parameter of its own: a matrix if it has more than one axis longer than 1, else a vector."""
    sizes = [n for n in p.shape if n > 1]
    if len(sizes) < 2:
        return _vector(name, (name, p), loose=True)
    out, width = sizes[0], p.numel() // sizes[0]
    return Layer(name, out, width, pieces=(Piece(name, tuple(p.shape), 0, 0, out, width),), loose=True)


def is_gpt2_linear(module: nn.Module) -> bool:
    """Whether a module is the linear layer of GPT-2's published code, ``Conv1D``, with a weight (in, out)."""
    weight, bias = (module._parameters.get(key) for key in ("weight", "bias"))
    fits = weight is not None and bias is not None and weight.ndim == 2 and bias.shape == weight.shape[1:]
    return type(module).__name__ == "Conv1D" and fits


def computed(model: nn.Module) -> list[str]:
    """Names of the modules whose weight or bias is computed from other tensors."""
    names: dict[nn.Module, str] = {}
    for name, module in modules_of(model):
        if is_computed(module):
            names.setdefault(module, name)
    return list(names.values())


def named(others: Sequence[str]) -> str:
    """How to ask for these layers alone, at the end of a sentence."""
    return f"layers={list(others)}" if others else "no other layer is left"


def is_computed(module: nn.Module) -> bool:
    """Whether a layer's weight or bias is computed from other tensors (weight norm, spectral norm, pruning).

    Such a weight must not even be looked at: reading it may change it.
    """
    own = module._parameters
    if not isinstance(module, MATRICES):
        return False
    return not isinstance(own.get("weight"), nn.Parameter) or (
        not isinstance(module, nn.Embedding) and "bias" not in own
    )
