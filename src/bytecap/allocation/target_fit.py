"""Fit the targets of one stage: as far towards the least-squares fit as tokens grant that it was not made on.

Where a coded prefix delivers `x^` in place of `x`, outputs come nearest to the original's with the weights::

    W' = W + strength * W C (A + ridge)^-1        A = sum x^ x^T, C = sum (x - x^) x^T

The tokens are a sample. A fit to half of them is tried on the other half: `S`, the product of fit and other half's
lack, is what holds on all tokens, and what the fit's own energy has beyond it is noise `N`, which halves with twice
the tokens. So the strength is `S / (S + N / 2)`, and the ridge the one with the larger gain `S^2 / (S + N / 2)`.

>>> from bytecap.allocation.target_fit import Moments
>>> found = Moments()
>>> x = torch.eye(3).repeat(8, 1)
>>> for part in x.split(6):
...     found.add(part, 0.5 * part, None)  # the prefix halves what it delivers
>>> fix, strength = found.fit([(torch.ones(2, 3), torch.ones(2))], most=1.0)
>>> round(strength, 2), bool((fix - torch.eye(3)).abs().max() < 0.02)
(1.0, True)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bytecap.quantization.quantizer import Prepared
from bytecap.quantization.stored import StoredPrepared

_RIDGES = 1e-2, 1e-1  # of the mean second moment
_ALONE = 0.4  # strength where there is one batch, and nothing to try a fit on
_TRIED = 256  # rows of a matrix, at most, that a fit is tried on
_NOTHING = 1e-30  # second moment of inputs that a coded prefix of zeros delivers, which still has to be inverted


class Moments:
    """The sums `A` and `C` (cols, cols), float64, of every other batch by themselves."""

    def __init__(self) -> None:
        self._sums: list[tuple[Tensor, Tensor]] = []
        self._batches = 0

    def add(self, x: Tensor, seen: Tensor, mask: Tensor | None) -> None:
        """Add a batch.

        Args:
            x: inputs of the original (..., cols).
            seen: those behind the coded prefix.
            mask: real tokens (batch, length), None where all are.
        """
        one, other = (t.flatten(0, -2) for t in (x, seen))  # some models flatten (batch, length) before a layer
        if mask is not None and mask.numel() == len(one):  # else a layer reads more or fewer vectors than tokens
            one, other = one[mask.reshape(-1)], other[mask.reshape(-1)]
        one, other = one.float(), other.float()
        half = self._batches % 2
        self._batches += 1
        if half == len(self._sums):
            self._sums.append(((other.T @ other).double(), ((one - other).T @ other).double()))
        else:
            a, c = self._sums[half]
            a += other.T @ other  # float32 onto float64, without a copy
            c += (one - other).T @ other

    def fit(self, matrices: Sequence[tuple[Tensor, Tensor]], most: float) -> tuple[Tensor, float]:
        """Return the fit `C (A + ridge)^-1`, float32 (cols, cols), and its strength, at most `most`; frees the sums.

        Args:
            matrices: of every unit of the stage, see `trial_of`.
            most: 1 for the least-squares fit.
        """
        if len(self._sums) == 1:
            return _solved(*self._sums.pop(), _RIDGES[0]), min(most, _ALONE)
        gain, strength, ridge = max(self._tried(matrices, ridge) for ridge in _RIDGES)
        other, (a, c) = self._sums.pop(), self._sums.pop()
        a += other[0]
        c += other[1]
        del other
        return _solved(a, c, ridge), min(most, strength) if gain > 0 else 0.0

    def _tried(self, matrices: Sequence[tuple[Tensor, Tensor]], ridge: float) -> tuple[float, float, float]:
        """Return gain, strength and ridge of fits to each half, tried on the other one."""
        held = energy = 0.0
        for own, other in ((0, 1), (1, 0)):
            fix = _solved(*self._sums[own], ridge)
            changes = [(weight, weight @ fix, rows.double()) for weight, rows in matrices]
            del fix
            c = self._sums[other][1].float()
            for weight, change, rows in changes:
                held += float(rows @ (change * (weight @ c)).sum(1).double())
            del c
            a = self._sums[other][0].float()
            for _, change, rows in changes:
                energy += float(rows @ (change * (change @ a)).sum(1).double())
            del a
        if held <= 0:
            return 0.0, 0.0, ridge
        strength = held / (held + max(energy - held, 0.0) / 2)
        return held * strength, strength, ridge


def trial_of(item: Prepared) -> tuple[Tensor, Tensor]:
    """Return every so many rows of a unit's target (some, cols) and the weight of each one's error (some,).

    Units of a stage are comparable by what their columns weigh, given the columns that are coded before.
    """
    every = -(-item.shape[0] // _TRIED)
    slabs = item.slabs() if isinstance(item, StoredPrepared) else [(slice(0, None), item.target)]
    rows = torch.cat([part[-at.start % every :: every] for at, part in slabs])
    return rows, item.rows[::every] * float(item.lower.diagonal().square().mean())


def trial_rows(weight: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `trial_of` does, of a matrix (rows, cols) and the weight of every row's error (rows,)."""
    every = -(-len(weight) // _TRIED)
    return weight[::every], rows[::every].to(weight.device)


def _solved(a: Tensor, c: Tensor, ridge: float) -> Tensor:
    lower, info = torch.linalg.cholesky_ex(_damped(a, ridge))
    if int(info) == 0:
        found: Tensor = torch.cholesky_solve(c.T, lower)
    else:
        found = torch.linalg.solve(_damped(a, ridge), c.T)
    return found.T.float()


def _damped(a: Tensor, ridge: float) -> Tensor:
    damped = a.clone()
    damped.diagonal().add_(max(ridge * float(a.diagonal().mean()), _NOTHING))
    return damped
