"""The Fisher information matrix as an operator, from the vectors captured in one pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache, reduce
from math import inf

import torch
from torch import Tensor

from .checks import check_choice, check_room, check_type
from .columns import CoarseSpace, LocalSpace, RankOneSpace
from .kronecker import CONVENTIONS, KroneckerFactors
from .one_hot import OneHot, Rows, cross, dense, numbers, padded
from .operator import Image, Operator, ParameterSpace
from .partition import Layer, Partition
from .products import Scores, check_factors, product
from .sample_space import SampleSpace
from .stacks import Stacks

_CHUNK = 2**24  # numbers in a temporary: 128 MiB of float64


class Fisher(Operator):
    """``F = (1/N) Σ_{s,n} score scoreᵀ``, with the score ``Σ_t g[s,n,t] a[n,t]ᵀ`` in each layer.

    Positive semi-definite; equal to the generalised Gauss–Newton matrix when exact. Made by
    :func:`kfac_viz.capture`; the captured vectors are never changed afterwards. ``J``, of S·N rows, has the scores
    in its rows, so that ``F = JᵀJ / N``.

    Attributes:
        a: layer inputs, one (N, T, features) per layer; (S, N, T, features) where a weight is used transposed. Those of
            an embedding are a :class:`kfac_viz.method.one_hot.OneHot` of that shape.
        g: output-side vectors, one (S, N, T, out) per layer. In a layer of several groups both have an axis for them in
            front: (groups, N, T, features) and (groups, S, N, T, out / groups).
        swapped: for each layer, how many of its T positions, the last ones, are uses of its transpose.

    >>> import kfac_viz as kv
    >>> F = kv.problems.digits((4,), 20, side=4).capture()
    >>> F
    Fisher(118 parameters in 2 layers (68 + 50), exact categorical, 20 examples × 10 vectors, float64 on cpu)
    >>> v = torch.ones(118, dtype=torch.float64)
    >>> torch.allclose(F @ v, F.dense() @ v)
    True
    """

    semidefinite = True

    def __init__(
        self,
        partition: Partition,
        a: list[Rows],
        g: list[Tensor],
        *,
        likelihood: str | None = None,
        flavour: str = "exact",
        swapped: Sequence[int] | None = None,
    ) -> None:
        check_type("partition", partition, Partition)
        check_type("a", a, list, tuple)
        check_type("g", g, list, tuple)
        self.partition, self.a, self.g = partition, tuple(a), tuple(g)
        self.swapped = (0,) * len(partition) if swapped is None else tuple(swapped)
        self._check_vectors()
        self.likelihood, self.flavour = likelihood, flavour
        self.S, self.N = self.g[0].shape[-4:-2]
        self.dtype, self.device = self.g[0].dtype, self.g[0].device
        self._factors: dict[tuple[str, str], KroneckerFactors] = {}

    def _check_vectors(self) -> None:
        """Refuse inputs and vectors whose shapes or kinds do not fit the layers and each other."""
        layers = self.partition.layers
        if not len(self.a) == len(self.g) == len(self.swapped) == len(layers):
            raise ValueError(
                f"Expected one a and one g for each of {len(layers)} layers; got {len(self.a)}, {len(self.g)}."
            )
        like = self.a[0]
        both = self.g[0].shape[-4:-2] if isinstance(self.g[0], Tensor) else None
        for layer, a, g, swapped in zip(layers, self.a, self.g, self.swapped, strict=True):
            check_type(f"a of layer {layer.name!r}", a, Tensor, OneHot)
            check_type(f"g of layer {layer.name!r}", g, Tensor)
            out, features = layer.unit
            own = "(" + "".join(f"{n}, " for n in layer.axis)
            vectors = (*layer.axis, *both, *g.shape[-2:-1], out)  # what g has to be
            inputs = (*layer.axis, *vectors[-4 if swapped else -3 : -1], features)
            fits = g.ndim == 4 + len(layer.axis) and (tuple(g.shape), tuple(a.shape)) == (vectors, inputs)
            if not fits or not g.numel() or not 0 <= swapped <= g.shape[-2]:
                raise ValueError(
                    f"Layer {layer.name!r} needs a {own}{'S, ' * (swapped > 0)}N, T, {features}) and g {own}S, N, T, "
                    f"{out}), with N and S as everywhere; got {tuple(a.shape)} and {tuple(g.shape)}."
                )
            if any((x.dtype, x.device, x.layout) != (like.dtype, like.device, torch.strided) for x in (a, g)):
                raise TypeError(f"Layer {layer.name!r}: a and g must be dense, of one dtype and on one device.")
        if like.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"a and g must be float32 or float64; got {like.dtype}.")

    @cached_property
    def _stacks(self) -> Stacks:
        alone = [l if isinstance(a, OneHot) else None for l, a in enumerate(self.a)]  # no stack is made of these
        positions = [(a.shape[-2], n, l) for a, n, l in zip(self.a, self.swapped, alone, strict=True)]
        layers = self.partition.layers
        return Stacks([layer.unit for layer in layers], positions, [layer.groups for layer in layers])

    @cached_property
    def stacked(self) -> list[tuple[Rows, Tensor]]:
        """(a, g) with layers of one shape and one number of positions together."""
        return list(zip(self._stacks.gather(self.a), self._stacks.gather(self.g), strict=True))

    def with_vectors(self, stacked: list[tuple[Rows, Tensor]]) -> Fisher:
        """The same layers and kind, with other (a, g), stacked as ``self.stacked`` has them."""
        pairs: list[tuple[Rows, Tensor]] = [None] * len(self.partition)
        for members, both in zip(self._stacks.groups, stacked, strict=True):
            apart = (self._stacks.apart(members, x, 0) for x in both)
            for l, *pair in zip(members, *apart, strict=True):
                pairs[l] = tuple(pair)
        twin = self.like(*zip(*pairs, strict=True))
        vars(twin).update(_stacks=self._stacks, stacked=stacked)
        return twin

    def like(self, a: Sequence[Rows], g: Sequence[Tensor]) -> Fisher:
        """A Fisher of the same layers and kind with other inputs and vectors."""
        return Fisher(self.partition, a, g, likelihood=self.likelihood, flavour=self.flavour, swapped=self.swapped)

    def in_range(self) -> bool:
        """Whether its sums stay within the dtype, in one look at the device: no NaN, no inf, no overflow.

        ``‖a‖² ‖g‖²`` is no less than N times the largest entry of a layer's block, ``‖a‖²`` and ``‖g‖²`` than those of
        its factors; P times that is no less than what vectors of numbers up to 1 can make of it.
        """
        norms = torch.stack(torch._foreach_norm([*map(numbers, self.a), *self.g])).tolist()
        a, g = norms[: len(self.a)], norms[len(self.a) :]
        largest = max(max(x * x, y * y, x * x * y * y) if x == x and y == y else inf for x, y in zip(a, g, strict=True))
        return largest * self.partition.size * len(a) < torch.finfo(self.dtype).max

    def _apply(self, v: Tensor) -> Tensor:
        width = max(layer.out for layer in self.partition.layers) * max(a.shape[-2] for a in self.a)
        rows = max(1, _CHUNK // (self.N * max(width, self.S)))
        if v.ndim > 1 and len(v) > rows:
            return torch.cat([self._apply(part) for part in v.split(rows)])
        return self.pull(self.scores(v) / self.N)

    def scores(self, v: Tensor) -> Tensor:
        """``J v``: every score times v (..., P), shape (..., S, N)."""
        parts = []
        for count, (a, g), V in zip(self._stacks.sizes, self.stacked, self._stacks.split(v), strict=True):
            s = _directional(a, g, V)
            parts.append(s if count == 1 else s.sum(-3))
        return reduce(torch.add, parts)

    def pull(self, s: Tensor) -> Tensor:
        """``Jᵀ s``: the scores summed with weights s (..., S, N), shape (..., P)."""
        return self.add_pulled_(s.new_zeros(*s.shape[:-2], self.partition.size), s)

    def add_pulled_(self, v: Tensor, s: Tensor, alpha: float = 1.0) -> Tensor:
        """``v + alpha Jᵀ s``, in place."""
        pairs = []
        for count, (a, g) in zip(self._stacks.sizes, self.stacked, strict=True):
            if a.ndim == g.ndim:  # a weight used transposed: both sides depend on the vector
                each = s.unsqueeze(-3) if count > 1 else s
                pairs.append(((g * each[..., None, None]).flatten(-4, -2).mT, a.flatten(-4, -2)))
                continue
            if s.ndim == 2:  # einsum would take twice as long for one vector
                weighted = g * s[:, :, None, None]
                weighted = weighted.squeeze(-4) if self.S == 1 else weighted.sum(-4)
            else:
                weighted = torch.einsum("...snto,...sn->...nto", g, s.unsqueeze(-3) if count > 1 else s)
            pairs.append((weighted.flatten(-3, -2).mT, a.flatten(-3, -2)))
        return self._stacks.add_products_(v, pairs, alpha)

    @cached_property
    def solver(self) -> ParameterSpace | SampleSpace:
        """The smaller of the two spaces, as both cost the cube of their size."""
        return SampleSpace(self) if self.S * self.N < self.partition.size else ParameterSpace(self)

    def dense(self) -> Tensor:
        """The matrix (P, P), from the blocks on and above the diagonal: N P² products, not S N P²."""
        self.check_dense()
        slices = self.partition.slices
        matrix = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for l in range(len(slices)):
            for m in range(l, len(slices)):
                block = self._fill(matrix[slices[l], slices[m]], l, m)
                if l != m:
                    matrix[slices[m], slices[l]] = block.T
        return self._in_range(matrix, "The matrix")

    def block(self, l: int | str, m: int | str) -> Tensor:
        """The exact block of layers l and m, (P_l, P_m).

        ``(1/N) Σ_n Σ_{t,t'} (Σ_s g_l g_mᵀ) ⊗ (a_l a_mᵀ)`` contracts over examples alone, S times cheaper than
        scores against scores (and four times cheaper again on the diagonal, by symmetry); with many positions and
        few vectors the scores are formed instead.
        """
        l, m = self.partition.index(l), self.partition.index(m)
        sizes = self.partition.layers[l].size, self.partition.layers[m].size
        check_room(f"The block of layers {l} and {m}", 2 * sizes[0] * sizes[1], self.g[l], "apply F with @")
        return self._fill(torch.empty(sizes, dtype=self.dtype, device=self.device), l, m)

    def _fill(self, block: Tensor, l: int, m: int) -> Tensor:
        """Write the block of layers l and m into ``block``, and return it."""
        both = self.partition.layers[l], self.partition.layers[m]
        (o, i), (p, j) = (layer.shape for layer in both)
        positions = self.a[l].shape[-2] * self.a[m].shape[-2]
        if positions > self.S or self.swapped[l] or self.swapped[m] or any(layer.groups > 1 for layer in both):
            factors, per_example = _scores, self.S * max(o * i, p * j)
        else:
            factors, per_example = (
                _one_layer if l == m and positions == 1 else _two_layers,
                max(o * p, i * j) * positions,
            )
        product: Tensor | None = None
        for chunk in self._chunks((self.a[l], self.a[m], self.g[l], self.g[m]), per_example):
            left, right = factors(*chunk)
            product = left.T @ right if product is None else product.addmm_(left.T, right)
        if factors is _scores:
            block.copy_(product)
        else:
            if factors is _one_layer:
                (_, _, where_o), (_, _, where_i) = (_upper_pairs(n, self.device) for n in (o, i))
                product = product.index_select(1, where_i).index_select(0, where_o)
            block.view(o, i, p, j).copy_(product.view(o, p, i, j).transpose(1, 2))
        if l == m and factors is not _one_layer:
            block.add_(block.T.clone()).div_(2)  # the products round differently on the two sides
        return block.div_(self.N)

    def diagonal(self) -> Tensor:
        """The diagonal (P,), without any P×P matrix: what Adam and Adagrad estimate."""
        return self.partition.join(self.second_moments())

    def second_moments(self, bases: list[tuple[Tensor, Tensor | None]] | None = None) -> list[Tensor]:
        """``diag(F_ll)`` in a Kronecker basis (U_G, U_A) per layer (EKFAC), None for the identity; one (out, features)
        per layer."""
        moments = []
        for l, (a, g) in enumerate(zip(self.a, self.g, strict=True)):
            if bases is not None:
                g, a = rotated(g, bases[l][0]), a if bases[l][1] is None else rotated(dense(a), bases[l][1])
            if isinstance(a, OneHot):
                words, sums = a.merged(g)
                total = g.new_zeros(g.shape[3], a.features)
                words.add_product_(total, sums.square().sum(0).flatten(0, 1).mT)
            elif a.shape[-2] == 1 and a.ndim < g.ndim:
                total = (g[..., 0, :].square().sum(-3).mT @ a[..., 0, :].square()).view(self.partition.layers[l].shape)
            else:
                total = 0.0
                for a_, g_ in self._chunks((a, g), self.S * self.partition.layers[l].size):
                    total = total + _layer_scores(a_, g_).square().sum(0).view(self.partition.layers[l].shape)
            moments.append(total / self.N)
        return moments

    def factors(self, l: int | str, m: int | str, convention: str = "expand") -> tuple[Tensor, Tensor]:
        """K-FAC's factors of layers l and m: ``A_lm`` (features_l, features_m), ``G_lm`` (out_l, out_m).

        ``A_lm = (1/N) Σ_n a_l a_mᵀ`` and ``G_lm = (1/N) Σ_{s,n} g_l g_mᵀ``, with block ``≈ G_lm ⊗ A_lm``. Where
        a layer has positions, Eschenhagen et al. 2023: ``expand`` takes each for an example of its own,
        ``reduce`` averages a and sums g over them first. How layers with different numbers of them are aligned:
        see :meth:`rows`. Both are dense, the diagonal A of an embedding included: :meth:`kronecker` has its diagonal.
        A layer of several groups has a stack of pairs, (groups, …); between two layers one of which has groups there
        is a pair for each group of the one and each of the other, (groups_l, groups_m, …).
        """
        l, m = self.partition.index(l), self.partition.index(m)
        if l == m:
            factors = self.kronecker(convention)
            return factors.dense_A(l), factors.G[l]
        rows = self.rows(convention)
        (a, g), (b, h) = rows[l], rows[m]
        check_room(f"Factor A of layers {l} and {m}", a.shape[-1] * b.shape[-1], g, "apply F with @")
        return tuple(X / self.N for X in (between(a, b), between(g, h)))

    def rows(self, convention: str = "expand") -> list[tuple[Rows, Tensor]]:
        """What K-FAC takes for independent examples, aligned between layers: (N', features) and (S·N', out) per layer,
        or so much for each of its groups.

        A layer with one position stands at every position of the others; further differences are filled with zeros. So
        each layer keeps its own factors, and all of them together stay a Gram matrix. An embedding is expanded under
        either convention: a mean of one-hot rows is none, and A would no longer be a diagonal.
        """
        if any(self.swapped):
            name = self.partition.names[next(l for l, n in enumerate(self.swapped) if n)]
            raise ValueError(f"The weight of layer {name!r} is used transposed; its cross factors have no definition.")
        check_choice("convention", convention, CONVENTIONS)
        reduced = [convention == "reduce" and not isinstance(a, OneHot) for a in self.a]
        T = max(1 if less else a.shape[-2] for a, less in zip(self.a, reduced, strict=True))
        rows = []
        for a, g, less in zip(self.a, self.g, reduced, strict=True):
            if less:
                a, g = a.mean(-2, keepdim=True), g.sum(-2, keepdim=True)
            own = a.shape[-2]
            if own == 1:
                a, g = (x.expand(*x.shape[:-2], T, x.shape[-1]) / T**0.5 for x in (a, g))
            else:
                a, g = padded(a, T - own) / own**0.5, padded(g, T - own)
            rows.append((a.flatten(-3, -2), g.flatten(-4, -2)))
        return rows

    def kronecker(self, convention: str = "expand", factors: str = "kfac") -> KroneckerFactors:
        """The factors of every diagonal block, computed once and shared by all that is built from them.

        Args:
            convention: of K-FAC's factors for layers with positions; see :meth:`factors`.
            factors: ``"kfac"``, or the rule of another product: :func:`kfac_viz.method.products.product`.

        Raises:
            ValueError: a convention other than ``"expand"`` with a rule that takes the scores as they are; an embedding
                too large for a rule that needs its A as a matrix.
        """
        check_factors(factors, convention, self.partition.layers)
        if (convention, factors) not in self._factors:
            groups = list(zip(self._stacks.groups, self.stacked, strict=True))
            if factors == "kfac":
                pairs = [kronecker_factors(a, g, self.swapped[members[0]], convention) for members, (a, g) in groups]
                without = ()
            else:
                found = [product(factors, Scores(a, g, often=factors != "shampoo")) for _, (a, g) in groups]
                pairs = [(A, G) for A, G, _ in found]
                which = self._stacks.scatter([x for _, _, x in found], 0)
                without = tuple(name for name, x in zip(self.partition.names, which, strict=True) if bool(x.any()))
            A, G = (self._stacks.scatter(side, 2) for side in zip(*pairs, strict=True))
            self._factors[convention, factors] = KroneckerFactors(self.partition, tuple(A), tuple(G), without)
        return self._factors[convention, factors]

    def image(self, Z: CoarseSpace) -> ScoreImage:
        check_type("Z", Z, CoarseSpace)
        return ScoreImage(self, Z)

    def _chunks(self, tensors: tuple[Rows, ...], per_example: int) -> Iterator[list[Tensor]]:
        """The examples of inputs (N, T, …) and vectors (S, N, T, …), a bounded number at a time, dense."""
        size = max(1, _CHUNK // per_example)
        for start in range(0, self.N, size):
            yield [dense(x.narrow(-3, start, min(size, self.N - start))) for x in tensors]

    def __repr__(self) -> str:
        what = " ".join(filter(None, (self.flavour, self.likelihood)))
        return self._describe(what, f"{self.N} examples × {self.S} vectors")


class ScoreImage(Image):
    """``F Z`` through ``U = J Z``, kept as rows (k, S·N): no P×k matrix, and ``Zᵀ F Z = UᵀU/N``.

    A rank-one column ``w uᵀ`` meets the data through two numbers per example, ``α = a u`` and ``β = g w``.
    """

    operator: Fisher

    def __init__(self, F: Fisher, Z: CoarseSpace) -> None:
        super().__init__(F, Z)
        layers = list(zip(F.a, F.g, strict=True))
        if isinstance(Z, RankOneSpace):
            both = zip(layers, Z.factors, strict=True)
            rows = [_rank_one(a, g, W, U).movedim(-1, 0) for (a, g), (W, U) in both]
        elif isinstance(Z, LocalSpace):
            blocks = zip(layers, Z.blocks, F.partition.layers, strict=True)
            rows = [
                _of_all_groups(_directional(a, g, block.mT.unflatten(1, (*layer.axis, *layer.unit))), layer)
                for (a, g), block, layer in blocks
            ]
        else:
            rows = [F.scores(Z.rows)]
        self.U = torch.cat(rows).flatten(1)

    def add_(self, v: Tensor, c: Tensor, alpha: float = 1.0) -> Tensor:
        F = self.operator
        return F.add_pulled_(v, (c @ self.U).unflatten(-1, (F.S, F.N)), alpha / F.N)

    def restrict(self, r: Tensor) -> Tensor:
        return self.operator.scores(r).flatten(-2) @ self.U.mT / self.operator.N

    def galerkin(self) -> Tensor:
        return self.U @ self.U.mT / self.operator.N


def kronecker_factors(a: Rows, g: Tensor, swapped: int, convention: str) -> tuple[Tensor, Tensor]:
    """K-FAC's A and G of a layer, or of a stack of them, whose last ``swapped`` positions are uses of its transpose.

    One-hot inputs have a diagonal A, of which the diagonal is kept, (features,); they are expanded under either
    convention.

    For a tied weight, used as it is and transposed, each of the two kinds of use has factors of its own, and their
    sum ``G₁ ⊗ A₁ + G₂ ⊗ A₂`` is replaced by the nearest Kronecker product in the Frobenius norm (Van Loan and
    Pitsianis 1993). What the two uses share is left out, as K-FAC leaves out what two layers share.
    """
    T = a.shape[-2] - swapped
    if swapped:  # there the inputs of the transpose stand in g, the same for all vectors
        A, G = kronecker_factors(g[..., 0, :, T:, :], a[..., T:, :], 0, convention)
        if not T:
            return G, A
        return nearest_product(kronecker_factors(a[..., 0, :, :T, :], g[..., :T, :], 0, convention), (G, A))
    N = g.shape[-3]
    if isinstance(a, OneHot):
        g = g.flatten(-4, -2)
        return a.squares() / (N * T), g.mT @ g / N
    if convention == "reduce":
        a, g = a.mean(-2), g.sum(-2).flatten(-3, -2)
    else:
        a, g = (a.flatten(-3, -2) / T**0.5 if T > 1 else a[..., 0, :]), g.flatten(-4, -2)
    return a.mT @ a / N, g.mT @ g / N


def nearest_product(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(A, G) whose product ``G ⊗ A`` is nearest to the sum of two of them, all positive semi-definite.

    A is a combination of the two A with weights w, the leading eigenvector of the product of the Gram matrices of the
    two G and of the two A. Its entries are not negative, so that A and G are semi-definite as well.

    >>> A, G = nearest_product((torch.eye(2), torch.eye(2)), (torch.eye(2), 2 * torch.eye(2)))
    >>> torch.kron(G, A).diagonal()
    tensor([3., 3., 3., 3.])
    """
    A, G = (torch.stack(both, -3) for both in zip(one, other, strict=True))
    gram_A, gram_G = (torch.einsum("...uij,...vij->...uv", X, X) for X in (A, G))
    p, q, r, s = (gram_G @ gram_A).flatten(-2).unbind(-1)
    largest = (p + s) / 2 + (((p - s) / 2).square() + q * r).sqrt()
    w = torch.stack([largest - s + q, largest - p + r], -1).clamp_min(0)
    w = torch.where(w.sum(-1, keepdim=True) > 0, w, 1.0)
    Aw = (gram_A @ w[..., None])[..., 0]
    u = Aw / (Aw * w).sum(-1, keepdim=True).clamp_min(torch.finfo(A.dtype).tiny)
    return torch.einsum("...u,...uij->...ij", w, A), torch.einsum("...u,...uij->...ij", u, G)


def _directional(a: Rows, g: Tensor, V: Tensor) -> Tensor:
    """``Σ_t g[s,n,t]ᵀ V a[n,t]`` for one layer or a stack, and V (…, out, features): (…, S, N)."""
    if a.ndim == g.ndim:
        return torch.einsum("...snti,...snto,...oi->...sn", a, g, V)
    outputs = a @ V.mT if isinstance(a, OneHot) else torch.einsum("...nti,...oi->...nto", a, V)
    if V.ndim < a.ndim and g.shape[-4] > 1:  # one v: einsum would copy g
        return (g * outputs.unsqueeze(-4)).sum((-2, -1))
    return torch.einsum("...snto,...nto->...sn", g, outputs)


def _of_all_groups(s: Tensor, layer: Layer) -> Tensor:
    """s (..., S, N) of a layer from what its groups, if it has several, contribute."""
    return s.sum(-3) if layer.groups > 1 else s


def _rank_one(a: Rows, g: Tensor, W: Tensor, U: Tensor) -> Tensor:
    """``Σ_t (g[s,n,t]ᵀ w) (uᵀ a[n,t])`` for the columns w of W and u of U, (S, N, k); one group after another."""
    if g.ndim == 4:
        return ((a @ U) * (g @ W)).sum(2)
    return sum(_rank_one(*group, U) for group in zip(a, g, W.unflatten(0, (len(g), -1)), strict=True))


def rotated(x: Tensor, U: Tensor) -> Tensor:
    """``x U`` for rows x (..., c) and U (c, c), or for a matrix U of each group in x."""
    return x @ U if U.ndim == 2 else (x.flatten(1, -2) @ U).view(*x.shape[:-1], -1)


def between(a: Rows, b: Rows) -> Tensor:
    """``aᵀ b`` of two layers, dense: (i, j), or (groups_a, groups_b, i, j) if one of them has groups."""
    if a.ndim == b.ndim == 2:
        return cross(a, b)
    if isinstance(a, OneHot):
        return torch.stack([cross(a, y) for y in b])[None]
    if isinstance(b, OneHot):
        return torch.stack([cross(x, b) for x in a])[:, None]
    return torch.einsum("xni,ynj->xyij", *(x if x.ndim == 3 else x[None] for x in (a, b)))


def _layer_scores(a: Tensor, g: Tensor) -> Tensor:
    """Scores of one layer, (S·N, out·features)."""
    per, of = ("h" * (g.ndim > 4), "s" * (a.ndim == g.ndim))
    return torch.einsum(f"{per}snto,{per}{of}nti->sn{per}oi", g, a).flatten(0, 1).flatten(1)


def _scores(a: Tensor, b: Tensor, g: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Two tables whose product is a block, contracted over examples and vectors."""
    return _layer_scores(a, g), _layer_scores(b, h)


def _two_layers(a: Tensor, b: Tensor, g: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Two tables, contracted over examples and pairs of positions: (·, out·out') and (·, features·features')."""
    (_, N, t, o), (u, p) = g.shape, h.shape[2:]
    left = torch.bmm(g.permute(1, 2, 3, 0).flatten(1, 2), h.transpose(0, 1).flatten(2))
    right = a[:, :, None, :, None] * b[:, None, :, None, :]
    return left.view(N, t, o, u, p).transpose(2, 3).reshape(-1, o * p), right.flatten(0, 2).flatten(1)


def _one_layer(a: Tensor, _b: Tensor, g: Tensor, _h: Tensor) -> tuple[Tensor, Tensor]:
    """As before for a layer with itself: each pair of rows and each pair of columns once, a quarter of the work."""
    g, a = g[:, :, 0], a[:, 0].T.contiguous()
    first, second, _ = _upper_pairs(g.shape[2], g.device)
    left = torch.bmm(g.permute(1, 2, 0), g.transpose(0, 1)).flatten(1).T.index_select(0, first * g.shape[2] + second)
    first, second, _ = _upper_pairs(len(a), a.device)
    return left.T, a.index_select(0, first).mul_(a.index_select(0, second)).T


@lru_cache(maxsize=64)
def _upper_pairs(n: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and columns of the upper triangle of an n×n matrix, and for each of its n² entries the number in there."""
    rows, cols = torch.triu_indices(n, n, device=device)
    where = torch.empty(n, n, dtype=torch.long, device=device)
    where[rows, cols] = where[cols, rows] = torch.arange(len(rows), device=device)
    return rows, cols, where.flatten()
