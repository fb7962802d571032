"""Section 6.15: the grid walked along a trellis."""

from __future__ import annotations

from functools import cache

import numpy as np

from bytecap.reference.coders import Coder, read_sides, scaled
from bytecap.reference.container import Reader, Unit, require
from bytecap.reference.streams import TOTAL, Array, Shared, Stream, Table

_MASKS = {3: (2, 13), 4: (2, 25), 5: (10, 49), 6: (34, 87), 7: (94, 243), 8: (222, 493)}


def trellis(unit: Unit, reader: Reader, shared: Shared) -> Coder:
    """6.15: `trellis`; dependent columns have a path bit per weight and symbols within a subset of half steps."""
    return _trellis(unit, reader, shared, "B")


def long_trellis(unit: Unit, reader: Reader, shared: Shared) -> Coder:
    """6.21: `long_trellis`; as `trellis`, with the bits of a state behind the first dependent class."""
    return _trellis(unit, reader, shared, "BB")


def _trellis(unit: Unit, reader: Reader, shared: Shared, own: str) -> Coder:
    side = yield from read_sides(unit, reader, shared, own)
    first, *more = side.own
    memory = more[0] if more else 3
    require(1 <= first <= 64, f"{first} is no class")
    require(3 + len(more) <= memory <= 8, f"states have {memory} bits")
    dependent = (side.column >= first)[side.run]
    path = np.frombuffer(reader.take(reader.leb()), np.uint8)
    count = int(dependent.sum())
    bits = np.unpackbits(path, bitorder="little")
    require(len(path) == (count + 7) // 8 and not bits[count:].any(), "a path of the wrong length, or bits behind it")
    bit = np.zeros(unit.matrix(), np.uint8)
    bit[dependent] = bits[:count]
    subset = np.zeros_like(bit)
    subsets = np.array([sum((w & m).bit_count() % 2 << i for i, m in enumerate(_MASKS[memory])) for w in range(512)])
    window = np.zeros(bit.shape[1], np.int32)
    for i, row in enumerate(bit):
        if i and side.run[i] != side.run[i - 1]:
            window[:] = 0
        window = 2 * window % (2 << memory) + row
        subset[i] = subsets[window]
    weight_class = np.clip(side.column[side.run].astype(np.int32) + side.row[:, None], 1, 63)
    weight_class[dependent] = np.minimum(weight_class[dependent] + 4, 63)
    part = np.where(dependent, np.array([64, 128, 192, 128], np.int32)[subset], 0)
    tables = [*shared[0], *(restricted(t, d) for d in range(3) for t in shared[0])]
    (symbols,) = yield [Stream(reader.rest(), (weight_class + part).reshape(-1).astype(np.uint8), tables)]
    z = symbols.reshape(bit.shape)
    require(np.abs(z).max(initial=0) <= 2**24, "a symbol is out of range")
    point = np.where(subset == 3, -4 * z - 1, 4 * z + subset.astype(np.int32))
    z = np.where(dependent, point, z)
    size = np.abs(z)
    v = np.where(dependent, size.astype(np.float32) * np.float32(0.5), size.astype(np.float32))
    v -= shared[1].reshape(-1).take(weight_class * 17 + np.minimum(size, 16))
    np.negative(v, out=v, where=z < 0)
    return scaled(v, side)


@cache
def restricted(table: Table | None, d: int) -> Table | None:
    """6.15: the table of the values `4 m + d` of a symmetric table."""
    if table is None:
        return None
    half = -table.low
    kept = [m for m in range(-half, half + 1) if -half <= 4 * m + d <= half]
    freq: Array = np.array([table.freq[4 * m + d + half] for m in kept] + [table.freq[-1]])
    freq = freq * TOTAL // freq.sum()
    freq[np.argmax(freq)] += TOTAL - freq.sum()
    return Table(kept[0] if kept else 0, freq[:-1].tolist())
