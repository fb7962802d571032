"""The overlay `lowrank` adds a residual of low rank to the base's matrix.

`w[i, j] = w[i, j] + (scale[r] * left[r, i]) * right[r, j]` for one rank `r` after the other, float32 throughout.
Factors are signed integers of `bits` bits, left (rank, rows) and right (rank, cols); one f32 scale a rank is enough,
since only the product of both factors' scales matters.

Layer (format.md, 6.10): rank u8 | bits u8 (2 to 8) | packing u8 (0 bits, 1 brotli, 2 entropy coded) | scales | factors.
Bytes: 3 + 4 rank + rank (rows + cols) bits / 8, or the codes' entropy under one fitted table; the smallest is stored.

Sources: LQER (arXiv:2402.02446), CALDERA (arXiv:2405.18886). Omitted: a table for each factor. All are scaled to about
the same spread, and a table costs more than what is left between them.

>>> from bytecap.format.coders import Shared, run
>>> data = CODER.encode(np.array([[1, 2]]), np.array([[3, 0, -4]]), np.array([0.5], np.float32), 4)
>>> run([CODER.apply(data, np.zeros((2, 3), np.float32), Shared())])[0].tolist()
[[1.5, 0.0, -2.0], [3.0, 0.0, -4.0]]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from bytecap.errors import CorruptError
from bytecap.format.coders import Continuous, Decoding, FloatArray, Shared, like, run
from bytecap.format.wire.bits import pack_bits, unpack_bits
from bytecap.format.wire.integers import Integers, write_integers
from bytecap.format.wire.positions import Kinds, pack, take, unpack

MAX_RANK = 255
CODED = 2  # the packing that format 1.2 adds
_HEAD = 3


def _widths(count: int, bits: int) -> npt.NDArray[np.uint8]:
    return np.full(count, bits, np.uint8)


def _scales(data: bytes) -> FloatArray:
    """Read the scales (rank,) of an overlay."""
    rank = take(data, 0, _HEAD)[0]
    scales = np.frombuffer(take(data, _HEAD, 4 * rank), "<f4").astype(np.float32)
    if not np.isfinite(scales).all():
        raise CorruptError("a lowrank layer holds a scale that is not finite")
    return scales


class LowRank:
    """Reader and writer of `lowrank` layers."""

    id: ClassVar[str] = "lowrank"
    tag: ClassVar[int] = 35

    def encode(
        self,
        left: npt.NDArray[np.integer[Any]],
        right: npt.NDArray[np.integer[Any]],
        scales: FloatArray,
        bits: int,
    ) -> bytes:
        """Encode an overlay: codes (rank, rows) and (rank, cols) of `bits` bits, and scales (rank,)."""
        codes = np.concatenate([left, right], axis=1).reshape(-1).astype(np.int64)  # rank after rank
        if not 2 <= bits <= 8 or np.abs(2 * codes + 1).max(initial=0) >= 1 << bits:
            raise ValueError(f"codes do not fit {bits} bits")
        shifted = codes + (1 << (bits - 1))
        packing, body = pack(codes.astype(np.int8).tobytes())
        ways = [(0, pack_bits(shifted, bits)), (CODED, write_integers(shifted, _widths(len(codes), bits), coded=True))]
        packing, body = min([*ways, (1, body)] if packing else ways, key=lambda way: len(way[1]))
        return bytes([len(scales), bits, packing]) + scales.astype("<f4").tobytes() + body

    def kinds(self, data: bytes, shape: tuple[int, int], dtype: str) -> Kinds:
        """Header, scales and factors."""
        del dtype
        rank, bits, packing = take(data, 0, _HEAD)
        if not 1 <= rank <= min(shape) or not 2 <= bits <= 8 or packing > CODED:
            raise CorruptError(f"a lowrank layer declares rank {rank}, {bits} bits, packing {packing} for {shape}")
        take(data, _HEAD, 4 * rank)
        return (("header", _HEAD), ("side", 4 * rank), ("payload", len(data) - _HEAD - 4 * rank))

    def apply(self, data: bytes, base: FloatArray, shared: Shared) -> Decoding:
        """Add the residual."""
        del shared
        scales, rows = _scales(data), base.shape[0]
        factors = yield from self._factors(data, (rows, base.shape[1]))
        with np.errstate(over="ignore", invalid="ignore"):
            for scale, factor in zip(scales, factors, strict=True):
                base += np.multiply.outer(scale * factor[:rows], factor[rows:])
        return base

    def continuous(self, data: bytes, shape: tuple[int, int], shared: Shared) -> Continuous:
        """Return the scales (rank,); the factors are integers of few bits and are not tuned."""
        del shared
        scales, factors = _scales(data), run([self._factors(data, shape)])[0]
        left, right = factors[:, : shape[0]], factors[:, shape[0] :]

        def matrix(arrays: Mapping[str, Any], base: Any) -> Any:
            out = base
            for k in range(len(scales)):
                out = out + arrays["scales"][k] * like(base, np.multiply.outer(left[k], right[k]))
            return out

        end = _HEAD + 4 * len(scales)
        return Continuous(
            {"scales": scales}, matrix, lambda a: data[:_HEAD] + a["scales"].astype("<f4").tobytes() + data[end:]
        )

    def _factors(self, data: bytes, shape: tuple[int, int]) -> Decoding:
        """Decode the factors, float32 (rank, rows + cols)."""
        rows, cols = shape
        _, (_, side), _ = self.kinds(data, (rows, cols), "F32")
        rank, bits, packing = data[:_HEAD]
        body, count, half = data[_HEAD + side :], rank * (rows + cols), 1 << (bits - 1)
        if packing == CODED:
            block, end = Integers.parse(body, 0, _widths(count, bits), coded=True)
            if end != len(body):
                raise CorruptError(f"{len(body) - end} bytes are left over behind a lowrank layer's factors")
            codes = (yield from block.decode()).astype(np.int64) - half
        elif packing:
            codes = np.frombuffer(unpack(1, body, count), np.int8).astype(np.int64)
        else:
            codes = unpack_bits(body, count, bits) - half
        if codes.min(initial=0) < -half or codes.max(initial=0) >= half:
            raise CorruptError(f"a lowrank layer holds a code of more than {bits} bits")
        return codes.reshape(rank, rows + cols).astype(np.float32)


CODER = LowRank()
