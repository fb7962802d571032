"""Scales of blocks without sub-scales as they are stored: rounded, or the best power of two.

The nearest power of two is not the best one, so its neighbours are tried on the block. Omitted: powers further off,
which lose more by clipping or by a wasted bit than such a step gains.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from bytecap.runtimes.blocks import Codes
from bytecap.runtimes.blocks.search import LANES, Grid, compiled, half, loss

_Array = npt.NDArray[Any]
UNSIGNED = {"E8M0": 2.0**-128, "E4M3": 0.0}  # types of scales that are stored without a sign, and the least of each
_SHARES = (0.5, 0.75, 1.0, 1.5)


def _power(
    y: _Array, weight: _Array, low: Any, high: Any, table: _Array, unit: Grid, a: _Array, d: _Array, work: _Array
) -> None:
    """Best power of two `d` (LANES,) for a block that would have the scale `a`; `work` is room, (>= 5, LANES)."""
    best, total, inv, x, none = work[0], work[1], work[2], work[3], work[4]
    best[:] = np.float32(np.inf)
    none[:] = np.float32(0)
    for share in _SHARES:
        for r in range(LANES):
            x[r] = half(a[r] * share, unit)
        total[:] = np.float32(0)
        loss(y, 0, len(y), weight, low, high, table, x, none, inv, total)
        for r in range(LANES):
            if total[r] < best[r]:
                best[r], d[r] = total[r], x[r]


power: Any = compiled(_power)


def _plain(
    y: _Array, weight: _Array, low: Any, high: Any, table: _Array, minimums: int, unit: Grid, a: _Array, c: _Array,
    d: _Array, dm: _Array, ls: _Array, m: _Array, work: _Array,
) -> None:  # fmt: skip
    """Scale `d` and minimum `dm` (LANES,) of a block that would have `a` and `c`; sub-scales `ls` and `m` are 1."""
    if unit[2] == 1:  # numbers of one digit
        power(y, weight, low, high, table, unit, a, d, work)
    for r in range(LANES):
        if unit[2] > 1:
            d[r] = half(a[r], unit)
        dm[r] = half(c[r], unit)
        ls[r], m[r] = 1, min(minimums, 1)


plain: Any = compiled(_plain)


def made_positive(found: Codes, least: float) -> None:
    """Give scales that cannot be stored with a sign, or below `least`, ones that can; values stay."""
    minus = found.scale < 0
    found.codes[np.repeat(minus, found.format.block, 1)] *= -1
    found.scale[:] = np.maximum(np.abs(found.scale), np.float32(least))
