"""Protect single weights as f16 or i8 wherever they are worth most, as the irregular control.

The score is that of a weight alone. For the base protected weights are 0; the Hessian stays as it is, because which
weights are free differs from row to row and a base has one Hessian for all rows. Afterwards the protected weights of a
row absorb the errors of its others, E_S = -E_R H_RS H_SS^-1 with S of its own for every row, and are then rounded
(without feedback among them). Its reader is `bytecap.format.overlays.outliers`.

Sources: SpQR (arXiv:2306.03078) for the score under the Hessian, SqueezeLLM (arXiv:2306.07629).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bytecap.format.overlays.outliers import CODER
from bytecap.quantization.overlays import Applied, UnitProblem
from bytecap.quantization.overlays.protect import Amount, Score, Stored, protected, round_vector, scores

_SHARES = (4096, 2048, 1024, 512, 256, 128, 64, 32)  # one weight in so many
_TOGETHER = 2**22  # entries of metrics that are solved together


class Outliers:
    """The overlay; a setting is an `Amount`."""

    id: ClassVar[str] = "outliers"
    charge: ClassVar[int] = 0

    def settings(self, problem: UnitProblem, base: Tensor | None = None, score: Score = "measured") -> Sequence[Amount]:
        """Return one weight in 4096 to one in 32; `base` (rows, cols) are values to rank by, if known."""
        size = problem.weight.numel()
        top = min(size, -(-size // _SHARES[-1]))
        worth = scores(problem, base, score).reshape(-1)
        order = worth.topk(top).indices.numpy().astype(np.int64)
        counts = sorted({size // share for share in _SHARES} - {0})
        # the scale of so few i8 values would cost more than they save
        return [Amount(count, bits, 0, order) for count in counts for bits in (8, 16) if bits == 16 or count > 2]

    def before(self, problem: UnitProblem, setting: Amount) -> UnitProblem:
        """Put zeros in place of the protected weights."""
        weight = problem.weight.clone()
        weight.view(-1)[torch.from_numpy(setting.index)] = 0
        return UnitProblem(problem.unit, weight, problem.hessian, problem.rows)

    def after(self, problem: UnitProblem, base: Tensor, setting: Amount) -> Applied:
        """Fit the protected weights to the decoded base."""
        index = setting.index
        values, scale, _ = round_vector(self._best(problem, base, index), setting.bits)
        stored = Stored(values, None if setting.bits == 16 else np.array([scale], np.float16))
        return protected(CODER, index, stored, problem.weight.numel(), base)

    @staticmethod
    def _best(problem: UnitProblem, base: Tensor, index: npt.NDArray[np.int64]) -> Tensor:
        """Return the values (count,) that absorb the errors of the other weights of their row."""
        error = (base - problem.weight).double()
        error.view(-1)[torch.from_numpy(index)] = 0
        pull = error @ problem.hessian
        row, column = np.divmod(index, problem.weight.shape[1])
        wanted = problem.weight.reshape(-1)[torch.from_numpy(index)].double()
        begin = np.flatnonzero(np.diff(row, prepend=-1))
        counts = np.diff(np.append(begin, len(index)))
        for count in np.unique(counts):  # rows with as many are solved together
            starts = begin[counts == count]
            most = max(1, _TOGETHER // int(count) ** 2)
            for some in np.split(starts, range(most, len(starts), most)):
                places = torch.from_numpy(some[:, None] + np.arange(count))
                chosen = torch.from_numpy(column)[places]
                metric = problem.hessian[chosen[:, :, None], chosen[:, None, :]]
                pulled = pull[torch.from_numpy(row[some])[:, None], chosen]
                wanted[places] -= torch.linalg.solve(metric, pulled)
        return wanted


OVERLAY = Outliers()
