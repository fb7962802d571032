"""Round columns along a trellis in triton programs, one for each matrix of a batch.

The Viterbi search runs down thousands of rows, one after the other; a GPU is fast only side by side. Rows are
therefore cut into segments. For each segment and each of the eight states it may begin in, the cost of ending in
every state is found, all side by side; combining segments one after the other then fixes the states at all borders,
and every segment's path is searched and traced back by itself. That is exact: minima over paths are taken in another
order, nothing is left out. What differs from the processor's result are sums of float32 in another order.

All pairs of 16 states and more would be too many: `bytecap.quantization.triton_search`.

Sums over weights are of integers (fixed point) where threads add in any order, so that the same device gives the same
bytes. Source of the segments: Fettweis & Meyr, "Parallel Viterbi algorithm implementation: breaking the
ACS-bottleneck", IEEE Trans. Communications 37(8), 1989.
"""

import triton
import triton.language as tl

from bytecap.quantization.triton_search import FAR, backward, forward, nearest_point, sum_of_parts


@triton.jit
def _nearest(u, subset: tl.constexpr):
    """Return the point of a subset nearest to `u`, and its squared distance."""
    z = subset + 4 * tl.floor((u - subset) * 0.25 + 0.5)
    return (u - z) * (u - z)


@triton.jit
def _step(u, w, c0, c1, c2, c3, c4, c5, c6, c7):
    """Return the costs of the eight states one row further, and a bit each for the predecessor it came from."""
    a, b, c, d = _nearest(u, 0) * w, _nearest(u, 1) * w, _nearest(u, 2) * w, _nearest(u, 3) * w
    e0, f0 = c0 + a, c4 + c
    e1, f1 = c0 + c, c4 + a
    e2, f2 = c1 + b, c5 + d
    e3, f3 = c1 + d, c5 + b
    e4, f4 = c2 + c, c6 + a
    e5, f5 = c2 + a, c6 + c
    e6, f6 = c3 + d, c7 + b
    e7, f7 = c3 + b, c7 + d
    came = (f0 < e0).to(tl.int32) + (f1 < e1) * 2 + (f2 < e2) * 4 + (f3 < e3) * 8
    came += (f4 < e4) * 16 + (f5 < e5) * 32 + (f6 < e6) * 64 + (f7 < e7) * 128
    return (
        tl.minimum(e0, f0), tl.minimum(e1, f1), tl.minimum(e2, f2), tl.minimum(e3, f3), tl.minimum(e4, f4),
        tl.minimum(e5, f5), tl.minimum(e6, f6), tl.minimum(e7, f7), came,
    )  # fmt: skip


@triton.jit
def _begin(state, at: tl.constexpr):
    """Return the cost of each state before the first row."""
    return tl.where(state == at, 0.0, FAR)


@triton.jit
def _ends(U, W, T, s, rows, length, SEGMENTS: tl.constexpr):
    """Compute the costs T (segments, 8, 8) of passing each segment from each state to each state."""
    seg, one = tl.arange(0, SEGMENTS), tl.arange(0, 8)
    c0, c1, c2, c3 = _begin(one[None, :], 0), _begin(one[None, :], 1), _begin(one[None, :], 2), _begin(one[None, :], 3)
    c4, c5, c6, c7 = _begin(one[None, :], 4), _begin(one[None, :], 5), _begin(one[None, :], 6), _begin(one[None, :], 7)
    far = tl.zeros([SEGMENTS, 8], tl.float32)
    c0, c1, c2, c3, c4, c5, c6, c7 = c0 + far, c1 + far, c2 + far, c3 + far, c4 + far, c5 + far, c6 + far, c7 + far
    for i in range(length):
        at = seg * length + i
        u = (tl.load(U + at, at < rows, 0.0) / s)[:, None]
        w = tl.load(W + at, at < rows, 0.0)[:, None]
        c0, c1, c2, c3, c4, c5, c6, c7, _ = _step(u, w, c0, c1, c2, c3, c4, c5, c6, c7)
    to = T + (seg * 64)[:, None] + (one * 8)[None, :]
    tl.store(to, c0)
    tl.store(to + 1, c1)
    tl.store(to + 2, c2)
    tl.store(to + 3, c3)
    tl.store(to + 4, c4)
    tl.store(to + 5, c5)
    tl.store(to + 6, c6)
    tl.store(to + 7, c7)


@triton.jit
def _borders(T, BACK, BORDER, SEGMENTS: tl.constexpr):
    """Find the states BORDER (segments + 1,) of the best path between the segments; it begins in state 0."""
    one = tl.arange(0, 8)
    best = _begin(one, 0)
    for k in range(SEGMENTS):
        total = best[:, None] + tl.load(T + k * 64 + (one * 8)[:, None] + one[None, :])
        tl.store(BACK + k * 8 + one, tl.argmin(total, 0))
        best = tl.min(total, 0)
        best = tl.sum(tl.where(one[:, None] == one[None, :], best[None, :], 0.0), 1)  # along the other axis
        best -= tl.min(best, 0)
    border = tl.argmin(best, 0)
    tl.store(BORDER + SEGMENTS, border)
    tl.debug_barrier()
    for k in range(SEGMENTS):
        border = tl.load(BACK + (SEGMENTS - 1 - k) * 8 + border)
        tl.store(BORDER + SEGMENTS - 1 - k, border)


@triton.jit
def _paths(U, W, BORDER, CAME, V, s, rows, length, SEGMENTS: tl.constexpr):
    """Find the points V (rows,) of every segment's best path between its borders."""
    seg = tl.arange(0, SEGMENTS)
    start = tl.load(BORDER + seg)
    c0, c1, c2, c3 = _begin(start, 0), _begin(start, 1), _begin(start, 2), _begin(start, 3)
    c4, c5, c6, c7 = _begin(start, 4), _begin(start, 5), _begin(start, 6), _begin(start, 7)
    for i in range(length):
        at = seg * length + i
        u = tl.load(U + at, at < rows, 0.0) / s
        w = tl.load(W + at, at < rows, 0.0)
        c0, c1, c2, c3, c4, c5, c6, c7, came = _step(u, w, c0, c1, c2, c3, c4, c5, c6, c7)
        tl.store(CAME + at, came.to(tl.uint8))
    tl.debug_barrier()
    t = tl.load(BORDER + seg + 1)
    for i in range(length):
        at = seg * length + (length - 1 - i)
        u = tl.load(U + at, at < rows, 0.0) / s
        came = tl.load(CAME + at).to(tl.int32)
        before = (t >> 1) + 4 * ((came >> t) & 1)
        d = (before & 1) + 2 * (((before >> 1) ^ (before >> 2) ^ t) & 1)
        v = d + 4 * tl.floor((u - d) * 0.25 + 0.5).to(tl.int32)
        tl.store(V + at, v, at < rows)
        t = before


@triton.jit
def _all_pairs(Y, W, T, BACK, BORDER, CAME, V, s, rows, length, SEGMENTS: tl.constexpr):
    """Find the points V (rows,) of the best path of eight states."""
    _ends(Y, W, T, s, rows, length, SEGMENTS)
    tl.debug_barrier()
    _borders(T, BACK, BORDER, SEGMENTS)
    tl.debug_barrier()
    _paths(Y, W, BORDER, CAME, V, s, rows, length, SEGMENTS)


@triton.jit
def _feed(
    FED, LOWER, WEIGHT, ERROR, WHITEN, Y, k, lo, hi, begin, end, cols, rows, scale, BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Write rows of column k with fed-back errors to Y (rows,); returns their summed squares in whitened steps."""
    j, within = tl.arange(0, BLOCK), k - lo
    later = (j > within) & (j < hi - lo)
    factor = tl.load(LOWER + (lo + j).to(tl.int64) * cols + k, later, 0.0)[:, None]
    own = tl.load(LOWER + k.to(tl.int64) * cols + k)
    done = ERROR + (lo + j).to(tl.int64)[:, None] * rows
    energy = tl.zeros([ROWS], tl.float32)
    for start in range(begin, end, ROWS):
        r = start + tl.arange(0, ROWS)
        inside = r < end
        fed = tl.sum(tl.load(done + r[None, :], later[:, None] & inside[None, :], 0.0) * factor, 0)
        fed += tl.load(FED + within * rows + r, inside, 0.0)
        y = fed / own + tl.load(WEIGHT + k.to(tl.int64) * rows + r, inside, 0.0)
        x = y / scale * tl.load(WHITEN + r, inside, 0.0)
        energy += x * x
        tl.store(Y + r, y, inside)
    return tl.sum(energy, 0)


@triton.jit
def _settle(
    Y, V, ROW_CLASS, ROW_WEIGHT, OFFSET, WEIGHT, ERROR, SYMBOLS, CENTRE, k, stored, column, fine, s, begin, end,
    rows, ROWS: tl.constexpr, CLASSES: tl.constexpr, CENTRES: tl.constexpr, OCTAVE: tl.constexpr, SAMPLE: tl.constexpr,
    FIXED: tl.constexpr, MEMORY: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    """Write symbols and errors of rows of column k; returns the summed, weighted squared error.

    Where it is `fine`, V holds points, or with more than eight states paths.
    """
    unit, more = tl.where(fine, 2.0, 1.0), tl.where(fine, OCTAVE, 0)
    row_of = k.to(tl.int64) * rows
    cost = tl.zeros([ROWS], tl.float32)
    for start in range(begin, end, ROWS):
        r = start + tl.arange(0, ROWS)
        inside = r < end
        y = tl.load(Y + r, inside, 0.0)
        u = y / s
        cls = tl.minimum(tl.maximum(column + tl.load(ROW_CLASS + r, inside, 0), 1), CLASSES - 1)
        cls = tl.minimum(cls + more, CLASSES - 1)
        size = tl.floor(tl.abs(u) + 0.5).to(tl.int32)
        v = tl.load(V + r, inside, 0)
        if MEMORY > 3:
            v = nearest_point(u, v, LOW, HIGH)
        v = tl.where(fine, v, tl.where(u > 0, size, -size))
        size = tl.abs(v)
        at = cls * CENTRES + tl.minimum(size, CENTRES - 1)
        value, sign = size - unit * tl.load(OFFSET + at), tl.where(v > 0, 1.0, -1.0)
        e = (u - sign * value) * s
        cost += tl.where(inside, e * e * tl.load(ROW_WEIGHT + r, inside, 0.0), 0.0)
        tl.store(ERROR + row_of + r, e - y + tl.load(WEIGHT + row_of + r, inside, 0.0), inside)
        tl.store(SYMBOLS + stored * rows + r, v, inside)
        if k % SAMPLE == 0:
            over = tl.floor((size - sign * u) / unit * FIXED + 0.5).to(tl.int64)
            tl.atomic_add(CENTRE + at, tl.full([ROWS], 1, tl.int64), inside, sem="relaxed")
            tl.atomic_add(CENTRE + CLASSES * CENTRES + at, over, inside, sem="relaxed")
    return tl.sum(cost, 0)


@triton.jit(do_not_specialize=["lo", "hi", "first", "length", "head", "parts"])
def round_columns(
    LOWER, FED, WEIGHT, ERROR, SCALE, ROW_CLASS, WHITEN, ROW_WEIGHT, OFFSET, SYMBOLS, ORDER, COLUMN_CLASS, COST,
    CENTRE, Y, T, BACK, BORDER, CAME, V, ENERGY, MET, lo, hi, cols, rows, first, length, head, parts,
    SEGMENTS: tl.constexpr, WARM: tl.constexpr, MEMORY: tl.constexpr, BITS: tl.constexpr, LEADS: tl.constexpr,
    LANE_LEADS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, MOST: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr, CENTRES: tl.constexpr,
    UNIT: tl.constexpr, OCTAVE: tl.constexpr, SAMPLE: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """Round columns lo..hi-1 of a matrix, last first; see `bytecap.quantization.trellis._round_columns`.

    Up to MOST programs, which have to run at the same time, share the segments of a matrix and meet in every column.
    """
    b, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    begin = tl.minimum(part * SEGMENTS * length, rows)
    end = tl.minimum(begin + SEGMENTS * length, rows)
    whole, lead, one = b * cols * rows, b * cols, b * rows
    Y, V, row_weight = Y + one, V + one, ROW_WEIGHT + one
    ENDS = BORDER + b * (parts * (4 * SEGMENTS + 2)) + part * 2 * SEGMENTS
    BORDER = BORDER + b * (parts * (4 * SEGMENTS + 2)) + parts * 2 * SEGMENTS
    ENERGY, MET = ENERGY + b * 2 * parts, MET + b
    if MEMORY == 3:
        T, BACK, CAME = T + b * SEGMENTS * 64, BACK + b * SEGMENTS * 8, CAME + b * SEGMENTS * length
    else:
        CAME = CAME + (b * parts + part) * (SEGMENTS << BITS) * (length // (MEMORY - 1)) * (MEMORY // 2)
    for back in range(hi - lo):
        k = hi - 1 - back
        scale = tl.load(SCALE + lead + k)
        energy = _feed(
            FED + b * (hi - lo) * rows, LOWER + b * cols * cols, WEIGHT + whole, ERROR + whole, WHITEN + one, Y, k,
            lo, hi, begin, end, cols, rows, scale, BLOCK, ROWS,
        )  # fmt: skip
        energy = sum_of_parts(ENERGY + k % 2 * parts, energy, part, MET, parts, MOST) / rows
        column = tl.floor(2 * tl.log2(tl.maximum(energy, 1e-12)) + 0.5).to(tl.int32) + UNIT
        column = tl.minimum(tl.maximum(column, 1), CLASSES - 1)
        stored = tl.load(ORDER + lead + k)
        tl.store(COLUMN_CLASS + lead + stored, column)
        fine = column >= first
        s = tl.where(fine, scale * 0.5, scale)
        tl.debug_barrier()
        if fine:
            if MEMORY == 3:
                _all_pairs(Y, row_weight, T, BACK, BORDER, CAME, V, s, rows, length, SEGMENTS)
            else:
                forward(
                    Y, row_weight, CAME, ENDS, s, rows, length, head, part, SEGMENTS, WARM, MEMORY, BITS, LEADS,
                    LANE_LEADS,
                )  # fmt: skip
                tl.debug_barrier()
                backward(
                    CAME, ENDS, BORDER, BORDER + 2 * parts * SEGMENTS, MET, V, rows, length, head, part, parts,
                    SEGMENTS, MEMORY, BITS, MOST,
                )  # fmt: skip
            tl.debug_barrier()
        cost = _settle(
            Y, V, ROW_CLASS + one, row_weight, OFFSET, WEIGHT + whole, ERROR + whole, SYMBOLS + whole,
            CENTRE + b * 2 * CLASSES * CENTRES, k, stored, column, fine, s, begin, end, rows, ROWS, CLASSES, CENTRES,
            OCTAVE, SAMPLE, FIXED, MEMORY, LOW, HIGH,
        )  # fmt: skip
        tl.store(COST + (b * parts + part) * cols + k, cost)
        tl.debug_barrier()
