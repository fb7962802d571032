"""`fixed` stores codes of one width with a scale and zero point per row, and some columns in 16 bits, as OWQ does.

A weight decodes, in float32, as::

    w = scale[row] * (code - zero[row])

and a protected column as its float16 values. A header byte says whether the blocks are stored as published (bits at
their nominal width) or coded (the same integers and floats behind the entropy coder), see
`bytecap.format.wire.integers`.

Section (format.md, 6.13): coded u8 | width u8 | LEB128 k | k x u16 protected columns, rising | halves: scales |
integers: zero points | halves: protected columns, one after the other | integers: codes, row after row.

Source: Lee et al., OWQ (arXiv:2306.02272); the asymmetric row quantizer with its zero point of `width` bits is that of
GPTQ (arXiv:2210.17323). Omitted: scales for groups of columns, which neither needs at its default.

>>> one = np.ones((1, 1), np.float16)
>>> part = FixedCode(2, np.array([[0, 3]]), one[0] / 2, np.array([1]), [1], one)
>>> section = CODER.encode(part, coded=False)
>>> from bytecap.format.coders import run
>>> run([CODER.decode(section, (1, 3), "F32", Shared())])[0].tolist()
[[-0.5, 1.0, 1.0]]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from bytecap.errors import CorruptError
from bytecap.format.coders import Decoding, FloatArray, Shared, leb, read_leb
from bytecap.format.wire.integers import MAX_WIDTH, Halves, Integers, write_halves, write_integers


@dataclass(frozen=True)
class FixedCode:
    """A matrix (rows, cols) as `fixed` stores it, `k` of its columns protected.

    Attributes:
        width: bits of a code, 1 to 8.
        codes: integers (rows, cols - k) in `0 .. 2^width - 1`.
        scales: float16 (rows,), finite.
        zeros: integers (rows,) in `0 .. 2^width - 1`.
        columns: indices of the protected columns, rising.
        protected: float16 (rows, k), finite.
    """

    width: int
    codes: npt.NDArray[np.integer[Any]]
    scales: npt.NDArray[np.float16]
    zeros: npt.NDArray[np.integer[Any]]
    columns: Sequence[int]
    protected: npt.NDArray[np.float16]


@dataclass(frozen=True)
class _Parts:
    columns: npt.NDArray[np.int64]
    scales: Halves
    zeros: Integers
    protected: Halves
    codes: Integers
    ends: tuple[int, ...]  # of header, scales, zeros, protected columns, codes


def dequantize(code: FixedCode) -> FloatArray:
    """Decode to float32 (rows, cols) in the format's arithmetic."""
    rows, plain = code.codes.shape
    values = np.zeros((rows, plain + len(code.columns)), np.float32)
    kept = np.zeros(values.shape[1], bool)
    kept[np.asarray(code.columns, np.int64)] = True
    whole = (code.codes.astype(np.int32) - code.zeros.astype(np.int32)[:, None]).astype(np.float32)
    values[:, ~kept] = whole * code.scales.astype(np.float32)[:, None]
    values[:, kept] = code.protected.astype(np.float32)
    return values


class Fixed:
    """Reader and writer of `fixed` sections."""

    id: ClassVar[str] = "fixed"
    tag: ClassVar[int] = 10

    def encode(self, code: FixedCode, *, coded: bool, estimate: bool = False) -> bytes:
        """Encode a section, as published or entropy coded; with `estimate` only its length is meaningful."""
        columns = np.asarray(code.columns, "<u2")
        head = bytes([coded, code.width]) + leb(len(columns)) + columns.tobytes()
        widths = np.full(code.codes.size, code.width, np.uint8)
        how = {"coded": coded, "estimate": estimate}
        return b"".join(
            [
                head,
                write_halves(code.scales, **how),
                write_integers(code.zeros, np.full(len(code.zeros), code.width, np.uint8), **how),
                write_halves(np.ascontiguousarray(code.protected.T), **how),
                write_integers(code.codes, widths, **how),
            ]
        )

    def _parse(self, data: bytes, shape: tuple[int, int]) -> _Parts:
        rows, cols = shape
        if len(data) < 2 or data[0] > 1 or not 1 <= data[1] <= MAX_WIDTH:
            raise CorruptError(f"a fixed section begins with {data[:2].hex() or 'nothing'}")
        coded, width = bool(data[0]), data[1]
        count, at = read_leb(data, 2)
        if count > cols or 2 * count > len(data) - at:
            raise CorruptError(f"a fixed section protects {count} of {cols} columns")
        columns = np.frombuffer(data, "<u2", count, at).astype(np.int64)
        if (np.diff(columns) < 1).any() or columns.max(initial=0) >= max(1, cols):
            raise CorruptError("the protected columns of a fixed section do not rise, or lie outside the matrix")
        at += 2 * count
        ends = [at]
        scales, at = Halves.parse(data, at, rows, coded=coded)
        ends.append(at)
        zeros, at = Integers.parse(data, at, np.full(rows, width, np.uint8), coded=coded)
        ends.append(at)
        protected, at = Halves.parse(data, at, rows * count, coded=coded)
        ends.append(at)
        codes, at = Integers.parse(data, at, np.full(rows * (cols - count), width, np.uint8), coded=coded)
        if at != len(data):
            raise CorruptError(f"{len(data) - at} bytes are left over behind the codes of a fixed section")
        return _Parts(columns, scales, zeros, protected, codes, (*ends, at))

    def kinds(self, data: bytes, shape: tuple[int, int], dtype: str) -> tuple[tuple[str, int], ...]:
        """Header with the protected columns' indices, scales and zero points, protected columns, codes."""
        del dtype
        head, _, side, protected, end = self._parse(data, shape).ends
        return (
            ("header", head),
            ("side", side - head),
            ("protected payload", protected - side),
            ("payload", end - protected),
        )

    def decode(self, data: bytes, shape: tuple[int, int], dtype: str, shared: Shared) -> Decoding:
        """Decode to float32 (rows, cols)."""
        del dtype, shared
        parts = self._parse(data, shape)
        scales = yield from parts.scales.decode()
        zeros = yield from parts.zeros.decode()
        protected = yield from parts.protected.decode()
        codes = yield from parts.codes.decode()
        rows, cols = shape
        count = len(parts.columns)
        return dequantize(
            FixedCode(
                data[1], codes.reshape(rows, cols - count), scales, zeros, parts.columns.tolist(),
                protected.reshape(count, rows).T,
            )
        )  # fmt: skip


CODER = Fixed()
