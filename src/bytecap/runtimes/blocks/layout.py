"""Codes to bytes and back, by the parts that a block format lists.

>>> from bytecap.runtimes.blocks.ggml import FORMATS
>>> codes = Codes.empty(FORMATS["Q8_0"], 1, 32)
>>> codes.codes[0, 0], codes.scale[0, 0] = 3, 0.5
>>> data = pack(codes)
>>> data.shape, float(unpack(FORMATS["Q8_0"], data).values()[0, 0])
((1, 34), 1.5)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from bytecap.errors import UsageError
from bytecap.runtimes.blocks import BlockFormat, Codes, Part, lattice

_Bytes = npt.NDArray[np.uint8]
_PAIR = ("sub_scales", "sub_minimums")
_SPECIAL = ("six", "power", "trits")
_LEAST = -128  # exponent of E8M0 when its byte is 0
_TRIPLES = ((32, 5), (16, 5), (4, 4))  # so many bytes of base-3 digits, a byte's digits so many bytes apart


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
        else _special(codes, stored, p.kind)
        if p.kind in _SPECIAL
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
    halves: dict[str, npt.NDArray[Any]] = {k: np.zeros((rows, blocks), np.float16) for k in ("scale", "minimum")}
    at = 0
    for part in form.parts:
        if part.kind in halves:
            halves[part.kind] = np.ascontiguousarray(cells[..., at : at + 2]).view("<f2")[..., 0].astype(np.float16)
            at += 2
        elif part.kind == "six":
            stored |= _unsix(cells[..., at : at + 12])
            at += 12
        elif part.kind == "power":
            halves["scale"] = np.ldexp(np.float32(1), cells[..., at].astype(np.int32) + _LEAST)
            at += 1
        elif part.kind == "trits":
            stored["codes"] = _untrits(cells[..., at : at + 52])
            at += 52
        else:
            width = counts[part.kind] * part.bits // 8
            stored[part.kind] |= _unfold(cells[..., at : at + width], part)
            at += width
    if any(p.kind == "pairs" for p in form.parts):
        stored["sub_scales"], stored["sub_minimums"] = np.split(stored["pairs"], 2, -1)
    return _codes(form, stored, halves)


def _codes(form: BlockFormat, stored: dict[str, _Bytes], halves: dict[str, npt.NDArray[Any]]) -> Codes:
    """Codes from what is stored, offsets taken off."""
    rows = len(stored["codes"])
    whole = stored["codes"].reshape(rows, -1)
    plain = (whole - np.uint8(form.code_zero)).view(np.int8)
    levels = np.array(form.levels, np.int8)[list(form.order) if form.order else slice(None)]
    codes = levels[whole] if form.levels else plain
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
        if form.order:  # the first stored code of a level
            whole = np.array([form.order.index(i) for i in range(len(form.levels))], np.uint8)[whole]
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


def _special(codes: Codes, stored: dict[str, _Bytes], kind: str) -> _Bytes:
    """Parts that are no bits side by side."""
    if kind == "six":
        return _six(stored)
    if kind == "trits":
        return _trits(stored["codes"])
    exponent = np.frexp(codes.scale)[1] - 1 - _LEAST
    found: _Bytes = exponent.astype(np.uint8)[..., None]
    return found


def _trits(values: _Bytes) -> _Bytes:
    """256 codes to base 3 in 52 bytes, as fractions of 243 rounded up to 256ths: digits come by multiplying."""
    found, at = [], 0
    for count, digits in _TRIPLES:
        cut = values[..., at : at + count * digits].reshape(*values.shape[:-1], digits, count)
        whole = (cut * 3 ** np.arange(4, 4 - digits, -1, dtype=np.uint16)[:, None]).sum(-2)
        found.append((whole * 256 + 242) // 243)
        at += count * digits
    return np.concatenate(found, -1).astype(np.uint8)


def _untrits(data: _Bytes) -> _Bytes:
    found, at = [], 0
    for count, digits in _TRIPLES:
        cut = data[..., None, at : at + count] * 3 ** np.arange(digits, dtype=np.uint8)[:, None]  # modulo 256
        found.append((cut.astype(np.uint16) * 3 >> 8).reshape(*data.shape[:-1], -1))
        at += count
    return np.concatenate(found, -1).astype(np.uint8)


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
