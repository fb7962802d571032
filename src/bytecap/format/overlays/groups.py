"""The overlay `groups` multiplies every group of consecutive weights of a row by a scale.

`w[i, j] = w[i, j] * scale[i, floor(j / size)]` in float32; a row's last group may be shorter.

Scales are f16, or one byte that stands for `2^(k / 16)`, `k` from -128 to 127: steps of 4.4% over sixteen octaves.

Layer (format.md, 6.11): size leb | precision u8 (0 f16, 1 sixteenths of an octave) | packing u8 | scales, row after
row. Bytes: 3 or 4 + rows * ceil(cols / size) * (2 or 1), less where brotli finds something.

Sources: GPTQ's groups of 32 to 128 (arXiv:2210.17323); Radio (arXiv:2505.03031) for scales in powers.
Omitted: an offset for every group; a base has one if it is any use.

>>> from bytecap.format.coders import Shared, run
>>> data = CODER.encode(np.array([[0, 16], [-16, -8]], np.int8), 2)
>>> run([CODER.apply(data, np.ones((2, 3), np.float32), Shared())])[0].tolist()
[[1.0, 1.0, 2.0], [0.5, 0.5, 0.7071067690849304]]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from bytecap.errors import CorruptError
from bytecap.format.coders import Continuous, Decoding, FloatArray, Shared, leb, read_leb
from bytecap.format.wire.positions import Kinds, pack, take, unpack

HALF, LOG = 0, 1

# 2^(0/16) .. 2^(15/16) as float32 literals, like the quarters of the grid
_SIXTEENTHS = np.array(
    [1.0, 1.0442737, 1.0905077, 1.1387886, 1.1892071, 1.2418578, 1.2968396, 1.3542556, 1.4142135, 1.4768262, 1.5422108,
     1.6104903, 1.6817929, 1.7562522, 1.8340081, 1.9152066],
    np.float32,
)  # fmt: skip


def sixteenth(k: npt.ArrayLike) -> FloatArray:
    """Compute `2^(k/16)` in the format's exact float32 arithmetic."""
    whole = np.floor_divide(np.asarray(k, np.int32), 16)
    power: FloatArray = np.ldexp(_SIXTEENTHS[np.asarray(k, np.int32) - 16 * whole], whole)
    return power


class Groups:
    """Reader and writer of `groups` layers."""

    id: ClassVar[str] = "groups"
    tag: ClassVar[int] = 36

    def encode(self, scales: npt.NDArray[Any], size: int) -> bytes:
        """Encode scales (rows, groups) for groups of `size`, as float16 or as int8 sixteenths of an octave."""
        if scales.dtype == np.int8:
            precision, raw = LOG, np.ascontiguousarray(scales).tobytes()
        else:
            halves = np.ascontiguousarray(scales.reshape(-1), "<f2").view(np.uint8)
            precision, raw = HALF, np.ascontiguousarray(halves.reshape(-1, 2).T).tobytes()
        packing, body = pack(raw)
        return leb(size) + bytes([precision, packing]) + body

    def _parse(self, data: bytes, shape: tuple[int, int]) -> tuple[int, int, int, int]:
        """Read (group size, precision, packing, header bytes)."""
        size, at = read_leb(data, 0)
        precision, packing = take(data, at, 2)
        if not 1 <= size <= max(1, shape[1]) or precision not in (HALF, LOG) or packing > 1:
            raise CorruptError(
                f"a groups layer declares groups of {size} of {shape[1]}, precision {precision}, packing {packing}"
            )
        return size, precision, packing, at + 2

    def kinds(self, data: bytes, shape: tuple[int, int], dtype: str) -> Kinds:
        """Header and scales, which are side information."""
        del dtype
        *_, head = self._parse(data, shape)
        return (("header", head), ("side", len(data) - head))

    def apply(self, data: bytes, base: FloatArray, shared: Shared) -> Decoding:
        """Multiply every weight by its group's scale."""
        del shared
        yield from ()
        scales, size = self._scales(data, (base.shape[0], base.shape[1]))
        with np.errstate(over="ignore", invalid="ignore"):
            base *= np.repeat(scales, size, axis=1)[:, : base.shape[1]]
        return base

    def continuous(self, data: bytes, shape: tuple[int, int], shared: Shared) -> Continuous:
        """Return the scales (rows, groups)."""
        del shared
        scales, size = self._scales(data, shape)
        place = np.arange(shape[1]) // size

        def encode(arrays: Mapping[str, FloatArray]) -> bytes:
            found = arrays["scales"]
            if self._parse(data, shape)[1] == HALF:
                return self.encode(found.astype(np.float16), size)
            exponent = np.rint(16 * np.log2(np.maximum(found, 2.0**-8)))
            return self.encode(np.clip(exponent, -128, 127).astype(np.int8), size)

        return Continuous({"scales": scales}, lambda a, base: base * a["scales"][:, place], encode)

    def _scales(self, data: bytes, shape: tuple[int, int]) -> tuple[FloatArray, int]:
        """Read the scales (rows, groups) and the size of a group."""
        rows, cols = shape
        size, precision, packing, at = self._parse(data, shape)
        groups = -(-cols // size)
        raw = unpack(packing, data[at:], rows * groups * (2 if precision == HALF else 1))
        if precision == HALF:
            scales = np.ascontiguousarray(np.frombuffer(raw, np.uint8).reshape(2, -1).T).view("<f2").astype(np.float32)
        else:
            scales = sixteenth(np.frombuffer(raw, np.int8))
        if not np.isfinite(scales).all():
            raise CorruptError("a groups layer holds a scale that is not finite")
        return scales.reshape(rows, groups), size


CODER = Groups()
