"""Protected channels: the same channels of a square matrix as columns and as rows, under one list.

Matrices between two residual streams of the same width (attention projections) see the stream's large channels on both
sides. A channel's worth is that of its column and of its row together. Rows are stored as they are; the columns, in
the other rows, absorb errors as in `columns`. The layer is `bytecap.coders.channels`.

Matrices that are not square have the stream on one side only, where `columns` and `rows` do the same one byte cheaper:
no settings. Omitted: one list for several tensors, see the layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from bytecap.coders.channels import BOTH, CODER, COLUMNS, ROWS
from bytecap.paths import Applied, Problem
from bytecap.paths.protect import (
    Amount,
    Score,
    absorbed,
    apply,
    ladder,
    round_vector,
    row_scores,
    scores,
    store,
    without_columns,
    without_rows,
)

_MOST = 16  # one in so many channels at most, since each costs a column and a row


class Channels:
    """The path; a setting is an `Amount` with its mode."""

    id: ClassVar[str] = "channels"
    charge: ClassVar[int] = 0

    def settings(self, problem: Problem, base: Tensor | None = None, score: Score = "measured") -> Sequence[Amount]:
        """Powers of two up to a sixteenth of a square matrix's channels, both sides protected."""
        rows, cols = problem.weight.shape
        if rows != cols:
            return []
        worth = scores(problem, base, score).sum(0) + row_scores(problem, base, score)
        return list(ladder(worth.argsort(descending=True, stable=True), rows // _MOST, mode=BOTH))

    def before(self, problem: Problem, setting: Amount) -> Problem:
        """Zeros in place of protected rows and columns, and a Hessian that forgets what the columns will absorb."""
        index = setting.index
        changed = without_columns(problem, index) if setting.mode & COLUMNS else problem
        return without_rows(changed, index) if setting.mode & ROWS else changed

    def after(self, problem: Problem, base: Tensor, setting: Amount) -> Applied:
        """The columns as they are best over the decoded base, and the rows."""
        index, mode = setting.index, setting.mode
        shape = (problem.weight.shape[0], problem.weight.shape[1])
        others = np.delete(np.arange(shape[0]), index if mode == BOTH else [])
        vectors = []
        if mode & COLUMNS:
            chosen = torch.from_numpy(index)
            best = absorbed(problem, base, index)[:, torch.from_numpy(others)]
            stored = store(best, setting.bits, problem.hessian[chosen][:, chosen])
            ones = np.ones(len(index), np.float16)
            vectors += list(zip(stored.values, ones if stored.scales is None else stored.scales, strict=True))
        if mode & ROWS:
            vectors += [round_vector(problem.weight[i].double(), setting.bits)[:2] for i in index]
        values = np.concatenate([v for v, _ in vectors])
        scales = None if setting.bits == 16 else np.array([s for _, s in vectors], np.float16)
        size = sum(len(v) for v, _ in vectors)
        return apply(CODER, CODER.encode(mode, index, values, shape, scales), base, size / (shape[0] * shape[1]))


PATH = Channels()
