"""Read and write codewords and indices as `codebook`, `latent` and `binary` store them (docs/format.md, 6.16).

Indices are packed at `ceil(log2 n)` bits, or their high parts are entropy coded with a table kept in the section and
only the low parts are packed. Writers number codewords by falling use, so that codewords with equal high parts are
about equally frequent and packing the low parts loses little: a table of 64 frequencies serves 4096 codewords. The
table may also be a shared object.

>>> from bytecap.format.coders import run
>>> data = write_indices(np.array([0, 1, 2, 0, 0, 1]), 3)
>>> len(data), run([read_indices(data, 6, 3, Objects())])[0].tolist()
(3, [0, 1, 2, 0, 0, 1])
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bytecap.errors import CorruptError
from bytecap.format.coders import Decoding, FloatArray, Objects, leb, read_frequencies, read_leb
from bytecap.format.entropy.frequencies import PROB_BITS, IntArray, Table, Tables, integer_frequencies
from bytecap.format.entropy.rans import Stream, encode, lanes
from bytecap.format.wire.bits import pack_bits, packed_size, unpack_bits

MAX_CODEWORDS = 1 << 16
MAX_TABLE = 1 << 12  # frequencies a section may store
_SHARED = 128  # modes from here on take a shared table


@dataclass(frozen=True)
class SharedTable:
    """A table that several sections share.

    Attributes:
        number: of the shared object.
        freq: frequencies (m + 1,) of the high parts, the escape's last.
        low: bits of a low part.
    """

    number: int
    freq: npt.NDArray[np.int64]
    low: int


def width_of(n: int) -> int:
    """Return the bits of an index below `n`.

    >>> width_of(1), width_of(2), width_of(3), width_of(256)
    (0, 1, 2, 8)
    """
    return (n - 1).bit_length()


def by_use(indices: IntArray, n: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Renumber codewords by falling use; returns (order, indices), where `order[new]` is the old number."""
    order = np.argsort(-np.bincount(indices.reshape(-1), minlength=n), kind="stable")
    place = np.empty(n, np.int64)
    place[order] = np.arange(n)
    return order, place[indices]


def _coded(flat: IntArray, n: int, low: int) -> tuple[float, npt.NDArray[np.int64]]:
    """Estimate indices with `low` packed bits; returns (bytes, frequencies of the high parts)."""
    counts = np.bincount(flat >> low, minlength=((n - 1) >> low) + 1)
    freq = integer_frequencies(np.append(counts, 0.0))
    bits = float(counts @ (PROB_BITS - np.log2(freq[:-1])))
    table = len(freq) - 1 + int((freq[:-1] >= 128).sum())
    return table + bits / 8 + 4 * lanes(len(flat)) + packed_size(len(flat), low), freq


def write_indices(indices: IntArray, n: int, *, coded: bool = True, shared: SharedTable | None = None) -> bytes:
    """Write indices (count,) below `n` in their shortest form, or packed.

    Args:
        indices: best numbered by falling use, see `by_use`.
        n: number of codewords.
        coded: try entropy coding too.
        shared: a table to try beside one of the section's own.
    """
    flat = indices.reshape(-1).astype(np.int64)
    found = [b"\x00" + pack_bits(flat, width_of(n))]
    lows = [low for low in range(width_of(n)) if (n - 1) >> low < MAX_TABLE] if coded and flat.size else []
    if lows:
        low = min(lows, key=lambda low: _coded(flat, n, low)[0])
        _, freq = _coded(flat, n, low)
        table = b"".join(leb(int(f)) for f in freq[:-1])
        found.append(bytes([1 + low]) + table + _stream(flat, low, freq))
    if coded and flat.size and shared is not None:
        found.append(bytes([_SHARED + shared.low]) + leb(shared.number) + _stream(flat, shared.low, shared.freq))
    return min(found, key=len)


def _stream(flat: IntArray, low: int, freq: npt.NDArray[np.int64]) -> bytes:
    """Write the high parts behind their length, then the packed low parts."""
    high = (flat >> low).astype(np.int32)
    stream = encode(high, np.ones(len(high), np.uint8), Tables({1: Table(0, freq)}))
    return leb(len(stream)) + stream + pack_bits(flat & ((1 << low) - 1), low)


def indices_size(indices: IntArray, n: int, *, coded: bool = True) -> int:
    """Estimate the length of `write_indices` for indices that are numbered by falling use."""
    flat = indices.reshape(-1).astype(np.int64)
    sizes = [_coded(flat, n, low)[0] + 5 for low in range(width_of(n)) if (n - 1) >> low < MAX_TABLE and coded]
    return int(min([1 + packed_size(len(flat), width_of(n)), *sizes]))


@dataclass(frozen=True)
class _Parsed:
    low: int  # bits of a low part
    size: int  # symbols of the table, 0 without
    table: Table | None  # None also where it is shared
    number: int | None  # of the shared table
    head: int  # bytes of header and table
    stream: bytes
    packed: bytes


def parse_indices(data: bytes, count: int, n: int) -> _Parsed:
    """Parse indices that fill all of `data`."""
    if not data:
        raise CorruptError("a section ends in front of its indices")
    if data[0] == 0:
        return _Parsed(width_of(n), 0, None, None, 1, b"", data[1:])
    refers = data[0] >= _SHARED
    low = data[0] - (_SHARED if refers else 1)
    size = ((n - 1) >> low) + 1
    if low >= max(1, width_of(n)) or size > MAX_TABLE:
        raise CorruptError(f"{n} codewords cannot have {low} packed bits and a table for the rest")
    table, number = None, None
    if refers:
        number, at = read_leb(data, 1)
    else:
        table, at = read_frequencies(data, 1, 0, size, f"{size} indices")
    length, at = read_leb(data, at)
    if length > len(data) - at:
        raise CorruptError(f"a section declares {length} bytes of indices, {len(data) - at} are left")
    if len(data) - at - length != packed_size(count, low):
        raise CorruptError(f"{count} indices need {packed_size(count, low)} bytes of low parts")
    return _Parsed(low, size, table, number, at, data[at : at + length], data[at + length :])


def index_kinds(data: bytes, count: int, n: int) -> tuple[tuple[str, int], ...]:
    """Return the ledger kinds of the bytes that `write_indices` made."""
    p = parse_indices(data, count, n)
    return (("table" if p.table is not None else "header", p.head), ("payload", len(p.stream) + len(p.packed)))


def read_indices(data: bytes, count: int, n: int, objects: Objects) -> Decoding:
    """Read int32 indices (count,) below `n`; a generator like a coder's that asks for at most one stream."""
    p = parse_indices(data, count, n)
    table = p.table
    if p.number is not None:
        table = objects.get(p.number, "table")
        if len(table.freq) != p.size + 1:
            raise CorruptError(f"the shared table {p.number} has {len(table.freq) - 1} symbols, not {p.size}")
    values = unpack_bits(p.packed, count, p.low).astype(np.int32)
    if table is not None:
        (high,) = yield [Stream(p.stream, np.ones(count, np.uint8), Tables({1: table}))]
        if high.min(initial=0) < 0 or high.max(initial=0) >= p.size:
            raise CorruptError("an index has a high part out of range")
        values |= high << p.low
    if values.max(initial=0) >= n:
        raise CorruptError(f"a section names codeword {values.max()} of {n}")
    return values


def write_numbers(values: FloatArray, *, byte: bool) -> bytes:
    """Write numbers as f16, or as an f16 scale and one signed byte each.

    Raises:
        ValueError: a number is not finite, or too large for f16.
    """
    with np.errstate(over="ignore"):
        half = np.asarray(values, np.float32).astype("<f2").reshape(-1)
    if not np.isfinite(half).all():
        raise ValueError("numbers beyond the range of f16 cannot be stored")
    if not byte:
        return half.tobytes()
    peak = float(np.abs(values).max(initial=0))
    scale = np.float16(peak / 127)
    if float(scale) * 127 < peak:
        scale = np.nextafter(scale, np.float16(np.inf))
    flat = np.asarray(values, np.float64).reshape(-1)
    codes = np.rint(flat / float(scale)) if scale > 0 else np.zeros(flat.size)
    return np.array([scale], "<f2").tobytes() + np.clip(codes, -127, 127).astype(np.int8).tobytes()


def numbers_size(count: int, *, byte: bool) -> int:
    """Return the bytes that `write_numbers` makes of `count` numbers."""
    return 2 + count if byte else 2 * count


def read_numbers(data: bytes, count: int, *, byte: bool) -> FloatArray:
    """Read float32 numbers (count,) from the first bytes of `data`.

    Raises:
        CorruptError: too few bytes, or a number that is not finite.
    """
    size = numbers_size(count, byte=byte)
    if len(data) < size:
        raise CorruptError(f"{count} numbers need {size} bytes, {len(data)} are left")
    half = np.frombuffer(data, "<f2", 1 if byte else count).astype(np.float32)
    if not np.isfinite(half).all():
        raise CorruptError("a codebook or factor holds a number that is not finite")
    return half * np.frombuffer(data, np.int8, count, 2).astype(np.float32) if byte else half
