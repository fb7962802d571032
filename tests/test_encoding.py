"""Matrices encoded straight from their integers: the bytes that numpy writes, at every width and in every corner."""

from dataclasses import replace

import numpy as np
import pytest

import golden_parts
from bytecap.errors import CorruptError
from bytecap.format.coders import Shared, coder, encoding, run
from bytecap.format.coders.grid import CODER as GRID
from bytecap.format.coders.grid import GridCode
from bytecap.format.coders.long_trellis import CODER as LONG_TRELLIS
from bytecap.format.coders.trellis import CODER as TRELLIS
from bytecap.format.coders.trellis import dependent, subsets
from bytecap.format.entropy import encode_kernels, jit
from bytecap.format.entropy.frequencies import TOTAL, Table, Tables

pytestmark = pytest.mark.coverage
LOOPS = (
    "widen", "load", "symbols_of", "looked_up", "entries", "escaped", "put", "take", "path_bits", "pack",
)  # fmt: skip
SHAPES = [(3, 1), (40, 9), (5, 131), (70, 300)]


def code_of(shape, *, seed=1, groups=1, first=18, memory=3, dtype=np.int16, far=(0, 3000, -3000)):
    """A code of arbitrary paths, some of whose symbols no table holds; `first` 64 is one for `grid`."""
    rows, cols = shape
    rng = np.random.default_rng(seed)
    around = lambda spread, *shape: rng.integers(-spread, spread + 1, shape)  # noqa: E731
    column_class = 18 + around(16, groups, cols)
    mask = dependent(column_class, first, rows)
    bits = rng.integers(0, 2, shape, np.uint8) * mask
    symbols = np.rint(rng.normal(size=shape) * 5).astype(int)
    symbols.reshape(-1)[:: max(1, symbols.size // 7)][: len(far)] = far
    points = np.where(mask, 4 * symbols + subsets(bits, groups, memory), symbols).astype(dtype)
    return GridCode(0.5, points, around(3, groups, cols), column_class, around(2, rows), around(3, rows), first, memory)


def coder_of(code):
    return GRID if code.first == 64 else TRELLIS if code.memory == 3 else LONG_TRELLIS


def both(code, shared=golden_parts.SHARED):
    """The section, the same from machine code and from numpy."""
    found, straight = [], []
    served = encoding.served
    for engine in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jit, "worth", lambda _, engine=engine: engine)
            patch.setattr(encoding, "served", lambda c: straight.append(served(c)) or straight[-1])
            found.append(coder_of(code).encode(code, shared).data)
    assert straight == [True, False]
    assert found[0] == found[1]
    return found[0]


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("first", [1, 18, 64])
@pytest.mark.parametrize("memory", [3, 7, 8])
def test_sections_have_numpys_bytes(memory, first, groups):
    for seed, shape in enumerate(SHAPES):
        both(code_of(shape, seed=seed, groups=groups, first=first, memory=memory))


def test_groups_of_rows_without_dependent_columns():
    """Their rows add nothing to the path, which goes on behind them."""
    code = code_of((30, 11), groups=3, first=1)
    classes = np.where(np.arange(3)[:, None] == 1, np.minimum(code.column_class, 17), np.maximum(code.column_class, 18))
    assert both(replace(code, column_class=classes, first=18))


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32])
@pytest.mark.parametrize("first", [1, 18, 64])
def test_integers_of_every_width_come_back(dtype, first):
    far = {np.int8: (30, -31), np.int16: (8000, -8000), np.int32: (2**22, -(2**22))}[dtype]
    code = code_of((50, 40), first=first, dtype=dtype, far=far)
    data = both(code)
    wide = both(replace(code, symbols=code.symbols.astype(np.int32)))
    assert data == wide
    assert both(replace(code, symbols=np.asfortranarray(code.symbols))) == data
    read = run([coder(coder_of(code).tag).decode(data, (50, 40), "F32", golden_parts.SHARED)])[0]
    assert np.isfinite(read).all()


@pytest.mark.parametrize("dtype", [np.int16, np.int32])
def test_the_ends_of_a_type_are_escaped(dtype):
    """Differences to a table's lowest symbol wrap around, and stay outside of it."""
    ends = np.iinfo(dtype)
    code = code_of((6, 5), first=64, dtype=dtype, far=(ends.max, ends.min + 1, ends.max - 1, ends.min))
    both(code)


@pytest.mark.slow
def test_many_lanes_and_blocks_of_rows(monkeypatch):
    """Lanes wrap inside rows, and rows of several blocks and groups are one stream and one path."""
    shape = (300, 90)
    codes = [code_of(shape, first=first, memory=8, groups=groups) for first in (1, 18) for groups in (1, 3)]
    for block in (1, 7 * 90, 2**22):
        monkeypatch.setattr(encoding, "_BLOCK", block)
        assert all(both(code) for code in codes)
    for lanes in (16, 17, 131):
        monkeypatch.setattr("bytecap.format.entropy.rans.LANE_SYMBOLS", 300 * 90 // lanes + 1)
        assert both(codes[0])


def test_loops_are_right_as_python_too(monkeypatch):
    for name in LOOPS:
        own = {"symbols_of": "_symbols", "path_bits": "_bits"}.get(name, f"_{name}")
        monkeypatch.setattr(encode_kernels, name, getattr(encode_kernels, own))
    monkeypatch.setattr(jit, "encoder", lambda name: getattr(encode_kernels, f"_{name}"))
    monkeypatch.setattr("bytecap.format.entropy.rans.LANE_SYMBOLS", 16)
    with np.errstate(over="ignore"):  # numpy's scalars warn where machine code wraps
        for dtype in (np.int8, np.int16, np.int32):
            for first in (1, 18, 64):
                both(code_of((12, 21), first=first, memory=5, dtype=dtype, far=(0, 30, -31)))


def test_frequencies_of_every_size_divide_exactly():
    """Every quotient is that of a division, for every frequency that a table may have and at the ends of a state."""
    freq = np.arange(1, TOTAL + 1)
    tables = Tables({1: Table(0, np.array([TOTAL - 1, 1]))})
    tables.__dict__.update(freq=freq, cum=np.zeros_like(freq))
    model = tables.coding[1]
    reciprocal, shift = model & np.uint64(2**32 - 1), model >> np.uint64(60)
    for near in (0, 1, 2**16, 2**31, 2**32 - 1):
        for x in (near // freq * freq, near // freq * freq + freq - 1, np.full(TOTAL, near)):
            state = np.minimum(x, 2**32 - 1).astype(np.uint64)
            quotient = ((state * reciprocal) >> np.uint64(32)) + state >> shift
            assert (quotient == state // freq.astype(np.uint64)).all()


def test_everything_is_escaped():
    """As many escapes as there are weights."""
    escaping = Shared(Tables({k: Table(0, np.array([1, TOTAL - 1])) for k in range(1, 64)}))
    code = code_of((9, 9), first=64)
    both(replace(code, symbols=code.symbols + np.int16(70)), escaping)


def test_a_class_without_a_table_is_refused(monkeypatch):
    code = code_of((4, 6), first=64)
    fewer = Shared(Tables({1: golden_parts.SHARED.tables.table[1]}))
    sound = Tables({k: t for k, t in golden_parts.SHARED.tables.table.items() if k < 63})
    plain = replace(code, column_class=np.full((1, 6), 63), row_class=np.zeros(4, int))
    for engine in (True, False):
        monkeypatch.setattr(jit, "worth", lambda _, engine=engine: engine)
        with pytest.raises(CorruptError, match="no table"):
            GRID.encode(code, fewer)
        with pytest.raises(CorruptError, match="class has no table"):
            GRID.encode(plain, Shared(sound))


def test_what_numpy_serves(monkeypatch):
    monkeypatch.setattr(jit, "worth", lambda _: True)
    symbols = code_of((4, 6)).symbols
    assert encoding.served(symbols)
    assert not encoding.served(symbols.astype(np.int64))
    assert not encoding.served(symbols[:0])
    monkeypatch.setattr(jit, "worth", lambda _: False)
    assert not encoding.served(symbols)


@pytest.mark.parametrize("first", [18, 64])
def test_symbols_are_asked_for_once(first, monkeypatch):
    """They may have to be fetched from a GPU, where they take as long as to be encoded."""
    monkeypatch.setattr(jit, "worth", lambda _: True)
    code, asked = code_of((4, 6), first=first), []

    class There(GridCode):
        def __init__(self, **fields):
            for name, value in fields.items():
                object.__setattr__(self, name, value)

        @property
        def symbols(self):
            asked.append(1)
            return code.symbols

    there = There(**{n: v for n, v in vars(code).items() if n != "symbols"})
    assert coder_of(there).encode(there, golden_parts.SHARED).data == both(code)
    assert len(asked) == 1
