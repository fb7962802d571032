"""Corners of the decode path that no golden and no random file reaches, each asked for by name."""

import json
import lzma
from dataclasses import replace

import numpy as np
import pytest

import bytecap
import golden_codebooks
import golden_parts
from bytecap.errors import BudgetError, CorruptError
from bytecap.format import coders, container
from bytecap.format import decoder as decode
from bytecap.format.codefiles import Code
from bytecap.format.coders import Objects, Shared, leb, run
from bytecap.format.coders.codebook import CODER as CODEBOOK
from bytecap.format.coders.grid import GridCode, choose_class
from bytecap.format.coders.latent import read_decoder
from bytecap.format.coders.long_trellis import CODER as LONG_TRELLIS
from bytecap.format.coders.stack import CODER as STACK
from bytecap.format.coders.trellis import CODER as TRELLIS
from bytecap.format.entropy import jit, kernels, shared_tables
from bytecap.format.entropy.frequencies import Table, Tables, integer_frequencies
from bytecap.format.entropy.rans import Source, Stream, encode, encode_all, split, zigzag_bytes
from bytecap.format.entropy.rans import decode as entropy_decode
from bytecap.format.entropy.shared_tables import dump_shared, fit_shared
from bytecap.format.overlays.columns import CODER as COLUMNS
from bytecap.format.overlays.lowrank import CODER as LOWRANK
from bytecap.format.sidefiles import bpe_merges, packing
from bytecap.format.wire.indices import read_indices
from bytecap.format.wire.integers import Integers, write_halves
from bytecap.format.wire.positions import count_positions, read_positions, write_positions
from bytecap.format.wire.shared_objects import load_objects, share_lists, write_codebook, write_list
from bytecap.types import Score

pytestmark = pytest.mark.coverage
VALID = [p for p in sorted(golden_parts.DIRECTORY.glob("*.bcap")) if not p.name.startswith("bad_")]


def decoded(coder, data, shape, shared=None):
    return run([coder.decode(data, shape, "F32", shared or Shared())])[0]


def escaping(freq, symbols, low=0):
    """Stored frequencies and a stream of symbols, some of which the table has to escape."""
    table = Table(low, np.array(freq))
    stream = encode(np.array(symbols), np.ones(len(symbols), np.uint8), Tables({1: table}))
    return b"".join(leb(int(f)) for f in freq[:-1]), stream


# ------------------------------------------------------------------------------- symbols beyond what a section allows


@pytest.mark.parametrize("code", [-1, 2, 70])
def test_binary_codes_out_of_range(code):
    stored, stream = escaping([8000, 8000, 384], [0, 1, code, 1])
    data = bytes([2, 0, 1]) + np.ones(2, "<f2").tobytes() + stored + stream
    with pytest.raises(CorruptError, match="a code out of range"):
        decoded(coders.coder(8), data, (2, 2))


@pytest.mark.parametrize("index", [-1, 4])
def test_high_parts_of_indices_out_of_range(index):
    stored, stream = escaping([8000, 4000, 2000, 2000, 384], [0, 1, index, 3])
    data = b"\1" + stored + leb(len(stream)) + stream
    with pytest.raises(CorruptError, match="a high part out of range"):
        run([read_indices(data, 4, 4, Objects())])


@pytest.mark.parametrize("value", [-1, 4])
def test_integers_beyond_their_width(value):
    widths = np.full(4, 2, np.uint8)
    table = Table(0, np.array([8000, 4000, 2000, 2000, 384]))
    stream = encode(np.array([0, 1, value, 3]), widths, Tables({2: table}))
    data = leb(0) + leb(4) + b"".join(leb(int(f)) for f in table.freq[:-1]) + leb(len(stream)) + stream
    block, end = Integers.parse(data, 0, widths, coded=True)
    assert end == len(data)
    with pytest.raises(CorruptError, match="a value beyond its width"):
        run([block.decode()])
    for low, size in ((3, 2), (0, 5), (1, 0)):
        with pytest.raises(CorruptError, match=f"declares {size} values from {low} of 2 bits"):
            Integers.parse(leb(low) + leb(size) + data[2:], 0, widths, coded=True)


def test_trits_are_all_there():
    for body in (b"", b"\0\0"):
        with pytest.raises(CorruptError, match=f"4 trits are packed into {len(body)} bytes"):
            decoded(coders.coder(8), bytes([3, 0, 0]) + np.ones(1, "<f2").tobytes() + body, (1, 4))


def trellis(points, step=0.0625):
    """A trellis section of one independent and one dependent column."""
    none = np.zeros((1, 2), int)
    code = GridCode(step, points, none, np.array([[9, 20]]), np.zeros(len(points), int), np.zeros(len(points), int), 18)
    return TRELLIS, TRELLIS.encode(code, golden_parts.SHARED).data


def test_trellis_symbols_values_and_paths():
    coder, good = trellis(np.array([[1, 0], [2, 0], [-3, 0]]))
    assert decoded(coder, good, (3, 2), golden_parts.SHARED).shape == (3, 2)
    coder, data = trellis(np.array([[2**24 + 1, 0]]))
    with pytest.raises(CorruptError, match="a symbol out of range"):
        decoded(coder, data, (1, 2), golden_parts.SHARED)
    coder, data = trellis(np.array([[2**20, 0]]), step=3e38)
    with pytest.raises(CorruptError, match="a value out of range"):
        decoded(coder, data, (1, 2), golden_parts.SHARED)
    _, path, payload = coder._parse(good, (3, 2))
    at = len(good) - len(path) - len(payload) - 1
    assert good[at] == len(path)
    with pytest.raises(CorruptError, match="declares a path of 100 bytes"):
        coder.kinds(good[:at] + leb(100) + good[at + 1 :], (3, 2), "F32")
    assert good.count(18) == 1  # the first dependent class
    for wrong in (0, 65):
        with pytest.raises(CorruptError, match=f"declares {wrong} as its first dependent class"):
            coder.kinds(good.replace(bytes([18]), bytes([wrong])), (3, 2), "F32")


def test_memories_of_a_long_trellis():
    row, points = np.zeros(3, int), np.array([[1], [2], [-3]])
    code = GridCode(0.5, points, np.zeros((1, 1), int), np.array([[20]]), row, row, 18, memory=5)
    data = LONG_TRELLIS.encode(code, golden_parts.SHARED).data
    assert data[13:15] == bytes([18, 5])
    for wrong in (0, 3, 9, 255):
        with pytest.raises(CorruptError, match=f"declares states of {wrong} bits"):
            LONG_TRELLIS.kinds(data[:14] + bytes([wrong]) + data[15:], (3, 1), "F32")


def test_tables_that_do_not_end():
    raw = dump_shared(golden_parts.SHARED)[1:]
    packed = b"\1" + lzma.compress(raw, lzma.FORMAT_RAW, filters=shared_tables._FILTERS)
    np.testing.assert_array_equal(shared_tables.load_shared(packed).offset, golden_parts.SHARED.offset)
    for spoiled in (packed + b"\0", packed[:-4]):
        with pytest.raises(CorruptError, match="packing does not end where it should"):
            shared_tables.load_shared(spoiled)
    with pytest.raises(CorruptError, match="does not decompress"):
        shared_tables.load_shared(b"\1" + b"\xff" * 30)


# ------------------------------------------------------------------------------------------------- sections and lists


def test_codebook_sections_are_changed_in_place():
    rng, shape = np.random.default_rng(0), (3, 4)
    book = golden_codebooks.book(shape, 5, 2)
    other = np.float32(np.float16(rng.standard_normal((5, 2))))
    found = decoded(CODEBOOK, CODEBOOK.with_words(CODEBOOK.encode(book, shape), book, other), shape)
    np.testing.assert_array_equal(found, other[book.indices].reshape(shape))
    section = CODEBOOK.encode_shared(book.indices, (5, 2), 0, 1.0)
    whole, half = (
        decoded(CODEBOOK, data, shape, Shared(objects=load_objects([write_codebook(other, byte=False)])))
        for data in (section, CODEBOOK.with_scale(section, shape, 0.5))
    )
    np.testing.assert_array_equal(whole, other[book.indices].reshape(shape))
    np.testing.assert_array_equal(half, whole / 2)


def test_a_decoder_as_it_is_stored():
    decoder = golden_codebooks.latent((2, 8), patch=4).decoder
    again = decoder.stored(8)
    assert all(np.abs(a - b).max() < 0.01 for a, b in zip(again.arrays(), decoder.arrays(), strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(again.stored(8).arrays(), again.arrays(), strict=True))


def test_a_decoder_that_is_not_there():
    for data in (b"", b"\1\1\1"):
        with pytest.raises(CorruptError, match="in front of its decoder"):
            read_decoder(data)
    for head in (b"\1\2\1\10", b"\1\0\1\10", b"\101\1\1\10", b"\1\1\101\10", b"\1\1\1\5", b"\1\1\1\11"):
        with pytest.raises(CorruptError, match="a decoder declares"):
            read_decoder(head + bytes(99))
    with pytest.raises(CorruptError, match="is cut off"):
        read_decoder(b"\1\1\1\10" + bytes(11))
    with pytest.raises(CorruptError, match="in front of its decoder"):
        decoded(coders.coder(7), bytes([2, 1]) + leb(1) + leb(0) + b"\0\0\1", (1, 1))


def test_low_rank_codes_have_their_bits():
    one = np.ones((1, 2), int)
    for codes, bits in ((4 * one, 3), (-5 * one, 3), (one, 1), (one, 9)):
        with pytest.raises(ValueError, match=f"codes do not fit {bits} bits"):
            LOWRANK.encode(codes, one, np.ones(1, np.float32), bits)


def test_halves_are_finite():
    with pytest.raises(ValueError, match="finite"):
        write_halves(np.array([1, np.inf], np.float16), coded=False)


def test_places_counted_without_reading_them():
    block = write_positions(np.array([1, 5]), 9)
    assert count_positions(block, 0, 9) == (2, len(block))
    with pytest.raises(CorruptError, match="lists 2 of 1 places"):
        count_positions(block, 0, 1)
    with pytest.raises(CorruptError, match="unknown way 99"):
        read_positions(bytes([1, 99]), 0, 9, Objects())


def test_a_stack_says_what_it_is_made_of():
    base, overlay = bytes(8) + b"\0", b"abc"
    section = STACK.encode((2, base), [(32, overlay), (36, b"")])
    assert STACK.tags(section) == [2, 32, 36]
    one = STACK.encode((2, base), [(32, overlay)])
    assert STACK.growth(len(base), overlay) == len(one) - len(base)


def test_lists_are_shared_where_several_layers_have_them():
    """Layers without a list, and lists of one layer alone, are left as they are."""
    rng = np.random.default_rng(1)
    common, own = (np.flatnonzero(rng.random(200) < 0.3) for _ in range(2))
    base = (2, bytes(8) + b"\0")

    def overlay_coder(index):
        return COLUMNS.tag, COLUMNS.encode(index, np.ones((len(index), 3), np.float16), 200)

    order = (40, b"\0" * 200)
    stacks = {f"u{i}": ((3, 200), STACK.encode(base, [overlay_coder(common), order])) for i in range(3)}
    stacks["alone"] = ((3, 200), STACK.encode(base, [order, overlay_coder(own)]))
    changed, objects = share_lists(stacks, [b"first"])
    assert objects == (b"first", write_list(common, 200))
    assert changed["alone"] == stacks["alone"][1]
    assert all(len(changed[n]) < len(stacks[n][1]) for n in ("u0", "u1", "u2"))
    again, same = share_lists({n: (stacks[n][0], d) for n, d in changed.items()}, objects)
    assert (again, same) == (changed, objects)


def test_sides_are_counted_as_numpy_counts_them():
    tables = Tables.from_counts({3: {-1: 2, 0: 5, 1: 2}, 20: dict.fromkeys(range(-40, 41), 1)})
    rng = np.random.default_rng(0)
    for most, count in ((3, 1), (3, 8), (60, 9), (60, 40), (10**6, 7), (10**6, 8)):
        values = rng.integers(-most, most + 1, count)
        base = int(np.clip(np.median(values), -128, 127))
        found = choose_class(values, tables)
        assert found[0] == base
        if len(set(values.tolist())) > 1:
            assert found[1:] == tables.cheapest(*np.unique(values - base, return_counts=True))


def test_alike_classes_come_down_to_one_table():
    counts = np.zeros((64, 4))
    counts[20:23] = (30, 20, 5, 1)
    shared = fit_shared(counts, np.zeros((2, 64, 17)), None)
    assert len(shared.tables.distinct()) == 1
    assert list(shared.tables.table) == list(range(1, 64))


def test_there_must_be_a_table_for_side_information():
    assert choose_class(np.array([], int), Tables({})) == (0, 0, 0.0)
    assert choose_class(np.array([3, 3]), Tables({})) == (3, 0, 0.0)
    with pytest.raises(CorruptError, match="no table to code side information"):
        choose_class(np.array([3, 4]), Tables({}))


def test_two_coders_of_one_tag(monkeypatch):
    monkeypatch.setattr(coders.pkgutil, "iter_modules", lambda p, real=coders.pkgutil.iter_modules: [*real(p)] * 2)
    with pytest.raises(RuntimeError, match="share the tag"):
        coders._found.__wrapped__()


# ---------------------------------------------------------------------------------------------- tables and machine code


def test_tables_from_counts_beyond_what_a_table_holds():
    counts = {1: {0: 900.0, 5000: 100.0}}
    model = Tables.from_counts(counts)
    assert (model.table[1].low, model.table[1].high) == (-1023, 1023)
    assert model.table[1].freq[-1] > 1000  # the rest is escaped
    plain = Tables.from_counts({1: {3: 1.0, 5: 3.0}}, symmetric=False).table[1]
    assert (plain.low, plain.high) == (3, 5)
    assert plain.freq[2] > 2 * plain.freq[0]
    with pytest.raises(ValueError, match="8193 symbols do not fit"):
        integer_frequencies(np.ones(8193))
    assert len(integer_frequencies(np.ones(8192))) == 8192


@pytest.mark.parametrize("path", VALID, ids=lambda p: p.stem)
def test_the_compiled_loops_are_right_as_python_too(path, monkeypatch):
    """The functions numba compiles, not compiled: the same values as numpy's loops."""
    contents = container.read(path)
    monkeypatch.setattr(jit, "worth", lambda _: False)
    wanted = decode.decode_units(contents)
    monkeypatch.setattr(jit, "worth", lambda _: True)
    monkeypatch.setattr(jit, "kernel", lambda name: getattr(kernels, f"_{name}"))
    with np.errstate(over="ignore"):  # numpy's scalars warn where machine code wraps
        found = decode.decode_units(contents)
    assert {n: v.tobytes() for n, v in found.items()} == {n: v.tobytes() for n, v in wanted.items()}


@pytest.mark.parametrize("engine", [False, True])
def test_the_compiled_loops_refuse_what_numpys_do(monkeypatch, engine):
    model = Tables({1: Table(-1, np.array([4000, 8000, 4000, 384]))})
    symbols = np.resize([0, 1, -1, 7, 0, 0, 500], 70)
    monkeypatch.setattr(jit, "kernel", lambda name: getattr(kernels, f"_{name}"))
    monkeypatch.setattr(jit, "worth", lambda _: engine)
    ones = np.ones(70, np.uint8)
    (data,) = encode_all([Source(symbols, ones, model)])
    assert entropy_decode([Stream(data, ones, model)])[0].tolist() == symbols.tolist()
    states, words, tail = split(data, 70)
    fewer = zigzag_bytes([len(words) - 3]) + states.tobytes() + words[:-3].tobytes() + tail
    for damaged, classes in (
        (data[:-30], ones),
        (fewer, ones),
        (data[:9] + b"\xff\xff" + data[11:], ones),
        (data, 3 * ones),
    ):
        with pytest.raises(CorruptError):
            entropy_decode([Stream(damaged, classes, model)])


# ------------------------------------------------------------------------------------------------------- side files


def test_a_packing_that_does_not_come_back_is_not_used(monkeypatch):
    text = json.dumps({"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}).encode()
    for broken in (b"\xff" * 9, b"\0"):
        monkeypatch.setattr(bpe_merges, "write", lambda *_, b=broken: b)
        assert packing.unpack("t", packing.pack("t", text)) == text
    monkeypatch.setattr(packing, "_dismantle", lambda _: [b"\2\x40"])  # shorter, and no packing at all
    assert packing.unpack("t", packing.pack("t", text)) == text


@pytest.mark.parametrize(("data", "message"), [
    (b"\0\0\0" + b"3", "no list of names"), (b"\0\0\0" + b"[3]", "no list of names"),
    (b"\0\7\0" + b"[]", "outside the text"), (b"\x80\0\0\0\0\2\1\7\0" + b"[]", "merges of kind 7"),
    (b"\x80\0\0\0\0\2\5\0\0\0\0\0\0" + b'["a"]', "not all there"),
])  # fmt: skip
def test_structured_files_that_say_nonsense(data, message):
    with pytest.raises(CorruptError, match=message):
        packing.unpack("t", b"\2" + data)


def test_merges_before_their_parts_and_numbers_that_are_none():
    for text in (b'{"vocab": {"a": 0, "b": 1, "abb": 2, "ab": 3}, "merges": ["ab b", "a b"]}',
                 b'{"vocab": {"a": 1.5, "b": NaN}, "vocab": {"a": 0}}'):  # fmt: skip
        assert packing.unpack("t", packing.pack("t", text)) == text
    assert packing._imply(["a", "b", "abb", "ab"], [("ab", "b"), ("a", "b")]) == (0, ["a", "b", "abb", "ab"])


def test_spellings():
    assert bpe_merges.write(["a", "b"], [("c", "a")]) == b""
    with pytest.raises(CorruptError, match="more merges than are spelled"):
        bpe_merges.read(b"\0", ["a"], bpe_merges.MAX_MERGES + 1)
    whole = bpe_merges.write(["a", "b"], [("a", "b"), ("ab", "b")])
    assert bpe_merges.read(whole, ["a", "b"], 2) == [("a", "b"), ("ab", "b")]
    with pytest.raises(CorruptError, match="do not end where they should"):
        bpe_merges.read(whole + bytes(9), ["a", "b"], 2)
    with pytest.raises(CorruptError, match="end too soon"):
        bpe_merges.read(b"", ["a", "b"], 3000)
    speller = bpe_merges._Speller(bpe_merges._Coder(bpe_merges._SLOTS, bpe_merges.Spelling(2**24, 2**16)), ["a"])
    with pytest.raises(CorruptError, match="too long to be spelled"):
        speller._parts("a" * 5000)
    assert packing.pack("x", bytes(2**23))[0] == 0  # brotli would make a bomb of it


def test_code_needs_no_share_of_a_floor_it_has_no_part_in():
    with pytest.raises(BudgetError, match="too small") as caught, Code().floor(5):
        raise BudgetError("too small", 9)
    assert caught.value.floor == 9


def test_a_score_as_dictionary():
    found = Score("t", 2, 8, 1.5, 0.5, 0.1).as_dict()
    assert found == {"name": "t", "tokens": 2, "bytes": 8, "nats_per_token": 1.5, "bpb": 0.5, "bpb_stderr": 0.1}


# ---------------------------------------------------------------------------------------------------- whole artifacts


@pytest.mark.parametrize("path", VALID, ids=lambda p: p.stem)
def test_ideal_size_and_progress(path):
    contents, seen, ideal = container.read(path), [], decode.Ideal()
    values = decode.decode_units(contents, progress=seen.append, observe=ideal)
    assert seen == [u.unit.parameters for u in contents.units]
    assert {n: v.tobytes() for n, v in bytecap.load(path).items()} == {n: v.tobytes() for n, v in values.items()}
    assert 0 < ideal.bytes(path.stat().st_size) <= path.stat().st_size


@pytest.mark.parametrize("threads", [2, 3, 9])
def test_threads_decode_the_same_in_the_same_order(threads):
    contents = container.read(VALID[0])
    one, many = (list(decode.decode_each(contents, values=1, threads=n)) for n in (1, threads))
    assert [u.name for u, _ in many] == [u.name for u, _ in one]
    assert all(a.tobytes() == b.tobytes() for (_, a), (_, b) in zip(one, many, strict=True))


def test_a_unit_that_is_damaged_stops_all_threads():
    contents = container.read(VALID[0])
    unit = max(contents.units, key=lambda u: len(u.data))
    broken = tuple(replace(u, data=u.data[:5]) if u is unit else u for u in contents.units)
    with pytest.raises(CorruptError, match=unit.unit.name):
        list(decode.decode_each(replace(contents, units=broken), values=1, threads=3))
