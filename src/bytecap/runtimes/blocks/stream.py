"""Integers of a few bits in a stream of 32-bit words, lowest bits first, as MLX and compressed-tensors pack them.

>>> words = pack_words(np.array([[1, 2, 3, 4, 5, 6, 7, 8]], np.uint8), 4)
>>> hex(words[0, 0]), unpack_words(words, 4, 8).tolist()
('0x87654321', [[1, 2, 3, 4, 5, 6, 7, 8]])
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def words_of(count: int, bits: int) -> int:
    """Words that hold so many integers."""
    return -(-count * bits // 32)


def pack_words(values: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint32]:
    """Integers below `2**bits` (rows, count) as words (rows, words); the last word's free bits are zero."""
    rows, count = values.shape
    planes = np.unpackbits(np.ascontiguousarray(values)[..., None], axis=-1, count=bits, bitorder="little")
    stream = np.zeros((rows, 32 * words_of(count, bits)), np.uint8)
    stream[:, : count * bits] = planes.reshape(rows, -1)
    return np.packbits(stream, axis=1, bitorder="little").view("<u4").astype(np.uint32)


def unpack_words(words: npt.NDArray[np.uint32], bits: int, count: int) -> npt.NDArray[np.uint8]:
    """The first `count` integers of every row of words (rows, words)."""
    data = np.ascontiguousarray(words.astype("<u4")).view(np.uint8)
    stream = np.unpackbits(data, axis=1, bitorder="little")[:, : count * bits]
    found: npt.NDArray[np.uint8] = np.packbits(stream.reshape(len(words), count, bits), axis=-1, bitorder="little")
    return found[..., 0]
