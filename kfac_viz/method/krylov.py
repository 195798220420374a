"""What a preconditioner is worth: conjugate gradients, spectra, and the decrease that a direction captures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import frexp, inf, isfinite, ldexp, nan

import torch
from torch import Tensor

from .checks import check_count, check_number, check_type, finite, warn
from .coarse import spectral
from .decompositions import cholesky, eigvalsh, inverse
from .fisher import Fisher
from .kfac import KFAC
from .operator import Damped, Operator, ParameterSpace, check_same_space, check_symmetric
from .two_level import TwoLevel

MOST_SCORES = 8192  # side of a matrix that is decomposed for an exact direction


@dataclass(frozen=True)
class Solution:
    """Result of :func:`kfac_viz.pcg`.

    Attributes:
        solution: (P,).
        residuals: ‖r‖/‖g‖ after 0, 1, 2, … iterations, with the residual r as the recursion updates it.
        residual: the true one on leaving, ``‖g − A x‖/‖g‖``: round-off keeps it above what the recursion believes.
        converged: whether the true one has come down to ``rtol``.
    """

    solution: Tensor
    residuals: tuple[float, ...]
    residual: float
    converged: bool

    @property
    def iterations(self) -> int:
        return len(self.residuals) - 1

    def __repr__(self) -> str:
        state = "converged" if self.converged else "not converged"
        return f"Solution({state}, {self.iterations} iterations, true residual {self.residual:.2g})"


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
    """Preconditioned conjugate gradients for ``A x = g`` (Saad 2003, algorithm 9.1, whose lines the code names).

    Args:
        A: symmetric positive definite.
        g: right-hand side (P,).
        M: a *symmetric* positive definite preconditioner; others are refused by name.
        rtol: stop once ‖r‖ ≤ rtol · ‖g‖, with the residual r = g − A x updated in the recursion; ``converged``
            then says whether the true one has come as far.
        max_iterations: 10 P by default.
        x0: first guess, 0 by default.
        reorthogonalize: keep every residual M-orthogonal to all before it, nearly as in exact arithmetic: counts
            that hardly depend on the last bits, for up to two P×P matrices of memory.
        callback: called with (x, relative residual) after each iteration.

    >>> from kfac_viz.method.operator import Dense
    >>> from kfac_viz.method.partition import Partition
    >>> A = Dense(torch.tensor([[4.0, 1.0], [1.0, 3.0]]), Partition.from_sizes([1, 1]))
    >>> pcg(A, torch.tensor([1.0, 2.0]), rtol=1e-6).solution  # 1/11 and 7/11
    tensor([0.0909, 0.6364])

    Raises:
        ValueError: a non-symmetric M, by its name; a direction along which A or M is not positive; an overflow.
        TypeError: A or M is no operator.
    """
    _check_vectors(A, g, *([] if x0 is None else [x0]))
    if M is not None:
        check_type("M", M, Operator)
        check_same_space(A, M)
        check_symmetric(M, "pcg")
    check_symmetric(A, "pcg")
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be a function of (x, relative residual); got {type(callback).__name__}.")
    check_number("rtol", rtol, 0.0, inf, open_low=True)
    limit = 10 * len(g) if max_iterations is None else check_count("max_iterations", max_iterations, least=0)
    power = _power_of_two(g)
    if power is None:
        return Solution(torch.zeros_like(g), (0.0,), 0.0, True)
    b = _ldexp(g.detach(), -power)  # of size 1, so that no square in the recursion over- or underflows
    x = torch.zeros_like(b) if x0 is None else _ldexp(x0.detach(), -power)
    norm = _norm(b)
    r = b.clone() if x0 is None else b - A._apply(x)  # line 1
    residuals = [_norm(r) / norm]
    p, rho = None, 1.0
    kept = min(limit, len(g)) if reorthogonalize else 0
    R, Z = b.new_empty(kept, len(b)), b.new_empty(kept, len(b))  # earlier residuals r / √rᵀMr, and M times them
    while residuals[-1] > rtol and len(residuals) <= limit and isfinite(residuals[-1]):  # line 2
        z = r if M is None else M._apply(r)  # line 5, and 1 for the first
        rho, before = float(r @ z), rho
        p = z.clone() if p is None else z + (rho / before) * p  # lines 6 and 7: β = rho / before
        Ap = A._apply(p)
        curvature = float(p @ Ap)
        if not (0 < rho < inf and 0 < curvature < inf):
            raise ValueError(
                f"After {len(residuals) - 1} iterations rᵀMr = {rho:.3g} and pᵀAp = {curvature:.3g}: the matrix and "
                "its preconditioner must be positive definite, and neither may overflow. Choose a larger damping."
            )
        x.add_(p, alpha=rho / curvature)  # lines 3 and 4: α = rho / curvature
        if (k := len(residuals)) <= kept:
            R[k - 1], Z[k - 1] = r / rho**0.5, z / rho**0.5
        r.sub_(Ap, alpha=rho / curvature)  # line 4
        if kept:
            r.sub_((Z[:k] @ r) @ R[:k])
        residuals.append(_norm(r) / norm)
        if callback is not None:
            callback(_ldexp(x, power), residuals[-1])
    residual = _norm(b - A._apply(x)) / norm
    solution = _ldexp(x, power)
    if not (residual < inf and max(residuals) < inf and finite([solution])[0]):
        raise ValueError(f"The solution overflows {g.dtype}; scale the right-hand side, or choose a larger damping.")
    if 0 < ldexp(float(x.abs().max()), power) < torch.finfo(g.dtype).tiny:
        raise ValueError(f"The solution underflows {g.dtype}; scale the right-hand side, or choose a smaller damping.")
    return Solution(solution, tuple(residuals), residual, residual <= rtol)


def _norm(x: Tensor) -> float:
    """‖x‖, whose squares would overflow in float32 long before x does."""
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))


def _power_of_two(x: Tensor) -> int | None:
    """The exponent e with ``½ ≤ max |x| / 2^e < 1``, or None for zeros."""
    largest = float(x.abs().max())
    return frexp(largest)[1] if largest > 0 else None


def _ldexp(x: Tensor, power: int) -> Tensor:
    """``x · 2^power``, exact wherever the result is a normal number, a copy; in two steps, each within the dtype."""
    return x * 2.0 ** (power // 2) * 2.0 ** (power - power // 2)


def spectrum(A: Operator, M: Operator | None = None) -> Tensor:
    """Eigenvalues of ``M A`` in ascending order, (P,), through a symmetric eigenproblem.

    With ``A = L Lᵀ``, M A is similar to ``Lᵀ M L``. The two a-def corrections share the spectrum of
    ``balanced`` (Tang et al. 2009, theorem 3.1) when they coarsen this very A; else theirs may be complex.

    >>> from kfac_viz.method.operator import Dense
    >>> from kfac_viz.method.partition import Partition
    >>> from kfac_viz.method.preconditioner import Diagonal
    >>> A = Dense(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), Partition.from_sizes([1, 1]))
    >>> spectrum(A), spectrum(A, Diagonal(A, 0.0))
    (tensor([1., 3.]), tensor([0.5000, 1.5000]))

    Raises:
        ValueError: a non-symmetric M whose spectrum may be complex, by its name; A is not positive definite; the
            product overflows.
    """
    check_type("A", A, Operator)
    check_symmetric(A, "spectrum")
    if M is None:
        return eigvalsh(A.dense(), "The matrix")
    check_type("M", M, Operator)
    check_same_space(A, M)
    if isinstance(M, TwoLevel) and M.coarsens_A and M.M.symmetric and _same_matrix(A, M.A):
        M = M if M.symmetric else M.with_correction("balanced")
    check_symmetric(M, "A real spectrum")
    L, info = torch.linalg.cholesky_ex(A.dense())
    if int(info):  # λ lies below the round-off in A; the eigenvectors say what of A is zero
        d, U = A.eigen
        if not float(d[0]) > 0:
            raise ValueError("The matrix is not positive definite to working precision; choose a larger damping.")
        L = U * d.sqrt()
    matrix = M.dense()
    inner = L.T @ matrix @ L
    values = eigvalsh((inner + inner.T) / 2, "The preconditioned matrix")
    round_off = torch.finfo(A.dtype).eps * torch.linalg.matrix_norm(matrix) * torch.linalg.matrix_norm(L) ** 2
    if not float(round_off) < 0.1 * float(values[-1]):
        raise ValueError("Round-off hides the spectrum, since A hardly feels this damping; choose a larger damping.")
    return values


def condition_number(A: Operator, M: Operator | None = None) -> float:
    """``λ_max / λ_min`` of ``M A``; inf where it is singular to precision.

    >>> from kfac_viz.method.operator import Dense
    >>> from kfac_viz.method.partition import Partition
    >>> condition_number(Dense(torch.tensor([[2.0, 0.0], [0.0, 8.0]]), Partition.from_sizes([1, 1])))
    4.0

    Raises:
        ValueError: as :func:`spectrum`.
    """
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
        A.check(v, vector=True)


def captured_decrease(A: Operator, g: Tensor, v: Tensor) -> float:
    """Share of the best decrease of the quadratic model that the direction v, unscaled, captures.

    With ``q(v) = gᵀv − ½ vᵀAv`` and ``v* = A⁻¹g``: ``q(v)/q(v*) = 1 − ‖v − v*‖²_A / ‖v*‖²_A``. 1 is the exact
    natural gradient step, 0 is not moving, negative is worse than not moving.

    >>> from kfac_viz.method.operator import Dense
    >>> from kfac_viz.method.partition import Partition
    >>> A = Dense(torch.tensor([[1.0, 0.0], [0.0, 4.0]]), Partition.from_sizes([1, 1])).damped(0.0)
    >>> g = torch.tensor([1.0, 4.0])
    >>> [captured_decrease(A, g, v) for v in (A.solve(g), torch.tensor([0.0, 1.0]), g)]  # g goes too far
    [1.0, 0.8, -6.2]

    Args:
        A: the matrix of the system, symmetric positive definite.
        g: the gradient, (P,).
        v: the direction, (P,), to be subtracted from the parameters.

    Raises:
        ValueError: a gradient of zeros, NaN or inf, a singular A, or an overflow.
    """
    _check_vectors(A, g, v)
    in_g, in_v = _power_of_two(g), _power_of_two(v)
    if in_g is None:
        raise ValueError("The gradient is zero: there is no decrease to capture.")
    if in_v is None:
        return 0.0
    g, u = _ldexp(g, -in_g), _ldexp(v, -in_v)  # of size 1: the share is the same at any scale of g
    exact = A.operator.solver if isinstance(A, Damped) else None
    if isinstance(exact, ParameterSpace) and exact.size <= MOST_SCORES:  # both forms through eigenvectors, for every λ
        d, U = A.operator.eigen
        inverses = inverse(d, A.damping, "The matrix").double()
        along_g, along_u = ((U.T @ x).double().square() for x in (g, u))
        best, curvature = float(along_g @ inverses), float(along_u @ (d.double() + A.damping))
    else:
        best, curvature = float(g @ exact_direction(A, g)), float(u @ (A @ u))
    t = 2.0 ** min(in_v - in_g, 1000) if in_v - in_g > -1000 else 0.0
    share = t * (2 * float(g @ u) - t * curvature) / best if best > 0 else nan
    if not isfinite(share):
        raise ValueError("The captured decrease overflows; scale the direction, or choose a larger damping.")
    return share


def exact_direction(A: Operator, g: Tensor, rtol: float = 1e-10) -> Tensor:
    """``A⁻¹ g``, the natural gradient, as A allows it.

    Through decompositions that every λ shares, in the space of parameters or of scores, whichever is smaller; for a
    Fisher where both are larger than 8,192 by conjugate gradients with a two-level preconditioner, 16 leading
    eigenvectors per layer in balanced form, to a relative residual of ``rtol``; a warning says if that is not reached.

    >>> from kfac_viz.method.operator import Dense
    >>> from kfac_viz.method.partition import Partition
    >>> A = Dense(torch.tensor([[1.0, 0.0], [0.0, 3.0]]), Partition.from_sizes([1, 1])).damped(1.0)
    >>> exact_direction(A, torch.tensor([2.0, 2.0]))
    tensor([1.0000, 0.5000])

    Raises:
        ValueError: A is not symmetric positive definite, or the solution overflows.
    """
    _check_vectors(A, g)
    check_symmetric(A, "exact_direction")
    if not isinstance(A, Damped):
        return torch.cholesky_solve(g[:, None], cholesky(A.dense(), "The matrix"))[:, 0]
    if not (isinstance(A.operator, Fisher) and A.operator.solver.size > MOST_SCORES):
        return A.solve(g)
    M = KFAC(A.operator, A.damping)
    found = pcg(A, g, TwoLevel(A, M, spectral(M, 16)), rtol=rtol, max_iterations=1000)
    if not found.converged:
        warn(f"The exact direction is known to a relative residual of {found.residual:.2g} only, not {rtol:.2g}.")
    return found.solution
