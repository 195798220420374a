"""What a preconditioner is worth: conjugate gradients, spectra, and the decrease that a direction captures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from .checks import check_count, check_type
from .operator import Damped, Operator, check_same_space, check_symmetric, cholesky, flushed, inverse
from .two_level import TwoLevel


@dataclass(frozen=True)
class Solution:
    """Result of :func:`pcg`: the solution (P,), and the relative residual after 0, 1, 2, … iterations."""

    solution: Tensor
    residuals: tuple[float, ...]
    converged: bool

    @property
    def iterations(self) -> int:
        return len(self.residuals) - 1

    def __repr__(self) -> str:
        state = "converged" if self.converged else "not converged"
        return f"Solution({state}, {self.iterations} iterations, residual {self.residuals[-1]:.2g})"


def pcg(
    A: Operator,
    g: Tensor,
    M: Operator | None = None,
    *,
    rtol: float = 1e-8,
    max_iterations: int | None = None,
    x0: Tensor | None = None,
    reorthogonalize: bool = False,
    callback: Callable[[Tensor, float], None] | None = None,
) -> Solution:
    """Preconditioned conjugate gradients for ``A x = g`` (Saad 2003, algorithm 9.1).

    Args:
        A: symmetric positive definite.
        g: right-hand side (P,).
        M: a *symmetric* positive definite preconditioner; others are refused by name.
        rtol: stop once ‖r‖ ≤ rtol · ‖g‖, with the residual r = g − A x updated in the recursion.
        max_iterations: 10 P by default.
        x0: first guess, 0 by default.
        reorthogonalize: keep every residual M-orthogonal to all before it, nearly as in exact arithmetic: counts
            that hardly depend on the last bits, for up to two P×P matrices of memory.
        callback: called with (x, relative residual) after each iteration.

    Raises:
        ValueError: a non-symmetric M, by its name, or a direction along which A or M is not positive.
        TypeError: A or M is no operator.
    """
    _check_vectors(A, g, *([] if x0 is None else [x0]))
    if M is not None:
        check_type("M", M, Operator)
        check_same_space(A, M)
        check_symmetric(M, "pcg")
    check_symmetric(A, "pcg")
    if not 0 < rtol < inf:
        raise ValueError(f"rtol must be positive and finite; got {rtol!r}.")
    limit = 10 * len(g) if max_iterations is None else check_count("max_iterations", max_iterations, least=0)
    norm = float(torch.linalg.vector_norm(g))
    if norm == 0:
        return Solution(torch.zeros_like(g), (0.0,), True)
    x = torch.zeros_like(g) if x0 is None else x0.detach().clone()
    r = g.detach().clone() if x0 is None else g.detach() - A @ x
    residuals = [float(torch.linalg.vector_norm(r)) / norm]
    p, rho = None, 1.0
    kept = min(limit, len(g)) if reorthogonalize else 0
    R, Z = g.new_empty(kept, len(g)), g.new_empty(kept, len(g))  # earlier residuals r / √rᵀMr, and M times them
    while residuals[-1] > rtol and len(residuals) <= limit:
        z = r if M is None else M._apply(r)
        rho, before = float(r @ z), rho
        p = z.clone() if p is None else z + (rho / before) * p
        Ap = A._apply(p)
        curvature = float(p @ Ap)
        if not (rho > 0 and curvature > 0):
            raise ValueError(
                f"After {len(residuals) - 1} iterations rᵀMr = {rho:.3g} and pᵀAp = {curvature:.3g}: the matrix and "
                "its preconditioner must be positive definite. Choose a larger damping."
            )
        x.add_(p, alpha=rho / curvature)
        if (k := len(residuals)) <= kept:
            R[k - 1], Z[k - 1] = r / rho**0.5, z / rho**0.5
        r.sub_(Ap, alpha=rho / curvature)
        if kept:
            r.sub_((Z[:k] @ r) @ R[:k])
        residuals.append(float(torch.linalg.vector_norm(r)) / norm)
        if callback is not None:
            callback(x.clone(), residuals[-1])
    return Solution(x, tuple(residuals), residuals[-1] <= rtol)


def spectrum(A: Operator, M: Operator | None = None) -> Tensor:
    """Eigenvalues of ``M A`` in ascending order, (P,), through a symmetric eigenproblem.

    With ``A = L Lᵀ``, M A is similar to ``Lᵀ M L``. The two a-def corrections share the spectrum of
    ``balanced`` (Tang et al. 2009, theorem 3.1) when they coarsen this very A; else theirs may be complex.

    Raises:
        ValueError: a non-symmetric M whose spectrum may be complex, by its name; A is not positive definite.
    """
    check_type("A", A, Operator)
    check_symmetric(A, "spectrum")
    if M is None:
        return torch.linalg.eigvalsh(flushed(A.dense()))
    check_type("M", M, Operator)
    check_same_space(A, M)
    if isinstance(M, TwoLevel) and M.galerkin and M.M.symmetric and _same_matrix(A, M.A):
        M = M if M.symmetric else M.with_correction("balanced")
    check_symmetric(M, "A real spectrum")
    L, info = torch.linalg.cholesky_ex(A.dense())
    if int(info):  # λ lies below the round-off in A; the eigenvectors say what of A is zero
        d, U = A.eigen
        if not float(d[0]) > 0:
            raise ValueError("The matrix is not positive definite to working precision; choose a larger damping.")
        L = U * d.sqrt()
    inner = L.T @ M.dense() @ L
    return torch.linalg.eigvalsh(flushed((inner + inner.T) / 2))


def condition_number(A: Operator, M: Operator | None = None) -> float:
    """``λ_max / λ_min`` of ``M A``; inf where it is singular to precision."""
    values = spectrum(A, M)
    smallest, largest = float(values[0]), float(values[-1])
    return largest / smallest if smallest > 0 else float("inf")


def _same_matrix(A: Operator, B: Operator) -> bool:
    if isinstance(A, Damped) and isinstance(B, Damped):
        return A.operator is B.operator and A.damping == B.damping
    return A is B


def _check_vectors(A: Operator, *vectors: Tensor) -> None:
    check_type("A", A, Operator)
    for v in vectors:
        A.partition.check(v, vector=True)
        A.check(v)


def captured_decrease(A: Operator, g: Tensor, v: Tensor) -> float:
    """Share of the best decrease of the quadratic model that the direction v, unscaled, captures.

    With ``q(v) = gᵀv − ½ vᵀAv`` and ``v* = A⁻¹g``: ``q(v)/q(v*) = 1 − ‖v − v*‖²_A / ‖v*‖²_A``. 1 is the exact
    natural gradient step, 0 is not moving, negative is worse than not moving.
    """
    _check_vectors(A, g, v)
    if isinstance(A, Damped):  # both quadratic forms through the eigenvectors that every λ shares
        d, U = A.operator.eigen
        inverses = inverse(d, A.damping, "The matrix")
        in_g, in_v = ((U.T @ x).double().square() for x in (g, v))  # squares of float32 soon overflow
        best, curvature = float(in_g @ inverses.double()), float(in_v @ (d.double() + A.damping))
    else:
        best, curvature = float(g @ exact_direction(A, g)), float(v @ (A @ v))
    if not best > 0:
        raise ValueError("The gradient is zero: there is no decrease to capture.")
    return (2 * float(g @ v) - curvature) / best


def exact_direction(A: Operator, g: Tensor) -> Tensor:
    """``A⁻¹ g``, the natural gradient: through the eigenvectors that every λ shares, or a Cholesky solve."""
    _check_vectors(A, g)
    check_symmetric(A, "exact_direction")
    if isinstance(A, Damped):
        return A.solve(g)
    return torch.cholesky_solve(g[:, None], cholesky(A.dense(), "The matrix"))[:, 0]
