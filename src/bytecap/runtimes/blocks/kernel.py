"""One matrix' rows, LANES at a time, from weights to codes: scales, error feedback, descent.

With `H = L L^T` the distortion of a row is `1/2 sum_k L_kk^2 (Y_k - W^_k)^2`, where `Y_k` is the weight and what later
columns fed back. Blocks are coded last to first: scales are searched on `Y` with weights `L_kk^2`, then fixed, then the
block's columns are coded last to first (`beam`). Sums run in the order in which they are written, so the number of
threads changes nothing.

`Y` of a column is known only when all later ones are coded, so the search takes the values that the block would have if
only later blocks were rounded. Without that its scales are too small: 20% more distortion at 4 bits.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bytecap.runtimes.blocks.beam import best_block
from bytecap.runtimes.blocks.descent import codes, floats, sub_scales
from bytecap.runtimes.blocks.lanes import add_eight
from bytecap.runtimes.blocks.powers import plain
from bytecap.runtimes.blocks.search import (
    LANES,
    Grid,
    affine,
    compiled,
    copy,
    float_of,
    small,
    symmetric,
    zero_point,
)

_Array = npt.NDArray[Any]
_ZERO = np.float32(0)
_CHUNK = 64  # columns whose errors stay in the nearest cache


def _feed(out: _Array, matrix: _Array, first: int, start: int, stop: int, error: _Array) -> None:
    """Add rows `first`... of `matrix` times rows `start` to `stop` of `error` (cols, LANES) to `out` (rows, LANES).

    All are contiguous. Rows come in pairs and columns in eights, as all blocks do. Columns are cut into chunks that
    stay in the nearest cache while all rows pass.
    """
    rows, factors, errors = np.uint64(out.ctypes.data), np.uint64(matrix.ctypes.data), np.uint64(error.ctypes.data)
    width, lane_bytes = np.uint64(4 * matrix.shape[1]), np.uint64(4 * LANES)
    for low in range(start, stop, _CHUNK):
        high = min(low + _CHUNK, stop)
        for k in range(0, len(out), 2):
            x, m = rows + np.uint64(k) * lane_bytes, factors + np.uint64(first + k) * width
            for j in range(low, high, 8):
                at = m + np.uint64(4 * j)
                add_eight(x, x + lane_bytes, at, at + width, errors + np.uint64(j) * lane_bytes, LANES)


feed: Any = compiled(_feed)


def _settle(z: _Array, w: _Array, fed: _Array, first: int) -> None:
    """Turn what later blocks fed back into the values that a block would take if nothing in it were rounded."""
    block = len(z)
    for i in range(block - 1, -1, -1):
        m = fed[first + i]
        for j in range(i + 1, block):
            x = m[first + j]
            if x != _ZERO:
                for r in range(LANES):
                    z[i, r] -= x * (z[j, r] - w[first + j, r])


def _units(q: _Array, ls: _Array, m: _Array, zero: bool, v: _Array, u: _Array) -> None:
    """Values of a block (block, LANES) per unit of scale, `v`, and minimum, `u`; `zero`: minimums are in scales."""
    sub = len(q) // len(ls)
    for i in range(len(q)):
        for r in range(LANES):
            taken = m[i // sub, r]
            v[i, r] = ls[i // sub, r] * q[i, r] - (taken if zero else _ZERO)
            u[i, r] = _ZERO if zero else taken


units: Any = compiled(_units)


def _descend_block(
    h: _Array, inv: _Array, sums: _Array, w: _Array, first: int, block: int, sub: int, low: Any, high: Any,
    table: _Array, scales: tuple[int, int], minimums: int, unit: Grid, q: _Array, ls: _Array, m: _Array, d: _Array,
    dm: _Array, error: _Array, g: _Array, own: _Array, room: _Array, lanes: _Array, work: _Array,
) -> None:  # fmt: skip
    """One sweep over a block; `h` is its own part of H, contiguous, `g` H times the error (block, LANES).

    `inv` is one over H's diagonal, `sums` are those of `descent`; `own`, `room`, `lanes` and `work` are room.
    """
    two, per, at, base = scales != (1, 1), block // sub, first // block, first // sub
    zero = minimums > 1 and not two
    slope, value, code, hv = room[0], room[1], room[2], room[3]
    a, c, s, n = own[0], own[1], own[2], own[3]
    ones = np.ones(sub, np.float32)
    for r in range(LANES):
        for b in range(per):
            s[b], n[b] = ls[base + b, r], m[base + b, r]
            a[b], c[b] = d[at, r] * s[b], dm[at, r] * n[b]
        for i in range(block):
            slope[i], code[i] = g[i, r], q[first + i, r]
            value[i] = a[i // sub] * code[i] - c[i // sub]
        codes(slope, h, inv[first:], value, code, a, c, sub, low, high, table)
        if two:
            sub_scales(
                slope, h, sums[base:], value, code, s, n, d[at, r], dm[at, r], sub, scales, minimums, ones, hv
            )  # fmt: skip
        for b in range(per):
            ls[base + b, r], m[base + b, r] = s[b], n[b]
        for i in range(block):
            g[i, r], q[first + i, r] = slope[i], code[i]
    v, hv2, u, hu = lanes[0], lanes[1], lanes[2], lanes[3]
    lanes[:] = _ZERO
    units(q[first : first + block], ls[base : base + per], m[base : base + per], zero, v, u)
    feed(hv2, h, 0, 0, block, v)
    if minimums > 0 and not zero:
        feed(hu, h, 0, 0, block, u)
    floats(g, v, hv2, u, hu, 0 if zero else minimums, two, unit, d[at], dm[at], work)
    if zero:
        copy(d[at : at + 1], dm[at : at + 1])
    for i in range(block):
        for r in range(LANES):
            error[first + i, r] = w[first + i, r] - (d[at, r] * v[i, r] - dm[at, r] * u[i, r])


settle: Any = compiled(_settle)
descend_block: Any = compiled(_descend_block)


def _encode(
    w: _Array, fed: _Array, weight: _Array, h: _Array, tiles: _Array, inv: _Array, sums: _Array, block: int, sub: int,
    low: Any, high: Any, table: _Array, scales: tuple[int, int], minimums: int, unit: Grid, factors: _Array,
    tries: _Array, signs: int, width: int, trials: _Array, sweeps: int, q: _Array, ls: _Array, m: _Array, d: _Array,
    dm: _Array,
) -> None:  # fmt: skip
    """Codes of LANES rows, whose weights `w` (cols, LANES) are divided by `unit`.

    `fed` (cols, cols) has `L_jk / L_kk` at (k, j), `weight` (cols,) `L_kk^2`; `h` is the Hessian, `tiles`
    (blocks, block, block) its diagonal blocks, `inv` one over its diagonal, `sums` (cols / sub,) the sum over every
    sub-block's own part of it. `table`, `factors`, `tries` and `signs` are those of `search`, `width` and `trials` of
    `beam`. After `sweeps` of descent `q`, `ls`, `m`, `d` and `dm` hold the results, (cols, cols / sub or cols / block;
    LANES).
    """
    cols, per, two = len(w), block // sub, scales != (1, 1)
    error = np.zeros((cols, LANES), np.float32)
    y, z = np.empty((block, LANES), np.float32), np.empty((block, LANES), np.float32)
    a, c = np.zeros((per, LANES), np.float32), np.zeros((per, LANES), np.float32)
    s = np.zeros(LANES, np.float32)
    work, room = np.empty((12, LANES), np.float32), np.empty((4, block), np.float32)
    lanes = np.empty((4, block, LANES), np.float32)
    own, spare = np.empty((4, per), np.float32), np.empty((2, cols, LANES), np.float32)
    for first in range(cols - block, -1, -block):
        at, base, rest = first // block, first // sub, weight[first:]
        copy(w[first : first + block], y)
        feed(y, fed, first, first + block, cols, error)
        copy(y, z)
        settle(z, w, fed, first)
        for b in range(per):
            if minimums == 0:
                symmetric(z, b * sub, b * sub + sub, rest, low, high, table, factors, signs, a[b], work)
            else:
                affine(z, b * sub, b * sub + sub, rest, high, factors, two, a[b], c[b], work)
        if two:
            float_of(z, sub, rest, low, high, table, scales, minimums, unit, tries, a, c, d[at], dm[at], work)
            small(
                z, sub, rest, low, high, table, scales, minimums, a, c, d[at], dm[at], ls[base : base + per],
                m[base : base + per], work,
            )  # fmt: skip
        elif minimums > 1:
            symmetric(z, 0, block, rest, -np.rint(high / 2), high - np.rint(high / 2), table, factors, 2, s, work)
            zero_point(z, rest, high, table, unit, a[0], c[0], s, d[at], m[base], work)
            copy(d[at : at + 1], dm[at : at + 1])
            ls[base] = np.float32(1)
        else:
            plain(
                z, rest, low, high, table, minimums, unit, a[0], c[0], d[at], dm[at], ls[base], m[base], work
            )  # fmt: skip
        best_block(
            w, first, y, fed, weight, sub, low, high, table, unit, minimums > 1 and not two, trials, d[at], dm[at],
            ls[base : base + per], m[base : base + per], q, error, width, spare,
        )  # fmt: skip
    for _ in range(sweeps):
        for first in range(cols - block, -1, -block):
            y[:] = _ZERO
            feed(y, h, first, 0, cols, error)
            descend_block(
                tiles[first // block], inv, sums, w, first, block, sub, low, high, table, scales, minimums, unit, q, ls,
                m, d, dm, error, y, own, room, lanes, work,
            )  # fmt: skip


encode: Any = compiled(_encode, inline="always")


def _entry(stamp: int) -> Any:
    """`encode` with its machine code kept on disk.

    numba looks at one file to tell whether what it kept is old, and this code is from three. So their hash is a
    variable of the function that is kept, which numba does look at.
    """

    def encode_lanes(
        w: _Array, fed: _Array, weight: _Array, h: _Array, tiles: _Array, inv: _Array, sums: _Array, block: int,
        sub: int, low: Any, high: Any, table: _Array, scales: tuple[int, int], minimums: int, unit: float,
        factors: _Array, tries: _Array, signs: int, width: int, trials: _Array, sweeps: int, q: _Array, ls: _Array,
        m: _Array, d: _Array, dm: _Array,
    ) -> int:  # fmt: skip
        encode(
            w, fed, weight, h, tiles, inv, sums, block, sub, low, high, table, scales, minimums, unit, factors, tries,
            signs, width, trials, sweeps, q, ls, m, d, dm,
        )  # fmt: skip
        return stamp

    return compiled(encode_lanes, cache=True)


def sources_hash() -> int:
    """Hash of the sources of the machine code."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return int.from_bytes(hashlib.blake2b(b"".join(f.read_bytes() for f in files), digest_size=7).digest(), "little")


encode_lanes: Any = _entry(sources_hash())
