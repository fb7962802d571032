"""Read and write the parts that overlays share: positions, protected values, packed bytes (format.md, 6.6).

Positions are stored in whichever of four ways is smallest; a byte says which. At `n` places of which `k` are listed
the costs are about `n / 8` bytes (bitmap), `k` (gaps, while they are below 128), `k (1.5 + log2(n / k)) / 8` (Rice
codes of the gaps, with low and high bits apart, so that numpy reads them at once) and `k log2(n) / 8` (numbers). A
fifth way names a list that the file's layers share (`format/wire/shared_objects.py`).

Values are f16, or i8 with an f16 scale for every vector; either may be under brotli. Two planes keep the bytes with
the exponents of f16 values together, which is what brotli can use.

>>> positions = np.array([3, 4, 900])
>>> block = write_positions(positions, 1000)
>>> block.hex(), read_positions(block, 0, 1000, Objects())[0].tolist()
('03010300ff06', [3, 4, 900])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import brotli
import numpy as np
import numpy.typing as npt

from bytecap.errors import CorruptError
from bytecap.format.coders import Continuous, FloatArray, Objects, leb, read_leb
from bytecap.format.coders.packed import expand_brotli
from bytecap.format.wire.bits import pack_bits, packed_size, read_bits, unpack_bits

BITMAP, GAPS, RICE, NUMBERS, LISTED = range(5)
HALF, BYTE = 0, 1  # precision of protected values
_WINDOW = 24  # log2 of brotli's window
IntArray = npt.NDArray[np.int64]
Kinds = tuple[tuple[str, int], ...]


# ------------------------------------------------------------------------------------------------- bits and bytes


def pack(raw: bytes) -> tuple[int, bytes]:
    """Pack bytes; returns (0, the bytes as they are) or (1, brotli) where that is smaller."""
    packed = bytes(brotli.compress(raw, quality=11, lgwin=_WINDOW))
    return (1, packed) if len(packed) < len(raw) else (0, raw)


def unpack(packing: int, data: bytes, size: int) -> bytes:
    """Unpack exactly `size` bytes that `pack` made."""
    if packing == 1:
        return expand_brotli(data, size)
    if packing != 0 or len(data) != size:
        raise CorruptError(f"packing {packing} of {len(data)} bytes does not give {size} bytes")
    return data


def take(data: bytes, at: int, size: int) -> bytes:
    """Take `size` bytes from `at`."""
    if size > len(data) - at:
        raise CorruptError(f"a layer needs {size} bytes, {len(data) - at} are left")
    return data[at : at + size]


# ------------------------------------------------------------------------------------------------------ positions


def write_positions(positions: npt.NDArray[np.integer[Any]], size: int) -> bytes:
    """Write rising positions below `size` in the shortest of four forms."""
    listed = positions.astype(np.int64)
    if len(listed) and not (listed[0] >= 0 and listed[-1] < size and (np.diff(listed) > 0).all()):
        raise ValueError(f"positions must rise and lie below {size}")
    gaps = np.diff(listed, prepend=-1) - 1
    width = max(size - 1, 0).bit_length()
    bitmap = np.zeros(size, np.uint8)
    bitmap[listed] = 1
    ways = [
        bytes([GAPS]) + b"".join(leb(int(g)) for g in gaps),
        bytes([RICE]) + _rice(gaps, width),
        bytes([NUMBERS]) + pack_bits(listed, width),
        bytes([BITMAP]) + np.packbits(bitmap, bitorder="little").tobytes(),
    ]
    return leb(len(listed)) + min(ways, key=len)


def _rice(gaps: IntArray, width: int) -> bytes:
    """Write gaps as a Rice code with the best parameter: all low bits, then the high parts in unary."""
    cost = [len(gaps) * (p + 1) + int((gaps >> p).sum()) for p in range(width + 1)]
    p = int(np.argmin(cost))
    ends = np.cumsum((gaps >> p) + 1)
    unary = np.zeros(int(ends[-1]) if len(ends) else 0, np.uint8)
    unary[ends - 1] = 1
    return bytes([p]) + pack_bits(gaps & ((1 << p) - 1), p) + np.packbits(unary, bitorder="little").tobytes()


def refer_positions(data: bytes, at: int, size: int, number: int) -> tuple[bytes, int]:
    """Replace the block of positions at `at` by a reference to a shared list; returns it and the block's end."""
    index, end = read_positions(data, at, size, Objects())
    return leb(len(index)) + bytes([LISTED]) + leb(number), end


def count_positions(data: bytes, at: int, size: int) -> tuple[int, int]:
    """Return (number of positions, the block's end) without reading shared lists."""
    count, begin = read_leb(data, at)
    if count > size:
        raise CorruptError(f"a layer lists {count} of {size} places")
    if take(data, begin, 1)[0] == LISTED:
        return count, read_leb(data, begin + 1)[1]
    return count, read_positions(data, at, size, Objects())[1]


def read_positions(data: bytes, at: int, size: int, objects: Objects) -> tuple[IntArray, int]:
    """Read rising positions below `size`; returns them and the block's end."""
    count, at = read_leb(data, at)
    mode, at = take(data, at, 1)[0], at + 1
    if count > size or (mode != LISTED and count > 8 * len(data) + 1):  # the other ways take a bit for each
        raise CorruptError(f"a layer lists {count} of {size} places")
    if mode == LISTED:
        number, at = read_leb(data, at)
        below, listed = objects.get(number, "list")
        if below != size or len(listed) != count:
            raise CorruptError(f"a layer lists {count} of {size} places, the shared list {number} has others")
        return listed, at
    width = max(size - 1, 0).bit_length()
    if mode == BITMAP:
        length = packed_size(size, 1)
        listed = np.flatnonzero(read_bits(take(data, at, length), size))
        at += length
    elif mode == NUMBERS:
        length = packed_size(count, width)
        listed = unpack_bits(take(data, at, length), count, width)
        at += length
    elif mode in (GAPS, RICE):
        gaps, at = _read_gaps(data, at, count) if mode == GAPS else _read_rice(data, at, count, size)
        if gaps.max(initial=0) >= max(size, 1):
            raise CorruptError(f"a layer skips {gaps.max(initial=0)} of {size} places")
        listed = np.cumsum(gaps + 1) - 1
    else:
        raise CorruptError(f"a layer lists its places in the unknown way {mode}")
    if len(listed) != count or (count and not (listed[-1] < size and (np.diff(listed) > 0).all())):
        raise CorruptError(f"a layer's places do not rise, reach beyond {size}, or are not {count}")
    return listed, at


def _read_gaps(data: bytes, at: int, count: int) -> tuple[IntArray, int]:
    """Read `count` LEB128 integers."""
    window = np.frombuffer(data, np.uint8)[at : at + 9 * count]
    ends = np.flatnonzero(window < 128)[:count]
    starts = np.concatenate([np.zeros(min(len(ends), 1), np.int64), ends[:-1] + 1])
    lengths = ends - starts + 1
    if len(ends) != count or lengths.max(initial=0) > 9:
        raise CorruptError(f"a layer's {count} gaps are cut off, or too long")
    gaps = np.zeros(count, np.int64)
    for i in range(int(lengths.max(initial=0))):
        longer = lengths > i
        gaps[longer] |= (window[starts[longer] + i].astype(np.int64) & 127) << 7 * i
    return gaps, at + (int(ends[-1]) + 1 if count else 0)


def _read_rice(data: bytes, at: int, count: int, size: int) -> tuple[IntArray, int]:
    """Read `count` Rice-coded integers."""
    p, at = take(data, at, 1)[0], at + 1
    if p > max(size - 1, 0).bit_length():
        raise CorruptError(f"a layer declares {p} low bits for {size} places")
    length = packed_size(count, p)
    low = unpack_bits(take(data, at, length), count, p)
    at += length
    longest = -(-(count + (size >> p)) // 8)  # rising positions below `size` need no more
    bits = np.unpackbits(np.frombuffer(data[at : at + longest], np.uint8), bitorder="little")
    ends = np.flatnonzero(bits)[:count]
    used = -(-(int(ends[-1]) + 1) // 8) if len(ends) else 0
    if len(ends) != count or (count and bits[ends[-1] + 1 : 8 * used].any()):
        raise CorruptError(f"a layer's {count} gaps are cut off, or left-over bits are set")
    return (np.diff(ends, prepend=-1) - 1 << p) | low, at + used


# --------------------------------------------------------------------------------------------------------- values


def write_values(values: npt.NDArray[Any], scales: npt.NDArray[np.float16] | None = None) -> bytes:
    """Write the values at the end of an overlay: float16 of any shape, or int8 codes with a scale per vector."""
    side = b"" if scales is None else scales.astype("<f2").tobytes()
    if scales is None:
        halves = np.ascontiguousarray(values.reshape(-1), "<f2")
        raw = np.ascontiguousarray(halves.view(np.uint8).reshape(-1, 2).T).tobytes()
    else:
        raw = np.ascontiguousarray(values, np.int8).tobytes()
    packing, body = pack(raw)
    return bytes([HALF if scales is None else BYTE, packing]) + side + body


def _rewritten(data: bytes, at: int, lengths: IntArray, values: FloatArray) -> bytes:
    """Replace an overlay's values from `at` to its end, at the precision they have."""
    if data[at] == HALF:
        return data[:at] + write_values(values.astype(np.float16))
    starts = np.cumsum(lengths) - lengths
    top = np.maximum.reduceat(np.abs(values), starts) if len(values) else np.zeros(0, np.float32)
    scales = np.maximum(top / 127, 2.0**-24).astype(np.float16)
    codes = np.clip(np.rint(values / np.repeat(scales.astype(np.float32), lengths)), -127, 127)
    return data[:at] + write_values(codes.astype(np.int8), scales)


def tuned_values(
    data: bytes, at: int, lengths: IntArray, matrix: Callable[[Mapping[str, Any], Any], Any],
    shape: Sequence[int] = (-1,),
) -> Continuous:  # fmt: skip
    """Return an overlay's values from `at` to its end as what may be tuned: `values` of a shape; see `Continuous`."""
    return Continuous(
        {"values": read_values(data, at, lengths).reshape(shape)}, matrix,
        lambda a: _rewritten(data, at, lengths, a["values"].reshape(-1)),
    )  # fmt: skip


def split_values(data: bytes, at: int, vectors: int) -> Kinds:
    """Split the values from `at` into header, scales and payload."""
    precision = take(data, at, 2)[0]
    if precision not in (HALF, BYTE):
        raise CorruptError(f"a layer declares values of the unknown precision {precision}")
    side = 2 * vectors if precision == BYTE else 0
    take(data, at + 2, side)
    return (("header", 2), ("side", side), ("payload", len(data) - at - 2 - side))


def read_values(data: bytes, at: int, lengths: IntArray) -> FloatArray:
    """Read vectors of these lengths, one after the other, as float32 (sum of lengths,)."""
    _, (_, side), (_, payload) = split_values(data, at, len(lengths))
    precision, packing, total = data[at], data[at + 1], int(lengths.sum())
    raw = unpack(packing, data[len(data) - payload :], total * (1 if precision == BYTE else 2))
    stored = np.frombuffer(data, "<f2", side // 2, at + 2)
    if precision == HALF:
        stored = np.ascontiguousarray(np.frombuffer(raw, np.uint8).reshape(2, -1).T).view("<f2").reshape(-1)
    if not np.isfinite(stored).all():
        raise CorruptError("a layer holds a value or a scale that is not finite")
    if precision == HALF:
        return stored.astype(np.float32)
    return np.frombuffer(raw, np.int8).astype(np.float32) * np.repeat(stored.astype(np.float32), lengths)
