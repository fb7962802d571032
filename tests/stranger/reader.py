"""Sections 2, 3, 4 and 7.4 of docs/format.md: the file as a whole.

`read(data)` decodes everything: `Content(tensors, files, code)`, or raises a `FormatError`.
"""

import json
import zlib
from dataclasses import dataclass
from math import isfinite, prod

import numpy as np

from stranger.basics import Bytes, CorruptError, NotAnArtifact, VersionError, need, raw_lzma, unbrotli
from stranger.layers import decode, steps
from stranger.shared import Shared
from stranger.sidefiles import content_of
from stranger.spelled import Work

MAGIC = bytes.fromhex("89424341500D0A1A")
ORDER = (1, 2, 7, 3, 4, 5, 6)  # kinds of sections as they must come
MAJOR = 1


@dataclass
class Content:
    """Everything a file holds."""

    tensors: dict
    files: dict
    code: dict


def read(data):
    data = bytes(data)
    sections = container(data)
    kinds = [kind for kind, _ in sections]
    need(all(kind in ORDER for kind in kinds), "a section of an unknown kind")
    of = {kind: [content for k, content in sections if k == kind] for kind in ORDER}
    need(kinds == [kind for kind in ORDER for _ in of[kind]], "sections out of order")
    need(len(of[1]) == 1 and len(of[2]) <= 1 and len(of[6]) <= 1, "sections too many or missing")
    need(not any(of[6][0]) if of[6] else True, "padding that is not 0")
    index = read_index(of[1][0])
    names = index["units"], index["files"], index.get("code", [])
    for listed, kind in zip(names, (3, 4, 5), strict=True):
        need(len(listed) == len(of[kind]), f"{len(of[kind])} sections of kind {kind} for {len(listed)} names")
    check_sizes(index["units"], len(data))
    check_work(index["units"], of[3], len(data))
    shared = Shared(of[2][0] if of[2] else b"", of[7])
    tensors = {}
    with np.errstate(all="ignore"):
        for unit, section in zip(index["units"], of[3], strict=True):
            name, shape, dtype, coder, flags, aliases = unit
            values = tensor(section, shape, dtype, coder, flags, shared)
            tensors |= dict.fromkeys([name, *aliases], values)
    need(shared.used == set(range(len(of[7]))), "a shared object that no unit refers to")
    work = Work(sum(map(len, of[4] + of[5])))
    files = {name: content_of(section, work) for name, section in zip(names[1], of[4], strict=True)}
    return Content(tensors, files, dict(zip(names[2], map(code_of, of[5]), strict=True)))


def container(data):
    """(kind, content) of every section, all checks of sections 2 and 3 made."""
    if data[:8] != MAGIC:
        raise NotAnArtifact("the magic is missing")
    need(len(data) >= 28, "a header cut short")
    if data[8] > MAJOR:
        raise VersionError(f"version {data[8]}.{data[9]}")
    source = Bytes(data)
    source.take(8)
    major, _, reserved = source.u8(), source.u8(), source.number("H")
    directory, length, crc = source.number("I"), source.number("Q"), source.number("I")
    need(length == len(data), f"{len(data)} bytes instead of {length}")
    entries = Bytes(source.take(directory))
    need(zlib.crc32(data[:24] + entries.data) == crc, "the header's checksum")
    need(major == 1 and reserved == 0, "major version or reserved bits")
    found = [(entries.u8(), entries.leb(), entries.number("I")) for _ in range(count_of(entries))]
    entries.end()
    sections = []
    for kind, size, checksum in found:
        content = source.take(size)
        need(zlib.crc32(content) == checksum, "a section's checksum")
        sections.append((kind, content))
    source.end()
    return sections


def count_of(entries):
    count = entries.leb()
    need(count * 6 <= len(entries.data), f"{count} sections")
    return count


def _members(pairs):
    need(len({name for name, _ in pairs}) == len(pairs), "a member twice")
    return dict(pairs)


def _number(text):
    need(isfinite(value := float(text)), f"the number {text}")
    return value


def _integer(text):
    need(len(text) <= 20 and -(2**63) <= int(text) < 2**64, f"the number {text}")
    return int(text)


def _constant(text):
    raise CorruptError(f"the number {text}")


def parse_json(text):
    """RFC 8259 and no more."""
    try:
        value = json.loads(
            text.decode("utf-8"), parse_constant=_constant, parse_float=_number, parse_int=_integer,
            object_pairs_hook=_members,
        )  # fmt: skip
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # no lone surrogates
    except (ValueError, RecursionError) as exc:
        raise CorruptError(f"the index: {exc}") from exc
    return value


def strings(value, least=0):
    need(type(value) is list and len(value) >= least and all(type(v) is str for v in value), "strings expected")
    return value


def read_index(section):
    source = Bytes(section)
    packing = source.u8(0, 1)
    text = raw_lzma(source.rest(), 4, 1 << 20, 1 << 26) if packing else source.rest()
    need(len(text) <= 1 << 26, "an index of more than 2^26 bytes")
    index = parse_json(text)
    need(type(index) is dict and set(index) - {"code"} == {"about", "files", "units"}, "members of the index")
    need(type(index["about"]) is dict and type(index["units"]) is list, "members of the index")
    listed = strings(index["files"]) + (strings(index["code"], 1) if "code" in index else [])
    need(len(set(listed)) == len(listed), "two files of one name")
    for name in listed:
        need(name and name[0] != "." and not set(name) & set("/\\\0"), f"the file name {name!r}")
    names = []
    for unit in index["units"]:
        need(type(unit) is list and len(unit) == 6, "a unit is six things")
        name, shape, dtype, coder, flags, aliases = unit
        need(type(name) is str and type(dtype) is str and type(shape) is list and len(shape) <= 32, "a unit")
        need(all(type(n) is int and n >= 0 for n in [*shape, coder, flags]) and flags <= 7, "a unit's numbers")
        names += [name, *strings(aliases)]
    need(len(set(names)) == len(names), "two tensors of one name")
    return index


def check_sizes(units, length):
    total = sum(prod(max(1, n) for n in shape) for _, shape, *_ in units)
    need(total <= (1 << 24) + 2048 * length, f"{total} values declared in {length} bytes")


def check_work(units, sections, length):
    total = 0
    for (_, shape, _, coder, *_), section in zip(units, sections, strict=True):
        total += prod(max(1, n) for n in shape) * steps(coder, section)
    need(total <= (1 << 28) + (1 << 14) * length, f"{total} steps in {length} bytes")


def tensor(section, shape, dtype, coder, flags, shared):
    """A decoded unit in its stored shape (section 4)."""
    n = prod(shape)
    first, last = (shape[0], shape[-1]) if len(shape) >= 2 else (1, n)
    a, b = (n // last if last else 0, last) if flags & 4 and len(shape) >= 2 else (first, n // first if first else 0)
    turned = flags & 1 and len(shape) >= 2
    matrix = decode(coder, section, (b, a) if turned else (a, b), dtype, shared)
    return np.ascontiguousarray(matrix.T if turned else matrix).reshape(shape)


def code_of(section):
    source = Bytes(section)
    packing = source.u8(0, 2)
    content = source.rest()
    if packing == 1:
        return unbrotli(content, limit=1 << 24)
    return raw_lzma(content, 3, 1 << 20, 1 << 24) if packing == 2 else content
