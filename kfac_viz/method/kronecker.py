"""Kronecker factors: what K-FAC keeps of every layer, and their eigenvectors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, compress
from math import inf

import torch
from torch import Tensor

from .checks import check_room, check_type
from .decompositions import Eigen, eigenpairs, psd_eigens
from .partition import Partition
from .stacks import Stacks

CONVENTIONS = ("expand", "reduce")


@dataclass(frozen=True, eq=False)
class KroneckerFactors:
    """``A_l`` (features, features) and ``G_l`` (out, out) of every layer, with block ``G_l ⊗ A_l``.

    An A that is a vector (features,) is a diagonal matrix: that of an embedding. A layer of several groups has a
    stack of both, (groups, …), and its block is that of each group, with zeros between them.

    >>> layer = Partition.from_sizes([2])  # a column, with G (2, 2) and A (1, 1)
    >>> factors = KroneckerFactors(layer, (torch.tensor([[2.0]]),), (torch.tensor([[1.0, 0.0], [0.0, 3.0]]),))
    >>> factors.blocks()
    [tensor([[2., 0.],
            [0., 6.]])]

    Attributes:
        undetermined: layers whose scores have no nearest product in KL, so that its floor or its last turn decided
            (``FLOOR`` and ``TURNS`` of ``method/products.py``); none under the other rules.
    """

    partition: Partition
    A: tuple[Tensor, ...]
    G: tuple[Tensor, ...]
    undetermined: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_type("partition", self.partition, Partition)
        for what in "AG":
            check_type(what, getattr(self, what), list, tuple)
        if not self.A or not all(isinstance(X, Tensor) for X in (*self.A, *self.G)):
            raise TypeError("Kronecker factors are tensors, one A and one G per layer.")
        if len({(X.dtype, X.device) for X in (*self.A, *self.G)}) > 1 or self.dtype not in (
            torch.float32,
            torch.float64,
        ):
            found = sorted({f"{X.dtype} on {X.device}" for X in (*self.A, *self.G)})
            raise TypeError(f"Kronecker factors must all be float32 or all float64, on one device; got {found}.")
        layers = self.partition.layers
        for what, factors, sizes in (
            ("A", self.A, [layer.features for layer in layers]),
            ("G", self.G, [layer.unit[0] for layer in layers]),
        ):
            shapes = [tuple(X.shape) for X in factors]
            expected = [(*layer.axis, n, n) for layer, n in zip(layers, sizes, strict=True)]
            fits = [shape == full or (what == "A" and shape == full[:-1]) for shape, full in zip(shapes, expected)]  # noqa: B905
            if len(shapes) != len(expected) or not all(fits):
                raise ValueError(f"Factors {what} must have shapes {expected}, one per layer; got {shapes}.")

    @property
    def dtype(self) -> torch.dtype:
        return self.A[0].dtype

    @property
    def device(self) -> torch.device:
        return self.A[0].device

    def dense_A(self, l: int) -> Tensor:
        """A of layer l as a matrix, or as one for each of its groups."""
        A = self.A[l]
        if A.ndim == self.G[l].ndim:
            return A
        name, size = self.partition.names[l], A.numel() * A.shape[-1]
        check_room(f"Factor A of layer {name!r} as a matrix", size, A, "it is a diagonal, which is in A")
        return A.diag_embed()

    def called(self, l: int) -> list[str]:
        """What layer l is called in a sentence, or each of its groups."""
        layer = self.partition.layers[l]
        name = f"layer {layer.name!r}"
        return [name] if layer.groups == 1 else [f"group {i} of {name}" for i in range(layer.groups)]

    def blocks(self, damping: float = 0.0) -> list[Tensor]:
        """``G ⊗ A`` of every layer as a matrix (P_l, P_l), with zeros between its groups; with damping, what the
        factored rule inverts."""
        layers = zip(self.G, map(self.dense_A, range(len(self.A))), self.shifts(damping), strict=True)
        return [_kron(shifted(G, for_G), shifted(A, for_A)) for G, A, (for_G, for_A) in layers]

    def basis(self) -> list[Tensor]:
        """``U_G ⊗ U_A`` of every layer, (P_l, P_l): the eigenvectors of its block, group by group."""
        return [_kron(G.vectors(), A.vectors()) for G, A in zip(self.eigen_G, self.eigen_A, strict=True)]

    @cached_property
    def stacks(self) -> Stacks:
        """How layers become one tensor per shape, here also of A."""
        layers = self.partition.layers
        diagonal = [A.ndim < G.ndim for A, G in zip(self.A, self.G, strict=True)]
        keys = [(layer.vector, alone) for layer, alone in zip(layers, diagonal, strict=True)]
        return Stacks([layer.unit for layer in layers], keys, [layer.groups for layer in layers])

    @cached_property
    def stacked(self) -> list[tuple[Tensor, Tensor]]:
        """(G, A) with layers of one shape together, as ``stacks`` has them; a diagonal A has one axis less than G."""
        gather = self.stacks.gather
        return list(zip(gather(self.G), gather(self.A), strict=True))

    @cached_property
    def stacked_pi(self) -> list[Tensor]:
        """``π = √((tr A / dim A) / (tr G / dim G))``, 1 where a trace is 0 (Martens and Grosse 2015, section 6.3)."""
        ratios = [diagonal(A, G).mean(-1) / diagonal(G, G).mean(-1) for G, A in self.stacked]
        return [torch.where((x > 0) & x.isfinite(), x, 1.0).sqrt() for x in ratios]

    @property
    def pi(self) -> list[Tensor]:
        """π of every layer."""
        return self.stacks.scatter(self.stacked_pi, 0)

    def stacked_shifts(self, damping: float) -> list[tuple[Tensor, Tensor]]:
        """What the factored rule adds to (G, A): ``√λ/π`` and ``π√λ``. The G of a vector layer is its whole block, with
        A = 1, and takes λ whole."""
        root, vectors = damping**0.5, [self.partition.layers[i[0]].vector for i in self.stacks.groups]
        return [
            (torch.full_like(π, damping), torch.zeros_like(π)) if vector else (root / π, root * π)
            for π, vector in zip(self.stacked_pi, vectors, strict=True)
        ]

    def shifts(self, damping: float) -> list[tuple[Tensor, Tensor]]:
        """The same for every layer."""
        scatter = self.stacks.scatter
        G, A = zip(*self.stacked_shifts(damping), strict=True)
        return list(zip(scatter(G, 0), scatter(A, 0), strict=True))

    @cached_property
    def eigen(self) -> list[tuple[Eigen, Eigen]]:
        """The eigendecompositions of (G, A), stacked; refuses NaN, inf and what is not semi-definite, by name."""
        return self._eigenpairs(inf, None)

    def leading(self, count: int, *, full: int = 200, iterations: int = 8) -> KroneckerFactors:
        """The same factors, of whose eigenpairs the leading ones alone are known: all that a ``spectral`` space of
        ``count`` columns per layer can use.

        Factors up to ``full`` rows are decomposed; larger ones go through block power iteration with Rayleigh–Ritz
        (Halko, Martinsson and Tropp 2011), from a fixed start. A coarse space needs good directions, not exact ones:
        its coarse operator is built from what comes out.
        """
        twin = copy.copy(self)
        vars(twin)["eigen"] = self._eigenpairs(max(full, 4 * count), lambda X: _leading(X, count, iterations))
        return twin

    def _eigenpairs(self, full: float, larger: Callable[[Tensor], Eigen] | None) -> list[tuple[Eigen, Eigen]]:
        """Eigenpairs of (G, A), stacked: all of them up to ``full`` rows, beyond that what ``larger`` finds."""
        groups = self.stacks.groups
        stacks = [G for G, _ in self.stacked] + [A if A.ndim == G.ndim else Eigen(A, None) for G, A in self.stacked]
        called = [[f"Factor {which} of {name}" for l in members for name in self.called(l)]
                  for which in "GA" for members in groups]  # fmt: skip
        small = [isinstance(X, Eigen) or X.shape[-1] <= full for X in stacks]
        exact = iter(psd_eigens(list(compress(stacks, small)), list(chain(*compress(called, small)))))
        pairs = [next(exact) if fits else larger(X) for X, fits in zip(stacks, small, strict=True)]
        return list(zip(pairs[: len(groups)], pairs[len(groups) :], strict=True))

    @property
    def eigen_A(self) -> list[Eigen]:
        """Eigendecompositions of A, one per layer."""
        return self._scattered(1)

    @property
    def eigen_G(self) -> list[Eigen]:
        """Eigendecompositions of G, one per layer."""
        return self._scattered(0)

    def _scattered(self, side: int) -> list[Eigen]:
        """One pair per layer from one per shape."""
        scatter = self.stacks.scatter
        d, U = zip(*(pair[side] for pair in self.eigen), strict=True)
        return [Eigen(*both) for both in zip(scatter(d, 1), scatter(U, 2), strict=True)]


def shifted(X: Tensor, shift: Tensor) -> Tensor:
    """``X + shift I`` for a stack X and one shift for each member."""
    X = X.clone()
    X.diagonal(0, -2, -1).add_(shift[..., None])
    return X


def _kron(G: Tensor, A: Tensor) -> Tensor:
    """``G ⊗ A`` of a layer, or of each of its groups."""
    if G.ndim == 3:
        return torch.block_diag(*map(_kron, G, A))
    return torch.kron(G.contiguous(), A.contiguous())


def diagonal(X: Tensor, G: Tensor) -> Tensor:
    """The diagonal of a factor X, or X itself where it is one: with an axis less than G, which is a matrix."""
    return X.diagonal(0, -2, -1) if X.ndim == G.ndim else X


def _leading(X: Tensor, count: int, iterations: int) -> Eigen:
    generator = torch.Generator().manual_seed(0)
    Q = torch.randn(X.shape[-1], count + 8, generator=generator, dtype=torch.float64, device="cpu").to(X)
    for _ in range(iterations):
        Q = torch.linalg.qr(X @ Q).Q
    d, V = eigenpairs(Q.mT @ X @ Q, "A Kronecker factor")
    return Eigen(d.clamp_min(0), Q @ V)
