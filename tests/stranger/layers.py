"""`stack` and its layers (6.5 to 6.12, 6.20, 6.23), what they find in a base (6.22), and the table of coders."""

import numpy as np

from stranger import books, plain
from stranger.basics import Bytes, need, packed, planes
from stranger.shared import positions


def base(data, _shape, _dtype, shared):
    need(shared.below is not None and not data, "values of a base where there is none, or more than that")
    return shared.below


CODERS = {
    1: plain.grid, 2: plain.vector, 3: plain.exact, 4: plain.packed, 6: books.codebook, 7: books.latent,
    8: plain.binary, 9: plain.trellis, 10: books.fixed, 11: books.companded, 14: plain.bands,
    15: plain.long_trellis, 16: base,
}  # fmt: skip
FRACTIONS = np.array(
    [0x3F800000, 0x3F85AAC3, 0x3F8B95C2, 0x3F91C3D3, 0x3F9837F0, 0x3F9EF532, 0x3FA5FED7, 0x3FAD583F,
     0x3FB504F3, 0x3FBD08A4, 0x3FC5672A, 0x3FCE248C, 0x3FD744FD, 0x3FE0CCDF, 0x3FEAC0C7, 0x3FF5257D], "<u4",
).view("<f4")  # fmt: skip


def decode(coder, data, shape, dtype, shared):
    """A unit's matrix."""
    if coder == 5:
        return stack(data, shape, dtype, shared)
    need(coder in CODERS, f"there is no coder {coder}")
    w = CODERS[coder](data, shape, dtype, shared)
    need(coder in {3, 16} or np.isfinite(w).all(), "a decoded value is not finite")
    return w


def steps(coder, data):
    """Work of a section (section 4), for each value."""
    source = Bytes(data)
    if coder == 7:
        form, _, _, rank = source.u8(), source.u8(), source.leb(), source.leb()
        return 1 + rank + 192 * (form >> 1 & 1)
    if coder != 5:
        return 1
    base, count = source.u8(), source.u8(1, 16)
    need(base != 5, "a stack on a stack")
    total = steps(base, source.part().data)
    for _ in range(count):
        overlay, part = source.u8(), source.part()
        total += part.u8() if overlay == 35 else 1
    return total


def stack(data, shape, dtype, shared):
    source = Bytes(data)
    base, count = source.u8(), source.u8(1, 16)
    need(base in CODERS, f"there is no base {base}")
    w = decode(base, source.part().data, shape, dtype, shared).astype(np.float32)
    for _ in range(count):
        overlay = source.u8()
        need(overlay in OVERLAYS or overlay == 41, f"there is no layer {overlay}")
        part = source.part()
        if overlay == 41:
            added = part.u8()
            need(added in {1, 2, 9, 15}, f"a difference by coder {added}")
            w = w + decode(added, part.rest(), shape, dtype, shared)
            continue
        w = OVERLAYS[overlay](part, w.copy(), shared)
        part.end()
    source.end()
    need(np.isfinite(w).all(), "a decoded value is not finite")
    return w


def protected(source, lengths):
    """Protected values (6.6): one array for every length."""
    precision, packing, n = source.u8(0, 1), source.u8(), sum(lengths)
    if precision:
        scale = np.repeat(source.f16(len(lengths)), lengths)
        values = np.frombuffer(packed(source, packing, n), np.int8).astype(np.float32) * scale
    else:
        values = planes(packed(source, packing, 2 * n), n)
    return np.split(values, np.cumsum(lengths)[:-1]) if lengths else []


def columns(source, w, shared):
    places = positions(source, w.shape[1], shared)
    for j, values in zip(places, protected(source, [w.shape[0]] * len(places)), strict=True):
        w[:, j] = values
    return w


def rows(source, w, shared):
    places = positions(source, w.shape[0], shared)
    for i, values in zip(places, protected(source, [w.shape[1]] * len(places)), strict=True):
        w[i] = values
    return w


def outliers(source, w, shared):
    places = positions(source, w.size, shared)
    (values,) = protected(source, [len(places)])
    for place, value in zip(places, values, strict=True):
        w[divmod(place, w.shape[1])] = value
    return w


def lowrank(source, w, shared):
    del shared
    rank, bits, packing = source.u8(1, 255), source.u8(2, 8), source.u8(0, 2)
    need(rank <= min(w.shape), f"rank {rank} of {w.shape}")
    scale = [source.f32() for _ in range(rank)]
    count, half = rank * sum(w.shape), 1 << (bits - 1)
    if packing == 0:
        codes = source.bits(bits, count) - half
    elif packing == 1:
        codes = np.frombuffer(packed(source, 1, count), np.int8).astype(np.int64)
        need((codes >= -half).all() and (codes < half).all(), "a code out of range")
    else:
        codes = books.integers(source, [bits] * count, coded=1) - half
    factors = codes.astype(np.float32).reshape(rank, -1)
    for r in range(rank):
        left, right = factors[r, : w.shape[0]], factors[r, w.shape[0] :]
        a = scale[r] * left
        w = w + a[:, None] * right
    return w


def groups(source, w, shared):
    del shared
    size, precision, packing = source.leb(1, max(1, w.shape[1])), source.u8(0, 1), source.u8()
    across = -(-w.shape[1] // size)
    n = w.shape[0] * across
    if precision:
        k = np.frombuffer(packed(source, packing, n), np.int8).astype(np.int64)
        scale = np.ldexp(FRACTIONS[k % 16], k // 16).astype(np.float32)
    else:
        scale = planes(packed(source, packing, 2 * n), n)
    return w * np.repeat(scale.reshape(w.shape[0], across), size, axis=1)[:, : w.shape[1]]


def channels(source, w, shared):
    mode = source.u8(1, 3)
    limit = (w.shape[1], w.shape[0], min(w.shape))[mode - 1]
    places = positions(source, limit, shared)
    inside = [i for i in range(w.shape[0]) if mode == 1 or i not in set(places)]
    lengths = [len(inside)] * len(places) if mode != 2 else []
    lengths += [w.shape[1]] * len(places) if mode != 1 else []
    vectors = iter(protected(source, lengths))
    for j in places if mode != 2 else ():
        w[inside, j] = next(vectors)
    for i in places if mode != 1 else ():
        w[i] = next(vectors)
    return w


def order(source, w, shared):
    del shared
    place = source.bits((len(w) - 1).bit_length() if len(w) else 0, len(w))
    need(sorted(place.tolist()) == list(range(len(w))), "no permutation")
    return w[place]


OVERLAYS = {32: columns, 33: rows, 34: outliers, 35: lowrank, 36: groups, 37: channels, 40: order}
