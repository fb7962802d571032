"""A matrix' rows into a vector format, LANES at a time: error feedback, then descent; see `lattice_search`.

Blocks go last to first as in `kernel`: scales from what later blocks fed back, then frozen, then vectors last to first.
Signs of eight columns are settled before their first vector is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from bytecap.runtimes.blocks.kernel import feed, settle, sources_hash
from bytecap.runtimes.blocks.lattice_search import (
    NEAR,
    SIGNS,
    blank,
    block_scale,
    choose,
    cost_of,
    odd,
    rescale,
    sign_of,
)
from bytecap.runtimes.blocks.search import LANES, TINY, Grid, compiled, copy

_Array = npt.NDArray[Any]
_ZERO, _ONE = np.float32(0), np.float32(1)


def _scales(
    z: _Array, weight: _Array, top: Any, most: int, signs: int, offsets: _Array, shared: bool, unit: Grid,
    factors: _Array, tries: _Array, coarse: _Array, mids: _Array, ls: _Array, bent: _Array, d: _Array,
) -> None:  # fmt: skip
    """Scales `d` (LANES,), sub-scales and offsets (subs, LANES) of a block of settled values `z` (block, LANES)."""
    block, per = len(z), len(ls)
    sub = block // per
    u = np.empty((per, sub), np.float32)
    w = np.ascontiguousarray(weight[:block]).reshape(per, sub)
    eight, sign, t = np.empty(SIGNS, np.float32), np.empty(SIGNS, np.float32), np.empty(coarse.shape[1], np.float32)
    room, small, offset = np.empty(per, np.float32), np.empty(per, np.float32), np.empty(per, np.float32)
    work = np.empty((2 * SIGNS, NEAR), np.float32)
    for r in range(LANES):
        for first in range(0, block, SIGNS):
            for i in range(SIGNS):
                eight[i] = z[first + i, r]
            sign[:] = _ONE
            if signs > 0:
                sign_of(eight, weight[first:], 0 if signs == 2 else -1, sign)
            for i in range(SIGNS):
                u[(first + i) // sub, (first + i) % sub] = eight[i] * sign[i]
        d[r] = block_scale(
            u, w, top, most, offsets, shared, unit, factors, tries, coarse, mids, room, t, work, small, offset
        )  # fmt: skip
        for b in range(per):
            ls[b, r], bent[b, r] = small[b], offset[b]


scales: Any = compiled(_scales)


def _settled_signs(y: _Array, w: _Array, fed: _Array, weight: _Array, here: int, z: _Array, out: _Array) -> None:
    """Signs `out` (LANES, SIGNS) of eight columns from `here` on, an even number of them minus; `z` is room."""
    eight = np.empty(SIGNS, np.float32)
    copy(y, z)
    settle(z, w, fed, here)
    for r in range(LANES):
        for i in range(SIGNS):
            eight[i] = z[i, r]
        sign_of(eight, weight[here:], 0, out[r])


settled_signs: Any = compiled(_settled_signs)


def _round_vectors(
    w: _Array, first: int, block: int, y: _Array, fed: _Array, weight: _Array, tris: _Array, signs: int,
    offsets: _Array, shared: bool, near: _Array, mids: _Array, ls: _Array, bent: _Array, d: _Array,
    q: _Array, error: _Array,
) -> None:  # fmt: skip
    """Codes of a block, eight columns at a time and last to first, under its scales; `y` is what was fed back."""
    n, sub = near.shape[1], block // len(ls)
    z, z8 = np.empty((n, LANES), np.float32), np.empty((SIGNS, LANES), np.float32)
    three, room = np.empty((3, n), np.float32), np.empty((2 * SIGNS, NEAR), np.float32)
    v, b, t = three[0], three[1], three[2]
    s, out = np.empty((n, n), np.float32), np.empty(n, np.float32)
    one, turned = np.empty(1, np.float32), np.empty((LANES, SIGNS), np.float32)
    for group in range(block - SIGNS, -1, -SIGNS):
        here = first + group
        feed(y[group : group + SIGNS], fed, here, here + SIGNS, first + block, error)
        if signs == 2:
            settled_signs(y[group : group + SIGNS], w, fed, weight, here, z8, turned)
        for at in range(SIGNS - n, -1, -n):
            start = here + at
            for i in range(n):
                for r in range(LANES):
                    z[i, r] = y[group + at + i, r]
                    for j in range(start + n, here + SIGNS):
                        z[i, r] += fed[start + i, j] * error[j, r]
            settle(z, w, fed, start)
            for r in range(LANES):
                a = d[r] * ls[(group + at) // sub, r]
                for i in range(n):
                    v[i] = z[i, r]
                one[0] = bent[(group + at) // sub, r]
                if abs(a) > TINY:
                    choose(
                        v, tris[start // n], weight[start:], a, signs, one if shared else offsets,
                        turned[r, at : at + n], near, mids, room, b, s, t, out,
                    )  # fmt: skip
                else:
                    blank(out, near, one[0] if shared else offsets[0])
                for i in range(n):
                    q[start + i, r] = out[i]
                    error[start + i, r] = w[start + i, r] - a * out[i]


round_vectors: Any = compiled(_round_vectors)


def _parity(q: _Array, at: int, n: int) -> int:
    """Whether an odd number of minus signs is needed at `at` (n columns) to make that of eight columns even."""
    minus, first = 0, at // SIGNS * SIGNS
    for j in range(first, first + SIGNS):
        minus += (q[j] < _ZERO) and (j < at or j >= at + n)
    return minus % 2


parity_of: Any = compiled(_parity)


def _descend_row(
    g: _Array, h: _Array, solve: _Array, tris: _Array, inv: _Array, signs: int, offsets: _Array, shared: bool,
    near: _Array, mids: _Array, s: _Array, bent: _Array, d: Any, most: int, q: _Array,
) -> None:  # fmt: skip
    """One sweep over the codes `q` and sub-scales `s` of one row's block.

    `g` is H times the error, `h` the block's own part of H; `solve` (vectors, n, n) are inverses of vectors' parts and
    `tris` their factors, `inv` is H's diagonal.
    """
    n, sub = near.shape[1], len(q) // len(s)
    five = np.empty((5, n), np.float32)
    c, z, b, t, e = five[0], five[1], five[2], five[3], five[4]
    tile, room = np.empty((n, n), np.float32), np.empty((2 * SIGNS, NEAR), np.float32)
    out, one = np.empty(n, np.float32), np.empty(1, np.float32)
    sign = np.ones(SIGNS, np.float32)
    for at in range(len(q) - n, -1, -n):
        a = d * s[at // sub]
        if not abs(a) > TINY:
            continue
        for i in range(n):
            c[i] = a * q[at + i]
            z[i] = c[i]
            for j in range(n):
                z[i] += solve[at // n, i, j] * g[at + j]
        if signs == 2:
            sign_of(z, inv[at:], parity_of(q, at, n), sign[:n])
        one[0] = bent[at // sub]
        new = choose(
            z, tris[at // n], inv[at:], a, signs, one if shared else offsets, sign[:n], near, mids, room, b, tile, t,
            out,
        )  # fmt: skip
        if new < cost_of(z, c, tris[at // n], e):
            for i in range(n):
                change = a * (out[i] - q[at + i])
                if change != _ZERO:
                    q[at + i] = out[i]
                    for k in range(len(q)):
                        g[k] -= change * h[at + i, k]
    sub_steps(g, h, q, s, d, most)


def _sub_steps(g: _Array, h: _Array, q: _Array, s: _Array, d: Any, most: int) -> None:
    """Odd sub-scales of one row's block, each where it loses least."""
    sub = len(q) // len(s)
    for b in range(len(s)):
        first, slope, curve = b * sub, _ZERO, _ZERO
        for i in range(first, first + sub):
            x = _ZERO
            for k in range(first, first + sub):
                x += h[i, k] * q[k]
            curve += q[i] * x
            slope += q[i] * g[i]
        slope, curve = d * slope, d * d * curve
        if not curve > _ZERO:
            continue
        step = odd(s[b] + slope / curve, most) - s[b]
        if step * (slope + slope - step * curve) > _ZERO:
            s[b] += step
            for i in range(first, first + sub):
                change = step * d * q[i]
                for k in range(len(q)):
                    g[k] -= change * h[i, k]


sub_steps: Any = compiled(_sub_steps)
descend_row: Any = compiled(_descend_row)


def _descend(
    h: _Array, tile: _Array, solve: _Array, tris: _Array, inv: _Array, w: _Array, first: int, signs: int,
    offsets: _Array, shared: bool, near: _Array, mids: _Array, ls: _Array, bent: _Array, d: _Array,
    most: int, unit: Grid, q: _Array, error: _Array,
) -> None:  # fmt: skip
    """One sweep over a block of LANES rows."""
    block, per = len(tile), len(ls)
    lanes = np.zeros((3, block, LANES), np.float32)
    g, v, hv = lanes[0], lanes[1], lanes[2]
    feed(g, h, first, 0, len(h), error)
    slope, code = np.empty(block, np.float32), np.empty(block, np.float32)
    s, o = np.empty(per, np.float32), np.empty(per, np.float32)
    for r in range(LANES):
        for i in range(block):
            slope[i], code[i] = g[i, r], q[first + i, r]
        for b in range(per):
            s[b], o[b] = ls[b, r], bent[b, r]
        descend_row(slope, tile, solve, tris, inv, signs, offsets, shared, near, mids, s, o, d[r], most, code)
        for b in range(per):
            ls[b, r] = s[b]
        for i in range(block):
            g[i, r], q[first + i, r] = slope[i], code[i]
            v[i, r] = s[i // (block // per)] * code[i]
    feed(hv, tile, 0, 0, block, v)
    rescale(g, v, hv, unit, d)
    for i in range(block):
        for r in range(LANES):
            error[first + i, r] = w[first + i, r] - d[r] * v[i, r]


descend: Any = compiled(_descend)


def _encode_vectors(
    w: _Array, fed: _Array, weight: _Array, h: _Array, tiles: _Array, tris: _Array, own: _Array, solve: _Array,
    inv: _Array, top: Any, most: int, signs: int, offsets: _Array, shared: bool, unit: Grid, factors: _Array,
    tries: _Array, coarse: _Array, near: _Array, mids: _Array, sweeps: int, q: _Array, ls: _Array,
    d: _Array,
) -> None:  # fmt: skip
    """Codes of LANES rows, whose weights `w` (cols, LANES) are divided by their unit; as `kernel.encode`.

    `tris` and `own` (vectors, n, n) are the vectors' factors for feedback and for descent; `coarse` lists the nearest
    entries for the search of scales, `near` those for codes. Results: `q` (cols, LANES), `ls`, `d`.
    """
    cols, block = len(w), tiles.shape[1]
    per = len(ls) * block // cols
    n = near.shape[1]
    error = np.zeros((cols, LANES), np.float32)
    bent = np.zeros((len(ls), LANES), np.float32)
    y, z = np.empty((block, LANES), np.float32), np.empty((block, LANES), np.float32)
    for first in range(cols - block, -1, -block):
        at = first // block
        small, o = ls[at * per : at * per + per], bent[at * per : at * per + per]
        copy(w[first : first + block], y)
        feed(y, fed, first, first + block, cols, error)
        copy(y, z)
        settle(z, w, fed, first)
        scales(
            z, weight[first:], top, most, signs, offsets, shared, unit, factors, tries, coarse, mids, small, o,
            d[at],
        )  # fmt: skip
        round_vectors(
            w, first, block, y, fed, weight, tris, signs, offsets, shared, near, mids, small, o, d[at], q, error
        )  # fmt: skip
    for _ in range(sweeps):
        for first in range(cols - block, -1, -block):
            at = first // block
            small, o = ls[at * per : at * per + per], bent[at * per : at * per + per]
            part = slice(first // n, (first + block) // n)
            descend(
                h, tiles[at], solve[part], own[part], inv[first:], w, first, signs, offsets, shared, near, mids,
                small, o, d[at], most, unit, q, error,
            )  # fmt: skip


encode: Any = compiled(_encode_vectors, inline="always")


def _entry(stamp: int) -> Any:
    """`encode` with its machine code kept on disk; see `kernel`."""

    def encode_vectors(
        w: _Array, fed: _Array, weight: _Array, h: _Array, tiles: _Array, tris: _Array, own: _Array, solve: _Array,
        inv: _Array, top: Any, most: int, signs: int, offsets: _Array, shared: bool, unit: Grid, factors: _Array,
        tries: _Array, coarse: _Array, near: _Array, mids: _Array, sweeps: int, q: _Array, ls: _Array,
        d: _Array,
    ) -> int:  # fmt: skip
        encode(
            w, fed, weight, h, tiles, tris, own, solve, inv, top, most, signs, offsets, shared, unit, factors, tries,
            coarse, near, mids, sweeps, q, ls, d,
        )  # fmt: skip
        return stamp

    return compiled(encode_vectors, cache=True)


encode_vectors: Any = _entry(sources_hash())
