"""Search paths of 16 states and more down the rows of a column, in triton programs.

A column is cut into segments. Every segment's search begins `WARM` rows early with all states alike, by when paths from
all of them have nearly merged, and segments are traced back from where the next one begins until all borders agree,
which takes two rounds: always one path, and the best one as far as paths do merge. Fewer segments lose less at borders
and walk fewer rows twice, so a segment's states are spread over several threads instead, 16 to each of them.

Some bits of a state are therefore the number of its lane, the others its place in registers. A row moves every bit of a
state one up, takes the highest away and adds one below; that needs no other lane as long as the highest bit is a
place's. When a lane's bit has become the highest it is exchanged with the lowest, in one shuffle for every second
state. Each lane bit comes there once in `memory - 1` rows, a period, which is written out; so which bits are where is
known when programs are compiled (`plan`).

Source of the segments: Fettweis & Meyr, "Parallel Viterbi algorithm implementation: breaking the ACS-bottleneck", IEEE
Trans. Communications 37(8), 1989.
"""

from functools import cache

import triton
import triton.language as tl

from bytecap.format.coders.trellis import MASKS
from bytecap.quantization.viterbi import masks_of

FAR = tl.constexpr(1e30)  # costs of a state that no path may begin in
_NEAREST = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding and taking it away leaves the nearest integer
PLACES = 16  # states of a thread


@cache
def plan(memory: int) -> dict[str, int]:
    """Return constants of the programs: how many lanes a segment takes, and what is where in every row of a period.

    BITS lane bits begin spread over the period. LEADS has, for each row and each of 8 pairs of places, two bits of the
    subset that bit 0 leads to from the lower half; LANE_LEADS what every lane bit adds to that. The subset's bits are
    parities, so the two are combined by exclusive or. LOW and HIGH are the format's masks of path bits.
    """
    bits, period = memory - PLACES.bit_length() + 1, memory - 1
    low, high = masks_of(memory)
    lead = [int(a) + 2 * int(b) for a, b in zip(low, high, strict=True)]
    leads = lane_leads = 0
    for row in range(period):
        lanes = [(k * period // bits + row) % period for k in range(bits)]
        places = [p for p in range(period) if p not in lanes]
        for pair in range(PLACES // 2):
            state = sum((pair >> i & 1) << p for i, p in enumerate(places))
            leads |= lead[state] << 2 * (row * PLACES // 2 + pair)
        for k, p in enumerate(lanes):
            lane_leads |= lead[1 << p] << 2 * (row * bits + k)
    below, above = MASKS[memory]
    return {"MEMORY": memory, "BITS": bits, "LEADS": leads, "LANE_LEADS": lane_leads, "LOW": below, "HIGH": above}


@triton.jit
def _exchanged(c, lane, k: tl.constexpr):
    """Return costs with lane bit `k` and the lowest bit of a place exchanged; it becomes the highest."""
    upper = ((lane >> k) & 1) == 1
    zeros, ones = (), ()
    for i in tl.static_range(8):
        got = tl.gather(tl.where(upper, c[2 * i], c[2 * i + 1]), lane ^ (1 << k), 1)
        zeros = zeros + (tl.where(upper, got, c[2 * i]),)
        ones = ones + (tl.where(upper, c[2 * i + 1], got),)
    return zeros + ones


@triton.jit
def _further(c, q, word, row: tl.constexpr, LEADS: tl.constexpr):
    """Return the costs of all states one row further, and `word` with a bit below for each, from where it came.

    The bit says that it came from the upper half. Places `j` and `j + 8` lead to `2j` and `2j + 1`, whose bits are
    `15 - j` and `7 - j`; `q` are the costs of the four subsets. The sign of a difference is a bit that goes into a word
    in one instruction.
    """
    new = ()
    even, odd = word, tl.zeros_like(word)
    for j in tl.static_range(8):
        zero, one = q[(LEADS >> (16 * row + 2 * j)) & 3], q[((LEADS >> (16 * row + 2 * j)) & 3) ^ 2]
        e, f, g, h = c[j] + zero, c[j + 8] + one, c[j] + one, c[j + 8] + zero
        even = (even << 1) | ((f - e).to(tl.uint32, bitcast=True) >> 31)
        odd = (odd << 1) | ((h - g).to(tl.uint32, bitcast=True) >> 31)
        new = new + (tl.minimum(e, f), tl.minimum(g, h))
    return new, (even << 8) | odd


@triton.jit
def _subset_costs(u, w, lane, row: tl.constexpr, BITS: tl.constexpr, LANE_LEADS: tl.constexpr):
    """Return the costs of the four subsets as a lane numbers them: squared distances of `u` to their points."""
    x = tl.zeros_like(lane)
    for k in tl.static_range(BITS):
        x ^= ((lane >> k) & 1) * ((LANE_LEADS >> (2 * (row * BITS + k))) & 3)
    near = u - 4 * ((u * 0.25 + _NEAREST) - _NEAREST)  # -2..2
    even, odd = tl.abs(near), 2 - tl.abs(tl.abs(near - 1) - 2)  # to points 0 and 1; to points 2 and 3 two less these
    swapped, mirrored = (x & 1) == 1, (x & 2) == 2
    a, b = tl.where(swapped, odd, even), tl.where(swapped, even, odd)
    a, b = tl.where(mirrored, 2 - a, a), tl.where(mirrored, 2 - b, b)
    return a * a * w, b * b * w, (2 - a) * (2 - a) * w, (2 - b) * (2 - b) * w


@triton.jit
def _begun(c, at_first, lane):
    """Return the costs in front of the first row, where this is: it begins in state 0."""
    new = (tl.where(at_first, tl.where(lane == 0, 0.0, FAR), c[0]),)
    for j in tl.static_range(1, 16):
        new = new + (tl.where(at_first, FAR, c[j]),)
    return new


@triton.jit
def _least(c):
    """Return the least cost of a lane, and the first place that has it."""
    least, place = c[0], tl.zeros_like(c[0]).to(tl.int32)
    for j in tl.static_range(1, 16):
        place = tl.where(c[j] < least, j, place)
        least = tl.minimum(least, c[j])
    return least, place


@triton.jit
def _best(c, lane, MEMORY: tl.constexpr, BITS: tl.constexpr):
    """Return the state (segments,) of least cost behind a period."""
    PERIOD: tl.constexpr = MEMORY - 1
    least, state = _least(c)
    for bit in tl.static_range(1, MEMORY):
        for k in tl.static_range(BITS):
            if (k * PERIOD // BITS + PERIOD - 1) % PERIOD + 1 == bit:
                state = (state & ((1 << bit) - 1)) | ((state >> bit) << (bit + 1)) | (((lane >> k) & 1) << bit)
    return tl.min(tl.where(least == tl.min(least, 1)[:, None], state, 1 << MEMORY), 1)


@triton.jit
def _lowered(c, by):
    """Return costs less what is taken off each of them."""
    new = ()
    for j in tl.static_range(16):
        new = new + (c[j] - by,)
    return new


@triton.jit
def _loaded(FROM, first, lane, rows, PERIOD: tl.constexpr, LANES: tl.constexpr):
    """Return values of a period's rows, one a lane, in as many tensors as that takes; 0 outside of the column."""
    found = ()
    for part in tl.static_range((PERIOD + LANES - 1) // LANES):
        row = first + part * LANES + lane
        there = (row >= 0) & (row < rows)
        found = found + (tl.load(FROM + row, there, 0.0, cache_modifier=".cg"),)  # some are another program's
    return found


@triton.jit
def _of_row(values, lane, row: tl.constexpr, LANES: tl.constexpr):
    """Return the value of one row of a period in every lane."""
    if LANES == 1:
        return values[row]
    return tl.gather(values[row // LANES], tl.zeros_like(lane) + row % LANES, 1)


@triton.jit
def forward(
    U, W, CAME, ENDS, s, rows, length, head, part, SEGMENTS: tl.constexpr, WARM: tl.constexpr,
    MEMORY: tl.constexpr, BITS: tl.constexpr, LEADS: tl.constexpr, LANE_LEADS: tl.constexpr,
):  # fmt: skip
    """Find predecessors CAME, a bit a state, and in ENDS (2, segments) the best states at two places of a segment.

    These are its end, and `head` rows behind its begin. CAME (length / period, words, segments, lanes) holds two rows a
    word. Rows behind the last cost nothing: whatever state they end in, they come from the best state of the last row.
    """
    PERIOD: tl.constexpr = MEMORY - 1
    LANES: tl.constexpr = 1 << BITS
    seg = tl.arange(0, SEGMENTS)[:, None] + tl.zeros([SEGMENTS, LANES], tl.int32)
    lane = tl.arange(0, LANES)[None, :] + tl.zeros([SEGMENTS, LANES], tl.int32)
    one, own = tl.arange(0, SEGMENTS), CAME + seg * LANES + lane
    first = (part * SEGMENTS + seg) * length - WARM
    c = (tl.zeros([SEGMENTS, LANES], tl.float32),)
    for _ in tl.static_range(15):
        c = c + (tl.zeros([SEGMENTS, LANES], tl.float32),)
    finer = 1.0 / s
    u, w = _loaded(U, first, lane, rows, PERIOD, LANES), _loaded(W, first, lane, rows, PERIOD, LANES)
    for i in range(0, length + WARM, PERIOD):
        next_u = _loaded(U, first + i + PERIOD, lane, rows, PERIOD, LANES)  # on their way meanwhile
        next_w = _loaded(W, first + i + PERIOD, lane, rows, PERIOD, LANES)
        if (i <= WARM) & ((WARM - i) % length == 0):  # some segment is at row 0, whose state is 0
            c = _begun(c, first + i == 0, lane)
        words, word = (), tl.zeros_like(lane).to(tl.uint32)
        for row in tl.static_range(PERIOD):
            for k in tl.static_range(BITS):
                if (k * PERIOD // BITS + row) % PERIOD == 0:
                    c = _exchanged(c, lane, k)
            own_u, own_w = _of_row(u, lane, row, LANES) * finer, _of_row(w, lane, row, LANES)
            q = _subset_costs(own_u, own_w, lane, row, BITS, LANE_LEADS)
            if row % 2 == 0:
                c, word = _further(c, q, tl.zeros_like(word), row, LEADS)
            else:
                c, word = _further(c, q, word, row, LEADS)
            if (row % 2 == 1) | (row == PERIOD - 1):
                words = words + (word,)
        if i >= WARM:
            to = own + (i - WARM) // PERIOD * ((PERIOD + 1) // 2 * SEGMENTS * LANES)
            for j in tl.static_range((PERIOD + 1) // 2):
                tl.store(to + j * SEGMENTS * LANES, words[j].to(tl.int32, bitcast=True))
            if i == WARM + head - PERIOD:
                tl.store(ENDS + SEGMENTS + one, _best(c, lane, MEMORY, BITS))
        if i % (4 * PERIOD) == 0:
            lowest, _place = _least(c)
            c = _lowered(c, tl.min(lowest, 1)[:, None])
        u, w = next_u, next_w
    tl.store(ENDS + one, _best(c, lane, MEMORY, BITS))


@triton.jit
def _came_from(word, t, row: tl.constexpr, PERIOD: tl.constexpr, BITS: tl.constexpr):
    """Return whether state `t` behind a row came from the upper half, given the words of all lanes."""
    place, lane = t, tl.zeros_like(t)
    for back in tl.static_range(PERIOD):
        for k in tl.static_range(BITS):
            if (k * PERIOD // BITS + row) % PERIOD + 1 == PERIOD - back:
                lane |= ((t >> (PERIOD - back)) & 1) << k
                place = (place & ((1 << (PERIOD - back)) - 1)) | ((place >> (PERIOD - back + 1)) << (PERIOD - back))
    if BITS > 0:
        word = tl.gather(word, lane, 1)
    return (word >> (15 - (place >> 1) - 8 * (place & 1))) & 1


@triton.jit
def _words(own, apart: tl.constexpr, WORDS: tl.constexpr):
    """Return a period's words of predecessors."""
    words = ()
    for j in tl.static_range(WORDS):
        words = words + (tl.load(own + j * apart),)
    return words


@triton.jit
def _with(values, value, lane, row: tl.constexpr, LANES: tl.constexpr, PARTS: tl.constexpr):
    """Return values of a period's rows, one a lane, with that of one row put in."""
    found = ()
    for part in tl.static_range(PARTS):
        if part == row // LANES:
            found = found + (tl.where(lane == row % LANES, value, values[part]),)
        else:
            found = found + (values[part],)
    return found


@triton.jit
def _traced(
    words, t, lane, PATH, at, rows, MEMORY: tl.constexpr, BITS: tl.constexpr, PARTS: tl.constexpr, KEPT: tl.constexpr
):  # fmt: skip
    """Return states `t` traced back through a period; writes the paths of its rows, of which `at` is the first."""
    PERIOD: tl.constexpr = MEMORY - 1
    LANES: tl.constexpr = 1 << BITS
    paths = ()
    for _ in tl.static_range(PARTS):
        paths = paths + (tl.zeros_like(lane),)
    for up in tl.static_range(PERIOD):
        word = words[(PERIOD - 1 - up) // 2]
        if ((PERIOD - 1 - up) % 2 == 0) & (up > 0):
            word = word >> 16
        t |= _came_from(word, t, PERIOD - 1 - up, PERIOD, BITS) << MEMORY
        paths = _with(paths, t, lane, PERIOD - 1 - up, LANES, PARTS)
        t >>= 1
    if KEPT:
        for part in tl.static_range(PARTS):
            row = part * LANES + lane
            tl.store(PATH + at + row, paths[part], (row < PERIOD) & (at + row < rows))
    return t


@triton.jit
def _back(
    CAME, PATH, end, rows, length, begin, part, SEGMENTS: tl.constexpr, MEMORY: tl.constexpr, BITS: tl.constexpr,
    KEPT: tl.constexpr,
):  # fmt: skip
    """Trace segments back from states `end` (segments,) behind row `begin`; returns the states that they begin in."""
    PERIOD: tl.constexpr = MEMORY - 1
    LANES: tl.constexpr = 1 << BITS
    PARTS: tl.constexpr = (PERIOD + LANES - 1) // LANES
    WORDS: tl.constexpr = (PERIOD + 1) // 2
    apart: tl.constexpr = SEGMENTS * LANES
    seg = tl.arange(0, SEGMENTS)[:, None] + tl.zeros([SEGMENTS, LANES], tl.int32)
    lane = tl.arange(0, LANES)[None, :] + tl.zeros([SEGMENTS, LANES], tl.int32)
    own, last = CAME + seg * LANES + lane, begin // PERIOD - 1
    t = end[:, None] + tl.zeros_like(lane)
    words = _words(own + last * (WORDS * apart), apart, WORDS)
    for back in range(last + 1):
        before = tl.maximum(last - back - 1, 0)
        following = _words(own + before * (WORDS * apart), apart, WORDS)  # on their way meanwhile
        at = (part * SEGMENTS + seg) * length + (last - back) * PERIOD
        t = _traced(words, t, lane, PATH, at, rows, MEMORY, BITS, PARTS, KEPT)
        words = following
    return tl.max(t, 1)


@triton.jit
def meet(COUNT, parts):
    """Wait until all programs of a matrix have come here; what each has written before, all can read behind it."""
    tl.debug_barrier()
    if parts > 1:
        now = tl.atomic_add(COUNT, 1, sem="acq_rel", scope="gpu") + 1
        until = (now + parts - 1) // parts * parts
        while now < until:
            now = tl.atomic_add(COUNT, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


@triton.jit
def sum_of_parts(FROM, own, part, COUNT, parts, MOST: tl.constexpr):
    """Return the sum of what every program of a matrix brings, in the same order in all; FROM has room for it."""
    if parts > 1:
        tl.store(FROM + part, own)
        meet(COUNT, parts)
        each = tl.arange(0, MOST)
        own = tl.sum(tl.load(FROM + each, each < parts, 0, cache_modifier=".cg"), 0)
    return own


@triton.jit
def backward(
    CAME, ENDS, BEGUN, CHANGED, COUNT, PATH, rows, length, head, part, parts, SEGMENTS: tl.constexpr,
    MEMORY: tl.constexpr, BITS: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Trace every segment back from where the next one begins in the end, to the paths PATH (rows,).

    A path is the bits up to a row's own, the newest in bit 0, one more of them than a state has. BEGUN (2, parts,
    segments) and CHANGED (2, parts) serve rounds in turn, so that nobody overwrites what another still has to read.
    """
    one, last = tl.arange(0, SEGMENTS), (rows - 1) // length
    seg, end = part * SEGMENTS + one, tl.load(ENDS + one)
    begun = _back(CAME, PATH, tl.load(ENDS + SEGMENTS + one), rows, length, head, part, SEGMENTS, MEMORY, BITS, False)
    tl.store(BEGUN + seg, begun)
    meet(COUNT, parts)
    turn, changes = 0, 1
    while changes > 0:
        following = tl.load(BEGUN + turn * parts * SEGMENTS + seg + 1, seg < last, 0, cache_modifier=".cg")
        following = tl.where(seg < last, following, end)
        again = _back(CAME, PATH, following, rows, length, length, part, SEGMENTS, MEMORY, BITS, True)
        turn = 1 - turn
        tl.store(BEGUN + turn * parts * SEGMENTS + seg, again)
        changes = tl.sum((again != begun).to(tl.int32), 0)
        changes = sum_of_parts(CHANGED + turn * parts, changes, part, COUNT, parts, MOST)
        tl.debug_barrier()
        begun = again


@triton.jit
def _parity(x):
    """Return the parity of up to 16 bits."""
    x ^= x >> 8
    x ^= x >> 4
    x ^= x >> 2
    return (x ^ (x >> 1)) & 1


@triton.jit
def nearest_point(u, path, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Return the point nearest to `u` in the subset that a path has come to."""
    d = _parity(path & LOW) + 2 * _parity(path & HIGH)
    return d + 4 * tl.floor((u - d) * 0.25 + 0.5).to(tl.int32)
