"""Loops that numba compiles; `bytecap.format.entropy.jit` explains their use and arguments."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from bytecap.format.entropy.simd import renormalise

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


def _spread(packed: _Array, fine: _Array, bits: _Array) -> None:
    """Put bits (n,) of dependent columns into their places in bits (rows, cols); the others become 0."""
    at = np.uint64(0)
    for r in range(len(bits)):
        for c in range(bits.shape[1]):
            bits[r, c] = packed[at] & fine[c]
            at += np.uint64(fine[c])


def _subsets(bits: _Array, row: int, low: int, high: int, found: _Array) -> None:
    """Find the subset of every weight of a row: the parities, under two masks, of path bits from this row up.

    Args:
        bits: (rows, cols) of the path, 0 or 1.
        row: in `bits`, with as many above it as the masks reach.
        low: mask of the subset's lower bit; bit 0 is the row's own.
        high: mask of the other one.
        found: (cols,) gets the subsets.
    """
    for c in range(len(found)):
        found[c] = 0
    for back in range(9):
        place = (low >> back & 1) + 2 * (high >> back & 1)
        above = bits[row - back]
        if place == 1:
            for c in range(len(found)):
                found[c] ^= above[c]
        elif place == 2:
            for c in range(len(found)):
                found[c] ^= above[c] << 1
        elif place == 3:
            for c in range(len(found)):
                found[c] ^= above[c] | above[c] << 1


def _slots(states: _Array, groups: _Array, subsets: _Array, stride: int, slot: _Array, start: _Array) -> None:
    """Find the slot of every lane, and where the entries of its class and subset start, `stride` after each other.

    Subset 3 shares the slots of subset 1, which is its mirror image.
    """
    for j in range(len(slot)):
        group, subset = np.uint32(groups[j]), np.uint32(subsets[j])
        table = np.uint32(3) * group + subset - (subset & (subset << np.uint32(1)) & np.uint32(2))
        slot[j] = (table << np.uint32(14)) + (states[j] & np.uint32(0x3FFF))
        start[j] = (np.uint32(4) * group + subset) * np.uint32(stride)


def _entries(slot: _Array, start: _Array, symbols: _Array, entries: _Array, found: _Array) -> None:
    """Look up the entry of every lane's slot."""
    for j in range(np.uint64(len(slot))):
        found[j] = entries[np.uint32(symbols[slot[j]]) + start[j]]


def _tally(slot: _Array, start: _Array, symbols: _Array, counts: _Array) -> None:
    """Count the entries of slots."""
    for j in range(np.uint64(len(slot))):
        counts[np.uint32(symbols[slot[j]]) + start[j]] += 1


def _advance(states: _Array, entries: _Array, values: _Array) -> None:
    """Take a symbol out of every lane's state; its value, as bits, goes to `values`."""
    for j in range(len(values)):
        x, model = states[j], np.uint32(entries[j] >> np.uint64(32))
        rest = (x & np.uint32(0x3FFF)) - (model & np.uint32(0xFFFF))
        states[j] = (x >> np.uint32(14)) * (model >> np.uint32(16)) + rest
        values[j] = np.uint32(entries[j] & np.uint64(0xFFFFFFFF))


def _escapes(values: _Array) -> int:
    """Count the values that are not numbers, which stand for escapes."""
    count = 0
    for c in range(len(values)):
        count += values[c] != values[c]
    return count


def _scale(values: _Array, row: float, columns: _Array) -> None:
    """Multiply a row's values by the row's scale, then by the columns'."""
    for c in range(len(values)):
        values[c] = values[c] * np.float32(row) * columns[c]


def _weights(
    stream: tuple[_Array, _Array], at: tuple[int, int, int, int], model: tuple[_Array, _Array, int],
    columns: tuple[_Array, _Array], rows: tuple[_Array, _Array], path: tuple[_Array, int, int, int],
    where: tuple[_Array, _Array], values: _Array, raw: _Array, counts: _Array,
) -> tuple[int, int, int]:  # fmt: skip
    """Decode some rows of a matrix from its stream straight to values.

    Rows are walked in pieces of at most 128 weights, whose lanes stand side by side, and every piece in short loops:
    the compiler turns all but one or two of them into vector instructions.

    Args:
        stream: states (lanes,), which change, and words, with 128 more behind them.
        at: words used so far, the lane of the first weight, escapes so far, weights so far.
        model: symbol by slot, and entry by symbol: `frequency << 48 | cumulative frequency << 32 | bits of the value in
            steps`; entries of a subset. A group has the slots of three tables and the entries of four subsets.
        columns: group of every column (kinds of rows, cols), and scale.
        rows: kind and scale of every row.
        path: bits (above + rows, cols), the rows above, and masks as in `subsets`.
        where: gets place and subset of every escape, as far as there is room.
        values: (rows, cols) gets the weights; those of escapes are to be put in.
        raw: the same memory as integers.
        counts: how often entries occur is added to it, unless it is empty.

    Returns:
        Words used, the next lane and escapes; -1 words if the stream has fewer.
    """
    states, words = stream
    used, lane, count, begun = at
    cols, width = values.shape[1], len(states)
    subset = np.empty(cols, np.uint8)
    slot, start, entry = np.empty(128, np.uint32), np.empty(128, np.uint32), np.empty(128, np.uint64)
    for r in range(len(values)):
        subsets(path[0], r + path[1], path[2], path[3], subset)
        group = columns[0][rows[0][r]]
        c = 0
        while c < cols:
            n = min(cols - c, width - lane, 128)
            if used + n > len(words):
                return -1, lane, count
            part, found = states[lane : lane + n], entry[:n]
            slots(part, group[c : c + n], subset[c : c + n], model[2], slot[:n], start[:n])
            entries(slot[:n], start[:n], model[0], model[1], found)
            if len(counts):
                tally(slot[:n], start[:n], model[0], counts)
            advance(part, found, raw[r, c : c + n])
            used = renormalise(part, words, used)
            c += n
            lane = 0 if lane + n == width else lane + n
        if escapes(values[r]):
            for c in range(cols):
                if values[r, c] != values[r, c]:
                    if count < len(where[0]):
                        where[0][count], where[1][count] = begun + r * cols + c, subset[c]
                    count += 1
        scale(values[r], rows[1][r], columns[1])
    return used, lane, count


points: Any = numba.njit(nogil=True, cache=True)(_points)
values: Any = numba.njit(nogil=True, cache=True, fastmath=False)(_values)
encode: Any = numba.njit(nogil=True, cache=True)(_encode)
lanes: Any = numba.njit(nogil=True, cache=True)(_lanes)
path: Any = numba.njit(nogil=True, cache=True)(_path)
store: Any = numba.njit(nogil=True, cache=True)(_store)
spread: Any = numba.njit(nogil=True, cache=True)(_spread)
subsets: Any = numba.njit(nogil=True, cache=True)(_subsets)
slots: Any = numba.njit(nogil=True, cache=True)(_slots)
entries: Any = numba.njit(nogil=True, cache=True)(_entries)
tally: Any = numba.njit(nogil=True, cache=True)(_tally)
advance: Any = numba.njit(nogil=True, cache=True)(_advance)
escapes: Any = numba.njit(nogil=True, cache=True)(_escapes)
scale: Any = numba.njit(nogil=True, cache=True)(_scale)
weights: Any = numba.njit(nogil=True, cache=True)(_weights)
