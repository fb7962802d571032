"""`exact` stores values without loss in their source dtype, as byte planes with an entropy-coding table each.

Floating-point weights have predictable exponents and noisy mantissas; split into byte planes, the first kind
codes well and the second is stored raw. Used for tensors no metric exists for, for vectors whose exact value
is cheap, and for whole models when the budget allows it. Omitted: prediction from neighbouring values.

Section (format.md, 6.3), for every plane from the most significant byte on: mode u8 (0 raw, 1 coded); raw planes
are followed by rows x cols bytes; coded ones by LEB128 lowest symbol, LEB128 number of symbols, that many
LEB128 frequencies, LEB128 stream length, stream. The escape's frequency is what is missing to 2^14.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from bytecap.errors import CorruptError
from bytecap.format.coders import Decoding, Shared, leb, read_frequencies, read_leb
from bytecap.format.entropy.frequencies import Table, Tables, integer_frequencies
from bytecap.format.entropy.rans import Stream, encode

_NUMPY = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1",
    "BOOL": "?",
}  # fmt: skip
WIDTH = {name: np.dtype(kind).itemsize for name, kind in _NUMPY.items()} | {"BF16": 2}


def to_bytes(values: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.uint8]:
    """Return the little-endian bytes (n, width) of values in a dtype."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, "<f4").view("<u4").reshape(-1)
        return (bits >> 16).astype("<u2").view(np.uint8).reshape(-1, 2)
    return np.ascontiguousarray(values, _NUMPY[dtype]).reshape(-1, 1).view(np.uint8).reshape(-1, WIDTH[dtype])


def from_bytes(data: npt.NDArray[np.uint8], dtype: str) -> npt.NDArray[Any]:
    """Read values from little-endian bytes (n, width); 16-bit floats widen to float32."""
    data = np.ascontiguousarray(data)
    if dtype == "BF16":
        return (data.view("<u2").astype("<u4") << 16).view("<f4").reshape(-1)
    values = data.view(_NUMPY[dtype]).reshape(-1)
    return values.astype(np.float32) if dtype == "F16" else values


def is_lossless(values: npt.NDArray[Any], dtype: str) -> bool:
    """Return whether a dtype holds every value exactly."""
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype not in WIDTH:
            return False
        held = from_bytes(to_bytes(values, dtype), dtype)
        return bool(np.array_equal(held, values.reshape(-1), equal_nan=values.dtype.kind == "f"))


class Exact:
    """Reader and writer of `exact` sections."""

    id: ClassVar[str] = "exact"
    tag: ClassVar[int] = 3

    def encode(self, matrix: npt.NDArray[Any], dtype: str) -> bytes:
        """Encode a section; `dtype` must hold every value of `matrix` exactly."""
        planes = to_bytes(matrix, dtype)[:, ::-1].T
        return b"".join(self._encode_plane(np.ascontiguousarray(p)) for p in planes) if planes.size else b""

    def _encode_plane(self, plane: npt.NDArray[np.uint8]) -> bytes:
        counts = np.bincount(plane, minlength=256)
        low, high = int(plane.min()), int(plane.max())
        freq = integer_frequencies(np.append(counts[low : high + 1], 0.0))
        table = Tables({1: Table(low, freq)})
        stream = encode(plane.astype(np.int32), np.ones(len(plane), np.uint8), table)
        coded = leb(low) + leb(high - low + 1) + b"".join(leb(int(f)) for f in freq[:-1]) + leb(len(stream)) + stream
        return b"\x01" + coded if len(coded) < len(plane) else b"\x00" + plane.tobytes()

    def _planes(self, data: bytes, count: int, dtype: str) -> Iterator[tuple[int, Table | None, bytes]]:
        """Split a section into (header bytes, table or None, body) of every plane."""
        if dtype not in WIDTH:
            raise CorruptError(f"an exact section has the unknown dtype {dtype!r}")
        at = 0
        for _ in range(WIDTH[dtype] if count else 0):
            start = at
            mode = data[at] if at < len(data) else 255
            at += 1
            table = None
            length = count
            if mode == 1:
                low, at = read_leb(data, at)
                size, at = read_leb(data, at)
                if low + size > 256 or size < 1:
                    raise CorruptError(f"an exact section declares {size} byte values from {low}")
                table, at = read_frequencies(data, at, low, size, "an exact section")
                length, at = read_leb(data, at)
            elif mode != 0:
                raise CorruptError(f"an exact section has a plane of mode {mode}")
            if length > len(data) - at:
                raise CorruptError(f"an exact section is truncated: {length} bytes needed, {len(data) - at} left")
            yield at - start, table, data[at : at + length]
            at += length
        if at != len(data):
            raise CorruptError(f"an exact section has {len(data) - at} bytes left over")

    def kinds(self, data: bytes, shape: tuple[int, int], dtype: str) -> tuple[tuple[str, int], ...]:
        """Mode bytes and tables are `table`, the rest is payload."""
        found: list[tuple[str, int]] = []
        for head, table, body in self._planes(data, shape[0] * shape[1], dtype):
            found += [("table" if table is not None else "header", head), ("payload", len(body))]
        return tuple(found)

    def decode(self, data: bytes, shape: tuple[int, int], dtype: str, shared: Shared) -> Decoding:
        """Decode to (rows, cols): float32, or the integer or float64 dtype itself."""
        del shared
        count = shape[0] * shape[1]
        planes = list(self._planes(data, count, dtype))
        ones = np.ones(count, np.uint8)
        symbols = iter(
            (yield [Stream(body, ones, Tables({1: table})) for _, table, body in planes if table is not None])
        )
        columns = [np.frombuffer(body, np.uint8) if table is None else next(symbols) for _, table, body in planes]
        merged = np.zeros((count, WIDTH[dtype]), np.uint8)
        for i, column in enumerate(reversed(columns)):
            if column.min(initial=0) < 0 or column.max(initial=0) > 255:
                raise CorruptError("an exact section holds a byte out of range")
            merged[:, i] = column
        if dtype == "BOOL" and merged.max(initial=0) > 1:
            raise CorruptError("an exact section holds a truth value that is neither 0 nor 1")
        return from_bytes(merged, dtype).reshape(shape)


CODER = Exact()
