"""A batch of which each rank has captured its own part: averages and vectors of the whole, the same on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ..method.fisher import Fisher, Uses
from ..method.one_hot import OneHot, Rows
from ..method.partition import Layer
from .distributed import Ranks


class Shards:
    """What all ranks know of a batch that they have captured in parts. With w bytes to a number, a batch costs one rank

    - ``32 L`` bytes, gathered: of each of the L layers, how it was used;
    - ``w Σ_l (i (i + 1) + o (o + 1)) / 2``, summed: triangles of the factors of ``o × i`` layers, i where A is a
      diagonal, once more for the transposed use of a tied weight, and that for each group (:meth:`averaged`);
    - ``w n Σ_l T (i + S o)``, gathered: vectors of its n examples that are kept, or of the rank that has most of them;
      ``8 + w`` in place of ``w i`` for a one-hot input (:meth:`gathered`).

    Args:
        ranks: those who have the parts.
        F, seen: what this rank has captured, and the layers that took part.
        sizes: the number of examples of each rank.

    Attributes:
        N: examples of all ranks together.
    """

    def __init__(self, ranks: Ranks, F: Fisher, seen: Sequence[str], sizes: Sequence[int]) -> None:
        self.ranks, self.F, self.sizes, self.N = ranks, F, list(sizes), sum(sizes)
        own = zip(F.partition.names, F.a, F.swapped, strict=True)
        facts = [[a.shape[-2], swapped, isinstance(a, OneHot), name in seen] for name, a, swapped in own]
        rows = ranks.gather(torch.tensor(facts, dtype=torch.int64, device="cpu").flatten())
        self._uses = [row.view(-1, 4).tolist() for row in rows]  # T, swapped, one-hot, seen: of each rank and layer

    # ---- averages ---------------------------------------------------------------------------------------

    def averaged(self, moments: Mapping[str, Uses], *, by_use: bool) -> tuple[dict[str, Uses], dict[str, int]]:
        """Means of A and G over the examples of all ranks that have reached a layer, and how many these are.

        Args:
            moments: the means over this rank's examples, of the layers that they have reached.
            by_use: whether they are K-FAC's, which has two pairs for a tied weight and a diagonal A for one-hot inputs.
        """
        counts, parts, added = {}, [], []
        for l, layer in enumerate(self.F.partition.layers):
            reached = [(n, uses[l]) for n, uses in zip(self.sizes, self._uses, strict=True) if uses[l][3]]
            if not reached:
                continue
            N = counts[layer.name] = sum(n for n, _ in reached)
            diagonal = by_use and all(one_hot for _, (_, _, one_hot, _) in reached)
            plain = not by_use or any(T > swapped for _, (T, swapped, *_) in reached)
            swapped = by_use and any(swapped for _, (_, swapped, *_) in reached)
            for kind in [0] * plain + [1] * swapped:
                own = moments[layer.name][kind] if layer.name in moments else None
                A, G = self._zeros(layer) if own is None else (X * (self.F.N / N) for X in own)
                if A.ndim < G.ndim and not diagonal:
                    A = A.diag_embed()
                elif A.ndim == G.ndim and diagonal:
                    A = A.diagonal(0, -2, -1)
                parts.append((layer, kind, diagonal))
                added += [A if diagonal else _triangle(A), _triangle(G)]
        totals = iter(self.ranks.sum(added) if added else ())
        found: dict[str, list[tuple[Tensor, Tensor] | None]] = {name: [None, None] for name in counts}
        for layer, kind, diagonal in parts:
            A, G = next(totals), next(totals)
            found[layer.name][kind] = (A if diagonal else _symmetric(A, layer.features), _symmetric(G, layer.unit[0]))
        return {name: tuple(uses) for name, uses in found.items()}, counts

    def _zeros(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Factors of a layer that this rank has not reached."""
        return tuple(self.F.g[0].new_zeros(*layer.axis, n, n) for n in (layer.features, layer.unit[0]))

    # ---- vectors ----------------------------------------------------------------------------------------

    def gathered(self, room: int) -> list[tuple[int, list[Fisher]]]:
        """At most so many examples of the whole batch, spread over it evenly, as each rank had them; and of how many
        examples they are. Where ranks differ in how they use a layer, each one's are by themselves.
        """
        room, ends = min(room, self.N), list(accumulate(self.sizes))
        chosen = torch.arange(room, device="cpu") * self.N // room
        starts = [end - n for n, end in zip(self.sizes, ends, strict=True)]
        kept = [chosen[(chosen >= a) & (chosen < b)] - a for a, b in zip(starts, ends, strict=True)]
        packed = self._packed(kept[self.ranks.rank].to(self.F.device))
        lengths = [sum(part.bytes for part in self._parts(r, len(x))) for r, x in enumerate(kept)]
        found = self.ranks.gather(packed, lengths)
        counts = [(r, n, len(x)) for r, (n, x) in enumerate(zip(self.sizes, kept, strict=True)) if len(x)]
        pieces = [(n, self._unpacked(r, count, found[r])) for r, n, count in counts]
        if all([use[:3] for use in uses] == [use[:3] for use in self._uses[0]] for uses in self._uses):
            return [(self.N, [F for _, F in pieces])]
        return [(n, [F]) for n, F in pieces]

    def _parts(self, rank: int, n: int) -> list[_Part]:
        """What lies where in the bytes of a rank's n examples: whole numbers first, so that all are aligned."""
        parts = []
        for l, (layer, (T, swapped, one_hot, _)) in enumerate(
            zip(self.F.partition.layers, self._uses[rank], strict=True)
        ):
            rows = (*layer.axis, *[self.F.S] * bool(swapped), n, T)
            if one_hot:
                parts += [_Part(l, "index", rows, torch.int64), _Part(l, "value", rows, self.F.dtype)]
            else:
                parts.append(_Part(l, "a", (*rows, layer.features), self.F.dtype))
            parts.append(_Part(l, "g", (*layer.axis, self.F.S, n, T, layer.unit[0]), self.F.dtype))
        return sorted(parts, key=lambda part: part.kind != "index")

    def _packed(self, chosen: Tensor) -> Tensor:
        """The vectors of these examples of this rank, as bytes."""
        found = []
        for part in self._parts(self.ranks.rank, len(chosen)):
            a, g = (x.index_select(-3, chosen) for x in (self.F.a[part.layer], self.F.g[part.layer]))
            x = {"a": a, "g": g}[part.kind] if part.kind in "ag" else getattr(a, part.kind)
            found.append(x.contiguous().view(-1).view(torch.uint8))
        return torch.cat(found)

    def _unpacked(self, rank: int, n: int, packed: Tensor) -> Fisher:
        """The Fisher of a rank's n examples, from what :meth:`_packed` made of it there."""
        parts = self._parts(rank, n)
        pieces = packed.split([part.bytes for part in parts])
        found: list[dict[str, Tensor]] = [{} for _ in self.F.partition.layers]
        for part, x in zip(parts, pieces, strict=True):
            found[part.layer][part.kind] = x.view(part.dtype).view(part.shape)
        a: list[Rows] = [
            own["a"] if "a" in own else OneHot(own["index"], own["value"], layer.features)
            for layer, own in zip(self.F.partition.layers, found, strict=True)
        ]
        swapped = [swapped for _, swapped, *_ in self._uses[rank]]
        kind = {"likelihood": self.F.likelihood, "flavour": self.F.flavour}
        return Fisher(self.F.partition, a, [own["g"] for own in found], **kind, swapped=swapped)


class _Part(NamedTuple):
    """Numbers of one layer: ``"a"`` or, of one-hot inputs, ``"index"`` and ``"value"``; and ``"g"``."""

    layer: int
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def _triangle(X: Tensor) -> Tensor:
    """What lies on and above the diagonal of X (..., n, n), (..., n (n + 1) / 2)."""
    rows, cols = torch.triu_indices(*X.shape[-2:], device=X.device)
    return X[..., rows, cols]


def _symmetric(x: Tensor, n: int) -> Tensor:
    """The matrix (..., n, n) with this triangle, twice."""
    X = x.new_empty(*x.shape[:-1], n, n)
    rows, cols = torch.triu_indices(n, n, device=x.device)
    X[..., rows, cols] = X[..., cols, rows] = x
    return X
