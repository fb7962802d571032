"""`bands` stores integer codes with one fp16 scale per row, entropy coded with a table for each band of columns.

`packed` with an entropy coder in place of the general-purpose compressor: what golf's integers take at best. Columns
of like spread share a band, and a band has one static, symmetric table. A weight decodes, in float32, as in `packed`::

    w = scale[row] * code

Section (format.md, 6.19): bands u8 (1 to 63) | LEB128 length, scales under brotli | band of every column in the fewest
bits | a table for each band: LEB128 half, frequencies of -half .. half as LEB128 | stream of all codes, row after row.

Measured on the integers of golf (7M parameters; bytes over order-0 entropy of every tensor, at 3.5 / 2.5 bits):
brotli-11 1.009 / 1.018, LZMA 1.048 / 1.130, zpaq -m5 on whole roles 1.0014 / 1.0015, and 1.001 / 1.001 here. Only in
embeddings is there more for a context mixer to find, 1.7% of them.

Omitted: adaptive tables and mixed contexts, which in zpaq cost more on linear layers than they find.

>>> from bytecap.format.coders import run
>>> section = CODER.encode(Quantized(np.array([[1, -2]]), np.array([0.5], np.float16)))
>>> run([CODER.decode(section, (1, 2), "F32", Shared())])[0].tolist()
[[0.5, -1.0]]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from bytecap.errors import CorruptError
from bytecap.format.coders import Decoding, Shared, leb, read_frequencies, read_leb
from bytecap.format.coders.packed import BROTLI, Quantized, compress, dequantize, expand_brotli
from bytecap.format.entropy.frequencies import MAX_CLASS, MAX_HALF, PROB_BITS, Table, Tables, integer_frequencies
from bytecap.format.entropy.rans import Stream, encode
from bytecap.format.wire.bits import pack_bits, packed_size, unpack_bits
from bytecap.format.wire.positions import Kinds, take

_BANDS = (1, 2, 4, 8)  # tried by the encoder
_ESCAPE_BITS = 22.0  # a rare code's price: slot of the escape and its own bytes

IntArray = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class _Parts:
    head: int
    side: bytes
    bands: npt.NDArray[np.uint8]  # (cols,) from 0
    tables: Tables
    payload: int  # where it begins


def _banded(codes: IntArray, count: int) -> npt.NDArray[np.int64]:
    """Assign columns to `count` equal bands by rising mean square; returns the band of each column (cols,)."""
    cols = codes.shape[1]
    place = np.argsort(np.argsort(np.square(codes.astype(np.float64)).sum(0), kind="stable"), kind="stable")
    band: npt.NDArray[np.int64] = place * count // max(1, cols)
    return band


def _table(codes: IntArray) -> tuple[bytes, Table, float]:
    """Fit a table; returns (stored table, live table, bits of these codes and of the stored table)."""
    size = np.bincount(np.abs(codes.reshape(-1)).astype(np.int64), minlength=1)
    often = np.flatnonzero(size > 1)
    half = min(int(often[-1]) if len(often) else 0, MAX_HALF)
    inside, rare = size[: half + 1].astype(np.float64), float(size[half + 1 :].sum())
    both = np.concatenate([inside[:0:-1] / 2, inside[:1], inside[1:] / 2])
    freq = integer_frequencies(np.append(both, rare), symmetric=True)
    stored = leb(half) + b"".join(leb(int(f)) for f in freq[:-1])
    bits = float(both @ (PROB_BITS - np.log2(freq[:-1]))) + _ESCAPE_BITS * rare + 8 * len(stored)
    return stored, Table(-half, freq), bits


def _width(bands: int) -> int:
    return (bands - 1).bit_length()


class Bands:
    """Reader and writer of `bands` sections."""

    id: ClassVar[str] = "bands"
    tag: ClassVar[int] = 14

    def encode(self, matrix: Quantized) -> bytes:
        """Bytes of a section; the number of bands is the best of a few."""
        codes = matrix.codes
        if codes.shape[:1] != matrix.scales.shape or not np.isfinite(matrix.scales).all():
            raise ValueError("a matrix of bands needs one finite scale for every row")
        tried = []
        for count in _BANDS:
            if count > max(1, codes.shape[1]):
                break
            band = _banded(codes, count)
            tables = [_table(codes[:, band == b]) for b in range(count)]
            tried.append((sum(t[2] for t in tables) + len(band) * _width(count), count, band, tables))
        _, count, band, tables = min(tried, key=lambda t: t[0])
        side = compress(matrix.scales.astype("<f2").tobytes(), BROTLI)
        classes = np.broadcast_to(band + 1, codes.shape).reshape(-1).astype(np.uint8)
        live = Tables({b + 1: t[1] for b, t in enumerate(tables)})
        return (
            bytes([count]) + leb(len(side)) + side + pack_bits(band, _width(count)) + b"".join(t[0] for t in tables)
            + encode(codes.reshape(-1).astype(np.int32), classes, live)
        )  # fmt: skip

    def _parse(self, data: bytes, shape: tuple[int, int]) -> _Parts:
        count = take(data, 0, 1)[0]
        if not 1 <= count <= MAX_CLASS:
            raise CorruptError(f"a section of bands declares {count} bands")
        length, head = read_leb(data, 1)
        side = take(data, head, length)
        at = head + length
        width = _width(count)
        size = packed_size(shape[1], width)
        bands = unpack_bits(take(data, at, size), shape[1], width).astype(np.uint8)
        if bands.max(initial=0) >= count:
            raise CorruptError(f"a column is in band {bands.max()} of {count}")
        at += size
        tables = {}
        for b in range(count):
            half, at = read_leb(data, at)
            if half > MAX_HALF:
                raise CorruptError(f"a table of bands reaches to {half}, beyond {MAX_HALF}")
            tables[b + 1], at = read_frequencies(data, at, -half, 2 * half + 1, "a band")
        return _Parts(head, side, bands, Tables(tables), at)

    def kinds(self, data: bytes, shape: tuple[int, int], dtype: str) -> Kinds:
        """Header, scales with the columns' bands, tables, codes."""
        del dtype
        p = self._parse(data, shape)
        width = _width(data[0])
        side = len(p.side) + packed_size(shape[1], width)
        tables = p.payload - p.head - side
        return (("header", p.head), ("side", side), ("table", tables), ("payload", len(data) - p.payload))

    def decode(self, data: bytes, shape: tuple[int, int], dtype: str, shared: Shared) -> Decoding:
        """Decode to float32 (rows, cols)."""
        del dtype, shared
        p = self._parse(data, shape)
        scales = np.frombuffer(expand_brotli(p.side, 2 * shape[0]), "<f2")
        if not np.isfinite(scales).all():
            raise CorruptError("a section of bands holds a scale that is not finite")
        classes = np.broadcast_to(p.bands + np.uint8(1), shape).reshape(-1)
        (codes,) = yield [Stream(data[p.payload :], classes, p.tables)]
        return dequantize(Quantized(codes.reshape(shape), scales))  # finite: 2^31 times the largest f16 is


CODER = Bands()
