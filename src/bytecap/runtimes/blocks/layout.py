"""Codes to bytes and back, by the parts that a block format lists.

>>> from bytecap.runtimes.blocks.ggml import FORMATS
>>> codes = Codes.empty(FORMATS["Q8_0"], 1, 32)
>>> codes.codes[0, 0], codes.scale[0, 0] = 3, 0.5
>>> data = pack(codes)
>>> data.shape, float(unpack(FORMATS["Q8_0"], data).values()[0, 0])
((1, 34), 1.5)
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bytecap.errors import UsageError
from bytecap.runtimes.blocks import BlockFormat, Codes, Part, lattice

_Bytes = npt.NDArray[np.uint8]
_PAIR = ("sub_scales", "sub_minimums")


def pack(codes: Codes) -> _Bytes:
    """Bytes of every row, uint8 (rows, row bytes)."""
    form, rows = codes.format, len(codes.codes)
    if form.vector:
        return lattice.pack(codes)
    blocks = codes.codes.shape[1] // form.block
    stored = _stored(codes, (rows, blocks))
    minimum = -codes.minimum if form.negated else codes.minimum
    halves = {"scale": codes.scale, "minimum": minimum}
    parts = [
        np.ascontiguousarray(halves[p.kind].astype("<f2")).view(np.uint8).reshape(rows, blocks, 2)
        if p.kind in halves
        else _six(stored)
        if p.kind == "six"
        else _fold(_of(stored, p.kind), p)
        for p in form.parts
    ]
    return np.concatenate(parts, -1).reshape(rows, -1)


def unpack(form: BlockFormat, data: _Bytes) -> Codes:
    """Codes of rows of bytes (rows, row bytes).

    Raises:
        UsageError: the rows are not whole blocks.
    """
    rows = len(data)
    if data.shape[1] % form.size:
        raise UsageError(f"{data.shape[1]} bytes are no whole blocks of {form.name}, which have {form.size} each")
    if form.vector:
        return lattice.unpack(form, data)
    blocks = data.shape[1] // form.size
    cells, subs = data.reshape(rows, blocks, form.size), form.block // form.sub
    counts = {"codes": form.block, "sub_scales": subs, "sub_minimums": subs, "pairs": 2 * subs}
    stored = {k: np.zeros((rows, blocks, n), np.uint8) for k, n in counts.items()}
    halves = {k: np.zeros((rows, blocks), np.float16) for k in ("scale", "minimum")}
    at = 0
    for part in form.parts:
        if part.kind in halves:
            halves[part.kind] = np.ascontiguousarray(cells[..., at : at + 2]).view("<f2")[..., 0].astype(np.float16)
            at += 2
        elif part.kind == "six":
            stored |= _unsix(cells[..., at : at + 12])
            at += 12
        else:
            width = counts[part.kind] * part.bits // 8
            stored[part.kind] |= _unfold(cells[..., at : at + width], part)
            at += width
    if any(p.kind == "pairs" for p in form.parts):
        stored["sub_scales"], stored["sub_minimums"] = np.split(stored["pairs"], 2, -1)
    return _codes(form, stored, halves)


def _codes(form: BlockFormat, stored: dict[str, _Bytes], halves: dict[str, npt.NDArray[np.float16]]) -> Codes:
    """Codes from what is stored, offsets taken off."""
    rows = len(stored["codes"])
    whole = stored["codes"].reshape(rows, -1)
    plain = (whole - np.uint8(form.code_zero)).view(np.int8)
    codes = np.array(form.levels, np.int8)[whole] if form.levels else plain
    one = np.ones((rows, whole.shape[1] // form.sub), np.int8)
    scales = (stored["sub_scales"] - np.uint8(form.scale_zero)).view(np.int8).reshape(rows, -1)
    minimums = stored["sub_minimums"].view(np.int8).reshape(rows, -1)
    if not form.two_level:
        scales, minimums = one, one if form.minimums else np.zeros_like(one)
    minimum = -halves["minimum"] if form.negated else halves["minimum"]
    return Codes(form, codes, scales, minimums, halves["scale"], minimum)


def _stored(codes: Codes, shape: tuple[int, int]) -> dict[str, _Bytes]:
    """Unsigned integers of every block, offsets added."""
    form = codes.format
    if form.levels:
        whole = np.searchsorted(np.array(form.levels), codes.codes).astype(np.uint8)
    else:
        whole = codes.codes.view(np.uint8) + np.uint8(form.code_zero)
    found = {
        "codes": whole,
        "sub_scales": codes.sub_scales.view(np.uint8) + np.uint8(form.scale_zero),
        "sub_minimums": codes.sub_minimums.view(np.uint8),
    }
    return {k: v.reshape(*shape, -1) for k, v in found.items()}


def _of(stored: dict[str, _Bytes], kind: str) -> _Bytes:
    return np.concatenate([stored[k] for k in _PAIR], -1) if kind == "pairs" else stored[kind]


def _fold(values: _Bytes, part: Part) -> _Bytes:
    """Bits of integers (..., n) side by side in bytes (..., n * bits / 8)."""
    per = 8 // part.bits
    mask = np.uint8((1 << part.bits) - 1)
    cut = ((values >> np.uint8(part.shift)) & mask).reshape(*values.shape[:-1], -1, per, part.width)
    moved = cut << (np.arange(per, dtype=np.uint8) * np.uint8(part.bits))[:, None]
    folded: _Bytes = np.bitwise_or.reduce(moved, -2)
    return folded.reshape(*values.shape[:-1], -1)


def _unfold(data: _Bytes, part: Part) -> _Bytes:
    """Integers that `_fold` put into bytes, at their place."""
    per = 8 // part.bits
    mask = np.uint8((1 << part.bits) - 1)
    cells = data.reshape(*data.shape[:-1], -1, 1, part.width)
    found = (cells >> (np.arange(per, dtype=np.uint8) * np.uint8(part.bits))[:, None]) & mask
    return (found << np.uint8(part.shift)).reshape(*data.shape[:-1], -1)


def _six(stored: dict[str, _Bytes]) -> _Bytes:
    """Eight pairs of 6 bits in 12 bytes: high bits of the last four ride on the first four."""
    s, m = stored["sub_scales"], stored["sub_minimums"]
    low, high = slice(0, 4), slice(4, 8)
    return np.concatenate(
        [s[..., low] | (s[..., high] >> 4) << 6, m[..., low] | (m[..., high] >> 4) << 6,
         (s[..., high] & 15) | (m[..., high] & 15) << 4], -1,
    )  # fmt: skip


def _unsix(data: _Bytes) -> dict[str, _Bytes]:
    a, b, c = data[..., :4], data[..., 4:8], data[..., 8:]
    return {
        "sub_scales": np.concatenate([a & 63, (c & 15) | (a >> 6) << 4], -1),
        "sub_minimums": np.concatenate([b & 63, (c >> 4) | (b >> 6) << 4], -1),
    }
