"""Blocks of integers and 16-bit floats, and the two coders made of them, held to the reference decoder."""

from decimal import Decimal, localcontext

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bytecap.errors import CorruptError
from bytecap.format.coders import Shared, coder, run
from bytecap.format.coders.companded import CODER as COMPANDED
from bytecap.format.coders.companded import CompandedCode, levels
from bytecap.format.coders.companded import dequantize as expand
from bytecap.format.coders.fixed import CODER as FIXED
from bytecap.format.coders.fixed import FixedCode, dequantize
from bytecap.format.wire.integers import Integers, write_integers
from bytecap.reference.container import Reader, Unit
from bytecap.reference.fixed import companded, fixed
from bytecap.reference.streams import decode_streams

pytestmark = pytest.mark.coverage


def decode(coder_, data, shape):
    return run([coder_.decode(data, shape, "F32", Shared())])[0]


def refer(make, data, shape):
    running = make(Unit("a", list(shape), "F32", 0, 0, []), Reader(data), ([], np.zeros(0)))
    symbols = None
    try:
        while True:
            symbols = decode_streams(running.send(symbols))
    except StopIteration as stop:
        return stop.value


def fixed_code(rows, cols, width=3, k=2, seed=0):
    rng = np.random.default_rng(seed)
    k = min(k, cols)
    columns = sorted(rng.choice(cols, k, replace=False).tolist()) if k else []
    top = 1 << width
    codes = np.clip(np.rint(rng.normal(top / 2, top / 6, (rows, cols - k))), 0, top - 1).astype(np.uint8)
    scales = rng.uniform(-1, 2, rows).astype(np.float16)
    return FixedCode(
        width, codes, scales, rng.integers(0, top, rows), columns, rng.normal(size=(rows, k)).astype(np.float16)
    )


def companded_code(rows, cols, sets=3, deepest=8, seed=0):
    rng = np.random.default_rng(seed)
    sets = max(1, min(sets, rows))
    depths = rng.integers(0, deepest + 1, (sets, cols)).astype(np.uint8)
    row_sets = rng.integers(0, sets, rows)
    codes = rng.integers(0, 1 << depths[row_sets].astype(int), (rows, cols))
    offsets = rng.normal(size=(sets, cols)).astype(np.float16)
    scales = np.where(depths > 0, rng.uniform(0.01, 2, (sets, cols)), 0).astype(np.float16)
    return CompandedCode(row_sets, depths, offsets, scales, codes)


CASES = [(FIXED, fixed, fixed_code, dequantize), (COMPANDED, companded, companded_code, expand)]


def test_are_registered():
    assert coder(10) is FIXED
    assert coder(11) is COMPANDED


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (17, 40), (0, 0), (5, 0), (100, 120)])
@pytest.mark.parametrize(("coder_", "reference", "make", "arithmetic"), CASES)
def test_round_trip_is_the_formats_arithmetic_in_both_decoders(coder_, reference, make, arithmetic, shape, coded):
    code = make(*shape)
    data = coder_.encode(code, coded=coded)
    found = decode(coder_, data, shape)
    assert found.dtype == np.float32
    assert found.shape == shape
    np.testing.assert_array_equal(found, arithmetic(code))
    assert refer(reference, data, shape).tobytes() == found.tobytes()
    assert sum(n for _, n in coder_.kinds(data, shape, "F32")) == len(data)
    estimate = len(coder_.encode(code, coded=coded, estimate=True))
    assert abs(estimate - len(data)) <= 24 + 0.02 * len(data)


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize(("coder_", "reference", "make", "arithmetic"), CASES)
def test_every_truncation_and_every_added_byte_is_noticed(coder_, reference, make, arithmetic, coded):
    del arithmetic
    data = coder_.encode(make(9, 11), coded=coded)
    for bad in [*(data[:n] for n in range(len(data))), data + b"\0"]:
        with pytest.raises(CorruptError):
            decode(coder_, bad, (9, 11))
        with pytest.raises(CorruptError):
            refer(reference, bad, (9, 11))


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 255), st.booleans(), st.sampled_from(CASES))
def test_a_changed_byte_decodes_alike_in_both_decoders_or_is_corrupt(position, value, coded, case):
    coder_, reference, make, _ = case
    data = bytearray(coder_.encode(make(9, 11), coded=coded))
    data[position % len(data)] = value
    try:
        found = decode(coder_, bytes(data), (9, 11))
    except CorruptError:
        with pytest.raises(CorruptError):
            refer(reference, bytes(data), (9, 11))
        return
    assert np.isfinite(found).all()
    assert refer(reference, bytes(data), (9, 11)).tobytes() == found.tobytes()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 8), max_size=60), st.booleans(), st.data())
def test_any_integers_come_back(widths, coded, data):
    values = np.array([data.draw(st.integers(0, (1 << w) - 1)) for w in widths], np.int32)
    widths = np.array(widths, np.uint8)
    block = write_integers(values, widths, coded=coded)
    parsed, end = Integers.parse(b"xy" + block + b"z", 2, widths, coded=coded)
    assert end == 2 + len(block)
    np.testing.assert_array_equal(run([parsed.decode()])[0], values)
    if not coded:
        assert len(block) <= (widths.sum() + 7 * 8) / 8


@pytest.mark.parametrize("width", range(1, 9))
def test_coding_costs_next_to_nothing_where_codes_are_even_and_saves_where_they_are_not(width):
    rng = np.random.default_rng(width)
    widths = np.full(8000, width, np.uint8)
    even = rng.integers(0, 1 << width, 8000)
    assert len(write_integers(even, widths, coded=True)) <= 1000 * width * 1.01 + 24
    skewed = np.zeros(8000, int)
    skewed[::50] = (1 << width) - 1
    assert len(write_integers(skewed, widths, coded=True)) < 200 + (1 << width)


@pytest.mark.parametrize(
    "head",
    [b"", b"\x02\x03\x00", b"\x00\x00\x00", b"\x00\x09\x00", b"\x00\x03\x05" + bytes(10), b"\x00\x03\x02\1\0\1\0"],
)
def test_bad_heads_of_fixed_are_corrupt(head):
    for make in (lambda d: decode(FIXED, d, (2, 4)), lambda d: refer(fixed, d, (2, 4))):
        with pytest.raises(CorruptError):
            make(head + bytes(40))


def test_values_beyond_their_width_padding_bits_and_scales_that_are_not_finite_are_corrupt():
    good = FIXED.encode(fixed_code(2, 3, k=0), coded=False)
    infinite = good[:3] + np.array([np.inf, 1], "<f2").tobytes() + good[7:]
    padded = good[:-1] + bytes([good[-1] | 128])
    deep = bytes([0, 1, 4 + 4, 1, 0, 0, 1, 0, 0, 0, 0])  # one group of depth 9, in bit planes
    for coder_, reference, data, shape in (
        (FIXED, fixed, infinite, (2, 3)),
        (FIXED, fixed, padded, (2, 3)),
        (COMPANDED, companded, deep, (1, 1)),
    ):
        with pytest.raises(CorruptError):
            decode(coder_, data, shape)
        with pytest.raises(CorruptError):
            refer(reference, data, shape)


def test_levels_are_the_float32_nearest_to_the_formula_and_far_from_a_tie():
    with localcontext() as context:
        context.prec = 40
        for depth in range(1, 9):
            for code, found in enumerate(levels(depth)):
                m = min(code, (1 << depth) - 1 - code)
                true = 3 / Decimal(2).sqrt() * (Decimal(1 << depth) / (2 * m + 1)).ln()
                gap = abs(Decimal(float(abs(found))) - true)
                unit = Decimal(float(np.spacing(abs(found))))
                assert gap < unit * Decimal("0.4999999")
                assert (found < 0) == (code == m)
