"""The overlay `difference` adds a matrix that another coder decodes.

Over the coder `base` it makes an update: the values that the receiver has already, and what they have gained.

`w = w + d` in float32, with `d` the matrix of the inner section.

Layer (format.md, 6.23): coder u8 (1 grid, 2 vector, 9 trellis, 15 long_trellis) | its section.

>>> from bytecap.format.coders import Shared, run
>>> from bytecap.format.coders.vector import CODER as VECTOR
>>> inner = VECTOR.encode(np.full(2, 0.5, np.float32), 1.0, Shared()).data
>>> layer = CODER.encode((VECTOR.tag, inner))
>>> run([CODER.apply(layer, np.array([[1.0, 2.0]], np.float32), Shared())])[0].tolist()
[[1.5, 2.5]]
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from bytecap.errors import CorruptError
from bytecap.format.coders import Decoding, FloatArray, Shared, coder
from bytecap.format.wire.positions import Kinds

INNER = (1, 2, 9, 15)  # coders that ask for one step of work a value


class Difference:
    """Reader and writer of `difference` layers."""

    id: ClassVar[str] = "difference"
    tag: ClassVar[int] = 41

    def encode(self, inner: tuple[int, bytes]) -> bytes:
        """Encode an overlay from (tag, bytes) of what is added."""
        return bytes([inner[0]]) + inner[1]

    def _inner(self, data: bytes) -> Any:
        """Return the coder of what is added."""
        if not data or data[0] not in INNER:
            raise CorruptError(f"a difference layer names {f'coder {data[0]}' if data else 'no coder'} for its values")
        return coder(data[0])

    def kinds(self, data: bytes, shape: tuple[int, int], dtype: str) -> Kinds:
        """The coder's number, then the kinds of its section."""
        inner: Kinds = self._inner(data).kinds(data[1:], shape, dtype)
        return (("header", 1), *inner)

    def apply(self, data: bytes, base: FloatArray, shared: Shared) -> Decoding:
        """Add the values."""
        values = yield from self._inner(data).decode(data[1:], base.shape, "F32", shared)
        with np.errstate(over="ignore", invalid="ignore"):
            base += values
        return base


CODER = Difference()
