"""What an optimizer remembers of curvature: averaged Kronecker factors, and the vectors of the last batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from .fisher import Fisher
from .kronecker import KroneckerFactors
from .partition import Partition


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

    def add(self, F: Fisher, seen: tuple[str, ...], *, same_batch: bool = False) -> None:
        """Take in the layers ``seen`` of F; ``same_batch`` for a further part of the newest batch."""
        for name in seen:
            A, G = F.factors(name, name, self.convention)
            before = self.weight.get(name, 0.0) * (1.0 if same_batch else self.decay)
            self.weight[name] = before + F.N
            share = F.N / self.weight[name]
            self.A[name] = torch.lerp(self.A[name], A, share) if before else A
            self.G[name] = torch.lerp(self.G[name], G, share) if before else G

    def factors(self, partition: Partition) -> KroneckerFactors:
        """The factors as K-FAC takes them, once a layer was seen; one that was never seen has zeros."""
        like = next(iter(self.A.values()))
        A = tuple(self.A.get(x.name, like.new_zeros(1).expand(x.features, x.features)) for x in partition.layers)
        G = tuple(self.G.get(x.name, like.new_zeros(1).expand(x.out, x.out)) for x in partition.layers)
        return KroneckerFactors(partition, A, G)


class Window:
    """The captured vectors of the last ``batches`` observed batches, as one weighted :class:`Fisher`.

    At most ``examples`` in all, evenly spaced within each batch, so that the first batch is kept whole if it
    fits and later ones share the room. A batch of N examples that is k batches old weighs ``N decay**k``.
    """

    def __init__(self, batches: int, examples: int, decay: float) -> None:
        self.batches, self.examples, self.decay = batches, examples, decay
        self.entries: list[dict] = []  # newest last: {"N": examples it stands for, "a": [...], "g": [...]}

    def add(self, F: Fisher, *, same_batch: bool = False) -> None:
        """Take in F; ``same_batch`` for a further part of the newest batch."""
        if self.entries and self.entries[-1]["g"][0].shape[0] != F.S:
            self.entries.clear()  # another number of vectors per example cannot be stacked
        entry = {"N": F.N, "a": list(F.a), "g": list(F.g)}
        if same_batch and self.entries:
            newest = self.entries.pop()
            entry = {
                "N": newest["N"] + F.N,
                "a": _stacked([newest["a"], entry["a"]], 0),
                "g": _stacked([newest["g"], entry["g"]], 1),
            }
        self.entries = [*self.entries, entry][-self.batches :]
        share = max(1, self.examples // len(self.entries))
        for entry in self.entries:
            kept = entry["a"][0].shape[0]
            if kept > share:
                chosen = torch.arange(share, device=F.device) * kept // share
                entry["a"] = [a[chosen] for a in entry["a"]]
                entry["g"] = [g[:, chosen] for g in entry["g"]]

    def fisher(self, partition: Partition, likelihood: str, flavour: str) -> Fisher:
        """``Σ w F`` over the batches, with weights of sum 1 folded into the output-side vectors."""
        kept = [entry["a"][0].shape[0] for entry in self.entries]
        weights = [entry["N"] * self.decay**age for age, entry in enumerate(reversed(self.entries))][::-1]
        scales = [(w / sum(weights) * sum(kept) / n) ** 0.5 for w, n in zip(weights, kept, strict=True)]
        a = _stacked([entry["a"] for entry in self.entries], 0)
        g = _stacked(
            [
                entry["g"] if scale == 1 else [g * scale for g in entry["g"]]
                for entry, scale in zip(self.entries, scales, strict=True)
            ],
            1,
        )
        return Fisher(partition, a, g, likelihood=likelihood, flavour=flavour)


def _stacked(batches: list[list[Tensor]], axis: int) -> list[Tensor]:
    """One tensor per layer, batches joined along ``axis``; missing positions become zeros, which add nothing."""
    if len(batches) == 1:
        return list(batches[0])
    layers = []
    for tensors in zip(*batches, strict=True):
        positions = max(x.shape[axis + 1] for x in tensors)
        layers.append(torch.cat([functional.pad(x, (0, 0, 0, positions - x.shape[axis + 1])) for x in tensors], axis))
    return layers
