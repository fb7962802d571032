import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bytecap.errors import CorruptError
from bytecap.format.coders import Shared, run
from bytecap.format.coders.bands import CODER
from bytecap.format.coders.packed import BROTLI, Quantized, dequantize
from bytecap.format.coders.packed import CODER as PACKED
from bytecap.reference.container import CorruptError as Refused
from bytecap.reference.container import Reader, Unit
from bytecap.reference.stack import CODERS
from bytecap.reference.streams import decode_streams

pytestmark = pytest.mark.coverage


def matrix(rows, cols, seed=0, spread=0.0):
    rng = np.random.default_rng(seed)
    codes = np.rint(rng.normal(size=(rows, cols)) * 2 * np.exp(spread * rng.normal(size=cols)))
    return Quantized(codes.astype(np.int16), rng.uniform(0.01, 0.1, rows).astype(np.float16))


def decoded(data, shape):
    return run([CODER.decode(data, shape, "F32", Shared())])[0]


def by_the_reference(data, shape):
    running = CODERS[CODER.tag](Unit("", list(shape), "F32", CODER.tag, 0, []), Reader(data), ([], np.zeros(0)))
    symbols = decode_streams(next(running))
    with pytest.raises(StopIteration) as stop:
        running.send(symbols)
    return stop.value.value


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(0, 40), st.integers(0, 9), st.sampled_from([0.0, 1.0]))
def test_round_trip_by_both_decoders(rows, cols, seed, spread):
    m = matrix(rows, cols, seed, spread)
    if m.codes.size:
        m.codes[seed % rows, seed % cols] = -30_000  # far outside of every table
    data = CODER.encode(m)
    assert sum(n for _, n in CODER.kinds(data, m.codes.shape, "F32")) == len(data)
    np.testing.assert_array_equal(decoded(data, m.codes.shape), dequantize(m))
    np.testing.assert_array_equal(by_the_reference(data, m.codes.shape), dequantize(m))


def test_gaussian_codes_are_near_their_entropy_and_below_brotli():
    m = matrix(512, 256)
    _, counts = np.unique(m.codes, return_counts=True)
    ideal = counts @ np.log2(m.codes.size / counts) / 8
    kinds = dict(CODER.kinds(CODER.encode(m), m.codes.shape, "F32"))
    assert ideal < kinds["payload"] + kinds["table"] < 1.005 * ideal
    assert len(CODER.encode(m)) < 0.99 * len(PACKED.encode(m, BROTLI))


def test_columns_of_different_spread_get_bands_of_their_own():
    flat, uneven = matrix(256, 256), matrix(256, 256, spread=1.0)
    assert CODER.encode(flat)[0] == 1
    data = CODER.encode(uneven)
    assert data[0] == 8
    _, counts = np.unique(uneven.codes, return_counts=True)
    assert len(data) < 0.95 * counts @ np.log2(uneven.codes.size / counts) / 8


def test_bad_sections_are_refused():
    m = matrix(16, 32, spread=1.0)
    data, shape = CODER.encode(m), m.codes.shape
    for broken in (b"", b"\0" + data[1:], b"\x40" + data[1:], data[:20], data[:-1], data + b"\0"):
        with pytest.raises(CorruptError):
            decoded(broken, shape)
        with pytest.raises(Refused):
            by_the_reference(broken, shape)
    infinite = Quantized(m.codes, np.full(16, np.inf, np.float16))
    with pytest.raises(ValueError, match="finite"):
        CODER.encode(infinite)
