"""Section 6.18: signs or trits, a scale for every row, perhaps a mean."""

from __future__ import annotations

import numpy as np

from bytecap.reference.codebook import table, unpacked
from bytecap.reference.coders import Coder, finite
from bytecap.reference.container import Reader, Unit, require
from bytecap.reference.streams import Array, Shared, Stream


def _trits(data: bytes, count: int) -> Array:
    """6.18: unpack five trits from each byte, the least significant first."""
    require(len(data) == (count + 4) // 5 and max(data, default=0) < 243, "trits are badly packed")
    raw = np.frombuffer(data, np.uint8).astype(np.int64)
    found = np.stack([raw // 3**i % 3 for i in range(5)], axis=1).reshape(-1)
    require(not found[count:].any(), "a trit that belongs to no weight is set")
    return found[:count]


def binary(unit: Unit, reader: Reader, _shared: Shared) -> Coder:
    """6.18: levels, means, packing, then the numbers and the codes."""
    rows, cols = unit.matrix()
    levels, form, packing = reader.fields("<BBB")
    require(levels in {2, 3} and form <= 2 and packing <= 1, f"levels {levels}, means {form}, packing {packing}")
    scales = finite(np.frombuffer(reader.take(2 * rows), "<f2").astype(np.float32))
    means = finite(np.frombuffer(reader.take(2 * [0, 1, rows][form]), "<f2").astype(np.float32))
    count = rows * cols
    if packing:
        one = table(reader, levels)
        (codes,) = yield [Stream(reader.rest(), np.ones(count, np.uint8), [None, one])]
        require(codes.min(initial=0) >= 0 and codes.max(initial=0) < levels, "a code is out of range")
    else:
        codes = unpacked(reader.rest(), count, 1) if levels == 2 else _trits(reader.rest(), count)
    signs = (codes * 2 - 1 if levels == 2 else codes - 1).reshape(rows, cols).astype(np.float32)
    values: Array = signs * scales[:, None]
    return values + means[:, None] if form == 2 else values + means if form else values
