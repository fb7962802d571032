"""Rounding of block formats in triton programs: what `search`, `kernel` and `descent` do, for many rows side by side.

Arrays are (matrices, columns, rows), so that threads next to each other hold rows next to each other. A program takes a
few rows of one matrix and a few of its columns: a block in `search`, `TILE` columns in `descend_tile`, which goes
through these one after the other. Between programs, products of matrices carry errors to all other columns; see
`bytecap.runtimes.blocks.cuda`. Every sum has one order, so the same device gives the same bytes. They are not the
processor's: sums of many columns are ordered otherwise.
"""

import triton
import triton.language as tl

_TINY = tl.constexpr(1e-30)  # a scale below it is none


@triton.jit
def _rint(x):
    """Return the nearest integer."""
    return tl.floor(x + 0.5)


@triton.jit
def _near(t, low, high, TABLE, LEVELS: tl.constexpr):
    """Return the level nearest to `t`; the table has one for every half step from `low`."""
    t = tl.minimum(tl.maximum(t, low), high)
    if LEVELS:
        return tl.load(TABLE + tl.floor(t + t - low - low).to(tl.int32))
    return _rint(t)


@triton.jit
def _inverse(a):
    big = tl.abs(a) > _TINY
    return tl.where(big, 1.0 / tl.where(big, a, 1.0), 0.0)


@triton.jit
def _stored(x, unit, BF16: tl.constexpr):
    """Return `x` such that `x * unit` is a float16 or a bfloat16: the nearest one, or the largest."""
    x *= unit
    if BF16:
        x = tl.minimum(tl.maximum(x, -3.3895e38), 3.3895e38)
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return ((bits >> 16) << 16).to(tl.float32, bitcast=True) / unit
    return tl.minimum(tl.maximum(x, -65504.0), 65504.0).to(tl.float16).to(tl.float32) / unit


@triton.jit
def _symmetric(y, w, low, high, TABLE, FACTORS, steps, signs, LEVELS: tl.constexpr):
    """Return the best scale (PER, R) of sub-blocks `y` (PER, SUB, R) under weights `w` (PER, SUB, 1)."""
    most, least = tl.max(y, 1), tl.min(y, 1)
    peak = tl.where(most >= -least, most, least)
    best, scale = peak * 0.0, peak * 0.0
    for k in range(steps * signs):
        g = tl.load(FACTORS + k % steps) / low
        a = peak * tl.where(k < steps, g, -g)
        for _ in range(2):
            q = _near(y * _inverse(a)[:, None, :], low, high, TABLE, LEVELS)
            t = w * q
            sx, ss = tl.sum(t * y, 1), tl.sum(t * q, 1)
            a = tl.where(ss > 0, sx / tl.where(ss > 0, ss, 1.0), 0.0)
            gain = a * sx
            better = gain > best
            scale, best = tl.where(better, a, scale), tl.where(better, gain, best)
    return scale


@triton.jit
def _affine(y, w, inside, high, FACTORS, steps, POSITIVE: tl.constexpr):
    """Return the best scale and minimum (PER, R) of sub-blocks as `scale * code - minimum`."""
    sw, sy = tl.sum(w, 1), tl.sum(w * y, 1)
    lowest = tl.min(tl.where(inside, y, 1e30), 1)
    if POSITIVE:
        lowest = tl.minimum(lowest, 0.0)
    span = tl.maximum(tl.max(tl.where(inside, y, -1e30), 1) - lowest, 0.0)
    scale, minimum, best = span * 0.0, -lowest, span * 0.0 - 1e30
    for k in range(steps * 3):
        f = tl.load(FACTORS + k // 3)
        a = span / high * f
        c = -(lowest + span * (1.0 - f) * 0.5 * (k % 3))
        if POSITIVE:
            c = tl.maximum(c, 0.0)
        for _ in range(2):
            q = _rint(tl.minimum(tl.maximum((y + c[:, None, :]) * _inverse(a)[:, None, :], 0.0), high))
            t = w * q
            sq, sqq, sqy = tl.sum(t, 1), tl.sum(t * q, 1), tl.sum(t * y, 1)
            det = sw * sqq - sq * sq
            sound = det > 1e-5 * sw * sqq
            safe = tl.where(sound, det, 1.0)
            x = tl.where(sound, (sw * sqy - sq * sy) / safe, 0.0)
            z = tl.where(sound, (sq * sqy - sqq * sy) / safe, 0.0)
            if POSITIVE:
                x = tl.where(z < 0, tl.where(sqq > 0, sqy / tl.where(sqq > 0, sqq, 1.0), 0.0), x)
                z = tl.maximum(z, 0.0)
            gain = x * (2.0 * (sqy + z * sq) - x * sqq) - z * (2.0 * sy + z * sw)
            better = sound & (gain > best)
            best = tl.where(better, gain, best)
            scale, minimum = tl.where(better, x, scale), tl.where(better, z, minimum)
            a, c = x, z
    return scale, minimum


@triton.jit
def _loss(y, w, low, high, TABLE, a, c, LEVELS: tl.constexpr):
    """Return what sub-blocks lose (PER, R) under scale `a` and minimum `c`."""
    u = y + c[:, None, :]
    e = u - a[:, None, :] * _near(u * _inverse(a)[:, None, :], low, high, TABLE, LEVELS)
    return tl.sum(w * e * e, 1)


@triton.jit
def _small(a, inv, low, high):
    """Return the integers of a range nearest to `a * inv`."""
    return _rint(tl.minimum(tl.maximum(a * inv, low), high))


@triton.jit
def _two_level(
    y, w, low, high, TABLE, TRIES, tries, unit, scale_low, scale_high, minimums, reach, a, c,
    LEVELS: tl.constexpr, MINIMUM: tl.constexpr,
):  # fmt: skip
    """Return float scale and minimum (R,), and integer sub-scales and sub-minimums (PER, R)."""
    most, least = tl.max(a, 0), tl.min(a, 0)
    top, ctop = tl.where(most >= -least, most, least), tl.max(tl.maximum(c, 0.0), 0)
    end = tl.where(scale_low >= 0, scale_high, scale_low)
    d, dm, best = top * 0.0, top * 0.0, top * 0.0 + 1e30
    for k in range(tries * tries if MINIMUM else tries):
        xd = _stored(top / end * tl.load(TRIES + k % tries), unit, False)
        x = xd[None, :] * _small(a, _inverse(xd)[None, :], scale_low, scale_high)
        if MINIMUM:
            zd = _stored(ctop / minimums * tl.load(TRIES + k // tries), unit, False)
            z = zd[None, :] * _small(c, _inverse(zd)[None, :], 0.0, minimums)
        else:
            zd = xd * 0.0
            z = x * 0.0
        total = tl.sum(_loss(y, w, low, high, TABLE, x, z, LEVELS), 0)
        better = total < best
        best, d, dm = tl.where(better, total, best), tl.where(better, xd, d), tl.where(better, zd, dm)
    first = _small(a, _inverse(d)[None, :], scale_low, scale_high)
    other = _small(c, _inverse(dm)[None, :], 0.0, minimums)
    ls, m, lost = first, other, first * 0.0 + 1e30
    wide = 2 * reach + 1
    for k in range(wide * wide if MINIMUM else wide):
        li = tl.minimum(tl.maximum(first + (k % wide - reach), scale_low), scale_high)
        mi = other
        if MINIMUM:
            mi = tl.minimum(tl.maximum(other + (k // wide - reach), 0.0), minimums)
        found = _loss(y, w, low, high, TABLE, d[None, :] * li, dm[None, :] * mi, LEVELS)
        better = found < lost
        lost, ls, m = tl.where(better, found, lost), tl.where(better, li, ls), tl.where(better, mi, m)
    return d, dm, ls, m


@triton.jit
def _zero_point(y, w, high, TABLE, FACTORS, steps, unit, a, c, BF16: tl.constexpr):
    """Return scale and integer zero point (1, R) of a block as `scale * (code - zero)`."""
    half = _rint(high * 0.5)
    s = _symmetric(y, w, -half, high - half, TABLE, FACTORS, steps, 2, False)
    d, m, best = a * 0.0, a * 0.0, a * 0.0 + 1e30
    for k in range(4):
        x = _stored(tl.where(k < 3, a, s), unit, BF16)
        line = tl.minimum(tl.maximum(_rint(c * _inverse(x)) + (k - 1), 0.0), high)
        zero = tl.where(k < 3, line, half)
        lost = _loss(y, w, 0.0, high, TABLE, x, x * zero, False)
        better = lost < best
        best, d, m = tl.where(better, lost, best), tl.where(better, x, d), tl.where(better, zero, m)
    return d, m


_LOOSE = [
    "rows", "cols", "first", "block", "sub", "low", "high", "steps", "signs", "tries", "scale_low", "scale_high",
    "minimums", "reach",
]  # fmt: skip


@triton.jit(do_not_specialize=_LOOSE)
def search(
    Z, WEIGHT, UNIT, TABLE, FACTORS, TRIES, D, DM, LS, M, rows, cols, first, block, sub, low, high, steps, signs,
    tries, scale_low, scale_high, minimums, reach,
    PER: tl.constexpr, SUB: tl.constexpr, R: tl.constexpr, LEVELS: tl.constexpr, TWO: tl.constexpr,
    MINIMUM: tl.constexpr, ZERO: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """Find the numbers of the block at column `first` for values Z (matrices, block, rows); see `search`."""
    b, r = tl.program_id(1).to(tl.int64), tl.program_id(0) * R + tl.arange(0, R)
    p, i = tl.arange(0, PER), tl.arange(0, SUB)
    column = p[:, None] * sub + i[None, :]
    inside = (i[None, :] < sub)[:, :, None] & (p >= 0)[:, None, None]
    y = tl.load(Z + b * block * rows + column[:, :, None] * rows + r[None, None, :], inside, 0.0)
    w = tl.load(WEIGHT + b * cols + first + column[:, :, None], inside, 0.0)
    unit = tl.load(UNIT + b)
    if MINIMUM:
        a, c = _affine(y, w, inside, high, FACTORS, steps, TWO)
    else:
        a = _symmetric(y, w, low, high, TABLE, FACTORS, steps, signs, LEVELS)
        c = a * 0.0
    at = (b * (cols // block) + first // block) * rows + r
    base = (b * (cols // sub) + first // sub + p[:, None]) * rows + r[None, :]
    if TWO:
        d, dm, ls, m = _two_level(
            y, w, low, high, TABLE, TRIES, tries, unit, scale_low, scale_high, minimums, reach, a, c, LEVELS, MINIMUM
        )  # fmt: skip
        tl.store(D + at, d)
        tl.store(DM + at, dm)
    else:
        ls, m = a * 0.0 + 1.0, a * 0.0 + 1.0
        if ZERO:
            a, m = _zero_point(y, w, high, TABLE, FACTORS, steps, unit, a, c, BF16)
            c = a
        else:
            a, c = _stored(a, unit, BF16), _stored(c, unit, BF16)
            if not MINIMUM:
                m = a * 0.0
        tl.store(D + at, tl.sum(a, 0))
        tl.store(DM + at, tl.sum(c, 0))
    tl.store(LS + base, ls)
    tl.store(M + base, m)


@triton.jit
def _at(x, here):
    """Return the row of a tile (TILE, R) that a mask (TILE, 1) names."""
    return tl.sum(tl.where(here, x, 0.0), 0)


@triton.jit(do_not_specialize=["rows", "cols", "first", "start", "block", "sub", "low", "high"])
def descend_tile(
    G, H, INV, TABLE, D, LS, Q, CHANGE, rows, cols, first, start, block, sub, low, high,
    TILE: tl.constexpr, R: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Look at the codes from column `start` on again, last to first, in the block at `first`.

    G (matrices, block, rows) is H times the error; CHANGE (matrices, TILE, rows) becomes what values gained.
    """
    b, r = tl.program_id(1).to(tl.int64), tl.program_id(0) * R + tl.arange(0, R)
    k = tl.arange(0, TILE)
    g = tl.load(G + (b * block + start - first + k[:, None]) * rows + r[None, :])
    for back in range(TILE):
        i = TILE - 1 - back
        column, at = start + i, (b * (cols // block) + (start + i) // block) * rows + r
        own = (b * (cols // sub) + (start + i) // sub) * rows + r
        a, place = tl.load(D + at) * tl.load(LS + own), (b * cols + column) * rows + r
        q, slope = tl.load(Q + place), _at(g, (k == i)[:, None])
        gain = slope * tl.load(INV + b * cols + column)
        level = _near((a * q + gain) * (1.0 / tl.where(a == 0, 1.0, a)), low, high, TABLE, LEVELS)
        level = tl.where(a == 0, q, level)
        change = a * (level - q)
        tl.store(Q + place, level)
        tl.store(CHANGE + (b * TILE + i) * rows + r, change)
        g -= tl.load(H + (b * cols + start + k) * cols + column)[:, None] * change[None, :]


@triton.jit
def _step(old, slope, curve, low, high):
    """Return the change of an integer that lowers the distortion most, 0 if none does."""
    sound = curve > 0
    step = _rint(tl.minimum(tl.maximum(old + slope / tl.where(sound, curve, 1.0), low), high)) - old
    return tl.where(sound & (step * (slope + slope - step * curve) > 0), step, 0.0)


@triton.jit(do_not_specialize=["rows", "cols", "first", "scale_low", "scale_high", "minimums"])
def descend_scales(
    G, U, ONES, SUMS, Q, D, DM, LS, M, rows, cols, first, scale_low, scale_high, minimums,
    PER: tl.constexpr, SUB: tl.constexpr, R: tl.constexpr, MINIMUM: tl.constexpr,
):  # fmt: skip
    """Look at integer sub-scales and sub-minimums of the block at column `first` again, first to last.

    U (matrices, PER, block, rows) is the block's part of H times each sub-block's codes, ONES (matrices, block, PER)
    that times ones, SUMS (matrices, PER) the sum over each sub-block's own part.
    """
    BLOCK: tl.constexpr = PER * SUB
    b, r = tl.program_id(1).to(tl.int64), tl.program_id(0) * R + tl.arange(0, R)
    k = tl.arange(0, BLOCK)
    place = (b * BLOCK + k[:, None]) * rows + r[None, :]
    g = tl.load(G + place)
    q = tl.load(Q + (b * cols + first + k[:, None]) * rows + r[None, :])
    at = (b * (cols // BLOCK) + first // BLOCK) * rows + r
    d, dm = tl.load(D + at), tl.load(DM + at)
    for p in range(PER):
        own = (k // SUB == p)[:, None]
        number = b * (cols // SUB) + first // SUB + p
        u = tl.load(U + ((b * PER + p) * BLOCK + k[:, None]) * rows + r[None, :])
        slope, curve = tl.sum(tl.where(own, q * g, 0.0), 0), tl.sum(tl.where(own, q * u, 0.0), 0)
        ls, m = tl.load(LS + number * rows + r), tl.load(M + number * rows + r)
        tl.debug_barrier()  # all threads that hold a row have read its numbers
        step = _step(ls, d * slope, d * d * curve, scale_low, scale_high)
        tl.store(LS + number * rows + r, ls + step)
        g -= (step * d)[None, :] * u
        if MINIMUM:
            m = tl.load(M + number * rows + r)
            step = _step(
                m, -dm * tl.sum(tl.where(own, g, 0.0), 0), dm * dm * tl.load(SUMS + b * PER + p), 0.0, minimums
            )
            tl.store(M + number * rows + r, m + step)
            g += (step * dm)[None, :] * tl.load(ONES + (b * BLOCK + k) * PER + p)[:, None]
    tl.store(G + place, g)


@triton.jit(do_not_specialize=["rows", "cols", "first", "block"])
def descend_floats(
    G, V, HV, U, HU, W, UNIT, D, DM, E, rows, cols, first, block,
    CHUNK: tl.constexpr, R: tl.constexpr, MINIMUM: tl.constexpr, ZERO: tl.constexpr, POSITIVE: tl.constexpr,
    BF16: tl.constexpr,
):  # fmt: skip
    """Solve for float scale and minimum of the block at column `first`, and write its errors.

    V and U (matrices, block, rows) are values per unit of scale and of minimum, HV and HU the block's part of H times
    these.
    """
    b, r = tl.program_id(1).to(tl.int64), tl.program_id(0) * R + tl.arange(0, R)
    k = tl.arange(0, CHUNK)
    zero = tl.zeros([R], tl.float32)
    vv, vg, uu, uv, ug = zero, zero, zero, zero, zero
    for start in range(0, block, CHUNK):
        inside = (start + k < block)[:, None] & (r >= 0)[None, :]
        place = (b * block + start + k[:, None]) * rows + r[None, :]
        g, v, hv = tl.load(G + place, inside, 0.0), tl.load(V + place, inside, 0.0), tl.load(HV + place, inside, 0.0)
        vv += tl.sum(v * hv, 0)
        vg += tl.sum(v * g, 0)
        if MINIMUM:
            u = tl.load(U + place, inside, 0.0)
            uu += tl.sum(u * tl.load(HU + place, inside, 0.0), 0)
            uv += tl.sum(u * hv, 0)
            ug += tl.sum(u * g, 0)
    at = (b * (cols // block) + first // block) * rows + r
    d, dm, unit = tl.load(D + at), tl.load(DM + at), tl.load(UNIT + b)
    tl.debug_barrier()  # all threads that hold a row have read its numbers
    vv, vg, uu, uv, ug = vv.to(tl.float64), vg.to(tl.float64), uu.to(tl.float64), uv.to(tl.float64), ug.to(tl.float64)
    sound = vv > 0
    x, z = vg / tl.where(sound, vv, 1.0), vv * 0.0
    if MINIMUM:
        det = vv * uu - uv * uv
        both = det > 1e-6 * vv * uu
        safe = tl.where(both, det, 1.0)
        x, z = tl.where(both, (vg * uu - uv * ug) / safe, x), tl.where(both, (uv * vg - vv * ug) / safe, 0.0)
    nd, nm = _stored(d + x.to(tl.float32), unit, BF16), _stored(dm + z.to(tl.float32), unit, BF16)
    if POSITIVE:
        nm = tl.where(nm < 0, dm, nm)
    x, z = nd - d, nm - dm
    better = sound & (2 * (x * vg - z * ug) > x * x * vv - 2 * x * z * uv + z * z * uu)
    d, dm = tl.where(better, nd, d), tl.where(better, nm, dm)
    if ZERO:
        dm = d
    tl.store(D + at, d)
    tl.store(DM + at, dm)
    for start in range(0, block, CHUNK):
        inside = (start + k < block)[:, None] & (r >= 0)[None, :]
        place = (b * block + start + k[:, None]) * rows + r[None, :]
        there = (b * cols + first + start + k[:, None]) * rows + r[None, :]
        value = d[None, :] * tl.load(V + place, inside, 0.0)
        if MINIMUM:
            value -= dm[None, :] * tl.load(U + place, inside, 0.0)
        tl.store(E + there, tl.load(W + there, inside, 0.0) - value, inside)
