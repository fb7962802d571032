"""Sum second moments; a processor computes and keeps their lower half only."""

from __future__ import annotations

from copy import copy
from itertools import pairwise

import torch
from torch import Tensor

_PANELS = 4  # 10 of 16 blocks are made and kept
_NARROW = 256  # columns below which panels cost more than they save


class Moment:
    """The sum of `x^T x` over batches, in float64.

    Rows of the sum lie in panels that end at the diagonal: 5/8 of the memory and of the products. A GPU, which
    has memory enough and waits for starts of kernels, makes the whole in one piece.

    Args:
        cols: width of the batches.
        device: where they are.
    """

    def __init__(self, cols: int, device: torch.device) -> None:
        panels = _PANELS if device.type == "cpu" and cols >= _NARROW else 1
        self._edges = list(pairwise(cols * i // panels for i in range(panels + 1)))
        self._panels = [torch.zeros(b - a, b, dtype=torch.float64, device=device) for a, b in self._edges]

    def add(self, x: Tensor) -> None:
        """Add a float32 batch (n, cols)."""
        for panel, (a, b) in zip(self._panels, self._edges, strict=True):
            panel.add_(x[:, a:b].T @ x[:, :b])

    def handed_over(self) -> Moment:
        """Return the sum, of which nothing is left here: hooks hold this object until garbage is collected."""
        found = copy(self)
        self._panels = []
        return found

    @property
    def parts(self) -> list[Tensor]:
        """Return what is kept of the sum."""
        return self._panels

    def whole(self) -> Tensor:
        """Return the symmetric sum (cols, cols).

        >>> sums = Moment(2, torch.device("cpu"))
        >>> sums.add(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
        >>> sums.whole().tolist()
        [[1.0, 2.0], [2.0, 5.0]]
        """
        if len(self._panels) == 1:
            return self._panels[0]
        cols = self._edges[-1][1]
        found = self._panels[0].new_empty(cols, cols)
        for panel, (a, b) in zip(self._panels, self._edges, strict=True):
            found[a:b, :b] = panel
            found[:a, a:b] = panel[:, :a].T
        return found
