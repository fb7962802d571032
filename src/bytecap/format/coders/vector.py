"""`vector` stores norms, biases and tensors without a known input as entropy-coded steps around a centre.

`w = centre + step * z` in float32. One class for the whole tensor, chosen among the file's shared tables, so a
vector of 256 values costs about 13 bytes of header besides its integers.

Section (format.md, 6.2): centre f32 | step f32 | class u8 (0: every z is 0) | stream.
Omitted: error feedback, for which no second moment exists here.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from bytecap.errors import CorruptError
from bytecap.format.coders import Continuous, Decoding, Encoded, FloatArray, Shared, run
from bytecap.format.coders.classes import CLASSES
from bytecap.format.entropy.rans import Source, Stream, encode_all

_HEAD = struct.Struct("<ffB")


class Vector:
    """Reader and writer of `vector` sections."""

    id: ClassVar[str] = "vector"
    tag: ClassVar[int] = 2

    def quantize(self, values: npt.NDArray[np.float32], step: float) -> tuple[np.float32, npt.NDArray[np.int32]]:
        """Quantize values at a step; returns (centre, integers)."""
        flat = values.reshape(-1).astype(np.float64)
        centre = np.float32(np.median(flat)) if flat.size else np.float32(0)
        return centre, np.round((flat - float(centre)) / float(np.float32(step))).astype(np.int32)

    def dequantize(
        self, centre: np.float32, step: float, symbols: npt.NDArray[np.integer[Any]]
    ) -> npt.NDArray[np.float32]:
        """Decode integers in the format's arithmetic."""
        return np.float32(centre) + np.float32(step) * symbols.astype(np.float32)

    def best_class(self, symbols: npt.NDArray[np.int32], shared: Shared) -> tuple[int, float]:
        """Choose the (class, bits) that code integers in the fewest bits; all zeros have class 0."""
        if not symbols.any():
            return 0, 0.0
        return shared.tables.cheapest(*np.unique(symbols, return_counts=True))

    def rate(self, values: npt.NDArray[np.float32], step: float, shared: Shared) -> float:
        """Estimate the bytes of a section."""
        _, symbols = self.quantize(values, step)
        return _HEAD.size + (48 + self.best_class(symbols, shared)[1]) / 8

    def sources(self, values: npt.NDArray[np.float32], step: float, shared: Shared) -> list[Source]:
        """Return the one stream of a section."""
        _, symbols = self.quantize(values, step)
        cls, _ = self.best_class(symbols, shared)
        symbols = symbols[: len(symbols) if cls else 0]
        return [Source(symbols, np.full(len(symbols), cls, np.uint8), shared.tables)]

    def assemble(
        self, values: npt.NDArray[np.float32], step: float, shared: Shared, streams: Sequence[bytes]
    ) -> Encoded:
        """Assemble a section from its coded stream."""
        centre, symbols = self.quantize(values, step)
        head = _HEAD.pack(centre, step, self.best_class(symbols, shared)[0])
        return Encoded(head + streams[0], (("header", len(head)), ("payload", len(streams[0]))))

    def encode(self, values: npt.NDArray[np.float32], step: float, shared: Shared) -> Encoded:
        """Encode a section."""
        return self.assemble(values, step, shared, encode_all(self.sources(values, step, shared)))

    def kinds(self, data: bytes, shape: tuple[int, int], dtype: str) -> tuple[tuple[str, int], ...]:
        """Header and payload."""
        del shape, dtype
        return (("header", _HEAD.size), ("payload", len(data) - _HEAD.size))

    def decode(self, data: bytes, shape: tuple[int, int], dtype: str, shared: Shared) -> Decoding:
        """Decode to float32 (rows, cols)."""
        del dtype
        if len(data) < _HEAD.size:
            raise CorruptError(f"a vector section of {len(data)} bytes is shorter than its header")
        centre, step, cls = _HEAD.unpack_from(data)
        if not (np.isfinite(centre) and np.isfinite(step)) or cls >= CLASSES:
            raise CorruptError(f"a vector section declares centre {centre}, step {step}, class {cls}")
        count = shape[0] * shape[1]
        stream = Stream(data[_HEAD.size :], np.full(count if cls else 0, cls, np.uint8), shared.tables)
        (symbols,) = yield [stream]
        if not cls:
            symbols = np.zeros(count, np.int32)
        with np.errstate(over="ignore"):
            values = self.dequantize(np.float32(centre), step, symbols).reshape(shape)
        if not np.isfinite(values).all():
            raise CorruptError("a vector section holds a value out of range")
        return values

    def continuous(self, data: bytes, shape: tuple[int, int], shared: Shared) -> Continuous:
        """Return all values as continuous; the step stays."""
        _, step, cls = _HEAD.unpack_from(data)
        values = run([self.decode(data, shape, "F32", shared)])[0]

        def encode(arrays: Mapping[str, FloatArray]) -> bytes:
            return self.encode(arrays["values"], step, shared).data

        return Continuous({"values": values} if cls else {}, lambda a, _: a["values"], encode)


CODER = Vector()
