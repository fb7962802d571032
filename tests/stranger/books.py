"""Coders of codewords and of fixed widths: codebook, latent, fixed, companded (6.13, 6.14, 6.16, 6.17)."""

import math

import numpy as np

from stranger.basics import Bytes, Table, frequencies, need, stream
from stranger.plain import exact
from stranger.shared import decoder, numbers


def read_indices(source, count, n, shared):
    """Indices of 6.16, to the end of the section."""
    width, mode = (n - 1).bit_length(), source.u8()
    high = None
    low = width
    if mode:
        low = mode - 1 if mode < 128 else mode - 128
        need(low < max(1, width), f"there is no mode {mode}")
        m = ((n - 1) >> low) + 1
        need(m <= 4096, f"a table of {m} symbols")
        table = Table(0, frequencies(source, m)) if mode < 128 else shared.get(source.leb(), 4, m)
        high = np.array(stream(source.part().data, [1] * count, {1: table}), np.int64)
        need(not count or (high.min() >= 0 and high.max() < m), "a symbol out of range")
    found = source.bits(low, count)
    source.end()
    if high is not None:
        found = (high << low) + found
    need(not count or found.max() < n, "an index of no codeword")
    return found


def codebook(data, shape, dtype, shared):
    del dtype
    rows, cols = shape
    source = Bytes(data)
    g = source.u8(1, min(16, max(1, cols)))
    form, n = source.u8(0, 2), source.leb(1, 65536)
    scale = None
    if form == 2:
        words = shared.get(source.leb(), 1, g, n)
        scale = source.f16(1)
    else:
        words = numbers(source, form, n * g).reshape(n, g)
    across = -(-cols // g)
    w = words[read_indices(source, rows * across, n, shared)].reshape(rows, across * g)[:, :cols]
    return w if scale is None else w * scale


def latent(data, shape, dtype, shared):
    del dtype
    rows, cols = shape
    source = Bytes(data)
    form, wide = source.u8(0, 31), max(1, cols)
    number_form, decoded, factor_form, shared_decoder, shared_words = (form >> b & 1 for b in range(5))
    need(decoded or not shared_decoder, "a shared decoder without a decoder")
    need(not (shared_words and number_form), "shared codewords of a form")
    d, n = source.u8(1, min(16, wide)), source.leb(1, 65536)
    rank = source.leb(factor_form, min(rows, cols))
    if shared_words:
        words = shared.get(source.leb(), 1, d, n) * source.f16(1)
    else:
        words = numbers(source, number_form, n * d).reshape(n, d)
    g, e, scale, parts = d, d, None, None
    if decoded:
        g = source.u8(1, min(64, wide))
        e = source.u8(1, g)
        need(e % d == 0, f"{e} is no multiple of {d}")
        if shared_decoder:
            parts = shared.get(source.leb(), 2, g, e)
            scale = source.f16(1)
        else:
            parts = decoder(source, g, e)
    if rank:
        left = numbers(source, factor_form, rank * rows).reshape(rank, rows)
        right = numbers(source, factor_form, rank * cols).reshape(rank, cols)
    across = -(-cols // g)
    z = words[read_indices(source, rows * across * (e // d), n, shared)].reshape(rows * across, e)
    w = run_decoder(z, *parts) if parts else z
    w = w if scale is None else w * scale
    w = w.reshape(rows, across * g)[:, :cols]
    for k in range(rank):
        w = w + left[k][:, None] * right[k]
    return w


def run_decoder(z, S, A, a, B):
    """Patches of latents, in the order of 6.17."""
    t = np.repeat(a[None], len(z), axis=0)
    for k in range(z.shape[1]):
        t = t + z[:, k, None] * A[:, k]
    t = np.maximum(t, np.float32(0))
    w = np.zeros((len(z), len(S)), np.float32)
    for k in range(z.shape[1]):
        w = w + z[:, k, None] * S[:, k]
    for j in range(len(a)):
        w = w + t[:, j, None] * B[:, j]
    return w


def integers(source, widths, *, coded):
    """The block *integers(w)* of 6.13."""
    widths = np.asarray(widths, np.int64)
    values = np.zeros(len(widths), np.int64)
    if not coded:
        for p in range(int(widths.max(initial=0))):
            chosen = widths > p
            values[chosen] |= source.bits(1, int(chosen.sum())) << p
        return values
    tables = {}
    for width in sorted({*widths.tolist()} - {0}):
        low, m = source.leb(0, 256), source.leb(0, 256)
        if low == m == 0:
            sizes = [2 ** (14 - width)] * 2**width
            sizes[-1] -= 1
            tables[width] = Table(0, sizes)
        else:
            need(m >= 1 and low + m <= 2**width, f"a table of {m} symbols from {low} for {width} bits")
            tables[width] = Table(low, frequencies(source, m))
    chosen = widths > 0
    values[chosen] = stream(source.part().data, widths[chosen].tolist(), tables)
    need(((values >= 0) & (values < 1 << widths)).all(), "a value beyond its width")
    return values


def halves(source, count, *, coded):
    """The block *halves(n)* of 6.13, as binary32."""
    if not coded:
        return source.f16(count)
    values = exact(source.part().data, (1, count), "F16", None)[0]
    need(np.isfinite(values).all(), "an f16 is not finite")
    return values


def fixed(data, shape, dtype, shared):
    del dtype, shared
    rows, cols = shape
    source = Bytes(data)
    coded, width, k = source.u8(0, 1), source.u8(1, 8), source.leb(0, cols)
    columns = np.frombuffer(source.take(2 * k), "<u2").astype(np.int64)
    need((np.diff(columns) > 0).all() and (columns < cols).all(), "protected columns")
    scale = halves(source, rows, coded=coded)
    zero = integers(source, [width] * rows, coded=coded)
    protected = halves(source, rows * k, coded=coded).reshape(k, rows).T
    code = integers(source, [width] * (rows * (cols - k)), coded=coded).reshape(rows, cols - k)
    source.end()
    w = np.zeros(shape, np.float32)
    others = np.setdiff1d(np.arange(cols), columns)
    w[:, others] = (code - zero[:, None]).astype(np.float32) * scale[:, None]
    w[:, columns] = protected
    return w


def level(depth, code):
    m = min(code, 2**depth - 1 - code)
    size = np.float32(3 / math.sqrt(2) * math.log(2**depth / (2 * m + 1))) if depth else np.float32(0)
    return -size if depth and code == m else size


def companded(data, shape, dtype, shared):
    del dtype, shared
    rows, cols = shape
    source = Bytes(data)
    coded, sets = source.u8(0, 1), source.leb(1, min(256, max(1, rows)))
    four = source.part()
    of_row = integers(four, [(sets - 1).bit_length()] * rows, coded=coded)
    need((of_row < sets).all(), "a row of no set")
    depth = integers(four, [4] * (sets * cols), coded=coded)
    need((depth <= 8).all(), "a depth above 8")
    offset = halves(four, sets * cols, coded=coded).reshape(sets, cols)
    scale = np.zeros(sets * cols, np.float32)
    scale[depth > 0] = halves(four, int((depth > 0).sum()), coded=coded)
    four.end()
    depth, scale = depth.reshape(sets, cols)[of_row], scale.reshape(sets, cols)[of_row]
    code = integers(source, depth.reshape(-1), coded=coded).reshape(shape)
    source.end()
    levels = {(b, c): level(b, c) for b in range(9) for c in range(2**b)}
    w = np.zeros(shape, np.float32)
    for i, j in np.ndindex(*shape):
        w[i, j] = levels[int(depth[i, j]), int(code[i, j])]
    return w * scale + offset[of_row]
