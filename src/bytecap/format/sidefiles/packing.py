"""Pack side files (config, tokenizer) as small as possible and give them back byte for byte.

A `.bcap` file carries its `config.json` and `tokenizer.json`, and both count against the cap. Brotli does well
on prose; it does not know that a BPE tokenizer states every token three times (in the vocabulary, in the merge
that makes it, and in the merges it takes part in), nor what a model's config usually says. The first byte of
packed data names the packing, and `pack` keeps the smallest that reproduces the content:

====  ==========================================================================================
0     stored
1     brotli, quality 11
2     structured JSON: `vocab` and `merges` cut out of the text and coded apart (below); the rest
      of the text, verbatim, follows in packing 0, 1 or 3
3     deflate whose window starts with `bytecap.format.sidefiles.dictionary.TEMPLATE`, the usual text of such files
====  ==========================================================================================

A vocabulary whose ids count up from zero becomes a list of names, and names made by merges are left out. The
merges are pairs of token numbers (byte planes, brotli) or, for vocabularies of moderate size, only the spelling
of the tokens they make (`bytecap.format.sidefiles.bpe_merges`). No floats: everything outside the two blocks stays
text.

What it omits: no checksum (the container has one), so damage is only found where it makes the data
inconsistent, and a shortened *stored* file is just a shorter file; no model of Unigram scores or chat templates
beyond brotli's.

>>> text = b'{"model": {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}}'
>>> unpack("tokenizer.json", pack("tokenizer.json", text)) == text
True
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import brotli

from bytecap.errors import CorruptError
from bytecap.format.coders import leb, read_leb
from bytecap.format.sidefiles import bpe_merges
from bytecap.format.sidefiles.dictionary import TEMPLATE

_STORED, _BROTLI, _STRUCTURED, _DEFLATE = range(4)
_STEP = 1 << 16  # bytes to decompress at a time
_WRITTEN = 4  # characters that a merge takes at least in the text: quotes, space, comma
_MOST, _SPARE, _PER_BYTE = 1 << 28, 1 << 22, 1 << 10  # bytes of content: at most, for nothing, by packed byte
_DAMAGE = (ValueError, IndexError, RecursionError, zlib.error, brotli.error)


@dataclass
class Allowance:
    """The work that unpacking the side and code files of one artifact may still take, however many they are.

    Attributes:
        content: bytes of unpacked content.
        spelling: work of spelled merges, see `bytecap.format.sidefiles.bpe_merges`.
    """

    content: int
    spelling: bpe_merges.Spelling

    @classmethod
    def of(cls, sections: Iterable[bytes]) -> Allowance:
        """The allowance of an artifact whose side and code files have these sections (format.md, 7)."""
        size = sum(map(len, sections))
        return cls(min(_MOST, _SPARE + _PER_BYTE * size), bpe_merges.Spelling.of(size))


# ---------------------------------------------------------------------------------------- whole-file packings


def pack(name: str, content: bytes) -> bytes:
    """Return the smallest packing of a side file that gives back exactly these bytes.

    Args:
        name: file name, for messages only.
        content: any bytes.

    Returns:
        At most one byte more than `content` or its brotli, whichever is smaller; usually far less.
    """
    best = _squeeze(content)
    if len(content) > most(best):
        return bytes([_STORED]) + content
    for data in _dismantle(content):
        if len(data) < len(best) and len(content) <= most(data):
            try:
                same = unpack(name, data, limit=len(content)) == content
            except CorruptError:  # an input that looks structured and is not: the plain packing stands
                same = False
            best = data if same else best
    return best


def most(data: bytes, cap: int = _MOST) -> int:
    """Return the most bytes that packed data may expand to, which keeps bombs out (format.md, 7)."""
    return min(cap, _SPARE + _PER_BYTE * len(data))


def unpack(name: str, data: bytes, *, limit: int | None = None, allowance: Allowance | None = None) -> bytes:
    """Invert `pack`.

    Args:
        name: file name, for messages.
        data: what `pack` returned.
        limit: most bytes to produce, `most(data)` by default.
        allowance: of the artifact, from which the content is taken; one of its own by default.

    Raises:
        CorruptError: `data` is damaged, or holds more than `limit` bytes or than the allowance has left.
    """
    allowance = Allowance.of([data]) if allowance is None else allowance
    limit = min(most(data) if limit is None else limit, allowance.content)
    try:
        structured = data[:1] == bytes([_STRUCTURED])
        content = _assemble(data[1:], limit, allowance) if structured else _release(data, limit)
    except CorruptError as error:
        raise CorruptError(f"{name}: {error}") from None
    except _DAMAGE as error:
        raise CorruptError(f"{name}: damaged ({error})") from None
    if len(content) > limit:
        raise CorruptError(f"{name}: unpacks to more than {limit} bytes")
    allowance.content -= len(content)
    return content


def _squeeze(content: bytes) -> bytes:
    """Return packing 0, 1 or 3, whichever is smallest."""
    tries: list[bytes] = [
        bytes([_STORED]) + content,
        bytes([_BROTLI]) + brotli.compress(content, quality=11),
    ]
    if len(content) <= 1 << 16:
        deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zdict=TEMPLATE)
        tries.append(bytes([_DEFLATE]) + deflate.compress(content) + deflate.flush())
    return min(tries, key=len)


def _release(data: bytes, limit: int) -> bytes:
    """Invert `_squeeze`, never producing much more than `limit` bytes."""
    if not data:
        raise CorruptError("it is empty")
    kind, body = data[0], data[1:]
    if kind == _STORED:
        content = body
    elif kind == _BROTLI:
        content = _unbrotli(body, limit)
    elif kind == _DEFLATE:
        inflate = zlib.decompressobj(-15, zdict=TEMPLATE)
        content = inflate.decompress(body, limit + 1)
        if len(content) <= limit and (not inflate.eof or inflate.unused_data):
            raise CorruptError("its deflate data does not end where it should")
    else:
        raise CorruptError(f"packing {kind} does not exist")
    if len(content) > limit:
        raise CorruptError(f"it unpacks to more than {limit} bytes")
    return content


def _unbrotli(body: bytes, limit: int) -> bytes:
    """Decompress brotli data, stopping soon after `limit` bytes."""
    reader = brotli.Decompressor()
    ration: dict[str, int] = {"output_buffer_limit": _STEP}
    try:
        piece, fed = reader.process(body, **ration), len(body)
    except TypeError:  # before brotli 1.2 only the input can be rationed
        ration, fed = {}, 16
        piece = reader.process(body[:fed])
    out, size = [piece], len(piece)
    while size <= limit and not reader.is_finished() and (piece or fed < len(body)):
        piece = reader.process(b"" if ration else body[fed : fed + 16], **ration)
        fed += 0 if ration else 16
        out.append(piece)
        size += len(piece)
    if size > limit:
        raise CorruptError(f"it unpacks to more than {limit} bytes")
    if not reader.is_finished() or fed < len(body):
        raise CorruptError("its brotli data does not end where it should")
    return b"".join(out)


# ------------------------------------------------------------------------------------------- structured JSON

_LAYOUTS: tuple[tuple[str | None, str, str], ...] = (
    (None, ",", ":"),
    (None, ", ", ": "),
    ("  ", ",", ": "),
    ("    ", ",", ": "),
    (" ", ",", ": "),
    ("\t", ",", ": "),
)
_PAIRS = 64  # in a merges style: [a, b] rather than "a b"
_MERGES = 128  # in a vocabulary style: merges follow
_NUMBERED, _SPELLED = 0, 1  # first byte of the merges


def _render(value: Any, style: int) -> str:
    """Write a block as JSON text in a style, which is `layout * 8 + ascii * 4 + nesting depth`."""
    indent, item, colon = _LAYOUTS[(style & 63) >> 3]
    text = json.dumps(value, indent=indent, ensure_ascii=bool(style & 4), separators=(item, colon))
    return text.replace("\n", "\n" + indent * (style & 3)) if indent else text


def _style(span: str, value: Any) -> int | None:
    """Return the style that writes `value` as `span`, if there is one."""
    last = span.rpartition("\n")[2][:-1]
    for layout, (indent, _, _) in enumerate(_LAYOUTS):
        for low in range(8) if indent else (0, 4):
            if indent and last != indent * (low & 3):
                continue
            if not indent and "\n" in span:
                continue
            if _render(value, layout * 8 + low) == span:
                return layout * 8 + low
    return None


def _refuse(text: str) -> Any:
    raise ValueError(f"{text} where only integers and strings belong")


_JSON = json.JSONDecoder(parse_float=_refuse, parse_constant=_refuse)


def _find(text: str, key: str, opener: str) -> tuple[int, int, Any] | None:
    """Find the first readable block `"key": <opener>...` in a JSON text; returns (start, end, value)."""
    for match in re.finditer(rf'"{key}"\s*:\s*(?=\{opener})', text):
        try:
            value, end = _JSON.raw_decode(text, match.end())
        except (ValueError, RecursionError):
            continue
        return match.end(), end, value
    return None


def _split_merges(value: Any) -> tuple[list[bpe_merges.Merge], int] | None:
    """Split merges into pairs; also returns `_PAIRS` if the file writes them as lists."""
    listed = all(type(m) is list for m in value)
    pairs = [tuple(m) if listed else tuple(m.split(" ")) for m in value if listed or type(m) is str]
    if len(pairs) < len(value) or not all(len(p) == 2 and type(p[0]) is type(p[1]) is str for p in pairs):
        return None
    return pairs, _PAIRS * listed


def _dismantle(content: bytes) -> list[bytes]:
    """Return all structured packings that seem to apply; `pack` checks them."""
    try:
        text = content.decode()
        found = _find(text, "vocab", "{")
        if found is None or list(found[2].values()) != list(range(len(found[2]))):
            return []
        start, end, vocab = found
        style = _style(text[start:end], vocab)
        if style is None:
            return []
        cut = _cut_merges(text, vocab)
        if cut is None:
            tail = _text_part(list(vocab), text[:start] + text[end:])
            return [bytes([_STRUCTURED, style]) + leb(start) + tail]
        at, stop, merge_style, merges = cut
        gap = text[end:at] if start < at else text[stop:start]
        text = text[: min(start, at)] + gap + text[max(end, stop) :]
        places = (start, start + len(gap)) if start < at else (at + len(gap), at)
        head, names = _imply(list(vocab), merges)
        tail = _text_part(names, text)
    except ValueError:
        return []
    prefix = bytes([_STRUCTURED, style | _MERGES, merge_style])
    prefix += b"".join(leb(n) for n in (*places, head, len(merges)))
    blocks = [_write_pairs(head, names, merges)]
    if head and len(merges) <= bpe_merges.MAX_MERGES:
        spelled = bpe_merges.write(names, merges)
        blocks += [bytes([_SPELLED]) + spelled] if spelled else []
    return [prefix + leb(len(b)) + b + tail for b in blocks]


def _text_part(names: list[str], rest: str) -> bytes:
    return _squeeze((json.dumps(names, ensure_ascii=False, separators=(",", ":")) + rest).encode())


def _cut_merges(text: str, vocab: dict[str, int]) -> tuple[int, int, int, list[bpe_merges.Merge]] | None:
    """Find a merges block whose parts are all in the vocabulary; returns (start, end, style, merges)."""
    found = _find(text, "merges", "[")
    split = _split_merges(found[2]) if found else None
    if found is None or not split or not all(a in vocab and b in vocab for a, b in split[0]):
        return None
    style = _style(text[found[0] : found[1]], found[2])
    return None if style is None else (found[0], found[1], style | split[1], split[0])


def _imply(names: list[str], merges: Sequence[bpe_merges.Merge]) -> tuple[int, list[str]]:
    """Leave out merged tokens that form a run: (1 + its position, other names), or (0, all names) if they do not."""
    made = [a + b for a, b in merges]
    head = names.index(made[0]) if made and made[0] in names else -1
    if head < 0 or names[head : head + len(made)] != made:
        return 0, names
    rest = names[:head] + names[head + len(made) :]
    known = set(rest)
    for (a, b), token in zip(merges, made, strict=True):
        if a not in known or b not in known:
            return 0, names
        known.add(token)
    return head + 1, rest


def _assemble(data: bytes, limit: int, allowance: Allowance) -> bytes:
    """Rebuild a file from packing 2 (without its first byte).

    The layout: style of the vocabulary | [style of the merges] | where the vocabulary goes in the text | [where
    the merges go | `_imply`'s first result | number of merges | bytes in the block | block] | the names as
    compact JSON and the rest of the text, squeezed. Fields after a style byte are LEB128, those in brackets are
    there if the first style has `_MERGES`.
    """
    style, merge_style = data[0], data[1] if data[0] & _MERGES else 0
    if style & _PAIRS or merge_style & _MERGES:
        raise CorruptError("its styles have bits that mean nothing")
    fields, pos = [], 2 if style & _MERGES else 1
    for _ in range(5 if style & _MERGES else 1):
        value, pos = read_leb(data, pos)
        fields.append(value)
    start, at, head, count, size = fields if style & _MERGES else (fields[0], 0, 0, 0, 0)
    text = _release(data[pos + size :], limit).decode()
    names, end = _JSON.raw_decode(text)
    text = text[end:]
    if type(names) is not list or not all(type(n) is str for n in names) or head > len(names) + 1:
        raise CorruptError("its vocabulary is no list of names")
    if max(start, at) > len(text):
        raise CorruptError("a block lies outside the text")
    merges: list[bpe_merges.Merge] = []
    if style & _MERGES:
        kind, block = data[pos : pos + size][0], data[pos + 1 : pos + size]
        if kind == _SPELLED and head:
            merges = bpe_merges.read(block, names, count, allowance.spelling)
        elif kind == _NUMBERED:
            merges = _read_pairs(block, bool(head), names, count, limit)
        else:
            raise CorruptError(f"merges of kind {kind} do not exist")
    if head:
        names[head - 1 : head - 1] = [a + b for a, b in merges]
    if sum(map(len, names)) > limit or len(set(names)) < len(names):
        raise CorruptError(f"its tokens have more than {limit} letters, or are not distinct")
    blocks = [(start, _render({n: i for i, n in enumerate(names)}, style & 63))]
    if style & _MERGES:
        written = [list(m) if merge_style & _PAIRS else " ".join(m) for m in merges]
        blocks.append((at, _render(written, merge_style & 63)))
    for place, block_text in sorted(blocks, reverse=True):
        text = text[:place] + block_text + text[place:]
    return text.encode()


# ------------------------------------------------------------------------------------------ merges as numbers


def _write_pairs(head: int, names: Sequence[str], merges: Sequence[bpe_merges.Merge]) -> bytes:
    """Write the token numbers of the parts as byte planes, most significant first."""
    number = {n: i for i, n in enumerate(names)}
    if head:
        number |= {a + b: len(names) + i for i, (a, b) in enumerate(merges)}
    width = (len(number).bit_length() + 7) // 8
    planes = []
    for side in (0, 1):
        raw = b"".join(number[m[side]].to_bytes(width, "big") for m in merges)
        planes += [raw[i::width] for i in range(width)]
    return bytes([_NUMBERED]) + _squeeze(b"".join(planes))


def _read_pairs(block: bytes, grow: bool, names: Sequence[str], count: int, limit: int) -> list[bpe_merges.Merge]:
    """Invert `_write_pairs`."""
    known = list(names)
    width = ((len(known) + count * grow).bit_length() + 7) // 8
    raw = _release(block, limit)
    if len(raw) != 2 * width * count:
        raise CorruptError("its merges are not all there")
    if _WRITTEN * count > limit + _WRITTEN:
        raise CorruptError("its merges take more text than the limit")
    halves = raw[: width * count], raw[width * count :]
    sides = [[int.from_bytes(half[i::count], "big") for i in range(count)] for half in halves]
    merges: list[bpe_merges.Merge] = []
    for a, b in zip(*sides, strict=True):
        merge = known[a], known[b]
        limit -= len(merge[0]) + len(merge[1])
        if limit < 0:
            raise CorruptError("its merges spell more than the limit")
        merges.append(merge)
        if grow:
            known.append(merge[0] + merge[1])
    return merges
