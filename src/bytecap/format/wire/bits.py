"""Pack bits into bytes, lowest bit first (format.md, 6.6).

>>> data = pack_bits(np.array([1, 2, 3]), 4)
>>> data.hex(), unpack_bits(data, 3, 4).tolist()
('2103', [1, 2, 3])
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from bytecap.errors import CorruptError
from bytecap.types import Bytes


def packed_size(count: int, width: int) -> int:
    """Return the bytes that `pack_bits` makes of `count` values."""
    return -(-count * width // 8)


def pack_bits(values: npt.NDArray[np.integer[Any]], width: int) -> bytes:
    """Pack unsigned values (n,) at `width` bits each into whole bytes."""
    bits = (values.astype(np.int64).reshape(-1, 1) >> np.arange(width)) & 1
    return np.packbits(bits.astype(np.uint8).reshape(-1), bitorder="little").tobytes()


def read_bits(data: Bytes, count: int) -> npt.NDArray[np.uint8]:
    """Read bits (count,) that fill exactly these bytes.

    Raises:
        CorruptError: another number of bytes, or bits behind the last one that are not 0.
    """
    check_bits(data, count)
    return np.unpackbits(np.frombuffer(data, np.uint8), count=count, bitorder="little")


def check_bits(data: Bytes, count: int) -> None:
    """Refuse what `read_bits` refuses, without reading the bits."""
    if len(data) != packed_size(count, 1):
        raise CorruptError(f"{count} bits are packed into {len(data)} bytes")
    if count % 8 and data[-1] >> count % 8:
        raise CorruptError(f"the last byte of {count} packed bits has bits that belong to none")


def unpack_bits(data: Bytes, count: int, width: int) -> npt.NDArray[np.int64]:
    """Unpack values (count,) from exactly the bytes that `pack_bits` made; raises as `read_bits`."""
    bits = read_bits(data, count * width)
    values = np.zeros(count, np.int64)
    for i in range(width):
        values |= bits[i::width].astype(np.int64) << i
    return values
