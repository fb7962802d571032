"""The overlay `columns` replaces some input columns of the base's matrix by finely stored ones.

Few input channels of a language model carry large activations, and an error in their columns costs many times that
of another. A base with one step for all of them wastes bytes everywhere or precision there; this layer keeps `k`
whole columns apart, as f16 or as i8 with one f16 scale each.

`w[i, columns[c]] = value[c, i]`, shapes (rows, cols), (k,) and (k, rows).

Layer (format.md, 6.7): positions of the columns | values, column after column. Bytes: positions + 2 + 2 k rows, or
positions + 2 + k (2 + rows) with i8; less where brotli finds something.

Source: OWQ (arXiv:2306.02272). `rows` is the same class turned. Omitted: values under the shared tables, because i8
values scaled to their largest take nearly all of their eight bits.

>>> from bytecap.format.coders import Shared, run
>>> data = CODER.encode(np.array([1]), np.array([[5, 6]], np.float16), 3)
>>> run([CODER.apply(data, np.zeros((2, 3), np.float32), Shared())])[0].tolist()
[[0.0, 5.0, 0.0], [0.0, 6.0, 0.0]]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from bytecap.format.coders import Continuous, Decoding, FloatArray, Shared
from bytecap.format.wire.positions import (
    Kinds,
    count_positions,
    read_positions,
    read_values,
    split_values,
    tuned_values,
    write_positions,
    write_values,
)


class Columns:
    """Reader and writer of `columns` layers; `axis` 0 makes it rows."""

    id: ClassVar[str] = "columns"
    tag: ClassVar[int] = 32
    axis: ClassVar[int] = 1

    def encode(
        self,
        index: npt.NDArray[np.integer[Any]],
        values: npt.NDArray[Any],
        size: int,
        scales: npt.NDArray[np.float16] | None = None,
    ) -> bytes:
        """Encode an overlay.

        Args:
            index: rising positions (k,).
            values: float16 (k, length), or int8 with `scales`.
            size: number of columns (or rows) of the matrix.
            scales: float16 (k,).
        """
        return write_positions(index, size) + write_values(values, scales)

    def kinds(self, data: bytes, shape: tuple[int, int], dtype: str) -> Kinds:
        """Positions, two bytes of header, scales and values."""
        del dtype
        count, at = count_positions(data, 0, shape[self.axis])
        return (("index", at), *split_values(data, at, count))

    def apply(self, data: bytes, base: FloatArray, shared: Shared) -> Decoding:
        """Replace the protected columns (or rows)."""
        yield from ()
        index, at = read_positions(data, 0, base.shape[self.axis], shared.objects)
        length = base.shape[1 - self.axis]
        values = read_values(data, at, np.full(len(index), length)).reshape(len(index), length)
        if self.axis:
            base[:, index] = values.T
        else:
            base[index] = values
        return base

    def continuous(self, data: bytes, shape: tuple[int, int], shared: Shared) -> Continuous:
        """Return the protected values (k, length)."""
        index, at = read_positions(data, 0, shape[self.axis], shared.objects)
        length = shape[1 - self.axis]

        def matrix(arrays: Mapping[str, Any], base: Any) -> Any:
            out = base + 0
            if self.axis:
                out[:, index] = arrays["values"].T
            else:
                out[index] = arrays["values"]
            return out

        return tuned_values(data, at, np.full(len(index), length), matrix, (len(index), length))


CODER = Columns()
