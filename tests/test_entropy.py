"""Integer tables and the interleaved rANS coder: exact, tight, and unmoved by damage."""

import contextlib
import lzma
import zlib

import brotli
import constriction
import numpy as np
import pytest
import zstandard
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import norm

from bytecap.errors import CorruptError
from bytecap.format.entropy.frequencies import MAX_CLASS, MAX_HALF, TOTAL, Table, Tables, integer_frequencies
from bytecap.format.entropy.rans import (
    LANE_SYMBOLS,
    MAX_SYMBOL,
    Source,
    Stream,
    decode,
    encode,
    encode_all,
    escape_bytes,
    lanes,
    zigzag_bytes,
)
from bytecap.format.entropy.shared_tables import count_symbols, dump_shared, fit_shared, load_shared

pytestmark = pytest.mark.coverage

SHORT = st.integers(0, 60)
LENGTHS = st.one_of(SHORT, SHORT, SHORT, st.sampled_from([LANE_SYMBOLS - 1, LANE_SYMBOLS, LANE_SYMBOLS + 1, 20_011]))
NARROW = st.integers(-6, 6)
ANY = st.one_of(NARROW, st.integers(-MAX_HALF - 3, MAX_HALF + 3), st.integers(-MAX_SYMBOL, MAX_SYMBOL))


@st.composite
def tables(draw, most=4):
    """Up to `most` tables for classes anywhere in 1..63, some shared, symmetric or not, some with hardly an escape."""
    classes = draw(st.lists(st.integers(1, MAX_CLASS), min_size=1, max_size=most, unique=True))
    made = {}
    for c in classes:
        if made and draw(st.booleans()):
            made[c] = next(iter(made.values()))
            continue
        low, size = draw(st.integers(-40, 5)), draw(st.integers(1, 60))
        weights = draw(hnp.arrays(np.float64, size + 1, elements=st.floats(0, 1e6)))
        made[c] = Table(low, integer_frequencies(weights))
    return Tables(made)


@st.composite
def sources(draw, symbols=ANY, lengths=LENGTHS):
    """A stream: tables, then symbols and classes of one length, long ones tiled from short ones."""
    model = draw(tables())
    n = draw(lengths)
    seed = draw(hnp.arrays(np.int64, min(n, 40), elements=symbols))
    cls = draw(hnp.arrays(np.uint8, min(n, 23), elements=st.sampled_from(sorted(model.table))))
    return Source(np.resize(seed, n), np.resize(cls, n).astype(np.uint8), model)


def gaussian(n, sigma, seed=0):
    return np.round(np.random.default_rng(seed).normal(0, sigma, n)).astype(np.int32)


def fitted(symbols, cls=1):
    values, counts = np.unique(symbols, return_counts=True)
    return Tables.from_counts({cls: dict(zip(values.tolist(), counts.tolist(), strict=True))})


class TestRoundTrip:
    @given(sources())
    def test_any_integers_in_any_classes(self, source):
        data = encode(source.symbols, source.classes, source.tables)
        (back,) = decode([Stream(data, source.classes, source.tables)])
        np.testing.assert_array_equal(back, source.symbols)

    @pytest.mark.slow
    @settings(max_examples=15)
    @given(st.lists(sources(), max_size=4))
    def test_streams_of_very_different_lengths_together(self, group):
        together = encode_all(group)
        for source, data in zip(group, together, strict=True):
            assert data == encode(source.symbols, source.classes, source.tables)  # nobody sees its neighbours
        decoded = decode([Stream(d, s.classes, s.tables) for d, s in zip(together, group, strict=True)])
        for source, back in zip(group, decoded, strict=True):
            np.testing.assert_array_equal(back, source.symbols)

    def test_nothing_takes_nothing(self):
        none = np.zeros(0, np.int32)
        model = Tables({1: Table(0, np.array([TOTAL - 1, 1]))})
        assert encode(none, none.astype(np.uint8), model) == b""
        assert encode_all([]) == []
        assert decode([]) == []
        assert [len(x) for x in decode([Stream(b"", none.astype(np.uint8), model)] * 2)] == [0, 0]

    @pytest.mark.parametrize("n", [1, LANE_SYMBOLS, LANE_SYMBOLS + 1, 5 * LANE_SYMBOLS - 1])
    def test_around_whole_lanes(self, n):
        z = gaussian(n, 2.0)
        model, classes = fitted(z), np.ones(n, np.uint8)
        data = encode(z, classes, model)
        np.testing.assert_array_equal(decode([Stream(data, classes, model)])[0], z)
        assert lanes(n) == -(-n // LANE_SYMBOLS)

    def test_everything_escaped(self):
        z = np.array([MAX_SYMBOL, -MAX_SYMBOL, MAX_HALF + 1, -MAX_HALF - 1] * 50)
        model, classes = Tables({7: Table(0, np.array([TOTAL - 1, 1]))}), np.full(len(z), 7, np.uint8)
        stream = Stream(encode(z, classes, model), classes, model)
        np.testing.assert_array_equal(decode([stream])[0], z)
        assert escape_bytes(stream) == len(zigzag_bytes(z.tolist()))

    def test_a_class_without_a_table_is_refused(self):
        model, z = fitted(gaussian(50, 1.0)), np.zeros(3, np.int32)
        with pytest.raises(CorruptError, match="no table"):
            encode(z, np.full(3, 9, np.uint8), model)


class TestSize:
    @given(sources(NARROW))
    def test_no_stream_at_all_takes_more_than_the_lanes_precision_allows(self, source):
        """A state is at least four times the frequency it is divided by: a symbol wastes at most log2(5 / 4) bit."""
        data = encode(source.symbols, source.classes, source.tables)
        stream = Stream(data, source.classes, source.tables)
        n = len(source.symbols)
        bits = source.tables.bits(source.symbols, source.classes) + np.log2(5 / 4) * n
        # a lane's flush costs 4 bytes, the word count 1 to 3
        assert len(data) - escape_bytes(stream) <= bits / 8 + 4 * lanes(n) + 3

    @settings(max_examples=15)
    @given(tables(), st.sampled_from([300, 4000, 20_011]), st.integers(0, 99))
    def test_symbols_as_their_tables_expect_them_cost_what_the_tables_say(self, model, n, seed):
        rng = np.random.default_rng(seed)
        classes = rng.choice(np.array(sorted(model.table), np.uint8), n)
        z = np.zeros(n, np.int32)
        for c, table in model.table.items():
            mine = classes == c
            z[mine] = table.low + rng.choice(len(table.freq), mine.sum(), p=table.freq / TOTAL)  # the last one escapes
        stream = Stream(encode(z, classes, model), classes, model)
        ideal = model.bits(z, classes) / 8
        assert len(stream.data) - escape_bytes(stream) <= 1.002 * ideal + 4 * lanes(n) + 3

    @pytest.mark.parametrize("sigma", [1.0, 2.0, 4.0, 30.0])
    def test_at_two_bits_and_more_the_excess_is_at_most_a_five_hundredth(self, sigma):
        z = gaussian(60_000, sigma)
        model, classes = fitted(z), np.ones(len(z), np.uint8)
        data = encode(z, classes, model)
        assert len(data) <= 1.002 * model.bits(z, classes) / 8

    @pytest.mark.parametrize("sigma", [0.4, 1.7, 6.0])
    def test_as_small_as_another_coder_on_the_same_integer_tables(self, sigma):
        z = gaussian(30_000, sigma, seed=3)
        model, classes = fitted(z), np.ones(len(z), np.uint8)
        table = model.table[1]
        categorical = constriction.stream.model.Categorical(table.freq / TOTAL, perfect=False)
        oracle = constriction.stream.stack.AnsCoder()
        oracle.encode_reverse((z - table.low).astype(np.int32), categorical)
        size = 4 * len(oracle.get_compressed())
        np.testing.assert_array_equal(oracle.decode(categorical, len(z)) + table.low, z)
        data = encode(z, classes, model)
        assert size - 8 <= len(data) <= 1.0005 * size + 4 * lanes(len(z)) + 3

    def test_as_small_as_another_coder_with_a_table_for_every_class(self):
        rng = np.random.default_rng(5)
        classes = rng.choice(np.array([3, 9, 17], np.uint8), 24_000)
        z = np.round(rng.normal(0, np.array([0.5, 1.5, 6.0])[(classes - 3) // 6])).astype(np.int32)
        model = Tables({c: fitted(z[classes == c]).table[1] for c in (3, 9, 17)})
        size = 0
        for c, table in model.table.items():
            oracle = constriction.stream.stack.AnsCoder()
            categorical = constriction.stream.model.Categorical(table.freq / TOTAL, perfect=False)
            oracle.encode_reverse((z[classes == c] - table.low).astype(np.int32), categorical)
            size += oracle.num_valid_bits() / 8
        assert len(encode(z, classes, model)) <= 1.0005 * size + 4 * lanes(len(z)) + 8

    @pytest.mark.parametrize("sigma", [1.0, 2.3, 5.0])
    def test_smaller_than_general_compressors_tables_included(self, sigma):
        z = gaussian(40_000, sigma, seed=1)
        classes = np.full(len(z), 20, np.uint8)
        shared = fit_shared(count_symbols(z, classes), np.zeros((2, 64, 17)), None)
        ours = len(encode(z, classes, shared.tables)) + len(dump_shared(shared))
        raw = z.astype(np.int8).tobytes()
        others = {
            "brotli-11": len(brotli.compress(raw, quality=11)),
            "zstd-22": len(zstandard.ZstdCompressor(level=22).compress(raw)),
            "lzma-9e": len(lzma.compress(raw, lzma.FORMAT_ALONE, preset=9 | lzma.PRESET_EXTREME)),
            "zlib-9": len(zlib.compress(raw, 9)),
        }
        assert all(ours < size for size in others.values()), (ours, others)

    def test_several_classes_beat_one_static_table(self):
        rng = np.random.default_rng(2)
        sigma = np.repeat(2.0 ** rng.uniform(-1, 4, 64), 600)
        z = np.round(rng.normal(0, sigma)).astype(np.int32)
        classes = np.clip(20 + np.round(4 * np.log2(sigma)), 1, 63).astype(np.uint8)
        shared = fit_shared(count_symbols(z, classes), np.zeros((2, 64, 17)), None)
        single = fit_shared(count_symbols(z, np.full_like(classes, 20)), np.zeros((2, 64, 17)), None)
        conditioned = len(encode(z, classes, shared.tables)) + len(dump_shared(shared))
        static = len(encode(z, np.full_like(classes, 20), single.tables)) + len(dump_shared(single))
        edges = norm.cdf(np.stack([z - 0.5, z + 0.5]) / sigma)
        ideal = -np.log2(edges[1] - edges[0]).sum() / 8
        assert conditioned < 1.02 * ideal  # classes, their tables and the tables' storage together
        assert conditioned < 0.9 * static


class TestDamage:
    @given(sources(lengths=SHORT), st.data())
    def test_truncated_streams_are_always_noticed(self, source, data):
        assume(len(source.symbols))
        whole = encode(source.symbols, source.classes, source.tables)
        cut = data.draw(st.integers(0, len(whole) - 1))
        with pytest.raises(CorruptError):
            decode([Stream(whole[:cut], source.classes, source.tables)])

    @given(sources(lengths=SHORT), st.binary(min_size=1, max_size=9))
    def test_bytes_behind_a_stream_are_noticed(self, source, extra):
        whole = encode(source.symbols, source.classes, source.tables)
        with pytest.raises(CorruptError):
            decode([Stream(whole + extra, source.classes, source.tables)])

    @given(sources(lengths=SHORT), st.data())
    def test_flipped_bits_never_raise_anything_else(self, source, data):
        assume(len(source.symbols))
        whole = bytearray(encode(source.symbols, source.classes, source.tables))
        whole[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        try:
            (back,) = decode([Stream(bytes(whole), source.classes, source.tables)])
        except CorruptError as exc:
            assert "\n" not in str(exc)  # noqa: PT017 (either outcome is fine)
        else:
            assert len(back) == len(source.symbols)

    @given(st.binary(max_size=300), tables(), st.integers(1, 9000))
    def test_noise_never_raises_anything_else(self, noise, model, n):
        classes = np.resize(np.array(sorted(model.table), np.uint8), n)
        with contextlib.suppress(CorruptError):
            decode([Stream(noise, classes, model)])

    def test_nearly_every_flip_in_the_words_is_noticed(self):
        z = gaussian(3000, 1.5)
        model, classes = fitted(z), np.ones(len(z), np.uint8)
        whole = encode(z, classes, model)
        rng, noticed = np.random.default_rng(0), 0
        for at in rng.integers(0, len(whole), 40):
            bad = bytearray(whole)
            bad[at] ^= 1 << rng.integers(0, 8)
            try:
                decode([Stream(bytes(bad), classes, model)])
            except CorruptError:
                noticed += 1
        assert noticed >= 39

    def test_data_without_symbols_is_refused(self):
        with pytest.raises(CorruptError, match="empty stream"):
            decode([Stream(b"\0", np.zeros(0, np.uint8), Tables({}))])

    def test_a_class_beyond_the_tables_is_refused(self):
        z = gaussian(100, 1.0)
        model, classes = fitted(z), np.ones(100, np.uint8)
        data = encode(z, classes, model)
        with pytest.raises(CorruptError):
            decode([Stream(data, np.full(100, 63, np.uint8), model)])

    def test_damage_in_one_stream_is_found_beside_sound_ones(self):
        z = gaussian(9000, 1.5)
        model, classes = fitted(z), np.ones(9000, np.uint8)
        whole = encode(z, classes, model)
        sound, bad = Stream(whole, classes, model), Stream(whole[:-2] + b"zz", classes, model)
        with pytest.raises(CorruptError):
            decode([sound, bad, sound])


WEIGHTS = hnp.arrays(
    np.float64, st.integers(1, 300), elements=st.one_of(st.floats(0, 1), st.floats(0, 1e12), st.just(0.0))
)


class TestTables:
    @given(WEIGHTS)
    def test_frequencies_are_positive_and_add_up(self, weights):
        freq = integer_frequencies(weights)
        assert freq.sum() == TOTAL
        assert freq.min() >= 1

    @given(WEIGHTS, st.floats(0, 1e12))
    def test_symmetric_frequencies_are_positive_add_up_and_mirror(self, half, escape):
        weights = np.concatenate([half[::-1], half[1:], [escape]])
        freq = integer_frequencies(weights, symmetric=True)
        assert freq.sum() == TOTAL
        assert freq.min() >= 1
        np.testing.assert_array_equal(freq[:-1], freq[:-1][::-1])

    @pytest.mark.parametrize("half", [0, 1, 40, MAX_HALF])
    def test_tables_of_which_nearly_everything_is_escaped(self, half):
        weights = np.append(np.ones(2 * half + 1), 1e9)
        freq = integer_frequencies(weights, symmetric=True)
        assert freq.sum() == TOTAL
        assert freq[-1] == TOTAL - 2 * half - 1

    @given(st.floats(0.3, 60), st.integers(0, 5))
    def test_rounding_frequencies_costs_little(self, sigma, seed):
        z = gaussian(4000, sigma, seed)
        values, counts = np.unique(z, return_counts=True)
        entropy = float(-(counts / 4000) @ np.log2(counts / 4000))
        low = int(values[0])
        dense = np.zeros(int(values[-1]) - low + 2)
        dense[values - low] = counts
        model = Tables({1: Table(low, integer_frequencies(dense))})
        bits = model.bits(z, np.ones(len(z), np.uint8)) / 4000
        assert entropy <= bits <= entropy * 1.01 + 0.01

    @given(sources(st.integers(-MAX_HALF, MAX_HALF)))
    def test_bits_are_the_logarithms_of_the_frequencies(self, source):
        total = 0.0
        for z, c in zip(source.symbols[:200].tolist(), source.classes[:200].tolist(), strict=True):
            table = source.tables.table[c]
            i = z - table.low if table.low <= z <= table.high else -1
            total -= np.log2(table.freq[i] / TOTAL)
        got = source.tables.bits(source.symbols[:200], source.classes[:200])
        assert got == pytest.approx(total, abs=1e-6)

    @given(tables(most=8))
    def test_every_table_is_listed_once_with_its_lowest_class(self, model):
        listed = model.distinct()
        assert len({id(t) for _, t in listed}) == len(listed)
        assert {id(t) for _, t in listed} == {id(t) for t in model.table.values()}
        for cls, table in listed:
            assert cls == min(c for c, t in model.table.items() if t is table)

    @given(st.lists(st.tuples(st.integers(1, 63), st.floats(0.2, 200), st.integers(1, 400)), min_size=1, max_size=6))
    def test_shared_tables_survive_their_section(self, parts):
        z = np.concatenate([gaussian(n, s, i) for i, (_, s, n) in enumerate(parts)])
        classes = np.concatenate([np.full(n, c, np.uint8) for c, _, n in parts])
        rng = np.random.default_rng(0)
        centres = np.stack([rng.integers(0, 99, (64, 17)), rng.normal(0, 9, (64, 17))]).astype(float)
        shared = fit_shared(count_symbols(z, classes), centres, None)
        again = load_shared(dump_shared(shared))
        assert set(again.tables.table) == set(shared.tables.table)
        for c, table in shared.tables.table.items():
            assert again.tables.table[c].low == table.low
            np.testing.assert_array_equal(again.tables.table[c].freq, table.freq)
            np.testing.assert_array_equal(again.offset[c], shared.offset[c])
        data = encode(z, classes, shared.tables)
        np.testing.assert_array_equal(decode([Stream(data, classes, again.tables)])[0], z)

    def test_an_empty_section_means_no_tables(self):
        assert load_shared(b"").tables.table == {}

    @given(st.data())
    def test_damaged_table_sections_never_raise_anything_else(self, data):
        z = gaussian(2000, 3.0)
        whole = bytearray(dump_shared(fit_shared(count_symbols(z, np.full(2000, 20)), np.zeros((2, 64, 17)), None)))
        if data.draw(st.booleans()):
            whole[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        else:
            whole = whole[: data.draw(st.integers(1, len(whole) - 1))]
        try:
            shared = load_shared(bytes(whole))
        except CorruptError:
            return
        for table in shared.tables.table.values():
            assert table.freq.sum() == TOTAL
            assert table.freq.min() >= 1
