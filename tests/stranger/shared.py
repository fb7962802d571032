"""Sections 5.2 and 5.3 of docs/format.md, tables and shared objects; numbers, weights, positions (6.6, 6.16, 6.17)."""

from itertools import pairwise

import numpy as np

from stranger.basics import Bytes, CorruptError, Table, frequencies, need, raw_lzma


class Shared:
    """The objects that sections of units draw on: tables and offsets by class, objects by number."""

    def __init__(self, tables_section, objects):
        self.tables, self.offsets = {}, {}
        if tables_section:
            self._read_tables(Bytes(tables_section))
        self.objects = [read_object(section) for section in objects]
        self.used = set()
        self.below = None  # the matrix of the unit at hand in the base of an update

    def _read_tables(self, source):
        packing = source.u8(0, 1)
        content = source.rest()
        if packing:
            content = raw_lzma(content, 3, 1 << 16, 1 << 20)
        need(len(content) <= 1 << 20, "tables of more than 2^20 bytes")
        source, first = Bytes(content), 1
        while source.at < len(content):
            served = source.leb(1, 64 - first)
            half = source.leb(0, 1023)
            sizes = [source.leb(1) for _ in range(half + 1)]
            table = Table(-half, sizes[:0:-1] + sizes)
            stored = [source.i8() for _ in range(min(half, 16))]
            for k in range(first, first + served):
                self.tables[k], self.offsets[k] = table, stored
            first += served

    def offset(self, k, m):
        """`o(k, m)`."""
        stored = self.offsets.get(k, [])
        if not m or not stored:
            return np.float32(0)
        return np.float32(stored[min(m, len(stored)) - 1] / 256)

    def get(self, number, *expected):
        """The content of an object of this kind and these dimensions."""
        need(number < len(self.objects), f"there is no shared object {number}")
        *found, content = self.objects[number]
        need(tuple(found) == expected, f"shared object {number} is {found}, not {expected}")
        self.used.add(number)
        return content


def read_object(section):
    """(kind, dimensions.., content)."""
    source = Bytes(section)
    kind = source.u8(1, 4)
    if kind == 1:
        g, form, n = source.u8(1, 16), source.u8(0, 1), source.leb(1, 65536)
        found = (1, g, n, numbers(source, form, n * g).reshape(n, g))
    elif kind == 2:
        g = source.u8(1, 64)
        e = source.u8(1, g)
        found = (2, g, e, decoder(source, g, e))
    elif kind == 3:
        limit = source.leb(0, 1 << 31)
        places = positions(source, limit, None)
        found = (3, limit, len(places), places)
    else:
        m = source.leb(1, 4096)
        found = (4, m, Table(0, frequencies(source, m)))
    source.end()
    return found


def numbers(source, form, count):
    """Numbers of 6.16, as binary32."""
    if form == 0:
        return source.f16(count)
    scale = source.f16(1)
    return np.frombuffer(source.take(count), np.int8).astype(np.float32) * scale


def decoder(source, g, e):
    """`S`, `A`, `a` and `B` of 6.17, behind g and e."""
    h, bits = source.u8(0, 64), source.u8(6, 8)

    def weights(rows, cols):
        scale = source.f16(1)
        values = source.bits(bits, rows * cols) - (1 << (bits - 1))
        return (values.astype(np.float32) * scale).reshape(rows, cols)

    return weights(g, e), weights(h, e), weights(1, h)[0], weights(g, h)


def positions(source, limit, shared):
    """Positions below a limit (6.6); `shared` is None inside a shared object."""
    count = source.leb(0, limit)
    mode = source.u8(0, 4 if shared else 3)
    if mode == 4:
        return shared.get(source.leb(), 3, limit, count)
    need(count <= 8 * len(source.data) + 1, f"{count} positions in {len(source.data)} bytes")
    width = (limit - 1).bit_length() if limit > 1 else 0
    if mode == 0:
        need(limit <= 8 * len(source.data), "a bitmap is cut short")
        places = np.flatnonzero(source.bits(1, limit)).tolist()
        need(len(places) == count, f"{len(places)} positions instead of {count}")
        return places
    if mode == 3:
        places = source.bits(width, count).tolist()
    else:
        gaps = [source.leb() for _ in range(count)] if mode == 1 else _golomb(source, count, width)
        places, at = [], -1
        for gap in gaps:
            at += gap + 1
            places.append(at)
    need(all(a < b for a, b in pairwise(places)), "positions do not rise")
    need(not places or places[-1] < limit, "a position is not below its limit")
    return places


def _golomb(source, count, width):
    p = source.u8(0, width)
    low = source.bits(p, count).tolist()
    ahead = np.unpackbits(np.frombuffer(source.data[source.at :], np.uint8), bitorder="little")
    ones = np.flatnonzero(ahead)[:count]
    if len(ones) < count:
        raise CorruptError("high parts are cut short")
    if count:
        last = int(ones[-1]) + 1
        source.take((last + 7) // 8)
        need(not ahead[last : (last + 7) // 8 * 8].any(), "spare bits are not 0")
    high = np.diff(np.concatenate(([-1], ones))) - 1
    return [(int(h) << p) + b for h, b in zip(high, low, strict=True)]
