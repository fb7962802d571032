"""Section 6.19: integer codes under a table for every band of columns."""

from __future__ import annotations

import numpy as np

from bytecap.reference.coders import Coder, expand, finite
from bytecap.reference.container import Reader, Unit, require
from bytecap.reference.streams import Array, Shared, Stream, Table


def bands(unit: Unit, reader: Reader, _shared: Shared) -> Coder:
    """6.19: `bands`, with a scale for every row and a band for every column."""
    rows, cols = unit.matrix()
    (count,) = reader.fields("<B")
    require(1 <= count <= 63, f"{count} bands")
    scales = finite(np.frombuffer(expand(1, reader.take(reader.leb()), 2 * rows), "<f2")).astype(np.float32)
    width = (count - 1).bit_length()
    bits = np.unpackbits(np.frombuffer(reader.take(-(-cols * width // 8)), np.uint8), bitorder="little")
    require(not bits[cols * width :].any(), "a padding bit is used")
    band: Array = bits[: cols * width].reshape(cols, width).astype(np.int64) @ (1 << np.arange(width))
    require((band < count).all(), "a column is in a band that does not exist")
    tables: list[Table | None] = [None]
    for _ in range(count):
        half = reader.leb()
        require(half <= 1023, f"a table of {half} symbols a side")
        tables.append(Table(-half, [reader.leb() for _ in range(2 * half + 1)]))
    classes = np.broadcast_to(band + 1, (rows, cols)).reshape(-1).astype(np.uint8)
    (codes,) = yield [Stream(reader.rest(), classes, tables)]
    with np.errstate(over="ignore"):
        return finite(codes.reshape(rows, cols).astype(np.float32) * scales[:, None])
