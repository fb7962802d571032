"""Sections 2, 3, 4 and 7.4 of docs/format.md: the file as a whole.

`read(data, bases)` decodes everything: `Content(tensors, files, code, units)`, or raises a `FormatError`.
"""

import hashlib
import json
import re
import zlib
from dataclasses import dataclass
from math import isfinite, prod

import numpy as np

from stranger.basics import BaseError, Bytes, CorruptError, NotAnArtifact, VersionError, need, raw_lzma, unbrotli
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
    units: dict


def read(data, bases=()):
    """Section 4.1: a file on its base, that on its own, and so on down to one that is whole."""
    chain, left = [parts(data)], {hashlib.sha256(b).hexdigest(): b for b in bases}
    while wanted := chain[-1][0].get("base"):
        if wanted[0] not in left:
            raise BaseError(f"no file of SHA-256 {wanted[0]}")
        chain.append(parts(left.pop(wanted[0])))
    if left:
        raise BaseError("a base that nobody needs")
    found = None
    for index, of, length in reversed(chain):
        found = decoded(index, of, length, found)
    return found


def parts(data):
    """The index of a file, its sections by kind, and its length, all of it checked but for what sections hold."""
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
    return index, of, len(data)


def decoded(index, of, _length, below):
    """The contents of a file, given those of its base if it is an update."""
    shared = Shared(of[2][0] if of[2] else b"", of[7])
    tensors, units = ({}, {}) if below is None else (dict(below.tensors), dict(below.units))
    left_out = index["base"][1] if below is not None else []
    if below is not None:
        need(not set(left_out) - set(below.files) - set(below.code), "a file is left out that is not there")
        for name, shape, _, _, flags, aliases in index["units"]:
            need(units.get(name) == (shape, flags, aliases), f"the unit {name} is not that of the base")
    with np.errstate(all="ignore"):
        for unit, section in zip(index["units"], of[3], strict=True):
            name, shape, dtype, coder, flags, aliases = unit
            shared.below = None if below is None else matrix_of(tensors[name], flags)
            values = tensor(section, shape, dtype, coder, flags, shared)
            tensors |= dict.fromkeys([name, *aliases], values)
            units[name] = shape, flags, aliases
    need(shared.used == set(range(len(of[7]))), "a shared object that no unit refers to")
    work = Work(sum(map(len, of[4] + of[5])))
    files = {name: content_of(section, work) for name, section in zip(index["files"], of[4], strict=True)}
    code = dict(zip(index.get("code", []), map(code_of, of[5]), strict=True))
    gone = {*left_out, *files, *code}
    if below is not None:
        files = {n: c for n, c in below.files.items() if n not in gone} | files
        code = {n: c for n, c in below.code.items() if n not in gone} | code
    return Content(tensors, files, code, units)


def matrix_of(values, flags):
    """The matrix view (section 4) of a tensor in its stored shape."""
    if values.ndim < 2:
        return values.reshape(1, -1)
    one = values.shape[-1 if flags & 4 else 0]
    other = values.size // one if one else 0
    a, b = (other, one) if flags & 4 else (one, other)
    return values.reshape(a, b).T if flags & 1 else values.reshape(a, b)


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
    need(type(index) is dict and set(index) - {"code", "base"} == {"about", "files", "units"}, "members of the index")
    need(type(index["about"]) is dict and type(index["units"]) is list, "members of the index")
    listed = strings(index["files"]) + (strings(index["code"], 1) if "code" in index else [])
    need(len(set(listed)) == len(listed), "two files of one name")
    for name in listed:
        need(name and name[0] != "." and not set(name) & set("/\\\0"), f"the file name {name!r}")
    if "base" in index:
        base = index["base"]
        need(type(base) is list and len(base) == 2 and type(base[0]) is str, "a base is two things")
        need(re.fullmatch("[0-9a-f]{64}", base[0]) and len(set(strings(base[1]))) == len(base[1]), "a base")
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
