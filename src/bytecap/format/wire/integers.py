"""Read and write the blocks of `fixed` and `companded` sections: integers of nominal widths, 16-bit floats.

Both exist in two forms. *As published* is what papers count: every integer takes its nominal width in bits, every
float two bytes. *Coded* holds the same values behind the entropy coder, tables included, so that the difference
between two files is what coding alone brings.

Published integers are stored as bit planes (format.md, 6.13): plane `p` holds bit `p` of all values wider than `p`.
That is the nominal width up to a byte a plane, and numpy reads it without a loop over values.

Omitted: contexts. One table serves all values of one width.

>>> from bytecap.format.coders import run
>>> widths = np.array([2, 0, 3], np.uint8)
>>> block, end = Integers.parse(write_integers(np.array([3, 0, 5]), widths, coded=False), 0, widths, coded=False)
>>> run([block.decode()])[0].tolist(), end
([3, 0, 5], 3)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bytecap.errors import CorruptError
from bytecap.format.coders import Decoding, Shared, leb, read_frequencies, read_leb
from bytecap.format.coders.exact import CODER as EXACT
from bytecap.format.entropy.frequencies import PROB_BITS, Table, Tables, integer_frequencies
from bytecap.format.entropy.rans import Stream, check_room, encode, lanes
from bytecap.format.wire.bits import read_bits

MAX_WIDTH = 8
Widths = npt.NDArray[np.uint8]


def _planes(widths: Widths) -> list[int]:
    """Return the bytes of every bit plane."""
    return [-(-int(np.count_nonzero(widths > p)) // 8) for p in range(int(widths.max(initial=0)))]


def _flat(width: int) -> Table:
    """Return a table of `2^width` equal values, whose last one gives the escape its 1."""
    freq = np.append(np.full(1 << width, 1 << (PROB_BITS - width)), 1)
    freq[-2] -= 1
    return Table(0, freq)


def _fitted(values: npt.NDArray[np.integer[Any]], width: int) -> tuple[bytes, Table]:
    """Return the stored and the live table of the values of one width, fitted or, where that is shorter, flat."""
    counts = np.bincount(values, minlength=1 << width).astype(np.float64)
    low, high = int(values.min()), int(values.max())
    inside = counts[low : high + 1]
    freq = integer_frequencies(np.append(inside, 0.0))
    stored = leb(low) + leb(high - low + 1) + b"".join(leb(int(f)) for f in freq[:-1])
    bits = float(inside @ (PROB_BITS - np.log2(freq[:-1])))
    return (stored, Table(low, freq)) if bits + 8 * len(stored) < width * len(values) + 16 else (bytes(2), _flat(width))


def _stream(symbols: npt.NDArray[np.integer[Any]], classes: Widths, tables: Tables, *, estimate: bool) -> bytes:
    """Encode a stream, or return zeros of about its length, which is many times faster."""
    if not estimate:
        return encode(symbols, classes, tables)
    return bytes(math.ceil(tables.bits(symbols, classes) / 8) + 2 * lanes(len(symbols)) + 3) if len(symbols) else b""


def write_integers(
    values: npt.NDArray[np.integer[Any]], widths: Widths, *, coded: bool, estimate: bool = False
) -> bytes:
    """Write a block of integers (n,), each below 2^width for its width (n,) from 0 to 8.

    With `estimate` a coded block is zeros of about the right length.
    """
    values = values.reshape(-1).astype(np.int32)
    if not coded:
        planes = [(values[widths > p] >> p) & 1 for p in range(int(widths.max(initial=0)))]
        return b"".join(np.packbits(bits.astype(np.uint8), bitorder="little").tobytes() for bits in planes)
    head, tables = b"", dict[int, Table]()
    for width in (np.flatnonzero(np.bincount(widths, minlength=1)[1:]) + 1).tolist():
        stored, tables[width] = _fitted(values[widths == width], width)
        head += stored
    stream = _stream(values[widths > 0], widths[widths > 0], Tables(tables), estimate=estimate)
    return head + leb(len(stream)) + stream


def _read_table(data: bytes, at: int, width: int) -> tuple[Table, int]:
    low, at = read_leb(data, at)
    size, at = read_leb(data, at)
    if size == 0 and low == 0:
        return _flat(width), at
    if size < 1 or low + size > 1 << width:
        raise CorruptError(f"a block of integers declares {size} values from {low} of {width} bits")
    return read_frequencies(data, at, low, size, "a block of integers")


@dataclass(frozen=True)
class Integers:
    """A block of integers, parsed but not decoded.

    Attributes:
        widths: bits of every value, (n,).
        data: bit planes, or the stream.
        tables: of the stream, None as published.
    """

    widths: Widths
    data: bytes
    tables: Tables | None

    @staticmethod
    def parse(data: bytes, at: int, widths: Widths, *, coded: bool) -> tuple[Integers, int]:
        """Parse the block that begins at `at`; returns it and its end."""
        tables = dict[int, Table]()
        if coded:
            for width in np.flatnonzero(np.bincount(widths, minlength=1)[1:]) + 1:
                tables[int(width)], at = _read_table(data, at, int(width))
            length, at = read_leb(data, at)
        else:
            length = sum(_planes(widths))
        if coded:
            check_room(length, int(np.count_nonzero(widths)))
        if length > len(data) - at:
            raise CorruptError(f"a block of integers takes {length} bytes, {len(data) - at} are left")
        return Integers(widths, data[at : at + length], Tables(tables) if coded else None), at + length

    def decode(self) -> Decoding:
        """Yield the stream if there is one, return the values as int32 (n,)."""
        values = np.zeros(len(self.widths), np.int32)
        if self.tables is not None:
            used = self.widths > 0
            (symbols,) = yield [Stream(self.data, self.widths[used], self.tables)]
            values[used] = symbols
            if ((values < 0) | (values >> self.widths.astype(np.int32) > 0)).any():
                raise CorruptError("a block of integers holds a value beyond its width")
            return values
        yield from ()
        at = 0
        for p, size in enumerate(_planes(self.widths)):
            used = self.widths > p
            bits = read_bits(self.data[at : at + size], int(np.count_nonzero(used)))
            values[used] |= bits.astype(np.int32) << p
            at += size
        return values


def _exact_size(values: npt.NDArray[np.float16]) -> int:
    """Estimate the length of an `exact` section of 16-bit floats."""
    size = 0
    for plane in values.astype("<f2").reshape(-1, 1).view(np.uint8).T:
        counts = np.bincount(plane)[int(plane.min(initial=0)) :].astype(np.float64)
        freq = integer_frequencies(np.append(counts, 0.0))[:-1]
        bits = float(counts @ (PROB_BITS - np.log2(freq)))
        coded = int(bits / 8) + len(freq) + int((freq > 127).sum()) + 2 * lanes(plane.size) + 7
        size += 1 + min(plane.size, coded)
    return size


def write_halves(values: npt.NDArray[np.float16], *, coded: bool, estimate: bool = False) -> bytes:
    """Write a block of finite float16 values in the order of the array.

    With `estimate` a coded block is zeros of about the right length.
    """
    if not np.isfinite(values).all():
        raise ValueError("a block of 16-bit floats needs finite values")
    if not coded:
        return values.astype("<f2").tobytes()
    if estimate and values.size:
        return bytes(2 + _exact_size(values))
    section = EXACT.encode(values.reshape(1, -1), "F16")
    return leb(len(section)) + section


@dataclass(frozen=True)
class Halves:
    """A block of float16 values, parsed but not decoded."""

    count: int
    data: bytes
    coded: bool

    @staticmethod
    def parse(data: bytes, at: int, count: int, *, coded: bool) -> tuple[Halves, int]:
        """Parse the block that begins at `at`; returns it and its end."""
        length = 2 * count
        if coded:
            length, at = read_leb(data, at)
        if length > len(data) - at:
            raise CorruptError(f"a block of 16-bit floats takes {length} bytes, {len(data) - at} are left")
        return Halves(count, data[at : at + length], coded), at + length

    def decode(self) -> Decoding:
        """Yield streams if there are any, return the values as float32 (count,)."""
        if self.coded:
            matrix = yield from EXACT.decode(self.data, (1, self.count), "F16", Shared())
            values = matrix.reshape(-1)
        else:
            yield from ()
            values = np.frombuffer(self.data, "<f2").astype(np.float32)
        if not np.isfinite(values).all():
            raise CorruptError("a block of 16-bit floats holds a value that is not finite")
        return values
