"""Streams to the bit: what the numpy loops and the compiled ones do at every limit of the format's section 5."""

import struct

import numpy as np
import pytest

from bytecap.errors import CorruptError
from bytecap.format.coders import trellis
from bytecap.format.coders.classes import CLASSES, OCTAVE
from bytecap.format.coders.grid import GridCode
from bytecap.format.coders.trellis import dependent, subsets
from bytecap.format.entropy import jit, kernels
from bytecap.format.entropy.frequencies import TOTAL, Table, Tables
from bytecap.format.entropy.rans import (
    LANE_SYMBOLS,
    LOW,
    MAX_SYMBOL,
    Source,
    Stream,
    check_room,
    decode,
    encode,
    encode_all,
    escape_bytes,
    lanes,
    zigzag_bytes,
)
from bytecap.format.entropy.shared_tables import count_symbols

pytestmark = pytest.mark.coverage

EVEN = Tables({1: Table(-1, np.array([4000, 8000, 4000, 384])), 2: Table(5, np.array([TOTAL - 2, 1, 1]))})
OTHER = Tables({1: Table(0, np.array([TOTAL - 1, 1]))})
THIRD = Tables({1: Table(-2, np.array([1000, 2000, 9000, 2000, 1000, 1384]))})


@pytest.fixture(params=[False, True], ids=["numpy", "compiled"], autouse=True)
def _engine(request, monkeypatch):
    monkeypatch.setattr(jit, "worth", lambda _: request.param)


def stream(data, count=1, tables=EVEN, cls=1):
    return Stream(data, np.full(count, cls, np.uint8), tables)


def written(*, words=(), states=(LOW,), tail=b"", count=None):
    """A stream by hand."""
    declared = zigzag_bytes([len(words) if count is None else count])
    return declared + np.array(states, "<u4").tobytes() + np.array(words, "<u2").tobytes() + tail


def by_hand(symbols, classes, tables):
    """The coder of section 5.3, a symbol at a time, in Python's own integers."""
    k = -(-len(symbols) // 8192)
    states, words, escapes = [1 << 16] * k, [], b""
    plain = {c: (t.low, t.freq.tolist(), [0, *np.cumsum(t.freq).tolist()]) for c, t in tables.table.items()}
    for i in reversed(range(len(symbols))):
        low, freq, cum = plain[classes[i]]
        at = symbols[i] - low
        if not 0 <= at < len(freq) - 1:
            at = len(freq) - 1
        f, c = freq[at], cum[at]
        x = states[i % k]
        if x >= f << 18:
            words.append(x & 0xFFFF)
            x >>= 16
        states[i % k] = (x // f << 14) + x % f + c
    for i, z in enumerate(symbols):
        low, freq, _ = plain[classes[i]]
        if not 0 <= z - low < len(freq) - 1:
            rest = 2 * z if z >= 0 else -2 * z - 1
            while rest >= 128:
                escapes += bytes([rest % 128 + 128])
                rest //= 128
            escapes += bytes([rest])
    return written(words=words[::-1], states=states, tail=escapes)


def test_constants_of_the_format():
    assert (LOW, LANE_SYMBOLS, MAX_SYMBOL, TOTAL) == (65536, 8192, 2147483647, 16384)
    assert [lanes(n) for n in (0, 1, 8191, 8192, 8193, 16384, 16385)] == [0, 1, 1, 1, 2, 2, 3]


@pytest.mark.parametrize("n", [1, 2, 7, 300, 8192, 8193, 16385])
def test_the_bytes_are_those_of_the_definition(n):
    rng = np.random.default_rng(n)
    classes = rng.integers(1, 3, n)
    symbols = np.where(classes == 1, rng.integers(-2, 3, n), 5)
    symbols[rng.random(n) < 0.01] = 6  # what class 2 hardly expects: many bits, and an escape in class 1
    data = encode(symbols, classes, EVEN)
    assert data == by_hand(symbols.tolist(), classes.tolist(), EVEN)
    assert decode([Stream(data, classes, EVEN)])[0].tolist() == symbols.tolist()


def test_several_streams_under_several_tables():
    rng = np.random.default_rng(0)
    sizes = [0, 3, 8200, 1, 8200, 16_400, 0, 70]
    parts = [
        Source(rng.integers(-1, 2, n), np.ones(n, np.uint8), (EVEN, OTHER, THIRD)[i % 3]) for i, n in enumerate(sizes)
    ]
    coded = encode_all(parts)
    assert coded == [
        by_hand(p.symbols.tolist(), p.classes.tolist(), p.tables) if len(p.symbols) else b"" for p in parts
    ]
    decoded = decode([Stream(d, p.classes, p.tables) for d, p in zip(coded, parts, strict=True)])
    assert [z.tolist() for z in decoded] == [p.symbols.tolist() for p in parts]
    assert all(z.dtype == np.int32 for z in decoded)


def test_word_counts_of_every_length_of_their_bytes():
    """A byte of 127 is the last of a count, whatever stands in front of it."""
    for n in (70, 74, 9300, 9330):
        symbols = np.full(n, 6)
        data = encode(symbols, np.full(n, 2), EVEN)
        assert decode([stream(data, n, cls=2)])[0].tolist() == symbols.tolist()
    assert encode(np.full(9330, 6), np.full(9330, 2), EVEN)[1] == 127


def test_room():
    check_room(0, 0)
    check_room(5, 8192)
    check_room(9, 8193)
    for size, count in ((4, 1), (4, 8192), (8, 8193), (0, 1)):
        with pytest.raises(CorruptError, match=f"of {size} bytes is truncated: {count} symbols have {lanes(count)}"):
            check_room(size, count)


class TestIntegers:
    def test_zigzag(self):
        assert zigzag_bytes([0, -1, 1, 63, -64, 64]).hex() == "0001027e7f8001"
        assert zigzag_bytes([8191, -8192, 8192]) == bytes([254, 127, 255, 127, 128, 128, 1])
        assert zigzag_bytes([]) == b""

    @pytest.mark.parametrize("z", [7, -7, 63, -64, 64, -65, 8191, -8192, 2**20, MAX_SYMBOL, -MAX_SYMBOL])
    def test_escaped(self, z):
        data = encode(np.array([z]), np.array([1]), EVEN)
        assert escape_bytes(stream(data)) == len(zigzag_bytes([z]))
        assert decode([stream(data)])[0].tolist() == [z]

    @pytest.mark.parametrize("z", [MAX_SYMBOL + 1, -MAX_SYMBOL - 1, 2**40])
    def test_too_large(self, z):
        data = encode(np.array([z]), np.array([1]), EVEN)
        with pytest.raises(CorruptError, match=f"the escaped symbol {z}"):
            decode([stream(data)])

    def test_any_of_them_too_large(self):
        for symbols in ([7, 2**40], [2**40, 7], [7, 2**40, 7]):
            data = encode(np.array(symbols), np.ones(len(symbols), int), EVEN)
            with pytest.raises(CorruptError, match="the escaped symbol 1099511627776"):
                decode([stream(data, len(symbols))])

    @pytest.mark.parametrize(("tail", "message"), [
        (b"", "escaped symbols of a stream are damaged"),
        (b"\x80", "escaped symbols of a stream are damaged"),
        (b"\x80" * 8 + b"\x00", None),
        (b"\x80" * 9 + b"\x00", "escaped symbols of a stream are damaged"),
        (b"\x0e\x00", "1 bytes are left over behind the escaped symbols"),
        (b"\x0e\x0e\x0e", "2 bytes are left over behind the escaped symbols"),
    ])  # fmt: skip
    def test_tails(self, tail, message):
        head = encode(np.array([7]), np.array([1]), EVEN)[:-1]
        if message is None:
            assert decode([stream(head + tail)])[0].tolist() == [0]
        else:
            with pytest.raises(CorruptError, match=message):
                decode([stream(head + tail)])


class TestHeads:
    """The word count, the lanes' states, and where the words end."""

    def test_no_count(self):
        for data in (b"", b"\x80", b"\x80" * 6 + b"\x00" + struct.pack("<I", LOW)):
            with pytest.raises(CorruptError, match="inside its word count"):
                decode([stream(data)])

    def test_a_count_of_as_many_bytes_as_there_may_be(self):
        data = encode(np.array([0]), np.array([1]), EVEN)
        assert data[0] == 0
        assert decode([stream(b"\x80" * 5 + data)])[0].tolist() == [0]

    def test_negative_count(self):
        for count in (-1, -64, -65):
            with pytest.raises(CorruptError, match="negative number of words"):
                decode([stream(written(count=count))])

    @pytest.mark.parametrize("missing", [1, 2, 3])
    def test_words_that_are_not_there(self, missing):
        data = encode(np.full(400, 1), np.ones(400, int), EVEN)
        with pytest.raises(CorruptError, match=f"a stream of {len(data) - missing} bytes declares .* truncated"):
            decode([stream(data[:-missing], 400)])

    def test_states_below_the_least(self):
        with pytest.raises(CorruptError, match="impossible state"):
            decode([stream(written(states=[LOW - 1]))])
        with pytest.raises(CorruptError, match="impossible state"):
            decode([stream(written(states=[LOW, 0]), 8193)])

    def test_the_least_state_is_one(self):
        """State 2^16 is a state; one symbol later it is no longer the first one, and there is no word to read."""
        with pytest.raises(CorruptError, match=r"stream 0 does not end in its initial state|past its words"):
            decode([stream(written())])
        symbols = np.zeros(3, int)
        data = encode(symbols, np.zeros(3, int), EVEN)
        assert decode([stream(data, 3, cls=0)])[0].tolist() == [0, 0, 0]

    def test_words_too_many_or_too_few(self):
        symbols, ones = np.full(50, 1), np.ones(50, int)
        data = encode(symbols, ones, EVEN)
        words = np.frombuffer(data[5:], "<u2")
        states = np.frombuffer(data[1:5], "<u4")
        assert decode([stream(written(words=words, states=states), 50)])[0].tolist() == symbols.tolist()
        for other in ([*words, 0], [0, *words], words[:-1]):
            with pytest.raises(CorruptError, match=r"does not end in its initial state|past its words"):
                decode([stream(written(words=other, states=states), 50)])

    def test_many_words_too_few(self):
        symbols, ones = np.full(500, 1), np.ones(500, int)
        data = encode(symbols, ones, EVEN)
        with pytest.raises(CorruptError, match=r"initial state|past its words|escaped symbols .* are damaged"):
            decode([stream(written(states=np.frombuffer(data[2:6], "<u4")), 500)])

    def test_the_number_of_the_damaged_stream(self):
        sound = stream(encode(np.full(50, 1), np.ones(50, int), EVEN), 50)
        damaged = Stream(sound.data[:1] + b"\xff" + sound.data[2:], sound.classes, EVEN)
        with pytest.raises(CorruptError, match=r"stream [01] does not end"):
            decode([sound, damaged])

    def test_nothing(self):
        assert decode([stream(b"", 0), stream(b"", 0)])[1].dtype == np.int32
        assert escape_bytes(stream(b"", 0)) == 0
        with pytest.raises(CorruptError, match="an empty stream holds 3 bytes"):
            decode([stream(b"", 0), stream(b"abc", 0)])
        assert encode_all([Source(np.zeros(0, int), np.zeros(0, int), EVEN)]) == [b""]

    def test_a_class_without_a_table(self):
        data = encode(np.array([0, 0]), np.array([1, 1]), EVEN)
        with pytest.raises(CorruptError, match="class 3 has no table"):
            decode([Stream(data, np.array([1, 3], np.uint8), EVEN)])
        with pytest.raises(CorruptError, match="class has no table"):
            encode(np.array([0, 0]), np.array([1, 3]), EVEN)

    def test_padding_costs_nothing(self):
        """Class 0: one symbol of probability 1."""
        data = encode(np.zeros(70, int), np.zeros(70, int), EVEN)
        assert data == written()
        assert decode([stream(data, 70, cls=0)])[0].tolist() == [0] * 70


# ------------------------------------------------------------------------------------------- the encoder's other loops
@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (70, 130), (64, 64)])
def test_symbols_are_turned_and_counted(rows, cols, plain):
    rng = np.random.default_rng(rows)
    symbols = rng.integers(-9, 10, (cols, rows), np.int32)
    columns, row = rng.integers(20, 45, (1, cols)), rng.integers(-3, 4, rows)
    fine = columns >= 32
    code = GridCode(1.0, symbols.T, np.zeros((1, cols), int), columns, np.zeros(rows, int), row, 32)
    wanted = count_symbols(symbols.T, code.classes(), dependent(columns, 32, rows))
    out, counts = np.empty((rows, cols), np.int8), np.zeros((2, CLASSES, wanted.shape[2]))
    loop = kernels._store if plain else kernels.store
    loop(symbols, columns[0], fine[0] * OCTAVE, fine[0].astype(np.int64), row, out, counts)
    assert (out == symbols.T).all()
    assert (counts == wanted).all()


@pytest.mark.parametrize("memory", list(trellis.MASKS))
@pytest.mark.parametrize("groups", [1, 3])
def test_the_bits_of_a_path_lead_to_its_subsets(groups, memory, monkeypatch):
    wanted = np.random.default_rng(groups).integers(0, 2, (50, 7), np.uint8)
    points = subsets(wanted, groups, memory)
    for worth, name in ((False, "path"), (True, "path"), (True, "_path")):
        monkeypatch.setattr(jit, "worth", lambda _, worth=worth: worth)
        monkeypatch.setattr(jit, "kernel", lambda _, name=name: getattr(kernels, name))
        assert (trellis._bits(points, groups, memory) == wanted).all()


def test_symbols_far_beyond_any_table_are_escaped():
    far = np.array([2**62, -(2**62), 2**31, 0, 1])
    data = encode(far[2:], np.ones(3, np.uint8), EVEN)
    assert EVEN.index(far, np.ones(5, np.uint8))[1].tolist() == [True, True, True, False, False]
    near = np.array([-1, 0, 1], np.int8)
    wide = EVEN.index(near.astype(np.int32), np.ones(3, np.uint8))
    assert all((a == b).all() for a, b in zip(EVEN.index(near, np.ones(3, np.uint8)), wide, strict=True))
    assert len(data) > 0
