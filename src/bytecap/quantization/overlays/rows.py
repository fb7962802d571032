"""Protect whole output rows as f16 or i8, so that the base spends nothing on them.

Rows do not touch each other in the metric, so the best value of a protected row is the row itself, and its worth is
exactly the distortion that the base leaves in it. For the base its weights are 0 and its importance is next to none.
Its reader is `bytecap.format.overlays.rows`.

Omitted: error feedback along a row of i8 values. Its error is 2^-16 of the row's energy before any feedback.

>>> from bytecap.types import Unit
>>> rows = torch.ones(8).double()
>>> problem = UnitProblem(Unit("a", (8, 2), "F32"), torch.arange(16.0).view(8, 2), torch.eye(2).double(), rows)
>>> [(s.count, s.bits, s.index.tolist()) for s in OVERLAY.settings(problem, torch.zeros(8, 2))]
[(1, 8, [7]), (1, 16, [7])]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from bytecap.format.overlays.rows import CODER
from bytecap.quantization.overlays import Applied, UnitProblem
from bytecap.quantization.overlays.protect import Amount, Score, ladder, protected, row_scores, store, without_rows

_MOST = 8  # one in so many rows at most


class Rows:
    """The overlay; a setting is an `Amount`."""

    id: ClassVar[str] = "rows"
    charge: ClassVar[int] = 0

    def settings(self, problem: UnitProblem, base: Tensor | None = None, score: Score = "measured") -> Sequence[Amount]:
        """Return powers of two up to an eighth of the rows; `base` (rows, cols) are values to rank by, if known."""
        worth = row_scores(problem, base, score)
        return list(ladder(worth.argsort(descending=True, stable=True), problem.weight.shape[0] // _MOST))

    def before(self, problem: UnitProblem, setting: Amount) -> UnitProblem:
        """Put zeros in place of the protected rows."""
        return without_rows(problem, setting.index)

    def after(self, problem: UnitProblem, base: Tensor, setting: Amount) -> Applied:
        """Store the protected rows."""
        index = setting.index
        stored = store(problem.weight[torch.from_numpy(index)], setting.bits)
        return protected(CODER, index, stored, len(problem.weight), base)


OVERLAY = Rows()
