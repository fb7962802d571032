"""Sections 6.6 to 6.12 and 6.20: layers, each a function from the bytes and the matrix so far to the matrix."""

from __future__ import annotations

from collections.abc import Callable, Generator
from itertools import pairwise
from typing import Any

import numpy as np

from bytecap.reference.coders import expand, finite
from bytecap.reference.container import Reader, require
from bytecap.reference.fixed import integers as block
from bytecap.reference.streams import Array, Objects

Part = Generator[Any, list[Array], Array]

_SIXTEENTH = """3F800000 3F85AAC3 3F8B95C2 3F91C3D3 3F9837F0 3F9EF532 3FA5FED7 3FAD583F
                3FB504F3 3FBD08A4 3FC5672A 3FCE248C 3FD744FD 3FE0CCDF 3FEAC0C7 3FF5257D"""
_C = np.frombuffer(bytes.fromhex(_SIXTEENTH), ">f4").astype(np.float32)


def bits(data: bytes, count: int) -> Array:
    """6.6: `count` bits, low bit of the first byte first.

    >>> bits(bytes([0b101]), 3).tolist()
    [1, 0, 1]
    """
    found = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    require(len(found) - 8 < count <= len(found) and not found[count:].any(), "left-over bits are set")
    return found[:count]


def integers(reader: Reader, count: int, width: int) -> Array:
    """6.6: unsigned integers of `width` bits."""
    found = bits(reader.take(-(-count * width // 8)), count * width).reshape(count, width)
    return np.asarray(found.astype(np.int64) @ (1 << np.arange(width)), np.int64).reshape(count)


def unary(reader: Reader, count: int) -> list[int]:
    """6.6: numbers of zeros in front of each of `count` ones."""
    found: list[int] = []
    zeros = byte = used = 0
    while len(found) < count:
        byte, used = (reader.take(1)[0], 8) if not used else (byte, used)
        zeros += 1 - byte % 2
        if byte % 2:
            found.append(zeros)
            zeros = 0
        byte, used = byte >> 1, used - 1
    require(byte == 0, "left-over bits are set")
    return found


def positions(reader: Reader, size: int, objects: Objects) -> Array:
    """6.6: rising integers below `size`."""
    count, mode = reader.leb(), reader.take(1)[0]
    require(count <= size and mode < 5, f"{count} positions below {size}, stored in way {mode}")
    require(mode == 4 or count <= 8 * len(reader.data) + 1, f"{count} positions in {len(reader.data)} bytes")
    if mode == 4:
        limit, shared = objects.get(reader.leb(), 3)
        require(limit == size and len(shared) == count, f"the shared list is not {count} of {size}")
        return np.array(shared)
    width = max(size - 1, 0).bit_length()
    if mode == 0:
        listed = np.flatnonzero(bits(reader.take(-(-size // 8)), size)).tolist()
    elif mode == 3:
        listed = integers(reader, count, width).tolist()
    else:
        if mode == 1:
            gaps = [reader.leb() for _ in range(count)]
        else:
            p = reader.take(1)[0]
            require(p <= width, f"{p} low bits")
            low = integers(reader, count, p).tolist()
            gaps = [(high << p) + g for high, g in zip(unary(reader, count), low, strict=True)]
        listed, at = [], -1
        for gap in gaps:
            at += gap + 1
            listed.append(at)
    rising = all(a < b for a, b in pairwise(listed))
    require(len(listed) == count and rising and max(listed, default=-1) < size, "positions do not rise to their limit")
    return np.array(listed, np.int64)


def unpack(packing: int, data: bytes, size: int) -> bytes:
    """6.6: bytes as they are, or under brotli."""
    require(packing < 2, f"there is no packing {packing}")
    if packing:
        return expand(1, data, size)
    require(len(data) == size, f"{len(data)} bytes instead of {size}")
    return data


def halves(data: bytes) -> Array:
    """6.6: f16 values from a plane of low bytes and one of high bytes."""
    low, high = np.frombuffer(data, np.uint8).reshape(2, -1)
    return finite((low + high.astype(np.uint16) * 256).astype("<u2").view("<f2").astype(np.float32))


def vectors(reader: Reader, lengths: list[int]) -> list[Array]:
    """6.6: protected values."""
    precision, packing = reader.fields("<BB")
    require(precision < 2, f"there is no precision {precision}")
    ends = np.cumsum([0, *lengths]).tolist()
    if precision == 0:
        values = halves(unpack(packing, reader.rest(), 2 * ends[-1]))
    else:
        scales = finite(np.frombuffer(reader.take(2 * len(lengths)), "<f2").astype(np.float32))
        values = np.frombuffer(unpack(packing, reader.rest(), ends[-1]), np.int8).astype(np.float32)
    found = [values[a:b] for a, b in pairwise(ends)]
    return [v * s for v, s in zip(found, scales, strict=True)] if precision else found


def columns(reader: Reader, w: Array, objects: Objects) -> Part:
    """6.7: `columns`, protected input columns."""
    yield from ()
    listed = positions(reader, w.shape[1], objects)
    for j, values in zip(listed, vectors(reader, [w.shape[0]] * len(listed)), strict=True):
        w[:, j] = values
    return w


def rows(reader: Reader, w: Array, objects: Objects) -> Part:
    """6.8: `rows`, protected output rows."""
    yield from ()
    listed = positions(reader, w.shape[0], objects)
    for i, values in zip(listed, vectors(reader, [w.shape[1]] * len(listed)), strict=True):
        w[i] = values
    return w


def outliers(reader: Reader, w: Array, objects: Objects) -> Part:
    """6.9: `outliers`, protected single weights."""
    yield from ()
    listed = positions(reader, w.size, objects)
    (values,) = vectors(reader, [len(listed)])
    w.reshape(-1)[listed] = values
    return w


def lowrank(reader: Reader, w: Array, _objects: Objects) -> Part:
    """6.10: `lowrank`, a residual of low rank."""
    (m, n), (rank, width, packing) = w.shape, reader.fields("<BBB")
    require(1 <= rank <= min(m, n) and 2 <= width <= 8 and packing < 3, f"rank {rank}, {width} bits")
    scales = finite(np.frombuffer(reader.take(4 * rank), "<f4"))
    count, offset = rank * (m + n), 2 ** (width - 1)
    if packing == 2:
        codes = (yield from block(reader, np.full(count, width), 1)).astype(np.int64) - offset
    elif packing:
        codes = np.frombuffer(unpack(1, reader.rest(), count), np.int8).astype(np.int64)
    else:
        codes = integers(reader, count, width) - offset
    require(not reader.rest(), "bytes are left over behind the factors")
    require(codes.min() >= -offset and codes.max() < offset, f"a code has more than {width} bits")
    for scale, factor in zip(scales.astype(np.float32), codes.reshape(rank, m + n).astype(np.float32), strict=True):
        a = scale * factor[:m]
        w = w + a[:, None] * factor[None, m:]
    return w


def groups(reader: Reader, w: Array, _objects: Objects) -> Part:
    """6.11: `groups`, scales of groups of weights."""
    yield from ()
    (m, n), size, (precision, packing) = w.shape, reader.leb(), reader.fields("<BB")
    require(1 <= size <= max(1, n) and precision < 2, f"groups of {size}, precision {precision}")
    each = -(-n // size)
    raw = unpack(packing, reader.rest(), m * each * (2 - precision))
    if precision:
        k = np.frombuffer(raw, np.int8).astype(np.int32)
        scales = np.ldexp(_C[k % 16], k // 16)
    else:
        scales = halves(raw)
    return w * scales.reshape(m, each)[:, np.arange(n) // size]


def channels(reader: Reader, w: Array, objects: Objects) -> Part:
    """6.12: `channels`, one list of columns and rows."""
    yield from ()
    (m, n), mode = w.shape, reader.take(1)[0]
    require(1 <= mode <= 3, f"there is no mode {mode}")
    listed = positions(reader, (n, m, min(m, n))[mode - 1], objects)
    k, crossed = len(listed), set(listed.tolist() if mode == 3 else [])
    others = [i for i in range(m) if i not in crossed]
    found = vectors(reader, [len(others)] * (k if mode & 1 else 0) + [n] * (k if mode & 2 else 0))
    if mode & 1:
        for j, values in zip(listed, found[:k], strict=True):
            w[others, j] = values
    if mode & 2:
        for i, values in zip(listed, found[-k:] if k else [], strict=True):
            w[i] = values
    return w


def order(reader: Reader, w: Array, _objects: Objects) -> Part:
    """6.20: `order`, rows in another order."""
    yield from ()
    place = integers(reader, len(w), max(0, len(w) - 1).bit_length())
    require(not reader.rest() and np.array_equal(np.sort(place), np.arange(len(w))), "rows are not permuted")
    return np.ascontiguousarray(w[place])


LAYERS: dict[int, Callable[[Reader, Array, Objects], Part]] = {
    32: columns, 33: rows, 34: outliers, 35: lowrank, 36: groups, 37: channels, 40: order,
}  # fmt: skip
