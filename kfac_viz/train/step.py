"""How far to go along a direction: pure rules on the quadratic model of the loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..method.fisher import Fisher

STEP_RULES = ("fixed", "kl_clip", "quadratic")


@dataclass(frozen=True)
class QuadraticModel:
    """``m(δ) = gᵀδ + ½ δᵀ(F + diag ridge)δ``: the change of the loss that a step δ should make.

    ``ridge`` is λ, or per parameter (P,) λ plus the weight decay that is part of the loss.
    """

    F: Fisher
    g: Tensor
    ridge: float | Tensor

    def along(self, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Slopes ``D g`` (k,) and curvatures ``D (F + diag ridge) Dᵀ`` (k, k) of directions D, the rows of (k, P)."""
        s = self.F.scores(directions).flatten(1)
        return directions @ self.g, s @ s.mT / self.F.N + directions @ (self.ridge * directions).mT

    def change(self, step: Tensor) -> float:
        """m(δ) for δ (P,); negative where the model goes down."""
        slope, curvature = self.along(step[None])
        return float(slope + 0.5 * curvature[0])


def kl_scale(curvature: float, limit: float) -> float:
    """Factor ≤ 1 that brings ``δᵀ(F + λI)δ``, no less than twice the KL divergence of the step, down to ``limit``."""
    return min(1.0, (limit / curvature) ** 0.5) if curvature > 0 else 1.0


def best_coefficients(slopes: Tensor, curvatures: Tensor) -> Tensor:
    """Minimiser c of ``slopesᵀc + ½ cᵀ curvatures c`` (Martens and Grosse 2015, section 7).

    Directions that are zero get no share, and those that depend on each other the shortest one.

    >>> best_coefficients(torch.tensor([-2.0, 0.0]), torch.tensor([[4.0, 0.0], [0.0, 0.0]]))
    tensor([0.5000, 0.0000])
    """
    b, B = slopes.double().cpu(), curvatures.double().cpu()
    scale = B.diagonal().clamp_min(0).sqrt()
    scale = torch.where(scale > 0, scale.reciprocal(), 0.0)
    solution = torch.linalg.pinv(B * scale * scale[:, None], rtol=1e-10, hermitian=True) @ (-b * scale)
    return (solution * scale).to(slopes)


def adapted_damping(damping: float, ratio: float, steps: int, omega: float = 19 / 20) -> float:
    """Levenberg–Marquardt: smaller where the model predicted well, larger where not (section 6.5).

    ``ratio`` is the true change of the loss over the predicted one; ``steps`` since the last adaptation.

    >>> adapted_damping(1.0, 0.9, 5) < 1.0 < adapted_damping(1.0, 0.1, 5)
    True
    """
    if ratio > 0.75:
        return damping * omega**steps
    if not ratio >= 0.25:  # NaN counts as a failure
        return damping / omega**steps
    return damping
