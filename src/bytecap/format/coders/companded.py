"""`companded` stores codes behind a compander, with a width for each pair of row set and column, as Radio does.

Rows are dealt to sets; a *group* is one set's weights in one column. A weight decodes, in float32, as::

    w = offset[group] + scale[group] * level(B, code)

where B is the group's depth, 0 to 8, and `level` undoes a Laplace cube-root compander in the middle of a code::

    level(B, code) = -+ 3 / sqrt(2) * ln(2^B / (2 m + 1)),    m = min(code, 2^B - 1 - code), minus in the lower half

rounded to float32: the code is uniform in `1/2 (1 + sign(v) (1 - exp(-sqrt(2) |v| / 3)))`, v the weight in units of
its scale. A group of depth 0 has neither scale nor codes, its weights decode to the offset.

Section (format.md, 6.14): coded u8 | LEB128 sets | LEB128 length of what follows up to the codes | integers: set of
every row | integers: depths | halves: offsets | halves: scales of groups of depth > 0 | integers: codes, row after row.

Source: Young, Radio (arXiv:2505.03031). Omitted: codes anywhere but in the middle of their cell.

>>> [float(levels(2)[i]) for i in range(4)] == [-float(levels(2)[3 - i]) for i in range(4)]
True
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from bytecap.errors import CorruptError
from bytecap.format.coders import Decoding, FloatArray, Shared, leb, read_leb
from bytecap.format.wire.integers import MAX_WIDTH, Halves, Integers, write_halves, write_integers

MAX_SETS = 256
_DEPTH_BITS = 4


@dataclass(frozen=True)
class CompandedCode:
    """A matrix (rows, cols) as `companded` stores it.

    Attributes:
        sets: set of every row, integers (rows,) in `0 .. count - 1`.
        depths: bits of a code, integers (count, cols) from 0 to 8.
        offsets: float16 (count, cols), finite (float32 when decoded).
        scales: as offsets; not stored where the depth is 0.
        codes: integers (rows, cols) in `0 .. 2^depth - 1`.
    """

    sets: npt.NDArray[np.integer[Any]]
    depths: npt.NDArray[np.integer[Any]]
    offsets: npt.NDArray[np.floating[Any]]
    scales: npt.NDArray[np.floating[Any]]
    codes: npt.NDArray[np.integer[Any]]


@cache
def levels(depth: int) -> FloatArray:
    """Values of all codes of a depth in units of the scale, float32 (2^depth,)."""
    if depth == 0:
        return np.zeros(1, np.float32)
    half = np.arange(1 << (depth - 1))
    size = 3 / np.sqrt(2.0) * np.log((1 << depth) / (2 * half + 1.0))
    return np.concatenate([-size, size[::-1]]).astype(np.float32)


def _joined() -> tuple[FloatArray, npt.NDArray[np.int32]]:
    """Concatenate the levels of all depths; returns them and the start of each."""
    parts = [levels(depth) for depth in range(MAX_WIDTH + 1)]
    return np.concatenate(parts), np.cumsum([0, *map(len, parts[:-1])]).astype(np.int32)


def dequantize(code: CompandedCode) -> FloatArray:
    """Decode to float32 (rows, cols) in the format's arithmetic."""
    table, begin = _joined()
    index = begin[code.depths][code.sets]
    index += code.codes.astype(np.int32)
    values: FloatArray = table.take(index)
    values *= code.scales.astype(np.float32)[code.sets]
    values += code.offsets.astype(np.float32)[code.sets]
    return values


def _bits(count: int) -> int:
    """Return the bits of a number below `count`."""
    return (count - 1).bit_length()


class Companded:
    """Reader and writer of `companded` sections."""

    id: ClassVar[str] = "companded"
    tag: ClassVar[int] = 11

    def encode(self, code: CompandedCode, *, coded: bool, estimate: bool = False) -> bytes:
        """Encode a section, as published or entropy coded; with `estimate` only its length is meaningful."""
        count = len(code.depths)
        depths = code.depths.astype(np.uint8)
        how = {"coded": coded, "estimate": estimate}
        side = b"".join(
            [
                write_integers(code.sets, np.full(len(code.sets), _bits(count), np.uint8), **how),
                write_integers(depths.reshape(-1), np.full(depths.size, _DEPTH_BITS, np.uint8), **how),
                write_halves(code.offsets.reshape(-1).astype(np.float16), **how),
                write_halves(code.scales[depths > 0].astype(np.float16), **how),
            ]
        )
        codes = write_integers(code.codes.reshape(-1), depths[code.sets].reshape(-1), **how)
        return bytes([coded]) + leb(count) + leb(len(side)) + side + codes

    def _head(self, data: bytes, shape: tuple[int, int]) -> tuple[bool, int, int, int]:
        """Read the head: (entropy coded, row sets, header bytes, bytes of side information)."""
        if not data or data[0] > 1:
            raise CorruptError(f"a companded section begins with {data[:1].hex() or 'nothing'}")
        count, at = read_leb(data, 1)
        if not 1 <= count <= min(MAX_SETS, max(1, shape[0])):
            raise CorruptError(f"a companded section deals {shape[0]} rows to {count} sets")
        length, at = read_leb(data, at)
        if length > len(data) - at:
            raise CorruptError(f"a companded section declares {length} bytes of groups, {len(data) - at} are left")
        return bool(data[0]), count, at, length

    def kinds(self, data: bytes, shape: tuple[int, int], dtype: str) -> tuple[tuple[str, int], ...]:
        """Header, side information of rows and groups, codes."""
        del dtype
        _, _, head, side = self._head(data, shape)
        return (("header", head), ("side", side), ("payload", len(data) - head - side))

    def decode(self, data: bytes, shape: tuple[int, int], dtype: str, shared: Shared) -> Decoding:
        """Decode to float32 (rows, cols)."""
        del dtype, shared
        (rows, cols), (coded, count, at, length) = shape, self._head(data, shape)
        side, body = data[at : at + length], data[at + length :]
        block, end = Integers.parse(side, 0, np.full(rows, _bits(count), np.uint8), coded=coded)
        sets = yield from block.decode()
        block, end = Integers.parse(side, end, np.full(count * cols, _DEPTH_BITS, np.uint8), coded=coded)
        depths = (yield from block.decode()).reshape(count, cols)
        if sets.max(initial=0) >= count or depths.max(initial=0) > MAX_WIDTH:
            raise CorruptError("a companded section has a row set or a depth out of range")
        halves, end = Halves.parse(side, end, count * cols, coded=coded)
        offsets = (yield from halves.decode()).reshape(count, cols)
        halves, end = Halves.parse(side, end, int(np.count_nonzero(depths)), coded=coded)
        scales = np.zeros((count, cols), np.float32)
        scales[depths > 0] = yield from halves.decode()
        widths = depths.astype(np.uint8)[sets].reshape(-1)
        block, used = Integers.parse(body, 0, widths, coded=coded)
        if end != len(side) or used != len(body):
            raise CorruptError("a companded section has bytes left over")
        codes = (yield from block.decode()).reshape(shape)
        return dequantize(CompandedCode(sets, depths, offsets, scales, codes))


CODER = Companded()
