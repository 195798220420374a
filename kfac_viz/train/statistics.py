"""What an optimizer remembers of curvature: averaged Kronecker factors, and the vectors of the last batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..method.fisher import Fisher
from ..method.kronecker import KroneckerFactors
from ..method.kronecker_fisher import KroneckerFisher
from ..method.partition import Partition


@contextmanager
def untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model's buffers and the global random state are afterwards what they were; the mode is kept.

    Batch norm in training mode writes its running statistics into copies. It then couples the examples of a
    batch, so that "the score of one example" is K-FAC's usual approximation.
    """
    held = [(module, dict(module.named_buffers(recurse=False))) for module in model.modules()]
    try:
        for module, buffers in held:
            for name, buffer in buffers.items():
                setattr(module, name, buffer.clone())
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        for module, buffers in held:
            for name, buffer in buffers.items():
                setattr(module, name, buffer)


class RunningFactors:
    """Exponential averages of every layer's factors, each example of a batch that is k batches old weighing
    ``decay**k``: a weighted mean, so that no start-up bias is left to correct.

    Tensors are replaced, never changed in place: a preconditioner may go on holding those it was built from.
    """

    def __init__(self, decay: float, convention: str) -> None:
        self.decay, self.convention = decay, convention
        self.A: dict[str, Tensor] = {}
        self.G: dict[str, Tensor] = {}
        self.weight: dict[str, float] = {}
        self.newest: set[str] = set()  # layers that the newest batch has reached

    def add(self, F: Fisher, seen: tuple[str, ...], *, same_batch: bool = False) -> None:
        """Take in the layers ``seen`` of F; ``same_batch`` for a further part of the newest batch."""
        if not same_batch:
            self.newest = set()
        for name in seen:
            A, G = F.factors(name, name, self.convention)
            before = self.weight.get(name, 0.0) * (1.0 if name in self.newest else self.decay)
            self.weight[name] = before + F.N
            share = F.N / self.weight[name]
            self.A[name] = torch.lerp(self.A[name], A, share) if before else A
            self.G[name] = torch.lerp(self.G[name], G, share) if before else G
        self.newest.update(seen)

    def factors(self, partition: Partition) -> KroneckerFactors:
        """The factors as K-FAC takes them, once a layer was seen; one that was never seen has zeros."""
        like = next(iter(self.A.values()))
        A = tuple(self.A.get(x.name, like.new_zeros(1).expand(x.features, x.features)) for x in partition.layers)
        G = tuple(self.G.get(x.name, like.new_zeros(1).expand(x.out, x.out)) for x in partition.layers)
        return KroneckerFactors(partition, A, G)


class Window:
    """The captured vectors of the last ``batches`` observed batches, as one weighted :class:`Fisher`.

    At most ``examples`` in all, spread over each batch and over the parts that it came in: the first batch is kept
    whole if it fits, and later ones share the room. A batch of N examples that is k batches old weighs ``N decay**k``.
    """

    def __init__(self, batches: int, examples: int, decay: float) -> None:
        self.batches, self.examples, self.decay = min(batches, examples), examples, decay
        # Parts, newest last: {"batch": its number, "N": examples it stands for, "a": [...], "g": [...]}
        self.entries: list[dict] = []

    def add(self, F: Fisher, *, same_batch: bool = False) -> None:
        """Take in F; ``same_batch`` for a further part of the newest batch."""
        if self.entries and self.entries[-1]["g"][0].shape[0] != F.S:
            self.entries = []  # another number of vectors per example cannot be stacked
        newest = (self.entries[-1]["batch"] if self.entries else 0) + (not same_batch)
        entries = [*self.entries, {"batch": newest, "N": F.N, "a": list(F.a), "g": list(F.g)}]
        self.entries = [entry for entry in entries if entry["batch"] > newest - self.batches]
        sizes = Counter()
        for entry in self.entries:
            sizes[entry["batch"]] += entry["N"]
        for entry in self.entries:
            room = max(1, self.examples * entry["N"] // (len(sizes) * sizes[entry["batch"]]))
            kept = entry["a"][0].shape[0]
            if kept > room:
                chosen = torch.arange(room, device=F.device) * kept // room
                entry["a"] = [a[chosen] for a in entry["a"]]
                entry["g"] = [g[:, chosen] for g in entry["g"]]

    def fisher(self, partition: Partition, likelihood: str, flavour: str) -> Fisher:
        """``Σ w F`` over the batches, with weights of sum 1 folded into the output-side vectors."""
        a = _stacked([entry["a"] for entry in self.entries], 0)
        return Fisher(partition, a, self._weighted_g(), likelihood=likelihood, flavour=flavour)

    def kronecker(self, partition: Partition, convention: str) -> KroneckerFisher:
        """All blocks ``G ⊗ A`` of the averaged factors: the weights are on both sides, and positions that a batch
        does not have do not count."""
        most = [max(a.shape[1] for a in layer) for layer in zip(*(e["a"] for e in self.entries), strict=True)]
        power = 0.5 if convention == "expand" else 1.0
        a = [
            [x * (scale * (T / x.shape[1]) ** power) for x, T in zip(entry["a"], most, strict=True)]
            for entry, scale in zip(self.entries, self._scales(), strict=True)
        ]
        return KroneckerFisher(Fisher(partition, _stacked(a, 0), self._weighted_g()), convention)

    def _weighted_g(self) -> list[Tensor]:
        batches = zip(self.entries, self._scales(), strict=True)
        return _stacked([e["g"] if scale == 1 else [g * scale for g in e["g"]] for e, scale in batches], 1)

    def _scales(self) -> list[float]:
        """Root of the weight of every entry over its share of the examples kept."""
        kept = [entry["a"][0].shape[0] for entry in self.entries]
        ages = [self.entries[-1]["batch"] - entry["batch"] for entry in self.entries]
        weights = [entry["N"] * self.decay**age for entry, age in zip(self.entries, ages, strict=True)]
        return [(w / sum(weights) * sum(kept) / n) ** 0.5 for w, n in zip(weights, kept, strict=True)]


def _stacked(batches: list[list[Tensor]], axis: int) -> list[Tensor]:
    """One tensor per layer, batches joined along ``axis``; missing positions become zeros, which add nothing."""
    if len(batches) == 1:
        return list(batches[0])
    layers = []
    for tensors in zip(*batches, strict=True):
        positions = max(x.shape[axis + 1] for x in tensors)
        layers.append(torch.cat([functional.pad(x, (0, 0, 0, positions - x.shape[axis + 1])) for x in tensors], axis))
    return layers
