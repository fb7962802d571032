"""Scale groups: fit a factor for every group of consecutive weights of a row to the decoded base.

`after` needs nothing of the base: the best scales of a row are the weighted least squares fit of the row's groups,
`A t = b` with `A[g, h] = B_g H_gh B_h^T` and `b[g] = B_g (H W^T)_g` (B the decoded row, cut into groups). They are
rounded by coordinate descent from that fit, every group given the others' scales as decoded.

`before` (optional) also evens out the weights, dividing them by their group's root mean square. An error of the
quotient then costs `rows_i s_ij s_ik H_jk`, which differs from row to row, while a base has one Hessian and a factor a
row. It is given the nearest of that form: `H_jk` times the roots of the columns' mean squared scales (rows weighted),
and for every row the mean of its squared scales in units of those. Exact where scales are a product of a row's and a
column group's; the product of all factors is kept, so distortions still count nats. Its reader is
`bytecap.format.overlays.groups`.

Sources: GPTQ's groups (arXiv:2210.17323); Radio (arXiv:2505.03031).

>>> from bytecap.types import Unit
>>> problem = UnitProblem(Unit("a", (1, 4), "F32"), torch.ones(1, 4), torch.eye(4).double(), torch.ones(1).double())
>>> OVERLAY.after(problem, torch.tensor([[2.0, 2.0, 0.5, 0.5]]), Grouping(2, 8, divide=False)).values.tolist()
[[1.0, 1.0, 1.0, 1.0]]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from bytecap.format.overlays.groups import CODER, sixteenth
from bytecap.quantization.overlays import Applied, UnitProblem
from bytecap.quantization.overlays.protect import apply

_SIZES = (512, 256, 128, 64, 32, 16)
_ENTRIES = 2**22  # of all rows' matrices at a time
_RIDGE = 1e-6  # of the mean diagonal, towards the scales that were asked of the base
_ROUNDS = 2


@dataclass(frozen=True)
class Grouping:
    """A setting: the group size and the precision of scales.

    Attributes:
        size: weights in a group.
        bits: 8 (sixteenths of an octave) or 16 (f16).
        divide: the base codes weights divided by their group's root mean square.
    """

    size: int
    bits: int
    divide: bool


def _grouped(values: Tensor, size: int) -> Tensor:
    """Sum over groups: (rows, cols) to (rows, groups)."""
    padded = pad(values, (0, -values.shape[1] % size))
    return padded.view(len(values), -1, size).sum(2)


def _spread(scales: Tensor, size: int, cols: int) -> Tensor:
    """Repeat values of groups (rows, groups) for their weights (rows, cols)."""
    return scales.repeat_interleave(size, 1)[:, :cols]


def stored(scales: Tensor, bits: int) -> Tensor:
    """Return the nearest scales that can be stored, float64 as decoded."""
    if bits == 16:
        return scales.clamp(-65504, 65504).half().double()
    floor = (16 * scales.clamp_min(2.0**-8).log2()).floor().clamp(-128, 126)
    low, high = (torch.from_numpy(sixteenth(k.numpy().astype(np.int32))).double() for k in (floor, floor + 1))
    return torch.where(scales - low <= high - scales, low, high)


def wanted(problem: UnitProblem, setting: Grouping) -> Tensor:
    """Return the scales (rows, groups) by which the base's problem is divided; ones if it is not."""
    rows, cols = problem.weight.shape
    size = setting.size
    if not setting.divide:
        return torch.ones(rows, -(-cols // size), dtype=torch.float64)
    counts = _grouped(torch.ones(1, cols, dtype=torch.float64), size)
    energy = _grouped(problem.weight.double() ** 2, size) / counts
    mean = float(energy.mean())
    scales = torch.where(energy > 0, (energy / mean if mean > 0 else energy).sqrt(), 1.0)
    return stored(scales, setting.bits).clamp_min(2.0**-8)


def refit(problem: UnitProblem, base: Tensor, setting: Grouping) -> Tensor:
    """Fit scales (rows, groups) to the decoded base; returns them as stored, float64."""
    rows, cols = problem.weight.shape
    size, asked = setting.size, wanted(problem, setting)
    groups = asked.shape[1]
    step = max(1, _ENTRIES // max(groups * groups, cols))
    found = []
    for first in range(0, rows, step):
        part = slice(first, first + step)
        values, prior = base[part].double(), asked[part]
        matrix = torch.empty(len(values), groups, groups, dtype=torch.float64)
        for g in range(groups):
            cut = slice(g * size, (g + 1) * size)
            matrix[:, g] = _grouped(values[:, cut] @ problem.hessian[cut] * values, size)
        ridge = (_RIDGE * matrix.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)).clamp_min(1e-30)
        matrix += torch.diag_embed(ridge.expand(-1, groups))
        target = _grouped(problem.weight[part].double() @ problem.hessian * values, size) + ridge * prior
        fitted = _descend(matrix, target, setting.bits)
        cost = [((matrix @ t[:, :, None])[:, :, 0] * t - 2 * target * t).sum(1) for t in (fitted, prior)]
        found.append(torch.where((cost[0] <= cost[1])[:, None], fitted, prior))
    return torch.cat(found)


def _descend(matrix: Tensor, target: Tensor, bits: int) -> Tensor:
    """Solve for scales (rows, groups) and round them one after the other, the others given."""
    scales: Tensor = torch.linalg.solve(matrix, target[:, :, None])[:, :, 0]
    for _ in range(_ROUNDS):
        for g in range(scales.shape[1]):
            gap = target[:, g] - (matrix[:, g] * scales).sum(1)
            scales[:, g] = stored(scales[:, g] + gap / matrix[:, g, g], bits)
    return scales


class Groups:
    """The overlay; a setting is a `Grouping`."""

    id: ClassVar[str] = "groups"
    charge: ClassVar[int] = 0

    def settings(self, problem: UnitProblem, base: Tensor | None = None) -> Sequence[Grouping]:
        """Return groups of 512 down to 16 with 8 and 16 bits a scale, by rising bytes; nothing is ranked."""
        del base
        sizes = [size for size in _SIZES if size < problem.weight.shape[1]]
        found = [Grouping(size, bits, divide) for size in sizes for bits in (8, 16) for divide in (False, True)]
        return sorted(found, key=lambda s: s.bits / s.size)

    def before(self, problem: UnitProblem, setting: Grouping) -> UnitProblem:
        """Divide weights by their scales, with the nearest metric for the base; the problem itself if not `divide`."""
        if not setting.divide:
            return problem
        cols = problem.weight.shape[1]
        scales = _spread(wanted(problem, setting), setting.size, cols)
        squares = scales**2
        column = (problem.rows @ squares) / problem.rows.sum()
        row = problem.rows * (squares / column).mean(1)
        root, mean = column.sqrt(), row.mean()
        hessian = problem.hessian * torch.outer(root, root) * mean
        return UnitProblem(problem.unit, (problem.weight / scales).float(), hessian, row / mean)

    def after(self, problem: UnitProblem, base: Tensor, setting: Grouping) -> Applied:
        """Fit the scales to the decoded base."""
        scales = refit(problem, base, setting).numpy()
        kept = scales.astype(np.float16) if setting.bits == 16 else np.rint(16 * np.log2(scales)).astype(np.int8)
        return apply(CODER, CODER.encode(kept, setting.size), base, 1.0)


OVERLAY = Groups()
