"""Sections 1, 5.1 and 6.6 of docs/format.md: numbers, compressed blocks, bits, streams."""

import lzma
import struct
import zlib

import brotli
import numpy as np

TOTAL = 1 << 14
LANE = 8192


class FormatError(Exception):
    """Section 8: what a reader refuses a file with."""


class NotAnArtifact(FormatError):  # noqa: N818 (the document calls it so)
    pass


class VersionError(FormatError):
    pass


class BaseError(FormatError):
    pass


class CorruptError(FormatError):
    pass


def need(condition, what):
    if not condition:
        raise CorruptError(what)


class Bytes:
    """A cursor over the bytes of a section."""

    def __init__(self, data):
        self.data, self.at = bytes(data), 0

    def take(self, size):
        need(size <= len(self.data) - self.at, f"{size} bytes expected at byte {self.at} of {len(self.data)}")
        self.at += size
        return self.data[self.at - size : self.at]

    def rest(self):
        return self.take(len(self.data) - self.at)

    def end(self):
        need(self.at == len(self.data), f"{len(self.data) - self.at} bytes left over")

    def number(self, kind):
        return struct.unpack("<" + kind, self.take(struct.calcsize("<" + kind)))[0]

    def u8(self, low=0, high=255):
        value = self.take(1)[0]
        need(low <= value <= high, f"{value} is not in {low} to {high}")
        return value

    def i8(self):
        return self.number("b")

    def f32(self):
        value = np.frombuffer(self.take(4), "<f4")[0]
        need(np.isfinite(value), f"{value} is not finite")
        return value

    def f16(self, count):
        """`count` finite f16, one after the other, as binary32."""
        values = np.frombuffer(self.take(2 * count), "<f2")
        need(np.isfinite(values).all(), "an f16 is not finite")
        return values.astype(np.float32)

    def leb(self, low=0, high=None):
        value = 0
        for place in range(9):
            byte = self.take(1)[0]
            value |= (byte & 127) << (7 * place)
            if byte < 128:
                need(low <= value and (high is None or value <= high), f"{value} is not in {low} to {high}")
                return value
        raise CorruptError("an integer of more than 9 bytes")

    def zigzag(self):
        value = self.leb()
        return -(value >> 1) - 1 if value & 1 else value >> 1

    def part(self):
        """Length and so many bytes."""
        return Bytes(self.take(self.leb()))

    def bits(self, width, count):
        """`count` numbers of `width` bits from whole bytes, what is left over being 0."""
        data = np.frombuffer(self.take((width * count + 7) // 8), np.uint8)
        flat = np.unpackbits(data, bitorder="little")
        need(not flat[width * count :].any(), "spare bits are not 0")
        flat = flat[: width * count].reshape(count, width).astype(np.int64)
        return flat @ (np.int64(1) << np.arange(width, dtype=np.int64))


def _exactly(content, ended, spare, size, limit):
    need(ended and not spare, "compressed data does not end with its block")
    need(len(content) <= limit, f"more than {limit} bytes")
    need(size is None or len(content) == size, f"{len(content)} bytes instead of {size}")
    return content


def raw_lzma(data, lc, dictionary, limit):
    filters = [{"id": lzma.FILTER_LZMA1, "lc": lc, "lp": 0, "pb": 0, "dict_size": dictionary}]
    engine = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters)
    try:
        content = engine.decompress(data, limit + 1)
    except (lzma.LZMAError, EOFError) as exc:
        raise CorruptError(f"LZMA: {exc}") from exc
    return _exactly(content, engine.eof, engine.unused_data, None, limit)


def unzip(data, size=None, limit=1 << 28, window=15, template=None):
    engine = zlib.decompressobj(window, zdict=template) if template else zlib.decompressobj(window)
    bound = limit if size is None else size
    try:
        content = engine.decompress(data, bound + 1)
    except zlib.error as exc:
        raise CorruptError(f"zlib: {exc}") from exc
    return _exactly(content, engine.eof, engine.unused_data, size, bound)


def unbrotli(data, size=None, limit=1 << 28):
    bound = limit if size is None else size
    engine, out, left = brotli.Decompressor(), b"", data
    try:
        while not engine.is_finished() and len(out) <= bound:
            piece = engine.process(left, output_buffer_limit=1 << 16)
            need(piece or left or not engine.can_accept_more_data(), "brotli data is cut short")
            out, left = out + piece, b""
        if len(out) <= bound:
            brotli.decompress(data)  # refuses what is behind the end
    except brotli.error as exc:
        raise CorruptError(f"brotli: {exc}") from exc
    return _exactly(out, engine.is_finished(), b"", size, bound)


def packed(source, packing, size):
    """Packed bytes (6.6) to the end of a cursor: exactly `size`."""
    need(packing in (0, 1), f"there is no packing {packing}")
    data = source.rest()
    if packing:
        return unbrotli(data, size)
    need(len(data) == size, f"{len(data)} bytes instead of {size}")
    return data


def planes(data, count):
    """Planes of f16: low bytes, then high bytes; finite, as binary32."""
    both = np.frombuffer(data, np.uint8).reshape(2, count).T
    return Bytes(np.ascontiguousarray(both).tobytes()).f16(count)


class Table:
    """A table of ordinary symbols from `low` on; the escape's frequency is what is missing."""

    def __init__(self, low, frequencies, escape=None):
        self.low, self.frequencies = low, list(frequencies)
        self.escape = TOTAL - sum(self.frequencies) if escape is None else escape
        need(self.escape >= 1, "no frequency is left for the escape")
        entries = [*self.frequencies, self.escape]
        self.entries = np.repeat(np.arange(len(entries)), entries).tolist()  # entry of every slot
        self.cumulative = np.concatenate(([0], np.cumsum(entries))).tolist()
        self.all = entries


def frequencies(source, count):
    found = [source.leb(1) for _ in range(count)]
    need(sum(found) < TOTAL, "no frequency is left for the escape")
    return found


def stream(data, classes, tables):
    """Symbols of a stream that is all of `data`, each under its class."""
    count = len(classes)
    if not count:
        need(not data, "a stream of no symbols has bytes")
        return []
    used = {}
    for k in set(classes):
        need(k in tables, f"class {k} has no table")
        used[k] = tables[k]
    source = Bytes(data)
    lanes = -(-count // LANE)
    total = source.zigzag()
    need(total >= 0 and source.at <= 6, f"a stream of {total} words")
    states = list(struct.unpack(f"<{lanes}I", source.take(4 * lanes)))
    need(min(states) >= 1 << 16, "a state begins below 2^16")
    words = struct.unpack(f"<{total}H", source.take(2 * total))
    out, escaped, taken = [], [], 0
    for i, k in enumerate(classes):
        table, x = used[k], states[i % lanes]
        slot = x & (TOTAL - 1)
        s = table.entries[slot]
        x = table.all[s] * (x >> 14) + slot - table.cumulative[s]
        if x < 1 << 16:
            need(taken < total, "words are missing")
            x = (x << 16) + words[taken]
            taken += 1
        states[i % lanes] = x
        if s == len(table.frequencies):
            escaped.append(i)
        out.append(table.low + s)
    for i in escaped:
        out[i] = source.zigzag()
        need(abs(out[i]) < 1 << 31, f"the escaped symbol {out[i]}")
    need(set(states) == {1 << 16}, "a state does not end at 2^16")
    need(taken == total, "words are left over")
    source.end()
    return out
