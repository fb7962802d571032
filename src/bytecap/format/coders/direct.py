"""Decode a matrix of the grid straight to values, without its symbols, where numba is installed.

What takes part in a weight's value before scales is known for every class and symbol: the integer, its offset, the
subset that it stands in. So it is looked up together with the symbol's frequency, and a weight costs two look-ups and a
word now and then. Values are those of `grid.dequantize` in every bit: the same operations in the same order.

What it leaves out: readers that want to see symbols, which `grid` and `trellis` serve themselves. A reader that wants
no more than the symbols' ideal code length has it counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from bytecap.errors import CorruptError
from bytecap.format.coders.classes import CENTRES, CLASSES, OCTAVE
from bytecap.format.entropy import jit
from bytecap.format.entropy.frequencies import PROB_BITS, TOTAL, Table, Tables
from bytecap.format.entropy.rans import MAX_SYMBOL, check_end, read_zigzag, split
from bytecap.types import Bytes

Array = npt.NDArray[Any]
NONE = 2**16 - 1
_NARROW = 256  # symbols of a table whose places take a byte each
_APART = 8  # entries that keep the parts of a group apart in a cache
_BLOCK = 2**20  # weights whose path is unpacked at a time
_PIECE = 128  # as in `kernels.weights`
_ABOVE = 8  # rows whose path bits still matter
_UNCOUNTED = np.zeros(0, np.int64)
_IN_TABLES, _SAFE = 1100.0, 1e38  # no value of a table is larger in steps; float32 holds as much


@dataclass(frozen=True)
class Model:
    """Tables and offsets of a file as `bytecap.format.entropy.kernels.weights` takes them.

    Attributes:
        group: of every class (2, 64), in independent and in dependent columns; `NONE` where it has none.
        symbols: place of a symbol in its table, by slot; two bytes each in a wide model.
        entries: see `weights`.
        stride: entries of a subset.
    """

    group: npt.NDArray[np.uint16]
    symbols: npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
    entries: npt.NDArray[np.uint64]
    stride: int = _NARROW + _APART

    @cached_property
    def cost(self) -> npt.NDArray[np.float64]:
        """Code length in bits of every entry."""
        bits: npt.NDArray[np.float64] = PROB_BITS - np.log2(np.maximum(self.entries >> np.uint64(48), 1))
        return bits

    @staticmethod
    def of(tables: Tables, offset: npt.NDArray[np.float32], *, dependent: bool, wide: bool = False) -> Model:
        """Make the model of all classes that it can serve; classes with one table and one offset share a group.

        Args:
            tables: of the file.
            offset: of the file (64, 17).
            dependent: whether for dependent columns, too, which need split tables.
            wide: serve tables of more than 256 symbols, too, from slots of twice the size.
        """
        group = np.full((2, CLASSES), NONE, np.uint16)
        known: dict[tuple[int, int, bytes], int] = {}
        made: list[tuple[int, int, list[Table]]] = []
        for cls in sorted(tables.table):
            parts = [[tables.table[cls]]]
            if dependent:
                parts.append([tables.split.table[cls + k * CLASSES] for k in range(1, 4)])
            for fine, own in enumerate(parts):
                if wide or max(len(t.freq) for t in own) <= _NARROW:
                    key = (fine, id(tables.table[cls]), offset[cls].tobytes())
                    group[fine, cls] = known.setdefault(key, len(made))
                    if known[key] == len(made):
                        made.append((fine, cls, own))
        most = max([_NARROW, *(len(t.freq) for *_, own in made for t in own)])
        stride = -(-most // _APART) * _APART + _APART
        symbols = np.zeros((len(made), 3 * TOTAL), np.uint16 if wide else np.uint8)
        entries = np.zeros((len(made), 4 * stride), np.uint64)
        for i, (fine, cls, own) in enumerate(made):
            for k, table in enumerate(own):
                symbols[i, k * TOTAL : (k + 1) * TOTAL] = np.repeat(np.arange(len(table.freq)), table.freq)
            for k, table in enumerate([*own, own[1]] if fine else own):
                entries[i, k * stride : k * stride + len(table.freq)] = _entries(table, fine, k, offset, cls)
        return Model(group, symbols.reshape(-1), entries.reshape(-1), stride)


def _entries(table: Table, fine: int, subset: int, offset: npt.NDArray[np.float32], cls: int) -> npt.NDArray[np.uint64]:
    """Return the entries of a table; the value of its escape is not a number."""
    cum = np.cumsum(table.freq) - table.freq
    value = in_steps(np.arange(len(cum)) + table.low, fine, subset, offset, cls)
    value[-1] = np.nan
    found: npt.NDArray[np.uint64] = (table.freq << 48 | cum << 32).astype(np.uint64) | value.view(np.uint32)
    return found


def in_steps(
    symbols: Array, fine: Array | int, subset: Array | int, offset: npt.NDArray[np.float32], cls: Array | int
) -> npt.NDArray[np.float32]:
    """Turn symbols into values in steps, with the operations of `grid.dequantize` in their order.

    Args:
        symbols: (n,) as coded.
        fine: 1 where the column is dependent, else 0.
        subset: of each; 3 is the mirror image of 1.
        offset: (64, 17) of the file.
        cls: class of each.
    """
    mirrored = np.where(np.equal(subset, 3), -1, 1)
    points = np.where(np.equal(fine, 1), mirrored * (4 * symbols + np.array([0, 1, 2, 1]).take(subset)), symbols)
    size = np.abs(points)
    value = size.astype(np.float32)
    value *= np.where(np.equal(fine, 1), np.float32(0.5), np.float32(1))
    value -= offset[cls, np.minimum(size, CENTRES - 1)]
    np.negative(value, out=value, where=points < 0)
    return value


def _has_all(groups: Sequence[npt.NDArray[np.uint16]]) -> bool:
    """Return whether the model has a group for every column and kind of row."""
    return all((g < NONE).all() for g in groups)


class SharedParts(Protocol):
    """The part of `bytecap.format.coders.Shared` that is read here."""

    @property
    def model(self) -> Model:
        """Tables and offsets as machine code takes them."""

    @property
    def independent(self) -> Model:
        """The same without dependent columns."""

    def wide(self, *, dependent: bool) -> Model:
        """Return one of these two for tables of any size."""

    @property
    def offset(self) -> npt.NDArray[np.float32]:
        """Reconstruction offsets (64, 17) in steps."""


@dataclass(frozen=True)
class Direct:
    """A matrix to decode straight to values, if its reader has no other use for its symbols.

    Attributes:
        payload: its stream.
        shape: (rows, cols).
        shared: what the file shares.
        column_class, fine: class of columns and whether they are dependent, (groups, cols).
        row_class: class of rows (rows,).
        scale, row_scale: float32 scales of columns (groups, cols) and of rows (rows,).
        path: packed bits of the dependent weights.
        masks: of the trellis; zeros where no column is dependent.
        largest: size of an escaped symbol.
    """

    payload: Bytes
    shape: tuple[int, int]
    shared: SharedParts
    column_class: Array
    fine: Array
    row_class: Array
    scale: npt.NDArray[np.float32]
    row_scale: npt.NDArray[np.float32]
    path: Bytes = b""
    masks: tuple[int, int] = (0, 0)
    largest: int = MAX_SYMBOL

    def served(self) -> bool:
        """Return whether machine code pays, and has a group for every class that occurs."""
        return self.known() and jit.worth(self.shape[0] * self.shape[1])

    def known(self) -> bool:
        """Return whether there are weights, and the model has a group for every class of theirs."""
        return self.shape[0] * self.shape[1] > 0 and _has_all(self.column_groups)

    @cached_property
    def _served_by(self) -> tuple[Model, list[npt.NDArray[np.uint16]]]:
        """The model that serves all columns, and its groups of them; narrow where that is enough, which is faster."""
        dependent = any(self.masks)
        narrow = self.shared.model if dependent else self.shared.independent
        groups = self.groups_of(narrow)
        if _has_all(groups):
            return narrow, groups
        wide = self.shared.wide(dependent=dependent)
        return wide, self.groups_of(wide)

    @property
    def model(self) -> Model:
        """Return the smallest model that serves all columns: without dependent ones, and narrow."""
        return self._served_by[0]

    def _classes(self, group: int, rows: Array) -> Array:
        """Class of every column under classes of rows (n,), (n, cols)."""
        more = OCTAVE * self.fine[group].astype(np.int64)
        found: Array = np.clip(rows[:, None] + (self.column_class[group] + more)[None, :], 1 + more, CLASSES - 1)
        return found

    @cached_property
    def kinds(self) -> tuple[Array, Array]:
        """Distinct classes of rows, and which of them every row has."""
        kinds, of_row = np.unique(self.row_class, return_inverse=True)
        return kinds, of_row.reshape(-1)

    @property
    def column_groups(self) -> list[npt.NDArray[np.uint16]]:
        """For every row group, the model's group of every column by kind of row, (kinds, cols)."""
        return self._served_by[1]

    def groups_of(self, model: Model) -> list[npt.NDArray[np.uint16]]:
        """Return `column_groups` as another model of the same tables numbers them."""
        group, fine = model.group.reshape(-1), CLASSES * self.fine.astype(np.int64)
        return [group.take(self._classes(g, self.kinds[0]) + fine[g]) for g in range(len(fine))]

    @property
    def runs(self) -> list[range]:
        """Rows of every row group."""
        sizes = [len(p) for p in np.array_split(np.arange(self.shape[0]), len(self.fine))]
        return [range(a, b) for a, b in pairwise(np.cumsum([0, *sizes]).tolist())]

    def counted(self) -> tuple[npt.NDArray[np.float32], int, float]:
        """Decode to float32 (rows, cols); also bytes of the stream without those of escapes, and their ideal bits.

        Raises:
            CorruptError: the stream is damaged, or a value is out of range.
        """
        model = self.model
        counts = np.zeros(len(model.entries), np.int64)
        values = self.values(counts)
        tail = split(self.payload, self.shape[0] * self.shape[1])[2]
        return values, len(self.payload) - len(tail), float(counts @ model.cost)

    def values(self, counts: npt.NDArray[np.int64] = _UNCOUNTED) -> npt.NDArray[np.float32]:
        """Decode to float32 (rows, cols).

        Args:
            counts: how often entries of the model occur is added to it, unless it is empty.

        Raises:
            CorruptError: the stream is damaged, or a value is out of range.
        """
        states, words, tail = split(self.payload, self.shape[0] * self.shape[1])
        lanes = states.copy()
        stream = lanes, np.concatenate([words, np.zeros(_PIECE, np.uint16)]).astype(np.uint16, copy=False)
        model = self.model.symbols, self.model.entries, np.uint32(self.model.stride)
        where = np.empty(len(tail), np.int64), np.empty(len(tail), np.int64)
        value = np.empty(self.shape, np.float32)
        used, lane, found = 0, 0, 0
        for rows, group, bits in self._blocks():
            used, lane, found = jit.kernel("weights")(
                stream, (used, lane, found, rows.start * self.shape[1]), model,
                (self.column_groups[group], self.scale[group]), (self.kinds[1][rows], self.row_scale[rows]),
                (bits, len(bits) - len(value[rows]), *self.masks), where, value[rows], value[rows].view(np.uint32),
                counts,
            )  # fmt: skip
            if used < 0:
                raise CorruptError("a stream runs past its words")
        check_end("a stream", lanes, used, len(words))
        if found > len(tail):
            raise CorruptError("the escaped symbols of a stream are damaged")
        value.reshape(-1)[where[0][:found]], largest = self.escaped(where[0][:found], where[1][:found], tail)
        if not self.safe(largest) and not np.isfinite(value).all():
            raise CorruptError("a section holds a value out of range")
        return value

    def _blocks(self) -> Iterator[tuple[slice, int, npt.NDArray[np.uint8]]]:
        """Yield some rows, their row group, and path bits (8 + rows, cols) with those of the rows above."""
        cols, at = self.shape[1], 0
        packed = np.frombuffer(self.path, np.uint8)
        for group, run in enumerate(self.runs):
            fine = self.fine[group].astype(np.uint8)
            width = int(fine.sum())
            above = np.zeros((_ABOVE, cols), np.uint8)
            for first in run[:: max(1, _BLOCK // cols)]:
                rows = slice(first, min(first + max(1, _BLOCK // cols), run.stop))
                count = width * (rows.stop - first)
                own = np.unpackbits(packed[at >> 3 : (at + count + 7) >> 3], count=(at & 7) + count, bitorder="little")
                bits = np.zeros((_ABOVE + rows.stop - first, cols), np.uint8)
                bits[:_ABOVE] = above
                if width == cols:
                    bits[_ABOVE:] = own[at & 7 :].reshape(-1, cols)
                elif width:
                    jit.kernel("spread")(np.append(own[at & 7 :], np.uint8(0)), fine, bits[_ABOVE:])
                at += count
                above = bits[-_ABOVE:]
                yield rows, group, bits

    def escaped(self, at: Array, subset: Array, tail: Bytes) -> tuple[npt.NDArray[np.float32], float]:
        """Read the values of escapes.

        Args:
            at: their places among all weights, rising.
            subset: of each.
            tail: bytes of their symbols.

        Returns:
            Values, and the largest size in steps of any value of the matrix.

        Raises:
            CorruptError: there are other symbols than these, or one is out of range.
        """
        symbols = np.array(read_zigzag(tail, len(at)), np.int64)
        if np.abs(symbols).max(initial=0) > self.largest:
            raise CorruptError("a trellis section holds a symbol out of range")
        rows, columns = np.divmod(at, self.shape[1])
        group = np.searchsorted([run.start for run in self.runs], rows, "right") - 1
        fine = self.fine[group, columns].astype(np.int64)
        more = OCTAVE * fine
        cls = np.clip(self.row_class[rows] + self.column_class[group, columns] + more, 1 + more, CLASSES - 1)
        steps = in_steps(symbols, fine, subset, self.shared.offset, cls)
        with np.errstate(over="ignore", invalid="ignore"):
            values = steps * self.row_scale[rows] * self.scale[group, columns]
        return values, max(_IN_TABLES, float(np.abs(steps).max(initial=0)))

    def safe(self, largest: float) -> bool:
        """Return whether all values are finite, because a value of this size in steps would be."""
        return largest * float(self.row_scale.max()) * max(1.0, float(self.scale.max())) < _SAFE
