"""What is right, in float64: derivatives one example at a time, and formulas with dense matrices."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import kfac_viz as kv
from kfac_viz.method.one_hot import dense

from .judge import F64, Try

ROUND_OFF = 1e3  # factor on eps · condition that no correct result exceeds
HOPELESS = 0.1  # where eps · condition is larger, only finiteness is asked for


@dataclass
class Truth:
    """Jacobians of every example by autograd on the weights, and what the outputs make of them."""

    J: Tensor  # (N, outputs, P)
    outputs: Tensor  # (N, …)
    precision: torch.dtype  # of the outputs that the model returns

    def fisher(self, likelihood: str, targets: Tensor | None = None) -> Tensor:
        """``(1/N) Σ JᵀHJ``, or with targets ``(1/N) Σ Jᵀ r rᵀ J``."""
        f = self.outputs.flatten(1)
        if targets is not None:
            scores = torch.einsum("no,nop->np", residuals(self.outputs, targets, likelihood).flatten(1), self.J)
            return scores.T @ scores / len(f)
        return torch.einsum("nop,noq,nqr->pr", self.J, output_hessian(self.outputs, likelihood), self.J) / len(f)


def output_hessian(outputs: Tensor, likelihood: str) -> Tensor:
    """Second derivatives of the loss by the flattened outputs, (N, outputs, outputs)."""
    f = outputs.flatten(1)
    if likelihood == "gaussian":
        return torch.eye(f.shape[1], dtype=F64).expand(len(f), -1, -1)
    if likelihood == "bernoulli":
        return torch.diag_embed(f.sigmoid() * (-f).sigmoid())
    p = outputs.softmax(-1).flatten(1, -2) if outputs.ndim > 2 else outputs.softmax(-1)[:, None]
    H = torch.diag_embed(p) - p[..., :, None] * p[..., None, :]  # (N, R, C, C)
    return torch.stack([torch.block_diag(*position) for position in H])


def residuals(outputs: Tensor, targets: Tensor, likelihood: str) -> Tensor:
    """Derivatives of the loss by the outputs, written out."""
    if likelihood == "categorical":
        hot = torch.zeros_like(outputs).scatter_(-1, targets.long()[..., None], 1.0)
        return outputs.softmax(-1) - hot
    return (outputs.sigmoid() if likelihood == "bernoulli" else outputs) - targets.to(F64)


def truth(model: nn.Module, inputs: list[Tensor], partition: kv.Partition) -> Truth:
    """Of a model in float64 and in the mode that counts; the model is the oracle's own."""
    names = {piece.parameter for layer in partition.layers for piece in layer.pieces}
    parameters = {name: p for name, p in model.named_parameters() if name in names}
    with torch.enable_grad():  # all examples at once: what one does to another's output belongs to the derivative
        outputs = model(*(x.clone() for x in inputs))
    rows = []
    for row in outputs.flatten(1):
        for k in range(len(row)):
            grads = torch.autograd.grad(row[k], list(parameters.values()), retain_graph=True, allow_unused=True)
            pairs = zip(parameters.items(), grads, strict=True)
            rows.append(flat(partition, {n: torch.zeros_like(p) if g is None else g for (n, p), g in pairs}))
    J = torch.stack(rows).view(len(outputs), -1, partition.size).to(F64)
    return Truth(J, outputs.detach().to(F64), outputs.dtype)


def perturbed(t: Try, model: nn.Module, inputs: list[Tensor], eps: float) -> tuple[nn.Module, list[Tensor]]:
    """Weights and inputs moved by a few units in the last place: what moves with them is not known better."""

    def jitter(x: Tensor) -> Tensor:
        return x * (1 + 4 * eps * t.normal(*x.shape)) if x.is_floating_point() else x

    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.copy_(jitter(p))
    return twin, [jitter(x) for x in inputs]


def real(x: Any) -> Tensor:
    """What was accepted for a vector or matrix, in float64; NaN for a tensor without numbers."""
    x = torch.as_tensor(x).detach()
    x = torch.full(x.shape, math.nan) if x.device.type == "meta" else x.to_dense()
    return (x.real if x.is_complex() else x).to(F64).contiguous()


def scores(F: kv.Fisher) -> Tensor:
    """(S, N, P), from the captured vectors."""
    layers = [
        (g.to(F64), dense(a).to(F64).expand(F.S, *a.shape[-3:]))
        for layer, gs, inputs in zip(F.partition.layers, F.g, F.a, strict=True)
        for g, a in ([(gs, inputs)] if layer.groups == 1 else zip(gs, inputs, strict=True))
    ]
    return torch.cat([torch.einsum("snto,snti->snoi", g, a).flatten(2) for g, a in layers], -1)


def gram(F: kv.Fisher) -> Tensor:
    J = scores(F).flatten(0, 1)
    return J.T @ J / F.N


def kron_factors(F: kv.Fisher, convention: str = "expand", factors: str = "kfac") -> list[tuple[Tensor, Tensor]]:
    """(A, G) of every layer in float64."""
    pairs = []
    for l, (a, g) in enumerate(zip(F.a, F.g, strict=True)):
        a, g = a.to(F64), g.to(F64)
        if F.swapped[l] or factors != "kfac":  # rules of their own, which the tests of uses and of products judge
            f = F.kronecker(convention, factors)
            A, G = f.dense_A(l), f.G[l]
            pairs.append((A.to(F64), G.to(F64)))
        elif convention == "reduce":
            a, g = a.mean(1), g.sum(2)
            pairs.append((a.T @ a / F.N, torch.einsum("sno,snp->op", g, g) / F.N))
        else:
            pairs.append((
                torch.einsum("nti,ntj->ij", a, a) / (F.N * a.shape[1]), torch.einsum("snto,sntp->op", g, g) / F.N,
            ))  # fmt: skip
    return pairs


def kfac_inverse(
    F: kv.Fisher, convention: str, λ: float, rule: str, factors: str = "kfac"
) -> tuple[list[Tensor], list[float]]:
    """The blocks of K-FAC's M, and how far a change of one unit in the factors' last place moves each."""
    blocks, moves = [], []
    for (A, G), layer in zip(kron_factors(F, convention, factors), F.partition.layers, strict=True):
        whole = rule == "eigen" or layer.vector  # λ is not divided between the two factors
        if whole:
            K = torch.kron(G, A) + λ * torch.eye(len(A) * len(G), dtype=F64)
            block = pinv(K)
            moves.append(condition(K))
        else:
            ratio = float(A.trace() / len(A)) / float(G.trace() / len(G)) if float(G.trace()) else 0.0
            π = ratio**0.5 if 0 < ratio < math.inf else 1.0
            left = G + λ**0.5 / π * torch.eye(len(G), dtype=F64)
            right = A + λ**0.5 * π * torch.eye(len(A), dtype=F64)
            block = torch.kron(pinv(left), pinv(right))
            moves.append(condition(left) + condition(right))
        if underflows(F.dtype, A, G, *([K] if whole else [])):
            moves[-1] = math.inf
        blocks.append(block)
    return blocks, moves


def underflows(dtype: torch.dtype, *matrices: Tensor) -> bool:
    """Whether one of them is so small that its entries, or products of them, are not known in this dtype."""
    info = torch.finfo(dtype)
    return any(0 < norm(X) < 1e3 * info.tiny / info.eps for X in matrices)


def pinv(X: Tensor) -> Tensor:
    inverse, info = torch.linalg.inv_ex(X)
    return inverse.contiguous() if int(info) == 0 else torch.full_like(X, math.inf)


def condition(X: Tensor) -> float:
    """Of a symmetric matrix; inf where it is singular or not finite."""
    if not X.numel():
        return 1.0
    if not bool(torch.isfinite(X).all()):
        return math.inf
    d = torch.linalg.eigvalsh(X).abs()
    return float(d.max() / d.min()) if float(d.min()) > 0 else math.inf


def norm(X: Tensor) -> float:
    """Root of the sum of squares, without their overflow or underflow."""
    largest = float(X.detach().abs().max()) if X.numel() else 0.0
    if not 0 < largest < math.inf:
        return largest
    return largest * float((X.detach().to(F64) / largest).square().sum().sqrt())


def allowance(dtype: torch.dtype, condition: float, size: float, unit: float = 1.0) -> float:
    """Round-off that a correct result of this size may have; inf where precision is hopeless. What underflows is
    lost, times what it is multiplied with, ``unit``."""
    eps, lost = torch.finfo(dtype).eps, torch.finfo(dtype).tiny / torch.finfo(dtype).eps
    if not eps * condition <= HOPELESS or not math.isfinite(size):
        return math.inf
    return ROUND_OFF * (eps * max(condition, 1.0) * size + max(unit, 1.0) * lost)


def tridiagonal(F: kv.Fisher, λ: float) -> tuple[Tensor, float]:
    """The Gaussian chain of K-FAC's section 4.3 written out, and its condition."""
    pairs, s = kron_factors(F), F.partition.slices
    K = []
    for (A, G), layer in zip(pairs, F.partition.layers, strict=True):
        ratio = float(A.trace() / len(A)) / float(G.trace() / len(G)) if float(G.trace()) else 0.0
        π = ratio**0.5 if 0 < ratio < math.inf else 1.0
        if layer.vector:
            K.append(torch.kron(G, A) + λ * torch.eye(len(G), dtype=F64))
            continue
        K.append(
            torch.kron(G + λ**0.5 / π * torch.eye(len(G), dtype=F64), A + λ**0.5 * π * torch.eye(len(A), dtype=F64))
        )
    Ξ, Λ = torch.eye(F.partition.size, dtype=F64), torch.zeros(F.shape, dtype=F64)
    worst = math.inf if underflows(F.dtype, *itertools.chain(*pairs)) else max(condition(X) for X in K)
    for l, block in enumerate(K):
        Σ = block
        if l + 1 < len(K):
            (a, g), (b, h) = aligned(F, "expand")[l : l + 2]
            cross = torch.kron(g.T @ h / F.N, a.T @ b / F.N)
            Ψ = cross @ pinv(K[l + 1])
            Ξ[s[l], s[l + 1]] = -Ψ
            Σ = block - Ψ @ cross.T
            worst *= max(1.0, norm(Ψ))
        worst = max(worst, norm(block) * norm(pinv(Σ)) * max(condition(X) for X in K))
        Λ[s[l], s[l]] = pinv(Σ)
    return Ξ.T @ Λ @ Ξ, worst


def aligned(F: kv.Fisher, convention: str) -> list[tuple[Tensor, Tensor]]:
    """Rows of a and g of every layer, as many as the layer with the most positions has."""
    T, rows = max(g.shape[2] for g in F.g), []
    for a, g in zip(F.a, F.g, strict=True):
        a, g, t = dense(a).to(F64), g.to(F64), g.shape[2]
        if convention == "reduce":
            a, g = a.mean(1, keepdim=True), g.sum(2, keepdim=True)
        elif t == 1:
            a, g = (torch.cat([x] * T, dim=-2) / T**0.5 for x in (a, g))
        else:
            zeros = [x.new_zeros(*x.shape[:-2], T - t, x.shape[-1]) for x in (a, g)]
            a, g = torch.cat([a / t**0.5, zeros[0]], -2), torch.cat([g, zeros[1]], -2)
        rows.append((a.flatten(0, 1), g.flatten(0, 2)))
    return rows


def kronecker_model(F: kv.Fisher, convention: str) -> Tensor:
    """All blocks ``G_lm ⊗ A_lm``."""
    rows = aligned(F, convention)
    rows = [torch.cat([torch.kron(g.T @ h / F.N, a.T @ b / F.N) for b, h in rows], 1) for a, g in rows]
    return torch.cat(rows)


def two_level_matrix(A: Tensor, M: Tensor, Z: Tensor, E: Tensor, correction: str) -> Tensor:
    """Table of Tang et al. 2009, written with matrices."""
    Q, I = Z @ pinv(E) @ Z.T, torch.eye(len(A), dtype=F64)
    if correction == "additive":
        return M + Q
    if correction == "a-def1":
        return Q + M @ (I - A @ Q)
    if correction == "a-def2":
        return M + Q @ (I - A @ M)
    return Q + (I - A @ Q).T @ M @ (I - A @ Q)


def coarse_condition(Z: Tensor, E: Tensor, size: float) -> float:
    """How far round-off in a matrix of this size, seen through normalised columns Z, moves the inverse of E."""
    if not bool(torch.isfinite(E).all()):
        return math.inf
    smallest = float(torch.linalg.eigvalsh(E).abs().min())
    return condition(Z.T @ Z) * max(condition(E), size / smallest if smallest else math.inf)


def matrices(T: kv.TwoLevel) -> tuple[Tensor, Tensor, float, float]:
    """A and T in float64, the size of the terms that make up T, and the condition of what is inverted."""
    P = T.partition.size
    eye = torch.eye(P, dtype=F64)
    A = gram(T.A.operator) + T.A.damping * eye
    M, Z = T.M.dense().to(F64), T.Z.dense().to(F64)
    if not Z.numel():
        return A, M, norm(M), 1.0
    Z = Z / Z.norm(dim=0).clamp_min(1e-300)
    K = T.coarse_operator
    B = A if T.coarsens_A else kronecker_model(K.operator.F, K.operator.convention) + K.damping * eye
    E = Z.T @ B @ Z
    q = norm(Z @ pinv(E) @ Z.T)
    grow = 1 + norm(A) * q
    size = q + grow * grow * norm(M)
    return A, two_level_matrix(A, M, Z, E, T.correction), size, coarse_condition(Z, E, norm(B))


def flat(partition: kv.Partition, tensors: dict[str, Tensor]) -> Tensor:
    """One vector (P,) from a tensor for each parameter, rectangle by rectangle."""
    layers = []
    for layer in partition.layers:
        V = torch.zeros(layer.out, layer.features, dtype=next(iter(tensors.values())).dtype)
        for rectangle, name, rows, swapped in _rectangles(layer):
            x = tensors[name] if rows is None else tensors[name][rows[0] : rows[1]]
            h, w = V[rectangle].shape
            V[rectangle] = x.reshape(w, h).T if swapped else x.reshape(h, w)
        layers.append(V.flatten())
    return torch.cat(layers)


def apart(partition: kv.Partition, v: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A vector (P,) as a tensor for each parameter, in the shapes of ``tensors``: the inverse of :func:`flat`."""
    found = {}
    for layer, piece in zip(partition.layers, v.split([layer.size for layer in partition.layers]), strict=True):
        V = piece.view(layer.shape)
        for rectangle, name, rows, swapped in _rectangles(layer):
            x = found.setdefault(name, torch.zeros_like(tensors[name], dtype=v.dtype))
            here = x if rows is None else x[rows[0] : rows[1]]
            here.copy_((V[rectangle].T if swapped else V[rectangle]).reshape(here.shape))
    return found


def _rectangles(layer):
    for p in layer.pieces:
        yield (slice(p.top, p.top + p.height), slice(p.left, p.left + p.width)), p.parameter, p.rows, p.transposed
