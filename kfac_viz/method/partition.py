"""Layers as slices of one flat parameter vector: the subdomains of the two-level method.

A layer is a matrix ``[W b]``, and the pieces of parameters that it is made of.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from math import inf
from numbers import Integral

import torch
from torch import Tensor, nn

from .checks import check_count, check_number, check_type, finite
from .names import parameters_of


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
    loose: bool = field(default=False, compare=False)  # an nn.Parameter outside any known layer type
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
            raise ValueError("A Partition needs at least one layer; got none.")
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
        known = parameters_of(model)
        for layer in self.layers:
            for piece in layer.pieces:
                p = known.get(piece.parameter)
                if p is None:
                    raise ValueError(
                        f"The model has no parameter {piece.parameter!r} of layer {layer.name!r}; it is not the one "
                        "captured."
                    )
                if tuple(piece.of(p).shape) != piece.shape:
                    raise ValueError(f"The model's layer {layer.name!r} no longer is {layer}; capture it again.")
            if not layer.pieces:
                raise ValueError(f"Layer {layer.name!r} has no parameters in any model.")
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
