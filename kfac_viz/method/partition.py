"""Layers as slices of one flat parameter vector: the subdomains of the two-level method."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import inf
from numbers import Integral

import torch
from torch import Tensor, nn

from .checks import check_count, check_number, check_type, finite
from .stacks import Stacks


@dataclass(frozen=True)
class Layer:
    """One layer as the matrix ``[W b]`` of shape ``(out, features)``; the bias is its last column."""

    name: str
    out: int
    features: int
    bias: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"The name of a layer is text; got {self.name!r}.")
        check_count(f"out of layer {self.name!r}", self.out, 0)
        check_count(f"features of layer {self.name!r}", self.features, 0)

    @property
    def shape(self) -> tuple[int, int]:
        return self.out, self.features

    @property
    def size(self) -> int:
        return self.out * self.features

    def __str__(self) -> str:
        bias = "+1" if self.bias else ""
        return f"{self.name}: {self.features - self.bias}{bias}→{self.out}"


@dataclass(frozen=True)
class Partition:
    """Non-overlapping subdomains: how a flat vector of P numbers splits into layers.

    Layer l with weight ``(out, in)`` and bias ``(out,)`` is the matrix ``[W b]`` of shape
    ``(out, in + 1)``, flattened row-major. In that order the K-FAC block of layers l, m is
    ``kron(G_lm, A_lm)``.

    >>> P = Partition.from_sizes([2, 3])
    >>> P.size, P.slices
    (5, (slice(0, 2, None), slice(2, 5, None)))
    >>> [tuple(x.shape) for x in P.split(torch.zeros(5))]
    [(2, 1), (3, 1)]
    """

    layers: tuple[Layer, ...]

    def __post_init__(self) -> None:
        layers = tuple(self.layers) if isinstance(self.layers, Iterable) else (self.layers,)
        if not all(isinstance(layer, Layer) for layer in layers):
            raise TypeError(f"A Partition is made of Layers; got {', '.join({type(x).__name__ for x in layers})}.")
        object.__setattr__(self, "layers", layers)
        if not self.layers:
            raise ValueError("A Partition needs at least one layer; none came.")
        empty = [layer.name for layer in self.layers if layer.size < 1]
        if empty:
            raise ValueError(f"Layers {empty} have no parameters.")
        names = [layer.name for layer in self.layers]
        if len(set(names)) < len(names):
            raise ValueError(f"Layer names must differ; got {names}.")

    @classmethod
    def from_sizes(cls, sizes: Iterable[int], names: Sequence[str] | None = None) -> Partition:
        """Subdomains of given sizes without a network behind them, each a column ``(size, 1)``."""
        if not isinstance(sizes, Iterable) or not (names is None or isinstance(names, Iterable)):
            raise TypeError(f"Expected a list of sizes, and of names or None; got {sizes!r} and {names!r}.")
        sizes = list(sizes)
        if not all(isinstance(size, Integral) and size > 0 for size in sizes):
            raise ValueError(f"Subdomain sizes must be positive whole numbers; got {sizes}.")
        names = [str(i) for i in range(len(sizes))] if names is None else list(names)
        if len(names) != len(sizes):
            raise ValueError(f"Expected one name per subdomain: {len(sizes)} sizes, {len(names)} names.")
        return cls(tuple(Layer(name, int(size), 1) for name, size in zip(names, sizes, strict=True)))

    @classmethod
    def from_model(cls, model: nn.Module, layers: Sequence[str] | None = None) -> Partition:
        """The trainable ``nn.Linear`` and ``nn.Conv2d`` layers of ``model``, in registration order.

        Args:
            model: any module; layers may be nested at any depth.
            layers: names of the layers to keep (as in ``model.named_modules()``); all by default.

        Raises:
            ValueError: no such layer, a frozen or half-frozen one, or a parameter shared with another module.
            TypeError: no module, or one of TorchScript, which cannot be watched.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"Expected a torch.nn.Module; got {type(model).__name__}.")
        modules = dict(model.named_modules())
        scripts = [name for name, module in modules.items() if isinstance(module, torch.jit.ScriptModule)]
        scripted = scripts if layers is None else scripts[: "" in scripts]
        if scripted:
            raise TypeError(
                f"{f'Module {scripted[0]!r}' if scripted[0] else 'The model'} is TorchScript, inside which nothing can "
                "be watched; pass the module that it was made from."
            )
        lazy = [name for name, p in model.named_parameters() if isinstance(p, nn.UninitializedParameter)]
        if lazy:
            raise ValueError(f"Parameter {lazy[0]!r} is lazy and has no shape yet; run the model once first.")
        found = {name: module for name, module in modules.items() if is_kronecker_layer(module)}
        if layers is not None and found:
            if not isinstance(layers, (list, tuple)) or not layers or not all(isinstance(x, str) for x in layers):
                raise ValueError(f"layers must be a list of names out of {list(found)}; got {layers!r}.")
            unknown = [name for name in layers if name not in found]
            if unknown:
                raise ValueError(f"Layers {unknown} are not among the model's layers {list(found)}.")
            found = {name: module for name, module in found.items() if name in layers}
        if not found:
            raise ValueError(
                f"{type(model).__name__} has no nn.Linear or ungrouped nn.Conv2d layer; "
                "the Fisher of this package lives on such layers."
            )
        frozen = [name for name, module in found.items() if not all(p.requires_grad for p in module.parameters())]
        if frozen:
            raise ValueError(
                f"Layers {frozen} are frozen, in whole or in part (requires_grad=False). Unfreeze them, or name "
                "the layers to keep with layers=[...]."
            )
        for name, module in found.items():
            if own_parameters(module) is None:
                raise ValueError(
                    f"A parameter of layer {name!r} is computed from others (weight norm, spectral norm, "
                    "pruning); make it a plain one first, or name the other layers with layers=[...]."
                )
        owner: dict[int, str] = {}
        for name, module in modules.items():
            for p in module.parameters(recurse=False):
                other = owner.setdefault(id(p), name)
                if other != name and (name in found or other in found):
                    raise ValueError(
                        f"Modules {other!r} and {name!r} share a parameter, and then neither has a Fisher of its own; "
                        "call one module twice instead, which is captured exactly."
                    )
        return cls(tuple(describe(name, module) for name, module in found.items()))

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        return (0, *accumulate(layer.size for layer in self.layers))

    @cached_property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(a, b) for a, b in zip(self.offsets[:-1], self.offsets[1:], strict=True))

    @cached_property
    def stacks(self) -> Stacks:
        """How vectors become one tensor per shape of layer."""
        return Stacks([layer.shape for layer in self.layers])

    @property
    def size(self) -> int:
        """P, the number of parameters."""
        return self.offsets[-1]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(layer.name for layer in self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def index(self, layer: int | str) -> int:
        """Position of a layer given by number or by name."""
        if isinstance(layer, str):
            if layer not in self.names:
                raise ValueError(f"No layer is called {layer!r}; the layers are {list(self.names)}.")
            return self.names.index(layer)
        if not isinstance(layer, Integral) or isinstance(layer, bool):
            raise TypeError(f"A layer is given by its number or its name; got {layer!r}.")
        if not -len(self) <= layer < len(self):
            raise ValueError(f"Layer {layer} does not exist: there are {len(self)} layers.")
        return layer % len(self)

    def split(self, v: Tensor) -> list[Tensor]:
        """Views of ``v`` (P,) or (P, k) as one matrix per layer: (out, features) or (out, features, k)."""
        self.check(v)
        return [v[s].unflatten(0, layer.shape) for s, layer in zip(self.slices, self.layers, strict=True)]

    def matrices(self, v: Tensor) -> list[Tensor]:
        """Views of ``v`` (..., P), whose vectors are rows, as one matrix (..., out, features) per layer."""
        return [v[..., s].unflatten(-1, layer.shape) for s, layer in zip(self.slices, self.layers, strict=True)]

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """The inverse of :meth:`split`."""
        if not isinstance(pieces, Sequence) or not all(isinstance(piece, Tensor) for piece in pieces):
            raise TypeError(f"Expected a list of {len(self)} tensors, one per layer; got {type(pieces).__name__}.")
        if len(pieces) != len(self):
            raise ValueError(f"Expected {len(self)} pieces, one per layer; got {len(pieces)}.")
        for layer, piece in zip(self.layers, pieces, strict=True):
            if tuple(piece.shape[:2]) != layer.shape:
                raise ValueError(f"Layer {layer.name!r} has shape {layer.shape}; got {tuple(piece.shape)}.")
        return torch.cat([piece.flatten(0, 1) for piece in pieces])

    def pack(self, model: nn.Module) -> Tensor:
        """The parameters of ``model`` as one vector (P,), detached copies."""
        return self.join([_matrix(module.weight, module.bias).detach() for module in self._modules(model)])

    def pack_grad(self, model: nn.Module) -> Tensor:
        """The ``.grad`` of ``model`` as one vector (P,); a ValueError names a layer that has none."""
        pieces = []
        for layer, module in zip(self.layers, self._modules(model), strict=True):
            grads = [p.grad for p in own_parameters(module)]
            if any(grad is None for grad in grads):
                raise ValueError(f"Layer {layer.name!r} has no gradient; call loss.backward() first.")
            pieces.append(_matrix(*grads) if layer.bias else _matrix(grads[0], None))
        return self.join(pieces)

    @torch.no_grad()
    def add_(self, model: nn.Module, v: Tensor, alpha: float = 1.0) -> None:
        """Add ``alpha * v`` to the parameters of ``model`` in place; what cannot be added changes nothing.

        Raises:
            ValueError: NaN or inf, naming the layer; another dtype or device than the model's; another model.
        """
        self.check(v, vector=True)
        modules = self._modules(model)
        for layer, module in zip(self.layers, modules, strict=True):
            if (v.dtype, v.device) != (module.weight.dtype, module.weight.device):
                raise ValueError(
                    f"Layer {layer.name!r} is {module.weight.dtype} on {module.weight.device}; the update is {v.dtype} "
                    f"on {v.device}. Convert one of them."
                )
        self.check_finite(v, "The update")
        alpha = check_number("alpha", alpha, -inf, inf)
        check_number("alpha", alpha, -torch.finfo(v.dtype).max, torch.finfo(v.dtype).max)
        sums = []
        for layer, module, piece in zip(self.layers, modules, self.split(v), strict=True):
            weight = piece[:, : layer.features - layer.bias].reshape(module.weight.shape)
            sums.append((module.weight, torch.add(module.weight, weight, alpha=alpha)))
            if layer.bias:
                sums.append((module.bias, torch.add(module.bias, piece[:, -1], alpha=alpha)))
        if not all(finite([after for _, after in sums])):
            raise ValueError(f"With this update the parameters overflow {v.dtype}; take a smaller alpha.")
        for p, after in sums:
            p.copy_(after)

    def check(self, v: Tensor, *, vector: bool = False) -> None:
        """Refuse what is not a tensor of shape (P,) or, unless ``vector``, (P, k)."""
        if not isinstance(v, Tensor):
            raise TypeError(f"Expected a tensor of {self.size} numbers; got {type(v).__name__}.")
        if v.layout != torch.strided:
            raise TypeError(f"Expected a dense tensor; got one of layout {v.layout}. Call .to_dense() first.")
        if v.ndim not in ((1,) if vector else (1, 2)) or v.shape[0] != self.size:
            allowed = f"({self.size},)" if vector else f"({self.size},) or ({self.size}, k)"
            raise ValueError(f"Expected shape {allowed} for {self}; got {tuple(v.shape)}.")

    def check_finite(self, v: Tensor, what: str) -> None:
        """Refuse NaN and inf in ``v`` (P,) or (P, k), naming the layer that holds them."""
        if not finite([v])[0]:
            bad = [layer.name for layer, s in zip(self.layers, self.slices, strict=True) if not v[s].isfinite().all()]
            raise ValueError(f"{what} holds NaN or inf in layer {', '.join(map(repr, bad))}.")

    def _modules(self, model: nn.Module) -> list[nn.Module]:
        check_type("model", model, nn.Module)
        modules = []
        for layer in self.layers:
            try:
                module = model.get_submodule(layer.name)
            except AttributeError:
                raise ValueError(f"The model has no layer {layer.name!r}; it is not the one captured.") from None
            if not is_kronecker_layer(module) or describe(layer.name, module) != layer:
                raise ValueError(f"The model's layer {layer.name!r} no longer is {layer}; capture it again.")
            modules.append(module)
        return modules

    def __repr__(self) -> str:
        return f"Partition({self.size} parameters: {', '.join(map(str, self.layers))})"

    def __str__(self) -> str:
        sizes = [str(layer.size) for layer in self.layers]
        shown = sizes if len(sizes) <= 8 else [*sizes[:4], "…", *sizes[-2:]]
        return f"{self.size} parameters in {len(self)} layer{'s' * (len(self) > 1)} ({' + '.join(shown)})"


def is_kronecker_layer(module: nn.Module) -> bool:
    """Whether a layer's score is a sum of outer products g aᵀ: Linear, and Conv2d without groups.

    A subclass with a forward pass of its own may do anything with its weight, so it is not one.
    """
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and type(module).forward is nn.Conv2d.forward
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def own_parameters(module: nn.Module) -> list[nn.Parameter] | None:
    """Weight and, if there is one, bias of a layer; None where one is computed from other tensors.

    A parametrised weight must not even be looked at: reading it may change it (spectral norm).
    """
    own = module._parameters
    if not isinstance(own.get("weight"), nn.Parameter) or "bias" not in own:
        return None
    return [p for p in (own["weight"], own["bias"]) if p is not None]


def describe(name: str, module: nn.Module) -> Layer:
    """The layer that a Linear or Conv2d module is."""
    bias = module.bias is not None
    return Layer(name, module.weight.shape[0], module.weight.shape[1:].numel() + bias, bias)


def _matrix(weight: Tensor, bias: Tensor | None) -> Tensor:
    """``[W b]``; the kernel of a convolution is read as (out, channels · height · width)."""
    weight = weight.flatten(1)
    return weight if bias is None else torch.cat([weight, bias[:, None]], dim=1)
