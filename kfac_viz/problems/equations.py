"""Networks that solve differential equations: every example is a point, its output what the equation leaves there.

A network u is trained to make the residual zero at points inside a box, and to take known values at points of its
boundary; in mean squares, so that the Fisher of the Gaussian likelihood is the Gauss–Newton matrix of the equation
(Müller and Zeinhofer 2023; Dangel, Müller and Zeinhofer 2024, arXiv 2405.15603). Derivatives are carried through the
network in forward mode, d + 2 positions per point, so that a Laplacian in d dimensions costs d + 2 forward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import pi
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..method.checks import check_count, check_number, check_seed, check_type, evaluation
from .problem import Problem, multilayer_perceptron
from .rounding import perturbed

Box = Sequence[tuple[float, float]]


class Jet(NamedTuple):
    """A function and its derivatives at n points in d coordinates.

    Attributes:
        value: (n,).
        gradient: first derivatives, (n, d).
        laplacian: second derivatives summed over the coordinates of space, (n,); time is not among them.
    """

    value: Tensor
    gradient: Tensor
    laplacian: Tensor


Operator = Callable[[Tensor, Jet], Tensor]
Solution = Callable[[Tensor], Tensor]


def forward_mode(net: nn.Sequential, x: Tensor, space: range) -> Jet:
    """The jet of a tanh network ``net`` with one output at points x (n, d), in one pass with d + 2 positions.

    A linear layer multiplies every position by W and adds its bias to the value alone; an activation σ makes of
    (z, ∂z, Δz) the positions ``σ(z)``, ``σ'(z) ∂_i z`` and ``σ'(z) Δz + σ''(z) Σ_i (∂_i z)²``.
    """
    n, d = x.shape
    value, others = x, torch.eye(d + 1, d, dtype=x.dtype, device=x.device).expand(n, d + 1, d)  # (∂z, Δz)
    for module in net:
        if isinstance(module, nn.Linear):
            value = functional.linear(value, module.weight, module.bias)
            others = functional.linear(others, module.weight)
        else:
            value = torch.tanh(value)
            slope = 1 - value.square()
            bend = -2 * value * slope * others[:, space.start : d].square().sum(1)
            others = slope[:, None] * others
            others[:, d] += bend
    return Jet(value[:, 0], others[:, :d, 0], others[:, d, 0])


class Residual(nn.Module):
    """What is left of the equation, as a model: (N, d + 1) points with their kind to (N, 1) residuals.

    Inside the operator's value, on the boundary ``weight`` times the difference from the known solution. With
    ``term_weights`` (w, v) the factors are ``√(w N / n)`` of the n points inside and ``√(v N / m)`` of the m on the
    boundary instead, so that half of the mean square over all points is ``½ (w mean + v mean)``, a mean for each term.

    Raises:
        ValueError: inputs of another shape, or with a kind that is neither 0 nor 1.
    """

    def __init__(
        self,
        net: nn.Sequential,
        operator: Operator,
        solution: Solution,
        weight: float,
        time: bool,
        term_weights: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        self.net, self.operator, self.solution, self.weight = net, operator, solution, weight
        self.space, self.term_weights = range(int(time), net[0].in_features), term_weights

    def forward(self, inputs: Tensor) -> Tensor:
        boundary = self._on_boundary(inputs)
        x = inputs[:, :-1]
        u = forward_mode(self.net, x, self.space)
        inside = self.operator(x, u)
        _check_values("The operator", inside, len(x))
        edge = u.value - self.solution(x)
        if self.term_weights is None:
            return torch.where(boundary, self.weight * edge, inside)[:, None]
        numbers = torch.stack([(~boundary).sum(), boundary.sum()]).clamp_min(1)
        first, second = (inputs.new_tensor(self.term_weights) * len(x) / numbers).sqrt()
        return torch.where(boundary, second * edge, first * inside)[:, None]

    def _on_boundary(self, inputs: Tensor) -> Tensor:
        """Which points lie on the boundary, (N,)."""
        columns = self.space.stop + 1
        if inputs.ndim != 2 or inputs.shape[1] != columns:
            raise ValueError(
                f"Points in {columns - 1} coordinates with their kind, 0 inside and 1 on the boundary, have shape "
                f"(N, {columns}); got {tuple(inputs.shape)}."
            )
        kind = inputs[:, -1]
        if not inputs.is_meta and not ((kind == 0) | (kind == 1)).all():
            raise ValueError("The last column of the inputs is the kind of a point: 0 inside, 1 on the boundary.")
        return kind > 0


@dataclass(frozen=True, kw_only=True, repr=False)
class Equation(Problem):
    """A :class:`Problem` whose outputs are residuals, with a known solution to measure the error by.

    ``inputs`` is (N, d + 1): the coordinates of a point, time first where there is one, and in the last column 0
    inside and 1 on the boundary. ``targets`` are zeros (N, 1).

    Attributes:
        box: ends of every coordinate.
    """

    box: tuple[tuple[float, float], ...]

    @property
    def dim(self) -> int:
        """Coordinates, with time."""
        return len(self.box)

    def values(self, x: Tensor) -> Tensor:
        """The network's solution (n,) at points x (n, d) of the box."""
        check_points(x, self.box)
        with torch.no_grad(), evaluation(self.model):
            return self.model.net(x)[:, 0]

    def solution(self, x: Tensor) -> Tensor:
        """The known solution (n,) there."""
        check_points(x, self.box)
        return self.model.solution(x)

    def resampled(self, seed: int) -> Equation:
        """The same problem, and the same network, at other points: as many inside and on the boundary as before.

        An optimizer of ``model`` goes on with it:

        >>> problem = poisson(points=40)
        >>> other = problem.resampled(seed=1)
        >>> other.model is problem.model, other.inputs.shape == problem.inputs.shape
        (True, True)
        """
        boundary = int(self.inputs[:, -1].sum())
        inside = len(self.inputs) - boundary
        x = torch.cat(_drawn(self.box, self.model.space.start > 0, inside, boundary, seed))
        return replace(self, inputs=torch.cat([x.to(self.inputs), self.inputs[:, -1:].sort(0).values], dim=1))

    def error(self, points: int = 10_000, seed: int = 1_000_003) -> float:
        """Relative L² error, ``‖u_θ − u‖ / ‖u‖`` over fresh points drawn in the box."""
        generator = torch.Generator().manual_seed(check_seed(seed))
        x = _inside(self.box, check_count("points", points, least=1), generator).to(self.inputs)
        solution = self.solution(x)
        return float(torch.linalg.vector_norm(self.values(x) - solution) / torch.linalg.vector_norm(solution))


def equation(
    operator: Operator,
    solution: Solution,
    box: Box = ((0.0, 1.0), (0.0, 1.0)),
    *,
    time: bool = False,
    widths: Sequence[int] = (32, 32),
    points: int | Tensor = 600,
    boundary: int | Tensor | None = None,
    weight: float = 10.0,
    term_weights: tuple[float, float] | None = None,
    seed: int = 0,
    name: str = "equation",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float64,
) -> Equation:
    """The reader's own equation ``operator(x, u) = 0``. The 1-D Allen–Cahn equation, for instance:

    >>> def allen_cahn(x, u):                                      # x (n, 2): time and place; u: a Jet
    ...     return u.gradient[:, 0] - u.laplacian - u.value + u.value**3
    >>> def front(x):                                              # its known solution (n,)
    ...     return torch.sigmoid((1.5 * 2**0.5 * x[:, 0] - x[:, 1]) * 2**0.5 / 2)
    >>> problem = equation(allen_cahn, front, ((0, 1), (-5, 5)), time=True, points=100)
    >>> problem.inputs.shape, problem.targets.shape
    (torch.Size([125, 3]), torch.Size([125, 1]))

    Args:
        operator: of points x (n, d) and the network's :class:`Jet` there, the residual (n,): whatever PyTorch can
            differentiate, point by point.
        solution: the known solution (n,) at points x. It gives the values on the boundary and measures the error.
        box: ends of every coordinate, time first where there is one.
        time: whether the first coordinate is time. The boundary is then where the solution starts and the sides of
            space; the last moment is free.
        widths: of the hidden layers, tanh.
        points: inside, drawn uniformly; or the points themselves, (n, d).
        boundary: the same on the boundary; None for a quarter of ``points``.
        weight: factor on the residuals of the boundary; the loss is half of the mean square over all points.
        term_weights: of the mean square inside and of that on the boundary, each over its own points, as in the
            literature; in place of ``weight``.
        seed: of points and weights.

    Raises:
        ValueError: a box that is empty, points outside of it, an operator or solution of another shape or with NaN
            or inf.
        TypeError: the operator or solution is no function, or returns no tensor.
    """
    for what, function in (("operator", operator), ("solution", solution)):
        if not callable(function):
            raise TypeError(f"{what} must be a function; got {type(function).__name__}.")
    box = _checked_box(box)
    check_number("weight", weight, 0.0, float("inf"), open_low=True)
    if term_weights is not None:
        if not isinstance(term_weights, (tuple, list)) or len(term_weights) != 2:
            raise ValueError(f"term_weights are two numbers, of the inside and of the boundary; got {term_weights!r}.")
        term_weights = tuple(check_number("term_weights", w, 0.0, float("inf"), open_low=True) for w in term_weights)
    n = len(points) if isinstance(points, Tensor) else check_count("points", points, least=1)
    if not isinstance(boundary, Tensor):
        boundary = max(1, n // 4) if boundary is None else check_count("boundary", boundary, least=0)
    drawn = _drawn(box, time, 0 if isinstance(points, Tensor) else n, boundary, seed)
    points, boundary = (
        given if isinstance(given, Tensor) else mine for given, mine in zip((points, boundary), drawn, strict=True)
    )
    check_points(points, box)
    check_points(boundary, box)
    kinds = torch.cat([torch.zeros(len(points), 1, device="cpu"), torch.ones(len(boundary), 1, device="cpu")])
    inputs = torch.cat([torch.cat([points, boundary]).to("cpu", torch.float64), kinds.double()], dim=1)
    net = multilayer_perceptron([len(box), *widths, 1], "tanh", seed)
    model = Residual(net, operator, solution, float(weight), bool(time), term_weights)
    problem = Equation(model, inputs, inputs.new_zeros(len(inputs), 1), "gaussian", name, box=box).to(device, dtype)
    x = problem.inputs[:, :-1]
    _check_values("The solution", problem.solution(x), len(x))
    with torch.no_grad():
        for what, values in (("solution", problem.solution(x)), ("operator", problem.model(problem.inputs))):
            if not values.isfinite().all():
                raise ValueError(f"The {what} returns NaN or inf; look for a division, a root or a logarithm.")
    return problem


# ---- equations with known solutions -------------------------------------------------------------------


def poisson(
    dim: int = 2, widths: Sequence[int] = (32, 32), points: int = 600, boundary: int | None = None, seed: int = 0,
    **options,
) -> Equation:  # fmt: skip
    """Poisson's equation ``Δu + f = 0`` on the unit cube of ``dim`` dimensions; see :func:`equation`.

    The solution is ``Π sin(π x_i)`` in up to three dimensions, ``Σ cos(π x_i)`` in more, where a product all but
    vanishes (the choice of Dangel et al. 2024, section 4).
    """
    check_count("dim", dim, least=1)
    solution, eigenvalue = (_product, dim * pi**2) if dim <= 3 else (_cosines, pi**2)
    operator = partial(_poisson, solution=solution, eigenvalue=eigenvalue)
    return equation(operator, solution, ((0.0, 1.0),) * dim, widths=widths, points=points, boundary=boundary,
                    seed=seed, **{"name": f"Poisson in {dim} dimension{'s' * (dim > 1)}", **options})  # fmt: skip


def heat(
    dim: int = 1, widths: Sequence[int] = (32, 32), points: int = 600, boundary: int | None = None, seed: int = 0,
    *, diffusivity: float = 0.1, **options,
) -> Equation:  # fmt: skip
    """The heat equation ``∂_t u = κ Δu`` on the unit cube for one unit of time; see :func:`equation`.

    The solution is ``exp(−κ π² dim · t) Π sin(π x_i)``.
    """
    check_count("dim", dim, least=1)
    κ = check_number("diffusivity", diffusivity, 0.0, float("inf"), open_low=True)
    return equation(partial(_heat, diffusivity=κ), partial(_decay, rate=κ * pi**2 * dim), ((0.0, 1.0),) * (dim + 1),
                    time=True, widths=widths, points=points, boundary=boundary, seed=seed,
                    **{"name": f"heat, {dim} + 1 dimensions", **options})  # fmt: skip


def burgers(
    widths: Sequence[int] = (32, 32), points: int = 600, boundary: int | None = None, seed: int = 0,
    *, viscosity: float = 0.05, **options,
) -> Equation:  # fmt: skip
    """Burgers' equation ``∂_t u + u ∂_x u = ν ∂_xx u`` for t in [0, 1] and x in [−1, 1]; see :func:`equation`.

    The solution is a front that travels with speed ½, ``u = 1 / (1 + exp((x − t/2) / 2ν))``.
    """
    ν = check_number("viscosity", viscosity, 0.0, float("inf"), open_low=True)
    return equation(partial(_burgers, viscosity=ν), partial(_front, viscosity=ν), ((0.0, 1.0), (-1.0, 1.0)),
                    time=True, widths=widths, points=points, boundary=boundary, seed=seed,
                    **{"name": "Burgers", **options})  # fmt: skip


def _poisson(x: Tensor, u: Jet, *, solution: Solution, eigenvalue: float) -> Tensor:
    return u.laplacian + eigenvalue * solution(x)


def _product(x: Tensor) -> Tensor:
    return torch.sin(pi * x).prod(-1)


def _cosines(x: Tensor) -> Tensor:
    return torch.cos(pi * x).sum(-1)


def _heat(x: Tensor, u: Jet, *, diffusivity: float) -> Tensor:
    return u.gradient[:, 0] - diffusivity * u.laplacian


def _decay(x: Tensor, *, rate: float) -> Tensor:
    return torch.exp(-rate * x[:, 0]) * _product(x[:, 1:])


def _burgers(x: Tensor, u: Jet, *, viscosity: float) -> Tensor:
    return u.gradient[:, 0] + u.value * u.gradient[:, 1] - viscosity * u.laplacian


def _front(x: Tensor, *, viscosity: float) -> Tensor:
    return torch.sigmoid((x[:, 0] / 2 - x[:, 1]) / (2 * viscosity))


# ---- points -------------------------------------------------------------------------------------------


def check_points(x: Tensor, box: Box) -> None:
    """Refuse what is not a tensor of points (n, d) in the box."""
    check_type("points", x, Tensor)
    if x.ndim != 2 or x.shape[1] != len(box):
        raise ValueError(f"Points in {len(box)} coordinates have shape (n, {len(box)}); got {tuple(x.shape)}.")
    low, high = torch.tensor(box, dtype=x.dtype, device=x.device).T
    outside = ~((x >= low) & (x <= high)).all(1)
    if outside.any():
        n = int(outside.nonzero()[0, 0])
        raise ValueError(
            f"{int(outside.sum())} of {len(x)} points lie outside the box {list(box)}; the first is number {n}, "
            f"{[float(f'{c:.4g}') for c in x[n].tolist()]}."
        )


def _checked_box(box: Box) -> tuple[tuple[float, float], ...]:
    try:
        checked = tuple((float(low), float(high)) for low, high in box)
    except (TypeError, ValueError):
        raise TypeError(f"box holds (low, high) for every coordinate; got {box!r}.") from None
    if not checked or not all(-float("inf") < low < high < float("inf") for low, high in checked):
        raise ValueError(f"Every side of the box goes from low to a greater high, both finite; got {box!r}.")
    return checked


def _drawn(box: Box, time: bool, inside: int, boundary: int | Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """So many points inside, and on the boundary unless its points are given."""
    generator = torch.Generator().manual_seed(check_seed(seed))
    x = _inside(box, inside, generator)
    return x, boundary if isinstance(boundary, Tensor) else _on_faces(box, time, boundary, generator)


def _inside(box: Box, n: int, generator: torch.Generator) -> Tensor:
    """Uniform points (n, d)."""
    low, high = torch.tensor(box, dtype=torch.float64, device="cpu").T
    shares = torch.rand(n, len(box), generator=generator, dtype=torch.float64, device="cpu")
    return low + (high - low) * perturbed(shares).clamp_max(1)


def _on_faces(box: Box, time: bool, n: int, generator: torch.Generator) -> Tensor:
    """Points (n, d), uniform on each face of the box in turn, but the last moment of time."""
    x = _inside(box, n, generator)
    faces = [(axis, end) for axis in range(len(box)) for end in (0, 1) if not (time and axis == 0 and end == 1)]
    for i, (axis, end) in enumerate(faces):
        x[i :: len(faces), axis] = box[axis][end]
    return x


def _check_values(what: str, values: object, n: int) -> None:
    """Refuse what is not one number for each point."""
    if not isinstance(values, Tensor):
        raise TypeError(f"{what} must return a tensor; got {type(values).__name__}.")
    if values.shape != (n,):
        raise ValueError(f"{what} must return one number for each of {n} points, ({n},); got {tuple(values.shape)}.")
