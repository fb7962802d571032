"""Keep a lower triangular factor without its zeros, in half the memory while it is not in use.

>>> whole = torch.tensor([[2.0, 0.0], [1.0, 3.0]])
>>> packed = Triangle.of(whole)
>>> packed.size, packed.values.tolist(), packed.diagonal().tolist()
(2, [2.0, 1.0, 3.0], [2.0, 3.0])
>>> bool((packed.whole() == whole).all())
True
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_TOGETHER = 2**25  # entries
_SELECTED = 2**20  # entries that are looked through at once


@dataclass(frozen=True)
class Triangle:
    """A lower triangular matrix.

    Attributes:
        values: (size * (size + 1) / 2,), row by row.
        size: rows and columns.
    """

    values: Tensor
    size: int

    @staticmethod
    def of(whole: Tensor) -> Triangle:
        """Pack a matrix (size, size); entries above the diagonal are ignored."""
        size, mask = len(whole), _below(len(whole), whole.device)
        high = max(1, _SELECTED // max(1, size))  # rows at a time: an index is made, of 16 bytes an entry
        found = [part.masked_select(below) for part, below in zip(whole.split(high), mask.split(high), strict=True)]
        return Triangle(torch.cat(found), size)

    def whole(self) -> Tensor:
        """Return the matrix (size, size)."""
        zeros = self.values.new_zeros(self.size, self.size)
        if self.values.is_cuda:
            return self._by_rows(zeros)
        return zeros.masked_scatter_(_below(self.size, zeros.device), self.values)

    def _by_rows(self, out: Tensor) -> Tensor:
        """Fill a matrix of zeros some rows at a time, which a GPU does faster than it counts a mask."""
        high = max(1, _TOGETHER // max(1, self.size))
        for first in range(0, self.size, high):
            last = min(first + high, self.size)
            rows = torch.arange(first, last, device=out.device)[:, None]
            cols = torch.arange(last, device=out.device)[None, :]
            at = (rows * (rows + 1) // 2 + cols).clamp_(max=len(self.values) - 1)
            out[first:last, :last] = torch.where(cols <= rows, self.values[at], 0)
        return out

    def symmetric(self) -> Tensor:
        """Return the symmetric matrix (size, size) whose lower half this is."""
        return mirrored(self.whole())

    def diagonal(self) -> Tensor:
        """Return the diagonal (size,)."""
        rows = torch.arange(self.size, device=self.values.device)
        return self.values[rows * (rows + 3) // 2]


def mirrored(lower: Tensor) -> Tensor:
    """Return the symmetric matrix (size, size) of a lower half with zeros above, in its place.

    >>> mirrored(torch.tensor([[2.0, 0.0], [1.0, 3.0]])).tolist()
    [[2.0, 1.0], [1.0, 3.0]]
    """
    return lower.add_(lower.tril(-1).T)


def factor_in_place(matrix: Tensor) -> tuple[Tensor, bool]:
    """Factor a symmetric matrix by Cholesky, in its own place on a processor.

    Args:
        matrix: (size, size), columns one after the other in memory, as LAPACK takes them; its lower half counts.

    Returns:
        The lower factor, and whether there is one: whether the matrix is positive definite.

    >>> lower, positive = factor_in_place(torch.tensor([[4.0, 2.0], [2.0, 2.0]]).mT)
    >>> lower.tolist(), positive
    ([[2.0, 0.0], [1.0, 1.0]], True)
    """
    if matrix.is_cuda:
        lower, info = torch.linalg.cholesky_ex(matrix)
    else:
        info = torch.empty((), dtype=torch.int32)
        lower, info = torch.linalg.cholesky_ex(matrix, out=(matrix, info))
    return lower, int(info) == 0


def _below(size: int, device: torch.device) -> Tensor:
    """Return a mask of the entries that are not above the diagonal."""
    return torch.ones(size, size, dtype=torch.bool, device=device).tril_()
