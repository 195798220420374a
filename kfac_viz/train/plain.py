"""The rule of parameters without curvature: Adam's update (Kingma and Ba 2015, arXiv 1412.6980, algorithm 1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BETA2, EPSILON = 0.999, 1e-8
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of a parameter, in its state, under the names of torch.optim.Adam

Moments = tuple[Tensor, Tensor, Tensor]


def no_moments(p: Tensor) -> Moments:
    """Those of a parameter before its first step: t (), m and v in its shape, at least in float32."""
    zeros = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
    return zeros.new_zeros(()), zeros, torch.zeros_like(zeros)


def adam(
    grads: list[Tensor], moments: list[Moments], *, lr: float | Tensor, beta1: float
) -> tuple[list[Tensor], list[Moments]]:
    """``−lr m̂ / (√v̂ + ε)`` and the new (t, m, v) of each parameter; what is given stays as it is.

    ``m ← β₁ m + (1 − β₁) g``, ``v ← β₂ v + (1 − β₂) g²``, ``m̂ = m / (1 − β₁ᵗ)`` and ``v̂ = v / (1 − β₂ᵗ)``. The count t
    is a tensor, so that a step that is masked on the device is not counted.

    >>> (step,), _ = adam([torch.tensor([3.0, -0.1])], [no_moments(torch.zeros(2))], lr=0.5, beta1=0.9)
    >>> step
    tensor([-0.5000,  0.5000])
    """
    t, m, v = (list(each) for each in zip(*moments, strict=True))
    grads = [g.to(x.dtype) for g, x in zip(grads, m, strict=True)]
    t = torch._foreach_add(t, 1)
    m = torch._foreach_lerp(m, grads, 1 - beta1)
    v = torch._foreach_lerp(v, torch._foreach_mul(grads, grads), 1 - BETA2)
    steps = torch._foreach_div(m, _shares(t, beta1))
    sizes = torch._foreach_sqrt(torch._foreach_div(v, _shares(t, BETA2)))
    steps = torch._foreach_div(steps, torch._foreach_add(sizes, EPSILON))
    return torch._foreach_mul(steps, -lr), list(zip(t, m, v, strict=True))


def _shares(t: list[Tensor], beta: float) -> list[Tensor]:
    """``1 − βᵗ``, without the cancellation that it would have in float32."""
    decays = torch._foreach_mul(t, math.log(beta) if beta else -math.inf)
    return torch._foreach_neg(torch._foreach_expm1(decays))
