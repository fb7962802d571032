"""Decode matrices of the grid from their coded bytes in triton programs.

Three launches serve all matrices of a batch side by side. `tiles` finds for every weight which table its symbol is
coded with, from its classes and, along the trellis, from bits of its path: nothing there waits for anything else.
`streams` then runs down the entropy coder's steps, one program a matrix with the stream's lanes as a vector, and
leaves the symbols in the place of the tables' numbers. `tiles` looks up values last, multiplies them by their scales,
and writes them in the type and layout that is asked for. So what cannot run side by side, some 8192 steps of any
matrix, does nothing else.

Integers throughout but for the two multiplications by scales, each rounded by itself, and the format's rounding to
bfloat16 is done on bits: the processor's values in every bit. No bytes lead to a look-up outside its table.
"""

import triton
import triton.language as tl


@triton.jit
def _parity(x):
    """Return the parity of numbers of up to nine bits."""
    x = x ^ (x >> 8)
    x = x ^ (x >> 4)
    x = x ^ (x >> 2)
    return (x ^ (x >> 1)) & 1


@triton.jit
def _put(
    OUT, at, row, column, cell, rows, selector, row_scale, scale, ENTRIES, SCRATCH, FOUND, ESCAPES, room, live,
    transposed, WIDE: tl.constexpr, COLS: tl.constexpr, ENTRY: tl.constexpr,
):  # fmt: skip
    """Write the values of a row's piece, and note the places of its escapes."""
    symbol = tl.load(SCRATCH + at, live, 0).to(tl.int32)
    steps = tl.load(ENTRIES + 2 * (selector * ENTRY + symbol), live, 0)
    escaped = live & ((steps & 0x7FFFFFFF) > 0x7F800000)  # not a number
    place = tl.atomic_add(FOUND + tl.zeros([COLS], tl.int32), 1, escaped, sem="relaxed")
    tl.store(ESCAPES + place, cell * 4 + (selector & 3), escaped & (place < room))
    bits = ((steps.to(tl.float32, bitcast=True) * row_scale) * scale).to(tl.uint32, bitcast=True)
    to = tl.where(transposed, column.to(tl.int64) * rows + row, cell)
    if WIDE:
        tl.store(OUT.to(tl.pointer_type(tl.int32)) + to, bits.to(tl.int32, bitcast=True), live)
    else:
        half = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        tl.store(OUT.to(tl.pointer_type(tl.int16)) + to, half.to(tl.int16), live)


@triton.jit
def tiles(
    TILES, RUNS, OUTS, PATH, RANK, GROUPS, KINDS, ROW_SCALE, SCALE, ENTRIES, SCRATCH, FOUND, ESCAPES,
    PUT: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ABOVE: tl.constexpr,
    FIELDS: tl.constexpr, ENTRY: tl.constexpr,
):  # fmt: skip
    """Go through a tile of a matrix: find which table each symbol is coded with, or with `PUT` write values.

    Going down the rows of a column, the last bits of its path are shifted through a register, which fills up from
    `ABOVE` rows above the tile.
    """
    p = tl.program_id(0) * 3
    RUN = RUNS + tl.load(TILES + p).to(tl.int64) * FIELDS
    first = tl.load(TILES + p + 1)
    column = tl.load(TILES + p + 2) + tl.arange(0, COLS)
    matrix, start, stop = tl.load(RUN), tl.load(RUN + 1).to(tl.int32), tl.load(RUN + 2).to(tl.int32)
    rows, cols = tl.load(RUN + 3), tl.load(RUN + 4).to(tl.int32)
    width, path = tl.load(RUN + 5), tl.load(RUN + 6)
    groups, columns, kinds, scratch = tl.load(RUN + 7), tl.load(RUN + 8), tl.load(RUN + 9), tl.load(RUN + 10)
    low, high = tl.load(RUN + 11).to(tl.int32), tl.load(RUN + 12).to(tl.int32)
    transposed, escapes, room = tl.load(RUN + 13) != 0, tl.load(RUN + 14), tl.load(RUN + 15).to(tl.int32)
    inside = column < cols
    rank = tl.load(RANK + columns + column, inside, -1)
    scale = tl.load(SCALE + columns + column, inside, 0.0)
    OUT = tl.load(OUTS + matrix)
    history = tl.zeros([COLS], tl.int32)
    last = tl.minimum(first + ROWS, stop)
    for i in range(ABOVE + last - first):
        row = first - ABOVE + i
        own = tl.where(row >= start, rank, -1)
        coded = own >= 0
        bit = path + (row - start).to(tl.int64) * width + own
        byte = tl.load(PATH + (bit >> 3), coded, 0).to(tl.int32)
        history = (history << 1) | tl.where(coded, (byte >> (bit & 7).to(tl.int32)) & 1, 0)
        if i >= ABOVE:
            subset = tl.where(rank >= 0, _parity(history & 511 & low) + 2 * _parity(history & 511 & high), 0)
            kind = tl.load(KINDS + kinds + row).to(tl.int64)
            group = tl.load(GROUPS + groups + kind * cols + column, inside, 0).to(tl.int32)
            selector = 4 * group + subset
            cell = row.to(tl.int64) * cols + column
            if PUT:
                _put(
                    OUT, scratch + cell, row, column, cell, rows, selector, tl.load(ROW_SCALE + kinds + row), scale,
                    ENTRIES, SCRATCH, FOUND + matrix, ESCAPES + escapes, room, inside, transposed, WIDE, COLS, ENTRY,
                )  # fmt: skip
            else:
                tl.store(SCRATCH + scratch + cell, selector.to(tl.int16), inside)


@triton.jit
def _advance(x, used, selector, at, live, WORDS, count, SCRATCH, SYMBOLS, ENTRIES, SLOTS: tl.constexpr,
             ENTRY: tl.constexpr):  # fmt: skip
    """Take a symbol out of every lane's state; lanes that need one take the next words in their order."""
    group, subset = selector >> 2, selector & 3
    table = 3 * group + subset - (subset & (subset << 1) & 2)  # subset 3 shares the slots of 1, its mirror image
    slot = x & (SLOTS - 1)
    symbol = tl.load(SYMBOLS + table * SLOTS + slot.to(tl.int32), live, 0).to(tl.int32)
    model = tl.load(ENTRIES + 2 * (selector * ENTRY + symbol) + 1, live, 0).to(tl.uint32, bitcast=True)
    tl.store(SCRATCH + at, symbol.to(tl.int16), live)
    y = (x // SLOTS) * (model >> 16) + (slot - (model & 0xFFFF))
    need = live & (y < 65536)
    taken = tl.cumsum(need.to(tl.int32), 0)
    place = used + taken - 1
    word = tl.load(WORDS + place, need & (place < count), 0).to(tl.uint32) & 0xFFFF
    y = tl.where(need, (y << 16) | word, y)
    return tl.where(live, y, x), used + tl.sum(need.to(tl.int32), 0)


@triton.jit
def streams(
    MATRICES, STATES, WORDS, SCRATCH, SYMBOLS, ENTRIES, ENDS, FIELDS: tl.constexpr, LANES: tl.constexpr,
    SLOTS: tl.constexpr, ENTRY: tl.constexpr,
):  # fmt: skip
    """Decode one matrix's stream: SCRATCH holds what its symbols are coded with, and gets the symbols.

    ENDS gets the number of words that were taken, and of lanes that do not end in their initial state. States stay in
    registers where a vector holds all lanes, else lanes go through it piece by piece.
    """
    m = tl.program_id(0).to(tl.int64)
    MATRIX = MATRICES + m * FIELDS
    weights, width = tl.load(MATRIX).to(tl.int32), tl.load(MATRIX + 1).to(tl.int32)
    steps, count = tl.load(MATRIX + 2).to(tl.int32), tl.load(MATRIX + 3).to(tl.int32)
    WORDS, STATES, SCRATCH = WORDS + tl.load(MATRIX + 4), STATES + tl.load(MATRIX + 5), SCRATCH + tl.load(MATRIX + 6)
    lane = tl.arange(0, LANES)
    used = count * 0
    wrong = count * 0
    if width <= LANES:
        x = tl.load(STATES + lane, lane < width, 65536).to(tl.uint32, bitcast=True)
        following = tl.load(SCRATCH + lane, (lane < width) & (lane < weights), 0).to(tl.int32)
        for t in range(steps):
            at = t * width + lane
            selector = following  # loaded a step ahead: it waits for no state
            live = (lane < width) & (at < weights)
            following = tl.load(SCRATCH + at + width, (lane < width) & (at < weights - width), 0).to(tl.int32)
            x, used = _advance(
                x, used, selector, at, live, WORDS, count, SCRATCH, SYMBOLS, ENTRIES, SLOTS, ENTRY
            )  # fmt: skip
        wrong += tl.sum(((lane < width) & (x != 65536)).to(tl.int32), 0)
    else:
        for t in range(steps):
            for begun in range(0, width, LANES):
                own = begun + lane
                at = t * width + own
                live = (own < width) & (at < weights)
                x = tl.load(STATES + own, own < width, 65536).to(tl.uint32, bitcast=True)
                selector = tl.load(SCRATCH + at, live, 0).to(tl.int32)
                x, used = _advance(
                    x, used, selector, at, live, WORDS, count, SCRATCH, SYMBOLS, ENTRIES, SLOTS, ENTRY
                )  # fmt: skip
                tl.store(STATES + own, x.to(tl.int32, bitcast=True), own < width)
            tl.debug_barrier()
        for begun in range(0, width, LANES):
            own = begun + lane
            x = tl.load(STATES + own, own < width, 65536)
            wrong += tl.sum(((own < width) & (x != 65536)).to(tl.int32), 0)
    tl.store(ENDS + 2 * m, used)
    tl.store(ENDS + 2 * m + 1, wrong)
