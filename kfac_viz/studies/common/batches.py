"""Adam, Shampoo, SOAP and Muon beside K-FAC: what optimizers of batches make of the same scores.

They see the mean gradient of a batch, not the score of an example. A batch of B examples with T positions is one
example with B·T positions, so that the empirical Fisher, regrouped, has their matrices exactly.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ... import Fisher, Partition
from ...method.checks import check_count
from ...method.decompositions import psd_eigen
from ...method.one_hot import dense
from ...method.partition import Layer

EPSILON = 1e-8  # beside the roots, as PyTorch's Adam has it


class Part(NamedTuple):
    """A weight or a bias: some rows and columns of the matrix of a layer."""

    layer: int
    rows: slice
    columns: slice


def parts_of(partition: Partition) -> list[Part]:
    """Every weight and every bias, also the scale and the shift of a norm. A convolution's kernel counts as a matrix
    (out, in · kernel), and each of q, k and v as a weight of its own."""
    parts = []
    for l, layer in enumerate(partition.layers):
        if layer.groups > 1:
            raise ValueError(f"Layer {layer.name!r} has groups: no single matrix is its weight.")
        if layer.vector and layer.pieces:
            parts += [Part(l, slice(x.top, x.top + x.height), slice(0, 1)) for x in layer.pieces]
        else:
            width = layer.features - layer.bias
            parts += [Part(l, slice(0, layer.out), slice(0, width))]
            parts += [Part(l, slice(0, layer.out), slice(width, width + 1))] * layer.bias
    return parts


def of_batches(F: Fisher, size: int) -> Fisher:
    """``(1/B) Σ_b g_b g_bᵀ`` with the mean gradients g_b of B batches, from the empirical Fisher of their examples.

    Every ``size`` examples that follow each other are a batch. The layers are the parts (:func:`parts_of`); biases are
    vector layers.

    Raises:
        ValueError: another Fisher than the empirical one, a weight that is used transposed, groups, or examples that
            are not a whole number of batches.
    """
    size = check_count("size", size, 1)
    if F.S > 1 or F.flavour != "empirical":
        raise ValueError(f"A batch has one gradient per example, as the empirical Fisher; got the {F.flavour} one.")
    if any(F.swapped):
        raise ValueError("A weight that is used transposed has no single matrix of inputs.")
    if F.N % size:
        raise ValueError(f"{F.N} examples are not a whole number of batches of {size}.")
    layers, a, g = [], [], []
    for i, (l, rows, columns) in enumerate(parts_of(F.partition)):
        out, features = rows.stop - rows.start, columns.stop - columns.start
        layers.append(Layer(f"{i}: {F.partition.names[l]}", out, features, vector=features == 1))
        x, y = dense(F.a[l])[..., columns], F.g[l][..., rows]
        a.append(x.unflatten(0, (-1, size)).flatten(1, 2))
        g.append(y.unflatten(1, (-1, size)).flatten(2, 3) / size)
    return Fisher(Partition(tuple(layers)), a, g, likelihood=F.likelihood, flavour=F.flavour)


def directions(F: Fisher, g: Tensor, size: int, epsilon: float = EPSILON) -> dict[str, Tensor]:
    """What each of four optimizers makes of a gradient g (P,), to be subtracted, after it has seen these batches.

    Averages over batches stand where the papers have a sum or a running mean, so that lengths are not theirs. For the
    gradient V of a weight, and the batches' gradients V_b:

    - ``adam``: ``V / (√E[V_b²] + ε)`` (Kingma and Ba 2015, algorithm 1);
    - ``shampoo``: ``(L + εI)^(-1/4) V (R + εI)^(-1/4)`` with ``L = E[V_b V_bᵀ]``, ``R = E[V_bᵀ V_b]``; of a bias
      ``(L + εI)^(-1/2) V``, as of every tensor of order 1 (Gupta, Koren and Singer 2018, arXiv 1802.09568);
    - ``soap``: Adam in the eigenvectors of L and R (Vyas et al. 2025, arXiv 2409.11321, algorithm 3); biases as Adam;
    - ``muon``: ``(V Vᵀ)^(-1/2) V`` on the range of V, what its Newton–Schulz iteration tends to (Jordan et al. 2024);
      biases as Adam.
    """
    batches, parts, V = of_batches(F, size), parts_of(F.partition), F.partition.matrices(g)
    factors = batches.kronecker(factors="shampoo")
    bases = [(G.U, A.U) for G, A in zip(factors.eigen_G, factors.eigen_A, strict=True)]
    found: dict[str, list[Tensor]] = {name: [] for name in ("adam", "shampoo", "soap", "muon")}
    each = zip(parts, factors.G, factors.A, bases, batches.second_moments(), batches.second_moments(bases), strict=True)
    for (l, rows, columns), L, A, (U, W), squares, rotated in each:
        v, R = V[l][rows, columns], A * L.trace()
        adam = v / (squares.sqrt() + epsilon)
        found["adam"].append(adam)
        if v.shape[1] == 1:
            found["shampoo"].append(power(L, -1 / 2, epsilon) @ v)
            found["soap"].append(adam)
            found["muon"].append(adam)
        else:
            found["shampoo"].append(power(L, -1 / 4, epsilon) @ v @ power(R, -1 / 4, epsilon))
            found["soap"].append(U @ ((U.T @ v @ W) / (rotated.sqrt() + epsilon)) @ W.T)
            found["muon"].append(orthogonal(v))
    return {name: joined(F.partition, parts, each) for name, each in found.items()}


def power(X: Tensor, exponent: float, epsilon: float) -> Tensor:
    """``(X + εI)^exponent`` of a positive semi-definite X."""
    d, U = psd_eigen(X, "A matrix of gradients")
    return (U * (d + epsilon) ** exponent) @ U.T


def orthogonal(V: Tensor) -> Tensor:
    """``(V Vᵀ)^(-1/2) V`` on the range of V: all singular values that are not 0 become 1."""
    U, d, W = torch.linalg.svd(V, full_matrices=False)
    within = d > max(V.shape) * torch.finfo(V.dtype).eps * d[0]
    return U[:, within] @ W[within]


def joined(partition: Partition, parts: Iterable[Part], pieces: Iterable[Tensor]) -> Tensor:
    """One vector (P,) of a matrix for each part."""
    matrices: list[Tensor | None] = [None] * len(partition)
    for (l, rows, columns), piece in zip(parts, pieces, strict=True):
        if matrices[l] is None:
            matrices[l] = piece.new_empty(partition.layers[l].shape)
        matrices[l][rows, columns] = piece
    return partition.join(matrices)
