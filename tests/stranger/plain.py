"""Coders without layers: grids, vector, exact, packed, bands, binary (6.1 to 6.4, 6.15, 6.18, 6.19, 6.21)."""

import numpy as np

from stranger.basics import Bytes, Table, frequencies, need, stream, unbrotli, unzip

ROOTS = np.array([0x3F800000, 0x3F9837F0, 0x3FB504F3, 0x3FD744FD], "<u4").view("<f4")
TYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U8": "u1", "BOOL": "u1",
}  # fmt: skip
LEADS_TO = ((0, 1, 2, 3, 2, 3, 0, 1), (2, 3, 0, 1, 0, 1, 2, 3))  # subset by bit and state, of 6.15
LOW, HIGH = {4: 2, 5: 10, 6: 34, 7: 94, 8: 222}, {4: 25, 5: 49, 6: 87, 7: 243, 8: 493}  # 6.21


def power(k):
    """`q(k)`."""
    return np.ldexp(ROOTS[k % 4], k // 4).astype(np.float32)


def read_head(source, rows, trellis):
    """Groups, c, (base, class) of the four side arrays, first, memory, and the side stream (6.1, 6.15, 6.21)."""
    groups = source.u8(1, min(4, max(1, rows)))
    c = source.f32()
    need(c > 0, f"c is {c}")
    pairs = [(source.i8(), source.u8(0, 63)) for _ in range(4)]
    first = source.u8(1, 64) if trellis else 64
    memory = source.u8(4, 8) if trellis == "long" else 3
    side = source.part().data
    return groups, c, pairs, first, memory, side


def grid(data, shape, dtype, shared, *, trellis=""):
    del dtype
    rows, cols = shape
    source = Bytes(data)
    groups, c, pairs, first, memory, side = read_head(source, rows, trellis)
    sizes = (groups * cols, groups * cols, rows, rows)
    classes = [k for size, (_, k) in zip(sizes, pairs, strict=True) for _ in range(size if k else 0)]
    symbols = iter(stream(side, classes, shared.tables))
    arrays = [[base + (next(symbols) if k else 0) for _ in range(n)] for n, (base, k) in zip(sizes, pairs, strict=True)]
    for values, bound in zip(arrays, (500, 1000, 500, 1000), strict=True):
        need(all(abs(v) <= bound for v in values), "a step or spread is out of range")
    column_step, column_spread = (np.array(a, np.int64).reshape(groups, cols) for a in arrays[:2])
    row_step, row_spread = (np.array(a, np.int64) for a in arrays[2:])
    more = rows % groups
    run = np.repeat(np.arange(groups), [rows // groups + (g < more) for g in range(groups)])  # of every row
    own = column_spread - column_step + 20
    k = np.clip(own[run] + (row_spread - row_step)[:, None], 1, 63)
    dependent = (own >= first)[run] & bool(trellis)
    subset = paths(source.part(), dependent, run, memory) if trellis else np.zeros((rows, cols), np.int64)
    k = np.where(dependent, np.minimum(k + 4, 63), k)
    tables, named = dict(shared.tables), k.copy()
    for kind in sorted(set(k[dependent].tolist())):
        for d in range(3):
            if kind in tables:
                tables[64 * (d + 1) + kind] = restricted(tables[kind], d)
        here = dependent & (k == kind)
        named[here] = 64 * (np.where(subset[here] == 3, 1, subset[here]) + 1) + kind
    z = np.array(stream(source.rest(), named.reshape(-1).tolist(), tables), np.int64).reshape(rows, cols)
    need(not trellis or not z.size or np.abs(z).max() <= 1 << 24, "a symbol above 2^24")
    z = np.where(dependent, np.where(subset == 3, -4 * z - 1, 4 * z + subset), z)
    return points(z, k, dependent, shared, c, row_step, column_step[run])


def points(z, k, dependent, shared, c, row_step, column_step):
    """Reconstruction of 6.1 and 6.15."""
    w = np.zeros(z.shape, np.float32)
    for i, j in np.ndindex(*z.shape):
        size = abs(int(z[i, j]))
        a = np.float32(size)
        if dependent[i, j]:
            a = a * np.float32(0.5)
        v = a - shared.offset(int(k[i, j]), min(size, 16))
        v = -v if z[i, j] < 0 else v
        v = v * power(int(row_step[i]))
        w[i, j] = v * (c * power(int(column_step[i, j])))
    return w


def leads_to(state, bit, memory):
    if memory == 3:
        return LEADS_TO[bit][state]
    low, high = (f"{(2 * state + bit) & mask[memory]:b}".count("1") % 2 for mask in (LOW, HIGH))
    return low + 2 * high


def paths(source, dependent, run, memory):
    """Subset of every dependent weight (6.15, 6.21)."""
    bits = iter(source.bits(1, int(dependent.sum())).tolist())
    source.end()
    rows, cols = dependent.shape
    subset, state = np.zeros((rows, cols), np.int64), [0] * cols
    for i in range(rows):
        if i and run[i] != run[i - 1]:
            state = [0] * cols
        for j in np.flatnonzero(dependent[i]):
            bit = next(bits)
            subset[i, j] = leads_to(state[j], bit, memory)
            state[j] = (2 * state[j] + bit) % 2**memory
    return subset


def restricted(table, e):
    half = -table.low
    lowest, highest = -((half + e) // 4), (half - e) // 4
    weights = [table.frequencies[4 * m + e + half] for m in range(lowest, highest + 1)] + [table.escape]
    sizes = [weight * 2**14 // sum(weights) for weight in weights]
    sizes[sizes.index(max(sizes))] += 2**14 - sum(sizes)
    return Table(lowest, sizes[:-1], sizes[-1])


def trellis(data, shape, dtype, shared):
    return grid(data, shape, dtype, shared, trellis="short")


def long_trellis(data, shape, dtype, shared):
    return grid(data, shape, dtype, shared, trellis="long")


def vector(data, shape, dtype, shared):
    del dtype
    source = Bytes(data)
    centre, step, k = source.f32(), source.f32(), source.u8(0, 63)
    count = shape[0] * shape[1]
    if not k:
        source.end()
    z = stream(source.rest(), [k] * count, shared.tables) if k else [0] * count
    product = step * np.array(z, np.int64).astype(np.float32)
    return (centre + product).reshape(shape)


def exact(data, shape, dtype, shared):
    del shared
    need(dtype in TYPES, f"no values of the type {dtype!r}")
    count, source = shape[0] * shape[1], Bytes(data)
    width = np.dtype(TYPES[dtype]).itemsize
    if not count:
        source.end()
    found = np.zeros((count, width), np.uint8)
    for plane in reversed(range(width if count else 0)):
        found[:, plane] = exact_plane(source, count)
    source.end()
    values = found.reshape(-1).view(TYPES[dtype])
    if dtype == "BF16":
        values = (values.astype("<u4") << 16).view("<f4")
    elif dtype == "F16":
        values = values.astype("<f4")
    elif dtype == "BOOL":
        need((values <= 1).all(), "a BOOL that is neither 0 nor 1")
        values = values.astype(bool)
    return values.reshape(shape)


def exact_plane(source, count):
    if not source.u8(0, 1):
        return np.frombuffer(source.take(count), np.uint8)
    low = source.leb(0, 255)
    table = Table(low, frequencies(source, source.leb(1, 256 - low)))
    symbols = stream(source.part().data, [1] * count, {1: table})
    need(all(0 <= s <= 255 for s in symbols), "a byte out of range")
    return np.array(symbols, np.uint8)


def packed(data, shape, dtype, shared):
    del dtype, shared
    rows, cols = shape
    source = Bytes(data)
    unpack = (unzip, unbrotli)[source.u8(0, 1)]
    width = source.u8(1, 2)
    scales = Bytes(unpack(source.part().data, 2 * rows)).f16(rows)
    codes = np.frombuffer(unpack(source.rest(), width * rows * cols), np.int8).astype(np.int64)
    codes = codes.reshape(width, cols, rows)
    code = codes[0] + 256 * codes[1] if width == 2 else codes[0]
    return code.T.astype(np.float32) * scales[:, None]


def bands(data, shape, dtype, shared):
    del dtype, shared
    rows, cols = shape
    source = Bytes(data)
    count = source.u8(1, 63)
    scales = Bytes(unbrotli(source.part().data, 2 * rows)).f16(rows)
    band = source.bits((count - 1).bit_length(), cols).tolist()
    need(all(b < count for b in band), "a column of no band")
    tables = {}
    for b in range(count):
        half = source.leb(0, 1023)
        tables[b + 1] = Table(-half, frequencies(source, 2 * half + 1))
    codes = stream(source.rest(), [b + 1 for b in band] * rows, tables)
    return np.array(codes, np.int64).reshape(shape).astype(np.float32) * scales[:, None]


def binary(data, shape, dtype, shared):
    del dtype, shared
    rows, cols = shape
    source = Bytes(data)
    levels, means, packing = source.u8(2, 3), source.u8(0, 2), source.u8(0, 1)
    scale = source.f16(rows)
    mean = source.f16((0, 1, rows)[means])
    count = rows * cols
    if packing:
        table = Table(0, frequencies(source, levels))
        codes = stream(source.rest(), [1] * count, {1: table})
        need(all(0 <= c < levels for c in codes), "a code out of range")
    elif levels == 2:
        codes = source.bits(1, count).tolist()
    else:
        trits = np.frombuffer(source.take(-(-count // 5)), np.uint8).astype(np.int64)
        need((trits <= 242).all(), "a byte above 242")
        flat = (trits[:, None] // [1, 3, 9, 27, 81] % 3).reshape(-1)
        need(not flat[count:].any(), "spare trits are not 0")
        codes = flat[:count].tolist()
    source.end()
    c = np.array(codes, np.int64).reshape(shape)
    w = (2 * c - 1 if levels == 2 else c - 1).astype(np.float32) * scale[:, None]
    return w + (mean if means == 1 else mean[:, None]) if means else w
