"""Encode a matrix of the grid straight from its integers, where numba is installed.

Classes, symbols and entries of the tables are found weight by weight on the way to the lanes' states, so nothing is
held for a whole matrix but its integers and its bytes, and threads hardly touch Python's lock. Bytes are those of
`sources` and `assemble` of `grid` and `trellis`, which numpy computes: they serve other integers, and small matrices.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from bytecap.errors import CorruptError
from bytecap.format.coders.classes import CLASSES, OCTAVE
from bytecap.format.entropy import jit
from bytecap.format.entropy.frequencies import Tables
from bytecap.format.entropy.rans import LOW, lanes, zigzag_bytes

Array = npt.NDArray[Any]
_BLOCK = 2**22  # weights for whose words there is room
_WIDTHS = (np.dtype(np.int8), np.dtype(np.int16), np.dtype(np.int32))


class Code(Protocol):
    """The parts of a code that are read here, those of `bytecap.format.coders.grid.GridCode`."""

    @property
    def column_class(self) -> Array:
        """Class of every column (groups, cols)."""

    @property
    def row_class(self) -> Array:
        """Class of every row (rows,)."""

    @property
    def fine(self) -> npt.NDArray[np.bool_]:
        """Dependent columns (groups, cols)."""


def served(symbols: Array) -> bool:
    """Return whether machine code pays, and takes integers of this type."""
    return symbols.dtype in _WIDTHS and symbols.size > 0 and jit.worth(symbols.size)


def _groups(code: Code) -> list[slice]:
    """Rows of every group."""
    sizes = [len(p) for p in np.array_split(np.arange(len(code.row_class)), len(code.column_class))]
    return [slice(a, b) for a, b in pairwise(np.cumsum([0, *sizes]).tolist())]


def _widths(symbols: Array) -> tuple[Array, ...]:
    """Return integers (rows, cols) as the kernels take them: under their own width, and nothing under the others."""
    flat = np.ascontiguousarray(symbols).reshape(-1)
    return tuple(flat if d == flat.dtype else np.zeros(0, d) for d in _WIDTHS)


def _ones(fine: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    return -fine.astype(np.int32)


def payload(code: Code, symbols: Array, tables: Tables) -> bytes:
    """Encode the stream of a matrix's symbols.

    Args:
        code: of the matrix.
        symbols: its integers (rows, cols), taken from the device that has them once.
        tables: of the file; dependent columns need split ones.

    Raises:
        CorruptError: the class of a weight has no table.
    """
    rows, cols = symbols.shape
    states = np.full(lanes(rows * cols), LOW, np.uint32)
    lane = (rows * cols - 1) % len(states) + 1
    of_row, fine = np.zeros(rows, np.int64), code.fine
    high = max(1, min(rows, _BLOCK // cols))
    words, escapes = np.empty(high * cols + 1, np.uint16), np.empty(high * cols, np.int32)
    parts, tails = [], []
    for run, columns, own in reversed(list(zip(_groups(code), code.column_class, fine, strict=True))):
        kinds, of_row[run] = np.unique(code.row_class[run], return_inverse=True)
        more = OCTAVE * own.astype(np.int64)
        classes = np.clip(kinds[:, None] + (columns + more)[None, :], 1 + more, CLASSES - 1)
        if (tables.row[classes] < 0).any():
            raise CorruptError("a symbol's class has no table")
        classes = (classes + 256 * own).astype(np.uint16)
        for first in reversed(range(run.start, run.stop, high)):
            part = slice(first, min(first + high, run.stop))
            count = (part.stop - first) * cols
            at, left, lane = jit.encoder("code")(
                states, lane, words[: count + 1], escapes[:count], *_widths(symbols[part]), *tables.coding,
                classes, of_row[part],
            )  # fmt: skip
            parts.append(words[at : count + 1].tobytes())
            tails.append(zigzag_bytes(escapes[left:count].tolist()))
    size = sum(map(len, parts)) // 2
    return b"".join([zigzag_bytes([size]), states.tobytes(), *reversed(parts), *reversed(tails)])


def path(code: Code, symbols: Array, high: int) -> bytes:
    """Pack the path bits of a matrix's dependent columns.

    Args:
        code: of the matrix.
        symbols: its integers (rows, cols).
        high: mask of the trellis for the upper bit of a subset.
    """
    bits = np.zeros(symbols.shape[1] // 8 * 8 + 16, np.uint8)
    held, parts = 0, []
    for run, own in zip(_groups(code), code.fine, strict=True):
        width = int(own.sum())
        if width:
            packed = np.empty((held + width * (run.stop - run.start)) // 8, np.uint8)
            held = jit.encoder("trace")(*_widths(symbols[run]), _ones(own), high, bits, held, packed)
            parts.append(packed.tobytes())
    return b"".join([*parts, np.packbits(bits[:held], bitorder="little").tobytes()])
