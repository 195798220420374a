"""Where the parameters of the layers lie in a flat vector, and which group of options each of them follows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..method.names import names_of
from ..method.partition import Partition
from ..scores.layers import layers_of


class Layout:
    """The way from flat vectors (P,) over the layers to the parameters of an optimizer, and back.

    Attributes:
        pieces: each piece of a layer with its parameter, in the order of the vector; a packed weight has several.
        covered: the parameters of the layers. All others of the optimizer have no curvature.
        group: the group of every parameter of the optimizer.
        groups: those with parameters of the layers.
        loose: parameters of no known module, which the way they are used may give or deny curvature.
        names: of the parameters of the model.
    """

    def __init__(self, partition: Partition, model: nn.Module, groups: list[dict[str, Any]]) -> None:
        own = zip(partition.layers, partition.parameters(model), strict=True)
        self.partition = partition
        self.pieces = [pair for layer, parameters in own for pair in zip(layer.pieces, parameters, strict=True)]
        self.covered = {p for _, p in self.pieces}
        self.group = {p: group for group in groups for p in group["params"]}
        self.groups = [group for group in groups if not self.covered.isdisjoint(group["params"])]
        self.names = names_of(model)
        loose = {piece.parameter for layer in layers_of(model).values() if layer.loose for piece in layer.pieces}
        self.loose = {p for p, name in self.names.items() if name in loose}

    @property
    def like(self) -> Tensor:
        """An empty tensor of the dtype (at least float32) and device of the statistics, where the model is now."""
        p = self.pieces[0][1]
        return torch.empty(0, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)

    def split(self, v: Tensor) -> list[Tensor]:
        """Views of v (P,), one for each of the pieces."""
        matrices = zip(self.partition.layers, self.partition.matrices(v), strict=True)
        return [piece.view(V) for layer, V in matrices for piece in layer.pieces]

    def joined(self, tensors: dict[Tensor, Tensor]) -> Tensor:
        """One vector (P,) from a tensor for each parameter; those that have none get zeros."""
        new = self.like.new_empty if self.covered <= tensors.keys() else self.like.new_zeros
        v = new(self.partition.size)
        pairs = zip(self.pieces, self.split(v), strict=True)
        views = [(view, piece.of(tensors[p])) for (piece, p), view in pairs if p in tensors]
        if views:
            torch._foreach_copy_(*map(list, zip(*views, strict=True)))
        return v

    def option(self, name: str) -> float | Tensor:
        """An option of the groups: one number where they agree, else one for each entry of the vector, (P,)."""
        values = {float(group[name]) for group in self.groups}
        if len(values) == 1:
            return values.pop()
        v = self.like.new_empty(self.partition.size)
        for (_, p), view in zip(self.pieces, self.split(v), strict=True):
            view.fill_(float(self.group[p][name]))
        return v
