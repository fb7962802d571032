"""Find the lower envelope of quality against bytes, and the bytes saved at equal quality.

The envelope of some points is what is left when every point goes for which another one is both smaller and better;
between neighbours it is a straight line in the logarithm of the quality (in the quality itself where a value is not
positive). Nothing is read beyond its ends.

>>> kept = envelope([(100, 0.4), (200, 0.1), (150, 0.5)])
>>> kept
[(100, 0.4), (200, 0.1)]
>>> round(bytes_at(kept, 0.2)), bytes_at(kept, 0.5)
(150, nan)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from bytecap_lab.compare.pairs import Entry

SHOWS_ONLY = "module"

Points = Sequence[tuple[float, float]]
RESAMPLES = 200
_SAME = 1.001  # sizes within this ratio are one size: caps are met to some bytes


def envelope(points: Points) -> list[tuple[float, float]]:
    """Points (bytes, quality; less is better) that no other one beats, by rising size, 0.1% being no difference."""
    kept: list[tuple[float, float]] = []
    for size, value in sorted(p for p in points if math.isfinite(p[1])):
        if kept and value >= kept[-1][1]:
            continue
        if kept and size <= _SAME * kept[-1][0]:
            kept.pop()
        kept.append((size, value))
    return kept


def bytes_at(kept: Points, value: float) -> float:
    """Bytes at which an envelope reaches a quality; NaN beyond its ends."""
    for (x0, y0), (x1, y1) in pairwise(kept):
        if y1 <= value <= y0:
            if y1 > 0 and value > 0:
                return x0 + (x1 - x0) * math.log(y0 / value) / math.log(y0 / y1)
            return x0 + (x1 - x0) * (y0 - value) / (y0 - y1)
    return next((float(x) for x, y in kept if y == value), math.nan)


def resampled(entries: Sequence[Entry], metric: str, texts: Sequence[str], seed: int = 0) -> npt.NDArray[np.float64]:
    """Means of every entry over resampled documents, the same for all entries: (1 + RESAMPLES, entries).

    The first row is the sample itself.
    """
    rng = np.random.default_rng(seed)
    total = np.zeros((1 + RESAMPLES, len(entries)))
    for text in texts:
        weights = entries[0].sums[metric][text].weights
        n = len(weights)
        counts = np.vstack([np.ones(n), rng.multinomial(n, np.full(n, 1 / n), RESAMPLES)])
        values = np.stack([e.sums[metric][text].values.mean(0) for e in entries], 1)  # (clusters, entries)
        total += counts @ values / (counts @ weights)[:, None]
    return total / len(texts)


def saved(
    mine: Sequence[int], others: Sequence[int], sizes: Sequence[float], means: npt.NDArray[np.float64]
) -> Mapping[str, object] | None:
    """Share of bytes saved at equal quality, over the points of `mine` within reach of the others' envelope.

    Args:
        mine: columns of the method's points.
        others: columns of the points it is held against.
        sizes: bytes of every column.
        means: as from `resampled`.

    Returns:
        `mean` and `stderr` of `1 - bytes / bytes of the others at that quality`, and `points` with `bytes`, `quality`
        and `others_bytes`; None where no point is within reach.
    """
    ratios, points = [], []
    for row in means:
        kept = envelope([(sizes[i], row[i]) for i in others])
        at = [bytes_at(kept, row[i]) for i in mine]
        ratios.append([math.log(sizes[i] / x) if x > 0 else math.nan for i, x in zip(mine, at, strict=True)])
        if len(ratios) == 1:
            points = [
                {"bytes": sizes[i], "quality": float(row[i]), "others_bytes": x}
                for i, x in zip(mine, at, strict=True) if math.isfinite(x)
            ]  # fmt: skip
    if not points:
        return None
    found = np.array(ratios)[:, np.isfinite(ratios[0])]
    means_of = 1 - np.exp([np.mean(r[np.isfinite(r)]) if np.isfinite(r).any() else math.nan for r in found])
    spread = means_of[1:][np.isfinite(means_of[1:])]
    return {"mean": float(means_of[0]), "stderr": float(spread.std()) if len(spread) else math.nan, "points": points}
