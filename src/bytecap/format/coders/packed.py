"""`packed` stores integer codes and one fp16 scale per row with a general-purpose compressor, for the baselines.

The coder of `--method golf` (brotli-11) and `--method uniform` (zlib-9): the layout that people use today, kept
in the same container so that a comparison counts the same bytes. A weight decodes, in float32, as::

    w = scale[row] * code

Section (format.md, 6.4): compression u8 (0 zlib, 1 brotli) | width u8 | LEB128 length of the packed scales |
packed scales | packed codes. Scales are fp16, low byte first. Codes are stored column by column; width 1 is one
signed byte per code, width 2 is two planes, low signed bytes before high signed bytes, `code = low + 256 * high`,
so that a few outliers cost a few bytes and not a second byte for every code.

Measured on two trained language models at 3.5 bits per weight, where raw scales are 1.5 to 3% of a section: scales
packed by themselves are a third smaller than raw, and smaller than packed together with the codes. Codes by
columns are 0.2 to 0.9% smaller than by rows under brotli: columns differ in spread, and rows hardly do once
divided by their scale.

Brotli's search for repeats finds little in codes. Of 3.1 MB of an embedding table at 3.5 bits quality 11 makes
1,356,325 bytes with a window of 2^24 bytes, in 10.8 s, and 1,351,824 in 6.3 s with one of 2^16, where frequencies are
looked at anew more often; quality 10 takes 3.6 s for 1,351,539. At finer steps it is 1,708,562, 1,707,056 and
1,706,974. Below 4 MiB it stays quality 11 and the wide window: time is no matter there.

Omitted: entropy coding fitted to the weights. That is what the `grid` coder is for.

>>> section = CODER.encode(Quantized(np.array([[1, -2]]), np.array([0.5], np.float16)), BROTLI)
>>> from bytecap.format.coders import run
>>> run([CODER.decode(section, (1, 2), "F32", Shared())])[0].tolist()
[[0.5, -1.0]]
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any, ClassVar

import brotli
import numpy as np
import numpy.typing as npt

from bytecap.errors import CorruptError
from bytecap.format.coders import Decoding, Shared, leb, read_leb

ZLIB, BROTLI = 0, 1
MAX_CODE = 127 + 256 * 127  # largest code two bytes hold on both sides
_HEAD = 2
_STEP = 1 << 20  # bytes a decompressor may return at a time
_LARGE = 1 << 22  # bytes from which on brotli searches a short window, and one time less


@dataclass(frozen=True)
class Quantized:
    """A matrix as integers.

    Attributes:
        codes: integers (rows, cols), at most `MAX_CODE` in size.
        scales: float16 (rows,), finite.
    """

    codes: npt.NDArray[np.integer[Any]]
    scales: npt.NDArray[np.float16]


def dequantize(matrix: Quantized) -> npt.NDArray[np.float32]:
    """Decode to float32 (rows, cols) in the format's arithmetic."""
    values: npt.NDArray[np.float32] = matrix.codes.astype(np.float32)
    values *= matrix.scales.astype(np.float32)[:, None]
    return np.ascontiguousarray(values)


def planes(codes: npt.NDArray[np.integer[Any]]) -> tuple[int, bytes]:
    """Return (bytes per code, codes as bytes)."""
    wide = np.ascontiguousarray(codes.T, np.int32)
    if wide.size and int(np.abs(wide).max()) > MAX_CODE:
        raise ValueError(f"codes beyond {MAX_CODE} do not fit two bytes")
    low = wide.astype(np.int8)  # wraps around, which the high plane makes up for
    high = ((wide - low) // 256).astype(np.int8)
    return (2, low.tobytes() + high.tobytes()) if high.any() else (1, low.tobytes())


def compress(data: bytes, compression: int, whole: int = 0) -> bytes:
    """Compress bytes with `ZLIB` (level 9) or `BROTLI` (quality 11, of large data 10).

    Args:
        data: any bytes.
        compression: how.
        whole: length of the data that these bytes are a piece of, to compress them as all of it would be.
    """
    if compression == BROTLI:
        quality, window = (10, 16) if max(len(data), whole) > _LARGE else (11, 24)
        return bytes(brotli.compress(data, quality=quality, lgwin=window))
    return zlib.compress(data, 9)


def expand_brotli(data: bytes, size: int) -> bytes:
    """Decompress brotli data to exactly `size` bytes, never holding much more."""
    machine = brotli.Decompressor()
    out = bytearray()
    try:
        chunk = machine.process(data, output_buffer_limit=_STEP)
        while chunk:  # an unfinished machine may accept input and still hold output: ask until none comes
            out += chunk
            if len(out) > size:
                raise CorruptError(f"packed data expands beyond the {size} bytes that it should hold")
            if machine.is_finished():
                break
            chunk = machine.process(b"", output_buffer_limit=_STEP)
    except brotli.error as exc:
        raise CorruptError(f"packed data is not valid brotli: {exc}") from exc
    if not machine.is_finished() or len(out) != size:
        raise CorruptError(f"packed data expands to {len(out)} bytes, not to {size}")
    return bytes(out)


def _expand_zlib(data: bytes, size: int) -> bytes:
    """Decompress zlib data to exactly `size` bytes, never holding more than one more."""
    machine = zlib.decompressobj()
    try:
        out = machine.decompress(data, size + 1)  # a limit of 0 would mean none
    except zlib.error as exc:
        raise CorruptError(f"a packed section is not valid zlib: {exc}") from exc
    if not machine.eof or machine.unused_data or len(out) != size:
        raise CorruptError(f"a packed section does not hold exactly the {size} bytes of its codes")
    return out


class Packed:
    """Reader and writer of `packed` sections."""

    id: ClassVar[str] = "packed"
    tag: ClassVar[int] = 4

    def encode(self, matrix: Quantized, compression: int) -> bytes:
        """Encode a section with `ZLIB` (level 9) or `BROTLI` (see `compress`)."""
        if matrix.codes.shape[:1] != matrix.scales.shape or not np.isfinite(matrix.scales).all():
            raise ValueError("a packed matrix needs one finite scale for every row")
        width, raw = planes(matrix.codes)
        side = compress(matrix.scales.astype("<f2").tobytes(), compression)
        return bytes([compression, width]) + leb(len(side)) + side + compress(raw, compression)

    def _parse(self, data: bytes) -> tuple[int, int, int, bytes, bytes]:
        """Split a section into (compression, width, header bytes, packed scales, packed codes)."""
        if len(data) < _HEAD:
            raise CorruptError(f"a packed section of {len(data)} bytes is shorter than its header")
        compression, width = data[0], data[1]
        if compression not in (ZLIB, BROTLI) or width not in (1, 2):
            raise CorruptError(f"a packed section declares compression {compression} and {width} bytes per code")
        length, at = read_leb(data, _HEAD)
        if length > len(data) - at:
            raise CorruptError(f"a packed section declares {length} bytes of scales, {len(data) - at} are left")
        return compression, width, at, data[at : at + length], data[at + length :]

    def kinds(self, data: bytes, shape: tuple[int, int], dtype: str) -> tuple[tuple[str, int], ...]:
        """Header, packed row scales and packed codes of a section."""
        del shape, dtype
        _, _, at, side, body = self._parse(data)
        return (("header", at), ("side", len(side)), ("payload", len(body)))

    def decode(self, data: bytes, shape: tuple[int, int], dtype: str, shared: Shared) -> Decoding:
        """Decode to float32 (rows, cols); a generator that asks for no stream."""
        del dtype, shared
        yield from ()
        rows, cols = shape
        compression, width, _, side, body = self._parse(data)
        expand = expand_brotli if compression == BROTLI else _expand_zlib
        scales = np.frombuffer(expand(side, 2 * rows), "<f2")
        if not np.isfinite(scales).all():
            raise CorruptError("a packed section holds a scale that is not finite")
        planes = np.frombuffer(expand(body, rows * cols * width), np.int8).reshape(width, cols, rows)
        codes = planes[0].astype(np.int32)
        if width == 2:
            codes += 256 * planes[1].astype(np.int32)
        return dequantize(Quantized(codes.T, scales))


CODER = Packed()
