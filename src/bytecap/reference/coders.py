"""Section 6: grid, vector, exact and packed."""

from __future__ import annotations

import zlib
from collections.abc import Generator
from math import prod
from typing import Any, NamedTuple

import numpy as np

from bytecap.reference.container import Reader, Unit, damage, require
from bytecap.reference.streams import Array, Shared, Stream, Table

Coder = Generator[Any, list[Array], Array]  # yields lists of streams, is sent their symbols, returns the matrix

_Q = [float.fromhex(c) for c in ("0x1.000000p+0", "0x1.306fe0p+0", "0x1.6a09e6p+0", "0x1.ae89fap+0")]
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2"}
_DTYPES |= {"I8": "i1", "U8": "u1", "BOOL": "u1"}


def finite(values: Array) -> Array:
    """Section 6: the values, all of which must be finite."""
    require(np.isfinite(values).all(), "a value is not finite")
    return values


def quarter(k: Array) -> Any:
    """`q(k)` of section 6."""
    return np.ldexp(np.array(_Q, np.float32)[k % 4], (k // 4).astype(np.int32))


class Sides(NamedTuple):
    """The data in front of the payloads of `grid` and `trellis`: the group of every row, then the four arrays."""

    run: Array
    c: float
    column_step: Array
    column: Array
    row_step: Array
    row: Array
    own: tuple[int, ...]


def read_sides(unit: Unit, reader: Reader, shared: Shared, own: str = "") -> Generator[Any, list[Array], Sides]:
    """6.1 and 6.15: header and side arrays; `own` is the layout of fields of the coder's own."""
    (rows, cols), tables = unit.matrix(), shared[0]
    groups, c, *pairs = reader.fields("<Bf" + 4 * "bB")
    fields = reader.fields("<" + own)
    require(1 <= groups <= min(4, max(1, rows)), f"{groups} groups of {rows} rows")
    require(np.isfinite(c) and c > 0 and max(pairs[1::2]) <= 63, "the step or a class is out of range")
    sides = list(zip((groups * cols, groups * cols, rows, rows), pairs[::2], pairs[1::2], strict=True))
    classes = [np.full(size if k else 0, k, np.uint8) for size, _, k in sides]
    (coded,) = yield [Stream(reader.take(reader.leb()), np.concatenate(classes), tables)]
    arrays = []
    for (size, base, k), most in zip(sides, (500, 1000, 500, 1000), strict=True):
        part, coded = (coded[:size], coded[size:]) if k else (np.zeros(size), coded)
        arrays.append(part.astype(np.int64) + base)
        require(np.abs(arrays[-1]).max(initial=0) <= most, "a step or spread is out of range")
    column_step, column_spread = (a.reshape(groups, cols) for a in arrays[:2])
    row_step, row_spread = arrays[2:]
    run = np.repeat(np.arange(groups), [rows // groups + (g < rows % groups) for g in range(groups)])
    column, row = (column_spread - column_step + 20).astype(np.int16), (row_spread - row_step).astype(np.int16)
    return Sides(run, c, column_step, column, row_step, row, fields)


def grid(unit: Unit, reader: Reader, shared: Shared) -> Coder:
    """6.1: `grid`, symbols with a step for every column and every row."""
    side = yield from read_sides(unit, reader, shared)
    weight_class = np.clip(side.column[side.run] + side.row[:, None], 1, 63).astype(np.uint8)
    (symbols,) = yield [Stream(reader.rest(), weight_class.reshape(-1), shared[0])]
    z = symbols.reshape(unit.matrix())
    size = np.abs(z)
    v = size.astype(np.float32)
    v -= shared[1].reshape(-1).take(weight_class.astype(np.int32) * 17 + np.minimum(size, 16))
    np.negative(v, out=v, where=z < 0)
    return scaled(v, side)


def scaled(v: Array, side: Sides) -> Array:
    """6.1: multiply by the row's step, then by the column's, as the last lines of the arithmetic say."""
    with np.errstate(over="ignore", invalid="ignore"):
        v *= quarter(side.row_step)[:, None]
        v *= (np.float32(side.c) * quarter(side.column_step))[side.run]
    return finite(v)


def vector(unit: Unit, reader: Reader, shared: Shared) -> Coder:
    """6.2: `vector`, one step around a centre."""
    centre, step, k = reader.fields("<ffB")
    require(np.isfinite(centre) and np.isfinite(step) and k <= 63, "a vector's header is out of range")
    count = prod(unit.shape)
    (symbols,) = yield [Stream(reader.rest(), np.full(count if k else 0, k, np.uint8), shared[0])]
    z = symbols if k else np.zeros(count, np.int32)
    with np.errstate(over="ignore"):
        return finite(np.float32(centre) + np.float32(step) * z.astype(np.float32)).reshape(unit.matrix())


def exact(unit: Unit, reader: Reader, _shared: Shared) -> Coder:
    """6.3: `exact`, byte planes with the most significant first."""
    require(unit.dtype in _DTYPES, f"there is no dtype {unit.dtype}")
    kind, count = np.dtype(_DTYPES[unit.dtype]), prod(unit.shape)
    planes, streams = list[Array | None](), list[Stream]()
    for _ in range(kind.itemsize if count else 0):
        mode = reader.take(1)[0]
        require(mode < 2, f"there is no mode {mode}")
        planes.append(None if mode else np.frombuffer(reader.take(count), np.uint8))
        if mode:
            low, m = reader.leb(), reader.leb()
            require(m >= 1 and low + m <= 256, "a plane has symbols that are no bytes")
            table = Table(low, [reader.leb() for _ in range(m)])
            streams.append(Stream(reader.take(reader.leb()), np.ones(count, np.uint8), [None, table]))
    require(not reader.rest(), "bytes are left over behind the last plane")
    symbols = yield streams
    require(all(s.min() >= 0 and s.max() <= 255 for s in symbols), "a symbol is no byte")
    raw = np.zeros((count, kind.itemsize), np.uint8)
    for i, plane in enumerate(reversed(planes)):
        raw[:, i] = symbols.pop() if plane is None else plane
    values = raw.view(kind).reshape(unit.matrix())
    require(unit.dtype != "BOOL" or values.max(initial=0) <= 1, "a truth value is neither 0 nor 1")
    if unit.dtype == "BF16":
        values = (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype({"F16": np.dtype(np.float32), "BOOL": np.dtype(bool)}.get(unit.dtype, values.dtype))


def expand(compression: int, data: bytes, size: int) -> bytes:
    """6.4: exactly `size` bytes of zlib or brotli data."""
    if compression == 0:
        inflate = zlib.decompressobj()
        with damage(zlib.error):
            out = inflate.decompress(data, size + 1)
        ended = inflate.eof and not inflate.unused_data
    else:
        import brotli

        machine = brotli.Decompressor()
        with damage(brotli.error):
            out = chunk = machine.process(data, output_buffer_limit=size + 1)
            while chunk and len(out) <= size and not machine.is_finished():
                out += (chunk := machine.process(b"", output_buffer_limit=size + 1))
        ended = machine.is_finished()
    require(ended and len(out) == size, f"compressed data is not exactly {size} bytes")
    return out


def packed(unit: Unit, reader: Reader, _shared: Shared) -> Coder:
    """6.4: `packed`, integer codes and a scale for every row under a general-purpose compressor."""
    yield from ()
    (rows, cols), (compression, width) = unit.matrix(), reader.fields("<BB")
    require(compression < 2 and width in {1, 2}, f"compression {compression}, width {width}")
    scales = np.frombuffer(expand(compression, reader.take(reader.leb()), 2 * rows), "<f2")
    planes = np.frombuffer(expand(compression, reader.rest(), width * rows * cols), np.int8)
    low, high = np.split(planes.reshape(width, cols, rows).astype(np.int32), [1])
    values: Array = (low[0] + 256 * high.sum(0)).T.astype(np.float32)
    return values * finite(scales).astype(np.float32)[:, None]
