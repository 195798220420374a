"""Muon, SOAP and Shampoo as their libraries have them, which see the weights of a network as matrices.

Beside ``directions`` of ``kfac_viz/studies/common/batches.py``, which has the papers' formulas for one step, they keep
running averages and momentum, and q, k and v of an attention are one packed matrix. A test compares their first steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class OfMatrices:
    """Optimizers that see each weight as a matrix; a convolution's kernel is (out, in · kernel).

    Args:
        make: from the matrices and all other parameters of a network to one or more optimizers.
    """

    def __init__(self, model: nn.Module, make: Callable[[list[Tensor], list[Tensor]], list]) -> None:
        self.parameters = list(model.parameters())
        self.matrices = [(p, nn.Parameter(p.detach().flatten(1))) for p in self.parameters if p.ndim > 1]  # views
        self.parts = make([matrix for _, matrix in self.matrices], [p for p in self.parameters if p.ndim < 2])

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.grad = None

    def step(self) -> None:
        for p, matrix in self.matrices:
            matrix.grad = p.grad.flatten(1)
        for part in self.parts:
            part.step()


def muon(model: nn.Module, lr: float, weight_decay: float = 0.0) -> OfMatrices:
    """PyTorch's Muon for all matrices, at the scale of Adam's rates, and Adam with the same rate for the rest. Its
    Newton–Schulz iteration makes the singular values lie near 1, in bfloat16."""

    def make(matrices: list[Tensor], rest: list[Tensor]) -> list:
        own = torch.optim.Muon(matrices, lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        return [own, *([torch.optim.Adam(rest, lr)] if rest else [])]

    return OfMatrices(model, make)


def soap(model: nn.Module, lr: float, **options) -> OfMatrices:
    """SOAP of pytorch_optimizer: its first step only gathers; vectors as Adam."""
    from pytorch_optimizer import SOAP

    return OfMatrices(model, lambda matrices, rest: [SOAP(matrices + rest, lr, **options)])


def shampoo(model: nn.Module, lr: float, **options) -> OfMatrices:
    """Shampoo of pytorch_optimizer in the form of Anil et al. (2021, arXiv 2002.09018): running averages, momentum, and
    the length of each layer's step that of RMSProp (grafting); vectors as RMSProp."""
    from pytorch_optimizer import ScalableShampoo

    return OfMatrices(model, lambda matrices, rest: [ScalableShampoo(matrices + rest, lr, **options)])
