"""Sections 6.13 and 6.14: integers of nominal widths, `fixed` and `companded`."""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import Any

import numpy as np

from bytecap.reference.coders import Coder, exact, finite
from bytecap.reference.container import Reader, Unit, require
from bytecap.reference.streams import Array, Objects, Shared, Stream, Table

Block = Generator[Any, list[Array], Array]


def _table(reader: Reader, width: int) -> Table:
    low, m = reader.leb(), reader.leb()
    if low == m == 0:
        even = [2 ** (14 - width)] * 2**width
        even[-1] -= 1
        return Table(0, even)
    require(m >= 1 and low + m <= 2**width, f"a table of {width} bits has symbols beyond them")
    return Table(low, [reader.leb() for _ in range(m)])


def integers(reader: Reader, widths: Array, coded: int) -> Block:
    """6.13: a block of integers."""
    widths = widths.reshape(-1).astype(np.uint8)
    values = np.zeros(len(widths), np.int32)
    if coded:
        tables: list[Table | None] = [None] * 9
        for width in range(1, 9):
            if (widths == width).any():
                tables[width] = _table(reader, width)
        (symbols,) = yield [Stream(reader.take(reader.leb()), widths[widths > 0], tables)]
        values[widths > 0] = symbols
        limit = np.left_shift(1, widths.astype(np.int32))
        require(((values >= 0) & (values < limit)).all(), "an integer is beyond its width")
        return values
    for plane in range(widths.max(initial=0)):
        where = np.flatnonzero(widths > plane)
        raw = np.frombuffer(reader.take(-(-len(where) // 8)), np.uint8)
        bits = np.unpackbits(raw, bitorder="little").astype(np.int32)
        require(not bits[len(where) :].any(), "a padding bit is used")
        values[where] += bits[: len(where)] << plane
    return values


def halves(reader: Reader, count: int, coded: int) -> Block:
    """6.13: a block of 16-bit floats, as binary32."""
    if not coded:
        return finite(np.frombuffer(reader.take(2 * count), "<f2")).astype(np.float32)
    part = Reader(reader.take(reader.leb()))
    nothing: Shared = ([], np.zeros(0), Objects())
    values = yield from exact(Unit("", [count], "F16", 3, 0, []), part, nothing)
    return finite(values).reshape(-1)


def fixed(unit: Unit, reader: Reader, _shared: Shared) -> Coder:
    """6.13: `fixed`, one width, a scale and a zero point for every row, and protected columns."""
    rows, cols = unit.matrix()
    coded, width = reader.fields("<BB")
    require(coded < 2 and 1 <= width <= 8, "a mode or a width is out of range")
    k = reader.leb()
    require(k <= cols, "more columns are protected than there are")
    columns = np.frombuffer(reader.take(2 * k), "<u2").astype(np.int64)
    require((np.diff(columns) > 0).all() and (columns < cols).all(), "protected columns are out of order or range")
    scale = yield from halves(reader, rows, coded)
    zero = yield from integers(reader, np.full(rows, width), coded)
    kept = yield from halves(reader, rows * k, coded)
    codes = yield from integers(reader, np.full(rows * (cols - k), width), coded)
    require(not reader.rest(), "bytes are left over behind the codes")
    matrix = np.zeros((rows, cols), np.float32)
    plain = np.setdiff1d(np.arange(cols), columns)
    matrix[:, plain] = (codes.reshape(rows, cols - k) - zero[:, None]).astype(np.float32) * scale[:, None]
    matrix[:, columns] = kept.reshape(k, rows).T
    return matrix


def level(depth: int, code: int) -> float:
    """`level(B, code)` of 6.14, before rounding to binary32."""
    if depth == 0:
        return 0.0
    m = min(code, 2**depth - 1 - code)
    size = 3 / math.sqrt(2) * math.log(2**depth / (2 * m + 1))
    return -size if code == m else size


def companded(unit: Unit, reader: Reader, _shared: Shared) -> Coder:
    """6.14: `companded`, a depth, an offset and a scale for every pair of row set and column."""
    rows, cols = unit.matrix()
    coded = reader.fields("<B")[0]
    count = reader.leb()
    require(coded < 2 and 1 <= count <= min(256, max(1, rows)), "a mode or the number of row sets is out of range")
    side = Reader(reader.take(reader.leb()))
    sets = yield from integers(side, np.full(rows, (count - 1).bit_length()), coded)
    depths = (yield from integers(side, np.full(count * cols, 4), coded)).reshape(count, cols)
    require((sets < count).all() and (depths <= 8).all(), "a row set or a depth is out of range")
    offset = (yield from halves(side, count * cols, coded)).reshape(count, cols)
    scale = np.zeros((count, cols), np.float32)
    scale[depths > 0] = yield from halves(side, int((depths > 0).sum()), coded)
    depth = depths[sets]
    codes = (yield from integers(reader, depth, coded)).reshape(rows, cols)
    require(not side.rest() and not reader.rest(), "bytes are left over")
    known = np.zeros((9, 256), np.float32)
    for b in range(9):
        known[b, : 2**b] = [level(b, code) for code in range(2**b)]
    matrix: Array = known[depth, codes] * scale[sets] + offset[sets]
    return matrix
