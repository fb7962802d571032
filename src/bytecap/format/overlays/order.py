"""The overlay `order` puts rows that were stored in another order back in place.

Row `i` of the matrix is row `place[i]` of what the base decoded. A base under a general-purpose compressor gets smaller
where like rows are neighbours, which pays in embeddings (rare tokens resemble one another) and hardly in linear layers.

Layer (format.md, 6.20): place of every row, ceil(log2(rows)) bits each.

Source: the row-similarity order of the Parameter Golf records. Omitted: a permutation in its log2(rows!) bits, which
is 1.44 bits a row less.

>>> from bytecap.format.coders import Shared, run
>>> data = CODER.encode(np.array([2, 0, 1]))
>>> run([CODER.apply(data, np.array([[5.0], [6.0], [7.0]], np.float32), Shared())])[0].tolist()
[[7.0], [5.0], [6.0]]
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from bytecap.errors import CorruptError
from bytecap.format.coders import Decoding, FloatArray, Shared
from bytecap.format.wire.bits import pack_bits, unpack_bits
from bytecap.format.wire.positions import Kinds


def _width(rows: int) -> int:
    return max(0, rows - 1).bit_length()


class Order:
    """Reader and writer of `order` layers."""

    id: ClassVar[str] = "order"
    tag: ClassVar[int] = 40

    def encode(self, place: npt.NDArray[np.integer[Any]]) -> bytes:
        """Encode an overlay from the stored row (rows,) that each row takes."""
        return pack_bits(place, _width(len(place)))

    def kinds(self, data: bytes, shape: tuple[int, int], dtype: str) -> Kinds:
        """Places."""
        del shape, dtype
        return (("index", len(data)),)

    def apply(self, data: bytes, base: FloatArray, shared: Shared) -> Decoding:
        """Put the rows where they are used."""
        del shared
        yield from ()
        place = unpack_bits(data, len(base), _width(len(base)))
        if not np.array_equal(np.sort(place), np.arange(len(base))):
            raise CorruptError(f"an order layer is no permutation of {len(base)} rows")
        return base[place]


CODER = Order()


def by_likeness(codes: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
    """Chain rows by likeness: start at the smallest row and always take the nearest one left; returns indices (rows,).

    Takes time of rows^2 * cols.
    """
    rows = codes.astype(np.float32)
    size = np.square(rows).sum(1)
    left = np.zeros(len(rows), np.float32)  # infinite for rows that are taken
    chain = np.zeros(len(rows), np.int64)
    at = int(size.argmin()) if len(rows) else 0
    for i in range(len(rows)):
        chain[i] = at
        left[at] = np.inf
        at = int((left + size - 2 * (rows @ rows[at])).argmin())
    return chain
