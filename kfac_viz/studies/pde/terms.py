"""The loss of a differential equation as a sum of two means, inside and on the boundary: one pass for both.

The loss is ``½ Σ mean r²`` over the terms (Guzmán-Cordero et al. 2025, arXiv 2505.12149, section 2). J (N, P) has a row
for each point: the derivative of its residual, divided by the root of the number of points of its term. So JᵀJ is the
Gauss–Newton matrix, and Jᵀr the gradient. The study needs J itself, and each term apart, for what others train with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...problems.equations import Equation, Jet


class Term(NamedTuple):
    """One mean of the loss: what a pass forwards and backwards through the network leaves of its n points.

    Attributes:
        inputs: of each layer, (T, n, in + 1), with T positions: value, derivatives and Laplacian, or the value alone.
        slopes: derivatives of the residuals with respect to what the layer gives, over √n, (T, n, out).
        residuals: over √n, (n,).
    """

    inputs: list[Tensor]
    slopes: list[Tensor]
    residuals: Tensor


def both_terms(problem: Equation, inputs: Tensor) -> tuple[Term, ...]:
    """The terms inside and on the boundary at the points ``inputs`` (N, d + 1), whose last column says where they lie;
    a term without points is left out."""
    terms = []
    for x, boundary in _split(inputs):
        layers: list[tuple[Tensor, Tensor]] = []
        with torch.enable_grad():
            r = _residuals(problem, x, boundary, layers)
            slopes = torch.autograd.grad(r.sum(), [z for _, z in layers])
        terms.append(Term([a.detach() for a, _ in layers], list(slopes), r.detach()))
    return tuple(terms)


@torch.no_grad()
def loss(problem: Equation, inputs: Tensor) -> float:
    """``½ Σ mean r²`` at these points."""
    return sum(0.5 * float(_residuals(problem, x, boundary).square().sum()) for x, boundary in _split(inputs))


def _split(inputs: Tensor) -> list[tuple[Tensor, bool]]:
    boundary = inputs[:, -1] > 0
    found = [(inputs[~boundary, :-1], False), (inputs[boundary, :-1], True)]
    return [(x, kind) for x, kind in found if len(x)]


def _residuals(problem: Equation, x: Tensor, boundary: bool, layers: list | None = None) -> Tensor:
    """Residuals over √n, (n,), at points x (n, d); ``layers`` is given what goes into each layer and what comes out.

    A layer multiplies the T positions of a point by ``[W b]``, with 1 appended to the value and 0 to derivatives.
    """
    model, (n, d) = problem.model, x.shape
    h = x[None]
    if not boundary:
        steps = torch.eye(d, dtype=x.dtype, device=x.device)[:, None].expand(d, n, d)
        h = torch.cat([h, steps, torch.zeros_like(h)])
    last = torch.zeros(*h.shape[:2], 1, dtype=x.dtype, device=x.device)
    last[0] = 1
    for module in model.net:
        if isinstance(module, nn.Linear):
            a = torch.cat([h, last], -1)
            h = a @ torch.cat([module.weight, module.bias[:, None]], 1).T
            if layers is not None:
                layers.append((a, h))
        elif boundary:
            h = torch.tanh(h)
        else:
            first, σ = h[1:-1], torch.tanh(h[0])
            slope = 1 - σ.square()
            bend = -2 * σ * slope * first[model.space.start :].square().sum(0)
            h = torch.cat([σ[None], slope * first, (slope * h[-1] + bend)[None]])
    u = h[..., 0]
    r = u[0] - model.solution(x) if boundary else model.operator(x, Jet(u[0], u[1:-1].T, u[-1]))
    return r / n**0.5


def jacobian(terms: Sequence[Term]) -> tuple[Tensor, Tensor]:
    """J (N, P) of all points, and their residuals r (N,)."""
    rows = [torch.cat([_outer(a, g) for a, g in zip(t.inputs, t.slopes, strict=True)], 1) for t in terms]
    return torch.cat(rows), torch.cat([t.residuals for t in terms])


def _outer(a: Tensor, g: Tensor) -> Tensor:
    """``Σ_t g aᵀ`` of each point, (n, out · (in + 1))."""
    return (g.permute(1, 2, 0) @ a.permute(1, 0, 2)).flatten(1)


def gradient(terms: Sequence[Term]) -> Tensor:
    """``Jᵀr`` (P,) without J."""
    layers = range(len(terms[0].inputs))
    parts = [sum((t.slopes[l] * t.residuals[:, None]).flatten(0, 1).T @ t.inputs[l].flatten(0, 1) for t in terms)
             for l in layers]  # fmt: skip
    return torch.cat([part.flatten() for part in parts])


def along(terms: Sequence[Term], D: Tensor) -> Tensor:
    """``J dᵀ`` for the rows d of D (k, P) without J, (k, N)."""
    found = []
    for term in terms:
        total, start = torch.zeros(len(D), len(term.residuals), dtype=D.dtype), 0
        for a, g in zip(term.inputs, term.slopes, strict=True):
            size = g.shape[-1] * a.shape[-1]
            V = D[:, start : start + size].view(len(D), 1, g.shape[-1], a.shape[-1])
            total += ((a @ V.mT) * g).sum((1, 3)) if len(D) else 0
            start += size
        found.append(total)
    return torch.cat(found, 1)
