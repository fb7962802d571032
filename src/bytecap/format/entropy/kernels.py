"""Loops that numba compiles; `bytecap.format.entropy.jit` explains their use and arguments."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

_Array = npt.NDArray[Any]


def _lanes(
    states: _Array, words: _Array, classes: _Array, rows: _Array, index: _Array, start: _Array, freq: _Array,
    cum: _Array, low: _Array, last: _Array, symbols: _Array, where: _Array,
) -> tuple[int, int]:  # fmt: skip
    """Decode one stream; returns (words used, escapes), or (-1, a class without a table).

    Symbol i belongs to lane i mod K.
    """
    used, found, lane, width, count = 0, 0, 0, len(states), len(words)
    for i in range(len(classes)):
        cls = classes[i]
        if rows[cls] < 0:
            return -1, int(cls)
        x = np.uint64(states[lane])
        slot = x & np.uint64(0x3FFF)
        which = np.uint64(index[np.uint64(rows[cls]) + slot])
        entry = np.uint64(start[cls]) + which
        x = (x >> np.uint64(14)) * np.uint64(freq[entry]) + slot - np.uint64(cum[entry])
        if x < np.uint64(0x10000):
            x <<= np.uint64(16)
            if used < count:
                x |= np.uint64(words[used])
            used += 1
        states[lane] = np.uint32(x)
        symbols[i] = low[cls] + np.int32(which)
        if which == np.uint64(last[cls]):
            if found < len(where):
                where[found] = i
            found += 1
        lane += 1
        if lane == width:
            lane = 0
    return used, found


def _encode(states: _Array, entries: _Array, freq: _Array, cum: _Array, words: _Array) -> int:
    """Encode a stream's entries from last to first; its words fill the end of `words` from the returned index."""
    width, at = len(states), len(words)
    for i in range(len(entries) - 1, -1, -1):
        lane = i % width
        entry = entries[i]
        f, x = np.uint64(freq[entry]), np.uint64(states[lane])
        if (x >> np.uint64(18)) >= f:
            at -= 1
            words[at] = np.uint16(x & np.uint64(0xFFFF))
            x >>= np.uint64(16)
        states[lane] = np.uint32(((x // f) << np.uint64(14)) + x % f + np.uint64(cum[entry]))
    return at


def _points(symbols: _Array, subset: _Array, fine: _Array, base: _Array, sign: _Array) -> None:
    """Turn the symbols (rows, cols) of dependent columns into points of the grid."""
    for r in range(len(symbols)):
        for c in range(symbols.shape[1]):
            if fine[c]:
                at = subset[r, c]
                symbols[r, c] = (symbols[r, c] * np.int32(4) + base[at]) * sign[at]


def _values(
    symbols: _Array, classes: _Array, half: _Array, scale: _Array, rows: _Array, offset: _Array, value: _Array
) -> None:
    """Reconstruct symbols (rows, cols) as float32, with the operations of `coders.grid.dequantize` in their order."""
    last = np.int32(offset.shape[1] - 1)
    for r in range(len(symbols)):
        for c in range(symbols.shape[1]):
            z = symbols[r, c]
            size = z if z >= 0 else -z
            x = np.float32(size) * half[c] - offset[classes[r, c], min(size, last)]
            x = -x if z < 0 else x
            value[r, c] = x * rows[r] * scale[c]


def _path(subsets: _Array, bit: _Array, bits: _Array) -> None:
    """Turn subsets (rows, cols) into path bits (rows, cols), from `bit` (states, 4) by state and subset."""
    last = len(bit) - 1
    state = np.zeros(subsets.shape[1], np.uint8)
    for r in range(len(subsets)):
        for c in range(subsets.shape[1]):
            b = bit[state[c], subsets[r, c]]
            bits[r, c] = b
            state[c] = (state[c] << 1 | b) & last


def _store(
    symbols: _Array, columns: _Array, more: _Array, fine: _Array, rows: _Array, out: _Array, counts: _Array
) -> None:
    """Turn symbols (cols, rows) of one row group into `out` (rows, cols) and add to `counts` (2, classes, widths).

    Args:
        symbols: what was rounded.
        columns: class of every column.
        more: quarter octaves added to it.
        fine: 1 where the column is dependent, else 0.
        rows: class of every row.
        out: gets the symbols.
        counts: how often |z| occurred by class, outside and inside dependent columns; the last bin holds all above.
    """
    top, last = counts.shape[1] - 1, counts.shape[2] - 1
    cols, height = symbols.shape
    for c0 in range(0, cols, 64):
        for r0 in range(0, height, 64):
            for c in range(c0, min(c0 + 64, cols)):
                for r in range(r0, min(r0 + 64, height)):
                    z = symbols[c, r]
                    out[r, c] = z
                    cls = min(max(rows[r] + columns[c] + more[c], 1 + more[c]), top)
                    counts[fine[c], cls, min(abs(z), last)] += 1


points: Any = numba.njit(nogil=True, cache=True)(_points)
values: Any = numba.njit(nogil=True, cache=True, fastmath=False)(_values)
encode: Any = numba.njit(nogil=True, cache=True)(_encode)
lanes: Any = numba.njit(nogil=True, cache=True)(_lanes)
path: Any = numba.njit(nogil=True, cache=True)(_path)
store: Any = numba.njit(nogil=True, cache=True)(_store)
