"""Fit the targets of one stage: as far towards the least-squares fit as tokens grant that it was not made on.

Where a coded prefix delivers `x^` in place of `x`, outputs come nearest to the original's with the weights::

    W' = W + strength * W C (A + ridge)^-1        A = sum x^ x^T, C = sum (x - x^) x^T

The tokens are a sample. A fit to half of them is tried on the other half: `S`, the product of fit and other half's
lack, is what holds on all tokens, and what the fit's own energy has beyond it is noise `N`, which halves with twice
the tokens. So the strength is `S / (S + N / 2)`, and the ridge the one with the larger gain `S^2 / (S + N / 2)`.

A unit whose output is added to a residual stream `s` can also make up for what the stream itself lacks there, which
earlier units did wrong: `D (A + ridge)^-1` with `D = sum (s - s^) x^^T`, of shape (rows, cols). It has a strength and a
ridge of its own; both strengths are solved for together, as the two fits lack much of the same.

>>> from bytecap.allocation.target_fit import Moments
>>> found = Moments()
>>> x = torch.eye(3).repeat(8, 1)
>>> for part in x.split(6):
...     found.add(part, 0.5 * part, None)  # the prefix halves what it delivers
>>> fix, strength, _ = found.fit([(torch.ones(2, 3), torch.ones(2))], most=1.0)
>>> round(strength, 2), bool((fix - torch.eye(3)).abs().max() < 0.02)
(1.0, True)
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from bytecap.calibration.triangle import factor_in_place
from bytecap.quantization.quantizer import Prepared
from bytecap.quantization.stored import StoredPrepared

_RIDGES = 1e-2, 1e-1  # of the mean second moment
_STREAM_RIDGES = 1e-2, 1e-1, 1.0  # the same for fits to what a stream lacks, which have every entry free
_SOLVED = 40  # times that two strengths are solved for in turn
_ALONE = 0.4  # strength where there is one batch, and nothing to try a fit on
_TRIED = 256  # rows of a matrix, at most, that a fit is tried on
_WIDE = 2048  # columns from which a trial solves for its rows alone: a sixth of the operations, in another order
_NOTHING = 1e-30  # second moment of inputs that a coded prefix of zeros delivers, which still has to be inverted


class Fit(NamedTuple):
    """Changes of weights `W` that make targets of them: `strength * W fix`, and `stream`.

    Attributes:
        fix: float32 (cols, cols).
        strength: of it.
        stream: float32 (rows, cols), for what the residual stream lacks, in its strength; None where there is none.
    """

    fix: Tensor
    strength: float
    stream: Tensor | None = None


class Moments:
    """The sums `A`, `C` (cols, cols) and perhaps `D` (rows, cols), float64, of every other batch by themselves."""

    def __init__(self) -> None:
        self._sums: list[list[Tensor]] = []
        self._batches = 0

    def add(self, x: Tensor, seen: Tensor, mask: Tensor | None, lack: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            x: inputs of the original (..., cols).
            seen: those behind the coded prefix.
            mask: real tokens (batch, length), None where all are.
            lack: what the stream that outputs are added to lacks (..., rows).
        """
        found = [t.flatten(0, -2) for t in (x, seen, *([] if lack is None else [lack]))]  # some models do it themselves
        if mask is not None and mask.numel() == len(found[0]):  # else a layer reads more or fewer vectors than tokens
            found = [t[mask.reshape(-1)] for t in found]
        one, other, *stream = (t.float() for t in found)
        half = self._batches % 2
        self._batches += 1
        if half == len(self._sums):
            self._sums.append([(t.T @ other).double() for t in (other, one - other, *stream)])
        else:
            for total, lacks in zip(self._sums[half], (other, one - other, *stream), strict=True):
                total.add_(lacks.T @ other)  # float32 onto float64, without a copy

    def fit(self, matrices: Sequence[tuple[Tensor, Tensor]], most: float) -> Fit:
        """Return the fit `C (A + ridge)^-1` and its strength, at most `most`, and that of the stream; frees the sums.

        Args:
            matrices: of every unit of the stage, see `trial_of`; the only one where the stream's lack was added.
            most: 1 for the least-squares fit.
        """
        if len(self._sums) == 1:
            a, c, *_ = self._sums.pop()
            (fix,) = _solved(a, _RIDGES[0], c)
            return Fit(fix, min(most, _ALONE))
        if len(self._sums[0]) > 2 and most > 0:
            ((weight, rows),) = matrices
            (one, other), ridges = self._tried_together(weight, rows, most)
            a, c, d = self._whole()
            if ridges[0] == ridges[1]:
                fix, stream = _solved(a, ridges[0], c, d)
            else:
                (fix,), (stream,) = _solved(a, ridges[0], c), _solved(a, ridges[1], d)
            return Fit(fix, one, stream * other)
        gain, strength, ridge = max(self._tried(matrices, ridge) for ridge in _RIDGES)
        a, c, *_ = self._whole()
        (fix,) = _solved(a, ridge, c)
        return Fit(fix, min(most, strength) if gain > 0 else 0.0)

    def _whole(self) -> list[Tensor]:
        """Return the sums of all batches, and let those of halves go."""
        other, found = self._sums.pop(), self._sums.pop()
        for total, part in zip(found, other, strict=True):
            total.add_(part)
        return found

    def _tried(self, matrices: Sequence[tuple[Tensor, Tensor]], ridge: float) -> tuple[float, float, float]:
        """Return gain, strength and ridge of fits to each half, tried on the other one."""
        held = energy = 0.0
        for own, other in ((0, 1), (1, 0)):
            a, c = self._sums[own][:2]
            fits = _fits(a, c, ridge, [weight for weight, _ in matrices])
            del a, c
            changes = [(weight, fit, rows.double()) for fit, (weight, rows) in zip(fits, matrices, strict=True)]
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

    def _tried_together(
        self, weight: Tensor, rows: Tensor, most: float
    ) -> tuple[tuple[float, float], tuple[float, float]]:
        """Return the strengths of both fits of one unit, and their ridges."""
        every = -(-len(self._sums[0][2]) // len(weight))  # rows that were left out of the trial
        held = torch.zeros(len(_RIDGES), len(_STREAM_RIDGES), 2, 2, dtype=torch.float64)
        energy = torch.zeros_like(held)
        for own, other in ((0, 1), (1, 0)):
            a, c, d = self._sums[own]
            beyond, c_there, d_there = (t.float() for t in self._sums[other])
            lacks = weight @ c_there, d_there[::every]
            fits, streams = list[Tensor](), list[Tensor]()
            for ridge in _STREAM_RIDGES:  # which has all of the others
                stream, *fixes = _solved(a, ridge, d[::every], *([c] if ridge in _RIDGES else []))
                streams.append(stream)
                fits += [weight @ fix for fix in fixes]
            spread = {id(f): f @ beyond for f in (*fits, *streams)}
            for (i, fit), (j, stream) in product(enumerate(fits), enumerate(streams)):
                for k, one in enumerate((fit, stream)):
                    held[i, j, k] += torch.stack([_weighted(rows, one, lack) for lack in lacks])
                    energy[i, j, k] += torch.stack([_weighted(rows, one, spread[id(f)]) for f in (fit, stream)])
        best = max(
            (*_strengths(held[i, j], energy[i, j], most), (one, other))
            for (i, one), (j, other) in product(enumerate(_RIDGES), enumerate(_STREAM_RIDGES))
        )
        return best[1], best[2]


def _weighted(rows: Tensor, one: Tensor, other: Tensor) -> Tensor:
    return (rows.double() @ (one * other).sum(1).double()).cpu()


def _strengths(held: Tensor, energy: Tensor, most: float) -> tuple[float, tuple[float, float]]:
    """Return the largest gain of two fits together, and their strengths, each from 0 to `most`.

    Args:
        held: (2, 2), every fit times what each of the two lacks on the other half.
        energy: (2, 2), of fits with each other there.
        most: of a strength.
    """
    signal = (held + held.T) / 2
    there, gained = (signal + (energy + energy.T) / 2) / 2, held.sum(1)
    found = torch.zeros(2, dtype=torch.float64)
    for _ in range(_SOLVED):
        for i, j in ((0, 1), (1, 0)):
            if there[i, i] > 0:
                found[i] = ((gained[i] - there[i, j] * found[j]) / there[i, i]).clamp(0, most)
    gain = float(2 * found @ gained - found @ there @ found)
    return (gain, (float(found[0]), float(found[1]))) if gain > 0 else (0.0, (0.0, 0.0))


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


def _fits(a: Tensor, c: Tensor, ridge: float, weights: Sequence[Tensor]) -> list[Tensor]:
    """Return the changes of some rows of weights by a fit, `weight C (A + ridge)^-1`, float32."""
    if len(a) >= _WIDE:
        return _solved(a, ridge, *(weight.double() @ c for weight in weights))
    (fix,) = _solved(a, ridge, c)
    return [weight @ fix for weight in weights]


def _solved(a: Tensor, ridge: float, *sides: Tensor) -> list[Tensor]:
    """Return `side (a + ridge)^-1`, float32, of every side (some, cols); they share a factor."""
    lower, positive = factor_in_place(_damped(a.mT, ridge).mT)
    if positive:
        return [torch.cholesky_solve(side.T, lower).T.float() for side in sides]
    return [torch.linalg.solve(_damped(a, ridge), side.T).T.float() for side in sides]


def _damped(a: Tensor, ridge: float) -> Tensor:
    damped = a.clone()
    damped.diagonal().add_(max(ridge * float(a.diagonal().mean()), _NOTHING))
    return damped
