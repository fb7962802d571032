"""`codebook`: vectors of `g` neighbouring weights of a row, each replaced by one of `n` codewords.

One codebook for each tensor: codewords as f16, or as signed bytes with one f16 scale. Indices are packed at
`ceil(log2 n)` bits, which is what the paper counts, or entropy coded, whichever is shorter (`coders/indices.py`).
A row whose length is no multiple of `g` ends in a vector whose last components are not used.

Section (format.md, 6.16): g u8 | form u8 (0 f16, 1 bytes) | LEB128 n | codewords | indices.
Source: ClusComp (ACL 2025): `log2(n) / g + 16 n g / (rows cols)` bits a weight. Omitted: a codebook that several
tensors share, since a coder sees one section only; the search for codewords, which is `methods/kmeans.py`.

>>> book = Codebook(np.array([[0.5, 1.0], [-2.0, 0.0]], np.float32), np.array([[0, 1]]))
>>> section = CODER.encode(book, (1, 3))
>>> from bytecap.coders import run
>>> run([CODER.decode(section, (1, 3), "F32", Shared())])[0].tolist()
[[0.5, 1.0, -2.0]]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from bytecap.coders import Decoding, FloatArray, Shared, leb, read_leb
from bytecap.coders.indices import (
    MAX_CODEWORDS,
    by_use,
    index_kinds,
    numbers_size,
    read_indices,
    read_numbers,
    write_indices,
    write_numbers,
)
from bytecap.errors import CorruptError
from bytecap.frequencies import IntArray

MAX_DIMENSION = 16


@dataclass(frozen=True)
class Codebook:
    """A matrix as codewords.

    Attributes:
        words: float32 (n, g).
        indices: (rows, ceil(cols / g)), each below n.
    """

    words: FloatArray
    indices: IntArray


def vectors_in(shape: tuple[int, int], g: int) -> int:
    """Vectors of a matrix (rows, cols)."""
    return shape[0] * -(-shape[1] // g)


def published_bits(shape: tuple[int, int], n: int, g: int) -> float:
    """Bits of a tensor (rows, cols) as the paper counts them, `n` a power of two."""
    return vectors_in(shape, g) * float(np.log2(n)) + 16 * n * g


def look_up(words: FloatArray, indices: IntArray, shape: tuple[int, int]) -> FloatArray:
    """The matrix (rows, cols) of codewords (n, g) and indices in row order."""
    rows, cols = shape
    wide = words.take(indices, axis=0).reshape(rows, -(-cols // words.shape[1]) * words.shape[1])
    return np.ascontiguousarray(wide[:, :cols])


class CodebookCoder:
    """Reader and writer of `codebook` sections."""

    id: ClassVar[str] = "codebook"
    tag: ClassVar[int] = 6

    def encode(self, book: Codebook, shape: tuple[int, int], *, byte: bool = False, coded: bool = True) -> bytes:
        """Bytes of a section.

        Args:
            book: codewords and indices; codewords are written by falling use.
            shape: (rows, cols) of the matrix.
            byte: store codewords as signed bytes.
            coded: allow entropy-coded indices; False is the published packing.
        """
        n, g = book.words.shape
        if not (1 <= g <= min(MAX_DIMENSION, max(1, shape[1])) and 1 <= n <= MAX_CODEWORDS):
            raise ValueError(f"{n} codewords of {g} dimensions cannot code {shape}")
        order, indices = by_use(book.indices, n)
        words = write_numbers(book.words[order], byte=byte)
        return bytes([g, byte]) + leb(n) + words + write_indices(indices, n, coded=coded)

    def with_words(self, data: bytes, book: Codebook, words: FloatArray) -> bytes:
        """A section that `encode` made of `book`, with other codewords (n, g) for the same indices."""
        n, g = book.words.shape
        _, _, byte, at, end = self._parse(data, (1, g))
        order, _ = by_use(book.indices, n)
        return data[:at] + write_numbers(words[order], byte=byte) + data[end:]

    def _parse(self, data: bytes, shape: tuple[int, int]) -> tuple[int, int, bool, int, int]:
        """(g, n, whether codewords are bytes, where they begin, where indices begin)."""
        if len(data) < 3:
            raise CorruptError(f"a codebook section of {len(data)} bytes is shorter than its header")
        g, form = data[0], data[1]
        n, at = read_leb(data, 2)
        if not 1 <= g <= min(MAX_DIMENSION, max(1, shape[1])) or form > 1 or not 1 <= n <= MAX_CODEWORDS:
            raise CorruptError(f"a codebook section declares form {form} and {n} codewords of {g} dimensions")
        end = at + numbers_size(n * g, byte=form == 1)
        if end > len(data):
            raise CorruptError(f"a codebook section of {len(data)} bytes declares {n} codewords: truncated")
        return g, n, form == 1, at, end

    def kinds(self, data: bytes, shape: tuple[int, int], dtype: str) -> tuple[tuple[str, int], ...]:
        """Header, codewords (side information), then indices."""
        del dtype
        g, n, _, at, end = self._parse(data, shape)
        return (("header", at), ("side", end - at), *index_kinds(data[end:], vectors_in(shape, g), n))

    def decode(self, data: bytes, shape: tuple[int, int], dtype: str, shared: Shared) -> Decoding:
        """Decode to float32 (rows, cols)."""
        del dtype, shared
        g, n, byte, at, end = self._parse(data, shape)
        words = read_numbers(data[at:end], n * g, byte=byte).reshape(n, g)
        indices = yield from read_indices(data[end:], vectors_in(shape, g), n)
        return look_up(words, indices, shape)


CODER = CodebookCoder()
