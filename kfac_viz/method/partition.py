"""Layers as slices of one flat parameter vector: the subdomains of the two-level method."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from math import inf
from numbers import Integral

import torch
from torch import Tensor, nn

from .checks import check_number, check_type, finite
from .layers import Layer, computed, layers_of, modules_of, named, parameters_of


@dataclass(frozen=True)
class Partition:
    """Non-overlapping subdomains: how a flat vector of P numbers splits into layers.

    Layer l with weight ``(out, in)`` and bias ``(out,)`` is the matrix ``[W b]`` of shape
    ``(out, in + 1)``, flattened row-major. In that order the K-FAC block of layers l, m is
    ``kron(G_lm, A_lm)``.

    Attributes:
        total: how many trainable parameters the model has, those outside the partition included; None without a model.

    >>> P = Partition.from_sizes([2, 3])
    >>> P.size, P.slices
    (5, (slice(0, 2, None), slice(2, 5, None)))
    >>> [tuple(x.shape) for x in P.split(torch.zeros(5))]
    [(2, 1), (3, 1)]
    """

    layers: tuple[Layer, ...]
    total: int | None = field(default=None, compare=False)

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
        """The trainable layers of ``model`` (see :func:`layers_of`), in registration order.

        Args:
            model: any module; layers may be nested at any depth.
            layers: names of the layers to keep, or of modules, which stand for all layers inside; all by default.
                They are those of the plain model, also where it or a part of it is compiled or wrapped.

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
        return cls(tuple(found.values()), total)

    def without(self, names: Iterable[str]) -> Partition:
        """The partition without these layers."""
        left = set(names)
        return Partition(tuple(layer for layer in self.layers if layer.name not in left), self.total)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        return (0, *accumulate(layer.size for layer in self.layers))

    @cached_property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(a, b) for a, b in zip(self.offsets[:-1], self.offsets[1:], strict=True))

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

    def norms(self, matrix: Tensor) -> Tensor:
        """The Frobenius norm of each block of a matrix (P, P), (L, L).

        >>> Partition.from_sizes([1, 2]).norms(torch.tensor([[5.0, 0, 0], [0, 3, 0], [0, 0, 4]]))
        tensor([[5., 0.],
                [0., 5.]])
        """
        scale = matrix.abs().max().clamp_min(torch.finfo(matrix.dtype).tiny)  # so that no square over- or underflows
        squares = (matrix / scale).square_()
        rows = torch.stack([squares[s].sum(0) for s in self.slices])
        return scale * torch.stack([rows[:, s].sum(1) for s in self.slices], 1).sqrt()

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
        return self._packed(self.parameters(model))

    def pack_grad(self, model: nn.Module) -> Tensor:
        """The ``.grad`` of ``model`` as one vector (P,); a ValueError names a layer that has none."""
        grads = [[p.grad for p in own] for own in self.parameters(model)]
        for layer, own in zip(self.layers, grads, strict=True):
            if any(grad is None for grad in own):
                raise ValueError(f"Layer {layer.name!r} has no gradient; call loss.backward() first.")
        return self._packed(grads)

    @torch.no_grad()
    def _packed(self, tensors: list[list[Tensor]]) -> Tensor:
        v = tensors[0][0].new_empty(self.size)
        for layer, V, own in zip(self.layers, self.split(v), tensors, strict=True):
            for piece, x in zip(layer.pieces, own, strict=True):
                piece.view(V).copy_(piece.of(x))
        return v

    @torch.no_grad()
    def add_(self, model: nn.Module, v: Tensor, alpha: float = 1.0) -> None:
        """Add ``alpha * v`` to the parameters of ``model`` in place; what cannot be added changes nothing.

        Raises:
            ValueError: NaN or inf, naming the layer; another dtype or device than the model's; another model.
        """
        self.check(v, vector=True)
        parameters = self.parameters(model)
        for layer, (p, *_) in zip(self.layers, parameters, strict=True):
            if (v.dtype, v.device) != (p.dtype, p.device):
                raise ValueError(
                    f"Layer {layer.name!r} is {p.dtype} on {p.device}; the update is {v.dtype} on {v.device}. Convert "
                    "one of them."
                )
        self.check_finite(v, "The update")
        alpha = check_number("alpha", alpha, -inf, inf)
        check_number("alpha", alpha, -torch.finfo(v.dtype).max, torch.finfo(v.dtype).max)
        sums = []
        for layer, own, V in zip(self.layers, parameters, self.split(v), strict=True):
            for piece, p in zip(layer.pieces, own, strict=True):
                sums.append((piece.of(p), torch.add(piece.of(p), piece.view(V), alpha=alpha)))
        if not all(finite([after for _, after in sums])):
            raise ValueError(f"With this update the parameters overflow {v.dtype}; take a smaller alpha.")
        for p, after in sums:
            p.copy_(after)

    def parameters(self, model: nn.Module) -> list[list[nn.Parameter]]:
        """The parameters of every layer, one for each of its pieces; a ValueError if the model is another one."""
        check_type("model", model, nn.Module)
        found = layers_of(model)
        for layer in self.layers:
            if layer.name not in found:
                raise ValueError(f"The model has no layer {layer.name!r}; it is not the one captured.")
            if found[layer.name] != layer or not layer.pieces:
                raise ValueError(f"The model's layer {layer.name!r} no longer is {layer}; capture it again.")
        return self.own_parameters(model)

    def own_parameters(self, model: nn.Module) -> list[list[nn.Parameter]]:
        """As :meth:`parameters`, of the model that this partition is known to be of."""
        parameters = parameters_of(model)
        return [[parameters[piece.parameter] for piece in layer.pieces] for layer in self.layers]

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

    def __repr__(self) -> str:
        return f"Partition({self.size} parameters: {', '.join(map(str, self.layers))})"

    def __str__(self) -> str:
        sizes = [str(layer.size) for layer in self.layers]
        shown = sizes if len(sizes) <= 8 else [*sizes[:4], "…", *sizes[-2:]]
        of = f" of {self.total}" if self.total not in (None, self.size) else ""
        return f"{self.size}{of} parameters in {len(self)} layer{'s' * (len(self) > 1)} ({' + '.join(shown)})"


def inside(layer: str, name: str) -> bool:
    """Whether a layer is the one of this name, or in the module of this name."""
    return layer == name or layer.startswith(f"{name}.") or not name
