"""Sections 7 to 7.2 of docs/format.md: side files, structured JSON, numbered merges; appendices from the document."""

import base64
import hashlib
import json
import re
import zlib
from functools import cache
from pathlib import Path

import numpy as np

from stranger.basics import Bytes, CorruptError, need, unbrotli, unzip
from stranger.spelled import spelled

DOCUMENT = Path(__file__).parents[2] / "docs" / "format.md"
LAYOUTS = (
    ("", ",", ":"),
    ("", ", ", ": "),
    ("  ", ",", ": "),
    ("    ", ",", ": "),
    (" ", ",", ": "),
    ("\t", ",", ": "),
)


@cache
def appendix(language):
    text = DOCUMENT.read_text("utf-8").split("## Appendix", 1)[1]
    return re.search(rf"```{language}\n(.*?)```", text, re.DOTALL)[1]


@cache
def template():
    found = zlib.decompress(base64.b64decode(appendix("base64")))
    assert len(found) == 6165
    assert hashlib.sha256(found).hexdigest() == "da5e54c337d726f8205da0cd810fa7ab1ff05c27c99d434e52164fc02891d3bf"
    return found


def content_of(section, work):
    """A side file's bytes."""
    source = Bytes(section)
    packing = source.u8(0, 3)
    return structured(source, work) if packing == 2 else unpack(packing, source.rest())


def unpack(packing, data):
    if packing == 0:
        return data
    if packing == 1:
        return unbrotli(data)
    need(packing == 3, f"there is no packing {packing}")
    return unzip(data, window=-15, template=template())


def structured(source, work):
    style = source.u8()
    need(not style & 64, "an unused bit of the style")
    merge_style = source.u8(0, 127) if style & 128 else 0
    start = source.leb()
    at = head = count = 0
    block = None
    if style & 128:
        at, head, count = source.leb(), source.leb(), source.leb()
        block = source.part()
    names, text = tail(source.u8(), source.rest())
    need(head <= len(names) + 1, f"head {head} of {len(names)} names")
    merges = read_merges(block, names, head, count, work) if block else []
    made = [a + b for a, b in merges] if head else []
    tokens = names[: head - 1] + made + names[head - 1 :] if head else names
    need(len(set(tokens)) == len(tokens), "two equal tokens")
    need(max(start, at) <= len(text), "a place beyond the text")
    blocks = [(start, 1, write(style, dict(zip(tokens, range(len(tokens)), strict=True))))]
    if block:
        listed = [list(pair) for pair in merges] if merge_style & 64 else [" ".join(pair) for pair in merges]
        blocks.append((at, 0, write(merge_style, listed)))
    for place, _, written in sorted(blocks, reverse=True):
        text = text[:place] + written + text[place:]
    return encode(text)


def encode(text):
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as exc:
        raise CorruptError(f"text: {exc}") from exc


def tail(packing, data):
    try:
        text = unpack(packing, data).decode("utf-8")
        names, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError) as exc:
        raise CorruptError(f"the tail: {exc}") from exc
    need(type(names) is list and all(type(name) is str for name in names), "names are strings")
    encode("".join(names))
    return names, text[end:]


def read_merges(block, names, head, count, work):
    if block.u8(0, 1):
        need(head, "spelled merges without a head")
        need(count <= 8192, f"{count} spelled merges")
        return spelled(block.rest(), names, count, appendix("words").split(), work)
    content = unpack(block.u8(), block.rest())
    total = len(names) + (count if head else 0)
    width = (total.bit_length() + 7) // 8
    need(len(content) == 2 * width * count, f"{len(content)} bytes of {count} merges")
    made, merges = list(names), []
    numbers = np.zeros((2, count), object)
    for plane in np.frombuffer(content, np.uint8).reshape(2, width, count).transpose(1, 0, 2):
        numbers = numbers * 256 + plane
    for first, second in numbers.T.tolist():
        need(max(first, second) < len(made), "a merge of parts to come")
        merges.append((made[first], made[second]))
        if head:
            made.append(made[first] + made[second])
    return merges


def write(style, value):
    """JSON in a style."""
    low = style & 63
    need(low >> 3 < len(LAYOUTS), f"there is no layout {low >> 3}")
    indent, between, behind = LAYOUTS[low >> 3]
    return _write(value, indent, between, behind, bool(low & 4), low & 3)


def _write(value, indent, between, behind, ascii_only, depth):
    if isinstance(value, str):
        return _string(value, ascii_only)
    if isinstance(value, int):
        return str(value)
    items = [_write(item, indent, between, behind, ascii_only, depth + 1) for item in value]
    if isinstance(value, dict):
        items = [key + behind + str(number) for key, number in zip(items, value.values(), strict=True)]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    if not indent or not items:
        return opening + between.join(items) + closing
    inner, outer = "\n" + indent * (depth + 1), "\n" + indent * depth
    return opening + inner + (between + inner).join(items) + outer + closing


def _string(text, ascii_only):
    short = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\t": "\\t", "\n": "\\n", "\f": "\\f", "\r": "\\r"}
    out = []
    for letter in text:
        code = ord(letter)
        if letter in short:
            out.append(short[letter])
        elif code < 32 or (ascii_only and code > 126):
            units = letter.encode("utf-16-be")
            out += [f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2)]
        else:
            out.append(letter)
    return '"' + "".join(out) + '"'
