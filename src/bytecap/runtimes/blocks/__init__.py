"""Block formats: fixed layouts of integers with shared scales, as runtimes read them.

Every scalar format says the same few things. Columns come in blocks with one or two floating-point numbers
each; a block is cut into sub-blocks that may scale these by small integers; codes are integers of a range, or places
in a table of levels. A weight is::

    scale[block] * sub_scale[sub] * level - minimum[block] * sub_minimum[sub]

in float32, multiplied in this order, so two programs agree in every bit. `BlockFormat` describes a layout, `Codes` is a
matrix in it, `encode` searches for codes, `layout` turns them into bytes and back, `ggml` lists llama.cpp's types.
Formats whose codes are vectors of a table (`lattice`) decode the same way, but are searched and stored differently.

>>> from bytecap.runtimes.blocks.ggml import FORMATS
>>> FORMATS["Q4_K"].block, FORMATS["Q4_K"].row_bytes(512), FORMATS["Q4_K"].bits
(256, 288, 4.5)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bytecap.errors import UsageError

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Part:
    """One field of a block's bytes.

    Attributes:
        kind: `scale` and `minimum` are float16; `codes`, `sub_scales` and `sub_minimums` are integers; `pairs` are
            sub-scales followed by sub-minimums; `six` are such pairs of 6 bits in ggml's order; `power` is the exponent
            of a scale in a byte, `trits` are codes to base 3.
        shift: lowest bit of the integers that is stored here.
        bits: how many bits of each; 8 stores a byte each.
        width: so many consecutive integers go to consecutive bytes before the next bits of the same bytes are filled.
    """

    kind: str
    shift: int = 0
    bits: int = 8
    width: int = 1


@dataclass(frozen=True)
class BlockFormat:
    """A layout.

    Attributes:
        name: as its runtime calls it.
        size: bytes of a block.
        block: columns of a block, which share the floating-point numbers.
        sub: columns of a sub-block.
        low, high: range of codes; of a table's levels.
        scales: range of integer sub-scales; (1, 1) where there are none.
        minimums: largest integer sub-minimum; 0 where nothing is subtracted. Where sub-scales are (1, 1) it is 1, and
            the minimum itself may have either sign; or it is more, and sub-minimums are zero points: the minimum is
            the scale.
        parts: a block's bytes in order.
        code_zero: added to codes before they are stored.
        scale_zero: added to sub-scales before they are stored.
        levels: values of the codes 0, 1, ... in rising order, or nothing where a code is its own value.
        float_type: F16 or BF16, of scales and minimums; E8M0 is a positive power of two in a byte, E4M3 a
            positive float8 of 4 digits.
        order: place in `levels` of every stored code, where stored codes are not places.
        vector: columns whose codes are one entry of a table; 0 where codes are free.
        signs: of vectors: `free`, `even` (an even number of minus signs in eight), or empty: the table has them.
        offsets: columns of a vector format that share an offset of +-1; 0 where there is none.
        unit: power of two by which scales are multiplied.
    """

    name: str
    size: int
    block: int
    sub: int
    low: int
    high: int
    parts: tuple[Part, ...]
    scales: tuple[int, int] = (1, 1)
    minimums: int = 0
    code_zero: int = 0
    scale_zero: int = 0
    levels: tuple[int, ...] = ()
    float_type: str = "F16"
    order: tuple[int, ...] = ()
    vector: int = 0
    signs: str = ""
    offsets: int = 0
    unit: float = 1.0

    @property
    def integer(self) -> type[np.signedinteger[Any] | np.unsignedinteger[Any]]:
        """Type of codes: one byte each."""
        return np.uint8 if self.high > 127 else np.int8

    @property
    def bits(self) -> float:
        """Bits a weight."""
        return 8 * self.size / self.block

    @property
    def two_level(self) -> bool:
        """Return whether sub-blocks have integer scales of their own."""
        return self.scales != (1, 1)

    @property
    def negated(self) -> bool:
        """Return whether the stored minimum is added, not subtracted."""
        return self.minimums > 0 and not self.two_level

    @property
    def side(self) -> int:
        """Bytes of a block that are scales and minimums, rounded up."""
        if self.vector:
            return 2 + (len(bin(self.scales[1])) - 3) * (self.block // self.sub) // 8
        if any(p.kind == "trits" for p in self.parts):
            return 2
        return self.size - sum(p.bits * self.block for p in self.parts if p.kind == "codes") // 8

    def fits(self, cols: int) -> bool:
        """Return whether rows of so many columns are whole blocks."""
        return cols > 0 and cols % self.block == 0

    def row_bytes(self, cols: int) -> int:
        """Bytes of a row.

        Raises:
            UsageError: `cols` is no multiple of the block.
        """
        if not self.fits(cols):
            raise UsageError(f"{self.name} holds rows of a multiple of {self.block} columns, not {cols}")
        return cols // self.block * self.size


@dataclass(frozen=True)
class Codes:
    """A matrix (rows, cols) in a block format.

    Attributes:
        format: the layout.
        codes: int8 (uint8 where they go beyond 127) (rows, cols), values of levels.
        sub_scales: int8 (rows, cols / sub).
        sub_minimums: of the codes' type (rows, cols / sub).
        scale: float16 (rows, cols / block), or float32 with values of bfloat16.
        minimum: likewise.
    """

    format: BlockFormat
    codes: npt.NDArray[Any]
    sub_scales: npt.NDArray[np.int8]
    sub_minimums: npt.NDArray[Any]
    scale: npt.NDArray[Any]
    minimum: npt.NDArray[Any]

    @staticmethod
    def empty(form: BlockFormat, rows: int, cols: int) -> Codes:
        """Zeros, to be filled in.

        Raises:
            UsageError: `cols` is no multiple of the block.
        """
        form.row_bytes(cols)

        def make(step: int, kind: Any) -> npt.NDArray[Any]:
            return np.zeros((rows, cols // step), kind)

        kind = np.float16 if form.float_type == "F16" else np.float32
        subs = (make(form.sub, np.int8), make(form.sub, form.integer))
        return Codes(form, make(1, form.integer), *subs, make(form.block, kind), make(form.block, kind))

    def part(self, rows: slice) -> Codes:
        """Some of the rows, sharing memory."""
        subs = self.sub_scales[rows], self.sub_minimums[rows]
        return Codes(self.format, self.codes[rows], *subs, self.scale[rows], self.minimum[rows])

    def values(self) -> FloatArray:
        """Decoded weights, float32 (rows, cols), equal in every bit to what a reader of the bytes gets."""
        form, rows = self.format, len(self.codes)
        per = form.block // form.sub
        scale = np.repeat(self.scale.astype(np.float32) * np.float32(form.unit), per, 1)
        if form.two_level:
            scale = scale * self.sub_scales.astype(np.float32)
        level = self.codes.reshape(rows, -1, form.sub).astype(np.float32)
        found = scale[..., None] * level
        if form.minimums:
            minimum = np.repeat(self.minimum.astype(np.float32), per, 1)
            found -= (minimum * self.sub_minimums.astype(np.float32))[..., None]
        return found.reshape(self.codes.shape)
