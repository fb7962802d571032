"""`grid` stores a matrix as entropy-coded integers, with a step per column and per row.

A weight is stored as an integer `z` and decoded, in float32 and in this order, as::

    w = (sign(z) * (|z| - offset[class, |z|]) * row_step) * (c * column_step)

Steps are powers `2^(k/4)`; `offset` is shared by the whole file. The class of a weight, which selects its
frequency table and its offset, is the sum of a row's and a column's, so symbols are coded with what the
decoder already knows about their spread. Bit width plays no role: integers are unbounded.

Section (format.md, 6.1): groups u8 | c f32 | four side arrays' (base i8, class u8) | LEB128 length of the side
stream | side stream | payload stream. The side arrays are column step, column spread, row step and row spread,
in quarter octaves; an array whose class is 0 is constant.

Sources: WaterSIC (arXiv:2603.04956) for the per-column step; Radio (arXiv:2505.03031) for slope allocation.
The encoder's search is in `bytecap.quantization`.
"""

from __future__ import annotations

import struct
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from bytecap.errors import CorruptError
from bytecap.format.coders import Decoding, Encoded, Shared, encoding, leb, read_leb
from bytecap.format.coders.classes import CENTRES, CLASSES, OCTAVE, UNIT_CLASS, quarter
from bytecap.format.coders.direct import Direct
from bytecap.format.entropy import jit
from bytecap.format.entropy.frequencies import Tables
from bytecap.format.entropy.rans import Source, Stream, check_room, encode_all
from bytecap.system.slabs import slabs

IntArray = npt.NDArray[np.integer[Any]]
_HEAD = struct.Struct("<Bf8B")
_MAX_GROUPS = 4
_MAX_STEP, _MAX_SPREAD = 500, 1000  # quarter octaves
_CACHED = 2**16  # values dequantized together
_FEW = 2**12  # distance of the largest from the smallest value up to which every integer between gets a counter


@dataclass(frozen=True)
class GridCode:
    """All values that a section stores, before entropy coding.

    Attributes:
        step: c.
        symbols: (rows, cols).
        column_step: (groups, cols), quarter octaves.
        column_class: (groups, cols).
        row_step: (rows,), quarter octaves.
        row_class: (rows,), added to the column's class.
        first: columns of this class and above are dependent (`bytecap.format.coders.trellis`); CLASSES if none is.
        memory: bits of a trellis' state, 3 to 8.
    """

    step: float
    symbols: IntArray
    column_step: IntArray
    column_class: IntArray
    row_step: IntArray
    row_class: IntArray
    first: int = CLASSES
    memory: int = 3

    @property
    def fine(self) -> npt.NDArray[np.bool_]:
        """Mask (groups, cols) of the dependent columns, which lie on a grid of half the step."""
        found: npt.NDArray[np.bool_] = self.column_class >= self.first
        return found

    def classes(self) -> npt.NDArray[np.uint8]:
        """Class of every weight (rows, cols), in steps of the grid it lies on."""
        return weight_classes(self.column_class, self.row_class, self.fine)

    def side_arrays(self) -> list[IntArray]:
        """The four stored arrays; spreads are absolute (class plus step), which varies less."""
        return [
            self.column_step.reshape(-1), (self.column_class + self.column_step - UNIT_CLASS).reshape(-1),
            self.row_step, self.row_class + self.row_step,
        ]  # fmt: skip


def weight_classes(
    column_class: IntArray, row_class: IntArray, fine: npt.NDArray[np.bool_] | None = None
) -> npt.NDArray[np.uint8]:
    """Compute the class of every weight (rows, cols) from those of columns (groups, cols) and rows (rows,).

    Where `fine` (groups, cols) holds, the grid has half the step: an octave more, and at least 5.
    """
    octaves = np.zeros(column_class.shape, np.int16) if fine is None else fine * np.int16(OCTAVE)
    found = np.empty((len(row_class), column_class.shape[1]), np.uint8)
    groups = (np.array_split(a, len(column_class)) for a in (row_class.astype(np.int16), found))
    for columns, more, rows, out in zip(column_class.astype(np.int16), octaves, *groups, strict=True):
        for part in slabs(*out.shape):
            out[part] = np.clip(rows[part, None] + (columns + more)[None, :], 1 + more, CLASSES - 1)
    return found


def choose_class(values: IntArray, tables: Tables) -> tuple[int, int, float]:
    """Choose the (base, class, bits) that store an array in the fewest bits; a constant array has class 0."""
    base = min(127, max(-128, _middle(values))) if len(values) else 0
    if len(values) == 0 or bool((values == base).all()):
        return base, 0, 0.0
    return base, *tables.cheapest(*_counted(values - base))


def _middle(values: IntArray) -> int:
    """Compute the median, towards zero: numpy's own takes ten times as long for arrays as short as these.

    >>> _middle(np.array([-4, 9, -1])), _middle(np.array([-4, -1]))
    (-1, -2)
    """
    low, high = (len(values) - 1) // 2, len(values) // 2
    ends = np.partition(values, (low, high))
    return int((int(ends[low]) + int(ends[high])) / 2)


def _counted(values: IntArray) -> tuple[IntArray, IntArray]:
    """Return the distinct values, rising, and how often each occurs."""
    low = int(values.min())
    if int(values.max()) - low > _FEW:
        return np.unique(values, return_counts=True)
    counts = np.bincount(values.astype(np.int64) - low)
    found = np.flatnonzero(counts)
    return found + low, counts[found]


@dataclass(frozen=True)
class Head:
    """The head of a section, which precedes its payload.

    Attributes:
        groups, step: see `GridCode`.
        pairs: (base, class) of the four side arrays.
        extra: bytes behind the pairs that only some coders have.
        side, rest: the side stream, and everything behind it, which is not copied.
        at: bytes in front of the side stream.
    """

    groups: int
    step: float
    pairs: list[tuple[int, int]]
    extra: bytes
    side: bytes
    rest: memoryview
    at: int


def _chosen(code: GridCode, tables: Tables) -> list[tuple[IntArray, int, int]]:
    """(array, base, class) of the side arrays."""
    return [(a, *choose_class(a, tables)[:2]) for a in code.side_arrays()]


def write_sides(code: GridCode, tables: Tables) -> Source:
    """Return the symbols of the side stream."""
    coded = [(a - base, np.full(len(a), cls, np.uint8)) for a, base, cls in _chosen(code, tables) if cls]
    empty = np.zeros(0, np.int64)
    side = [np.concatenate([x[i] for x in coded]) if coded else empty for i in range(2)]
    return Source(side[0], side[1], tables)


def write_head(code: GridCode, tables: Tables, extra: bytes, side: bytes) -> bytes:
    """Serialise the bytes that precede the side stream."""
    flat = [v for _, base, cls in _chosen(code, tables) for v in (base & 255, cls)]
    return _HEAD.pack(len(code.column_step), code.step, *flat) + extra + leb(len(side))


def read_head(data: bytes, shape: tuple[int, int], extra: int) -> Head:
    """Split a section with `extra` bytes of its own behind the pairs."""
    if len(data) < _HEAD.size + extra:
        raise CorruptError(f"a grid section of {len(data)} bytes is shorter than its header")
    groups, step, *flat = _HEAD.unpack_from(data)
    if not 1 <= groups <= min(_MAX_GROUPS, max(1, shape[0])):
        raise CorruptError(f"a grid section declares {groups} groups for {shape[0]} rows")
    if not (np.isfinite(step) and step > 0):
        raise CorruptError(f"a grid section declares the step {step}")
    length, at = read_leb(data, _HEAD.size + extra)
    if length > len(data) - at:
        raise CorruptError(f"a grid section declares {length} bytes of side information, {len(data) - at} are left")
    pairs = [(base - 256 if base > 127 else base, cls) for base, cls in zip(flat[::2], flat[1::2], strict=True)]
    if any(cls >= CLASSES for _, cls in pairs):
        raise CorruptError("a grid section names a class above 63")
    own = data[_HEAD.size : _HEAD.size + extra]
    return Head(groups, step, pairs, own, data[at : at + length], memoryview(data)[at + length :], at)


Sides = Generator[list[Stream], list[npt.NDArray[np.int32]], tuple[IntArray, IntArray, IntArray, IntArray]]


def read_sides(head: Head, shape: tuple[int, int], tables: Tables) -> Sides:
    """Read the steps and classes of columns (groups, cols) and of rows (rows,)."""
    rows, cols = shape
    sizes = [head.groups * cols, head.groups * cols, rows, rows]
    check_room(len(head.side), sum(n for n, (_, cls) in zip(sizes, head.pairs, strict=True) if cls))
    check_room(len(head.rest), rows * cols)
    classes = np.concatenate(
        [np.full(n if cls else 0, cls, np.uint8) for n, (_, cls) in zip(sizes, head.pairs, strict=True)]
    )
    (residual,) = yield [Stream(head.side, classes, tables)]
    arrays, at = [], 0
    for n, (base, cls) in zip(sizes, head.pairs, strict=True):
        arrays.append(residual[at : at + n].astype(np.int64) + base if cls else np.full(n, base, np.int64))
        at += n if cls else 0
    column_step, column_spread, row_step, row_spread = arrays
    for steps, spreads in ((column_step, column_spread), (row_step, row_spread)):
        if np.abs(steps).max(initial=0) > _MAX_STEP or np.abs(spreads).max(initial=0) > _MAX_SPREAD:
            raise CorruptError("a grid section holds a step or a spread out of range")
    column_class = (column_spread - column_step + UNIT_CLASS).reshape(head.groups, cols)
    return column_step.reshape(head.groups, cols), column_class, row_step, row_spread - row_step


def side_bits(code: GridCode, tables: Tables) -> float:
    """Estimate the bits of header and side information."""
    bits = 8.0 * (_HEAD.size + 2 + 4 + 3 * 2)
    for a in code.side_arrays():
        bits += choose_class(a, tables)[2]
    return bits


class Grid:
    """Reader and writer of `grid` sections."""

    id: ClassVar[str] = "grid"
    tag: ClassVar[int] = 1

    def sources(self, code: GridCode, shared: Shared) -> list[Source]:
        """Side and payload streams of a section, for `encode_all` to code with those of other units."""
        classes = weight_classes(code.column_class, code.row_class)
        payload = Source(code.symbols.reshape(-1), classes.reshape(-1), shared.tables)
        return [write_sides(code, shared.tables), payload]

    def assemble(self, code: GridCode, shared: Shared, streams: Sequence[bytes]) -> Encoded:
        """Assemble a section from its coded streams."""
        side, payload = streams
        head = write_head(code, shared.tables, b"", side)
        return Encoded(head + side + payload, (("header", len(head)), ("side", len(side)), ("payload", len(payload))))

    def encode(self, code: GridCode, shared: Shared) -> Encoded:
        """Encode a section with the file's shared tables."""
        symbols = code.symbols  # once: they may be on another device
        if not encoding.served(symbols):
            return self.assemble(code, shared, encode_all(self.sources(code, shared)))
        (side,) = encode_all([write_sides(code, shared.tables)])
        return self.assemble(code, shared, [side, encoding.payload(code, symbols, shared.tables)])

    def kinds(self, data: bytes, shape: tuple[int, int], dtype: str) -> tuple[tuple[str, int], ...]:
        """Header, side information and payload of a section."""
        del dtype
        head = read_head(data, shape, 0)
        return (("header", head.at), ("side", len(head.side)), ("payload", len(head.rest)))

    def decode(self, data: bytes, shape: tuple[int, int], dtype: str, shared: Shared) -> Decoding:
        """Decode to float32 (rows, cols)."""
        del dtype
        head = read_head(data, shape, 0)
        column_step, column_class, row_step, row_class = yield from read_sides(head, shape, shared.tables)
        values = yield Direct(
            head.rest, shape, shared, column_class, np.zeros(column_class.shape, bool), row_class,
            np.float32(head.step) * quarter(column_step), quarter(row_step),
        )  # fmt: skip
        if isinstance(values, np.ndarray):
            return values
        weight_class = weight_classes(column_class, row_class)
        (symbols,) = yield [Stream(head.rest, weight_class.reshape(-1), shared.tables)]
        with np.errstate(over="ignore", invalid="ignore"):
            values = dequantize(
                symbols.reshape(shape), weight_class, np.float32(head.step), column_step, row_step, shared.offset
            )
        if not np.isfinite(values).all():
            raise CorruptError("a grid section holds a value out of range")
        return values


def dequantize(
    symbols: IntArray,
    classes: IntArray,
    step: np.float32,
    column_step: IntArray,
    row_step: IntArray,
    offset: npt.NDArray[np.float32],
    fine: npt.NDArray[np.bool_] | None = None,
) -> npt.NDArray[np.float32]:
    """Reconstruct weights (rows, cols) in the format's arithmetic, float32 throughout.

    Where `fine` (groups, cols) holds, symbols count half steps.
    """
    scales = step * quarter(column_step)  # (groups, cols)
    halves = np.where(np.zeros_like(column_step, bool) if fine is None else fine, np.float32(0.5), np.float32(1))
    rows = quarter(row_step)[:, None]
    value = np.empty(symbols.shape, np.float32)
    flat = offset.reshape(-1)
    high = max(1, _CACHED // max(1, symbols.shape[1]))
    loop = jit.kernel("values") if jit.worth(symbols.size) else None
    for run, scale, half in zip(np.array_split(np.arange(len(symbols)), len(scales)), scales, halves, strict=True):
        if loop is not None:
            part = slice(run[0], run[-1] + 1) if len(run) else slice(0, 0)
            loop(symbols[part], classes[part], half, scale, rows[part, 0], offset, value[part])
            continue
        for at in range(0, len(run), high):  # a block at a time stays in the processor's cache
            block = slice(run[at], run[min(at + high, len(run)) - 1] + 1)
            size = np.abs(symbols[block])
            index = np.minimum(size, CENTRES - 1)
            out = value[block]
            out[:] = size
            out *= half
            np.multiply(classes[block], CENTRES, out=size, casting="unsafe", dtype=np.int32)
            index += size
            out -= flat.take(index)
            np.negative(out, out=out, where=symbols[block] < 0)
            out *= rows[block]
            np.multiply(out, scale, out=out)
    return value


CODER = Grid()
