"""The overlay `outliers` replaces single weights of the base's matrix by finely stored ones.

The irregular control of the structured paths: any weight may be protected, and its position must be paid for, about
`1.5 + log2(n / k)` bits for `k` of `n`.

`w[position] = value`, positions numbering the weights row after row; values are f16, or i8 with one scale for all.

Layer (format.md, 6.9): positions | values. Bytes: positions + 2 + 2 k, or positions + 4 + k with i8.
Sources: SpQR (arXiv:2306.03078), SqueezeLLM (arXiv:2306.07629).

>>> from bytecap.format.coders import Shared, run
>>> data = CODER.encode(np.array([0, 3]), np.array([1.5, -2], np.float16), 4)
>>> run([CODER.apply(data, np.zeros((2, 2), np.float32), Shared())])[0].tolist()
[[1.5, 0.0], [0.0, -2.0]]
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


class Outliers:
    """Reader and writer of `outliers` layers."""

    id: ClassVar[str] = "outliers"
    tag: ClassVar[int] = 34

    def encode(
        self,
        positions: npt.NDArray[np.integer[Any]],
        values: npt.NDArray[Any],
        size: int,
        scale: npt.NDArray[np.float16] | None = None,
    ) -> bytes:
        """Encode an overlay over `size` weights: values (k,) as float16, or as int8 with `scale` (1,)."""
        return write_positions(positions, size) + write_values(values, scale)

    def kinds(self, data: bytes, shape: tuple[int, int], dtype: str) -> Kinds:
        """Positions, two bytes of header, the scale and values."""
        del dtype
        _, at = count_positions(data, 0, shape[0] * shape[1])
        return (("index", at), *split_values(data, at, 1))

    def apply(self, data: bytes, base: FloatArray, shared: Shared) -> Decoding:
        """Replace the listed weights."""
        yield from ()
        positions, at = read_positions(data, 0, base.size, shared.objects)
        row, column = np.divmod(positions, max(base.shape[1], 1))
        base[row, column] = read_values(data, at, np.array([len(positions)]))
        return base

    def continuous(self, data: bytes, shape: tuple[int, int], shared: Shared) -> Continuous:
        """Return the protected values (k,)."""
        positions, at = read_positions(data, 0, shape[0] * shape[1], shared.objects)
        row, column = np.divmod(positions, max(shape[1], 1))

        def matrix(arrays: Mapping[str, Any], base: Any) -> Any:
            out = base + 0
            out[row, column] = arrays["values"]
            return out

        return tuned_values(data, at, np.array([len(positions)]), matrix)


CODER = Outliers()
