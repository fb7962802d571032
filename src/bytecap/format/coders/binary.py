"""`binary` stores signs or trits times a scale for each row, as trained 1-bit weights need it.

`w = mean + scale[row] * s` in float32, the product first; `s` is -1 or 1 (2 levels), or -1, 0 or 1 (3 levels). The
mean is absent, one number, or one for each row. Codes are packed (8 signs or 5 trits a byte) or entropy coded with a
table of their own, whichever is shorter.

Section (format.md, 6.18): levels u8 (2, 3) | means u8 (0 none, 1 one, 2 rows) | packing u8 (0 packed, 1 coded) |
scales f16 | means f16 | codes.
Source: the storage form of pQuant's 1-bit branch (arXiv:2602.22592): `sign(W - mean) * mean|W|`; ternary after
BitNet b1.58. Its narrow 8-bit branch is a layer over this coder. Omitted: training, which is what makes 1 bit work.

>>> section = CODER.encode(binarize(np.array([[3.0, -1.0, 2.0, -2.0]], np.float32)))
>>> from bytecap.format.coders import run
>>> run([CODER.decode(section, (1, 4), "F32", Shared())])[0].tolist()
[[2.0, -2.0, 2.0, -2.0]]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from bytecap.errors import CorruptError
from bytecap.format.coders import Decoding, FloatArray, Shared, leb, read_frequencies
from bytecap.format.entropy.frequencies import IntArray, Table, Tables, integer_frequencies
from bytecap.format.entropy.rans import Stream, encode
from bytecap.format.wire.bits import pack_bits, packed_size, unpack_bits

_HEAD = 3
_TRITS = 5  # in a byte: 3^5 = 243
NO_MEAN, ONE_MEAN, ROW_MEANS = 0, 1, 2


@dataclass(frozen=True)
class Binary:
    """A matrix of signs.

    Attributes:
        codes: (rows, cols), 0 or 1 (2 levels) or 0, 1 or 2 (3 levels).
        levels: 2 or 3.
        scales: float16 (rows,), finite.
        means: float16 (0,), (1,) or (rows,), finite.
        form: `NO_MEAN`, `ONE_MEAN` or `ROW_MEANS`.
    """

    codes: IntArray
    levels: int
    scales: npt.NDArray[np.float16]
    means: npt.NDArray[np.float16]
    form: int


def binarize(weight: FloatArray, levels: int = 2, form: int = NO_MEAN) -> Binary:
    """Round weights (rows, cols) to their nearest levels; scales are absolute means of rows.

    Three levels zero what is smaller than half the mean size, as absolute-mean ternary quantizers do; the scale is
    then the mean size of what is left, which has the least squared error for these codes.
    """
    wide = weight.astype(np.float64)
    means = {NO_MEAN: np.zeros(0), ONE_MEAN: wide.mean(keepdims=True).reshape(1), ROW_MEANS: wide.mean(1)}[form]
    means = np.nan_to_num(means).astype(np.float16)
    rest = wide - (means.astype(np.float64)[:, None] if form else 0.0)
    size = np.abs(rest)
    kept = np.ones(size.shape, bool) if levels == 2 else size > 0.5 * size.mean(1, keepdims=True, where=size >= 0)
    scales = (size * kept).sum(1) / np.maximum(kept.sum(1), 1)
    codes = (rest >= 0).astype(np.int64) if levels == 2 else np.sign(rest).astype(np.int64) * kept + 1
    return Binary(codes, levels, np.minimum(scales, np.finfo(np.float16).max).astype(np.float16), means, form)


def _pack(codes: IntArray, levels: int) -> bytes:
    flat = codes.reshape(-1).astype(np.int64)
    if levels == 2:
        return pack_bits(flat, 1)
    padded = np.append(flat, np.zeros(-len(flat) % _TRITS, np.int64)).reshape(-1, _TRITS)
    return (padded @ 3 ** np.arange(_TRITS)).astype(np.uint8).tobytes()


def _unpack(data: bytes, count: int, levels: int) -> npt.NDArray[np.int32]:
    if levels == 2:
        return unpack_bits(data, count, 1).astype(np.int32)
    if len(data) != -(-count // _TRITS):
        raise CorruptError(f"{count} trits are packed into {len(data)} bytes")
    raw = np.frombuffer(data, np.uint8).astype(np.int32)
    if raw.max(initial=0) >= 3**_TRITS:
        raise CorruptError(f"a byte of {_TRITS} trits is {raw.max()}")
    trits = (raw[:, None] // 3 ** np.arange(_TRITS, dtype=np.int32) % 3).reshape(-1)
    if trits[count:].any():
        raise CorruptError("the last byte of trits has some that belong to no weight")
    return trits[:count]


class BinaryCoder:
    """Reader and writer of `binary` sections."""

    id: ClassVar[str] = "binary"
    tag: ClassVar[int] = 8

    def encode(self, matrix: Binary) -> bytes:
        """Encode a section in the shorter packing."""
        flat = matrix.codes.reshape(-1).astype(np.int32)
        if matrix.scales.shape != matrix.codes.shape[:1] or not np.isfinite(matrix.scales).all():
            raise ValueError("a binary matrix needs one finite scale for every row")
        body, packing = _pack(flat, matrix.levels), 0
        if flat.size:
            freq = integer_frequencies(np.append(np.bincount(flat, minlength=matrix.levels), 0.0))
            stream = encode(flat, np.ones(len(flat), np.uint8), Tables({1: Table(0, freq)}))
            coded = b"".join(leb(int(f)) for f in freq[:-1]) + stream
            body, packing = (coded, 1) if len(coded) < len(body) else (body, 0)
        side = matrix.scales.astype("<f2").tobytes() + matrix.means.astype("<f2").tobytes()
        return bytes([matrix.levels, matrix.form, packing]) + side + body

    def _parse(self, data: bytes, shape: tuple[int, int]) -> tuple[int, int, Table | None]:
        """(end of scales and means, beginning of codes, table or None)."""
        if len(data) < _HEAD or data[0] not in (2, 3) or data[1] > ROW_MEANS or data[2] > 1:
            raise CorruptError(f"a binary section begins with {data[:_HEAD].hex()}")
        end = _HEAD + 2 * shape[0] + 2 * (0, 1, shape[0])[data[1]]
        if end > len(data):
            raise CorruptError(f"a binary section of {len(data)} bytes cannot hold {shape[0]} scales")
        if data[2] == 0:
            return end, end, None
        table, at = read_frequencies(data, end, 0, data[0], "a binary section")
        return end, at, table

    def kinds(self, data: bytes, shape: tuple[int, int], dtype: str) -> tuple[tuple[str, int], ...]:
        """Header, scales and means, table, codes."""
        del dtype
        end, at, _ = self._parse(data, shape)
        return (("header", _HEAD), ("side", end - _HEAD), ("table", at - end), ("payload", len(data) - at))

    def decode(self, data: bytes, shape: tuple[int, int], dtype: str, shared: Shared) -> Decoding:
        """Decode to float32 (rows, cols)."""
        del dtype, shared
        end, at, table = self._parse(data, shape)
        levels, form, count = data[0], data[1], shape[0] * shape[1]
        side = np.frombuffer(data[_HEAD:end], "<f2").astype(np.float32)
        if not np.isfinite(side).all():
            raise CorruptError("a binary section holds a scale or mean that is not finite")
        if table is None:
            codes = _unpack(data[at:], count, levels)
        else:
            (codes,) = yield [Stream(data[at:], np.ones(count, np.uint8), Tables({1: table}))]
            if codes.min(initial=0) < 0 or codes.max(initial=0) >= levels:
                raise CorruptError("a binary section holds a code out of range")
        signs = (2 * codes - 1 if levels == 2 else codes - 1).astype(np.float32).reshape(shape)
        values: FloatArray = signs * side[: shape[0], None]
        if form != NO_MEAN:
            values = values + side[shape[0] :, None]
        return values


CODER = BinaryCoder()


def packed_bytes(shape: tuple[int, int], levels: int) -> int:
    """Return the bytes that packed codes of a matrix (rows, cols) take."""
    count = shape[0] * shape[1]
    return packed_size(count, 1) if levels == 2 else -(-count // _TRITS)
