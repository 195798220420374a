"""One-level preconditioners: approximate inverses of ``A = F + λI``, applied with ``@``.

Damping enters after what is costly, so that ``with_damping(λ)`` shares it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_damping, check_number, check_type
from .decompositions import Eigenvalues, cholesky, inverse, psd_eigens
from .kronecker import KroneckerFactors
from .operator import Operator, ParameterSpace, check_symmetric, uncached_copy
from .sample_space import ENOUGH


class Preconditioner(Operator):
    """A matrix that approximates the inverse of ``F + λI``: ``M @ r`` is roughly ``(F + λI)⁻¹ r``."""

    damping: float

    def _init(self, operator: Operator | KroneckerFactors, damping: float) -> None:
        self.partition, self.dtype, self.device = operator.partition, operator.dtype, operator.device
        self._damp(check_damping(damping, self.dtype))

    def _damp(self, damping: float) -> None:
        """Set λ, which has been checked, and what depends on it."""
        self.damping = damping

    def with_damping(self, damping: float) -> Preconditioner:
        """The same preconditioner at another λ; what was factorised is shared."""
        twin = uncached_copy(self)
        twin._damp(check_damping(damping, self.dtype))
        return twin

    def __repr__(self) -> str:
        return self._describe(f"λ = {self.damping:.3g}")


class Identity(Preconditioner):
    """``M = λ^-power I``: plain gradient descent for power 0, whatever λ is.

    With power 1 it is A⁻¹ where F is 0: the first level beside a coarse space that holds nearly all of F.

    >>> from kfac_viz.method.operator import Dense
    >>> from kfac_viz.method.partition import Partition
    >>> F = Dense(torch.eye(2), Partition.from_sizes([1, 1]))
    >>> Identity(F) @ torch.ones(2), Identity(F, damping=0.5, power=1) @ torch.ones(2)
    (tensor([1., 1.]), tensor([2., 2.]))
    """

    def __init__(self, operator: Operator, damping: float = 0.0, power: float = 0.0) -> None:
        check_type("operator", operator, Operator)
        self.power = check_number("power", power, 0.0, 1.0)
        self._init(operator, damping)

    def _damp(self, damping: float) -> None:
        super()._damp(damping)
        if self.power and not damping > torch.finfo(self.dtype).tiny:
            raise ValueError(f"The identity over λ needs a damping above 0; got {damping:g}.")
        self._weight = damping**-self.power if self.power else 1.0

    def _apply(self, v: Tensor) -> Tensor:
        return v * self._weight


class Nothing(Preconditioner):
    """``M = 0``: no first level. Two levels are then the coarse one alone, ``Q r`` under every correction; what lies
    outside the coarse space does not move.

    >>> from kfac_viz.method.operator import Dense
    >>> from kfac_viz.method.partition import Partition
    >>> Nothing(Dense(torch.eye(2), Partition.from_sizes([1, 1])), damping=0.1) @ torch.ones(2)
    tensor([0., 0.])
    """

    def __init__(self, operator: Operator, damping: float) -> None:
        check_type("operator", operator, Operator)
        self._init(operator, damping)

    def _apply(self, v: Tensor) -> Tensor:
        return torch.zeros_like(v)


class Exact(Preconditioner):
    """``M = A⁻¹``, the exact step: in the space of scores, to a relative residual of 1e-9, or where there are fewer
    parameters by a Cholesky factor of the matrix (P, P).

    Each λ has a Cholesky factor of its own, which costs a thirtieth of the eigenvectors that serve all.

    >>> from kfac_viz.method.operator import Dense
    >>> from kfac_viz.method.partition import Partition
    >>> F = Dense(torch.tensor([[3., 1.], [1., 0.]]), Partition.from_sizes([1, 1]))
    >>> Exact(F, damping=1.0) @ torch.tensor([4., 1.])
    tensor([1., 0.])
    """

    def __init__(self, operator: Operator, damping: float) -> None:
        check_type("operator", operator, Operator)
        check_symmetric(operator, "The exact step")
        self.operator = operator
        self._matrix = operator.dense() if isinstance(operator.solver, ParameterSpace) else None
        self._init(operator, damping)

    def _damp(self, damping: float) -> None:
        super()._damp(damping)
        if self._matrix is not None:
            matrix = self._matrix.clone()
            matrix.diagonal().add_(damping)
            self._L = cholesky(matrix, "The matrix")

    def _apply(self, v: Tensor) -> Tensor:
        columns = v[:, None] if v.ndim == 1 else v.mT
        if self._matrix is None:
            found = self.operator.solver.solve(columns, self.damping, enough=ENOUGH)
        else:
            found = torch.cholesky_solve(columns, self._L)
        return found[:, 0] if v.ndim == 1 else found.mT


class Diagonal(Preconditioner):
    """``M = (diag F + λ)^-power``: Jacobi for power 1; Adam and Adagrad take ½ of the empirical Fisher.

    >>> from kfac_viz.method.operator import Dense
    >>> from kfac_viz.method.partition import Partition
    >>> F = Dense(torch.tensor([[3., 1.], [1., 0.]]), Partition.from_sizes([1, 1]))
    >>> Diagonal(F, damping=1.0) @ torch.ones(2)
    tensor([0.2500, 1.0000])
    """

    def __init__(self, operator: Operator, damping: float, power: float = 1.0) -> None:
        check_type("operator", operator, Operator)
        if not (isinstance(power, (int, float)) and 0 <= power <= 1):
            raise ValueError(f"power must lie between 0 and 1; got {power!r}.")
        self._d, self.power = operator.diagonal().clamp_min(0), power
        self._init(operator, damping)

    def _damp(self, damping: float) -> None:
        super()._damp(damping)
        self._weights = inverse(self._d, self.damping, "The diagonal of the Fisher") ** self.power

    def _apply(self, v: Tensor) -> Tensor:
        return v * self._weights

    def dense(self) -> Tensor:
        return self._weights.diag()

    def diagonal(self) -> Tensor:
        return self._weights.clone()


class BlockDiagonal(Preconditioner):
    """Exact inverses of the damped diagonal blocks: block Jacobi with exact local solves. What lies between layers is
    dropped.

    >>> from kfac_viz.method.operator import Dense
    >>> from kfac_viz.method.partition import Partition
    >>> F = Dense(torch.tensor([[1.0, 0.0, 0.5], [0.0, 3.0, 0.5], [0.5, 0.5, 4.0]]), Partition.from_sizes([2, 1]))
    >>> BlockDiagonal(F, damping=1.0).dense()
    tensor([[0.5000, 0.0000, 0.0000],
            [0.0000, 0.2500, 0.0000],
            [0.0000, 0.0000, 0.2000]])

    Raises:
        ValueError: a block that is not positive semi-definite, or λ = 0 where one is singular, naming the layer.
    """

    def __init__(self, operator: Operator, damping: float) -> None:
        check_type("operator", operator, Operator)
        names = [f"The block of layer {name!r}" for name in operator.partition.names]
        self._eigen = psd_eigens([operator.block(l, l) for l in range(len(names))], names)
        self._eigenvalues = Eigenvalues([d for d, _ in self._eigen], names, dims=1)
        self._init(operator, damping)

    def _damp(self, damping: float) -> None:
        super()._damp(damping)
        self._weights = self._eigenvalues.inverse(self.damping)

    def _apply(self, v: Tensor) -> Tensor:
        layers = zip(self._eigen, self._weights, self.partition.slices, strict=True)
        return torch.cat([((v[..., s] @ U) * w) @ U.T for (_, U), w, s in layers], dim=-1)

    def dense(self) -> Tensor:
        blocks = ((U * w) @ U.T for (_, U), w in zip(self._eigen, self._weights, strict=True))
        return self._in_range(torch.block_diag(*blocks), "The matrix")
