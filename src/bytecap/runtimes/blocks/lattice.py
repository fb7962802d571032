"""The lattice formats of ggml (IQ1 to IQ3): codes are vectors of a table, times signs, scales and an offset.

Four or eight neighbouring columns are one vector. Its absolute values (in IQ1 its values, moved by an eighth) are a row
of a fixed table; signs are stored one by one, or seven of eight where their product must be positive. Sub-blocks scale
by odd integers, so a weight is `scale * unit * odd * level`, exact in float32 in any order: everything that reads
`Codes` reads these too. The tables are ggml's; they are asked of gguf-py, which must be installed.
Omitted: the search, which is in `lattice_search`.

>>> form = LATTICES["IQ3_S"]
>>> form.bits, form.vector, table(form).shape
(3.4375, 4, (512, 4))
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from bytecap.runtimes.blocks import BlockFormat, Codes, FloatArray
from bytecap.runtimes.libraries import library

_Bytes = npt.NDArray[np.uint8]
_Words = npt.NDArray[Any]  # unsigned integers
BLOCK, SIGNS = 256, 8  # columns of a block, and of a group of signs


def _lattice(
    name: str, size: int, sub: int, top: int, most: int, vector: int, signs: str, unit: float, offsets: int = 0
) -> BlockFormat:
    return BlockFormat(
        name, size, BLOCK, sub, -top, top, (), (1, most), vector=vector, signs=signs, unit=unit, offsets=offsets
    )


LATTICES = {
    f.name: f
    for f in (
        _lattice("IQ1_S", 50, 32, 9, 15, 8, "", 0.125, 32),
        _lattice("IQ1_M", 56, 16, 9, 15, 8, "", 0.125, 8),
        _lattice("IQ2_XXS", 66, 32, 43, 31, 8, "even", 0.125),
        _lattice("IQ2_XS", 74, 16, 43, 31, 8, "even", 0.125),
        _lattice("IQ2_S", 82, 16, 43, 31, 8, "free", 0.125),
        _lattice("IQ3_XXS", 98, 32, 62, 31, 4, "even", 0.25),
        _lattice("IQ3_S", 110, 32, 15, 31, 4, "free", 1.0),
    )
}


@cache
def table(form: BlockFormat) -> FloatArray:
    """Rows of a format's table in its own units, float32 (entries, vector).

    Raises:
        UsageError: gguf-py is not installed.
    """
    kind = getattr(library("gguf.quants"), form.name)
    kind.init_grid()
    found: FloatArray = np.array(kind.grid, np.float32).reshape(kind.grid_shape)
    return found * np.float32(8) if form.offsets else found


def pack(codes: Codes) -> _Bytes:
    """Bytes of every row, uint8 (rows, row bytes)."""
    form, rows = codes.format, len(codes.codes)
    blocks = codes.codes.shape[1] // BLOCK
    place, sign, offset = _taken_apart(codes, (rows, blocks))
    small = (codes.sub_scales.reshape(rows, blocks, -1).astype(np.uint32) - 1) // 2
    half = np.ascontiguousarray(codes.scale.astype("<f2")).view(np.uint16).reshape(rows, blocks, 1)
    parts = _PACK[form.name](place, sign, offset, small, half)
    return np.concatenate(parts, -1).reshape(rows, -1)


def unpack(form: BlockFormat, data: _Bytes) -> Codes:
    """Codes of rows of whole blocks of bytes (rows, row bytes)."""
    rows = len(data)
    cells = data.reshape(rows, -1, form.size)
    place, sign, offset, small, half = _UNPACK[form.name](cells)
    level = table(form)[place.reshape(rows, -1)].astype(np.int8).reshape(rows, -1)
    if form.signs:
        bits = sign[..., None] >> np.arange(SIGNS, dtype=np.uint32) & 1
        level = np.where(bits.reshape(rows, -1) == 1, -level, level)
    if form.offsets:
        level = level + np.repeat(1 - 2 * offset.astype(np.int8), form.offsets, -1).reshape(rows, -1)
    scales = (2 * small + 1).astype(np.int8).reshape(rows, -1)
    blank = np.zeros_like(half, np.float16)
    return Codes(form, level.astype(np.int8), scales, np.zeros_like(scales), half, blank)


def _taken_apart(codes: Codes, shape: tuple[int, int]) -> tuple[_Words, _Words, _Words]:
    """Places in the table, bits of signs of eight columns, and of offsets, each (rows, blocks, n)."""
    form, level = codes.format, codes.codes.astype(np.int32)
    sign = np.zeros((*shape, BLOCK // SIGNS), np.uint32)
    offset = np.zeros((*shape, BLOCK // (form.offsets or BLOCK)), np.uint32)
    if form.signs:
        negative = (level < 0).reshape(*shape, -1, SIGNS)
        sign = (negative << np.arange(SIGNS)).sum(-1).astype(np.uint32)
        level = np.abs(level)
    if form.offsets:
        bent = (level & 7).reshape(*shape, -1, form.offsets)[..., 0] == 7  # 8 n - 1
        offset = bent.astype(np.uint32)
        level = level - np.repeat(1 - 2 * bent.astype(np.int32), form.offsets, -1).reshape(level.shape)
    keys, order = _keys(form)
    wanted = _key(form, level.reshape(-1, form.vector))
    place = order[np.searchsorted(keys, wanted)].astype(np.uint32)
    return place.reshape(*shape, -1), sign, offset


@cache
def _keys(form: BlockFormat) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.intp]]:
    """Sorted numbers of the table's rows, and whose they are."""
    keys = _key(form, table(form).astype(np.int32))
    order = np.argsort(keys)
    return keys[order], order


def _key(form: BlockFormat, level: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """A number for every vector of levels."""
    found: npt.NDArray[np.int64] = ((level.astype(np.int64) + 64) << (7 * np.arange(form.vector))).sum(-1)
    return found


def _bytes(values: Any, kind: str) -> _Bytes:
    return np.ascontiguousarray(values.astype(kind)).view(np.uint8)


def _words(data: _Bytes, kind: str) -> _Words:
    return np.ascontiguousarray(data).view(kind).astype(np.uint32)


def _fold(values: _Words, bits: int, width: int = 8) -> _Words:
    """Integers of a few bits side by side in words of `width`, first ones lowest."""
    cut = values.reshape(*values.shape[:-1], -1, width // bits) << np.arange(0, width // bits * bits, bits)
    found: _Words = cut.sum(-1).astype(np.uint32)
    return found


def _unfold(words: _Words, bits: int, width: int = 8) -> _Words:
    found = words[..., None] >> np.arange(0, width // bits * bits, bits, dtype=np.uint32) & ((1 << bits) - 1)
    flat: _Words = found.reshape(*words.shape[:-1], -1)
    return flat


def _even(seven: _Words) -> _Words:
    """Eight signs of seven: the last makes their number even."""
    odd = seven ^ seven >> 4
    odd ^= odd >> 2
    found: _Words = seven | ((odd ^ odd >> 1) & 1) << 7
    return found


def _low(place: _Words) -> _Bytes:
    return _bytes(place & 255, "u1")


def _pack_xxs(place: _Words, sign: _Words, _offset: Any, small: _Words, half: Any) -> list[_Bytes]:
    """IQ2_XXS, IQ3_XXS: four signs of seven and the sub-scale share a word."""
    words = _fold(sign & 127, 7, 28) | small << 28
    head = _bytes(half, "<u2")
    if place.shape[-1] == BLOCK // 4:
        return [head, _low(place), _bytes(words, "<u4")]
    both = np.concatenate([_fold(place, 8, 32)[..., None], words[..., None]], -1)
    return [head, _bytes(both.reshape(*words.shape[:-1], -1), "<u4")]


def _unpack_xxs2(cells: _Bytes) -> tuple[Any, ...]:
    both = _words(cells[..., 2:], "<u4").reshape(*cells.shape[:2], -1, 2)
    return (_unfold(both[..., 0], 8, 32), *_xxs(both[..., 1]), _half(cells[..., :2]))


def _unpack_xxs3(cells: _Bytes) -> tuple[Any, ...]:
    return (cells[..., 2:66], *_xxs(_words(cells[..., 66:], "<u4")), _half(cells[..., :2]))


def _xxs(words: _Words) -> tuple[Any, ...]:
    return _even(_unfold(words, 7, 28)), None, words >> 28


def _half(data: _Bytes) -> npt.NDArray[np.float16]:
    return np.ascontiguousarray(data).view("<f2")[..., 0].astype(np.float16)


def _pack_xs(place: _Words, sign: _Words, _offset: Any, small: _Words, half: Any) -> list[_Bytes]:
    """IQ2_XS: nine bits of place and seven signs."""
    return [_bytes(half, "<u2"), _bytes(place | (sign & 127) << 9, "<u2"), _bytes(_fold(small, 4), "u1")]


def _unpack_xs(cells: _Bytes) -> tuple[Any, ...]:
    words = _words(cells[..., 2:66], "<u2")
    return words & 511, _even(words >> 9), None, _unfold(cells[..., 66:].astype(np.uint32), 4), _half(cells[..., :2])


def _pack_2s(place: _Words, sign: _Words, _offset: Any, small: _Words, half: Any) -> list[_Bytes]:
    """IQ2_S: low bytes of places, signs, two high bits of places."""
    return [_bytes(half, "<u2"), _low(place), *(_bytes(x, "u1") for x in (sign, _fold(place >> 8, 2), _fold(small, 4)))]


def _unpack_2s(cells: _Bytes) -> tuple[Any, ...]:
    wide = cells.astype(np.uint32)
    place = wide[..., 2:34] | _unfold(wide[..., 66:74], 2) << 8
    return place, wide[..., 34:66], None, _unfold(wide[..., 74:], 4), _half(cells[..., :2])


def _pack_3s(place: _Words, sign: _Words, _offset: Any, small: _Words, half: Any) -> list[_Bytes]:
    """IQ3_S: low bytes of places, their ninth bits, signs."""
    return [_bytes(half, "<u2"), _low(place), *(_bytes(x, "u1") for x in (_fold(place >> 8, 1), sign, _fold(small, 4)))]


def _unpack_3s(cells: _Bytes) -> tuple[Any, ...]:
    wide = cells.astype(np.uint32)
    place = wide[..., 2:66] | _unfold(wide[..., 66:74], 1) << 8
    return place, wide[..., 74:106], None, _unfold(wide[..., 106:], 4), _half(cells[..., :2])


def _pack_1s(place: _Words, _sign: Any, offset: _Words, small: _Words, half: Any) -> list[_Bytes]:
    """IQ1_S: three high bits of four places, sub-scale and offset share a word."""
    words = _fold(place >> 8, 3, 12) | small << 12 | offset << 15
    return [_bytes(half, "<u2"), _low(place), _bytes(words, "<u2")]


def _unpack_1s(cells: _Bytes) -> tuple[Any, ...]:
    words = _words(cells[..., 34:], "<u2")
    place = cells[..., 2:34] | _unfold(words, 3, 12) << 8
    return place, None, words >> 15, words >> 12 & 7, _half(cells[..., :2])


def _pack_1m(place: _Words, _sign: Any, offset: _Words, small: _Words, half: Any) -> list[_Bytes]:
    """IQ1_M: the scale's four nibbles are the highest of four words of sub-scales."""
    words = _fold(small, 3, 12) | (half.astype(np.uint32) >> np.arange(0, 16, 4, dtype=np.uint32) & 15) << 12
    return [_low(place), _bytes(_fold(place >> 8 | offset << 3, 4), "u1"), _bytes(words, "<u2")]


def _unpack_1m(cells: _Bytes) -> tuple[Any, ...]:
    words, high = _words(cells[..., 48:], "<u2"), _unfold(cells[..., 32:48].astype(np.uint32), 4)
    half = _fold(words >> 12, 4, 16).astype(np.uint16).view(np.float16)[..., 0]
    return cells[..., :32] | (high & 7) << 8, None, high >> 3, _unfold(words, 3, 12), half


_PACK = {
    "IQ1_S": _pack_1s, "IQ1_M": _pack_1m, "IQ2_XXS": _pack_xxs, "IQ2_XS": _pack_xs, "IQ2_S": _pack_2s,
    "IQ3_XXS": _pack_xxs, "IQ3_S": _pack_3s,
}  # fmt: skip
_UNPACK = {
    "IQ1_S": _unpack_1s, "IQ1_M": _unpack_1m, "IQ2_XXS": _unpack_xxs2, "IQ2_XS": _unpack_xs, "IQ2_S": _unpack_2s,
    "IQ3_XXS": _unpack_xxs3, "IQ3_S": _unpack_3s,
}  # fmt: skip
