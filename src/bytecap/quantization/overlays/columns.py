"""Protect whole input columns as f16 or i8, so that the base spends nothing on them.

Which ones: the columns of the highest score, in nats per token; all cost the same bytes, so the order is that of
worth per byte. Their weights become 0 for the base, whose Hessian becomes the Schur complement: the protected columns
absorb the others' errors afterwards, E_S = -E_R H_RS H_SS^-1, so the base may make those errors freely. See
`bytecap.quantization.overlays.protect` for both; its reader is `bytecap.format.overlays.columns`.

Source: OWQ (arXiv:2306.02272), which keeps f16 columns by its score and lets them absorb errors. Here the score may be
measured, the values may be i8, and the base knows beforehand what will be absorbed.

>>> from bytecap.types import Unit
>>> loud = torch.eye(16).double()
>>> loud[3, 3] = 100
>>> problem = UnitProblem(
...     Unit("a", (2, 16), "F32"), torch.linspace(-1, 1, 32).view(2, 16), loud, torch.ones(2).double())
>>> [(s.count, s.bits, s.index.tolist()) for s in OVERLAY.settings(problem)][:2]
[(1, 8, [3]), (1, 16, [3])]
>>> OVERLAY.after(problem, torch.zeros(2, 16), OVERLAY.settings(problem)[1]).values[:, 2:5].tolist()
[[0.0, -0.806640625, 0.0], [0.0, 0.225830078125, 0.0]]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from bytecap.format.overlays.columns import CODER
from bytecap.quantization.overlays import Applied, UnitProblem
from bytecap.quantization.overlays.protect import (
    Amount,
    Score,
    absorbed,
    ladder,
    protected,
    scores,
    store,
    without_columns,
)

_MOST = 8  # one in so many columns at most


class Columns:
    """The overlay; a setting is an `Amount`."""

    id: ClassVar[str] = "columns"
    charge: ClassVar[int] = 0

    def settings(self, problem: UnitProblem, base: Tensor | None = None, score: Score = "measured") -> Sequence[Amount]:
        """Return powers of two up to an eighth of the columns; `base` (rows, cols) are values to rank by, if known."""
        worth = scores(problem, base, score).sum(0)
        return list(ladder(worth.argsort(descending=True, stable=True), problem.weight.shape[1] // _MOST))

    def before(self, problem: UnitProblem, setting: Amount) -> UnitProblem:
        """Put zeros in place of the protected columns, and free the Hessian of the errors they will absorb."""
        return without_columns(problem, setting.index)

    def after(self, problem: UnitProblem, base: Tensor, setting: Amount) -> Applied:
        """Fit the protected columns to the decoded base."""
        index = setting.index
        chosen = torch.from_numpy(index)
        metric = problem.hessian[chosen][:, chosen]
        stored = store(absorbed(problem, base, index), setting.bits, metric)
        return protected(CODER, index, stored, problem.weight.shape[1], base)


OVERLAY = Columns()
