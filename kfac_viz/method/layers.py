"""Which parameters of a model form a layer: a matrix ``[W b]``, and the pieces of parameters that it is made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from .checks import check_count

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
MATRICES = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED, nn.Embedding)
Named = tuple[str, Tensor]  # a parameter with its name in the model


@dataclass(frozen=True)
class Piece:
    """A parameter, or some of its rows, as a rectangle in the matrix of its layer.

    Attributes:
        parameter: its name, as in :func:`parameters_of`.
        shape: of the parameter, or of the rows that are meant.
        top, left, height, width: where the rectangle lies in the matrix (out, features).
        rows: first and last row of the parameter, where the piece is not all of it: ``q`` of a packed attention weight.
        transposed: whether the rectangle is the transpose of the parameter or its rows: an embedding (words, out),
            a transposed convolution (in, out, …).
    """

    parameter: str
    shape: tuple[int, ...]
    top: int
    left: int
    height: int
    width: int
    rows: tuple[int, int] | None = None
    transposed: bool = False

    @property
    def first(self) -> int:
        """The first row of the parameter that is meant."""
        return 0 if self.rows is None else self.rows[0]

    def of(self, p: Tensor) -> Tensor:
        """What of the parameter p, or of anything in its shape, belongs to this piece: a view."""
        return p if self.rows is None else p[slice(*self.rows)]

    def view(self, V: Tensor) -> Tensor:
        """The rectangle of a layer's matrices V (..., out, features) in the shape of :meth:`of`: a view."""
        part = V[..., self.top : self.top + self.height, self.left : self.left + self.width]
        part = part.mT if self.transposed else part
        return part if part.shape[-2:] == self.shape else part.reshape((*part.shape[:-2], *self.shape))


@dataclass(frozen=True)
class Layer:
    """One layer as the matrix ``[W b]`` of shape ``(out, features)``; the bias is its last column.

    A ``vector`` layer is a column ``(out, 1)`` of parameters that act one by one, such as the scale and shift of a
    norm: its inputs are 1, and its output-side vectors are the scores themselves. The inputs of a ``table`` are the
    numbers of its columns: an embedding. In a layer of several ``groups``, each ``out / groups`` rows have inputs of
    their own: the channels that the group of a convolution sees.
    """

    name: str
    out: int
    features: int
    bias: bool = False
    vector: bool = False
    groups: int = 1
    pieces: tuple[Piece, ...] = field(default=(), compare=False)
    loose: bool = field(default=False, compare=False)  # a parameter of no module that is known: it may be anything
    table: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"The name of a layer is text; got {self.name!r}.")
        check_count(f"out of layer {self.name!r}", self.out, 0)
        check_count(f"features of layer {self.name!r}", self.features, 0)
        check_count(f"groups of layer {self.name!r}", self.groups, 1)
        if self.out % self.groups:
            raise ValueError(f"Layer {self.name!r} has {self.out} rows: not {self.groups} groups of one size.")

    @property
    def shape(self) -> tuple[int, int]:
        return self.out, self.features

    @property
    def unit(self) -> tuple[int, int]:
        """The shape of one group, for which K-FAC has a pair of factors."""
        return self.out // self.groups, self.features

    @property
    def axis(self) -> tuple[int, ...]:
        """The axis that counts the groups in front of everything there is for each: none for a single one."""
        return (self.groups,) if self.groups > 1 else ()

    @property
    def size(self) -> int:
        return self.out * self.features

    def __str__(self) -> str:
        if self.vector:
            return f"{self.name}: {self.out}"
        one = f"{self.features - self.bias}{'+1' * self.bias}→{self.out // self.groups}"
        return f"{self.name}: {one}" if self.groups == 1 else f"{self.name}: {self.groups} × ({one})"


def unwrapped(model: nn.Module) -> nn.Module:
    """The plain model inside ``torch.compile``, ``nn.DataParallel`` and the like; any other model as it is."""
    while (name := _held(model)) is not None:
        model = model._modules[name]
    return model


def _held(module: nn.Module) -> str | None:
    """The name under which a wrapper holds the module that it passes its calls on to; None if it is no wrapper."""
    if not isinstance(module, nn.Module):
        return None
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return "module"
    return next((name for name in ("_orig_mod", "_checkpoint_wrapped_module") if name in module._modules), None)


def modules_of(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module under every name that it has in the plain model: wrappers add nothing to the names."""
    yield name, model
    held = _held(model)
    for key, module in model._modules.items():
        if module is not None:
            yield from modules_of(module, name if key == held else _dotted(name, key))


def _dotted(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """By every name that a parameter has in the plain model (see :func:`modules_of`): a tied one has several."""
    own = ((name, module._parameters.items()) for name, module in modules_of(model))
    return {_dotted(name, key): p for name, items in own for key, p in items if p is not None}


def names_of(model: nn.Module) -> dict[nn.Parameter, str]:
    """The first of the names of every parameter."""
    names: dict[nn.Parameter, str] = {}
    for name, p in parameters_of(model).items():
        names.setdefault(p, name)
    return names


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
                own[key] = _dotted(name, key), p
        for layer in _layers_in(name, module, own):
            layers[layer.name] = layer
    return layers


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
            layer = _dotted(name, part)
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
