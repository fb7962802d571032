"""Sections 1 to 4: bytes, header, directory, index."""

from __future__ import annotations

import json
import lzma
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any, NamedTuple

from bytecap.errors import CorruptError, NotAnArtifact, VersionError


def require(condition: object, message: str) -> None:
    """Refuse damaged data."""
    if not condition:
        raise CorruptError(message)


@contextmanager
def damage(*errors: type[Exception]) -> Iterator[None]:
    """Turn other libraries' errors into the one for damaged data."""
    try:
        yield
    except errors as error:
        raise CorruptError(f"damaged: {error}") from error


class Reader:
    """Section 1: a reader that takes fields off the front of some bytes."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        """Take the next bytes."""
        require(0 <= size <= len(self.data) - self.at, f"{size} bytes needed, {len(self.data) - self.at} are left")
        self.at += size
        return self.data[self.at - size : self.at]

    def rest(self) -> bytes:
        """Take all bytes that are left."""
        return self.take(len(self.data) - self.at)

    def fields(self, layout: str) -> tuple[Any, ...]:
        """Take numbers in the layout of `struct`."""
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def leb(self, most: int = 9) -> int:
        """Take an unsigned integer of at most `most` bytes."""
        value = 0
        for i in range(most):
            byte = self.take(1)[0]
            value |= (byte & 127) << 7 * i
            if byte < 128:
                return value
        raise CorruptError(f"an integer has more than {most} bytes")

    def zigzag(self, most: int = 9) -> int:
        """Take a signed integer."""
        value = self.leb(most)
        return value // 2 if value % 2 == 0 else -(value + 1) // 2


def unpack_lzma(section: bytes, lc: int, dictionary: int, limit: int) -> bytes:
    """A section that begins with a packing byte: 0 stored, 1 raw LZMA1."""
    require(section[:1] in {b"\0", b"\1"}, "a section has an unknown packing")
    if section[0] == 0:
        return section[1:]
    parameters = {"id": lzma.FILTER_LZMA1, "dict_size": dictionary, "lc": lc, "lp": 0, "pb": 0}
    machine = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[parameters])
    with damage(lzma.LZMAError):
        content = machine.decompress(section[1:], limit)
    require(machine.eof and not machine.unused_data, "LZMA data does not end where it should")
    return content


def _sections(data: bytes) -> list[tuple[int, bytes]]:
    """Sections 2 and 3: kind and contents of every section, all checksums checked."""
    if data[:8] != b"\x89BCAP\r\n\x1a":
        raise NotAnArtifact("not a bytecap artifact")
    reader = Reader(data)
    _, major, minor, reserved, length, size, checksum = reader.fields("<8sBBHIQI")
    if major > 1:
        raise VersionError(f"format version {major}.{minor}, this decoder knows 1.3")
    require(size == len(data), f"the header says {size} bytes, the file has {len(data)}")
    directory = reader.take(length)
    require(zlib.crc32(data[:24] + directory) == checksum, "the checksum of header and directory does not match")
    require(major == 1 and reserved == 0, "version 0 or a reserved bit is in use")
    entries, sections = Reader(directory), []
    for i in range(entries.leb()):
        kind, section = entries.take(1)[0], reader.take(entries.leb())
        require(entries.fields("<I")[0] == zlib.crc32(section), f"the checksum of section {i} does not match")
        sections.append((kind, section))
    require(not entries.rest() and not reader.rest(), "bytes are left over behind the last section")
    return sections


class Unit(NamedTuple):
    """A unit of the index, section 4."""

    name: str
    shape: list[int]
    dtype: str
    coder: int
    flags: int
    aliases: list[str]

    def matrix(self) -> tuple[int, int]:
        """Shape (rows, cols) as coders see it."""
        if len(self.shape) < 2:
            return 1, prod(self.shape)
        if self.flags & 4:
            a, b = prod(self.shape) // max(1, self.shape[-1]), self.shape[-1]
        else:
            a, b = self.shape[0], prod(self.shape) // max(1, self.shape[0])
        return (b, a) if self.flags & 1 else (a, b)


def _matches(value: Any, schema: Any) -> bool:
    """Whether a JSON value has exactly these types; `[t]` is a list of any length, a tuple a list of its length."""
    if isinstance(schema, type):
        return type(value) is schema
    wanted = schema if isinstance(schema, tuple) else schema * len(value) if type(value) is list else schema
    return type(value) is list and len(value) == len(wanted) and all(map(_matches, value, wanted))


class Contents(NamedTuple):
    """The parts of one file; `base` is empty or (SHA-256, names left out), `files` are those of side and code files."""

    units: list[Unit]
    tables: bytes
    objects: list[bytes]
    bodies: list[bytes]
    base: list[Any]
    files: list[str]


def contents(data: bytes) -> Contents:
    """Check a file's frame; returns its parts."""
    sections = _sections(data)
    kinds = [kind for kind, _ in sections]
    require(kinds[:1] == [1], "the first section is no index")
    with damage(ValueError, RecursionError):
        index = json.loads(unpack_lzma(sections[0][1], 4, 2**20, 2**26).decode())
        json.dumps(index, ensure_ascii=False, allow_nan=False).encode()  # refuses NaN, infinities, lone surrogates
    known = type(index) is dict and set(index) - {"code", "base"} == {"about", "files", "units"}
    schema = (dict, [str], [(str, [int], str, int, int, [str])], [str])
    listed = [index.get(key, []) for key in ("about", "files", "units", "code")] if known else []
    require(_matches(listed, schema) and index.get("code") != [], "the index is of wrong types")
    base = index.get("base", [])
    require("base" not in index or _matches(base, (str, [str])), "the base is of a wrong type")
    if base:
        require(len(base[0]) == 64 and set(base[0]) <= set("0123456789abcdef"), "the base's hash is none")
        require(len(set(base[1])) == len(base[1]), "a file is left out twice")
    units, code = [Unit(*entry) for entry in index["units"]], listed[3]
    files = index["files"] + code
    for u in units:
        require(len(u.shape) <= 32 and min(u.shape, default=0) >= 0 and 0 <= u.flags <= 7, f"{u} is out of range")
    names = [n for u in units for n in (u.name, *u.aliases)]
    require(len(set(names)) == len(names) and len(set(files)) == len(files), "a name occurs twice")
    require(not any(not f or f[0] == "." or set(f) & {"/", "\\", "\0"} for f in files), "a file's name is unsafe")
    declared = sum(prod(max(n, 1) for n in u.shape) for u in units)
    require(declared <= 2**24 + 2048 * len(data), f"{declared} values are declared in {len(data)} bytes")
    tables, padding = kinds[1:2] == [2], kinds[-1] == 6
    expected = [1] + [2] * tables + [7] * kinds.count(7) + [3] * len(units) + [4] * len(index["files"])
    expected += [5] * len(code) + [6] * padding
    require(kinds == expected and not (padding and any(sections[-1][1])), "unexpected sections, or used padding")
    shared, bodies = ([section for kind, section in sections if kind == k] for k in (7, 3))
    return Contents(units, sections[1][1] if tables else b"", shared, bodies, base, files)
