"""`base` gives a unit the values that it has in the base of an update.

A file that is an update (`bytecap.format.updates`) names another file, its base, and lists only the units that change.
This coder is what layers of a `stack` stand on there: above all `difference`, which adds what a unit has gained.

Section (format.md, 6.22): no bytes.

>>> from bytecap.format.coders import run
>>> below = np.array([[1.0, 2.0]], np.float32)
>>> run([CODER.decode(b"", (1, 2), "F32", Shared(below=below))])[0].tolist()
[[1.0, 2.0]]
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from bytecap.errors import CorruptError
from bytecap.format.coders import Decoding, Shared


class Base:
    """Reader of `base` sections, which hold nothing."""

    id: ClassVar[str] = "base"
    tag: ClassVar[int] = 16

    def kinds(self, data: bytes, shape: tuple[int, int], dtype: str) -> tuple[tuple[str, int], ...]:
        """Nothing."""
        del shape, dtype
        if data:
            raise CorruptError(f"a base section holds {len(data)} bytes")
        return ()

    def decode(self, data: bytes, shape: tuple[int, int], dtype: str, shared: Shared) -> Decoding:
        """Return a copy of the base's matrix."""
        yield from ()
        self.kinds(data, shape, dtype)
        if shared.below is None:
            raise CorruptError("a unit refers to the base of an update, and the file names none")
        return np.array(shared.below)


CODER = Base()
