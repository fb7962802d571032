"""`codebook` replaces each vector of `g` neighbouring weights of a row by one of `n` codewords.

One codebook for each tensor, or one that several tensors share (`format/wire/shared_objects.py`), times a scale of each
tensor. Codewords are f16, or signed bytes with one f16 scale. Indices are packed at `ceil(log2 n)` bits, which the
paper counts, or entropy coded, whichever is shorter (`format/wire/indices.py`). A row whose length is no multiple of
`g` ends in a vector whose last components are not used.

Section (format.md, 6.16): g u8 | form u8 (0 f16, 1 bytes, 2 shared) | LEB128 n | codewords, or LEB128 number of the
shared object and f16 scale | indices.
Source: ClusComp (ACL 2025): `log2(n) / g + 16 n g / (rows cols)` bits a weight. Omitted: the search for codewords,
which is `methods/baselines/kmeans.py`.

>>> book = Codebook(np.array([[0.5, 1.0], [-2.0, 0.0]], np.float32), np.array([[0, 1]]))
>>> section = CODER.encode(book, (1, 3))
>>> from bytecap.format.coders import run
>>> run([CODER.decode(section, (1, 3), "F32", Shared())])[0].tolist()
[[0.5, 1.0, -2.0]]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from bytecap.errors import CorruptError
from bytecap.format.coders import Continuous, Decoding, FloatArray, Shared, leb, like, read_leb, run
from bytecap.format.entropy.frequencies import IntArray
from bytecap.format.wire.indices import (
    MAX_CODEWORDS,
    SharedTable,
    by_use,
    index_kinds,
    numbers_size,
    read_indices,
    read_numbers,
    write_indices,
    write_numbers,
)

MAX_DIMENSION = 16
SHARED = 2  # form of a section whose codewords are a shared object


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
    """Return the number of vectors of a matrix (rows, cols)."""
    return shape[0] * -(-shape[1] // g)


def published_bits(shape: tuple[int, int], n: int, g: int) -> float:
    """Return the bits of a tensor (rows, cols) as the paper counts them; `n` is a power of two."""
    return vectors_in(shape, g) * float(np.log2(n)) + 16 * n * g


def look_up(words: FloatArray, indices: IntArray, shape: tuple[int, int]) -> FloatArray:
    """Build a matrix (rows, cols) from codewords (n, g) and indices in row order."""
    rows, cols = shape
    wide = words.take(indices, axis=0).reshape(rows, -(-cols // words.shape[1]) * words.shape[1])
    return np.ascontiguousarray(wide[:, :cols])


def shared_words(shared: Shared, number: int, n: int, g: int) -> FloatArray:
    """Return the codewords of a shared object, whose shape must be (n, g)."""
    words: FloatArray = shared.objects.get(number, "codebook")
    if words.shape != (n, g):
        raise CorruptError(f"the shared codebook {number} is {words.shape[0]} x {words.shape[1]}, not {n} x {g}")
    return words


@dataclass(frozen=True)
class _Parsed:
    g: int
    form: int
    n: int
    number: int  # of the shared object
    at: int  # where codewords or scale begin
    end: int  # where indices begin


class CodebookCoder:
    """Reader and writer of `codebook` sections."""

    id: ClassVar[str] = "codebook"
    tag: ClassVar[int] = 6

    def encode(self, book: Codebook, shape: tuple[int, int], *, byte: bool = False, coded: bool = True) -> bytes:
        """Encode a section.

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

    def encode_shared(
        self,
        indices: IntArray,
        words: tuple[int, int],
        number: int,
        scale: float,
        *,
        coded: bool = True,
        table: SharedTable | None = None,
    ) -> bytes:
        """Encode a section whose codewords are a shared object.

        Args:
            indices: (count,), as the object numbers its codewords.
            words: (n, g) of the object.
            number: of the object.
            scale: that the codewords are multiplied by; stored as f16.
            coded: allow entropy-coded indices.
            table: shared one for the indices.
        """
        side = leb(words[0]) + leb(number) + np.array([scale], "<f2").tobytes()
        return bytes([words[1], SHARED]) + side + write_indices(indices, words[0], coded=coded, shared=table)

    def with_scale(self, data: bytes, shape: tuple[int, int], scale: float) -> bytes:
        """Replace the scale of a section that `encode_shared` made for a matrix (rows, cols)."""
        end = self._parse(data, shape).end
        return data[: end - 2] + np.array([scale], "<f2").tobytes() + data[end:]

    def with_words(self, data: bytes, book: Codebook, words: FloatArray) -> bytes:
        """Replace the codewords (n, g) of a section that `encode` made of `book`; the indices stay."""
        n, g = book.words.shape
        p = self._parse(data, (1, g))
        order, _ = by_use(book.indices, n)
        return data[: p.at] + write_numbers(words[order], byte=p.form == 1) + data[p.end :]

    def _parse(self, data: bytes, shape: tuple[int, int]) -> _Parsed:
        if len(data) < 3:
            raise CorruptError(f"a codebook section of {len(data)} bytes is shorter than its header")
        g, form = data[0], data[1]
        n, at = read_leb(data, 2)
        if not 1 <= g <= min(MAX_DIMENSION, max(1, shape[1])) or form > SHARED or not 1 <= n <= MAX_CODEWORDS:
            raise CorruptError(f"a codebook section declares form {form} and {n} codewords of {g} dimensions")
        number = -1
        if form == SHARED:
            number, at = read_leb(data, at)
        end = at + (2 if form == SHARED else numbers_size(n * g, byte=form == 1))
        if end > len(data):
            raise CorruptError(f"a codebook section of {len(data)} bytes declares {n} codewords: truncated")
        return _Parsed(g, form, n, number, at, end)

    def kinds(self, data: bytes, shape: tuple[int, int], dtype: str) -> tuple[tuple[str, int], ...]:
        """Header, codewords (side information), then indices."""
        del dtype
        p = self._parse(data, shape)
        return (("header", p.at), ("side", p.end - p.at), *index_kinds(data[p.end :], vectors_in(shape, p.g), p.n))

    def decode(self, data: bytes, shape: tuple[int, int], dtype: str, shared: Shared) -> Decoding:
        """Decode to float32 (rows, cols)."""
        del dtype
        p = self._parse(data, shape)
        if p.form == SHARED:
            words = shared_words(shared, p.number, p.n, p.g)
        else:
            words = read_numbers(data[p.at : p.end], p.n * p.g, byte=p.form == 1).reshape(p.n, p.g)
        indices = yield from read_indices(data[p.end :], vectors_in(shape, p.g), p.n, shared.objects)
        values = look_up(words, indices, shape)
        if p.form == SHARED:
            values *= read_numbers(data[p.at : p.end], 1, byte=False)
        return values

    def continuous(self, data: bytes, shape: tuple[int, int], shared: Shared) -> Continuous:
        """Return the codewords (n, g), or the scale (1,) of shared ones."""
        p = self._parse(data, shape)
        indices = run([read_indices(data[p.end :], vectors_in(shape, p.g), p.n, shared.objects)])[0]
        if p.form == SHARED:
            values = look_up(shared_words(shared, p.number, p.n, p.g), indices, shape)
            stored = {"scale": read_numbers(data[p.at : p.end], 1, byte=False)}
            return Continuous(
                stored, lambda a, _: a["scale"] * like(a["scale"], values),
                lambda a: self.with_scale(data, shape, float(a["scale"][0])),
            )  # fmt: skip
        words = read_numbers(data[p.at : p.end], p.n * p.g, byte=p.form == 1).reshape(p.n, p.g)

        def encode(arrays: Mapping[str, FloatArray]) -> bytes:
            return data[: p.at] + write_numbers(arrays["words"], byte=p.form == 1) + data[p.end :]

        wide = indices.reshape(shape[0], -1)
        return Continuous({"words": words}, lambda a, _: a["words"][wide].reshape(shape[0], -1)[:, : shape[1]], encode)


CODER = CodebookCoder()
