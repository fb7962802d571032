"""Fit and store the frequency tables and reconstruction offsets that all units of a file share.

Neighbouring classes share one table where that saves more table bytes than it costs code length. Tables are
symmetric, so half of the frequencies is stored. Format: docs/format.md section 5.2.

>>> shared = fit_shared(np.eye(64, 6) * 1000 + np.eye(64, 6, -20) * 50, np.zeros((2, 64, 17)), None)
>>> again = load_shared(dump_shared(shared))
>>> all((again.tables.table[k].freq == t.freq).all() for k, t in shared.tables.table.items())
True
"""

from __future__ import annotations

import lzma
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from bytecap.errors import CorruptError
from bytecap.format.coders import Shared, leb, read_leb
from bytecap.format.coders.classes import CENTRES, CLASSES, UNIT_CLASS, quarter
from bytecap.format.entropy.frequencies import MAX_HALF, TOTAL, Table, Tables, integer_frequencies

Counts = npt.NDArray[np.float64]  # (64, half + 1): how often |z| occurred in each class
_Group = tuple[npt.NDArray[np.float64], list[int]]  # counts of |z| (half + 1,), and the classes that they sum

_FILTERS = [{"id": lzma.FILTER_LZMA1, "preset": 9, "dict_size": 1 << 16, "lc": 3, "lp": 0, "pb": 0}]
_PRIOR_WEIGHT = 4.0  # symbols' worth of a Gaussian given to every class


def count_symbols(
    symbols: npt.NDArray[np.integer], classes: npt.NDArray[np.integer], mask: npt.NDArray[np.bool_] | None = None
) -> Counts:
    """Count |z| by class, shape (64, largest + 1); bin MAX_HALF + 1 holds everything larger.

    With a mask two histograms (2, 64, largest + 1): of the symbols outside and inside it.
    """
    size = np.minimum(np.abs(symbols.reshape(-1)).astype(np.int32), MAX_HALF + 1)
    width = int(size.max(initial=0)) + 1
    index = classes.reshape(-1).astype(np.int32) * width + size
    if mask is not None:
        index += CLASSES * width * mask.reshape(-1)
    kinds = 1 if mask is None else 2
    counts = np.bincount(index, minlength=kinds * CLASSES * width).astype(float)
    return counts.reshape(CLASSES, width) if mask is None else counts.reshape(kinds, CLASSES, width)


def sum_counts(parts: Iterable[Counts]) -> Counts:
    """Add histograms of different widths; the result has shape (64, MAX_HALF + 2)."""
    total = np.zeros((CLASSES, MAX_HALF + 2))
    for p in parts:
        total[:, : p.shape[1]] += p
    return total


def _half_table(counts: npt.NDArray[np.float64], cls: float) -> tuple[npt.NDArray[np.float64], float]:
    """Weights of |z| = 0..half and of the escape, from summed counts and a Gaussian prior."""
    occurring = np.flatnonzero(counts)
    half = min(MAX_HALF, int(occurring.max(initial=1)))
    total = counts.sum()
    # symbols rarer than about one in 2^15 cost less as escapes than as table entries
    while half > 1 and counts[half:].sum() * 20000 < total:
        half -= 1
    sigma = float(quarter(int(cls) - UNIT_CLASS))
    z = np.arange(half + 1)
    prior = np.exp(-0.5 * (z / max(sigma, 0.3)) ** 2) + 1e-6
    prior[1:] *= 2
    return counts[: half + 1] + _PRIOR_WEIGHT * prior / prior.sum(), float(counts[half + 1 :].sum()) + 0.05


def _table(weights: npt.NDArray[np.float64], escape: float) -> Table:
    one_side = weights[1:] / 2
    dense = np.concatenate([one_side[::-1], weights[:1], one_side, [escape]])
    return Table(1 - len(weights), integer_frequencies(dense, symmetric=True))


def _cost(counts: npt.NDArray[np.float64], table: Table) -> float:
    """Code length in bits of |z| counts under a table, with signs, and escapes at two bytes each."""
    half = table.high
    bits = -np.log2(table.freq / TOTAL)
    inside = counts[: half + 1] @ bits[half : 2 * half + 1][: len(counts)]
    outside = counts[half + 1 :].sum()
    return float(inside + outside * (bits[-1] + 16))


def fit_shared(counts: Counts, centres: npt.NDArray[np.float64], previous: Shared | None) -> Shared:
    """Fit the tables and offsets of a whole file.

    Args:
        counts: (64, half + 1) histogram of |z| by class.
        centres: (2, 64, CENTRES) count of values in each bin and the summed overstatement of the bin, in steps.
        previous: offsets where `centres` saw too little; zeros if None.
    """
    groups = [(counts[k], [k]) for k in range(1, CLASSES) if counts[k].sum() > 0] or [
        (counts[UNIT_CLASS], [UNIT_CLASS])
    ]
    fitted = [_priced(*group) for group in groups]
    merged = [_priced(*_joined(pair)) for pair in pairwise(groups)]
    while merged:
        gains = [fitted[i][1] + fitted[i + 1][1] - m[1] for i, m in enumerate(merged)]
        i = int(np.argmax(gains))
        if gains[i] <= 0:
            break
        groups[i : i + 2] = [_joined(groups[i : i + 2])]
        fitted[i : i + 2] = [merged[i]]
        first = max(i - 1, 0)  # only the pairs with the new group in them have changed
        merged[first : i + 2] = [_priced(*_joined(pair)) for pair in pairwise(groups[first : i + 2])]
    table = {}
    offset = previous.offset.copy() if previous is not None else np.zeros((CLASSES, CENTRES), np.float32)
    for at, ((_, classes), (fit, _)) in enumerate(zip(groups, fitted, strict=True)):
        seen, overstated = centres[0, classes].sum(0), centres[1, classes].sum(0)
        # every class up to the next group's first one is served: trimming may meet classes not seen before
        last = groups[at + 1][1][0] if at + 1 < len(groups) else CLASSES
        first = classes[0] if at else 1
        prior = offset[classes].mean(0)
        values = (overstated + 32 * prior) / (seen + 32)
        values[0] = 0
        half = min(fit.high, CENTRES - 1)
        values[half + 1 :] = values[half] if half else 0
        for k in range(first, last):
            table[k] = fit
            offset[k] = np.clip(np.round(values * 256), -128, 127) / 256
    return Shared(Tables(table), offset.astype(np.float32))


def _joined(groups: Sequence[_Group]) -> _Group:
    """Merge two neighbouring groups."""
    (counts, classes), (more, others) = groups
    return counts + more, classes + others


def _priced(counts: npt.NDArray[np.float64], classes: list[int]) -> tuple[Table, float]:
    """Fit a table to merged classes; returns it with its total bits, storage included."""
    table = _table(*_half_table(counts, float(np.mean(classes))))
    return table, _cost(counts, table) + 8 * (3 + 1.4 * (table.high + 1) + 0.8 * min(table.high, CENTRES - 1))


def dump_shared(shared: Shared) -> bytes:
    """Serialise the tables section: an LZMA-compressed list of (classes served, half, frequencies, offsets)."""
    out = bytearray()
    classes = sorted(shared.tables.table)
    at = 0
    while at < len(classes):
        table = shared.tables.table[classes[at]]
        stop = at
        while stop < len(classes) and shared.tables.table[classes[stop]] is table:
            stop += 1
        half = table.high
        out += leb(stop - at) + leb(half)
        for f in table.freq[half : 2 * half + 1]:
            out += leb(int(f))
        offsets = np.round(shared.offset[classes[at], 1 : min(half, CENTRES - 1) + 1] * 256).astype(np.int8)
        out += offsets.tobytes()
        at = stop
    packed = lzma.compress(bytes(out), lzma.FORMAT_RAW, filters=_FILTERS)
    return b"\x01" + packed if len(packed) < len(out) else b"\x00" + bytes(out)


def _unpack(data: bytes, limit: int) -> bytes:
    if not data or data[0] > 1:
        raise CorruptError("the tables section has an unknown packing")
    if data[0] == 0:
        return data[1:]
    try:
        machine = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_FILTERS)
        raw = machine.decompress(data[1:], limit)
    except lzma.LZMAError as exc:
        raise CorruptError("the tables section does not decompress") from exc
    if not machine.eof or machine.unused_data:
        raise CorruptError("the tables section's packing does not end where it should")
    return raw


def load_shared(data: bytes) -> Shared:
    """Read a tables section.

    Raises:
        CorruptError: frequencies do not add up to 2^14, classes overlap, or bytes are missing.
    """
    if not data:
        return Shared()
    raw = _unpack(data, 1 << 20)
    table: dict[int, Table] = {}
    offset = np.zeros((CLASSES, CENTRES), np.float32)
    at, cls = 0, 1
    while at < len(raw):
        served, at = read_leb(raw, at)
        half, at = read_leb(raw, at)
        if served < 1 or cls + served > CLASSES or half > MAX_HALF:
            raise CorruptError(f"the tables section serves {served} classes from {cls} with {half} symbols a side")
        freq = np.zeros(2 * half + 2, np.int64)
        for i in range(half + 1):
            value, at = read_leb(raw, at)
            freq[half + i] = freq[half - i] = min(value, TOTAL)  # larger ones are refused below; no overflow
        freq[-1] = TOTAL - int(freq.sum())
        if freq.min() < 1:
            raise CorruptError(f"the frequencies of class {cls} do not add up to {TOTAL}")
        count = min(half, CENTRES - 1)
        if at + count > len(raw):
            raise CorruptError("the tables section is truncated")
        values = np.frombuffer(raw, np.int8, count, at).astype(np.float32) / 256
        at += count
        one = Table(-half, freq)
        for k in range(cls, cls + served):
            table[k] = one
            offset[k, 1 : count + 1] = values
            offset[k, count + 1 :] = values[-1] if count else 0
        cls += served
    return Shared(Tables(table), offset)
