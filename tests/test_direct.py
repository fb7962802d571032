"""Matrices decoded straight to values: the bits of the numpy decoder, its refusals, and memory."""

import subprocess
import sys
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from llvmlite import binding, ir

import golden_parts
from bytecap.errors import CorruptError
from bytecap.format import container, decoder
from bytecap.format.coders import Shared, coder, direct, grid, run, trellis
from bytecap.format.coders.grid import CODER as GRID
from bytecap.format.coders.grid import GridCode
from bytecap.format.coders.trellis import CODER as TRELLIS
from bytecap.format.entropy import jit, kernels, simd
from bytecap.format.entropy.frequencies import TOTAL, Table, Tables

pytestmark = pytest.mark.coverage
STAGES = ("subsets", "slots", "entries", "tally", "advance", "escapes", "scale")


def both(tag, data, shape, shared=golden_parts.SHARED):
    """Bytes that machine code and numpy decode, and whether the first went straight to values."""
    found, straight = [], []
    served = direct.Direct.served
    for engine in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jit, "worth", lambda _, engine=engine: engine)
            patch.setattr(direct.Direct, "served", lambda self: straight.append(served(self)) or straight[-1])
            found.append(run([coder(tag).decode(data, shape, "F32", shared)])[0].tobytes())
    assert found[0] == found[1]
    return straight[0]


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("first", [1, 18, 64])
@pytest.mark.parametrize("memory", [3, 4, 7, 8])
def test_trellises_have_numpys_bits(memory, first, groups):
    for seed, shape in enumerate([(3, 1), (40, 9), (5, 131), (70, 300)]):
        data = golden_parts.trellis(shape, seed=seed, groups=groups, first=first, memory=memory)
        assert both(9 if memory == 3 else 15, data, shape)


def test_no_table_is_split_where_no_column_is_dependent(monkeypatch):
    def split(_):
        raise AssertionError("split")

    grid_section, path_section = golden_parts.grid((5, 7)), golden_parts.trellis((5, 7), first=1)
    shared = Shared(Tables(dict(golden_parts.SHARED.tables.table)), golden_parts.SHARED.offset)  # nothing made yet
    monkeypatch.setattr(Tables, "split", property(split))
    assert both(1, grid_section, (5, 7), shared)
    with pytest.raises(AssertionError, match="split"):
        both(9, path_section, (5, 7), shared)


@pytest.mark.slow
def test_many_lanes_and_blocks_of_rows(monkeypatch):
    """Lanes wrap inside rows, and paths go on from block to block."""
    shape = (300, 90)  # four lanes
    data = golden_parts.trellis(shape, first=1, memory=8, groups=3)
    mixed = golden_parts.trellis(shape, memory=8, groups=3)
    for block in (1, 5 * 90, 2**20):
        monkeypatch.setattr(direct, "_BLOCK", block)
        assert both(15, data, shape)
        assert both(15, mixed, shape)
    for lanes in (16, 17, 33):
        monkeypatch.setattr("bytecap.format.entropy.rans.LANE_SYMBOLS", 300 * 90 // lanes + 1)
        assert both(15, golden_parts.trellis(shape, first=1, memory=8), shape)


class Seen(decoder.Ideal):
    """Ideal code length by symbols, as any observer sees them that does not count."""

    counted = None

    def __call__(self, stream, symbols):
        by = decoder.Ideal()
        by(stream, symbols)
        self._excess += by._excess


@pytest.mark.parametrize("plain", [False, True])
def test_the_ideal_code_length_is_counted_on_the_way(plain, monkeypatch):
    """A reader that counts has the same length as one that sees symbols, escapes included, and the same values."""
    monkeypatch.setattr(jit, "worth", lambda _: True)
    if plain:
        for name in STAGES:
            monkeypatch.setattr(kernels, name, getattr(kernels, f"_{name}"))
        monkeypatch.setattr(jit, "kernel", lambda name: getattr(kernels, f"_{name}"))
    straight = []
    served = direct.Direct.served
    monkeypatch.setattr(direct.Direct, "served", lambda self: straight.append(served(self)) or straight[-1])
    for memory, first, groups in ((3, 18, 1), (7, 1, 3)):
        data, tag = golden_parts.trellis((20, 30), first=first, memory=memory, groups=groups), 9 if memory == 3 else 15
        observers = decoder.Ideal(), Seen()
        with np.errstate(over="ignore"):
            values = [run([coder(tag).decode(data, (20, 30), "F32", golden_parts.SHARED)], o)[0] for o in observers]
        assert values[0].tobytes() == values[1].tobytes()
        assert sum(observers[0]._excess) == pytest.approx(sum(observers[1]._excess), abs=1e-6)
        assert len(observers[0]._excess) == len(observers[1]._excess) > 1
    assert straight == [True, True]  # the second observer never asks


def test_grids_have_numpys_bits():
    for shape in ((1, 1), (30, 7), (20, 260)):
        wide = (70_000, -70_000, 17, 2**31 - 1)[: shape[0] * shape[1]]
        assert both(1, golden_parts.grid(shape, groups=1, wide=wide), shape)


def test_stages_are_right_as_python_too(monkeypatch):
    shape, data = (12, 40), golden_parts.trellis((12, 40), memory=5)
    for name in STAGES:
        monkeypatch.setattr(kernels, name, getattr(kernels, f"_{name}"))
    monkeypatch.setattr(kernels, "renormalise", simd._lane_by_lane)
    monkeypatch.setattr(jit, "kernel", lambda name: getattr(kernels, f"_{name}"))
    with np.errstate(over="ignore"):  # numpy's scalars warn where machine code wraps
        assert both(15, data, shape)
        assert both(15, golden_parts.trellis(shape, memory=8, first=1), shape)


def test_symbols_become_values_as_python_too(monkeypatch):
    rng = np.random.default_rng(0)
    symbols, subset = rng.integers(-20, 20, (6, 8), np.int32), rng.integers(0, 4, (6, 8), np.uint8)
    fine, classes = rng.random((2, 8)) < 0.5, rng.integers(0, 64, (6, 8), np.int32)
    steps = rng.integers(-4, 4, (2, 8)), rng.integers(-4, 4, 6)
    offset = rng.random((64, 17), np.float32)
    monkeypatch.setattr(jit, "kernel", lambda name: getattr(kernels, f"_{name}"))
    found = []
    for compiled in (False, True):
        monkeypatch.setattr(jit, "worth", lambda _, compiled=compiled: compiled)
        points = trellis._points(symbols.copy(), subset, fine)
        found.append((points, grid.dequantize(points, classes, np.float32(0.1), *steps, offset, fine)))
    for one, other in zip(*found, strict=True):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("half", [127, 128, 200, 1023])
def test_tables_of_any_size_have_numpys_bits(half):
    """Beside narrow ones in a file, where only some rows have a class of many symbols."""
    freq = np.full(2 * half + 2, 3)
    freq[half] += TOTAL - int(freq.sum())
    offset = np.random.default_rng(half).random((64, 17), np.float32)
    table = {k: Table(-half, freq) if k > 24 else golden_parts.SHARED.tables.table[k] for k in range(1, 64)}
    shared = Shared(Tables(table), offset)
    symbols = np.random.default_rng(half).integers(-half - 3, half + 4, (60, 40))
    for classes, wide in ((20, False), (30, half > 127)):
        code = replace(code_of(symbols), row_class=np.where(np.arange(60) % 7 == 0, classes - 20, 0))
        data, models = GRID.encode(code, shared).data, []
        with pytest.MonkeyPatch.context() as patch:
            own = direct.Direct.values
            patch.setattr(direct.Direct, "values", lambda self, *a: models.append(self.model) or own(self, *a))  # noqa: B023
            assert both(1, data, (60, 40), shared)
        assert [m.symbols.dtype for m in models] == [np.uint16 if wide else np.uint8]
    dependent = code_of(symbols * 0, first=1)
    assert both(9, TRELLIS.encode(dependent, shared).data, (60, 40), shared)  # a quarter of a table


def test_a_class_without_a_table_is_refused(monkeypatch):
    shared = Shared(Tables({k: golden_parts.TINY.tables.table[k] for k in (18, 20)}))
    zero = np.zeros((1, 3), int)
    code = GridCode(0.5, np.zeros((2, 3), int), zero, zero + 18, np.array([0, 2]), np.array([0, 0]))
    data = GRID.encode(code, shared).data
    monkeypatch.setattr(jit, "worth", lambda _: True)
    fewer = Shared(Tables({20: shared.tables.table[20]}))
    with pytest.raises(CorruptError, match="class 18 has no table"):
        run([GRID.decode(data, (2, 3), "F32", fewer)])


@pytest.mark.slow
@pytest.mark.parametrize("engine", [True, False])
def test_damage_is_refused(engine, monkeypatch):
    monkeypatch.setattr(jit, "worth", lambda _: engine)
    shape = (60, 20)
    data = golden_parts.trellis(shape, memory=4)
    cut = len(data) - 1
    for at in range(60, cut, 29):
        for change in (data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :], data[:at]):
            try:
                found = run([coder(15).decode(change, shape, "F32", golden_parts.SHARED)])[0]
            except CorruptError:
                continue
            assert np.isfinite(found).all()  # a bit of the path leads to another sound matrix


def refused(code, shape, words, coder_of=TRELLIS):
    data = coder_of.encode(code, golden_parts.SHARED).data
    for engine in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jit, "worth", lambda _, engine=engine: engine)
            with pytest.raises(CorruptError, match=words):
                run([coder_of.decode(data, shape, "F32", golden_parts.SHARED)])


def code_of(symbols, step=0.5, first=64):
    rows, cols = symbols.shape
    zero = np.zeros((1, cols), int)
    return GridCode(step, symbols, zero, zero + 18, np.zeros(rows, int), np.zeros(rows, int), first)


def test_values_out_of_range():
    symbols = np.zeros((2, 3), int)
    symbols[1, 1] = 2**24 + 1
    refused(code_of(symbols), (2, 3), "symbol out of range")
    symbols[1, 1] = 5
    refused(code_of(symbols, 1e38), (2, 3), "out of range")
    refused(code_of(symbols, 1e38), (2, 3), "out of range", GRID)
    large = GRID.encode(code_of(symbols, 6e37), golden_parts.SHARED).data  # near the end, and still a number
    assert both(1, large, (2, 3))


@pytest.mark.parametrize("plain", [False, True])
def test_streams_with_other_words(plain, monkeypatch):
    """Too few words, and more escapes than bytes; `plain`: the loops as Python runs them."""
    monkeypatch.setattr(jit, "worth", lambda _: True)
    if plain:
        monkeypatch.setattr(jit, "kernel", lambda name: getattr(kernels, f"_{name}"))
    escaping = Shared(Tables({k: Table(0, np.array([1, TOTAL - 1])) for k in range(1, 64)}))
    code = code_of(np.full((9, 9), 70))
    data = GRID.encode(code, escaping).data
    for cut in (81, 100):  # two bytes a symbol: as many bytes as there are escapes, and fewer
        with pytest.raises(CorruptError, match="escaped symbols"):
            run([GRID.decode(data[:-cut], (9, 9), "F32", escaping)])
    noisy = code_of(golden_parts.Numbers(3).around(9, 40, 40))
    data = GRID.encode(noisy, golden_parts.SHARED).data
    head = direct.split
    seen = []

    def shorter(payload, count):
        states, words, tail = head(payload, count)
        seen.append(len(words))
        return states, words[:1], tail

    monkeypatch.setattr(direct, "split", shorter)
    with pytest.raises(CorruptError, match="past its words"):
        run([GRID.decode(data, (40, 40), "F32", golden_parts.SHARED)])
    assert seen[0] > 200


def test_the_code_for_sixteen_lanes_is_sound():
    """LLVM takes it on any machine; where the processor has the instruction it gives what one lane at a time gives."""
    module = ir.Module()
    wide = ir.IntType(64)
    function = ir.Function(module, ir.FunctionType(wide, [wide, wide]), "f")
    builder = ir.IRBuilder(function.append_basic_block())
    signature, code = simd._sixteen(None, "states", "words")
    builder.ret(code(None, builder, signature, function.args))
    code(None, builder, signature, function.args) if not builder.block.is_terminated else None
    binding.parse_assembly(str(module)).verify()
    assert len(signature.args) == 2
    if simd.available():
        rng = np.random.default_rng(0)
        words = rng.integers(0, 2**16, 200, np.uint16)
        for count in (1, 16, 31, 64):
            one = rng.integers(1, 2**18, count).astype(np.uint32)
            other = one.copy()
            assert simd.renormalise(one, words, 3) == simd._lane_by_lane(other, words, 3)
            assert (one == other).all()


def test_lanes_beyond_the_last_sixteen(monkeypatch):
    """As Python runs it, with a stand-in for the instruction that takes two words for its sixteen lanes."""
    monkeypatch.setattr(simd, "sixteen", lambda *_: np.uint64(2))
    monkeypatch.setattr(simd, "lane_by_lane", simd._lane_by_lane)
    states = np.full(19, 2**20, np.uint32)
    states[17] = 3
    assert simd._renormalise(states, np.arange(40, dtype=np.uint16), 5) == 8
    assert states[16:].tolist() == [2**20, 3 << 16 | 7, 2**20]


def test_without_the_instruction(monkeypatch):
    for name in ("CPU_NAME", "CPU_FEATURES", "DISABLE_JIT"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(simd.config, name, "generic" if name != "DISABLE_JIT" else 1)
            assert not simd.available()
    monkeypatch.setattr(simd.llvmlite.binding, "get_host_cpu_features", dict)
    assert not simd.available()


def file_of(count, shape):
    """An artifact of matrices."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(count):
        symbols = np.rint(rng.normal(size=shape)).astype(int)
        made.append(golden_parts.unit(f"m{i}", shape, 1, GRID.encode(code_of(symbols), golden_parts.SHARED).data))
    return container.parse(golden_parts.pack(*made))


@pytest.mark.slow
def test_many_small_units_are_worth_the_import():
    """It is the file that counts, not the single unit; a file of few values is read without numba."""
    script = (
        "import sys; from bytecap.format import container, decoder; from bytecap.format.entropy import jit\n"
        "jit._WORTH = int(sys.argv[2]); decoder.decode_units(container.read(sys.argv[1]))\n"
        "print('numba' in sys.modules)"
    )
    path = golden_parts.DIRECTORY / "long_trellis.bcap"
    values = sum(u.unit.parameters for u in container.read(path).units)
    said = [
        subprocess.run(  # noqa: S603 (our own script)
            [sys.executable, "-c", script, path, str(most)], capture_output=True, text=True, check=True
        ).stdout.strip()
        for most in (values, values + 1)
    ]
    assert said == ["True", "False"]


@pytest.mark.parametrize("threads", [1, 2])
def test_loading_takes_the_result_and_one_unit(threads, monkeypatch):
    """Bytes allocated, not time or resident memory: the peak beyond the result is below a unit and what is shared."""
    monkeypatch.setattr(jit, "worth", lambda _: True)
    monkeypatch.setattr(jit, "cores", lambda: threads)
    shape = (600, 1000)
    contents = file_of(6, shape)
    decoder.decode_units(contents)  # compiles
    unit, shared = 4 * shape[0] * shape[1], 3 * 2**20
    tracemalloc.start()
    values = decoder.decode_units(contents)
    whole = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    del values
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    for _ in decoder.decode_each(contents, values=1, threads=threads, ahead=1):
        pass
    streamed = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert whole < 6 * unit + unit + shared
    assert streamed < 2 * unit + shared
