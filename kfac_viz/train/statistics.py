"""What an optimizer remembers of curvature: averaged Kronecker factors, and the vectors of the last batches."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor, nn

from ..method.checks import same_random_state
from ..method.fisher import Fisher, factors_by_use, one_product
from ..method.kronecker import KroneckerFactors
from ..method.kronecker_fisher import KroneckerFisher
from ..method.one_hot import OneHot, Rows, cat, dense, padded
from ..method.partition import Partition
from ..method.products import FLOOR_OF_AVERAGE, Scores, regularised_root, square, unit_trace
from .shards import Shards


@contextmanager
def untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model's buffers and, in the main thread, the random state are afterwards what they were; the mode is kept.

    Batch norm in training mode writes its running statistics into copies. It then couples the examples of a
    batch, so that "the score of one example" is K-FAC's usual approximation.
    """
    held = [(module, dict(module.named_buffers(recurse=False))) for module in model.modules()]
    try:
        for module, buffers in held:
            for name, buffer in buffers.items():
                setattr(module, name, buffer.clone())
        with same_random_state(device):
            yield
    finally:
        for module, buffers in held:
            for name, buffer in buffers.items():
                setattr(module, name, buffer)


class RunningFactors:
    """Exponential averages of every layer's factors, each example of a batch that is k batches old weighing
    ``decay**k``: a weighted mean, so that no start-up bias is left to correct.

    K-FAC's and Shampoo's factors are moments of each batch, and are averaged. The two nearest products are found by an
    alternation: each batch makes one turn of it, both factors at once, against the running average of the other factor;
    that in KL against its inverse, as it was when :meth:`renew_inverses` was last called. The first turn starts from
    the identity and gives Shampoo's factors. A is averaged with trace 1, so that the scale is in G alone.

    Tensors are replaced, never changed in place: a preconditioner may go on holding those it was built from.
    """

    def __init__(self, decay: float, convention: str, rule: str = "kfac") -> None:
        self.decay, self.convention, self.rule = decay, convention, rule
        self.inverses: dict[str, tuple[Tensor, Tensor]] = {}  # roots for A and G, over ranks; for the rule "kl" alone
        self.A: dict[str, Tensor] = {}
        self.G: dict[str, Tensor] = {}
        self.weight: dict[str, float] = {}
        self.newest: set[str] = set()  # layers that the newest batch has reached

    def add(self, F: Fisher, seen: tuple[str, ...], *, same_batch: bool = False, shards: Shards | None = None) -> None:
        """Take in the layers ``seen`` of F; ``same_batch`` for a further part of the newest batch. With ``shards`` F is
        this rank's part, and every rank takes in the averages over all parts."""
        if shards is None:
            new, N = self._new(F, seen), dict.fromkeys(seen, F.N)
        else:
            new, N = self._shared(F, seen, shards)
        reached = self.newest if same_batch else set()
        before = {name: self.weight.get(name, 0.0) * (1.0 if name in reached else self.decay) for name in N}
        layers_of_share = defaultdict(list)
        for name, w in before.items():
            layers_of_share[N[name] / (w + N[name])].append(name)
        for share, names in layers_of_share.items():
            for which, mine in enumerate((self.A, self.G)):
                fresh = [new[name][which] for name in names]
                if share < 1:  # one operation for all layers of one share, which mostly are all layers
                    pairs = [_alike(mine[name], X) for name, X in zip(names, fresh, strict=True)]
                    fresh = torch._foreach_lerp(*map(list, zip(*pairs, strict=True)), share)
                mine.update(zip(names, fresh, strict=True))
        self.weight.update({name: w + N[name] for name, w in before.items()})
        self.newest = reached | set(N)

    def _new(self, F: Fisher, seen: tuple[str, ...]) -> dict[str, tuple[Tensor, Tensor]]:
        """A and G of a batch, for the layers that it has reached."""
        where = {name: F.partition.index(name) for name in seen}
        if self.rule == "kfac":
            factors = F.kronecker(self.convention)
            return {name: (factors.A[l], factors.G[l]) for name, l in where.items()}
        return {name: self._scaled(*self._turn(F, name, l)) for name, l in where.items()}

    def _turn(self, F: Fisher, name: str, l: int) -> tuple[Tensor, Tensor]:
        """A and G of one turn of the alternation: means over the examples of F."""
        scores = Scores(F.a[l], F.g[l])
        if name in self.inverses:
            for_G, for_A = self.inverses[name]
            return scores.right(root=for_A, upper=True), scores.left(root=for_G, upper=True)
        if self.rule == "nearest" and name in self.A:
            return scores.right(self.G[name]), scores.left(self.A[name]) / square(self.A[name])
        return scores.right(), scores.left()

    def _scaled(self, A: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
        """With the scale in G alone, where it is not in both."""
        return A if self.rule == "shampoo" else unit_trace(A), G

    def _shared(
        self, F: Fisher, seen: tuple[str, ...], shards: Shards
    ) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, int]]:
        """A and G of the batch of all ranks, and its examples, for the layers that any rank has reached."""
        where = {name: F.partition.index(name) for name in seen}
        if self.rule == "kfac":
            own = {n: factors_by_use(F.a[l], F.g[l], F.swapped[l], self.convention) for n, l in where.items()}
            means, N = shards.averaged(own, by_use=True)
            return {name: one_product(uses) for name, uses in means.items()}, N
        own = {name: (self._turn(F, name, l), None) for name, l in where.items()}
        means, N = shards.averaged(own, by_use=False)
        return {name: self._scaled(*one_product(uses)) for name, uses in means.items()}, N

    def renew_inverses(self) -> int:
        """Invert the running factors for the turns to come, if the rule needs it; the number of directions, of all
        layers, in which a floor decides what the inverse is.

        An average of few examples says nothing about most directions, and one new example in such a direction would
        outweigh all others. So each eigenvalue is raised by the share that FLOOR_OF_AVERAGE examples have of the mean
        one, or by the root of the dtype's precision if that is more. FLOOR, which is for scores that are all known, is
        far too low for that.
        """
        if self.rule != "kl":
            return 0
        found = []
        for name, weight in self.weight.items():
            floor = max(FLOOR_OF_AVERAGE / weight, torch.finfo(self.G[name].dtype).eps ** 0.5)
            roots, raised = zip(*(regularised_root(X, floor) for X in (self.A[name], self.G[name])), strict=True)
            self.inverses[name] = roots
            found += [x.sum() for x in raised]
        return round(float(torch.stack(found).sum().nan_to_num()))

    def factors(self, partition: Partition) -> KroneckerFactors:
        """The factors as :class:`KFAC` takes them, once a layer was seen; one that was never seen has zeros."""
        zeros, diagonal = next(iter(self.A.values())).new_zeros, self.rule == "kfac"  # of an embedding
        A = tuple(
            self.A[x.name]
            if x.name in self.A
            else zeros(*x.axis, *[x.features] * (1 if x.table and diagonal else 2)) + x.vector
            for x in partition.layers
        )
        G = tuple(self.G[x.name] if x.name in self.G else zeros(*x.axis, *[x.unit[0]] * 2) for x in partition.layers)
        return KroneckerFactors(partition, A if diagonal else tuple(map(unit_trace, A)), G)


def _alike(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Two factors as matrices, if one of them is the diagonal of one and the other is not."""
    if one.ndim == other.ndim:
        return one, other
    return tuple(X.diag_embed() if X.ndim < max(one.ndim, other.ndim) else X for X in (one, other))


@dataclass
class Part:
    """What is kept of a part of an observed batch: the batch's number, and how many examples F stands for."""

    batch: int
    N: int
    F: Fisher


class Window:
    """The captured vectors of the last ``batches`` observed batches, as one weighted :class:`Fisher`.

    At most ``examples`` in all, or every one with None, spread over each batch and over the parts that it came in: the
    first batch is kept whole if it fits, and later ones share the room. A batch of N examples that is k batches old
    weighs ``N decay**k``; with a decay of 0 the last one alone is kept.
    """

    def __init__(self, batches: int, examples: int | None, decay: float) -> None:
        self.batches = min(batches if decay else 1, inf if examples is None else examples)
        self.examples, self.decay = examples, decay
        self.parts: list[Part] = []  # newest last

    def add(self, F: Fisher, *, same_batch: bool = False, shards: Shards | None = None) -> None:
        """Take in F; ``same_batch`` for a further part of the newest batch. With ``shards`` F is this rank's part, and
        every rank takes in the parts of all as one."""
        if self.parts and self.parts[-1].F.S != F.S:
            self.parts = []  # another number of vectors per example cannot be stacked
        newest = (self.parts[-1].batch if self.parts else 0) + (not same_batch)
        self.parts = [part for part in self.parts if part.batch > newest - self.batches]
        sizes = Counter({newest: F.N if shards is None else shards.N})
        for part in self.parts:
            sizes[part.batch] += part.N

        def room(N: int, batch: int) -> int:
            return N if self.examples is None else max(1, self.examples * N // (len(sizes) * sizes[batch]))

        if shards is None:
            self.parts.append(Part(newest, F.N, F.with_vectors(F.stacked)))
        else:
            for N, pieces in shards.gathered(room(shards.N, newest)):
                self.parts.append(Part(newest, N, _joined(pieces, [1.0] * len(pieces))))
        for part in self.parts:
            kept = room(part.N, part.batch)
            if part.F.N > kept:
                chosen = torch.arange(kept, device=F.device) * part.F.N // kept
                few = [(a.index_select(-3, chosen), g.index_select(-3, chosen)) for a, g in part.F.stacked]
                part.F = part.F.with_vectors(few)

    @property
    def newest(self) -> tuple[int, int]:
        """How many examples of the newest batch are kept, and how many it had; zeros before the first."""
        parts = [part for part in self.parts if part.batch == self.parts[-1].batch]
        return sum(part.F.N for part in parts), sum(part.N for part in parts)

    def fisher(self) -> Fisher:
        """``Σ w F`` over the batches, with weights of sum 1 folded into the output-side vectors."""
        return _joined([part.F for part in self.parts], self._scales())

    def kronecker(self, convention: str) -> KroneckerFisher:
        """All blocks ``G ⊗ A`` of the averaged factors, which have the weights on both sides, a and g.

        Where batches differ in their number of positions, ``a`` is scaled so that each batch is averaged over its own.
        """
        Fs, reduced = [part.F for part in self.parts], convention == "reduce"
        most = [max(a.shape[-2] for a in layer) for layer in zip(*(F.a for F in Fs), strict=True)]
        weighted = [
            F.like(
                [
                    a * (scale * (T / a.shape[-2]) ** (1.0 if reduced and not isinstance(a, OneHot) else 0.5))
                    for a, T in zip(F.a, most, strict=True)
                ],
                F.g,
            )
            for F, scale in zip(Fs, self._scales(), strict=True)
        ]
        return KroneckerFisher(_joined(weighted, self._scales()), convention)

    def _scales(self) -> list[float]:
        """Root of the weight of every part over its share of the examples kept."""
        kept = [part.F.N for part in self.parts]
        ages = [self.parts[-1].batch - part.batch for part in self.parts]
        weights = [part.N * self.decay**age for part, age in zip(self.parts, ages, strict=True)]
        return [(w / sum(weights) * sum(kept) / n) ** 0.5 for w, n in zip(weights, kept, strict=True)]


def _joined(Fs: list[Fisher], scales: list[float]) -> Fisher:
    """One Fisher of all examples, the vectors g of each part scaled."""
    if len(Fs) == 1 and scales[0] == 1:
        return Fs[0]
    if len({(tuple((a.shape[-2], type(a)) for a in F.a), F.swapped) for F in Fs}) > 1:
        Fs = [_with_positions(F, Fs) for F in Fs]
    joined = []
    for pairs in zip(*(F.stacked for F in Fs), strict=True):
        scaled = [g if scale == 1 else g * scale for (_, g), scale in zip(pairs, scales, strict=True)]
        joined.append((cat([a for a, _ in pairs], dim=-3), torch.cat(scaled, dim=-3)))
    return Fs[0].with_vectors(joined)


def _with_positions(F: Fisher, others: list[Fisher]) -> Fisher:
    """F with as many positions of either kind as any of the others has; the new ones are zeros, which add nothing."""

    def most(l: int, swapped: bool) -> int:
        return max(o.swapped[l] if swapped else o.a[l].shape[-2] - o.swapped[l] for o in others)

    def extended(x: Rows, l: int) -> Rows:
        own, to, also = x.shape[-2] - F.swapped[l], most(l, False), most(l, True)
        if not also:
            return padded(x, to - own)
        return torch.cat([padded(x[..., :own, :], to - own), padded(x[..., own:, :], also - F.swapped[l])], dim=-2)

    one_hot = [all(isinstance(o.a[l], OneHot) for o in others) for l in range(len(F.a))]
    inputs = [a if alike else dense(a) for a, alike in zip(F.a, one_hot, strict=True)]
    a, g = ([extended(x, l) for l, x in enumerate(side)] for side in (inputs, F.g))
    swapped = [most(l, True) for l in range(len(a))]
    return Fisher(F.partition, a, g, likelihood=F.likelihood, flavour=F.flavour, swapped=swapped)
