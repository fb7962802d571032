import tracemalloc
import zlib

import brotli
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bytecap.errors import CorruptError
from bytecap.format.coders import Shared, coder, leb, packed, run
from bytecap.format.coders.packed import BROTLI, CODER, MAX_CODE, ZLIB, Quantized, compress, dequantize

pytestmark = pytest.mark.coverage


def decode(data, shape):
    return run([CODER.decode(data, shape, "F32", Shared())])[0]


def sample(rows=6, cols=11, spread=9.0, seed=0):
    rng = np.random.default_rng(seed)
    codes = np.rint(rng.normal(0, spread, (rows, cols))).astype(np.int32)
    return Quantized(codes, rng.uniform(0.001, 2, rows).astype(np.float16))


def pack(scales, raw, compression=ZLIB, width=1):
    def press(data):
        return brotli.compress(data, quality=2) if compression == BROTLI else zlib.compress(data, 1)

    side = press(np.asarray(scales, "<f2").tobytes())
    return bytes([compression, width]) + leb(len(side)) + side + press(raw)


def test_pieces_of_large_data_are_compressed_as_the_whole(monkeypatch):
    matrix = sample(300, 40)
    small = CODER.encode(matrix, BROTLI)
    monkeypatch.setattr(packed, "_LARGE", matrix.codes.size - 1)
    large = CODER.encode(matrix, BROTLI)
    np.testing.assert_array_equal(decode(large, matrix.codes.shape), decode(small, matrix.codes.shape))
    raw = np.ascontiguousarray(matrix.codes.T, np.int8).tobytes()
    assert large.endswith(compress(raw, BROTLI))
    assert compress(raw[:500], BROTLI, len(raw)) == brotli.compress(raw[:500], quality=10, lgwin=16)


def test_is_registered():
    assert coder(4) is CODER
    assert CODER.id == "packed"


@pytest.mark.parametrize("compression", [ZLIB, BROTLI])
@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (17, 40), (0, 5), (5, 0)])
@pytest.mark.parametrize("spread", [0.0, 5.0, 4000.0])
def test_round_trip_is_the_formats_arithmetic(compression, shape, spread):
    matrix = sample(*shape, spread)
    data = CODER.encode(matrix, compression)
    found = decode(data, shape)
    assert found.dtype == np.float32
    assert found.shape == shape
    expected = matrix.scales.astype(np.float32)[:, None] * matrix.codes.astype(np.float32)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(found, dequantize(matrix))
    kinds = CODER.kinds(data, shape, "F32")
    assert [k for k, _ in kinds] == ["header", "side", "payload"]
    assert sum(n for _, n in kinds) == len(data)


@settings(max_examples=40, deadline=None)
@given(
    hnp.arrays(
        np.int32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.integers(-MAX_CODE, MAX_CODE)
    ),
    st.sampled_from([ZLIB, BROTLI]),
    st.data(),
)
def test_any_codes_and_scales_come_back(codes, compression, data):
    elements = st.floats(-65504, 65504, width=16)
    scales = data.draw(hnp.arrays(np.float16, len(codes), elements=elements))
    matrix = Quantized(codes, scales)
    np.testing.assert_array_equal(decode(CODER.encode(matrix, compression), codes.shape), dequantize(matrix))


def test_a_few_outliers_do_not_double_the_size():
    matrix = sample(64, 64, 10.0)
    plain = len(CODER.encode(matrix, BROTLI))
    matrix.codes[3, 5] = -20_000
    assert len(CODER.encode(matrix, BROTLI)) < plain + 40


def test_codes_that_do_not_fit_and_bad_scales_are_refused():
    with pytest.raises(ValueError, match="two bytes"):
        CODER.encode(Quantized(np.array([[MAX_CODE + 1]]), np.ones(1, np.float16)), ZLIB)
    with pytest.raises(ValueError, match="finite scale"):
        CODER.encode(Quantized(np.ones((1, 1), int), np.array([np.inf], np.float16)), ZLIB)
    with pytest.raises(ValueError, match="finite scale"):
        CODER.encode(Quantized(np.ones((2, 1), int), np.ones(1, np.float16)), ZLIB)


@pytest.mark.parametrize("compression", [ZLIB, BROTLI])
def test_every_truncation_is_noticed(compression):
    data = CODER.encode(sample(), compression)
    for length in range(len(data)):
        with pytest.raises(CorruptError):
            decode(data[:length], (6, 11))


@pytest.mark.parametrize("compression", [ZLIB, BROTLI])
@pytest.mark.parametrize("shape", [(6, 10), (6, 12), (5, 11), (7, 11), (11, 6), (1, 66), (66, 1)])
def test_a_wrong_shape_is_noticed(compression, shape):
    with pytest.raises(CorruptError):
        decode(CODER.encode(sample(), compression), shape)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00",
        b"\x02\x01" + pack([1.0], b"\x01\x02")[2:],
        b"\x00\x03" + pack([1.0], b"\x01\x02")[2:],
        b"\x00\x00" + pack([1.0], b"\x01\x02")[2:],
        b"\x00\x01\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
        pack([1.0], b"\x01\x02") + b"\x00",
        pack([1.0], b"\x01\x02", BROTLI) + b"\x00",
        pack([1.0], b"\x01\x02", BROTLI) + brotli.compress(b""),
        pack([1.0], b"\x01\x02\x03"),
        pack([1.0], b"\x01"),
        pack([1.0], b"\x01\x02", width=2),
        pack([1.0, 1.0], b"\x01\x02"),
        pack([], b"\x01\x02"),
        pack([np.nan], b"\x01\x02"),
        pack([np.inf], b"\x01\x02", BROTLI),
        pack([1.0], b"\x01\x02")[:-6] + b"\xff" * 6,
        bytes([BROTLI]) + pack([1.0], b"\x01\x02")[1:],
        bytes([ZLIB]) + pack([1.0], b"\x01\x02", BROTLI)[1:],
    ],
)
def test_malformed_sections_are_corrupt(data):
    with pytest.raises(CorruptError):
        decode(data, (1, 2))


@pytest.mark.parametrize("compression", [ZLIB, BROTLI])
def test_a_bomb_is_not_expanded(compression):
    data = pack([1.0], bytes(30_000_000), compression)
    tracemalloc.start()
    try:
        with pytest.raises(CorruptError):
            decode(data, (1, 2))
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()
    with pytest.raises(CorruptError):
        decode(pack(np.zeros(2_000_000), b"\x01\x02", compression), (1, 2))


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 255), st.sampled_from([ZLIB, BROTLI]))
def test_a_changed_byte_decodes_finite_or_is_corrupt(position, value, compression):
    data = bytearray(CODER.encode(sample(), compression))
    data[position % len(data)] = value
    try:
        found = decode(bytes(data), (6, 11))
    except CorruptError:
        return
    assert found.shape == (6, 11)
    assert np.isfinite(found).all()
