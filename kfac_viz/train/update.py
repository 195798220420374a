"""What a step is: pure functions of gradient, curvature and last step, none of which waits for the host."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..method.fisher import Fisher
from .options import Options

ADAPT_EVERY = 5  # steps between two looks at the reduction ratio (Martens and Grosse 2015, section 6.5)
REJECTION = 4.0  # factor on λ after a step that went up


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
        return directions @ self.g, self.form(directions)

    def form(self, directions: Tensor) -> Tensor:
        """The curvatures alone."""
        s = self.F.scores(directions).flatten(1)
        return s @ s.mT / self.F.N + directions @ (self.ridge * directions).mT


@dataclass(frozen=True)
class Update:
    """A step (P,), the momentum that it leaves (P,) or None, and what was measured on the way, still on the device."""

    step: Tensor
    momentum: Tensor | None
    facts: dict[str, Tensor]


def update(
    v: Tensor,
    last: Tensor | None,
    model: QuadraticModel,
    options: Options,
    *,
    lr: float | Tensor,
    momentum: float | Tensor,
    damping: float,
    predicting: bool,
) -> Update:
    """The step from the preconditioned gradient v (P,) and the last step's momentum (P,).

    ``fixed`` and ``line_search``, which scales it later: ``m ← μ m + v`` and the step ``−lr m``; ``kl_clip`` shortens
    v first; ``quadratic`` takes the best combination of v and the last step, which lr then scales. With ``predicting``
    the facts say by how much the model's value changes along the step.

    Args:
        lr, momentum: one number, or one per parameter (P,).
    """
    facts: dict[str, Tensor] = {}
    if options.step_rule == "quadratic":
        top = lr if isinstance(lr, float) else lr.max()
        share = 1.0 if isinstance(lr, float) else torch.where(top > 0, lr / top, 0.0)
        D = torch.stack([-share * v] if last is None else [-share * v, last])
        c = best_coefficients(*model.along(D))
        step = left = (top * c) @ D
        facts["step length"] = c[0]
        facts["momentum coefficient"] = c[1] if len(c) > 1 else torch.zeros_like(c[0])
    else:
        if options.step_rule == "kl_clip":
            form = replace(model, ridge=damping).form((lr * v)[None])
            facts["clip"] = scale = kl_scale(form[0, 0], options.kl_clip)
            v = v * scale
        left = v if last is None else momentum * last + v
        step = -lr * left
    if predicting:
        (slope,), ((curvature,),) = model.along(step[None])
        facts["predicted"] = facts["overshoot"] = slope + 0.5 * curvature
    return Update(step, None if last is None else left, facts)


def kl_scale(curvature: Tensor, limit: float) -> Tensor:
    """Factor ≤ 1 that brings ``δᵀ(F + λI)δ``, no less than twice the KL divergence of the step, down to ``limit``.

    NaN where the form overflows: no step can be taken then.
    """
    scale = ((limit**0.5) * curvature.clamp_min(0).rsqrt()).clamp_max(1.0)
    return scale + 0 * curvature


def best_coefficients(slopes: Tensor, curvatures: Tensor) -> Tensor:
    """Minimiser c of ``slopesᵀc + ½ cᵀ curvatures c`` for one or two directions (Martens and Grosse 2015, section 7).

    Directions that are zero get no share, and those that depend on each other the shortest one. Scaled to a
    diagonal of ones, two directions with correlation ρ have the eigenvalues 1 ± ρ and eigenvectors (1, ±1).

    >>> best_coefficients(torch.tensor([-2.0, 0.0]), torch.tensor([[4.0, 0.0], [0.0, 0.0]]))
    tensor([0.5000, 0.0000])
    """
    b, B = slopes.double(), curvatures.double()
    scale = B.diagonal().clamp_min(0).rsqrt()
    scale = torch.where(scale.isinf(), 0.0, scale)
    c = -b * scale
    if len(c) == 2:
        ρ = B[0, 1] * scale[0] * scale[1]
        along = torch.stack([c[0] + c[1], c[0] - c[1]]) / 2
        values = torch.stack([1 + ρ, 1 - ρ])
        along = torch.where(values > 1e-10 * values.max(), along / values, 0.0)
        c = torch.stack([along[0] + along[1], along[0] - along[1]])
    return (c * scale + 0 * B.sum()).to(slopes)  # NaN where the model overflows: no length is right then


def judged_damping(damping: float, change: float, ratio: float, step: int) -> float:
    """λ after a step, counted from 0, that changed the loss by ``change``, ``ratio`` of what the model predicted: four
    times as large where the loss went up, which NaN counts as, and otherwise adapted at every fifth step.

    >>> judged_damping(0.1, 0.2, -1.0, 3), judged_damping(0.1, -0.2, 0.9, 3)
    (0.4, 0.1)
    """
    if not change <= 0:
        return max(REJECTION * damping, 1e-8)
    return damping if step % ADAPT_EVERY else adapted_damping(damping, ratio, ADAPT_EVERY)


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
