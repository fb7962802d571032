"""Store a low-rank residual: the base's error in the few directions that cost most under the Hessian.

The error `R = W - base` costs `1/2 |diag(sqrt(rows)) R L|^2` with `H = L L^T`, so the best residual of a rank is the
truncated singular value decomposition of that matrix, with both factors divided by their metric again. Factors are
rounded rank by rank, alternating: given the rounded right factor `b` the best left one is `R H b / b^T H b`, given the
rounded left factor `a` the best right one is `a^T D R / a^T D a` (D the rows' weights); then one exact scale. The next
rank sees what was stored, as decoded. Its reader is `bytecap.format.overlays.lowrank`.

Sources: LQER (arXiv:2402.02446), which scales by activations' magnitudes; CALDERA (arXiv:2405.18886) for the
Hessian. Omitted: a second round in which the base codes `W` less the residual (CALDERA). A base is coded once for all
ranks of the ladder, and error feedback would spread what the residual is made for.

>>> from bytecap.types import Unit
>>> weight = torch.outer(torch.arange(8.0), torch.ones(8))
>>> problem = UnitProblem(Unit("a", (8, 8), "F32"), weight, torch.eye(8).double(), torch.ones(8).double())
>>> found = OVERLAY.after(problem, torch.zeros(8, 8), Rank(1, 8))
>>> problem.distortion(found.values) < 0.01
True
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from bytecap.format.overlays.lowrank import CODER, MAX_RANK
from bytecap.quantization.overlays import Applied, UnitProblem
from bytecap.quantization.overlays.protect import apply

_BITS = (4, 6, 8)
_CODED = (3, 4, 5)
_SPREAD = 4.13  # steps of a normal distribution's spread that one step more than an entropy of 0 bits takes
_MOST = 8  # one in so many of the full rank at most
_MORE, _PASSES = 8, 4  # further directions, and passes, of the iteration for few directions of many
_ROUNDS = 2
_SHRINKS = (1.0, 0.9, 0.8, 0.7, 0.6)  # of the largest value that a factor's codes reach


@dataclass(frozen=True)
class Rank:
    """A setting: rank and bits of a factor's values; with `coded`, about so many bits after entropy coding."""

    rank: int
    bits: int
    coded: bool = False


def directions(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return leading singular triplets (rows, rank), (rank,), (rank, cols), a few by subspace iteration."""
    if min(matrix.shape) > 4 * (rank + _MORE):
        start = torch.Generator().manual_seed(0)
        probe = torch.randn(matrix.shape[1], rank + _MORE, dtype=matrix.dtype, generator=start)
        for _ in range(_PASSES):
            probe = torch.linalg.qr(matrix.T @ torch.linalg.qr(matrix @ probe).Q).Q
        left, values, right = torch.linalg.svd(matrix @ probe, full_matrices=False)
        right = right @ probe.T
    else:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank], values[:rank], right[:rank]


def factors(problem: UnitProblem, base: Tensor, rank: int, *, weighted: bool = True) -> tuple[Tensor, Tensor]:
    """Return the best residual of a rank before rounding: (rows, rank) and (rank, cols) float64.

    `weighted=False` takes the plain norm instead, for comparison.
    """
    residual = (problem.weight - base).double()
    if not weighted:
        left, values, right = directions(residual, rank)
        return left * values, right
    root = torch.linalg.cholesky(problem.hessian)
    row = problem.rows.clamp_min(1e-12).sqrt()
    left, values, right = directions(row[:, None] * residual @ root, rank)
    return left * values / row[:, None], torch.linalg.solve_triangular(root, right, upper=False, left=False)


def _codes(vector: Tensor, weights: Tensor, setting: Rank) -> Tensor:
    """Round a vector to integers (n,) float64, with the best of a few ranges, or one step if they are entropy coded."""
    bits = 8 if setting.coded else setting.bits
    half = 2 ** (bits - 1) - 1
    largest = float(vector.abs().max())
    if largest == 0:
        return torch.zeros_like(vector)
    if setting.coded:  # no code needs to be cut off: rare ones cost more, common ones less
        step = max(float(vector.square().mean().sqrt()) * _SPREAD / 2**setting.bits, largest / half)
        return torch.round(vector / step)
    found: list[tuple[float, Tensor]] = []
    for shrink in _SHRINKS:
        step = shrink * largest / half
        codes = (vector / step).round().clamp(-half, half)
        found.append((float(((codes * step - vector) ** 2) @ weights), codes))
    return min(found, key=lambda pair: pair[0])[1]


class LowRank:
    """The overlay; a setting is a `Rank`."""

    id: ClassVar[str] = "lowrank"
    charge: ClassVar[int] = 0

    def settings(self, problem: UnitProblem, base: Tensor | None = None) -> Sequence[Rank]:
        """Return powers of two up to an eighth of the full rank, with 4, 6, 8 bits or 3 to 5 coded, by rising bytes."""
        del base
        ranks, most = [1], min(min(problem.weight.shape) // _MOST, MAX_RANK)
        while 2 * ranks[-1] <= most:
            ranks.append(2 * ranks[-1])
        found = [Rank(rank, bits) for rank in ranks if rank <= most for bits in _BITS]
        found += [Rank(rank, bits, coded=True) for rank in ranks if rank <= most for bits in _CODED]
        return sorted(found, key=lambda s: (s.rank * s.bits, s.rank))

    def before(self, problem: UnitProblem, setting: Rank) -> UnitProblem:
        """Return the problem itself."""
        del setting
        return problem

    def after(self, problem: UnitProblem, base: Tensor, setting: Rank) -> Applied:
        """Store the residual of the decoded base."""
        hessian, rows = problem.hessian, problem.rows
        diagonal = hessian.diagonal()
        _, starts = factors(problem, base, setting.rank)
        residual = (problem.weight - base).double()
        lefts, rights, scales = [], [], []
        for start in starts:
            b = _codes(start, diagonal, setting)
            for i in range(_ROUNDS):
                pulled = hessian @ b
                a = _codes(residual @ pulled, rows, setting)
                if i < _ROUNDS - 1 and bool(a.any()):
                    b = _codes((rows * a) @ residual, diagonal, setting)
            energy = float((rows * a) @ a) * float(b @ pulled)
            scale = np.float32(float((rows * a) @ residual @ pulled) / energy if energy > 0 else 0.0)
            residual -= float(scale) * torch.outer(a, b)
            lefts.append(a)
            rights.append(b)
            scales.append(scale)
        left, right = (torch.stack(part).numpy().astype(np.int64) for part in (lefts, rights))
        bits = setting.bits
        if setting.coded:
            most = max(int(np.abs(left).max()), int(np.abs(right).max()))
            bits = max(2, (2 * most + 1).bit_length())
        return apply(CODER, CODER.encode(left, right, np.array(scales, np.float32), bits), base, 1.0)


OVERLAY = LowRank()
