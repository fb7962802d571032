"""Section 6.17: codewords through a small decoder, plus a low-rank part."""

from __future__ import annotations

import numpy as np

from bytecap.reference.codebook import indices, numbers, unpacked
from bytecap.reference.coders import Coder, finite
from bytecap.reference.container import Reader, Unit, require
from bytecap.reference.streams import Array, Shared


def _weights(reader: Reader, shape: tuple[int, ...], bits: int) -> Array:
    """One array of a decoder."""
    scale = finite(np.frombuffer(reader.take(2), "<f2").astype(np.float32))
    count = int(np.prod(shape))
    codes = unpacked(reader.take((count * bits + 7) // 8), count, bits) - 2 ** (bits - 1)
    values: Array = codes.astype(np.float32) * scale
    return values.reshape(shape)


def _decode(z: Array, arrays: list[Array]) -> Array:
    """Weights (patches, g) of latents (patches, e)."""
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


def latent(unit: Unit, reader: Reader, _shared: Shared) -> Coder:
    """6.17: header, codewords, decoder, factors, indices."""
    rows, cols = unit.matrix()
    wide = max(1, cols)
    form, d = reader.fields("<BB")
    n, rank = reader.leb(), reader.leb()
    require(form < 8 and 1 <= d <= min(16, wide) and 1 <= n <= 65536, f"form {form}, {n} codewords of {d}")
    require(rank <= min(rows, cols) and (rank or form < 4), f"rank {rank} of {rows} x {cols}")
    words = numbers(reader, n * d, form & 1).reshape(n, d)
    g = e = d
    arrays: list[Array] = []
    if form & 2:
        g, e, h, bits = reader.fields("<BBBB")
        require(1 <= e <= g <= min(64, wide) and h <= 64 and 6 <= bits <= 8 and e % d == 0, "a decoder is out of range")
        arrays = [_weights(reader, shape, bits) for shape in ((g, e), (h, e), (h,), (g, h))]
    factors = [numbers(reader, size * rank, form >> 2).reshape(rank, size) for size in (rows, cols) if rank]
    across = -(-cols // g)
    which = yield from indices(reader, rows * across * (e // d), n)
    with np.errstate(over="ignore", invalid="ignore"):
        z = words[which].reshape(rows * across, e)
        values = (_decode(z, arrays) if arrays else z).reshape(rows, across * g)[:, :cols]
        for k in range(rank):
            values = values + np.outer(factors[0][k], factors[1][k])
    return finite(values)
