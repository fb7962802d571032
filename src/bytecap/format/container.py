"""Write and read the container: one file in which every byte has an owner and a checksum.

Layout: header (28 bytes) | directory | sections back to back. The directory gives every section's kind, length
and CRC-32; the header's CRC-32 covers header and directory. The index section names units (name, shape, dtype,
coder, aliases) and files. Reading is strict: no gaps, no overlaps, nothing left over, no code executed.

Writing is atomic (`bytecap.system.atomic`): a crash leaves the old file.
"""

from __future__ import annotations

import json
import lzma
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from bytecap.errors import CorruptError, NotAnArtifact, VersionError
from bytecap.format.coders import coder, leb, read_leb
from bytecap.format.coders.base import CODER as BASE
from bytecap.format.coders.long_trellis import CODER as LONG_TRELLIS
from bytecap.format.coders.stack import CODER as STACK
from bytecap.format.contents import FILE, Base, Contents, FileSection, StoredUnit, UnitSection
from bytecap.format.filebytes import FileBytes, checksums
from bytecap.format.ledger import Entry, total
from bytecap.format.wire.shared_objects import describe
from bytecap.format.work import Meter
from bytecap.system.atomic import write_atomically
from bytecap.types import Unit

__all__ = ["FILE", "Base", "Contents", "FileSection", "StoredUnit", "UnitSection"]  # defined beside, used from here

MAGIC = b"\x89BCAP\r\n\x1a"
VERSION = (1, 3)  # newest this reader knows; files say the lowest that describes them
_FIRST_CODERS = 4  # tags up to this one came with 1.0
_HEAD = struct.Struct("<8sBBHIQ")  # magic, major, minor, reserved, directory length, file length
HEADER_SIZE = _HEAD.size + 4
INDEX, TABLES, UNIT, CODE, PADDING, SHARED = 1, 2, 3, 5, 6, 7
_LZMA = [{"id": lzma.FILTER_LZMA1, "preset": 9, "dict_size": 1 << 20, "lc": 4, "lp": 0, "pb": 0}]
_MAX_INDEX, _SPARE_INDEX, _INDEX_PER_BYTE = 1 << 26, 1 << 20, 64  # bytes of text: at most, for nothing, by file length
_MAX_DIMENSIONS = 32
_HASH = re.compile("[0-9a-f]{64}")
_TOKENIZER_FILES = {
    "chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt", "vocab.txt", "sentencepiece.bpe.model",
    "spiece.model", "spm.model", "tekken.json", "source.spm", "target.spm",
}  # fmt: skip
_SPARE_VALUES, _VALUES_PER_BYTE = 1 << 24, 2048  # most values a file may declare: an entropy-coded one has no more


class _Index(msgspec.Struct, forbid_unknown_fields=True):
    """The index section's JSON."""

    units: list[tuple[str, list[int], str, int, int, list[str]]]
    files: list[str]
    about: dict[str, Any]
    code: list[str] | msgspec.UnsetType = msgspec.UNSET
    base: tuple[str, list[str]] | msgspec.UnsetType = msgspec.UNSET


def _pack_index(contents: Contents) -> bytes:
    index = {
        "about": contents.about,
        "files": [f.name for f in contents.files if f.kind == FILE],
        "units": [
            (
                u.unit.name,
                u.unit.shape,
                u.unit.dtype,
                u.tag,
                u.unit.transposed + 2 * u.unit.linear + 4 * u.unit.stacked,
                u.unit.aliases,
            )
            for u in contents.units
        ],
    }
    if code := [f.name for f in contents.files if f.kind == CODE]:
        index["code"] = code
    if contents.base is not None:
        index["base"] = [contents.base.sha256, list(contents.base.dropped)]
    raw = json.dumps(index, separators=(",", ":"), ensure_ascii=False).encode()
    packed = lzma.compress(raw, lzma.FORMAT_RAW, filters=_LZMA)
    return b"\x01" + packed if len(packed) < len(raw) else b"\x00" + raw


@dataclass(frozen=True)
class _Part:
    """A section: its kind, and its bytes or the unit that holds them."""

    kind: int
    content: bytes | UnitSection

    def __len__(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.length

    def read(self) -> bytes:
        return self.content if isinstance(self.content, bytes) else self.content.data


def _sections(contents: Contents) -> list[_Part]:
    found = [_Part(INDEX, _pack_index(contents))]
    if contents.tables:
        found.append(_Part(TABLES, contents.tables))
    found += [_Part(SHARED, o) for o in contents.objects]
    found += [_Part(UNIT, u) for u in contents.units]
    found += [_Part(f.kind, f.data) for f in sorted(contents.files, key=lambda f: f.kind)]
    if contents.padding:
        found.append(_Part(PADDING, bytes(contents.padding)))
    return found


def _directory_size(sections: Sequence[_Part]) -> int:
    return sum(5 + len(leb(len(p))) for p in sections) + len(leb(len(sections)))


def size(contents: Contents) -> int:
    """Number of bytes of an artifact, without making them."""
    sections = _sections(contents)
    return HEADER_SIZE + _directory_size(sections) + sum(map(len, sections))


def _minor(contents: Contents) -> int:
    """Lowest minor version that describes the contents."""
    if contents.base is not None:
        return 3
    found = [STACK.minor(u.data) for u in contents.units if u.tag == STACK.tag]
    found += [3 if u.tag in {LONG_TRELLIS.tag, BASE.tag} else int(u.tag > _FIRST_CODERS) for u in contents.units]
    if contents.objects or any(f.kind == CODE for f in contents.files):
        found.append(2)
    return max(found, default=0)


def serialize(contents: Contents) -> bytes:
    """The bytes of an artifact; a pure function of its contents."""
    return b"".join(pieces(contents))


def pieces(contents: Contents) -> Iterator[bytes]:
    """Yield the bytes of an artifact section by section; units that are stored elsewhere are read twice."""
    sections = _sections(contents)
    directory = leb(len(sections)) + b"".join(
        bytes([p.kind]) + leb(len(p)) + struct.pack("<I", zlib.crc32(p.read())) for p in sections
    )
    total = HEADER_SIZE + len(directory) + sum(map(len, sections))
    head = _HEAD.pack(MAGIC, 1, _minor(contents), 0, len(directory), total)
    yield head + struct.pack("<I", zlib.crc32(head + directory)) + directory
    for p in sections:
        yield p.read()


@dataclass(frozen=True)
class _Span:
    kind: int
    start: int
    length: int


def _check_header(data: bytes | FileBytes, name: str) -> int:
    """Check the header and its checksum; returns the directory's length."""
    if len(data) < 8 or data[:8] != MAGIC:
        raise NotAnArtifact(f"{name} is not a bytecap artifact")
    if len(data) < HEADER_SIZE:
        raise CorruptError(f"{name} is truncated: {len(data)} bytes, the header alone has {HEADER_SIZE}")
    _, major, minor, reserved, length, size = _HEAD.unpack(data[: _HEAD.size])
    if major > VERSION[0]:
        raise VersionError(f"{name} has format version {major}.{minor}, this reader knows {VERSION[0]}.{VERSION[1]}")
    if size != len(data):
        raise CorruptError(f"{name} is damaged: the header says {size} bytes, the file has {len(data)}")
    if HEADER_SIZE + length > len(data):
        raise CorruptError(f"{name} is damaged: a directory of {length} bytes does not fit the file")
    (checksum,) = struct.unpack("<I", data[_HEAD.size : HEADER_SIZE])
    if checksum != zlib.crc32(data[: _HEAD.size] + data[HEADER_SIZE : HEADER_SIZE + length]):
        raise CorruptError(f"{name} is damaged: the checksum of header and directory does not match")
    if reserved or major < 1:
        raise CorruptError(f"{name} uses reserved header bits or version {major}.{minor}")
    return int(length)


def _directory(data: bytes | FileBytes, name: str) -> list[_Span]:
    """Check header, directory and every checksum; return the sections' places."""
    length = _check_header(data, name)
    directory = data[HEADER_SIZE : HEADER_SIZE + length]
    spans, sums, at, start = list[_Span](), list[int](), 0, HEADER_SIZE + length
    count, at = read_leb(directory, at)
    for i in range(count):
        if at >= len(directory):
            raise CorruptError(f"{name} is damaged: the directory ends at section {i} of {count}")
        kind = directory[at]
        size, at = read_leb(directory, at + 1)
        if at + 4 > len(directory) or start + size > len(data):
            raise CorruptError(f"{name} is damaged: section {i} runs past the end")
        sums += struct.unpack_from("<I", directory, at)
        spans.append(_Span(kind, start, size))
        at += 4
        start += size
    if at != len(directory) or start != len(data):
        raise CorruptError(f"{name} is damaged: bytes are left over behind the last section")
    found = checksums(data, [(s.start, s.start + s.length) for s in spans])
    for i, span in enumerate(spans):
        if found[i] != sums[i]:
            raise CorruptError(f"{name} is damaged: the checksum of section {i} (kind {span.kind}) does not match")
    return spans


def _read_index(data: bytes, size: int, name: str) -> _Index:
    limit = min(_MAX_INDEX, _SPARE_INDEX + _INDEX_PER_BYTE * size)
    try:
        if data[:1] == b"\x01":
            machine = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_LZMA)
            raw = machine.decompress(data[1:], limit + 1)
            if len(raw) <= limit and (not machine.eof or machine.unused_data):
                raise CorruptError(f"{name} has an index whose packing does not end where it should")
        elif data[:1] == b"\x00":
            raw = data[1:]
        else:
            raise CorruptError(f"{name} has an index of unknown packing")
        if len(raw) > limit:
            raise CorruptError(f"{name} has an index of more than {limit} bytes, which is too much for {size}")
        index = msgspec.json.decode(raw, type=_Index)
    except (lzma.LZMAError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise CorruptError(f"{name} has an index that cannot be read: {exc}") from exc
    names = [n for entry in index.units for n in (entry[0], *entry[5])]
    files = index.files + _code(index)
    if len(set(names)) != len(names) or len(set(files)) != len(files) or index.code == []:
        raise CorruptError(f"{name} names a unit or file twice, or lists no code")
    if isinstance(index.base, tuple) and not (_HASH.fullmatch(index.base[0]) and _distinct(index.base[1])):
        raise CorruptError(f"{name} names its base by no SHA-256, or leaves a file out twice")
    for file in files:
        if not file or "/" in file or "\\" in file or file.startswith(".") or "\0" in file:
            raise CorruptError(f"{name} holds a file with the unsafe name {file!r}")
    return index


def _distinct(names: list[str]) -> bool:
    return len(set(names)) == len(names)


def _code(index: _Index) -> list[str]:
    return index.code if isinstance(index.code, list) else []


def _check_shapes(index: _Index, size: int, name: str) -> list[int]:
    """Declared size of every unit. A small file must not make its reader allocate much: sizes of 0 count as 1."""
    left, sizes = _SPARE_VALUES + _VALUES_PER_BYTE * size, []
    for unit, shape, *_ in index.units:
        count = 1
        for n in shape:
            count = count * max(n, 1) if n >= 0 else left + 1
            if count > left or len(shape) > _MAX_DIMENSIONS:
                raise CorruptError(f"{name} declares the impossible shape {shape[:_MAX_DIMENSIONS]} for {unit}")
        left -= count
        sizes.append(count)
    return sizes


def parse(data: bytes | FileBytes, name: str = "the artifact") -> Contents:
    """Contents of an artifact's bytes, after checking every checksum and count.

    Raises:
        NotAnArtifact, VersionError, CorruptError: see `bytecap.errors`.
    """
    spans = _directory(data, name)
    index, expected = _expected_kinds(data, spans, name)
    sizes, meter = _check_shapes(index, len(data), name), Meter(len(data))
    if [s.kind for s in spans] != expected:
        raise CorruptError(f"{name} holds sections of unexpected kinds or in an unexpected order")

    def body(kind: int) -> tuple[bytes, ...]:
        return tuple(data[s.start : s.start + s.length] for s in spans if s.kind == kind)

    tables = b"".join(body(TABLES))
    places = [s for s in spans if s.kind == UNIT]
    units: list[UnitSection] = []
    for (unit, shape, dtype, tag, flags, aliases), size, at in zip(index.units, sizes, places, strict=True):
        if flags > 7 or flags < 0:
            raise CorruptError(f"{name} uses reserved flags for {unit}")
        described = Unit(unit, tuple(shape), dtype, tuple(aliases), bool(flags & 1), bool(flags & 2), bool(flags & 4))
        read = partial(_bytes_of, data, at)
        units.append(
            UnitSection(described, tag, read()) if isinstance(data, bytes)
            else StoredUnit(described, tag, at.length, read)
        )  # fmt: skip
        meter.take(units[-1], size)
    files = [FileSection(n, d) for n, d in zip(index.files, body(FILE), strict=True)]
    files += [FileSection(n, d, CODE) for n, d in zip(_code(index), body(CODE), strict=True)]
    padding = b"".join(body(PADDING))
    if any(padding):
        raise CorruptError(f"{name} holds something in its padding")
    base = Base(index.base[0], tuple(index.base[1])) if isinstance(index.base, tuple) else None
    return Contents(tuple(units), tables, tuple(files), index.about, len(padding), body(SHARED), base)


def _bytes_of(data: bytes | FileBytes, span: _Span) -> bytes:
    return data[span.start : span.start + span.length]


def _expected_kinds(data: bytes | FileBytes, spans: list[_Span], name: str) -> tuple[_Index, list[int]]:
    if not spans or spans[0].kind != INDEX:
        raise CorruptError(f"{name} does not begin with an index")
    index = _read_index(data[spans[0].start : spans[0].start + spans[0].length], len(data), name)
    expected = [INDEX]
    if len(spans) > 1 and spans[1].kind == TABLES:
        expected.append(TABLES)
    expected += [SHARED] * sum(s.kind == SHARED for s in spans)
    expected += [UNIT] * len(index.units) + [FILE] * len(index.files) + [CODE] * len(_code(index))
    if spans[-1].kind == PADDING:
        expected.append(PADDING)
    return index, expected


def read_bytes(path: Path | str) -> bytes:
    """Read the bytes of an artifact file, unchecked."""
    return _opened(Path(path))[:]


def read(path: Path | str) -> Contents:
    """Read and check an artifact file by itself; `bytecap.format.updates.read` also finds the base of an update."""
    return parse(read_bytes(path), str(path))


def open_file(path: Path | str) -> Contents:
    """Check an artifact file like `read`; units' bytes stay in the file and are read when they are asked for."""
    return parse(_opened(Path(path)), str(path))


def _opened(path: Path) -> FileBytes:
    try:
        return FileBytes(path)
    except (OSError, ValueError) as exc:
        raise NotAnArtifact(f"cannot read {path}: {getattr(exc, 'strerror', None) or exc}") from exc


def write(contents: Contents, path: Path | str) -> int:
    """Write an artifact atomically; returns its size in bytes.

    Raises:
        OutputError: the directory is missing or not writable, or the disk is full; the old file stays intact.
    """
    return write_atomically(serialize(contents), Path(path))


def is_tokenizer(name: str) -> bool:
    """Return whether a side file belongs to the tokenizer."""
    return "token" in name or name in _TOKENIZER_FILES


def ledger(contents: Contents, file_bytes: int | None = None) -> list[Entry]:
    """An owner and a kind for every byte; the sum is the file size.

    Args:
        contents: of the file.
        file_bytes: its size, where another writer may have packed the index better or worse; by default that of the
            file that `serialize` makes.
    """
    sections = _sections(contents)
    entries = [
        Entry("(file)", "header", HEADER_SIZE),
        Entry("(file)", "index", _directory_size(sections) + len(sections[0])),
    ]
    if contents.tables:
        entries.append(Entry("(shared)", "table", len(contents.tables)))
    for number, data in enumerate(contents.objects):
        name, parts = describe(data)
        entries += [Entry(f"(shared) {name} {number}", kind, size) for kind, size in parts]
    for u in contents.units:
        merged: dict[str, int] = {}
        for kind, size in coder(u.tag).kinds(u.data, u.unit.matrix_shape, u.unit.dtype):
            merged[kind] = merged.get(kind, 0) + size
        entries += [Entry(u.unit.name, kind, size, u.unit.parameters) for kind, size in merged.items()]
    for f in contents.files:
        kind = "code" if f.kind == CODE else "tokenizer" if is_tokenizer(f.name) else "config"
        entries.append(Entry(f.name, kind, len(f.data)))
    if contents.padding:
        entries.append(Entry("(file)", "padding", contents.padding))
    if file_bytes is not None:
        entries[1] = replace(entries[1], bytes=entries[1].bytes + file_bytes - total(entries))
    return entries
