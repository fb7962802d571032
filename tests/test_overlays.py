"""Conformance of every registered layer: both decoders agree in every bit, every byte is owned, damage is noticed."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import golden_parts
from bytecap import reference
from bytecap.errors import CorruptError
from bytecap.format import container
from bytecap.format.coders import Objects, Shared, overlay_coders, run
from bytecap.format.coders.stack import CODER as STACK
from bytecap.format.decoder import decode_units
from bytecap.format.ledger import KINDS, by_kind
from bytecap.format.overlays.channels import lengths, places
from bytecap.format.overlays.groups import sixteenth
from bytecap.format.wire import positions as p
from bytecap.quantization.overlays import overlays

pytestmark = pytest.mark.coverage

OVERLAYS = {found.id: found for found in overlay_coders().values()}


def random_list(rng, size):
    """Rising positions: none, few, a run, or many."""
    count = int(rng.choice([0, 1, min(size, 3), size // 2, size]))
    return np.sort(rng.permutation(size)[: min(count, size)])


def random_values(rng, number, count):
    """(values, scales) of `count` values in `number` vectors, f16 or i8; sometimes dull, so that brotli pays."""
    top = int(rng.choice([1, 40, 127]))
    if rng.integers(2):
        return rng.integers(-top, top + 1, count).astype(np.int8), rng.standard_normal(number).astype(np.float16)
    return (np.rint(rng.standard_normal(count) * top) / 8).astype(np.float16), None


def random_lines(rng, shape, overlay):
    size, length = shape[overlay.axis], shape[1 - overlay.axis]
    index = random_list(rng, size)
    values, scales = random_values(rng, len(index), len(index) * length)
    return overlay.encode(index, values, size, scales)


def random_outliers(rng, shape, overlay):
    index = random_list(rng, shape[0] * shape[1])
    values, scale = random_values(rng, 1, len(index))
    return overlay.encode(index, values, shape[0] * shape[1], scale)


def random_channels(rng, shape, overlay):
    mode = int(rng.integers(1, 4))
    index = random_list(rng, places(mode, shape))
    sizes = lengths(mode, len(index), shape)
    values, scales = random_values(rng, len(sizes), int(sizes.sum()))
    return overlay.encode(mode, index, values, shape, scales)


def random_lowrank(rng, shape, overlay):
    rank, bits = int(rng.integers(1, min(*shape, 5) + 1)), int(rng.integers(2, 9))
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    left, right = rng.integers(low, high, (rank, shape[0])), rng.integers(low, high, (rank, shape[1]))
    left *= int(rng.integers(0, 2))
    return overlay.encode(left, right, rng.standard_normal(rank).astype(np.float32), bits)


def random_groups(rng, shape, overlay):
    size = int(rng.integers(1, shape[1] + 1))
    count = (shape[0], -(-shape[1] // size))
    if rng.integers(2):
        return overlay.encode(rng.integers(-128, 128, count).astype(np.int8), size)
    return overlay.encode(rng.standard_normal(count).astype(np.float16), size)


def random_order(rng, shape, overlay):
    return overlay.encode(rng.permutation(shape[0]))


def random_difference(rng, shape, overlay):
    if rng.integers(2):
        return overlay.encode((1, golden_parts.grid(shape, seed=int(rng.integers(100)))))
    return overlay.encode((2, golden_parts.vector(rng.standard_normal(shape))))


RANDOM = {
    "columns": random_lines, "rows": random_lines, "outliers": random_outliers, "lowrank": random_lowrank,
    "groups": random_groups, "channels": random_channels, "order": random_order,
    "difference": random_difference,
}  # fmt: skip


def random_base(rng, shape):
    """(tag, section) of any base."""
    tag = int(rng.integers(1, 5))
    if tag == 1:
        return tag, golden_parts.grid(shape, seed=int(rng.integers(100)))
    if tag == 2:
        return tag, golden_parts.vector(rng.standard_normal(shape))
    if tag == 3:
        return tag, golden_parts.exact(rng.standard_normal(shape).astype(np.float32), "F32")
    codes = rng.integers(-128, 128, shape[0] * shape[1]).astype(np.int8)
    return tag, golden_parts.packed_zlib(codes.tobytes(), rng.standard_normal(shape[0]).tolist())


def example(name, seed=1, shape=(6, 9)):
    return RANDOM[name](np.random.default_rng(seed), shape, OVERLAYS[name])


def file(shape, base, *stacked):
    return golden_parts.pack(golden_parts.unit("a", shape, 5, STACK.encode(base, stacked)))


def test_every_layer_is_tried_here_and_has_a_path():
    assert set(RANDOM) == set(OVERLAYS) == set(overlays()) | {"order", "difference"}  # which are no exceptions
    assert all(tag == found.tag >= 32 for tag, found in overlay_coders().items())


@pytest.mark.slow
@given(
    st.integers(0, 2**32), st.integers(1, 20), st.integers(1, 20), st.lists(st.sampled_from(sorted(RANDOM)), max_size=4)
)
def test_both_decoders_agree_and_every_byte_is_owned(seed, rows, cols, names):
    rng, shape = np.random.default_rng(seed), (rows, cols)
    stacked = [(OVERLAYS[n].tag, RANDOM[n](rng, shape, OVERLAYS[n])) for n in names or ["columns"]]
    data = file(shape, random_base(rng, shape), *stacked)
    assert data[9] == (3 if "difference" in names else 1), "minor version"
    try:
        ours = decode_units(container.parse(data))["a"]
    except CorruptError:  # scales may take a random stack out of range
        with pytest.raises(CorruptError):
            reference.decode_file(data)
        return
    theirs = reference.decode_file(data)["a"]
    assert ours.dtype == theirs.dtype == np.float32
    assert ours.tobytes() == theirs.tobytes()
    for tag, part in stacked:
        kinds = overlay_coders()[tag].kinds(part, shape, "F32")
        assert sum(n for _, n in kinds) == len(part)
        assert {kind for kind, _ in kinds} <= set(KINDS)
    assert sum(by_kind(container.ledger(container.parse(data))).values()) == len(data)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", sorted(RANDOM))
def test_every_truncation_and_every_byte_more_is_noticed(name, seed):
    part, base = example(name, seed), np.ones((6, 9), np.float32)
    for wrong in [part[:length] for length in range(len(part))] + [part + b"\x00"]:
        with pytest.raises(CorruptError):
            run([OVERLAYS[name].apply(wrong, base.copy(), Shared())])
        data = file((6, 9), (2, struct.pack("<ffB", 1, 0, 0)), (OVERLAYS[name].tag, wrong))
        with pytest.raises(CorruptError):
            reference.decode_file(data)


@given(st.sampled_from(sorted(RANDOM)), st.integers(0, 99), st.data())
def test_a_changed_byte_is_refused_by_both_or_by_none(name, seed, data):
    part = bytearray(example(name, seed))
    part[data.draw(st.integers(0, len(part) - 1))] = data.draw(st.integers(0, 255))
    damaged = file((6, 9), (2, struct.pack("<ffB", 1, 0, 0)), (OVERLAYS[name].tag, bytes(part)))
    found = []
    for decoder in (lambda d: decode_units(container.parse(d)), reference.decode_file):
        try:
            found.append(decoder(damaged)["a"].tobytes())
        except CorruptError:
            found.append(None)
    assert found[0] == found[1]


@given(st.integers(0, 300), st.integers(0, 300), st.integers(0, 2**32))
def test_positions_come_back_in_the_fewest_bytes(size, count, seed):
    listed = np.sort(np.random.default_rng(seed).permutation(size)[:count])
    block = p.write_positions(listed, size)
    again, at = p.read_positions(b"xy" + block + b"z", 2, size, Objects())
    np.testing.assert_array_equal(again, listed)
    assert at == 2 + len(block)
    assert len(block) <= 3 + min(-(-size // 8), len(listed) * (1 + (size > 128)))


def test_rice_codes_hold_sparse_positions_near_their_entropy():
    size, count = 2**22, 4096
    listed = np.sort(np.random.default_rng(1).choice(size, count, replace=False))
    block = p.write_positions(listed, size)
    assert block[2] == p.RICE
    ideal = count * (np.log2(size / count) + np.log2(np.e))
    assert 8 * len(block) < 1.03 * ideal
    np.testing.assert_array_equal(p.read_positions(block, 0, size, Objects())[0], listed)


def test_positions_that_do_not_rise_are_our_mistake():
    for wrong in ([1, 1], [2, 1], [4], [-1]):
        with pytest.raises(ValueError, match="rise"):
            p.write_positions(np.array(wrong), 4)


def test_sixteenths_of_an_octave():
    k = np.arange(-128, 128)
    np.testing.assert_allclose(sixteenth(k), 2.0 ** (k / 16), rtol=6e-8)


def test_overlays_act_in_order_and_may_repeat():
    first = OVERLAYS["outliers"].encode(np.array([0]), np.array([2.0], np.float16), 2)
    double = OVERLAYS["groups"].encode(np.array([[16]], np.int8), 2)
    base = (2, struct.pack("<ffB", 1.5, 0, 0))
    for stacked, wanted in (([(34, first), (36, double)], [4.0, 3.0]), ([(36, double), (34, first)], [2.0, 3.0])):
        assert decode_units(container.parse(file((1, 2), base, *stacked)))["a"].tolist() == [wanted]


def test_only_files_with_a_stack_need_the_newer_version():
    assert golden_parts.tiny()[8:10] == b"\x01\x00"
