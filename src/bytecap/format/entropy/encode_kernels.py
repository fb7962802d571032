"""Loops that numba compiles to encode a matrix of the grid straight from its integers.

`bytecap.format.coders.encoding` explains their use. As in `bytecap.format.entropy.kernels`, a weight passes through
short loops over weights whose lanes stand side by side, which the compiler turns into vector instructions.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

_Array = npt.NDArray[Any]


def _widen(symbols: _Array, points: _Array) -> None:
    """Copy stored integers of any width."""
    for j in range(len(points)):
        points[j] = symbols[j]


def _load(narrow: _Array, middle: _Array, wide: _Array, at: int, points: _Array) -> None:
    """Copy integers from a place on, out of those of the only array that is not empty."""
    if len(narrow):
        widen(narrow[at : at + len(points)], points)
    elif len(middle):
        widen(middle[at : at + len(points)], points)
    else:
        widen(wide[at : at + len(points)], points)


def _symbols(points: _Array, columns: _Array, tables: _Array, symbols: _Array) -> None:
    """Find the symbol of every point, and the table that it is coded with.

    Args:
        points: (n,) of the grid.
        columns: class of every weight, and 256 more where its column is dependent.
        tables: gets numbers of tables: the class, and behind the 64 whole tables those of subsets.
        symbols: gets the symbols.
    """
    for j in range(np.uint64(len(points))):
        point, column = np.int32(points[j]), np.int32(columns[j])
        fine = np.int32(-(column >> np.int32(8)))  # all ones, or 0
        subset = np.int32(point & np.int32(3) & fine)
        mirrored = np.int32(subset & (subset << np.int32(1)) & np.int32(2))  # 2 for subset 3, which shares 1's table
        tables[j] = (column & np.int32(255)) + (((subset + np.int32(1) - mirrored) & fine) << np.int32(6))
        symbols[j] = (point >> (np.int32(2) & fine)) ^ -(mirrored >> np.int32(1))


def _looked_up(which: _Array, table: _Array, found: _Array) -> None:
    """Look up every number in a table; by itself, because compilers cannot tell where the look-ups go."""
    for j in range(np.uint64(len(which))):
        found[j] = table[which[j]]


def _entries(symbols: _Array, tables: _Array, entries: _Array) -> int:
    """Find the entry of every symbol in its table; returns the number of escapes.

    Args:
        symbols: of the points.
        tables: of every symbol, `first entry << 32 | entry of the escape, from there << 16 | lowest symbol`.
        entries: gets the entries.
    """
    count: Any = 0
    for j in range(np.uint64(len(symbols))):
        model = np.uint32(tables[j] & np.uint64(0xFFFFFFFF))
        last = np.uint32(model >> np.uint32(16))
        place = np.uint32(symbols[j] - (np.int32(model << np.uint32(16)) >> np.int32(16)))
        entries[j] = np.uint32(tables[j] >> np.uint64(32)) + min(place, last)
        count += place >= last
    return int(count)


def _escaped(symbols: _Array, tables: _Array, found: _Array, left: int) -> int:
    """Write the symbols that are escaped in front of `left`; returns where they begin. See `_entries`."""
    for j in range(len(symbols) - 1, -1, -1):
        model = np.int64(tables[j] & np.uint64(0xFFFFFFFF))
        low = ((model & 0xFFFF) ^ 0x8000) - 0x8000
        if not 0 <= symbols[j] - low < model >> 16:
            left -= 1
            found[left] = symbols[j]
    return left


def _put(states: _Array, model: _Array, words: _Array) -> None:
    """Put a symbol into every lane's state.

    The quotient is that of a division by the frequency, exactly: a product with its reciprocal, rounded up to 33 bits
    (Granlund & Montgomery 1994).

    Args:
        states: of the lanes, which change.
        model: of the symbols, `shift << 60 | cumulative frequency << 46 | frequency - 1 << 32 | reciprocal`.
        words: gets the lower half of a state, and 65536 more where it was too full and puts that half out.
    """
    for j in range(np.uint64(len(states))):
        own, x = model[j], np.uint32(states[j])
        less = np.uint32(np.uint32(own >> np.uint64(32)) & np.uint32(0x3FFF))
        full = np.uint32(x >> np.uint32(18)) > less
        words[j] = np.uint32(x & np.uint32(0xFFFF)) | np.uint32(full) << np.uint32(16)
        y = np.uint32(x >> np.uint32(16)) if full else x
        product = (np.uint64(y) * (own & np.uint64(0xFFFFFFFF))) >> np.uint64(32)
        quotient = np.uint32((product + np.uint64(y)) >> (own >> np.uint64(60)))
        cum = np.uint32(np.uint32(own >> np.uint64(46)) & np.uint32(0x3FFF))
        states[j] = y + cum + quotient * np.uint32(np.uint32(0x3FFF) - less)


def _take(own: _Array, words: _Array, at: int) -> int:
    """Write the words that lanes put out in front of `at`, in the order of lanes; returns where they begin."""
    to = np.uint64(at)
    for j in range(len(own) - 1, -1, -1):
        words[to - np.uint64(1)] = np.uint16(own[j] & np.uint32(0xFFFF))
        to -= np.uint64(own[j] >> np.uint32(16))
    found: Any = np.int64(to)  # an unsigned one would make a float of it, beside others
    return int(found)


def _code(
    states: _Array, lane: int, words: _Array, escapes: _Array, narrow: _Array, middle: _Array, wide: _Array,
    tables: _Array, model: _Array, columns: _Array, kinds: _Array,
) -> tuple[int, int, int]:  # fmt: skip
    """Encode rows of a matrix from the last weight to the first.

    Args:
        states: (lanes,), which change.
        lane: the one behind that of the last weight, 1 to the number of lanes.
        words: filled from its end; one element more than there are weights.
        escapes: filled from its end with the symbols of escapes; as long as there are weights.
        narrow: integers (n,) of 8 bits; two of these three arrays are empty.
        middle: of 16 bits.
        wide: of 32 bits.
        tables: by number, see `_entries`.
        model: by entry, see `_put`.
        columns: see `_symbols`, by kind of row (kinds, cols).
        kinds: of the rows.

    Returns:
        Where words and escapes begin, and the lane behind that of the weight in front.
    """
    cols, width = columns.shape[1], len(states)
    at, left = len(words), len(escapes)
    points, symbol, whole = np.empty(cols, np.int32), np.empty(128, np.int32), np.empty(128, np.uint32)
    table, entry, found = np.empty(128, np.uint64), np.empty(128, np.uint32), np.empty(128, np.uint64)
    for r in range(len(kinds) - 1, -1, -1):
        load(narrow, middle, wide, r * cols, points)
        row = columns[kinds[r]]
        c = cols
        while c > 0:
            n = min(c, lane, 128)
            c -= n
            mine = symbol[:n]
            symbols_of(points[c : c + n], row[c : c + n], whole[:n], mine)
            looked_up(whole[:n], tables, table[:n])
            if entries(mine, table[:n], entry[:n]):
                left = escaped(mine, table[:n], escapes, left)
            looked_up(entry[:n], model, found[:n])
            put(states[lane - n : lane], found[:n], whole[:n])
            at = take(whole[:n], words, at)
            lane = width if lane == n else lane - n
    return at, left, lane


def _bits(points: _Array, history: _Array, high: int, bits: _Array) -> None:
    """Find a row's path bits, and shift them into the history (cols,) of their columns."""
    for c in range(len(points)):
        past = history[c] << np.uint16(1)
        x = past & np.uint16(high)
        x ^= x >> np.uint16(8)
        x ^= x >> np.uint16(4)
        x ^= x >> np.uint16(2)
        x ^= x >> np.uint16(1)
        x = (x ^ np.uint16(points[c] >> np.int32(1))) & np.uint16(1)
        history[c] = past | x
        bits[c] = x


def _pack(bits: _Array, count: int, packed: _Array) -> None:
    """Pack the first 8 `count` bits, the first one of each byte lowest."""
    eight = bits.view(np.uint64)
    for i in range(count):
        packed[i] = np.uint8((eight[i] * np.uint64(0x0102040810204080)) >> np.uint64(56))


def _trace(
    narrow: _Array, middle: _Array, wide: _Array, fine: _Array, high: int, bits: _Array, held: int, packed: _Array
) -> int:  # fmt: skip
    """Pack the path bits of rows of one group, row after row.

    Args:
        narrow: integers (n,) of 8 bits; two of these three arrays are empty.
        middle: of 16 bits.
        wide: of 32 bits.
        fine: all ones where a column is dependent, else 0; one is at least.
        high: mask of the trellis for the upper bit of a subset.
        bits: at least one row's and eight more, of which the first `held` wait to be packed; a multiple of eight.
        held: below eight.
        packed: gets the bytes that are full.

    Returns:
        How many bits then wait.
    """
    cols, at, width = len(fine), 0, 0
    for c in range(cols):
        width += fine[c] != 0
    points, history, row = np.empty(cols, np.int32), np.zeros(cols, np.uint16), np.empty(cols, np.uint8)
    for r in range((len(narrow) + len(middle) + len(wide)) // cols):
        load(narrow, middle, wide, r * cols, points)
        if width == cols:
            path_bits(points, history, high, bits[held : held + cols])
        else:
            path_bits(points, history, high, row)
            to = np.uint64(held)
            for c in range(cols):
                bits[to] = row[c]
                to += np.uint64(fine[c] != 0)
        held += width
        full = held >> 3
        pack(bits, full, packed[at : at + full])
        at += full
        for i in range(held & 7):
            bits[i] = bits[8 * full + i]
        held &= 7
    return held


widen: Any = numba.njit(nogil=True, cache=True)(_widen)
load: Any = numba.njit(nogil=True, cache=True)(_load)
symbols_of: Any = numba.njit(nogil=True, cache=True)(_symbols)
looked_up: Any = numba.njit(nogil=True, cache=True)(_looked_up)
entries: Any = numba.njit(nogil=True, cache=True)(_entries)
escaped: Any = numba.njit(nogil=True, cache=True)(_escaped)
put: Any = numba.njit(nogil=True, cache=True)(_put)
take: Any = numba.njit(nogil=True, cache=True)(_take)
code: Any = numba.njit(nogil=True, cache=True)(_code)
path_bits: Any = numba.njit(nogil=True, cache=True)(_bits)
pack: Any = numba.njit(nogil=True, cache=True)(_pack)
trace: Any = numba.njit(nogil=True, cache=True)(_trace)
