"""Codes that are vectors of a table, chosen under the metric: LANES rows at a time, vector by vector.

Let `z` be the values that a vector would take if nothing in it were rounded. Its distortion is then `|R (z - c)|^2`
with `R` upper triangular, whether columns before it are still open (`R` of the Hessian's Cholesky factor: error
feedback) or everything else is settled (`R` of the vector's own part of the Hessian: descent). So one search serves
both.
A table has up to 2,048 entries; only those near `z` are tried, listed for every cell of the grid of levels.
Signs follow `z`; where their number must be even, the sign that costs least is turned.
Omitted: signs against `z`, other than those.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from bytecap.runtimes.blocks.search import LANES, TINY, Grid, compiled, half

_Array = npt.NDArray[Any]
_ZERO, _ONE = np.float32(0), np.float32(1)
SIGNS = 8
NEAR, COARSE = 24, 8  # entries tried for a code, and in the search of scales


def _cell(t: _Array, mids: _Array) -> Any:
    """Number of the cell of levels in which `t` (vector,) lies."""
    at, count = 0, len(mids) + 1
    for i in range(len(t)):
        place = 0
        for m in mids:
            place += t[i] > m
        at = at * count + place
    return at


def _sign(z: _Array, weight: _Array, parity: int, out: _Array) -> None:
    """Signs of `z`; as many are minus as `parity` says (0 even, 1 odd, -1 free): the cheapest is turned."""
    minus, least, turned = 0, np.float32(np.inf), 0
    for i in range(len(z)):
        out[i] = _ONE
        if z[i] < _ZERO:
            out[i] = -_ONE
            minus += 1
        cost = weight[i] * z[i] * z[i]
        if cost < least:
            least, turned = cost, i
    if parity >= 0 and minus % 2 != parity:
        out[turned] = -out[turned]


def _pick(
    z: _Array, tri: _Array, a: Any, sign: _Array, offset: Any, near: _Array, mids: _Array, room: _Array, b: _Array,
    s: _Array, t: _Array,
) -> tuple[Any, Any]:  # fmt: skip
    """Best of the entries near `z` as `a * (sign * level + offset)`, in `room`'s first rows, and its cost.

    `tri` (j, i) is R's row i, column j. `room` (2 * SIGNS, NEAR), `b` (vector,), `s` (vector, vector) and `t` (vector,)
    are room.
    """
    n = len(z)
    b[:] = _ZERO
    for j in range(n):
        t[j] = (z[j] / a - offset) * sign[j]
        x, y = z[j] - a * offset, a * sign[j]
        for i in range(j + 1):
            b[i] += tri[j, i] * x
            s[j, i] = tri[j, i] * y
    entries, far, cost = near[cell(t, mids)], room[SIGNS], room[SIGNS + 1]
    cost[:] = _ZERO
    for i in range(n):
        row = room[i]
        for k in range(NEAR):
            row[k] = entries[i, k]
    for i in range(n):
        far[:] = b[i]
        for j in range(i, n):
            row, x = room[j], s[j, i]
            for k in range(NEAR):
                far[k] -= x * row[k]
        for k in range(NEAR):
            cost[k] += far[k] * far[k]
    best = 0
    for k in range(1, NEAR):
        if cost[k] < cost[best]:
            best = k
    return best, cost[best]


cell: Any = compiled(_cell)
sign_of: Any = compiled(_sign)
pick: Any = compiled(_pick)


def _cost(z: _Array, c: _Array, tri: _Array, e: _Array) -> Any:
    """`|R (z - c)|^2`."""
    n = len(z)
    e[:n] = _ZERO
    for j in range(n):
        x = z[j] - c[j]
        for i in range(n):
            e[i] += tri[j, i] * x
    cost = _ZERO
    for i in range(n):
        cost += e[i] * e[i]
    return cost


cost_of: Any = compiled(_cost)


def _fit(
    u: _Array, weight: _Array, a: Any, offset: Any, near: _Array, mids: _Array, t: _Array, room: _Array
) -> tuple[Any, Any, Any]:
    """Sums `w l u`, `w l l` and the loss of a sub-block `u` under a scale, columns taken by themselves."""
    n, sx, ss, lost, inv = len(t), _ZERO, _ZERO, _ZERO, _ONE / a
    cost = room[SIGNS]
    for first in range(0, len(u), n):
        for i in range(n):
            t[i] = u[first + i] * inv - offset
        entries = near[cell(t, mids)]
        cost[:COARSE] = _ZERO
        for i in range(n):
            x, w = t[i], weight[first + i]
            for k in range(COARSE):
                y = x - np.float32(entries[i, k])
                cost[k] += w * y * y
        best = 0
        for k in range(1, COARSE):
            if cost[k] < cost[best]:
                best = k
        lost += cost[best]
        for i in range(n):
            level = np.float32(entries[i, best]) + offset
            sx += weight[first + i] * level * u[first + i]
            ss += weight[first + i] * level * level
    return sx, ss, lost * a * a


fit: Any = compiled(_fit)


def _scale(
    u: _Array, weight: _Array, top: Any, offsets: _Array, factors: _Array, near: _Array, mids: _Array,
    t: _Array, work: _Array,
) -> tuple[Any, Any]:  # fmt: skip
    """Best scale and offset of a sub-block `u`; `top` is the largest level."""
    peak, best, kept, bent = _ZERO, _ZERO, _ZERO, offsets[0]
    for x in u:
        peak = max(peak, abs(x))
    if not peak > TINY:
        return _ZERO, bent
    for offset in offsets:
        for f in factors:
            a = peak / top * f
            for _ in range(2):
                sx, ss, _lost = fit(u, weight, a, offset, near, mids, t, work)
                if not (sx > _ZERO and sx / ss > TINY):
                    break
                a = sx / ss
                if a * sx > best:
                    best, kept, bent = a * sx, a, offset
    return kept, bent


scale_of: Any = compiled(_scale)


def _odd(x: Any, most: int) -> Any:
    """Odd number nearest to `x` from 1 to `most`."""
    return min(max(np.rint((x - _ONE) * np.float32(0.5)) * np.float32(2) + _ONE, _ONE), np.float32(most))


odd: Any = compiled(_odd)


def _block(
    u: _Array, weight: _Array, top: Any, most: int, offsets: _Array, shared: bool, unit: Grid, factors: _Array,
    tries: _Array, near: _Array, mids: _Array, room: _Array, t: _Array, work: _Array, ls: _Array, bent: _Array,
) -> Any:  # fmt: skip
    """Float16 scale of a block `u` (subs, sub); its sub-scales go to `ls`, offsets of sub-blocks to `bent`.

    `shared`: a sub-block has one offset, else they are chosen later and scales are searched without. `room` is
    (subs,).
    """
    blank = np.zeros(1, np.float32)
    largest = _ZERO
    for b in range(len(u)):
        room[b], bent[b] = scale_of(u[b], weight[b], top, offsets if shared else blank, factors, near, mids, t, work)
        largest = max(largest, room[b])
        ls[b] = _ONE
    found, least = _ZERO, np.float32(np.inf)
    chosen = np.ones(len(u), np.float32)
    for f in tries:
        d = np.float32(half(largest / most * f, unit))
        if not d > TINY:
            continue
        total = _ZERO
        for b in range(len(u)):
            middle, lowest = odd(room[b] / d, most), np.float32(np.inf)
            for step in range(-2, 3, 2):
                s = middle + step
                if s >= _ONE and s <= most:
                    lost = fit(u[b], weight[b], d * s, bent[b], near, mids, t, work)[2]
                    if lost < lowest:
                        lowest, chosen[b] = lost, s
            total += lowest
        if total < least:
            least, found = total, d
            for b in range(len(u)):
                ls[b] = chosen[b]
    return found


block_scale: Any = compiled(_block)


def _choose(
    z: _Array, tri: _Array, weight: _Array, a: Any, signs: int, offsets: _Array, sign: _Array, near: _Array,
    mids: _Array, room: _Array, b: _Array, s: _Array, t: _Array, out: _Array,
) -> Any:  # fmt: skip
    """Best code of one vector into `out` (levels), and its cost; `signs`: 0 none, 1 free, 2 given in `sign`."""
    if signs == 0:
        sign[:] = _ONE
    elif signs == 1:
        sign_of(z, weight, -1, sign)
    least = np.float32(np.inf)
    for offset in offsets:
        k, cost = pick(z, tri, a, sign, offset, near, mids, room, b, s, t)
        if cost < least:
            least = cost
            for i in range(len(z)):
                out[i] = sign[i] * room[i, k] + offset
    return least


choose: Any = compiled(_choose)


def _blank(out: _Array, near: _Array, offset: Any) -> None:
    """A code (vector,) where the scale is nothing: some entry."""
    for i in range(len(out)):
        out[i] = np.float32(near[0, i, 0]) + offset


blank: Any = compiled(_blank)


def _rescale(g: _Array, v: _Array, hv: _Array, unit: Grid, d: _Array) -> None:
    """Float16 scales `d` (LANES,) at fixed codes; `g` is H times the error, `hv` H times the values `v` per scale."""
    for r in range(LANES):
        vv, vg = 0.0, 0.0
        for i in range(len(v)):
            vv += v[i, r] * hv[i, r]
            vg += v[i, r] * g[i, r]
        if vv > 0.0:
            new = half(d[r] + vg / vv, unit)
            x = new - d[r]
            if 2 * x * vg > x * x * vv:
                d[r] = new


rescale: Any = compiled(_rescale)
