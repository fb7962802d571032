"""Coders of `--method golf`: a tensor's integers take the smallest of three.

Brotli is slow, and mostly `bands` is smaller. So brotli's length is guessed first, of matrices that are not small: real
bytes of some columns, times what all columns have of their entropies. Where the guess loses, brotli is left out.

>>> matrix = Quantized(np.array([[1, -2], [0, 1]]), np.ones(2, np.float16))
>>> smallest(matrix).tag == CODER.tag, len(smallest(matrix, about=True).data) == len(smallest(matrix).data)
(True, True)
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from bytecap.format.coders.bands import CODER as BANDS
from bytecap.format.coders.packed import BROTLI, CODER, Quantized, compress, planes
from bytecap.format.coders.stack import CODER as STACK
from bytecap.format.overlays.order import CODER as ORDER
from bytecap.format.overlays.order import by_likeness
from bytecap.job import Section

_SORTED_ROWS = 16_384  # sorting takes time of the square
_GUESSED = 1 << 18  # codes from which on brotli's length is guessed first
_LARGE = 1 << 22  # codes from which on a trial takes the guess for the length
_PART, _PIECE, _CODES = 16, 1 << 17, 1 << 16  # of a guess: one part in so many, codes side by side, codes in all
_SURE = 1.003  # a guess is not off by more


class Coding(Protocol):
    """Codes one matrix; with `about` the section of a large one may be zeros of about its length."""

    def __call__(self, matrix: Quantized, about: bool = False) -> Section:
        """Return the section."""


def is_large(matrix: Quantized) -> bool:
    """Return whether the length of a matrix is a guess in trials."""
    return matrix.codes.size >= _LARGE


def with_brotli(matrix: Quantized, about: bool = False) -> Section:
    """Return a `packed` section under brotli."""
    if about and is_large(matrix):
        return Section(CODER.tag, bytes(guessed_length(matrix)))
    return Section(CODER.tag, CODER.encode(matrix, BROTLI))


def column_entropies(codes: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.float64]:
    """Return the bits of every column of codes (rows, cols) under a histogram of its own, (cols,)."""
    found = np.zeros(codes.shape[1])
    for j in range(codes.shape[1]):
        column = codes[:, j].astype(np.int32)
        counts = np.bincount(column - column.min(initial=0))
        counts = counts[counts > 0]
        found[j] = counts @ np.log2(len(column) / counts)
    return found


def guessed_length(matrix: Quantized) -> int:
    """Guess the bytes of a `packed` section under brotli from some of the columns of a matrix."""
    rows, cols = matrix.codes.shape
    piece = max(1, min(_PIECE, matrix.codes.size // 64) // max(1, rows))
    part = max(1, min(_PART, matrix.codes.size // _CODES, cols // piece))
    chosen = np.flatnonzero(np.arange(cols) // piece % part == part // 2)
    raw = planes(matrix.codes[:, chosen])[1]
    entropy = column_entropies(matrix.codes)
    side = len(compress(matrix.scales.astype("<f2").tobytes(), BROTLI))
    sampled = float(entropy[chosen].sum())
    return side + round(len(compress(raw, BROTLI, matrix.codes.size)) * float(entropy.sum()) / max(1.0, sampled))


def sorted_rows(matrix: Quantized) -> Section:
    """Return a `packed` section under brotli with similar rows together, and the permutation back."""
    chain = by_likeness(matrix.codes)
    base = with_brotli(Quantized(matrix.codes[chain], matrix.scales[chain]))
    return Section(STACK.tag, STACK.encode((base.tag, base.data), [(ORDER.tag, ORDER.encode(np.argsort(chain)))]))


def smallest(matrix: Quantized, about: bool = False) -> Section:
    """Return the smallest of `packed` under brotli, `bands`, and, where rows may be alike, sorted rows."""
    banded = Section(BANDS.tag, BANDS.encode(matrix))
    found = [banded]
    if matrix.codes.size < _GUESSED or guessed_length(matrix) <= _SURE * len(banded.data):
        found.insert(0, with_brotli(matrix, about))
    (rows, cols), wins = matrix.codes.shape, found[0] is not banded and len(found[0].data) <= len(banded.data)
    if rows <= _SORTED_ROWS and (rows > 4 * cols or wins):
        found.append(sorted_rows(matrix))
    return min(found, key=lambda s: len(s.data))


WRITERS: dict[str, Coding] = {"best": smallest, "brotli": with_brotli}
