"""Layers of one shape as one tensor, wherever they are in the network: one batched product in place of many."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from itertools import accumulate, pairwise
from math import prod

import torch
from torch import Tensor

from .one_hot import OneHot, Rows


class Stacks:
    """A flat vector (..., P) as one tensor per group of equal pieces, and back.

    Pieces of one shape (and one ``key``, where keys are given) form a group. A group of several has an axis for
    them, ``(..., members, *shape)``; a group of one has none. The same formula then serves both, and neighbours
    are seen without a copy.

    >>> stacks = Stacks([(1, 2), (3, 1), (1, 2)])
    >>> pairs, single = stacks.split(torch.arange(7))
    >>> pairs.tolist(), tuple(single.shape)
    ([[[0, 1]], [[5, 6]]], (3, 1))
    >>> stacks.join([pairs, single]).tolist()
    [0, 1, 2, 3, 4, 5, 6]
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], keys: Iterable[Hashable] | None = None) -> None:
        groups: dict[Hashable, list[int]] = {}
        for i, key in enumerate(zip(shapes, shapes if keys is None else keys, strict=True)):
            groups.setdefault(key, []).append(i)
        self.groups = tuple(map(tuple, groups.values()))
        self._shapes = shapes
        self._slices = [slice(a, b) for a, b in pairwise((0, *accumulate(map(prod, shapes))))]

    def gather(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """One tensor per group from one per piece; a new axis in front counts the members."""
        return [pieces[i[0]] if len(i) == 1 else torch.stack([pieces[j] for j in i]) for i in self.groups]

    def scatter(self, stacks: Sequence[Tensor | None], dims: int) -> list[Tensor]:
        """The inverse of :meth:`gather` for pieces with ``dims`` axes, behind any number of others; None stays None."""
        pieces: list[Tensor] = [None] * len(self._shapes)
        for members, stack in zip(self.groups, stacks, strict=True):
            if stack is None:
                continue
            for i, piece in zip(members, [stack] if len(members) == 1 else stack.unbind(-1 - dims), strict=True):
                pieces[i] = piece
        return pieces

    def split(self, v: Tensor) -> list[Tensor]:
        """One tensor (..., members, *shape) per group of v (..., P): views of neighbours, copies of others."""
        stacks = []
        for members in self.groups:
            shape, first, last = self._shapes[members[0]], members[0], members[-1]
            if len(members) == 1:
                stacks.append(v[..., self._slices[first]].unflatten(-1, shape))
            elif last - first == len(members) - 1:
                run = v[..., self._slices[first].start : self._slices[last].stop]
                stacks.append(run.unflatten(-1, (len(members), *shape)))
            else:
                pieces = [v[..., self._slices[i]].unflatten(-1, shape) for i in members]
                stacks.append(torch.stack(pieces, dim=-1 - len(shape)))
        return stacks

    def join(self, stacks: Sequence[Tensor]) -> Tensor:
        """The inverse of :meth:`split`, a copy."""
        dims = len(self._shapes[0])
        return torch.cat([piece.flatten(-dims) for piece in self.scatter(stacks, dims)], dim=-1)

    def add_products_(self, v: Tensor, pairs: Iterable[tuple[Tensor, Rows]], alpha: float = 1.0) -> Tensor:
        """``v + alpha · left @ right`` in place, with a pair (left, right) for each group of matrices."""
        views, added = [], []
        for members, (left, right) in zip(self.groups, pairs, strict=True):
            mine = [v[..., self._slices[i]].unflatten(-1, self._shapes[i]) for i in members]
            if isinstance(right, OneHot):
                right.add_product_(mine[0], left, alpha)
            elif left.ndim == right.ndim == 2:  # a single layer, and mostly the large one: no temporary
                mine[0].addmm_(left, right, alpha=alpha)
            else:
                product = torch.einsum("...ij,...jk->...ik", left, right)  # @ would repeat right for every row of v
                views += mine
                added += [product] if len(members) == 1 else product.unbind(-3)
        if views:
            torch._foreach_add_(views, added, alpha=alpha)
        return v
