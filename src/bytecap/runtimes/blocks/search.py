"""Scales of blocks: weighted least squares over candidates, for many rows at once.

Arrays are (columns, LANES): one row of the matrix in every lane, so that the compiler works on many rows with one
instruction and no sum depends on how they are cut. For every candidate scale the codes are rounded and the scale is
solved for these codes, twice. Blocks of two levels then share one float16: candidates for it near the largest
sub-block's, and the small integers by rounding, with their neighbours where there are few of them.
Omitted: the exact minimum, which a sweep of `descent` comes closer to.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numba
import numpy as np
import numpy.typing as npt

_Array = npt.NDArray[Any]
Grid = tuple[float, float, int, int]  # unit of weights; largest, digits, and least exponent of stored scales
LANES = 64
TINY = np.float32(1e-30)  # a scale below it is none
_ZERO, _ONE, _TWO = np.float32(0), np.float32(1), np.float32(2)


def compiled(function: Any, *, cache: bool = False, inline: Literal["never", "always"] = "never") -> Any:
    """Machine code of a function, with sums in the order in which they are written.

    Only what is called from outside is kept on disk: see `kernel`. `inline="always"`: no machine code of its own, but a
    part of its one caller, which saves compiling it and all that it calls once more.
    """
    return numba.njit(nogil=True, cache=cache, error_model="numpy", fastmath={"contract", "nsz"}, inline=inline)(
        function
    )


def _near(t: Any, low: Any, high: Any, table: _Array) -> Any:
    """Level nearest to `t`; `table` has one for every half step from `low`, or is empty where levels are integers."""
    t = min(max(t, low), high)
    if len(table) == 0:
        return np.rint(t)
    return table[np.uint32(np.int32(t + t - low - low))]  # unsigned: no check for a place from the end


near: Any = compiled(_near)


def _half(x: float, unit: Grid) -> float:
    """`x` such that `x` times the first of `unit` is a number of few digits: the nearest one, or the largest."""
    peak, largest, digits, least = unit
    x = min(max(x * peak, -largest), largest)
    step = math.ldexp(1.0, max(math.frexp(x)[1], least) - digits)
    return float(np.rint(x / step) * step / peak)


half: Any = compiled(_half)


def _copy(source: _Array, out: _Array) -> None:
    """Rows of `out` (rows, LANES) become those of `source`.

    A slice would do the same, with a message about shapes whose strings take seconds to compile.
    """
    for i in range(len(out)):
        for r in range(LANES):
            out[i, r] = source[i, r]


copy: Any = compiled(_copy)


def _inverse(a: _Array, out: _Array) -> None:
    for r in range(LANES):
        big = abs(a[r]) > TINY
        out[r] = _ONE / a[r] if big else _ZERO


inverse: Any = compiled(_inverse)


def _symmetric(
    y: _Array, first: int, last: int, weight: _Array, low: Any, high: Any, table: _Array, factors: _Array, signs: int,
    scale: _Array, work: _Array,
) -> None:  # fmt: skip
    """Best `scale` (LANES,) for columns `first` to `last` of `y` as `scale * level`.

    `factors` are candidates, in units of the scale that puts the largest value at the end of the range; `signs` is 2
    where the range is not symmetric, else 1; `work` is room, (>= 6, LANES).
    """
    peak, best, a, sx, ss = work[0], work[1], work[2], work[3], work[4]
    inv = work[5]
    peak[:] = _ZERO
    best[:] = _ZERO
    scale[:] = _ZERO
    for i in range(first, last):
        for r in range(LANES):
            v = y[i, r]
            peak[r] = v if abs(v) > abs(peak[r]) else peak[r]
    for sign in range(signs):
        for f in factors:
            g = np.float32(f / low if sign == 0 else -f / low)
            for r in range(LANES):
                a[r] = peak[r] * g
            for _ in range(2):
                inverse(a, inv)
                sx[:] = _ZERO
                ss[:] = _ZERO
                for i in range(first, last):
                    w = weight[i]
                    for r in range(LANES):
                        q = near(y[i, r] * inv[r], low, high, table)
                        t = w * q
                        sx[r] += t * y[i, r]
                        ss[r] += t * q
                for r in range(LANES):
                    a[r] = sx[r] / ss[r] if ss[r] > _ZERO else _ZERO
                    gain = a[r] * sx[r]
                    better = gain > best[r]
                    scale[r] = a[r] if better else scale[r]
                    best[r] = gain if better else best[r]


def _affine(
    y: _Array, first: int, last: int, weight: _Array, high: Any, factors: _Array, positive: bool,
    scale: _Array, minimum: _Array, work: _Array,
) -> None:  # fmt: skip
    """Best `scale` and `minimum` (LANES,) for columns `first` to `last` of `y` as `scale * code - minimum`.

    `positive`: the minimum must not be negative. `work` is room, (>= 10, LANES).
    """
    lowest, span, best, a, c, sy = work[0], work[1], work[2], work[3], work[4], work[9]
    sw = _ZERO
    for r in range(LANES):
        lowest[r], span[r] = y[first, r], y[first, r]
        best[r], sy[r] = np.float32(-np.inf), _ZERO
    for i in range(first, last):
        sw += weight[i]
        for r in range(LANES):
            lowest[r] = min(lowest[r], y[i, r])
            span[r] = max(span[r], y[i, r])
            sy[r] += weight[i] * y[i, r]
    for r in range(LANES):
        lowest[r] = min(lowest[r], _ZERO) if positive else lowest[r]
        span[r] = max(span[r] - lowest[r], _ZERO)
        scale[r], minimum[r] = _ZERO, -lowest[r]
    for f in factors:
        for place in range(3):
            for r in range(LANES):
                a[r] = span[r] / high * f
                c[r] = -(lowest[r] + span[r] * (_ONE - f) * np.float32(0.5) * place)
                c[r] = max(c[r], _ZERO) if positive else c[r]
            for _ in range(2):
                line(y, first, last, weight, high, positive, sw, best, a, c, scale, minimum, work)


def _line(
    y: _Array, first: int, last: int, weight: _Array, high: Any, positive: bool, sw: Any, best: _Array, a: _Array,
    c: _Array, scale: _Array, minimum: _Array, work: _Array,
) -> None:  # fmt: skip
    """Codes under `a` and `c`, the best line through them as the next `a` and `c`, and kept where it is better."""
    inv, sq, sqq, sqy, sy = work[5], work[6], work[7], work[8], work[9]
    inverse(a, inv)
    sq[:] = _ZERO
    sqq[:] = _ZERO
    sqy[:] = _ZERO
    for i in range(first, last):
        w = weight[i]
        for r in range(LANES):
            q = np.rint(min(max((y[i, r] + c[r]) * inv[r], _ZERO), high))
            t = w * q
            sq[r] += t
            sqq[r] += t * q
            sqy[r] += t * y[i, r]
    for r in range(LANES):
        det = sw * sqq[r] - sq[r] * sq[r]
        sound = det > np.float32(1e-5) * sw * sqq[r]
        x = (sw * sqy[r] - sq[r] * sy[r]) / det if sound else _ZERO
        z = (sq[r] * sqy[r] - sqq[r] * sy[r]) / det if sound else _ZERO
        if positive and z < _ZERO:
            z = _ZERO
            x = sqy[r] / sqq[r] if sqq[r] > _ZERO else _ZERO
        gain = x * (_TWO * (sqy[r] + z * sq[r]) - x * sqq[r]) - z * (_TWO * sy[r] + z * sw)
        better = sound and gain > best[r]
        best[r] = gain if better else best[r]
        scale[r] = x if better else scale[r]
        minimum[r] = z if better else minimum[r]
        a[r] = x
        c[r] = z


def _loss(
    y: _Array, first: int, last: int, weight: _Array, low: Any, high: Any, table: _Array, a: _Array, c: _Array,
    inv: _Array, total: _Array,
) -> None:  # fmt: skip
    """Add to `total` what columns `first` to `last` lose under scale `a` and minimum `c`."""
    inverse(a, inv)
    for i in range(first, last):
        w = weight[i]
        for r in range(LANES):
            e = y[i, r] + c[r] - a[r] * near((y[i, r] + c[r]) * inv[r], low, high, table)
            total[r] += w * e * e


symmetric: Any = compiled(_symmetric)
line: Any = compiled(_line)
affine: Any = compiled(_affine)
loss: Any = compiled(_loss)


def _nearest_small(a: _Array, inv: _Array, low: int, high: int, out: _Array) -> None:
    """Small integers nearest to `a * inv`."""
    for r in range(LANES):
        out[r] = np.rint(min(max(a[r] * inv[r], np.float32(low)), np.float32(high)))


nearest_small: Any = compiled(_nearest_small)


def _product(a: _Array, b: _Array, out: _Array) -> None:
    for r in range(LANES):
        out[r] = a[r] * b[r]


product: Any = compiled(_product)


def _float(
    y: _Array, sub: int, weight: _Array, low: Any, high: Any, table: _Array, scales: tuple[int, int], minimums: int,
    unit: Grid, tries: _Array, a: _Array, c: _Array, d: _Array, dm: _Array, work: _Array,
) -> None:  # fmt: skip
    """Float16 scale `d` and minimum `dm` (LANES,) of a block whose sub-blocks would have `a` and `c` (subs, LANES).

    `tries` are candidates, relative to what puts the largest sub-scale at the end of its range; `work` is room,
    (>= 11, LANES).
    """
    top, ctop, best, total, inv = work[0], work[1], work[2], work[3], work[4]
    x, z, xd, zd, li, mi = work[5], work[6], work[7], work[8], work[9], work[10]
    top[:] = _ZERO
    ctop[:] = _ZERO
    best[:] = np.float32(np.inf)
    for b in range(len(a)):
        for r in range(LANES):
            top[r] = a[b, r] if abs(a[b, r]) > abs(top[r]) else top[r]
            ctop[r] = max(ctop[r], c[b, r])
    end = scales[1] if scales[0] >= 0 else scales[0]
    share = _ONE / np.float32(max(minimums, 1))
    for f in tries:
        for g in tries if minimums > 0 else tries[:1]:
            for r in range(LANES):
                xd[r], zd[r] = half(top[r] / end * f, unit), half(ctop[r] * share * g, unit)
            total[:] = _ZERO
            for b in range(len(a)):
                inverse(xd, inv)
                nearest_small(a[b], inv, scales[0], scales[1], li)
                inverse(zd, inv)
                nearest_small(c[b], inv, 0, minimums, mi)
                product(xd, li, x)
                product(zd, mi, z)
                loss(y, b * sub, b * sub + sub, weight, low, high, table, x, z, inv, total)
            for r in range(LANES):
                if total[r] < best[r]:
                    best[r], d[r], dm[r] = total[r], xd[r], zd[r]


def _small(
    y: _Array, sub: int, weight: _Array, low: Any, high: Any, table: _Array, scales: tuple[int, int], minimums: int,
    a: _Array, c: _Array, d: _Array, dm: _Array, ls: _Array, m: _Array, work: _Array,
) -> None:  # fmt: skip
    """Integers `ls` and `m` (subs, LANES) such that `d * ls` and `dm * m` come near `a` and `c`.

    Where there are few of them, neighbours are tried as well. `work` is room, (>= 9, LANES).
    """
    top, ctop, best, total, inv = work[0], work[1], work[2], work[3], work[4]
    x, z, li, mi = work[5], work[6], work[7], work[8]
    reach = 1 if scales[1] <= 31 else 0
    for b in range(len(a)):
        inverse(d, inv)
        nearest_small(a[b], inv, scales[0], scales[1], top)
        inverse(dm, inv)
        nearest_small(c[b], inv, 0, minimums, ctop)
        best[:] = np.float32(np.inf)
        for dl in range(-reach, reach + 1):
            for dz in range(-reach, reach + 1) if minimums > 0 else range(1):
                for r in range(LANES):
                    li[r] = min(max(top[r] + dl, np.float32(scales[0])), np.float32(scales[1]))
                    mi[r] = min(max(ctop[r] + dz, _ZERO), np.float32(minimums))
                product(d, li, x)
                product(dm, mi, z)
                total[:] = _ZERO
                loss(y, b * sub, b * sub + sub, weight, low, high, table, x, z, inv, total)
                for r in range(LANES):
                    if total[r] < best[r]:
                        best[r], ls[b, r], m[b, r] = total[r], li[r], mi[r]


def _zero_point(
    y: _Array, weight: _Array, high: Any, table: _Array, unit: Grid, a: _Array, c: _Array, s: _Array, d: _Array,
    m: _Array, work: _Array,
) -> None:  # fmt: skip
    """Scale `d` and integer zero point `m` (LANES,) of a block as `d * (code - m)`.

    The zero points next to the line `a`, `c` are tried, and the one in the middle of the range with the scale `s`.
    `work` is room, (>= 6, LANES).
    """
    best, total, inv, x, z, zero = work[0], work[1], work[2], work[3], work[4], work[5]
    best[:] = np.float32(np.inf)
    for k in range(4):
        for r in range(LANES):
            x[r] = half(a[r] if k < 3 else s[r], unit)
        inverse(x, inv)
        for r in range(LANES):
            near_line = np.rint(c[r] * inv[r]) + np.float32(k - 1)
            zero[r] = min(max(near_line, _ZERO), high) if k < 3 else np.rint(high * np.float32(0.5))
            z[r] = x[r] * zero[r]
        total[:] = _ZERO
        loss(y, 0, len(y), weight, _ZERO, high, table, x, z, inv, total)
        for r in range(LANES):
            if total[r] < best[r]:
                best[r], d[r], m[r] = total[r], x[r], zero[r]


zero_point: Any = compiled(_zero_point)
float_of: Any = compiled(_float)
small: Any = compiled(_small)
