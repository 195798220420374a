"""The Hessian of the loss as an operator: products by differentiating the gradient once more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from ..method.checks import check_choice, check_room, finite
from ..method.decompositions import Eigen, eigh
from ..method.names import unwrapped
from ..method.operator import Operator
from .capture import check_data, check_inputs
from .layers import partition_of
from .likelihood import LIKELIHOODS
from .loss import Loss


class Hessian(Operator):
    """``H = ∇² L`` with the loss L of :func:`kfac_viz.nll` on one batch: symmetric, and indefinite as a rule.

    ``H = F + R``: the exact Fisher F, for these likelihoods the Gauss–Newton matrix ``(1/N) Σ_n J_nᵀ (∇²_f ℓ_n) J_n``
    (Martens 2020, section 9.2), and the residual term ``R = (1/N) Σ_n Σ_c (∂ℓ_n/∂f_nc) ∇² f_nc``.

    The gradient is computed once, in eval mode, from copies of all parameters and buffers; every product differentiates
    it (Pearlmutter 1994). What happens to the model later changes nothing here. Training flags, ``.grad``, buffers and,
    in the main thread, the random state are afterwards what they were. Attention runs by its formula, as its fused
    kernels have no second derivative. A kink, such as ReLU's, has no curvature here.

    Args:
        model: weights and ``inputs`` are float32 or float64, on one device.
        inputs: a batch (N, …), or a tuple of arguments of the model.
        targets: the true labels (shapes: see :func:`kfac_viz.nll`).
        likelihood: ``"categorical"``, ``"bernoulli"`` or ``"gaussian"``.
        layers: names of layers or of modules, as for :func:`kfac_viz.capture`; all by default, those included that no
            Fisher can follow. ``F.partition.names`` are the layers of the Fisher F.

    Raises:
        ValueError, TypeError: what has no second derivative, with the reason: an operation without one, or with a wrong
            one; numbers that are overwritten before they are needed; layers that are frozen or out of reach; NaN, inf
            or an overflow; wrong shapes; mixed dtype or device.

    >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    >>> weights = [nn.init.constant_(p, 2.0) for p in model.parameters()]
    >>> Hessian(model, torch.ones(1, 1), torch.ones(1, 1), likelihood="gaussian").dense()  # of ½ (w₂ w₁ − 1)²
    tensor([[4., 7.],
            [7., 4.]])
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Tensor | tuple[Tensor, ...],
        targets: Tensor,
        *,
        likelihood: str,
        layers: Sequence[str] | None = None,
    ) -> None:
        check_choice("likelihood", likelihood, LIKELIHOODS)
        model = unwrapped(model)
        partition = partition_of(model, layers)
        inputs = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
        check_inputs(model, partition, inputs)
        check_data(model, partition, inputs)
        first = partition.own_parameters(model)[0][0]
        if first.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"A Hessian is computed in float32 or float64; the model is {first.dtype}.")
        self.dtype, self.device, self.likelihood, self.N = first.dtype, first.device, likelihood, len(inputs[0])
        with torch.inference_mode(False):
            loss = Loss(model, partition, inputs, targets, likelihood)
            grads = loss.gradients(loss.leaves)
            self.partition = loss.reached(grads)
            self._pieces = loss.pieces(self.partition)
            self._leaves = {name: loss.leaves[name] for name, _ in self._pieces}
            numbers = torch.arange(self.partition.size, device=self.device)
            layers = zip(self.partition.layers, self.partition.split(numbers), strict=True)
            places = [piece.view(V).flatten() for layer, V in layers for piece in layer.pieces]
            self._order = torch.cat(places)  # where the entries of the pieces stand in a vector
            self._gradient = self._flat(grads)
            self._probe(loss)

    def _flat(self, grads: Mapping[str, Tensor | None]) -> Tensor:
        """What there is for each of the leaves, one after another as the pieces have it, (P,)."""
        found = {name: torch.zeros_like(leaf) if grads[name] is None else grads[name].to_dense()
                 for name, leaf in self._leaves.items()}  # fmt: skip
        return torch.cat([piece.of(found[name]).flatten() for name, piece in self._pieces])

    def _apply(self, v: Tensor) -> Tensor:
        rows = v.reshape(-1, self.partition.size)
        products = torch.empty_like(rows)
        for product, row in zip(products, rows, strict=True):  # all at once is hardly quicker
            product[self._order] = self._product(row[self._order])
        return products.view(v.shape)

    def _product(self, v: Tensor) -> Tensor:
        """The derivative of ``gradient · v``, both in the order of the pieces."""
        leaves = list(self._leaves.values())
        found = torch.autograd.grad(self._gradient, leaves, v, retain_graph=True, allow_unused=True)
        return self._flat(dict(zip(self._leaves, found, strict=True)))

    def dense(self) -> Tensor:
        """The matrix (P, P), from P products, which are made once."""
        return self._matrix.clone()

    @cached_property
    def _matrix(self) -> Tensor:
        matrix = super().dense()
        return (matrix + matrix.mT).div_(2)  # the products round differently on the two sides

    def block(self, l: int | str, m: int | str) -> Tensor:
        """The block of layers l and m, (P_l, P_m), from as many products as the smaller of the two has parameters."""
        rows, columns = (self.partition.slices[self.partition.index(i)] for i in (l, m))
        size, other = (s.stop - s.start for s in (rows, columns))
        if size < other:
            return self.block(m, l).mT
        self._check_precision()
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        check_room(f"The block of layers {l} and {m}", 2 * size * other, like, "apply the Hessian with @")
        unit, block = like.new_zeros(self.partition.size), like.new_empty(size, other)
        for j in range(other):
            unit[columns.start + j] = 1
            block[:, j] = self._apply(unit)[rows]
            unit[columns.start + j] = 0
        block = (block + block.mT).div_(2) if rows == columns else block
        return self._in_range(block, "A block")

    @cached_property
    def eigen(self) -> Eigen:
        """Dense eigendecomposition, computed once; eigenvalues of either sign."""
        return eigh(self._matrix, "The Hessian")

    def _probe(self, loss: Loss) -> None:
        """Refuse a gradient that cannot be differentiated, or not truly.

        PyTorch's own operations are trusted. A custom ``autograd.Function`` may compute where autograd does not see it:
        there a product is compared with a difference of gradients, up to three times, as kinks may lie between them.
        """
        if not finite([self._gradient.detach()])[0]:
            raise ValueError(f"The gradient holds NaN or inf: the outputs of the model do, or {self.dtype} overflows.")
        generator, eps = torch.Generator(self.device).manual_seed(0), torch.finfo(self.dtype).eps
        for _ in range(3):
            direction = {name: torch.zeros_like(leaf) for name, leaf in self._leaves.items()}
            for name, piece in self._pieces:
                piece.of(direction[name]).normal_(generator=generator)
            try:
                product = self._product(self._flat(direction))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise ValueError(f"PyTorch cannot differentiate the gradient of this model: {error}") from error
            if not loss.custom:
                return
            size = float(self._flat(self._leaves).detach().square().mean().sqrt())
            h = eps ** (1 / 3) * max(size, eps ** (1 / 3))  # where truncation and round-off are about equal
            ahead, behind = (self._flat(loss.gradients(loss.moved(direction, step))).detach() for step in (h, -h))
            difference = (ahead - behind) / (2 * h)
            error, whole = (float(x.norm()) for x in (product - difference, difference))
            if error <= 0.02 * whole + 10 * eps / h * float(ahead.norm()):
                return
        raise ValueError(
            f"The model uses {', '.join(loss.custom)}, whose second derivative autograd does not know: a product is "
            f"off by {error / (whole or error):.0%}. Write its backward pass in operations that autograd can see."
        )
