"""Section 5: tables, streams and the tables section."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bytecap.reference.container import Reader, require, unpack_lzma

Array = npt.NDArray[Any]


class Objects:
    """Section 5.3: shared objects as (kind, value), the numbers of those that are used, and units of a base (4.1)."""

    def __init__(self, items: Sequence[tuple[int, Any]] = ()) -> None:
        self.items, self.used = items, set[int]()
        self.below: dict[str, Array] = {}

    def get(self, number: int, kind: int) -> Any:
        """Return the object of a number, which must be of this kind."""
        require(number < len(self.items) and self.items[number][0] == kind, f"no object {number} of kind {kind}")
        self.used.add(number)
        return self.items[number][1]


Shared = tuple[list["Table | None"], Array, Objects]  # tables and offsets by class, objects

BITS, TOTAL, LOW = 14, 2**14, 2**16
_ESCAPE = -(2**31)  # stands for the escape; no symbol has this value


class Table:
    """Section 5.1: a table, as `freq << 14 | slot - cum` and the symbol of each of the 2^14 slots."""

    def __init__(self, low: int, frequencies: Sequence[int], escape: int = _ESCAPE) -> None:
        freq = [*frequencies, TOTAL - sum(frequencies)]
        require(min(freq) >= 1, f"frequencies do not add up to {TOTAL}")
        wide = np.array(freq)
        self.low, self.freq = low, freq
        start = np.repeat(np.cumsum(wide) - wide, wide)
        self.entry = (np.repeat(wide << BITS, wide) + np.arange(TOTAL) - start).astype(np.uint32)
        self.symbol = np.repeat([*range(low, low + len(frequencies)), escape], wide).astype(np.int32)


class Stream(NamedTuple):
    """Bytes of a stream, every symbol's class, and the table of every class."""

    data: bytes
    classes: Array
    tables: Sequence[Table | None]

    def shape(self) -> tuple[int, int]:
        """Number of steps and lanes."""
        lanes = -(-len(self.classes) // 8192)
        return -(-len(self.classes) // max(1, lanes)), lanes


def decode_streams(streams: Sequence[Stream]) -> list[Array]:
    """Symbols of every stream; all lanes of all streams advance together, the longest lanes in front."""
    require(all(len(s.classes) or not s.data for s in streams), "a stream of no symbols has bytes")
    results: list[Array] = [np.zeros(0, np.int32) for _ in streams]
    order = sorted((i for i, s in enumerate(streams) if len(s.classes)), key=lambda i: -streams[i].shape()[0])
    if not order:
        return results
    readers, shapes = [Reader(streams[i].data) for i in order], [streams[i].shape() for i in order]
    counts = [reader.zigzag(6) for reader in readers]
    states = [np.frombuffer(r.take(4 * lanes), "<u4") for r, (_, lanes) in zip(readers, shapes, strict=True)]
    state = np.concatenate(states).astype(np.uint32)
    require(state.min() >= LOW, "a lane begins in an impossible state")
    words = [np.frombuffer(r.take(2 * n), "<u2") for r, n in zip(readers, counts, strict=True)]
    tables = [Table(0, [], escape=0), *{id(t): t for i in order for t in streams[i].tables if t}.values()]
    begin, missing = {id(t): k << BITS for k, t in enumerate(tables)}, 2**32 - 1
    places = np.zeros((shapes[0][0], len(state)), np.uint32)  # table of every symbol; 0 is the padding's
    ends = np.cumsum([lanes for _, lanes in shapes])
    views = [places[:steps, end - lanes : end] for (steps, lanes), end in zip(shapes, ends, strict=True)]
    for i, view in zip(order, views, strict=True):
        padded = np.zeros(view.size, np.uint32)
        begins = np.array([begin.get(id(t), missing) for t in streams[i].tables], np.uint32)
        padded[: len(streams[i].classes)] = begins.take(streams[i].classes)
        require(int(padded.max()) != missing, "a stream uses a class without a table")
        view[:] = padded.reshape(view.shape)
    _advance(shapes, state, words, places, np.concatenate([t.entry for t in tables]))
    symbols = np.concatenate([t.symbol for t in tables])
    for i, view, reader in zip(order, views, readers, strict=True):
        results[i] = symbols.take(view.reshape(-1)[: len(streams[i].classes)])
        escaped = np.flatnonzero(results[i] == _ESCAPE)
        values = [reader.zigzag() for _ in escaped]
        require(not reader.rest() and all(abs(v) < 2**31 for v in values), "escaped symbols are damaged")
        results[i][escaped] = values
    return results


def _advance(shapes: list[tuple[int, int]], state: Array, words: list[Array], places: Array, entries: Array) -> None:
    """Decode every lane; turns the beginnings of tables in `places` into slots of the joined tables."""
    lanes = [k for _, k in shapes]
    owner = np.repeat(np.arange(len(shapes)), lanes)
    live = len(state) - np.cumsum(np.bincount(np.repeat([t for t, _ in shapes], lanes)))
    sizes = np.array([len(w) for w in words])
    begin = np.cumsum(sizes) - sizes
    pool = np.append(np.concatenate(words), 0).astype(np.uint32)
    taken, ramp = np.zeros(len(shapes), np.int64), np.arange(len(state))
    mask, bits, sixteen = np.uint32(TOTAL - 1), np.uint32(BITS), np.uint32(16)
    for row, count in zip(places, live, strict=False):
        x, slot = state[:count], row[:count]
        slot += x & mask
        entry = entries.take(slot)
        x >>= bits
        x *= entry >> bits
        x += entry & mask
        need = np.flatnonzero(x < LOW)
        stream = owner[need]
        used = np.bincount(stream, minlength=len(taken))
        at = (begin + taken - np.cumsum(used) + used)[stream] + ramp[: len(need)]
        x[need] = x[need] << sixteen | pool.take(at, mode="clip")
        taken += used
    require((taken == sizes).all() and (state == LOW).all(), "a stream does not end in its final state")


def read_tables(section: bytes, objects: Objects) -> Shared:
    """Section 5.2: tables by class, and offsets (64, 17) by class and size."""
    tables: list[Table | None] = [None]
    offset = np.zeros((64, 17), np.float32)
    reader = Reader(unpack_lzma(section, 3, 2**16, 2**20) if section else b"")
    while reader.at < len(reader.data):
        served, half, first = reader.leb(), reader.leb(), len(tables)
        require(1 <= served <= 64 - first and half <= 1023, "the tables section has too many classes or symbols")
        sizes = [reader.leb() for _ in range(half + 1)]
        stored = np.frombuffer(reader.take(min(half, 16)), np.int8) / np.float32(256)
        tables += [Table(-half, sizes[:0:-1] + sizes)] * served
        offset[first : first + served, 1:] = np.pad(stored, (0, 16 - len(stored)), "edge") if half else 0
    return tables + [None] * (64 - len(tables)), offset, objects
