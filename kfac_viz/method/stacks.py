"""Layers of one shape as one tensor, wherever they are in the network: one batched product in place of many."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from itertools import accumulate, pairwise
from math import prod

import torch
from torch import Tensor

from .one_hot import OneHot, Rows


class Stacks:
    """A flat vector (..., P) as one tensor per group of equal matrices, and back.

    Pieces of one shape (and one ``key``, where keys are given) form a group. A group of several has an axis for
    them, ``(..., members, *shape)``; a group of one has none. The same formula then serves both, and neighbours
    are seen without a copy. A piece may itself be ``counts`` of such matrices, one below the other: it then has an axis
    for them wherever it stands alone.

    Attributes:
        groups: the pieces of each group.
        sizes: the number of matrices in each group, which has an axis for them where there are several.

    >>> stacks = Stacks([(1, 2), (3, 1), (1, 2)])
    >>> pairs, single = stacks.split(torch.arange(7))
    >>> pairs.tolist(), tuple(single.shape)
    ([[[0, 1]], [[5, 6]]], (3, 1))
    >>> stacks.join([pairs, single]).tolist()
    [0, 1, 2, 3, 4, 5, 6]
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        keys: Iterable[Hashable] | None = None,
        counts: Sequence[int] | None = None,
    ) -> None:
        groups: dict[Hashable, list[int]] = {}
        for i, key in enumerate(zip(shapes, shapes if keys is None else keys, strict=True)):
            groups.setdefault(key, []).append(i)
        self.groups = tuple(map(tuple, groups.values()))
        self._counts = (1,) * len(shapes) if counts is None else tuple(counts)
        self.sizes = tuple(sum(self._counts[i] for i in members) for members in self.groups)
        self._shapes = [shape if n == 1 else (n, *shape) for shape, n in zip(shapes, self._counts, strict=True)]
        self._dims = [len(shape) for shape in shapes]
        self._slices = [slice(a, b) for a, b in pairwise((0, *accumulate(map(prod, self._shapes))))]

    def gather(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """One tensor per group from one per piece; a new axis in front counts the members."""
        return [self._together([pieces[i] for i in members], members, 0) for members in self.groups]

    def scatter(self, stacks: Sequence[Tensor | None], dims: int) -> list[Tensor]:
        """The inverse of :meth:`gather` for pieces with ``dims`` axes, behind any number of others; None stays None."""
        pieces: list[Tensor] = [None] * len(self._shapes)
        for members, stack in zip(self.groups, stacks, strict=True):
            for i, piece in zip(members, self.apart(members, stack, -1 - dims), strict=True):
                pieces[i] = piece
        return pieces

    def units(self, stacks: Sequence[Tensor | None], dims: int) -> list[Tensor]:
        """As :meth:`scatter`, and the matrices of a piece one by one."""
        found = zip(self.scatter(stacks, dims), self._counts, strict=True)
        return [x for piece, n in found for x in ([piece] * n if n == 1 or piece is None else piece.unbind(-1 - dims))]

    def _together(self, pieces: list[Tensor], members: Sequence[int], axis: int) -> Tensor:
        """One tensor of the pieces of a group, whose members an axis at that place is to count."""
        counts = [self._counts[i] for i in members]
        if len(members) == 1:
            return pieces[0]
        if max(counts) == 1:
            return torch.stack(pieces, axis)
        return torch.cat([x.unsqueeze(axis) if n == 1 else x for x, n in zip(pieces, counts, strict=True)], axis)

    def apart(self, members: Sequence[int], stack: Tensor | None, axis: int) -> Sequence[Tensor]:
        """The inverse of :meth:`_together`: views."""
        counts = [self._counts[i] for i in members]
        if len(members) == 1 or stack is None:
            return [stack] * len(members)
        if max(counts) == 1:
            return stack.unbind(axis)
        parts = zip(stack.split(counts, axis), counts, strict=True)
        return [part.squeeze(axis) if n == 1 else part for part, n in parts]

    def split(self, v: Tensor) -> list[Tensor]:
        """One tensor (..., members, *shape) per group of v (..., P): views of neighbours, copies of others."""
        stacks = []
        for members, size in zip(self.groups, self.sizes, strict=True):
            first, last = members[0], members[-1]
            shape = self._shapes[first][-self._dims[first] :]
            if last - first == len(members) - 1:
                run = v[..., self._slices[first].start : self._slices[last].stop]
                stacks.append(run.unflatten(-1, shape if size == 1 else (size, *shape)))
            else:
                pieces = [v[..., self._slices[i]].unflatten(-1, self._shapes[i]) for i in members]
                stacks.append(self._together(pieces, members, -1 - len(shape)))
        return stacks

    def join(self, stacks: Sequence[Tensor]) -> Tensor:
        """The inverse of :meth:`split`, a copy."""
        pieces = zip(self.scatter(stacks, self._dims[0]), self._shapes, strict=True)
        return torch.cat([piece.flatten(-len(shape)) for piece, shape in pieces], dim=-1)

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
                added += self.apart(members, product, -3)
        if views:
            torch._foreach_add_(views, added, alpha=alpha)
        return v
