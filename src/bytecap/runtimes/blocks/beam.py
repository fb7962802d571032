"""Round the columns of a block with several candidates side by side, in place of the nearest level for each in turn.

Error feedback settles a column before those in front of it are known, though a level that is not the nearest may leave
them better off. So up to `width` ways to round the columns so far are kept for every row: each goes on with the two
levels around what feedback asks for, and those of least distortion remain (the M-algorithm). They are compared within
tiles of `TILE` columns, at whose end the best way is taken. One way alone is plain feedback. The ways also tell how
much a block loses under a scale, so several may be tried.
Omitted: levels further off, and ways that outlive a tile; both cost more time than they gain.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from bytecap.runtimes.blocks.search import LANES, TINY, Grid, compiled, copy, half, near

_Array = npt.NDArray[Any]
TILE = 128
_ZERO, _ONE = np.float32(0), np.float32(1)


def _neighbours(low: Any, high: Any, table: _Array) -> _Array:
    """Next lower and next higher level (2, high - low + 1) of every one; nothing where levels are all integers."""
    found = np.empty((2, np.int64(high - low) + 1 if len(table) else 0), np.float32)
    lower = upper = np.int64(0)
    for k in range(1, len(table)):
        if table[k] != table[k - 1]:
            lower, upper = np.int64(table[k - 1] - low), np.int64(table[k] - low)
            found[1, lower], found[0, upper] = table[k], table[k - 1]
    if len(table):
        first = np.int64(table[0] - low)
        found[0, first], found[1, upper] = table[0], table[-1]
    return found


def _beside(t: Any, level: Any, low: Any, high: Any, next_to: _Array) -> Any:
    """Level on the other side of `t` from the one nearest to it, or that one where there is none."""
    if not low < t < high:
        return level
    up = t > level
    if next_to.shape[1] == 0:
        return min(max(level + (_ONE if up else -_ONE), low), high)
    return next_to[1 if up else 0, np.uint32(np.int32(level - low))]


neighbours: Any = compiled(_neighbours)
beside: Any = compiled(_beside)


def _insert(
    cost: Any, way: Any, level: Any, kept: Any, costs: _Array, parents: _Array, levels: _Array
) -> Any:  # fmt: skip
    """Put a way into the list of the best ones, in order of their costs; returns how many it holds."""
    most = len(costs)
    if kept == most and cost >= costs[most - 1]:
        return kept
    at = kept if kept < most else most - 1
    while at > 0 and cost < costs[at - 1]:
        costs[at], parents[at], levels[at] = costs[at - 1], parents[at - 1], levels[at - 1]
        at -= 1
    costs[at], parents[at], levels[at] = cost, way, level
    return min(kept + 1, most)


insert: Any = compiled(_insert)


def _row(
    y: _Array, w: _Array, push: _Array, weight: _Array, low: Any, high: Any, table: _Array, next_to: _Array, a: _Array,
    c: _Array, start: int, sub: int, ways: _Array, spare: _Array, costs: _Array, tried: _Array, parents: _Array,
    levels: _Array, q: _Array,
) -> None:  # fmt: skip
    """Levels `q` of one row's tile, last column to first.

    `y` is what feedback from behind the tile asks for, `w` the weights, `push[i, k]` what an error of column i feeds
    to column k, `weight` that of every column's own error, `next_to` the `neighbours` of levels; `a`, `c` are scales
    and minimums of the block's sub-blocks, in which the tile starts at column `start`. The others are room:
    (width, tile) for `ways` and `spare`, (width,) for `costs` and `tried`, (tile, width) for `parents` and `levels`.
    """
    count, most = 1, len(ways)
    for i in range(len(y)):
        ways[0, i] = y[i]
    costs[0] = _ZERO
    for i in range(len(y) - 1, -1, -1):
        b, own, kept = (start + i) // sub, weight[i], 0
        scale, minimum = a[b], c[b]
        inverse = _ONE / scale if abs(scale) > TINY else _ZERO
        for m in range(count):
            asked = ways[m, i] + minimum
            level = near(asked * inverse, low, high, table)
            other = beside(asked * inverse, level, low, high, next_to) if inverse != _ZERO else level
            for _ in range(1 if other == level else 2):
                lack = asked - scale * level
                kept = insert(costs[m] + own * lack * lack, m, level, kept, tried, parents[i], levels[i])
                level = other
        for n in range(kept):
            parent, error = ways[parents[i, n]], w[i] - (scale * levels[i, n] - minimum)
            costs[n] = tried[n]
            for k in range(i):
                spare[n, k] = parent[k] + push[i, k] * error
        count = min(kept, most)
        ways, spare = spare, ways
    way = np.int32(0)  # the best comes first
    for i in range(len(y)):
        q[i] = levels[i, way]
        way = parents[i, way]


row: Any = compiled(_row)


def _beam_block(
    w: _Array, first: int, block: int, y: _Array, fed: _Array, weight: _Array, sub: int, low: Any, high: Any,
    table: _Array, a: _Array, c: _Array, q: _Array, error: _Array, width: int, lost: _Array,
) -> None:  # fmt: skip
    """Codes of a block's columns, last to first, under scales `a` and minimums `c` (subs, LANES).

    `y` (block, LANES) is what later blocks feed back and the weights, `error` (cols, LANES) the errors of all columns;
    `lost` (LANES,) becomes the distortion.
    """
    lost[:] = _ZERO
    tile, per, next_to = min(block, TILE), block // sub, neighbours(low, high, table)
    ways, spare = np.empty((width, tile), np.float32), np.empty((width, tile), np.float32)
    costs, tried = np.empty(width, np.float32), np.empty(width, np.float32)
    parents, levels = np.empty((tile, width), np.int32), np.empty((tile, width), np.float32)
    push = np.empty((tile, tile), np.float32)
    asked, own, found = np.empty(tile, np.float32), np.empty(tile, np.float32), np.empty(tile, np.float32)
    scales, minimums = np.empty(per, np.float32), np.empty(per, np.float32)
    for stop in range(block, 0, -tile):
        start = max(0, stop - tile)
        count = stop - start
        for i in range(start, stop):
            m = fed[first + i]
            for j in range(stop, block):
                x = m[first + j]
                for r in range(LANES):
                    y[i, r] += x * error[first + j, r]
        for i in range(count):
            for k in range(i):
                push[i, k] = fed[first + start + k, first + start + i]
        for r in range(LANES):
            for i in range(count):
                asked[i], own[i] = y[start + i, r], w[first + start + i, r]
            for b in range(per):
                scales[b], minimums[b] = a[b, r], c[b, r]
            row(
                asked[:count], own, push, weight[first + start :], low, high, table, next_to, scales, minimums, start,
                sub, ways, spare, costs, tried, parents, levels, found,
            )  # fmt: skip
            lost[r] += costs[0]
            for i in range(count):
                b, at = (start + i) // sub, first + start + i
                q[at, r] = found[i]
                error[at, r] = w[at, r] - (scales[b] * found[i] - minimums[b])


beam_block: Any = compiled(_beam_block)


def _best_block(
    w: _Array, first: int, y: _Array, fed: _Array, weight: _Array, sub: int, low: Any, high: Any, table: _Array,
    unit: Grid, zero: bool, trials: _Array, d: _Array, dm: _Array, ls: _Array, m: _Array, q: _Array, error: _Array,
    width: int, spare: _Array,
) -> None:  # fmt: skip
    """Codes of a block under the scale that loses least of `d` (LANES,) times each of `trials`, which `d` becomes.

    `dm` are its minimums, `zero`: those are in scales; `ls` and `m` (subs, LANES) are the integers of its sub-blocks.
    `spare` is room, (2, cols, LANES).
    """
    block, per = len(y), len(ls)
    a, c, asked = np.empty((per, LANES), np.float32), np.empty((per, LANES), np.float32), np.empty_like(y)
    old, lost, least = d.copy(), np.empty(LANES, np.float32), np.full(LANES, np.inf, np.float32)
    now = np.empty(LANES, np.float32)
    for factor in trials:
        for r in range(LANES):
            now[r] = half(old[r] * factor, unit)
            for b in range(per):
                a[b, r], c[b, r] = now[r] * ls[b, r], (now[r] if zero else dm[r]) * m[b, r]
        copy(y, asked)
        beam_block(
            w, first, block, asked, fed, weight, sub, low, high, table, a, c, spare[0], spare[1], width, lost
        )  # fmt: skip
        for r in range(LANES):
            if lost[r] < least[r]:
                least[r], d[r] = lost[r], now[r]
                for i in range(first, first + block):
                    q[i, r], error[i, r] = spare[0, i, r], spare[1, i, r]
    if zero:
        for r in range(LANES):
            dm[r] = d[r]


best_block: Any = compiled(_best_block)
