"""Section 6.16: codewords, their indices, and the matrix they make."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np

from bytecap.reference.coders import Coder, finite
from bytecap.reference.container import Reader, Unit, require
from bytecap.reference.streams import Array, Objects, Shared, Stream, Table

Part = Generator[Any, list[Array], Array]


def numbers(reader: Reader, count: int, form: int) -> Array:
    """6.16: numbers as f16 (form 0), or as signed bytes behind one f16 scale (form 1)."""
    if form == 0:
        return finite(np.frombuffer(reader.take(2 * count), "<f2").astype(np.float32))
    scale = finite(np.frombuffer(reader.take(2), "<f2").astype(np.float32))
    values: Array = np.frombuffer(reader.take(count), np.int8).astype(np.float32) * scale
    return values


def unpacked(data: bytes, count: int, width: int) -> Array:
    """6.16: values of `width` bits each; unused bits of the last byte are zero."""
    require(len(data) == (count * width + 7) // 8, f"{count} values of {width} bits in {len(data)} bytes")
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    require(not bits[count * width :].any(), "a bit that belongs to no value is set")
    weights = 1 << np.arange(width, dtype=np.int64)
    values: Array = bits[: count * width].reshape(count, width) @ weights
    return values


def table(reader: Reader, size: int) -> Table:
    """6.16: the table of the symbols 0 to size - 1."""
    return Table(0, [reader.leb() for _ in range(size)])


def words_of(objects: Objects, number: int, n: int, g: int) -> Array:
    """5.3: codewords (n, g) of a shared object."""
    found: Array = objects.get(number, 1)
    require(found.shape == (n, g), f"the shared codebook {number} is not {n} x {g}")
    return found


def indices(reader: Reader, count: int, n: int, objects: Objects) -> Part:
    """6.16: indices below n, to the end of the section."""
    mode = reader.take(1)[0]
    width = (n - 1).bit_length()
    high: Array = np.zeros(count, np.int64)
    low = width
    if mode:
        low = mode - 128 if mode >= 128 else mode - 1
        require(low < max(1, width), f"{low} low bits of {width}")
        size = ((n - 1) >> low) + 1
        require(size <= 4096, f"a table of {size} symbols")
        if mode >= 128:
            symbols, one = objects.get(reader.leb(), 4)
            require(symbols == size, f"a shared table of {symbols} symbols instead of {size}")
        else:
            one = table(reader, size)
        stream = reader.take(reader.leb())
        require(len(reader.data) - reader.at == (count * low + 7) // 8, "the low parts are of a wrong length")
        (high,) = yield [Stream(stream, np.ones(count, np.uint8), [None, one])]
        require(high.min(initial=0) >= 0 and high.max(initial=0) < size, "a high part is out of range")
    found: Array = unpacked(reader.rest(), count, low) + (high.astype(np.int64) << low)
    require(found.max(initial=0) < n, "there is no such codeword")
    return found


def codebook(unit: Unit, reader: Reader, shared: Shared) -> Coder:
    """6.16: `codebook`, in which every vector of a row is a codeword."""
    rows, cols = unit.matrix()
    g, form = reader.fields("<BB")
    n = reader.leb()
    require(1 <= g <= min(16, max(1, cols)) and form < 3 and 1 <= n <= 65536, f"form {form}, {n} codewords of {g}")
    words = words_of(shared[2], reader.leb(), n, g) if form == 2 else numbers(reader, n * g, form).reshape(n, g)
    scale = numbers(reader, 1, 0) if form == 2 else None
    across = -(-cols // g)
    which = yield from indices(reader, rows * across, n, shared[2])
    values = words[which].reshape(rows, across * g)[:, :cols]
    return values if scale is None else values * scale
