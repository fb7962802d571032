"""Integer frequency tables and the interleaved rANS coder every artifact uses.

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

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from bytecap.errors import CorruptError

IntArray = npt.NDArray[np.integer]

PROB_BITS = 14
TOTAL = 1 << PROB_BITS  # every table's frequencies sum to this
LOW = 1 << 16  # a lane's state lives in [LOW, 2**32)
LANE_SYMBOLS = 8192  # symbols a lane holds; fixes the number of lanes
MAX_CLASS = 63  # class 0 is padding: one symbol of probability 1
MAX_HALF = 1023  # largest |symbol| a table may hold; anything larger is escaped
MAX_SYMBOL = 2**31 - 1  # largest |symbol| at all


def lanes(count: int) -> int:
    """Number of lanes of a stream of `count` symbols.

    >>> lanes(0), lanes(8192), lanes(8193)
    (0, 1, 2)
    """
    return -(-count // LANE_SYMBOLS)


@dataclass(frozen=True)
class Table:
    """Frequencies of the symbols `low .. low + len(freq) - 2`, then of the escape.

    Args:
        low: smallest symbol.
        freq: positive integers with sum `2**14`; the last one is the escape's.
    """

    low: int
    freq: npt.NDArray[np.int64]

    @property
    def high(self) -> int:
        """Largest symbol that needs no escape."""
        return self.low + len(self.freq) - 2


@dataclass(frozen=True)
class Tables:
    """A set of tables, one for each class in use."""

    table: Mapping[int, Table]
    _cache: dict[str, object] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def from_counts(counts: Mapping[int, Mapping[int, float]], *, symmetric: bool = True) -> Tables:
        """Tables fitted to symbol counts per class; `symmetric` gives `z` and `-z` one frequency."""
        fitted = {}
        for cls, histogram in counts.items():
            high = min(max((abs(z) for z in histogram), default=0), MAX_HALF)
            low = -high if symmetric else min(histogram, default=0)
            size = (high if symmetric else max(histogram, default=0)) - low + 1
            dense = np.zeros(size)
            rest = 0.0
            for z, n in histogram.items():
                if low <= z < low + size:
                    dense[z - low] += n
                else:
                    rest += n
            if symmetric:
                dense = (dense + dense[::-1]) / 2
            fitted[cls] = Table(low, integer_frequencies(np.append(dense, rest), symmetric=symmetric))
        return Tables(fitted)

    def distinct(self) -> list[tuple[int, Table]]:
        """Every table once, with the lowest class it serves."""
        return list({id(t): (cls, t) for cls, t in sorted(self.table.items(), reverse=True)}.values())[::-1]

    @cached_property
    def _starts(self) -> npt.NDArray[np.int64]:
        """Start of each class's entries in the concatenated arrays below; entry 0 is the padding symbol."""
        starts = np.full(MAX_CLASS + 1, -1, np.int64)
        starts[0] = 0
        at = 2
        for cls, table in sorted(self.table.items()):
            starts[cls] = at
            at += len(table.freq)
        return starts

    def flat(self, kind: str) -> npt.NDArray[np.int64]:
        """Frequencies (`freq`) or cumulative frequencies (`cum`) of all classes' entries, one after the other."""
        parts = [np.array([TOTAL, 1]) if kind == "freq" else np.array([0, TOTAL])]
        for _, table in sorted(self.table.items()):
            parts.append(table.freq if kind == "freq" else np.cumsum(table.freq) - table.freq)
        return np.concatenate(parts)

    def index(self, symbols: IntArray, classes: IntArray) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Entry of each symbol in the concatenated tables, and which symbols are escaped."""
        low, last = np.zeros(MAX_CLASS + 1, np.int64), np.zeros(MAX_CLASS + 1, np.int64)
        for cls, table in self.table.items():
            low[cls], last[cls] = table.low, len(table.freq) - 1
        offset = symbols.astype(np.int64) - low[classes]
        escaped = (offset < 0) | (offset >= last[classes])
        escaped &= classes > 0
        starts = self._starts[classes]
        if starts.min(initial=0) < 0:
            raise CorruptError("a symbol's class has no table")
        return starts + np.where(escaped, last[classes], offset), escaped

    def bits(self, symbols: IntArray, classes: IntArray) -> float:
        """Ideal code length of the symbols in bits, escapes' own bytes not included."""
        entry, _ = self.index(symbols, classes)
        return float(np.bincount(entry) @ self.cost[: int(entry.max(initial=-1)) + 1])

    @cached_property
    def cost(self) -> npt.NDArray[np.float64]:
        """Bits of every entry of the concatenated tables."""
        return PROB_BITS - np.log2(self.flat("freq"))

    @cached_property
    def lookup(self) -> npt.NDArray[np.uint64]:
        """(classes, 2**14) slots: symbol index << 32 | frequency - 1 << 16 | slot - cumulative frequency."""
        table = np.zeros((max(self.table, default=0) + 1, TOTAL), np.uint64)
        slots = np.arange(TOTAL, dtype=np.uint64)
        table[0] = slots | np.uint64((TOTAL - 1) << 16)
        for cls, entry in self.table.items():
            freq = entry.freq.astype(np.uint64)
            cum = np.cumsum(freq) - freq
            which = np.repeat(np.arange(len(freq)), entry.freq)
            table[cls] = (which.astype(np.uint64) << 32) | ((freq - 1)[which] << 16) | (slots - cum[which])
        return table


def integer_frequencies(weights: npt.NDArray[np.float64], *, symmetric: bool = False) -> npt.NDArray[np.int64]:
    """Positive integers with sum `2**14`, close to proportional to `weights` (the last one is the escape's).

    >>> integer_frequencies(np.array([1.0, 6.0, 1.0, 0.0]), symmetric=True).tolist()
    [2048, 12287, 2048, 1]
    """
    size = len(weights)
    if size > TOTAL // 2:
        raise ValueError(f"{size} symbols do not fit a table of {TOTAL}")
    total = weights.sum()
    share = weights / total if total > 0 else np.full(size, 1 / size)
    freq = np.maximum(1, np.floor(share * TOTAL + 0.5)).astype(np.int64)
    if symmetric:
        half = (size - 1) // 2
        freq[half + 1 : -1] = freq[:half][::-1]
    while (excess := int(freq.sum()) - TOTAL) != 0:
        if symmetric:
            excess = _take_symmetric(freq, excess)
            continue
        top = int(np.argmax(freq))
        freq[top] -= min(excess, int(freq[top]) - 1) if excess > 0 else excess
    return freq


def _take_symmetric(freq: npt.NDArray[np.int64], excess: int) -> int:
    """Move `excess` out of the largest entries, keeping both signs equal; the centre takes what is odd."""
    half = (len(freq) - 2) // 2
    centre = half
    if excess < 0 or freq[centre] > excess:
        freq[centre] -= excess
        return 0
    freq[centre] = max(1, int(freq[centre]) // 2)
    largest = int(np.argmax(freq[:half]))
    cut = min(int(freq[largest]) // 2, (excess + 1) // 2)
    freq[largest] -= cut
    freq[-2 - largest] -= cut
    return excess


def zigzag_bytes(values: Iterable[int]) -> bytes:
    """Unsigned LEB128 of zigzag-mapped integers.

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


def _read_zigzag(data: bytes, count: int) -> list[int]:
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


def encode(symbols: IntArray, classes: IntArray, tables: Tables) -> bytes:
    """One stream: lane states, shared words, escaped symbols.

    Args:
        symbols: integers, any range, shape `(n,)`.
        classes: table of each symbol, in 1..63, shape `(n,)`.
        tables: the frequency tables.

    Returns:
        `u32` word count (as LEB128), `K` states (`<u4`), the words (`<u2`), then escaped symbols (zigzag LEB128).
    """
    n = len(symbols)
    if n == 0:
        return b""
    k = lanes(n)
    steps = -(-n // k)
    entry, escaped = tables.index(symbols, classes)
    padded = np.zeros(steps * k, np.int64)  # entry 0: the padding symbol
    padded[:n] = entry
    freq = tables.flat("freq")[padded].astype(np.uint64).reshape(steps, k)
    cum = tables.flat("cum")[padded].astype(np.uint64).reshape(steps, k)
    limit = freq << np.uint64(32 - PROB_BITS)
    state = np.full(k, LOW, np.uint64)
    chunks = []
    for t in range(steps - 1, -1, -1):
        over = state >= limit[t]
        chunks.append(state[over].astype("<u2"))
        state = np.where(over, state >> np.uint64(16), state)
        quotient, remainder = np.divmod(state, freq[t])
        state = (quotient << np.uint64(PROB_BITS)) + remainder + cum[t]
    words = np.concatenate(chunks[::-1])
    tail = zigzag_bytes(int(z) for z in symbols[escaped])
    return zigzag_bytes([len(words)]) + state.astype("<u4").tobytes() + words.tobytes() + tail


@dataclass(frozen=True)
class Stream:
    """What `decode` needs: the bytes `encode` gave, every symbol's class, and the tables."""

    data: bytes
    classes: IntArray
    tables: Tables


def _split(stream: Stream) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint16], bytes]:
    """States, words and the escapes' bytes of a stream."""
    data, at, count, shift = stream.data, 0, 0, 0
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
    k = lanes(len(stream.classes))
    end = at + 4 * k + 2 * count
    if end > len(data):
        raise CorruptError(f"a stream of {len(data)} bytes declares {count} words and {k} lanes: truncated")
    states = np.frombuffer(data, "<u4", k, at)
    if states.min(initial=LOW) < LOW:
        raise CorruptError("a stream begins in an impossible state")
    return states, np.frombuffer(data, "<u2", count, at + 4 * k), data[end:]


def escape_bytes(stream: Stream) -> int:
    """Bytes a stream spends on escaped symbols."""
    return len(_split(stream)[2]) if len(stream.classes) else 0


def decode(streams: list[Stream]) -> list[npt.NDArray[np.int32]]:
    """Symbols of every stream; all lanes of all streams advance together.

    Raises:
        CorruptError: a stream is truncated, has bytes left over, or does not end in the initial state.
    """
    order = sorted((i for i, s in enumerate(streams) if len(s.classes)), key=lambda i: -_steps(streams[i]))
    result: list[npt.NDArray[np.int32]] = [np.zeros(0, np.int32)] * len(streams)
    for i, stream in enumerate(streams):
        if not len(stream.classes) and stream.data:
            raise CorruptError(f"an empty stream holds {len(stream.data)} bytes")
        result[i] = np.zeros(len(stream.classes), np.int32)
    if order:
        indices, tails = _run_lanes([streams[i] for i in order])
        for i, index, tail in zip(order, indices, tails, strict=True):
            result[i] = _symbols(streams[i], index, tail)
    return result


def _steps(stream: Stream) -> int:
    n = len(stream.classes)
    return -(-n // lanes(n))


def _run_lanes(streams: list[Stream]) -> tuple[list[npt.NDArray[np.uint16]], list[bytes]]:
    """Symbol indices of streams sorted by falling number of steps."""
    parts = [_split(s) for s in streams]
    width = np.array([len(p[0]) for p in parts])
    steps = np.array([_steps(s) for s in streams])
    first = np.concatenate([[0], np.cumsum(width)])
    luts, bases = _join_lookups(streams)
    classes = np.zeros((int(steps[0]), int(first[-1])), np.uint32)
    for s, lo, hi, t, base in zip(streams, first, first[1:], steps, bases, strict=False):
        padded = np.zeros(t * (hi - lo), np.uint32)
        padded[: len(s.classes)] = s.classes
        classes[:t, lo:hi] = (padded.reshape(t, hi - lo) + base) << PROB_BITS
    words = np.concatenate([p[1] for p in parts] + [np.zeros(1, "<u2")]).astype(np.uint32)
    counts = np.array([len(p[1]) for p in parts])
    pointer = np.cumsum(counts) - counts
    start = pointer.copy()
    state = np.concatenate([p[0] for p in parts]).astype(np.uint32)
    out = np.empty(classes.shape, np.uint16)
    at = 0
    for stop in sorted(set(steps.tolist())):
        live = int((steps > at).sum())
        state[: first[live]] = _advance(
            state[: first[live]], classes[at:stop, : first[live]], out[at:stop, : first[live]], luts, words,
            pointer[:live], width[:live],
        )  # fmt: skip
        at = stop
    for i, (lo, hi) in enumerate(pairwise(first)):
        if (state[lo:hi] != LOW).any() or pointer[i] - start[i] != counts[i]:
            raise CorruptError(f"stream {i} does not end in its initial state: damaged")
    spans = zip(streams, first, first[1:], steps, strict=False)
    return [out[:t, lo:hi].reshape(-1)[: len(s.classes)] for s, lo, hi, t in spans], [p[2] for p in parts]


def _join_lookups(streams: list[Stream]) -> tuple[npt.NDArray[np.uint64], list[int]]:
    """All distinct tables in one array, and each stream's first row in it."""
    luts, row_of, rows = [], {}, 0
    for s in streams:
        if id(s.tables) not in row_of:
            row_of[id(s.tables)] = rows
            luts.append(s.tables.lookup)
            rows += len(luts[-1])
        if int(s.classes.max()) >= len(s.tables.lookup):
            raise CorruptError(f"class {int(s.classes.max())} has no table")
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
    """Decode one symbol a lane for every row of `classes`; moves `pointer` (one word pointer a stream)."""
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


def _symbols(stream: Stream, index: npt.NDArray[np.uint16], tail: bytes) -> npt.NDArray[np.int32]:
    """Turn symbol indices into symbols and put the escaped ones in."""
    low, last = np.zeros(MAX_CLASS + 1, np.int32), np.full(MAX_CLASS + 1, -1, np.int32)
    for cls, table in stream.tables.table.items():
        low[cls], last[cls] = table.low, len(table.freq) - 1
    symbols = index.astype(np.int32) + low[stream.classes]
    escaped = np.flatnonzero(index == last[stream.classes])
    symbols[escaped] = _read_zigzag(tail, len(escaped))
    return symbols
