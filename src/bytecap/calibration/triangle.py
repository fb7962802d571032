"""Keep lower triangular factors without their zeros, in half the memory while they are not in use.

>>> whole = torch.tensor([[[2.0, 0.0], [1.0, 3.0]]])
>>> packed = Triangles.of(whole)
>>> packed.size, packed.values.tolist(), packed.diagonal().tolist()
(2, [[2.0, 1.0, 3.0]], [[2.0, 3.0]])
>>> bool((packed[0] == whole[0]).all())
True
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Triangles:
    """Lower triangular matrices of one size, one for each row group.

    Attributes:
        values: (groups, size * (size + 1) / 2), row by row.
        size: rows and columns of each.
    """

    values: Tensor
    size: int

    @staticmethod
    def of(whole: Tensor) -> Triangles:
        """Pack matrices (groups, size, size); entries above the diagonal are ignored."""
        mask = _below(whole.shape[-1], whole.device)
        return Triangles(torch.stack([w.masked_select(mask) for w in whole]), whole.shape[-1])

    def __len__(self) -> int:
        """Number of matrices."""
        return len(self.values)

    def __getitem__(self, group: int) -> Tensor:
        """One matrix (size, size)."""
        whole = self.values.new_zeros(self.size, self.size)
        return whole.masked_scatter_(_below(self.size, whole.device), self.values[group])

    def __iter__(self) -> Iterator[Tensor]:
        """Yield one matrix after the other."""
        return (self[g] for g in range(len(self)))

    def diagonal(self) -> Tensor:
        """The diagonals (groups, size)."""
        rows = torch.arange(self.size, device=self.values.device)
        return self.values[:, rows * (rows + 3) // 2]


def _below(size: int, device: torch.device) -> Tensor:
    """Return a mask of the entries that are not above the diagonal."""
    return torch.ones(size, size, dtype=torch.bool, device=device).tril_()
