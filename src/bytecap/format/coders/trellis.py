"""`trellis`, the default coder of matrices, walks the grid of `grid` along a trellis down every column.

Columns whose spread class is at least `first` are *dependent*: their grid has half the step, and its points fall into
four subsets by their value modulo 4, of which only two may follow on any three points. A weight then takes one bit,
kept as it is because it cannot be predicted, that says which of the two, and an integer that says which point of the
subset, coded with the class's table restricted to that subset. The state is made of the last `memory` bits, three here
and four to eight in `bytecap.format.coders.long_trellis`, so a reader finds all subsets at once: the two bits of a
subset are parities of the path bits under `MASKS`. All other columns are coded as in `grid`.

Section (format.md, 6.15): as `grid`, with `first` u8 behind the side arrays' pairs, and LEB128 length and bits of the
path in front of the payload.
Bytes: (weights in dependent columns) / 8 more than `grid`, payload symbols two bits smaller there, and the grid may be
0.18 bit coarser at the same distortion, with 256 states 0.22 bit.

Source: Marcellin & Fischer 1990 (trellis coded quantization); JPEG 2000 part 2 for the eight-state trellis and its
subsets; the masks of more states were searched for least squared error (`benchmarks/trellises.py`). The encoder's
search for paths is in `bytecap.quantization.trellis`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from bytecap.errors import CorruptError
from bytecap.format.coders import Decoding, Encoded, Shared, encoding, leb, read_leb
from bytecap.format.coders.classes import CLASSES, quarter
from bytecap.format.coders.direct import Direct
from bytecap.format.coders.grid import (
    GridCode,
    Head,
    IntArray,
    dequantize,
    read_head,
    read_sides,
    weight_classes,
    write_head,
    write_sides,
)
from bytecap.format.entropy import jit
from bytecap.format.entropy.rans import Source, Stream, encode_all
from bytecap.format.wire.bits import check_bits, read_bits
from bytecap.system.slabs import slabs
from bytecap.types import Bytes

SHORT = 3  # memory of eight states
MASKS = {
    3: (0b10, 0b1101), 4: (0b10, 0b11001), 5: (0b1010, 0b110001), 6: (0b100010, 0b1010111),
    7: (0b1011110, 0b11110011), 8: (0b11011110, 0b111101101),
}  # fmt: skip
"""By memory: which of the last `memory + 1` path bits, the newest in bit 0, make up the two bits of a subset."""
_TABLE = np.array([1, 2, 3, 2], np.uint8) * np.uint8(CLASSES)  # which restriction of a class's table a subset uses
_LARGEST = 2**24
_SHARE = 8  # of a slab are coded together

Mask = npt.NDArray[np.bool_]


def _rows_of(groups: int, rows: int) -> npt.NDArray[np.int64]:
    """Return the group of every row."""
    return np.repeat(np.arange(groups), [len(p) for p in np.array_split(np.arange(rows), groups)])


def dependent(column_class: IntArray, first: int, rows: int) -> Mask:
    """Return a mask (rows, cols) of the weights in dependent columns, from classes (groups, cols)."""
    mask: Mask = (column_class >= first)[_rows_of(len(column_class), rows)]
    return mask


def subsets(bits: npt.NDArray[np.uint8], groups: int, memory: int = SHORT) -> npt.NDArray[np.uint8]:
    """Turn path bits (rows, cols) into the subset of every weight; each group's path begins in state 0."""
    low, high = MASKS[memory]
    found = np.zeros_like(bits)
    for part, out in zip(np.array_split(bits, groups), np.array_split(found, groups), strict=True):
        for back in range(memory + 1):
            place = (low >> back & 1) + 2 * (high >> back & 1)
            if place:
                out[back:] ^= part[: max(len(part) - back, 0)] * np.uint8(place)
    return found


@cache
def bit_by_state(memory: int) -> npt.NDArray[np.uint8]:
    """Return the path bit (states, 4) that leads from a state to a subset."""
    state, subset = np.ogrid[: 1 << memory, :4]
    past = np.array([(2 * s & MASKS[memory][1]).bit_count() & 1 for s in range(1 << memory)])
    bit: npt.NDArray[np.uint8] = (past[state] ^ subset >> 1).astype(np.uint8)
    return bit


def _bits(subsets: npt.NDArray[np.uint8], groups: int, memory: int = SHORT) -> npt.NDArray[np.uint8]:
    """Recover the path bits (rows, cols) from the subsets of the points."""
    loop = jit.kernel("path") if jit.worth(subsets.size) else _path
    bits = np.empty_like(subsets)
    for part, out in zip(np.array_split(subsets, groups), np.array_split(bits, groups), strict=True):
        loop(part, bit_by_state(memory), out)
    return bits


def _path(subsets: npt.NDArray[np.uint8], bit: npt.NDArray[np.uint8], bits: npt.NDArray[np.uint8]) -> None:
    """Compute `bytecap.format.entropy.kernels.path` in numpy, row by row."""
    state = np.zeros(subsets.shape[1], np.uint8)
    for r in range(len(subsets)):
        bits[r] = bit[state, subsets[r]]
        state = (state << 1 | bits[r]) & np.uint8(len(bit) - 1)


class Trellis:
    """Reader and writer of `trellis` sections."""

    id: ClassVar[str] = "trellis"
    tag: ClassVar[int] = 9
    own: ClassVar[int] = 1  # bytes behind the side arrays' pairs

    def sources(self, code: GridCode, shared: Shared) -> list[Source]:
        """Side and payload streams of a section."""
        stored = code.symbols
        symbols, classes = np.empty_like(stored), code.classes()
        mask = dependent(code.column_class, code.first, len(code.row_class))
        for part in slabs(len(stored), stored.shape[1], _SHARE):
            points = stored[part].astype(np.int32)
            subset = (points & 3).astype(np.uint8)
            classes[part] += np.where(mask[part], _TABLE[subset], 0).astype(np.uint8)
            turned = (np.where(subset == 3, -points, points) - _base(subset)) >> 2
            symbols[part] = np.where(mask[part], turned, points)
        payload = Source(symbols.reshape(-1), classes.reshape(-1), shared.tables.split)
        return [write_sides(code, shared.tables), payload]

    def assemble(self, code: GridCode, shared: Shared, streams: Sequence[bytes]) -> Encoded:
        """Assemble a section from its coded streams."""
        symbols = code.symbols
        mask = dependent(code.column_class, code.first, len(code.row_class))
        bits = _bits((symbols & symbols.dtype.type(3)).astype(np.uint8), len(code.column_class), code.memory)
        return self._joined(code, shared, np.packbits(bits[mask], bitorder="little").tobytes(), streams)

    def _joined(self, code: GridCode, shared: Shared, path: bytes, streams: Sequence[bytes]) -> Encoded:
        """Put a section together."""
        side, payload = streams
        head = write_head(code, shared.tables, self._extra(code), side)
        data = b"".join([head, side, leb(len(path)), path, payload])
        return Encoded(data, self.kinds(data, (len(code.row_class), code.column_class.shape[1]), ""))

    def encode(self, code: GridCode, shared: Shared) -> Encoded:
        """Encode a section with the file's shared tables."""
        symbols = code.symbols  # once: they may be on another device
        if not encoding.served(symbols):
            return self.assemble(code, shared, encode_all(self.sources(code, shared)))
        (side,) = encode_all([write_sides(code, shared.tables)])
        path = encoding.path(code, symbols, MASKS[code.memory][1])
        return self._joined(code, shared, path, [side, encoding.payload(code, symbols, shared.tables.split)])

    def _extra(self, code: GridCode) -> bytes:
        """Serialise what stands behind the side arrays' pairs."""
        return bytes([code.first])

    def _memory(self, head: Head) -> int:
        """Read the bits of a state."""
        del head
        return SHORT

    def _parse(self, data: bytes, shape: tuple[int, int]) -> tuple[Head, memoryview, memoryview]:
        """Split a section into head, path and payload."""
        head = read_head(data, shape, self.own)
        if not 1 <= head.extra[0] <= CLASSES:
            raise CorruptError(f"a trellis section declares {head.extra[0]} as its first dependent class")
        self._memory(head)
        length, at = read_leb(head.rest, 0)
        if length > len(head.rest) - at:
            raise CorruptError(f"a trellis section declares a path of {length} bytes, {len(head.rest) - at} are left")
        return head, head.rest[at : at + length], head.rest[at + length :]

    def kinds(self, data: bytes, shape: tuple[int, int], dtype: str) -> tuple[tuple[str, int], ...]:
        """Header, side information, path and payload of a section."""
        del dtype
        head, path, payload = self._parse(data, shape)
        length = len(head.rest) - len(path) - len(payload)
        return (
            ("header", head.at), ("side", len(head.side)), ("path header", length), ("path payload", len(path)),
            ("payload", len(payload)),
        )  # fmt: skip

    def decode(self, data: bytes, shape: tuple[int, int], dtype: str, shared: Shared) -> Decoding:
        """Decode to float32 (rows, cols)."""
        del dtype
        head, path, payload = self._parse(data, shape)
        first = head.extra[0]
        tables = shared.tables.split
        column_step, column_class, row_step, row_class = yield from read_sides(head, shape, shared.tables)
        fine = column_class >= first
        memory = self._memory(head)
        check_bits(path, int(fine.sum(1) @ np.bincount(_rows_of(head.groups, shape[0]), minlength=head.groups)))
        values = yield Direct(
            payload, shape, shared, column_class, fine, row_class,
            np.float32(head.step) * quarter(column_step), quarter(row_step), path, MASKS[memory], _LARGEST,
        )  # fmt: skip
        if isinstance(values, np.ndarray):
            return values
        bits = _read_path(path, fine[_rows_of(head.groups, shape[0])])
        classes = weight_classes(column_class, row_class, fine)
        subset = subsets(bits, head.groups, memory)
        used = _TABLE.take(subset)
        for part, dependent_column in zip(np.array_split(used, head.groups), fine, strict=True):
            np.multiply(part, dependent_column, out=part)
        used += classes
        (symbols,) = yield [Stream(payload, used.reshape(-1), tables)]
        if len(symbols) and max(int(symbols.max()), -int(symbols.min())) > _LARGEST:
            raise CorruptError("a trellis section holds a symbol out of range")
        points = _points(symbols.reshape(shape), subset, fine)
        with np.errstate(over="ignore", invalid="ignore"):
            values = dequantize(points, classes, np.float32(head.step), column_step, row_step, shared.offset, fine)
        if not np.isfinite(values).all():
            raise CorruptError("a trellis section holds a value out of range")
        return values


def _read_path(path: Bytes, mask: Mask) -> npt.NDArray[np.uint8]:
    """Read the path bits (rows, cols), which are 0 where a weight is not dependent."""
    count = int(mask.sum())
    bits = read_bits(path, count)
    if count == mask.size:
        return bits.reshape(mask.shape)
    spread = np.zeros(mask.shape, np.uint8)
    spread[mask] = bits
    return spread


def _points(symbols: npt.NDArray[np.int32], subset: npt.NDArray[np.uint8], fine: Mask) -> npt.NDArray[np.int32]:
    """Turn symbols into points of the grid, in place."""
    base = _base(np.arange(4, dtype=np.uint8))
    sign = np.array([1, 1, 1, -1], np.int32)
    loop = jit.kernel("points") if jit.worth(symbols.size) else None
    for part, own, at in zip(np.array_split(symbols, len(fine)), fine, np.array_split(subset, len(fine)), strict=True):
        if loop is not None:
            loop(part, at, own, base, sign)
        elif own.all():
            np.left_shift(part, 2, out=part)
            np.add(part, base.take(at), out=part)
            np.multiply(part, sign.take(at), out=part)
        else:
            np.copyto(part, ((part << 2) + base.take(at)) * sign.take(at), where=own[None, :])
    return symbols


def _base(subset: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
    """Remainder of a point modulo 4; subset 3 takes that of its mirror image, since it shares subset 1's table."""
    return np.array([0, 1, 2, 1], np.int32)[subset]


CODER = Trellis()
