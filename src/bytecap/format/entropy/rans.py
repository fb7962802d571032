"""The interleaved rANS coder that every artifact uses.

A *stream* is a sequence of integer symbols, each with a *class* known to the decoder beforehand. A class
names a static table of integer frequencies that sum to `2**14`. Symbols are dealt to `K` lanes (symbol `i`
to lane `i mod K`); every lane is an ordinary 32-bit rANS coder with 16-bit renormalisation, and the lanes
of a stream share one sequence of 16-bit words, so numpy decodes all lanes of all streams at once.
Integer arithmetic only: decoding is bit-exact on every machine. `docs/format.md` section 5 is the law here.

Why lanes instead of one long stream: docs/adr/0002-entropy-coder.md has the measurement.

Source: Duda, "Asymmetric numeral systems", arXiv:1311.2540; Giesen, "Interleaved entropy coders",
arXiv:1402.3392. Omitted on purpose: adaptive models, which would make the lanes depend on each other.

>>> tables = Tables.from_counts({1: {0: 90, 1: 9, -1: 9}})
>>> symbols = np.array([0, 0, 1, -1, 0, 7]); classes = np.ones(6, np.uint8)
>>> data = encode(symbols, classes, tables)
>>> [int(s) for s in decode([Stream(data, classes, tables)])[0]]
[0, 0, 1, -1, 0, 7]
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from bytecap.errors import CorruptError
from bytecap.format.entropy import jit
from bytecap.format.entropy.frequencies import PROB_BITS, TOTAL, IntArray, Tables
from bytecap.types import Bytes

LOW = 1 << 16  # a lane's state lives in [LOW, 2**32)
_TOGETHER = 2**20  # symbols that are looked up together
LANE_SYMBOLS = 8192  # symbols a lane holds; fixes the number of lanes
MAX_SYMBOL = 2**31 - 1  # largest |symbol| at all


def lanes(count: int) -> int:
    """Return the number of lanes of a stream of `count` symbols.

    >>> lanes(0), lanes(8192), lanes(8193)
    (0, 1, 2)
    """
    return -(-count // LANE_SYMBOLS)


def check_room(size: int, count: int) -> None:
    """Refuse a stream of `size` bytes that is too short for `count` symbols, before memory is allocated for them.

    Raises:
        CorruptError: the lanes' states alone take more.
    """
    if count and size < 1 + 4 * lanes(count):
        raise CorruptError(f"a stream of {size} bytes is truncated: {count} symbols have {lanes(count)} lanes")


def zigzag_bytes(values: Iterable[int]) -> bytes:
    """Encode integers as zigzag-mapped unsigned LEB128.

    >>> zigzag_bytes([0, -1, 1, 64]).hex()
    '0001028001'
    """
    out = bytearray()
    for value in values:
        rest = value * 2 if value >= 0 else -value * 2 - 1
        while rest >= 128:
            out.append(rest & 127 | 128)
            rest >>= 7
        out.append(rest)
    return bytes(out)


def read_zigzag(data: Bytes, count: int) -> list[int]:
    """Read so many integers from exactly the bytes that `zigzag_bytes` made."""
    values = []
    at = 0
    for _ in range(count):
        rest, shift = 0, 0
        while True:
            if at >= len(data) or shift > 56:
                raise CorruptError("the escaped symbols of a stream are damaged")
            rest |= (data[at] & 127) << shift
            shift += 7
            at += 1
            if data[at - 1] < 128:
                break
        values.append(rest >> 1 if rest % 2 == 0 else -(rest >> 1) - 1)
        if abs(values[-1]) > MAX_SYMBOL:
            raise CorruptError(f"a stream holds the escaped symbol {values[-1]}")
    if at != len(data):
        raise CorruptError(f"{len(data) - at} bytes are left over behind the escaped symbols of a stream")
    return values


@dataclass(frozen=True)
class Source:
    """The input of `encode_all`: symbols (n,) of any range, each symbol's class (n,) in 1..63, and the tables."""

    symbols: IntArray
    classes: IntArray
    tables: Tables


def encode(symbols: IntArray, classes: IntArray, tables: Tables) -> bytes:
    """Encode one stream; see `encode_all`."""
    return encode_all([Source(symbols, classes, tables)])[0]


def encode_all(sources: Sequence[Source]) -> list[bytes]:
    """Encode several sources as one stream each; the lanes of all of them advance together.

    Returns:
        For each: word count (zigzag LEB128), `K` states (`<u4`), the words (`<u2`), escaped symbols (zigzag LEB128);
        nothing at all for a source without symbols.
    """
    order = sorted((i for i, s in enumerate(sources) if len(s.symbols)), key=lambda i: -_steps(sources[i]))
    result = [b""] * len(sources)
    if not order:
        return result
    if jit.worth(sum(len(s.symbols) for s in sources)):
        for i in order:
            result[i] = _encode_compiled(sources[i])
        return result
    chosen = [sources[i] for i in order]
    width = np.array([lanes(len(s.symbols)) for s in chosen])
    steps = np.array([_steps(s) for s in chosen])
    first = np.concatenate([[0], np.cumsum(width)])
    entries, freq, cum, tails = _entries(chosen, steps, first)
    state = np.full(int(first[-1]), LOW, np.uint32)
    owners, words = [], []
    owner = np.repeat(np.arange(len(chosen)), width)
    bits, sixteen, top = np.uint32(PROB_BITS), np.uint32(16), np.uint32(32 - PROB_BITS)
    active = 0
    for t in range(int(steps[0]) - 1, -1, -1):
        while active < len(chosen) and steps[active] > t:
            active += 1
        x, entry = state[: first[active]], entries[t, : first[active]]
        f = freq[entry]
        over = np.flatnonzero((x >> top) >= f)
        words.append(x[over].astype("<u2"))
        owners.append(owner[over])
        x[over] >>= sixteen
        quotient = x // f
        x[:] = (quotient << bits) + (x - quotient * f) + cum[entry]
    all_words, all_owners = np.concatenate(words[::-1]), np.concatenate(owners[::-1])
    all_words = all_words[np.argsort(all_owners, kind="stable")]
    ends = np.cumsum(np.bincount(all_owners, minlength=len(chosen)))
    for j, i in enumerate(order):
        mine = all_words[ends[j - 1] if j else 0 : ends[j]]
        result[i] = zigzag_bytes([len(mine)]) + state[first[j] : first[j + 1]].tobytes() + mine.tobytes() + tails[j]
    return result


def _encode_compiled(source: Source) -> bytes:
    """Encode one stream that is not empty, by machine code, whole turns of the lanes at a time, the last ones first."""
    freq, cum = source.tables.freq, source.tables.cum
    count = len(source.symbols)
    states = np.full(lanes(count), LOW, np.uint32)
    step = max(1, _TOGETHER // len(states)) * len(states)
    words, tails = [], []
    for at in reversed(range(0, count, step)):
        symbols, classes = source.symbols[at : at + step], source.classes[at : at + step]
        entry, escaped = source.tables.index(symbols, classes)
        words.append(jit.encode_lanes(entry, freq, cum, states).tobytes())
        tails.append(zigzag_bytes(int(z) for z in symbols[escaped]))
    size = sum(map(len, words)) // 2
    return b"".join([zigzag_bytes([size]), states.tobytes(), *reversed(words), *reversed(tails)])


def _entries(
    sources: Sequence[Source], steps: npt.NDArray[np.int64], first: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint32], npt.NDArray[np.uint32], list[bytes]]:
    """Table entries (steps, lanes), frequencies and cumulative frequencies of all tables, and the escapes' bytes."""
    entries = np.zeros((int(steps[0]), int(first[-1])), np.int32)  # entry 0 of any tables is the padding symbol
    start_of: dict[int, int] = {}
    freq, cum, tails, size = [], [], [], 0
    for s, lo, hi, t in zip(sources, first, first[1:], steps, strict=False):
        if id(s.tables) not in start_of:
            start_of[id(s.tables)] = size
            freq.append(s.tables.freq)
            cum.append(s.tables.cum)
            size += len(freq[-1])
        entry, escaped = s.tables.index(s.symbols, s.classes)
        padded = np.zeros(t * (hi - lo), np.int32)
        padded[: len(entry)] = entry + start_of[id(s.tables)]
        entries[:t, lo:hi] = padded.reshape(t, hi - lo)
        tails.append(zigzag_bytes(int(z) for z in s.symbols[escaped]))
    return entries, np.concatenate(freq).astype(np.uint32), np.concatenate(cum).astype(np.uint32), tails


@dataclass(frozen=True)
class Stream:
    """The input of `decode`: the bytes that `encode` made, each symbol's class, and the tables."""

    data: Bytes
    classes: IntArray
    tables: Tables


def split(data: Bytes, symbols: int) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint16], Bytes]:
    """Split a stream of so many symbols into states, words and the escapes' bytes."""
    at, count, shift = 0, 0, 0
    while True:
        if at >= len(data) or shift > 35:
            raise CorruptError("a stream ends inside its word count")
        count |= (data[at] & 127) << shift
        shift += 7
        at += 1
        if data[at - 1] < 128:
            break
    if count % 2:
        raise CorruptError("a stream declares a negative number of words")
    count >>= 1
    k = lanes(symbols)
    end = at + 4 * k + 2 * count
    if end > len(data):
        raise CorruptError(f"a stream of {len(data)} bytes declares {count} words and {k} lanes: truncated")
    states = np.frombuffer(data, "<u4", k, at)
    if states.min(initial=LOW) < LOW:
        raise CorruptError("a stream begins in an impossible state")
    return states, np.frombuffer(data, "<u2", count, at + 4 * k), data[end:]


def escape_bytes(stream: Stream) -> int:
    """Return the bytes that a stream spends on escaped symbols."""
    return len(split(stream.data, len(stream.classes))[2]) if len(stream.classes) else 0


def decode(streams: list[Stream]) -> list[npt.NDArray[np.int32]]:
    """Decode streams to their symbols; all lanes of all streams advance together.

    Raises:
        CorruptError: a stream is truncated, has bytes left over, or does not end in the initial state.
    """
    order = sorted((i for i, s in enumerate(streams) if len(s.classes)), key=lambda i: -_steps(streams[i]))
    result: list[npt.NDArray[np.int32]] = [np.zeros(0, np.int32)] * len(streams)
    for stream in streams:
        if not len(stream.classes) and stream.data:
            raise CorruptError(f"an empty stream holds {len(stream.data)} bytes")
    if jit.worth(sum(len(s.classes) for s in streams)):
        for i in order:
            result[i] = _decode_compiled(i, streams[i])
    elif order:
        indices, tails = _run_lanes([streams[i] for i in order])
        for i, index, tail in zip(order, indices, tails, strict=True):
            result[i] = _symbols(streams[i], index, tail)
    return result


def _decode_compiled(number: int, stream: Stream) -> npt.NDArray[np.int32]:
    """Decode one stream that is not empty, by machine code."""
    states, words, tail = split(stream.data, len(stream.classes))
    states = states.copy()
    symbols, escaped, used = jit.run_lanes(states, words.astype(np.uint16), stream.classes, stream.tables, len(tail))
    check_end(f"stream {number}", states, used, len(words))
    symbols[escaped] = read_zigzag(tail, len(escaped))
    return symbols


def check_end(name: str, states: npt.NDArray[np.uint32], used: int, count: int) -> None:
    """Refuse a stream whose lanes do not end where they began, or that has words left."""
    if (states != LOW).any() or used != count:
        raise CorruptError(f"{name} does not end in its initial state: damaged")


def _steps(stream: Stream | Source) -> int:
    n = len(stream.classes)
    return -(-n // lanes(n))


def _run_lanes(streams: list[Stream]) -> tuple[list[npt.NDArray[np.uint16]], list[Bytes]]:
    """Return symbol indices of streams that are sorted by falling number of steps."""
    parts = [split(s.data, len(s.classes)) for s in streams]
    width = np.array([len(p[0]) for p in parts])
    steps = np.array([_steps(s) for s in streams])
    first = np.concatenate([[0], np.cumsum(width)])
    luts, bases = _join_lookups(streams)
    classes = np.zeros((int(steps[0]), int(first[-1])), np.uint32)
    for s, lo, hi, t, base in zip(streams, first, first[1:], steps, bases, strict=False):
        padded = np.zeros(t * (hi - lo), np.uint32)
        padded[: len(s.classes)] = s.tables.row[s.classes]
        classes[:t, lo:hi] = (padded.reshape(t, hi - lo) + base) << PROB_BITS
    words = np.concatenate([p[1] for p in parts] + [np.zeros(1, "<u2")]).astype(np.uint32)
    counts = np.array([len(p[1]) for p in parts])
    pointer = np.cumsum(counts) - counts
    start = pointer.copy()
    state = np.concatenate([p[0] for p in parts]).astype(np.uint32)
    out = np.empty(classes.shape, np.uint16)
    at = 0
    for stop in sorted(set(steps.tolist())):
        active = int((steps > at).sum())
        state[: first[active]] = _advance(
            state[: first[active]], classes[at:stop, : first[active]], out[at:stop, : first[active]], luts, words,
            pointer[:active], width[:active],
        )  # fmt: skip
        at = stop
    for i, (lo, hi) in enumerate(pairwise(first)):
        check_end(f"stream {i}", state[lo:hi], int(pointer[i] - start[i]), int(counts[i]))
    spans = zip(streams, first, first[1:], steps, strict=False)
    return [out[:t, lo:hi].reshape(-1)[: len(s.classes)] for s, lo, hi, t in spans], [p[2] for p in parts]


def _join_lookups(streams: list[Stream]) -> tuple[npt.NDArray[np.uint64], list[int]]:
    """Put all distinct tables into one array; returns it and each stream's first row in it."""
    luts, row_of, rows = [], {}, 0
    for s in streams:
        if id(s.tables) not in row_of:
            row_of[id(s.tables)] = rows
            luts.append(s.tables.lookup)
            rows += len(luts[-1])
        used = np.flatnonzero(np.bincount(s.classes, minlength=1))
        missing = used[s.tables.row[used] < 0]
        if len(missing):
            raise CorruptError(f"class {missing[0]} has no table")
    return np.concatenate(luts).reshape(-1), [row_of[id(s.tables)] for s in streams]


def _advance(
    state: npt.NDArray[np.uint32],
    classes: npt.NDArray[np.uint32],
    out: npt.NDArray[np.uint16],
    lut: npt.NDArray[np.uint64],
    words: npt.NDArray[np.uint32],
    pointer: npt.NDArray[np.int64],
    width: npt.NDArray[np.int64],
) -> npt.NDArray[np.uint32]:
    """Decode one symbol a lane for every row of `classes`; advances `pointer`, one word pointer a stream."""
    bounds = np.concatenate([[0], np.cumsum(width)])
    last = len(words) - 1
    mask = np.uint32(TOTAL - 1)
    bits, sixteen, one = np.uint32(PROB_BITS), np.uint32(16), np.uint32(1)
    entry = np.empty(len(state), np.uint64)
    low, index = entry.view("<u4")[::2], entry.view("<u4")[1::2]
    ramp = np.arange(len(state))
    slot = np.empty(len(state), np.uint32)
    for t in range(len(classes)):
        np.bitwise_and(state, mask, out=slot)
        np.add(slot, classes[t], out=slot)
        np.take(lut, slot, out=entry, mode="clip")
        out[t] = index
        state >>= bits
        np.right_shift(low, sixteen, out=slot)
        slot += one
        state *= slot
        np.bitwise_and(low, mask, out=slot)
        state += slot
        need = np.flatnonzero(state < LOW)
        before = np.searchsorted(need, bounds)
        used = before[1:] - before[:-1]
        at = np.repeat(pointer - before[:-1], used) + ramp[: len(need)]
        state[need] = (state[need] << sixteen) | words.take(at, mode="clip")
        pointer += used
    if (pointer > last).any():
        raise CorruptError("a stream runs past its words")
    return state


def _symbols(stream: Stream, index: npt.NDArray[np.uint16], tail: Bytes) -> npt.NDArray[np.int32]:
    """Turn symbol indices into symbols and put the escaped ones in."""
    low, last = stream.tables.edges
    symbols = low.take(stream.classes)
    symbols += index
    escaped = np.flatnonzero(index == last.take(stream.classes))
    symbols[escaped] = read_zigzag(tail, len(escaped))
    return symbols
