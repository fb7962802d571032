"""A second decoder, written from `docs/format.md` alone; section numbers below are the document's.

It shares nothing with the package but the names of the errors, so that a mistake in either decoder or in the document
shows up as a difference. It needs only numpy, and brotli where that is used. Omitted: side files; writing.
"""

from __future__ import annotations

import json
import lzma
import struct
import zlib
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bytecap.errors import CorruptError, NotAnArtifact, VersionError

Array = npt.NDArray[Any]
_Coder = Generator[Any, list[Array], None]
_Shared = tuple[list["_Table | None"], Array]  # tables and offsets by class

_BITS, _TOTAL, _LOW = 14, 2**14, 2**16
_ESCAPE = -(2**31)  # stands for the escape; no symbol has this value
_Q = [float.fromhex(c) for c in ("0x1.000000p+0", "0x1.306fe0p+0", "0x1.6a09e6p+0", "0x1.ae89fap+0")]
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2"}
_DTYPES |= {"I8": "i1", "U8": "u1", "BOOL": "u1"}


def decode_file(data: bytes) -> dict[str, Array]:
    """Tensors of an artifact's bytes by name, aliases included, in stored layout; section 8 has the errors."""
    units, tables, bodies = _contents(data)
    shared = _read_tables(tables)
    batches: dict[int, list[tuple[_Unit, bytes]]] = {}
    ends = accumulate(max(prod(u.shape), 2**16) for u in units)  # small units cost tables and places
    for unit, body, end in zip(units, bodies, ends, strict=True):
        batches.setdefault(end // 2**25, []).append((unit, body))  # values decoded together
    values: dict[str, Array] = {}
    for batch in batches.values():
        for (unit, _), matrix in zip(batch, _decode_batch(batch, shared), strict=True):
            array = np.ascontiguousarray(matrix.T if unit.flags & 1 else matrix).reshape(unit.shape)
            values |= dict.fromkeys((unit.name, *unit.aliases), array)
    return values


def _require(condition: object, message: str) -> None:
    if not condition:
        raise CorruptError(message)


@contextmanager
def _damage(*errors: type[Exception]) -> Iterator[None]:
    try:
        yield
    except errors as error:
        raise CorruptError(f"damaged: {error}") from error


class _Reader:
    """Section 1: takes fields off the front of some bytes."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        _require(0 <= size <= len(self.data) - self.at, f"{size} bytes needed, {len(self.data) - self.at} are left")
        self.at += size
        return self.data[self.at - size : self.at]

    def rest(self) -> bytes:
        return self.take(len(self.data) - self.at)

    def fields(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def leb(self, most: int = 9) -> int:
        value = 0
        for i in range(most):
            byte = self.take(1)[0]
            value |= (byte & 127) << 7 * i
            if byte < 128:
                return value
        raise CorruptError(f"an integer has more than {most} bytes")

    def zigzag(self, most: int = 9) -> int:
        value = self.leb(most)
        return value // 2 if value % 2 == 0 else -(value + 1) // 2


def _lzma(section: bytes, lc: int, dictionary: int, limit: int) -> bytes:
    """A section that begins with a packing byte: 0 stored, 1 raw LZMA1."""
    _require(section[:1] in {b"\0", b"\1"}, "a section has an unknown packing")
    if section[0] == 0:
        return section[1:]
    parameters = {"id": lzma.FILTER_LZMA1, "dict_size": dictionary, "lc": lc, "lp": 0, "pb": 0}
    machine = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[parameters])
    with _damage(lzma.LZMAError):
        content = machine.decompress(section[1:], limit)
    _require(machine.eof and not machine.unused_data, "LZMA data does not end where it should")
    return content


def _sections(data: bytes) -> list[tuple[int, bytes]]:
    """Sections 2 and 3: kind and contents of every section, all checksums checked."""
    if data[:8] != b"\x89BCAP\r\n\x1a":
        raise NotAnArtifact("not a bytecap artifact")
    reader = _Reader(data)
    _, major, minor, reserved, length, size, checksum = reader.fields("<8sBBHIQI")
    if major > 1:
        raise VersionError(f"format version {major}.{minor}, this decoder knows 1.0")
    _require(size == len(data), f"the header says {size} bytes, the file has {len(data)}")
    directory = reader.take(length)
    _require(zlib.crc32(data[:24] + directory) == checksum, "the checksum of header and directory does not match")
    _require(major == 1 and reserved == 0, "version 0 or a reserved bit is in use")
    entries, sections = _Reader(directory), []
    for i in range(entries.leb()):
        kind, section = entries.take(1)[0], reader.take(entries.leb())
        _require(entries.fields("<I")[0] == zlib.crc32(section), f"the checksum of section {i} does not match")
        sections.append((kind, section))
    _require(not entries.rest() and not reader.rest(), "bytes are left over behind the last section")
    return sections


class _Unit(NamedTuple):  # section 4
    name: str
    shape: list[int]
    dtype: str
    coder: int
    flags: int
    aliases: list[str]

    def matrix(self) -> tuple[int, int]:
        """(rows, cols) as coders see them."""
        if len(self.shape) < 2:
            return 1, prod(self.shape)
        a, b = self.shape[0], prod(self.shape) // max(1, self.shape[0])
        return (b, a) if self.flags & 1 else (a, b)


def _matches(value: Any, schema: Any) -> bool:
    """Whether a JSON value has exactly these types; `[t]` is a list of any length, a tuple one of that length."""
    if isinstance(schema, type):
        return type(value) is schema
    wanted = schema if isinstance(schema, tuple) else schema * len(value) if type(value) is list else schema
    return type(value) is list and len(value) == len(wanted) and all(map(_matches, value, wanted))


def _contents(data: bytes) -> tuple[list[_Unit], bytes, list[bytes]]:
    """Units, tables section, and the units' sections."""
    sections = _sections(data)
    kinds = [kind for kind, _ in sections]
    _require(kinds[:1] == [1], "the first section is no index")
    with _damage(ValueError, RecursionError):
        index = json.loads(_lzma(sections[0][1], 4, 2**20, 2**26).decode())
        json.dumps(index, ensure_ascii=False, allow_nan=False).encode()  # refuses NaN, infinities, lone surrogates
    known = type(index) is dict and set(index) == {"about", "files", "units"}
    schema = (dict, [str], [(str, [int], str, int, int, [str])])
    _require(known and _matches([*map(index.get, ("about", "files", "units"))], schema), "the index is of wrong types")
    units, files = [_Unit(*entry) for entry in index["units"]], index["files"]
    for u in units:
        _require(len(u.shape) <= 32 and min(u.shape, default=0) >= 0 and 0 <= u.flags <= 3, f"{u} is out of range")
    names = [n for u in units for n in (u.name, *u.aliases)]
    _require(len(set(names)) == len(names) and len(set(files)) == len(files), "a name occurs twice")
    _require(not any(not f or f[0] == "." or set(f) & {"/", "\\", "\0"} for f in files), "a file's name is unsafe")
    declared = sum(prod(max(n, 1) for n in u.shape) for u in units)
    _require(declared <= 2**24 + 2048 * len(data), f"{declared} values are declared in {len(data)} bytes")
    tables, padding = kinds[1:2] == [2], kinds[-1] == 6
    expected = [1] + [2] * tables + [3] * len(units) + [4] * len(files) + [6] * padding
    _require(kinds == expected and not (padding and any(sections[-1][1])), "unexpected sections, or used padding")
    return units, sections[1][1] if tables else b"", [section for kind, section in sections if kind == 3]


class _Table:
    """Section 5.1: what each of the 2^14 slots means, `freq << 14 | slot - cum`, and the symbol."""

    def __init__(self, low: int, frequencies: Sequence[int], escape: int = _ESCAPE) -> None:
        freq = [*frequencies, _TOTAL - sum(frequencies)]
        _require(min(freq) >= 1, f"frequencies do not add up to {_TOTAL}")
        wide = np.array(freq)
        start = np.repeat(np.cumsum(wide) - wide, wide)
        self.entry = (np.repeat(wide << _BITS, wide) + np.arange(_TOTAL) - start).astype(np.uint32)
        self.symbol = np.repeat([*range(low, low + len(frequencies)), escape], wide).astype(np.int32)


class _Stream(NamedTuple):
    """Bytes of a stream, every symbol's class, and the table of every class."""

    data: bytes
    classes: Array
    tables: Sequence[_Table | None]

    def shape(self) -> tuple[int, int]:
        """Steps and lanes."""
        lanes = -(-len(self.classes) // 8192)
        return -(-len(self.classes) // max(1, lanes)), lanes


def _decode_streams(streams: Sequence[_Stream]) -> list[Array]:
    """Symbols of every stream; all lanes of all streams advance together, the longest lanes in front."""
    _require(all(len(s.classes) or not s.data for s in streams), "a stream of no symbols has bytes")
    results: list[Array] = [np.zeros(0, np.int32) for _ in streams]
    order = sorted((i for i, s in enumerate(streams) if len(s.classes)), key=lambda i: -streams[i].shape()[0])
    if not order:
        return results
    readers, shapes = [_Reader(streams[i].data) for i in order], [streams[i].shape() for i in order]
    counts = [reader.zigzag(6) for reader in readers]
    states = [np.frombuffer(r.take(4 * lanes), "<u4") for r, (_, lanes) in zip(readers, shapes, strict=True)]
    state = np.concatenate(states).astype(np.uint32)
    _require(state.min() >= _LOW, "a lane begins in an impossible state")
    words = [np.frombuffer(r.take(2 * n), "<u2") for r, n in zip(readers, counts, strict=True)]
    tables = [_Table(0, [], escape=0), *{id(t): t for i in order for t in streams[i].tables if t}.values()]
    begin, missing = {id(t): k << _BITS for k, t in enumerate(tables)}, 2**32 - 1
    places = np.zeros((shapes[0][0], len(state)), np.uint32)  # table of every symbol; 0 is the padding's
    ends = np.cumsum([lanes for _, lanes in shapes])
    views = [places[:steps, end - lanes : end] for (steps, lanes), end in zip(shapes, ends, strict=True)]
    for i, view in zip(order, views, strict=True):
        padded = np.zeros(view.size, np.uint32)
        begins = np.array([begin.get(id(t), missing) for t in streams[i].tables], np.uint32)
        padded[: len(streams[i].classes)] = begins.take(streams[i].classes)
        _require(int(padded.max()) != missing, "a stream uses a class without a table")
        view[:] = padded.reshape(view.shape)
    _advance(shapes, state, words, places, np.concatenate([t.entry for t in tables]))
    symbols = np.concatenate([t.symbol for t in tables])
    for i, view, reader in zip(order, views, readers, strict=True):
        results[i] = symbols.take(view.reshape(-1)[: len(streams[i].classes)])
        escaped = np.flatnonzero(results[i] == _ESCAPE)
        values = [reader.zigzag() for _ in escaped]
        _require(not reader.rest() and all(abs(v) < 2**31 for v in values), "escaped symbols are damaged")
        results[i][escaped] = values
    return results


def _advance(shapes: list[tuple[int, int]], state: Array, words: list[Array], places: Array, entries: Array) -> None:
    """Decode every lane; turns the beginnings of tables in `places` into slots of the joined tables."""
    lanes = [k for _, k in shapes]
    owner = np.repeat(np.arange(len(shapes)), lanes)
    live = len(state) - np.cumsum(np.bincount(np.repeat([t for t, _ in shapes], lanes)))
    sizes = np.array([len(w) for w in words])
    begin = np.cumsum(sizes) - sizes
    pool = np.append(np.concatenate(words), 0).astype(np.uint32)
    taken, ramp = np.zeros(len(shapes), np.int64), np.arange(len(state))
    mask, bits, sixteen = np.uint32(_TOTAL - 1), np.uint32(_BITS), np.uint32(16)
    for row, count in zip(places, live, strict=False):
        x, slot = state[:count], row[:count]
        slot += x & mask
        entry = entries.take(slot)
        x >>= bits
        x *= entry >> bits
        x += entry & mask
        need = np.flatnonzero(x < _LOW)
        stream = owner[need]
        used = np.bincount(stream, minlength=len(taken))
        at = (begin + taken - np.cumsum(used) + used)[stream] + ramp[: len(need)]
        x[need] = x[need] << sixteen | pool.take(at, mode="clip")
        taken += used
    _require((taken == sizes).all() and (state == _LOW).all(), "a stream does not end in its final state")


def _read_tables(section: bytes) -> _Shared:
    """Section 5.2: tables by class, and offsets (64, 17) by class and size."""
    tables: list[_Table | None] = [None]
    offset = np.zeros((64, 17), np.float32)
    reader = _Reader(_lzma(section, 3, 2**16, 2**20) if section else b"")
    while reader.at < len(reader.data):
        served, half, first = reader.leb(), reader.leb(), len(tables)
        _require(1 <= served <= 64 - first and half <= 1023, "the tables section has too many classes or symbols")
        sizes = [reader.leb() for _ in range(half + 1)]
        stored = np.frombuffer(reader.take(min(half, 16)), np.int8) / np.float32(256)
        tables += [_Table(-half, sizes[:0:-1] + sizes)] * served
        offset[first : first + served, 1:] = np.pad(stored, (0, 16 - len(stored)), "edge") if half else 0
    return tables + [None] * (64 - len(tables)), offset


def _decode_batch(batch: list[tuple[_Unit, bytes]], shared: _Shared) -> list[Array]:
    """Section 6. Every coder asks for streams twice (side information, payload), then gives the matrix."""
    coders = {1: _grid, 2: _vector, 3: _exact, 4: _packed}
    _require(all(unit.coder in coders for unit, _ in batch), "a unit names a coder that does not exist")
    running = [coders[unit.coder](unit, _Reader(body), shared) for unit, body in batch]
    asked = [next(r) for r in running]
    for _ in range(2):
        symbols = iter(_decode_streams([stream for part in asked for stream in part]))
        asked = [r.send([next(symbols) for _ in part]) for r, part in zip(running, asked, strict=True)]
    return asked


def _finite(values: Array) -> Array:
    _require(np.isfinite(values).all(), "a value is not finite")
    return values


def _q(k: Array) -> Any:
    return np.ldexp(np.array(_Q, np.float32)[k % 4], (k // 4).astype(np.int32))


def _grid(unit: _Unit, reader: _Reader, shared: _Shared) -> _Coder:
    """6.1: symbols with a step for every column and every row."""
    (rows, cols), (tables, offset) = unit.matrix(), shared
    groups, c, *pairs = reader.fields("<Bf" + 4 * "bB")
    _require(1 <= groups <= min(4, max(1, rows)), f"{groups} groups of {rows} rows")
    _require(np.isfinite(c) and c > 0 and max(pairs[1::2]) <= 63, "the step or a class is out of range")
    sides = list(zip((groups * cols, groups * cols, rows, rows), pairs[::2], pairs[1::2], strict=True))
    classes = [np.full(size if k else 0, k, np.uint8) for size, _, k in sides]
    (coded,) = yield [_Stream(reader.take(reader.leb()), np.concatenate(classes), tables)]
    arrays = []
    for (size, base, k), most in zip(sides, (500, 1000, 500, 1000), strict=True):
        part, coded = (coded[:size], coded[size:]) if k else (np.zeros(size), coded)
        arrays.append(part.astype(np.int64) + base)
        _require(np.abs(arrays[-1]).max(initial=0) <= most, "a step or spread is out of range")
    column_step, column_spread = (a.reshape(groups, cols) for a in arrays[:2])
    row_step, row_spread = arrays[2:]
    run = np.repeat(np.arange(groups), [rows // groups + (g < rows % groups) for g in range(groups)])
    column, row = (column_spread - column_step + 20).astype(np.int16), (row_spread - row_step).astype(np.int16)
    weight_class = np.clip(column[run] + row[:, None], 1, 63).astype(np.uint8)
    (symbols,) = yield [_Stream(reader.rest(), weight_class.reshape(-1), tables)]
    z = symbols.reshape(rows, cols)
    size = np.abs(z)
    v = size.astype(np.float32)
    v -= offset.reshape(-1).take(weight_class.astype(np.int32) * 17 + np.minimum(size, 16))
    np.negative(v, out=v, where=z < 0)
    with np.errstate(over="ignore", invalid="ignore"):
        v *= _q(row_step)[:, None]
        v *= (np.float32(c) * _q(column_step))[run]
    yield _finite(v)


def _vector(unit: _Unit, reader: _Reader, shared: _Shared) -> _Coder:
    """6.2: one step around a centre."""
    yield []
    centre, step, k = reader.fields("<ffB")
    _require(np.isfinite(centre) and np.isfinite(step) and k <= 63, "a vector's header is out of range")
    count = prod(unit.shape)
    (symbols,) = yield [_Stream(reader.rest(), np.full(count if k else 0, k, np.uint8), shared[0])]
    z = symbols if k else np.zeros(count, np.int32)
    with np.errstate(over="ignore"):
        yield _finite(np.float32(centre) + np.float32(step) * z.astype(np.float32)).reshape(unit.matrix())


def _exact(unit: _Unit, reader: _Reader, _shared: _Shared) -> _Coder:
    """6.3: byte planes, most significant first."""
    yield []
    _require(unit.dtype in _DTYPES, f"there is no dtype {unit.dtype}")
    kind, count = np.dtype(_DTYPES[unit.dtype]), prod(unit.shape)
    planes, streams = list[Array | None](), list[_Stream]()
    for _ in range(kind.itemsize if count else 0):
        mode = reader.take(1)[0]
        _require(mode < 2, f"there is no mode {mode}")
        planes.append(None if mode else np.frombuffer(reader.take(count), np.uint8))
        if mode:
            low, m = reader.leb(), reader.leb()
            _require(m >= 1 and low + m <= 256, "a plane has symbols that are no bytes")
            table = _Table(low, [reader.leb() for _ in range(m)])
            streams.append(_Stream(reader.take(reader.leb()), np.ones(count, np.uint8), [None, table]))
    _require(not reader.rest(), "bytes are left over behind the last plane")
    symbols = yield streams
    _require(all(s.min() >= 0 and s.max() <= 255 for s in symbols), "a symbol is no byte")
    raw = np.zeros((count, kind.itemsize), np.uint8)
    for i, plane in enumerate(reversed(planes)):
        raw[:, i] = symbols.pop() if plane is None else plane
    values = raw.view(kind).reshape(unit.matrix())
    _require(unit.dtype != "BOOL" or values.max(initial=0) <= 1, "a truth value is neither 0 nor 1")
    if unit.dtype == "BF16":
        values = (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    yield values.astype({"F16": np.dtype(np.float32), "BOOL": np.dtype(bool)}.get(unit.dtype, values.dtype))


def _expand(compression: int, data: bytes, size: int) -> bytes:
    """Exactly `size` bytes of zlib or brotli data."""
    if compression == 0:
        inflate = zlib.decompressobj()
        with _damage(zlib.error):
            out = inflate.decompress(data, size + 1)
        ended = inflate.eof and not inflate.unused_data
    else:
        import brotli

        machine = brotli.Decompressor()
        with _damage(brotli.error):
            out = chunk = machine.process(data, output_buffer_limit=size + 1)
            while chunk and len(out) <= size and not machine.is_finished():
                out += (chunk := machine.process(b"", output_buffer_limit=size + 1))
        ended = machine.is_finished()
    _require(ended and len(out) == size, f"compressed data is not exactly {size} bytes")
    return out


def _packed(unit: _Unit, reader: _Reader, _shared: _Shared) -> _Coder:
    """6.4: integer codes and a scale for every row under a general-purpose compressor."""
    yield []
    (rows, cols), (compression, width) = unit.matrix(), reader.fields("<BB")
    _require(compression < 2 and width in {1, 2}, f"compression {compression}, width {width}")
    scales = np.frombuffer(_expand(compression, reader.take(reader.leb()), 2 * rows), "<f2")
    planes = np.frombuffer(_expand(compression, reader.rest(), width * rows * cols), np.int8)
    low, high = np.split(planes.reshape(width, cols, rows).astype(np.int32), [1])
    yield []
    yield (low[0] + 256 * high.sum(0)).T.astype(np.float32) * _finite(scales).astype(np.float32)[:, None]
