"""Integer frequency tables, the rANS coder's model of symbols.

A table gives every symbol of a class a positive integer frequency; frequencies, the escape's included, sum to
`2**14`. Fitting may use floating point, coding never does. `bytecap.format.entropy.shared_tables` fits and stores the
tables a file shares.

>>> tables = Tables.from_counts({1: {0: 6, 1: 1, -1: 1}})
>>> round(tables.bits(np.array([0, 0, 1]), np.ones(3, np.uint8)), 1)
3.8
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from bytecap.errors import CorruptError

T = TypeVar("T")
IntArray = npt.NDArray[np.integer]

PROB_BITS = 14
TOTAL = 1 << PROB_BITS  # every table's frequencies sum to this
MAX_CLASS = 63  # class 0 is padding: one symbol of probability 1
SPLIT_CLASSES = 4 * (MAX_CLASS + 1)  # classes of split tables: whole, then restricted to 4m, 4m+1, 4m+2
MAX_HALF = 1023  # largest |symbol| a table may hold; anything larger is escaped
_FAR = 2**30  # escaped under any table


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
        """The largest symbol that needs no escape."""
        return self.low + len(self.freq) - 2


@dataclass(frozen=True)
class Tables:
    """A set of tables, one for each class in use."""

    table: Mapping[int, Table]
    _kept: dict[bytes, Any] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def from_counts(counts: Mapping[int, Mapping[int, float]], *, symmetric: bool = True) -> Tables:
        """Fit tables to symbol counts per class; `symmetric` gives `z` and `-z` one frequency."""
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

    def kept(self, key: bytes, make: Callable[[], T]) -> T:
        """Return what was made of these tables under a key, making it if nothing was."""
        if key not in self._kept:
            self._kept[key] = make()
        found: T = self._kept[key]
        return found

    def distinct(self) -> list[tuple[int, Table]]:
        """Every distinct table once, with the lowest class that uses it."""
        return list({id(t): (cls, t) for cls, t in sorted(self.table.items(), reverse=True)}.values())[::-1]

    @cached_property
    def _starts(self) -> npt.NDArray[np.int32]:
        """Start of each class's entries in the concatenated arrays below, where entry 0 is the padding symbol."""
        starts = np.full(SPLIT_CLASSES, -1, np.int32)
        starts[0] = 0
        at = 2
        for cls, table in sorted(self.table.items()):
            starts[cls] = at
            at += len(table.freq)
        return starts

    @cached_property
    def freq(self) -> npt.NDArray[np.int64]:
        """Concatenated frequencies of all classes."""
        return np.concatenate([[TOTAL, 1], *(t.freq for _, t in sorted(self.table.items()))])

    @cached_property
    def cum(self) -> npt.NDArray[np.int64]:
        """Concatenated cumulative frequencies of all classes."""
        made = {id(t): np.cumsum(t.freq) - t.freq for t in self.table.values()}
        return np.concatenate([[0, TOTAL], *(made[id(t)] for _, t in sorted(self.table.items()))])

    @cached_property
    def coding(self) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
        """The tables as `bytecap.format.entropy.encode_kernels` takes them, by class and by entry.

        Classes without a table have the padding symbol's. A reciprocal is `2^(32 + shift) / frequency` rounded up,
        without its highest bit, where `2^shift` is the least power of two that is not below the frequency.
        """
        low, last = self.edges
        tables = np.maximum(self._starts, 0).astype(np.int64) << 32 | last.astype(np.int64) << 16 | (low & 0xFFFF)
        freq, cum = self.freq, self.cum & (TOTAL - 1)
        shift = np.frexp(freq - 1.0)[1].astype(np.int64)
        reciprocal = -((-1 << (32 + shift)) // freq) - (1 << 32)
        model = shift.astype(np.uint64) << np.uint64(60) | (cum << 46 | (freq - 1) << 32 | reciprocal).astype(np.uint64)
        return tables.astype(np.uint64), model

    def index(self, symbols: IntArray, classes: IntArray) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """Return each symbol's entry in the concatenated tables, and a mask of the escaped symbols."""
        low, last = self.edges
        if symbols.dtype.itemsize > 2:
            symbols = np.clip(symbols, -_FAR, _FAR)
        offset = symbols.astype(np.int32) - low[classes]
        end = last[classes]
        escaped = (offset < 0) | (offset >= end)
        escaped &= classes > 0
        np.copyto(offset, end, where=escaped)
        starts = self._starts[classes]
        if starts.min(initial=0) < 0:
            raise CorruptError("a symbol's class has no table")
        offset += starts
        return offset, escaped

    def bits(self, symbols: IntArray, classes: IntArray) -> float:
        """Return the ideal code length of symbols in bits, without the bytes of escaped values."""
        entry, _ = self.index(symbols, classes)
        return float(np.bincount(entry) @ self.cost[: int(entry.max(initial=-1)) + 1])

    @cached_property
    def cost(self) -> npt.NDArray[np.float64]:
        """Code length in bits of every entry of the concatenated tables."""
        return PROB_BITS - np.log2(self.freq)

    def cheapest(self, values: IntArray, count: IntArray) -> tuple[int, float]:
        """Return (class, bits) of the table that codes `values[i]`, `count[i]` times each, in the fewest bits.

        Escapes cost 12 bits more than their entry.

        Raises:
            CorruptError: there are no tables.
        """
        classes, cost = self._choices
        if not len(classes):
            raise CorruptError("there is no table to code side information with")
        end = MAX_HALF + 1
        column = np.minimum(np.maximum(values, -end), end) + end  # a third of what np.clip costs for a few values
        bits = (cost[:, column] * count).sum(1)
        best = int(bits.argmin())
        return int(classes[best]), float(bits[best])

    @cached_property
    def _choices(self) -> tuple[IntArray, npt.NDArray[np.float64]]:
        """Each table's lowest class, ascending, and the bits of every value under it, (tables, 2 MAX_HALF + 3)."""
        found = sorted(self.distinct(), key=lambda x: x[0])
        cost = np.empty((len(found), 2 * MAX_HALF + 3))
        for row, (_, table) in zip(cost, found, strict=True):
            bits = PROB_BITS - np.log2(table.freq)
            row[:] = bits[-1] + 12
            row[table.low + MAX_HALF + 1 : table.high + MAX_HALF + 2] = bits[:-1]
        return np.array([cls for cls, _ in found], np.int64), cost

    @cached_property
    def cost_by_size(self) -> npt.NDArray[np.float64]:
        """Bits of a symbol by class and |z|, (64, MAX_HALF + 2); 16 more for an escape, infinite without a table."""
        cost = np.full((MAX_CLASS + 1, MAX_HALF + 2), np.inf)
        for cls, table in self.table.items():
            bits = PROB_BITS - np.log2(table.freq)
            cost[cls] = bits[-1] + 16
            cost[cls, : table.high + 1] = bits[-table.low : -1]
        return cost

    @cached_property
    def split(self) -> Tables:
        """These tables and, for every class `k`, those restricted to values `4m + d`, as classes `64(d + 1) + k`."""
        found, distinct = dict(self.table), self.distinct()
        for d in range(3):
            made = {id(t): restricted(t, d) for _, t in distinct}
            found |= {(MAX_CLASS + 1) * (d + 1) + cls: made[id(t)] for cls, t in self.table.items()}
        return Tables(found)

    @cached_property
    def split_cost(self) -> npt.NDArray[np.float64]:
        """Like `cost_by_size`, for values coded as a bit for the subset and a place within the subset."""
        cost = np.full((MAX_CLASS + 1, MAX_HALF + 2), np.inf)
        for cls, table in self.distinct():
            row = np.empty(MAX_HALF + 2)
            for d in range(3):
                part = self.split.table[(MAX_CLASS + 1) * (d + 1) + cls]
                bits = 1 + PROB_BITS - np.log2(part.freq)
                row[d::4] = row[4 - d :: 4] = bits[-1] + 16
                values = 4 * np.arange(part.low, part.high + 1) + d
                row[np.abs(values)] = bits[:-1]
            cost[[other for other, t in self.table.items() if t is table]] = row
        return cost

    @cached_property
    def row(self) -> npt.NDArray[np.int64]:
        """Row of `lookup` for each class, or -1 without a table; classes that share a table share a row."""
        rows = np.full(SPLIT_CLASSES, -1, np.int64)
        rows[0] = 0
        place: dict[int, int] = {}
        for cls, table in self.table.items():
            rows[cls] = place.setdefault(id(table), len(place) + 1)
        return rows

    @cached_property
    def edges(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint16]]:
        """Lowest symbol and escape index of each class."""
        low, last = np.zeros(SPLIT_CLASSES, np.int32), np.full(SPLIT_CLASSES, 2**16 - 1, np.uint16)
        for cls, table in self.table.items():
            low[cls], last[cls] = table.low, len(table.freq) - 1
        return low, last

    @cached_property
    def compact(self) -> tuple[npt.NDArray[Any], ...]:
        """The arguments of `bytecap.format.entropy.kernels`, which hold `lookup` in a quarter of the memory.

        First slot by class, symbol index by slot, first entry by class, frequency and cumulative frequency by entry.
        """
        slots = (self.lookup >> np.uint64(32)).astype(np.uint16).reshape(-1)
        return self.row << PROB_BITS, slots, self._starts, self.freq, self.cum

    @cached_property
    def lookup(self) -> npt.NDArray[np.uint64]:
        """Slots (rows, 2**14), each `symbol index << 32 | frequency - 1 << 16 | slot - cumulative frequency`."""
        slots = np.arange(TOTAL, dtype=np.uint64)
        parts: list[npt.NDArray[Any]] = [slots | np.uint64((TOTAL - 1) << 16)]
        for entry in {id(t): t for t in self.table.values()}.values():
            freq = entry.freq.astype(np.uint64)
            cum = np.cumsum(freq) - freq
            which = np.repeat(np.arange(len(freq)), entry.freq)
            parts.append((which.astype(np.uint64) << 32) | ((freq - 1)[which] << 16) | (slots - cum[which]))
        return np.stack(parts)


def restricted(table: Table, d: int) -> Table:
    """Restrict a symmetric table to its values `4 m + d`, as a table of `m`.

    The sum is kept: the difference that rounding leaves goes to the largest entry.

    >>> t = restricted(Table(-2, np.array([1000, 2000, 8000, 2000, 1000, 2384])), 2)
    >>> t.low, t.freq.tolist()
    (-1, [3737, 3737, 8910])
    """
    low, high = -((table.high + d) // 4), (table.high - d) // 4
    values = 4 * np.arange(low, high + 1) + d
    freq = np.append(table.freq[values - table.low], table.freq[-1])
    freq = freq * TOTAL // freq.sum()
    freq[int(np.argmax(freq))] += TOTAL - int(freq.sum())
    return Table(low, freq)


def integer_frequencies(weights: npt.NDArray[np.float64], *, symmetric: bool = False) -> npt.NDArray[np.int64]:
    """Return positive integers with sum `2**14`, nearly proportional to `weights`; the last one is the escape's.

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
    """Take `excess` out of the largest entries, equally for both signs; an odd remainder comes from the centre."""
    half = (len(freq) - 2) // 2
    centre = half
    if excess < 0 or freq[centre] > excess:
        freq[centre] -= excess
        return 0
    if freq[-1] > freq[centre]:  # nearly everything is escaped
        freq[-1] -= min(excess, int(freq[-1]) - 1)
        return excess
    freq[centre] = max(1, int(freq[centre]) // 2)
    largest = int(np.argmax(freq[:half]))
    cut = min(int(freq[largest]) // 2, (excess + 1) // 2)
    freq[largest] -= cut
    freq[-2 - largest] -= cut
    return excess
