"""A second decoder, written from `docs/format.md` alone: what the document says, in the document's order.

It shares nothing with the package but the names of the errors, so that a mistake in either decoder or in the document
shows up as a difference. It needs numpy and the standard library, and brotli for the sections that use it. Section
numbers below are the document's. What it omits: side files are not unpacked, and nothing is ever written.
"""

from __future__ import annotations

import json
import lzma
import struct
import zlib
from collections.abc import Generator, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bytecap.errors import CorruptError, NotAnArtifact, VersionError

Array = npt.NDArray[Any]

_BATCH = 2**25  # values decoded together
_BITS, _LOW, _LANE = 14, 2**16, 8192
_ESCAPE = -(2**31)  # stands for the escape; no symbol has this value


def decode_file(data: bytes) -> dict[str, Array]:
    """Tensors of an artifact's bytes by name, aliases included, in stored layout.

    Raises:
        NotAnArtifact, VersionError, CorruptError: see section 8 of the document.
    """
    units, tables, bodies = _contents(data)
    shared = _Shared(tables)
    batches: dict[int, list[tuple[_Unit, bytes]]] = {}
    total = 0
    for unit, body in zip(units, bodies, strict=True):
        total += max(int(np.prod(unit.shape)), 2**16)  # small units cost tables and places
        batches.setdefault(total // _BATCH, []).append((unit, body))
    values: dict[str, Array] = {}
    for batch in batches.values():
        for (unit, _), matrix in zip(batch, _decode_batch(batch, shared), strict=True):
            array = np.ascontiguousarray(matrix.T if unit.flags & 1 else matrix).reshape(unit.shape)
            values |= dict.fromkeys((unit.name, *unit.aliases), array)
    return values




def _require(condition: object, message: str) -> None:
    if not condition:
        raise CorruptError(message)


class _Reader:
    """Takes fields off the front of some bytes."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def left(self) -> int:
        return len(self.data) - self.at

    def take(self, size: int) -> bytes:
        _require(size <= self.left(), f"{size} bytes needed, {self.left()} are left")
        self.at += size
        return self.data[self.at - size : self.at]

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
    try:
        content = machine.decompress(section[1:], limit)
    except lzma.LZMAError as error:
        raise CorruptError(f"LZMA data is damaged: {error}") from error
    _require(machine.eof and not machine.unused_data, "LZMA data does not end where it should")
    return content


def _sections(data: bytes) -> list[tuple[int, bytes]]:
    """(kind, contents) of every section, all checksums checked."""
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
        kind, size = entries.take(1)[0], entries.leb()
        section = reader.take(size)
        _require(entries.fields("<I")[0] == zlib.crc32(section), f"the checksum of section {i} does not match")
        sections.append((kind, section))
    _require(entries.left() == 0 and reader.left() == 0, "bytes are left over behind the last section")
    return sections


class _Unit(NamedTuple):
    name: str
    shape: list[int]
    dtype: str
    coder: int
    flags: int
    aliases: list[str]

    def matrix(self) -> tuple[int, int]:
        """(rows, cols) as coders see them."""
        count = int(np.prod(self.shape, dtype=object))
        if len(self.shape) < 2:
            return 1, count
        a, b = self.shape[0], count // self.shape[0] if self.shape[0] else 0
        return (b, a) if self.flags & 1 else (a, b)


def _list_of(kind: type, value: Any) -> bool:
    return type(value) is list and all(type(v) is kind for v in value)


def _is_unit(entry: Any) -> bool:
    if type(entry) is not list or [type(v) for v in entry] != [str, list, str, int, int, list]:
        return False
    _, shape, _, _, flags, aliases = entry
    sizes = _list_of(int, shape) and len(shape) <= 32 and all(n >= 0 for n in shape)
    return sizes and 0 <= flags <= 3 and _list_of(str, aliases)


def _refuse(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


def _read_index(section: bytes, file_size: int) -> tuple[list[_Unit], list[str]]:
    """Units and names of side files."""
    text = _lzma(section, 4, 2**20, 2**26)
    try:
        index = json.loads(text.decode(), parse_constant=_refuse)
        json.dumps(index, ensure_ascii=False, allow_nan=False).encode()  # refuses infinities and lone surrogates
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"the index cannot be read: {error}") from error
    _require(type(index) is dict and set(index) == {"about", "files", "units"}, "the index has other members")
    files, entries = index["files"], index["units"]
    typed = type(index["about"]) is dict and _list_of(str, files) and type(entries) is list
    _require(typed and all(map(_is_unit, entries)), "the index holds something of the wrong type or out of range")
    units = [_Unit(*entry) for entry in entries]
    names = [n for u in units for n in (u.name, *u.aliases)]
    _require(len(set(names)) == len(names) and len(set(files)) == len(files), "a name occurs twice")
    unsafe = [f for f in files if not f or f.startswith(".") or set(f) & {"/", "\\", "\0"}]
    _require(not unsafe, f"unsafe names of files: {unsafe}")
    declared = sum(int(np.prod([max(n, 1) for n in u.shape], dtype=object)) for u in units)
    _require(declared <= 2**24 + 2048 * file_size, f"{declared} values are declared in {file_size} bytes")
    return units, files


def _contents(sections: Sequence[tuple[int, bytes]], file_size: int) -> tuple[list[_Unit], bytes, list[bytes]]:
    """Units, tables section, and the units' sections."""
    kinds = [kind for kind, _ in sections]
    _require(kinds[:1] == [1], "the first section is no index")
    units, files = _read_index(sections[0][1], file_size)
    has_tables, has_padding = kinds[1:2] == [2], kinds[-1] == 6
    expected = [1] + [2] * has_tables + [3] * len(units) + [4] * len(files) + [6] * has_padding
    _require(kinds == expected, "sections of unexpected kinds, numbers or order")
    _require(not has_padding or not any(sections[-1][1]), "the padding is not empty")
    bodies = [section for kind, section in sections if kind == 3]
    return units, sections[1][1] if has_tables else b"", bodies


class _Table:
    """What each of the 2^14 slots means: `freq << 14 | slot - cum`, and the symbol."""

    def __init__(self, low: int, frequencies: Sequence[int], escape: int = _ESCAPE) -> None:
        """Frequencies of the ordinary symbols; the escape gets the rest."""
        freq = [*frequencies, 2**_BITS - sum(frequencies)]
        _require(min(freq) >= 1, f"frequencies do not add up to 2^{_BITS}")
        wide = np.array(freq, np.int64)
        start = np.repeat(np.cumsum(wide) - wide, wide)
        self.entry = (np.repeat(wide << _BITS, wide) + np.arange(2**_BITS) - start).astype(np.uint32)
        symbols = np.append(np.arange(low, low + len(frequencies)), escape)
        self.symbol = np.repeat(symbols, wide).astype(np.int32)


class _Stream(NamedTuple):
    """Bytes of a stream, every symbol's class, and the table of every class."""

    data: bytes
    classes: Array
    tables: Sequence[_Table | None]

    def lanes(self) -> int:
        return -(-len(self.classes) // _LANE)

    def steps(self) -> int:
        return -(-len(self.classes) // self.lanes())


def _decode_streams(streams: Sequence[_Stream]) -> list[Array]:
    """Symbols of every stream; all lanes of all streams advance together, the longest lanes in front."""
    results: list[Array] = [np.zeros(0, np.int32) for _ in streams]
    _require(all(s.data == b"" for s in streams if not len(s.classes)), "a stream of no symbols has bytes")
    order = sorted((i for i, s in enumerate(streams) if len(s.classes)), key=lambda i: -streams[i].steps())
    if not order:
        return results
    chosen = [streams[i] for i in order]
    readers = [_Reader(s.data) for s in chosen]
    counts = [r.zigzag(6) for r in readers]
    _require(min(counts) >= 0, "a stream has a negative number of words")
    states = [np.frombuffer(r.take(4 * s.lanes()), "<u4") for r, s in zip(readers, chosen, strict=True)]
    words = [np.frombuffer(r.take(2 * n), "<u2") for r, n in zip(readers, counts, strict=True)]
    state = np.concatenate(states).astype(np.uint32)
    _require(state.min() >= _LOW, "a lane begins in an impossible state")
    tables = list({id(t): t for s in chosen for t in s.tables if t is not None}.values())
    places = _places(chosen, [_Padding(), *tables])
    entries = np.concatenate([_Padding().entry, *(t.entry for t in tables)])
    _advance(chosen, state, words, places, entries)
    symbols = np.concatenate([_Padding().symbol, *(t.symbol for t in tables)])
    lane = 0
    for i, s, reader in zip(order, chosen, readers, strict=True):
        slots = places[: s.steps(), lane : lane + s.lanes()].reshape(-1)[: len(s.classes)]
        results[i] = symbols.take(slots)
        lane += s.lanes()
        escaped = np.flatnonzero(results[i] == _ESCAPE)
        values = [reader.zigzag() for _ in escaped]
        _require(reader.left() == 0, "bytes are left over behind a stream")
        _require(all(abs(v) < 2**31 for v in values), "an escaped symbol is out of range")
        results[i][escaped] = values
    return results


def _places(streams: Sequence[_Stream], tables: Sequence[_Table]) -> Array:
    """Where the table of every symbol begins in the joined tables, (steps, lanes); 0 is the padding's."""
    begin = {id(t): i << _BITS for i, t in enumerate(tables)}
    missing = 2**32 - 1
    places = np.zeros((streams[0].steps(), sum(s.lanes() for s in streams)), np.uint32)
    lane = 0
    for s in streams:
        begins = np.array([begin.get(id(t), missing) for t in s.tables], np.uint32)
        padded = np.zeros(s.steps() * s.lanes(), np.uint32)
        padded[: len(s.classes)] = begins.take(s.classes)
        _require(int(padded.max()) != missing, "a stream uses a class without a table")
        places[: s.steps(), lane : lane + s.lanes()] = padded.reshape(s.steps(), s.lanes())
        lane += s.lanes()
    return places


def _advance(streams: Sequence[_Stream], state: Array, words: Sequence[Array], places: Array, entries: Array) -> None:
    """Decode every lane; turns the beginnings of tables in `places` into slots of the joined tables."""
    taken = np.zeros(len(streams), np.int64)
    sizes = np.array([len(w) for w in words])
    first = np.cumsum(sizes) - sizes
    pool = np.append(np.concatenate(words), 0).astype(np.uint32)
    owner = np.repeat(np.arange(len(streams)), [s.lanes() for s in streams])
    steps = np.repeat([s.steps() for s in streams], [s.lanes() for s in streams])
    live = len(state) - np.cumsum(np.bincount(steps))
    ramp = np.arange(len(state))
    mask, bits, sixteen = np.uint32(_MASK), np.uint32(_BITS), np.uint32(16)
    for row, count in zip(places, live, strict=False):
        x, slot = state[:count], row[:count]
        slot += x & mask
        entry = entries.take(slot)
        x >>= bits
        x *= entry >> bits
        entry &= mask
        x += entry
        need = np.flatnonzero(x < _LOW)
        who = owner[need]
        used = np.bincount(who, minlength=len(taken))
        behind = first + taken - np.cumsum(used) + used
        at = behind[who] + ramp[: len(need)]
        x[need] = x[need] << sixteen | pool.take(at, mode="clip")
        taken += used
    _require((taken == sizes).all(), "a stream has too few or too many words")
    _require((state == _LOW).all(), "a lane does not end in its final state")


class _Shared:
    """Tables by class, and offsets (64, 17) by class and size."""

    def __init__(self, section: bytes) -> None:
        self.tables: list[_Table | None] = [None]
        self.offset = np.zeros((64, 17), np.float32)
        reader = _Reader(_lzma(section, 3, 2**16, 2**20) if section else b"")
        while reader.left():
            served, half = reader.leb(), reader.leb()
            first = len(self.tables)
            _require(1 <= served <= 64 - first and half <= 1023, "the tables section has too many classes or symbols")
            sizes = [reader.leb() for _ in range(half + 1)]
            stored = np.frombuffer(reader.take(min(half, 16)), np.int8) / np.float32(256)
            self.tables += [_Table(-half, sizes[:0:-1] + sizes)] * served
            self.offset[first : first + served, 1 : len(stored) + 1] = stored
            self.offset[first : first + served, len(stored) + 1 :] = stored[-1] if half else 0
        self.tables += [None] * (64 - len(self.tables))


def _decode_batch(batch: Sequence[tuple[_Unit, bytes]], shared: _Shared) -> list[Array]:
    """Matrices of units. Every coder asks for streams twice (side information, payload), then gives the matrix."""
    coders = {1: _grid, 2: _vector, 3: _exact, 4: _packed}
    for unit, _ in batch:
        _require(unit.coder in coders, f"there is no coder {unit.coder}")
    running = [coders[unit.coder](unit, _Reader(body), shared) for unit, body in batch]
    asked = [next(r) for r in running]
    for _ in range(2):
        symbols = iter(_decode_streams([stream for part in asked for stream in part]))
        asked = [r.send([next(symbols) for _ in part]) for r, part in zip(running, asked, strict=True)]
    return asked


def _finite(values: Array) -> Array:
    _require(np.isfinite(values).all(), "a value is not finite")
    return values


def _q(k: Array) -> Array:
    """2^(k/4), in the document's arithmetic."""
    constants = [float.fromhex(c) for c in ("0x1p+0", "0x1.306fe0p+0", "0x1.6a09e6p+0", "0x1.ae89fap+0")]
    power: Array = np.ldexp(np.array(constants, np.float32)[k % 4], (k // 4).astype(np.int32))
    return power


def _grid(unit: _Unit, reader: _Reader, shared: _Shared) -> _Coder:
    """6.1: symbols with a step for every column and every row."""
    rows, cols = unit.matrix()
    groups, c, *pairs = reader.fields("<Bf" + 4 * "bB")
    _require(1 <= groups <= min(4, max(1, rows)), f"{groups} groups of {rows} rows")
    _require(np.isfinite(c) and c > 0 and max(pairs[1::2]) <= 63, "the step or a class is out of range")
    sides = list(zip((groups * cols, groups * cols, rows, rows), pairs[::2], pairs[1::2], strict=True))
    classes = [np.full(size if k else 0, k, np.uint8) for size, _, k in sides]
    (coded,) = yield [_Stream(reader.take(reader.leb()), np.concatenate(classes), shared.tables)]
    arrays = []
    for (size, base, k), most in zip(sides, (500, 1000, 500, 1000), strict=True):
        part, coded = (coded[:size], coded[size:]) if k else (np.zeros(size), coded)
        arrays.append(part.astype(np.int64) + base)
        _require(np.abs(arrays[-1]).max(initial=0) <= most, "a step or spread is out of range")
    column_step, column_spread = (a.reshape(groups, cols) for a in arrays[:2])
    row_step = arrays[2]
    column = (column_spread - column_step + 20).astype(np.int16)
    row = (arrays[3] - row_step).astype(np.int16)
    d, r = divmod(rows, groups)
    ends = [g * d + min(g, r) for g in range(groups + 1)]
    runs = [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)]
    weight_class = np.empty((rows, cols), np.uint8)
    for g, run in enumerate(runs):
        weight_class[run] = np.clip(row[run, None] + column[g], 1, 63)
    (symbols,) = yield [_Stream(reader.rest(), weight_class.reshape(-1), shared.tables)]
    z = symbols.reshape(rows, cols)
    size = np.abs(z)
    place = weight_class.astype(np.int32) * 17
    place += np.minimum(size, 16)
    v = size.astype(np.float32)
    v -= shared.offset.reshape(-1).take(place)
    np.negative(v, out=v, where=z < 0)
    with np.errstate(over="ignore", invalid="ignore"):
        v *= _q(row_step)[:, None]
        for g, run in enumerate(runs):
            v[run] *= np.float32(c) * _q(column_step[g])
    yield _finite(v)


def _vector(unit: _Unit, reader: _Reader, shared: _Shared) -> _Coder:
    """6.2: one step around a centre."""
    yield []
    centre, step, k = reader.fields("<ffB")
    _require(np.isfinite(centre) and np.isfinite(step) and k <= 63, "a vector's header is out of range")
    rows, cols = unit.matrix()
    (symbols,) = yield [_Stream(reader.rest(), np.full(rows * cols if k else 0, k, np.uint8), shared.tables)]
    z = symbols if k else np.zeros(rows * cols, np.int32)
    with np.errstate(over="ignore"):
        yield _finite(np.float32(centre) + np.float32(step) * z.astype(np.float32)).reshape(rows, cols)


_DTYPES = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "F64": "<f8", "BOOL": "u1", "U8": "u1"}
_DTYPES |= {"I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}


def _exact(unit: _Unit, reader: _Reader, shared: _Shared) -> _Coder:
    """6.3: byte planes, most significant first."""
    yield []
    del shared
    _require(unit.dtype in _DTYPES, f"there is no dtype {unit.dtype}")
    kind = np.dtype(_DTYPES[unit.dtype])
    rows, cols = unit.matrix()
    planes: list[Array | None] = []
    streams = []
    for _ in range(kind.itemsize if rows * cols else 0):
        mode = reader.take(1)[0]
        _require(mode < 2, f"there is no mode {mode}")
        planes.append(None if mode else np.frombuffer(reader.take(rows * cols), np.uint8))
        if mode:
            low, m = reader.leb(), reader.leb()
            _require(m >= 1 and low + m <= 256, "a plane has symbols that are no bytes")
            table = _Table(low, [reader.leb() for _ in range(m)])
            streams.append(_Stream(reader.take(reader.leb()), np.ones(rows * cols, np.uint8), [None, table]))
    _require(not reader.rest(), "bytes are left over behind the last plane")
    symbols = yield streams
    _require(all(s.min() >= 0 and s.max() <= 255 for s in symbols), "a symbol is no byte")
    raw = np.zeros((rows * cols, kind.itemsize), np.uint8)
    for i, plane in enumerate(reversed(planes)):
        raw[:, i] = symbols.pop() if plane is None else plane
    values = raw.view(kind).reshape(rows, cols)
    _require(unit.dtype != "BOOL" or values.max(initial=0) <= 1, "a truth value is neither 0 nor 1")
    if unit.dtype == "BF16":
        values = (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    yield values.astype({"F16": np.dtype(np.float32), "BOOL": np.dtype(bool)}.get(unit.dtype, values.dtype))


def _expand(compression: int, data: bytes, size: int) -> bytes:
    """Exactly `size` bytes of zlib or brotli data."""
    if compression == 0:
        inflate = zlib.decompressobj()
        try:
            out = inflate.decompress(data, size + 1)
        except zlib.error as error:
            raise CorruptError(f"zlib data is damaged: {error}") from error
        done = inflate.eof and not inflate.unused_data
    else:
        import brotli

        machine = brotli.Decompressor()
        try:
            out = machine.process(data, output_buffer_limit=size + 1)
            while len(out) <= size and not machine.is_finished() and not machine.can_accept_more_data():
                out += machine.process(b"", output_buffer_limit=size + 1)
        except brotli.error as error:
            raise CorruptError(f"brotli data is damaged: {error}") from error
        done = machine.is_finished()
    _require(done and len(out) == size, f"compressed data is not exactly {size} bytes")
    return out


def _packed(unit: _Unit, reader: _Reader, shared: _Shared) -> _Coder:
    """6.4: integer codes and a scale for every row under a general-purpose compressor."""
    yield []
    del shared
    compression, width = reader.fields("<BB")
    _require(compression < 2 and width in {1, 2}, f"compression {compression}, width {width}")
    rows, cols = unit.matrix()
    scales = np.frombuffer(_expand(compression, reader.take(reader.leb()), 2 * rows), "<f2")
    planes = np.frombuffer(_expand(compression, reader.rest(), width * rows * cols), np.int8)
    codes = planes.reshape(width, cols, rows).astype(np.int32)
    code = codes[0] + 256 * codes[1] if width == 2 else codes[0]
    yield []
    yield code.T.astype(np.float32) * _finite(scales).astype(np.float32)[:, None]
