"""The overlay `channels` protects the same channels as columns, as rows, or as both, with one list of positions.

A channel of the residual stream is a column of every matrix that reads it and a row of every matrix that writes it;
square matrices between two such streams (attention projections) may need both.

`w[i, index[c]] = value` for the rows `i` that are not protected themselves, then `w[index[c]] = value`. Crossings are
stored once, with the rows.

Layer (format.md, 6.12): mode u8 (1 columns, 2 rows, 3 both) | positions, below the smaller of the sides in use |
values: the columns, then the rows. Bytes: 1 + positions + 2 + (2 or 1) * k * (sides' lengths) + 2 per i8 vector.

Matrices that see the same stream may name one list that the file stores once (`format/wire/shared_objects.py`): a row
of one tensor and the column of its partner then cost three bytes of index each.
Sources: OWQ (arXiv:2306.02272) for columns; LLM.int8() (arXiv:2208.07339) for channels that persist across layers.

>>> from bytecap.format.coders import Shared, run
>>> data = CODER.encode(BOTH, np.array([1]), np.array([5, 6, 7], np.float16), (2, 2))
>>> run([CODER.apply(data, np.zeros((2, 2), np.float32), Shared())])[0].tolist()
[[0.0, 5.0], [6.0, 7.0]]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from bytecap.errors import CorruptError
from bytecap.format.coders import Continuous, Decoding, FloatArray, Shared
from bytecap.format.wire.positions import (
    IntArray,
    Kinds,
    count_positions,
    read_positions,
    read_values,
    split_values,
    take,
    tuned_values,
    write_positions,
    write_values,
)

COLUMNS, ROWS, BOTH = 1, 2, 3


def lengths(mode: int, count: int, shape: tuple[int, int]) -> IntArray:
    """Return the lengths of an overlay's vectors, those of columns before those of rows."""
    rows, cols = shape
    columns = np.full(count if mode & COLUMNS else 0, rows - (count if mode == BOTH else 0))
    return np.concatenate([columns, np.full(count if mode & ROWS else 0, cols)]).astype(np.int64)


def places(mode: int, shape: tuple[int, int]) -> int:
    """Return the number of channels that a matrix (rows, cols) has."""
    return {COLUMNS: shape[1], ROWS: shape[0], BOTH: min(shape)}[mode]


class Channels:
    """Reader and writer of `channels` layers."""

    id: ClassVar[str] = "channels"
    tag: ClassVar[int] = 37

    def encode(
        self,
        mode: int,
        index: npt.NDArray[np.integer[Any]],
        values: npt.NDArray[Any],
        shape: tuple[int, int],
        scales: npt.NDArray[np.float16] | None = None,
    ) -> bytes:
        """Encode an overlay: all vectors' values (see `lengths`) as float16, or as int8 with a scale per vector."""
        return bytes([mode]) + write_positions(index, places(mode, shape)) + write_values(values, scales)

    def mode(self, data: bytes) -> int:
        """Return the sides that an overlay protects."""
        mode = take(data, 0, 1)[0]
        if mode not in (COLUMNS, ROWS, BOTH):
            raise CorruptError(f"a channels layer has the unknown mode {mode}")
        return mode

    def kinds(self, data: bytes, shape: tuple[int, int], dtype: str) -> Kinds:
        """Mode, positions, two bytes of header, scales and values."""
        del dtype
        mode = self.mode(data)
        count, at = count_positions(data, 1, places(mode, shape))
        vectors = len(lengths(mode, count, shape))
        return (("header", 1), ("index", at - 1), *split_values(data, at, vectors))

    def apply(self, data: bytes, base: FloatArray, shared: Shared) -> Decoding:
        """Replace the protected channels."""
        yield from ()
        shape, mode = (base.shape[0], base.shape[1]), self.mode(data)
        index, at = read_positions(data, 1, places(mode, shape), shared.objects)
        sizes = lengths(mode, len(index), shape)
        values = read_values(data, at, sizes)
        inner = int(sizes[: len(index)].sum()) if mode & COLUMNS else 0
        if mode & COLUMNS:
            others = np.delete(np.arange(shape[0]), index if mode == BOTH else [])
            base[np.ix_(others, index)] = values[:inner].reshape(len(index), len(others)).T
        if mode & ROWS:
            base[index] = values[inner:].reshape(len(index), shape[1])
        return base

    def continuous(self, data: bytes, shape: tuple[int, int], shared: Shared) -> Continuous:
        """Return the protected values, those of columns first."""
        mode = self.mode(data)
        index, at = read_positions(data, 1, places(mode, shape), shared.objects)
        sizes = lengths(mode, len(index), shape)
        inner = int(sizes[: len(index)].sum()) if mode & COLUMNS else 0
        others = np.delete(np.arange(shape[0]), index if mode == BOTH else [])

        def matrix(arrays: Mapping[str, Any], base: Any) -> Any:
            out, values = base + 0, arrays["values"]
            if mode & COLUMNS:
                out[others[:, None], index[None, :]] = values[:inner].reshape(len(index), len(others)).T
            if mode & ROWS:
                out[index] = values[inner:].reshape(len(index), shape[1])
            return out

        return tuned_values(data, at, sizes, matrix)


CODER = Channels()
