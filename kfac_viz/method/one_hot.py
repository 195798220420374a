"""Rows with a single number that is not zero, kept as that number and its column: the inputs of an embedding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional


class OneHot:
    """Rows ``value · e_index`` (..., features), no one of which is ever written down.

    Stands where a tensor (..., features) may stand among the inputs of a :class:`kfac_viz.Fisher`, and has those of a
    tensor's methods that are needed there, under their names.

    Attributes:
        index: the column of each row, (...), whole numbers from 0 to ``features - 1``.
        value: the number in it, (...), 0 for a row of zeros.

    >>> rows = OneHot.of(torch.tensor([[1, -1]]), 3, torch.float32)
    >>> rows.dense()
    tensor([[[0., 1., 0.],
             [0., 0., 0.]]])
    >>> rows @ torch.tensor([[1.], [2.], [3.]])
    tensor([[[2.],
             [0.]]])
    """

    layout = torch.strided

    def __init__(self, index: Tensor, value: Tensor, features: int) -> None:
        self.index, self.value, self.features = index, value, features

    @classmethod
    def of(cls, index: Tensor, features: int, dtype: torch.dtype) -> OneHot:
        """Rows with a 1 each; a row of zeros where the index is -1."""
        return cls(index.clamp_min(0), (index >= 0).to(dtype), features)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.index.shape, self.features))

    @property
    def ndim(self) -> int:
        return self.index.ndim + 1

    @property
    def dtype(self) -> torch.dtype:
        return self.value.dtype

    @property
    def device(self) -> torch.device:
        return self.value.device

    @property
    def requires_grad(self) -> bool:
        return self.value.requires_grad

    def dense(self) -> Tensor:
        """All of it, (..., features)."""
        zeros = self.value.new_zeros(self.shape)
        return zeros.scatter_(-1, self.index[..., None], self.value[..., None])

    def to(self, dtype: torch.dtype) -> OneHot:
        return OneHot(self.index, self.value.to(dtype), self.features)

    # ---- other rows, or other numbers -------------------------------------------------------------------

    def _both(self, change: Callable[[Tensor], Tensor]) -> OneHot:
        return OneHot(change(self.index), change(self.value), self.features)

    def index_select(self, dim: int, chosen: Tensor) -> OneHot:
        """As of a tensor, along an axis counted from the last, which is -1 and is not meant."""
        return self._both(lambda x: x.index_select(dim + 1, chosen))

    def narrow(self, dim: int, start: int, length: int) -> OneHot:
        """As of a tensor, along an axis counted from the last."""
        return self._both(lambda x: x.narrow(dim + 1, start, length))

    def flatten(self, first: int, last: int) -> OneHot:
        """As of a tensor; ``last`` is at most -2."""
        return self._both(lambda x: x.flatten(first + (first < 0), last + (last < 0)))

    def expand(self, *sizes: int) -> OneHot:
        return self._both(lambda x: x.expand(*sizes[:-1]))

    def padded(self, rows: int) -> OneHot:
        """With so many rows of zeros behind those of the last axis but one."""
        return self._both(lambda x: functional.pad(x, (0, rows)))

    def __mul__(self, factor: float) -> OneHot:
        return OneHot(self.index, self.value * factor, self.features)

    def __truediv__(self, factor: float) -> OneHot:
        return OneHot(self.index, self.value / factor, self.features)

    def scaled(self, d: Tensor) -> OneHot:
        """``self diag(d)``, for numbers d (features,)."""
        return OneHot(self.index, self.value * d[self.index], self.features)

    # ---- products ---------------------------------------------------------------------------------------

    def __matmul__(self, M: Tensor) -> Tensor:
        """``self @ M`` for M (..., features, k): (..., *rows, k)."""
        rows = M.index_select(-2, self.index.flatten()).unflatten(-2, self.index.shape)
        return rows * self.value[..., None]

    def add_product_(self, out: Tensor, left: Tensor, alpha: float = 1.0) -> Tensor:
        """``out + alpha · left @ self`` in place, for ``left`` (..., R) and R rows in all: out (..., features)."""
        return out.index_add_(-1, self.index.flatten(), left * self.value.flatten(), alpha=alpha)

    def squares(self) -> Tensor:
        """The diagonal of ``selfᵀ self``, (features,); all other entries are zero."""
        return self.value.new_zeros(self.features).index_add_(0, self.index.flatten(), self.value.square().flatten())

    def merged(self, g: Tensor) -> tuple[OneHot, Tensor]:
        """The same sums ``Σ_t g[s, n, t] row[n, t]ᵀ`` for g (S, N, T, out), with no column twice in one example."""
        (N, T), index = self.index.shape, self.index
        ordered, order = index.sort(-1)
        number = functional.pad(ordered.diff(dim=-1).ne(0).cumsum(-1), (1, 0))  # of each different column
        column = torch.zeros_like(index).scatter_(-1, number, ordered)
        where = torch.empty_like(index).scatter_(-1, order, number) + T * torch.arange(N, device=index.device)[:, None]
        weighted = (g * self.value[..., None]).flatten(1, 2)
        sums = torch.zeros_like(weighted).index_add_(1, where.flatten(), weighted).unflatten(1, (N, T))
        return OneHot(column, torch.ones_like(self.value), self.features), sums


Rows = Tensor | OneHot


def numbers(x: Rows) -> Tensor:
    """All numbers of x that may be other than 0."""
    return x.value if isinstance(x, OneHot) else x


def dense(x: Rows) -> Tensor:
    """x as a tensor."""
    return x.dense() if isinstance(x, OneHot) else x


def cat(pieces: Sequence[Rows], dim: int) -> Rows:
    """Rows behind each other along an axis counted from the last; dense if one of them is."""
    if len(pieces) == 1:
        return pieces[0]
    if not all(isinstance(x, OneHot) for x in pieces):
        return torch.cat([dense(x) for x in pieces], dim)
    index, value = (torch.cat(side, dim + 1) for side in zip(*((x.index, x.value) for x in pieces), strict=True))
    return OneHot(index, value, pieces[0].features)


def padded(x: Rows, rows: int) -> Rows:
    """x (..., R, features) with so many rows of zeros behind it on the last axis but one."""
    return x.padded(rows) if isinstance(x, OneHot) else functional.pad(x, (0, 0, 0, rows))


def cross(a: Rows, b: Rows) -> Tensor:
    """``aᵀ b`` for rows a (R, i) and b (R, j), dense (i, j)."""
    if isinstance(a, OneHot) and isinstance(b, OneHot):
        flat = a.value.new_zeros(a.features * b.features)
        return flat.index_add_(0, a.index * b.features + b.index, a.value * b.value).view(a.features, b.features)
    if isinstance(a, OneHot):
        return a.add_product_(b.new_zeros(b.shape[-1], a.features), b.mT).mT.contiguous()
    if isinstance(b, OneHot):
        return b.add_product_(a.new_zeros(a.shape[-1], b.features), a.mT)
    return a.mT @ b


def inner(a: Rows, b: Rows) -> Tensor:
    """Inner products of rows a (..., R, i) with rows b (..., Q, i), (..., R, Q); both are one-hot or none."""
    if isinstance(a, OneHot):
        same = a.index[..., :, None] == b.index[..., None, :]
        return same * a.value[..., :, None] * b.value[..., None, :]
    return a @ b.mT
