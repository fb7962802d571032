"""Section 6.17: codewords through a small decoder, plus a low-rank part."""

from __future__ import annotations

import numpy as np

from bytecap.reference.codebook import indices, numbers, unpacked, words_of
from bytecap.reference.coders import Coder, finite
from bytecap.reference.container import Reader, Unit, require
from bytecap.reference.streams import Array, Shared


def _weights(reader: Reader, shape: tuple[int, ...], bits: int) -> Array:
    """6.17: one array of a decoder."""
    scale = finite(np.frombuffer(reader.take(2), "<f2").astype(np.float32))
    count = int(np.prod(shape))
    codes = unpacked(reader.take((count * bits + 7) // 8), count, bits) - 2 ** (bits - 1)
    values: Array = codes.astype(np.float32) * scale
    return values.reshape(shape)


def arrays(reader: Reader, wide: int) -> list[Array]:
    """6.17: a decoder's arrays S, A, a and B, for patches of at most `wide` weights."""
    g, e, h, bits = reader.fields("<BBBB")
    require(1 <= e <= g <= min(64, wide) and h <= 64 and 6 <= bits <= 8, "a decoder is out of range")
    return [_weights(reader, shape, bits) for shape in ((g, e), (h, e), (h,), (g, h))]


def _decode(z: Array, arrays: list[Array]) -> Array:
    """6.17: weights (patches, g) from latents (patches, e)."""
    skip, inner, bias, outer = arrays
    pieces = []
    for part in np.split(z, range(10_000, len(z), 10_000)):
        w = np.zeros((len(part), len(skip)), np.float32)
        t = np.zeros((len(part), len(bias)), np.float32) + bias
        for k in range(z.shape[1]):
            w = w + np.outer(part[:, k], skip[:, k])
            t = t + np.outer(part[:, k], inner[:, k])
        for j in range(len(bias)):
            w = w + np.outer(np.where(t[:, j] > 0, t[:, j], np.float32(0)), outer[:, j])
        pieces.append(w)
    return np.concatenate(pieces)


def latent(unit: Unit, reader: Reader, shared: Shared) -> Coder:
    """6.17: `latent`, which is header, codewords, decoder, factors, indices."""
    rows, cols = unit.matrix()
    wide = max(1, cols)
    form, d = reader.fields("<BB")
    n, rank = reader.leb(), reader.leb()
    require(form < 32 and 1 <= d <= min(16, wide) and 1 <= n <= 65536, f"form {form}, {n} codewords of {d}")
    require(rank <= min(rows, cols) and (rank or not form & 4), f"rank {rank} of {rows} x {cols}")
    require(form & 17 != 17 and form & 10 != 8, f"form {form}")
    words = words_of(shared[2], reader.leb(), n, d) if form & 16 else numbers(reader, n * d, form & 1).reshape(n, d)
    words_scale = numbers(reader, 1, 0) if form & 16 else None
    decoder, scale, g, e = list[Array](), None, d, d
    if form & 8:
        g, e = reader.fields("<BB")
        decoder, scale = shared[2].get(reader.leb(), 2), numbers(reader, 1, 0)
        require(g <= wide and decoder[0].shape == (g, e), f"the shared decoder is not of {g} x {e}")
    elif form & 2:
        decoder = arrays(reader, wide)
        g, e = decoder[0].shape
    require(e % d == 0, "a latent is no whole number of codewords")
    factors = [numbers(reader, size * rank, form >> 2 & 1).reshape(rank, size) for size in (rows, cols) if rank]
    across = -(-cols // g)
    which = yield from indices(reader, rows * across * (e // d), n, shared[2])
    with np.errstate(over="ignore", invalid="ignore"):
        z = words[which].reshape(rows * across, e)
        z = z if words_scale is None else z * words_scale
        patches = _decode(z, decoder) if decoder else z
        patches = patches if scale is None else patches * scale
        values = patches.reshape(rows, across * g)[:, :cols]
        for k in range(rank):
            values = values + np.outer(factors[0][k], factors[1][k])
    return finite(values)
