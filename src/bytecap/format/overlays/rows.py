"""The overlay `rows` replaces some output rows of the base's matrix by finely stored ones.

What `columns` does for inputs, for outputs: rows of an embedding that stand for frequent tokens, or output channels
with large gradients. `w[rows[c]] = value[c]`, shapes (rows, cols), (k,) and (k, cols).

Layer (format.md, 6.8): positions of the rows | values, row after row. Bytes: positions + 2 + 2 k cols, or
positions + 2 + k (2 + cols) with i8. The class is that of `columns`.

>>> import numpy as np
>>> from bytecap.format.coders import Shared, run
>>> data = CODER.encode(np.array([1]), np.array([[2, -4, 6]], np.int8), 2, np.array([0.5], np.float16))
>>> run([CODER.apply(data, np.zeros((2, 3), np.float32), Shared())])[0].tolist()
[[0.0, 0.0, 0.0], [1.0, -2.0, 3.0]]
"""

from __future__ import annotations

from typing import ClassVar

from bytecap.format.overlays.columns import Columns


class Rows(Columns):
    """Reader and writer of `rows` layers."""

    id: ClassVar[str] = "rows"
    tag: ClassVar[int] = 33
    axis: ClassVar[int] = 0


CODER = Rows()
