"""Compute the rank correlation of predicted and measured gains, and the ceiling that noise puts on it.

The ceiling: measured gains of the two halves of the windows are correlated over many random splits, stepped up to
the full length (Spearman-Brown, 1910), and the root taken, since a prediction carries no such noise.
"""

from __future__ import annotations

import math
import random

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
_SPLITS = 40


def _ranks(x: FloatArray) -> FloatArray:
    """Ranks from 0, ties averaged."""
    values, where, count = np.unique(x, return_inverse=True, return_counts=True)
    del values
    ends = np.cumsum(count)
    ranks: FloatArray = (ends - (count + 1) / 2)[where.reshape(-1)]
    return ranks


def spearman(x: FloatArray, y: FloatArray) -> float:
    """Rank correlation; NaN for fewer than three points or no spread.

    >>> round(spearman(np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 4.0, 9.0, 8.0])), 3)
    0.8
    """
    a, b = _ranks(x), _ranks(y)
    if len(a) < 3 or a.std() == 0 or b.std() == 0:
        return math.nan
    return float(((a - a.mean()) * (b - b.mean())).mean() / (a.std() * b.std()))


def ceiling(gains: FloatArray, tokens: FloatArray, seed: int) -> float:
    """Highest rank correlation a perfect prediction could expect.

    Args:
        gains: summed gains (points, windows).
        tokens: of each window.
        seed: of the splits.
    """
    windows = gains.shape[1] if gains.ndim == 2 else 0
    if windows < 2 or len(gains) < 3:
        return math.nan
    rng = random.Random(f"halves {seed}")  # noqa: S311
    found = []
    for _ in range(_SPLITS):
        half = rng.sample(range(windows), windows // 2)
        other = sorted(set(range(windows)) - set(half))
        a, b = (gains[:, part].sum(1) / tokens[part].sum() for part in (half, other))
        found.append(spearman(a, b))
    r = float(np.mean(found))
    return math.sqrt(max(0.0, 2 * r / (1 + r))) if r > -1 else 0.0
