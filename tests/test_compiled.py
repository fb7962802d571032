"""Machine code and numpy decode every file to the same bits, and refuse the same files."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import golden_parts
from bytecap import errors
from bytecap.format import container
from bytecap.format.decoder import decode_units
from bytecap.format.entropy import jit
from bytecap.format.entropy.frequencies import TOTAL, Table, Tables
from bytecap.format.entropy.rans import Stream, decode, encode, encode_all
from test_entropy import sources

EXPECTED = json.loads((golden_parts.DIRECTORY / "expected.json").read_text())
ALL = [name for kind in EXPECTED.values() for name in kind]


def outcome(data, *, engine):
    """Decoded bytes by name, or the class of the error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jit, "worth", lambda _: engine)
        try:
            return {n: v.tobytes() for n, v in decode_units(container.parse(data)).items()}
        except errors.ArtifactError as error:
            return type(error)


@pytest.mark.parametrize("name", ALL)
def test_every_golden_valid_or_not(name):
    data = (golden_parts.DIRECTORY / name).read_bytes()
    assert outcome(data, engine=True) == outcome(data, engine=False)


def streams_outcome(streams, *, engine):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jit, "worth", lambda _: engine)
        try:
            return [z.tolist() for z in decode(streams)]
        except errors.CorruptError:
            return "corrupt"


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.lists(sources(), max_size=3))
def test_both_encode_to_the_same_bytes(group):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jit, "worth", lambda _: True)
        fast = encode_all(group)
        patch.setattr(jit, "worth", lambda _: False)
        assert fast == encode_all(group)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.lists(sources(), min_size=1, max_size=3), st.data())
def test_streams_whole_and_damaged(group, data):
    encoded = encode_all(group)
    streams = [Stream(d, s.classes, s.tables) for d, s in zip(encoded, group, strict=True)]
    assert streams_outcome(streams, engine=True) == [s.symbols.tolist() for s in group]
    victim = data.draw(st.integers(0, len(streams) - 1))
    hurt = bytearray(encoded[victim])
    if hurt:
        at = data.draw(st.integers(0, len(hurt) - 1))
        hurt[at] ^= data.draw(st.integers(1, 255))
        hurt = hurt[: data.draw(st.integers(0, len(hurt)))] if data.draw(st.booleans()) else hurt
        streams[victim] = Stream(bytes(hurt), group[victim].classes, group[victim].tables)
    assert streams_outcome(streams, engine=True) == streams_outcome(streams, engine=False)


def test_a_class_without_a_table_is_refused(monkeypatch):
    monkeypatch.setattr(jit, "worth", lambda _: True)
    tables = Tables({3: Table(0, np.array([TOTAL - 1, 1]))})
    with pytest.raises(errors.CorruptError, match="class 5 has no table"):
        decode([Stream(encode(np.zeros(2, np.int32), np.full(2, 3), tables), np.array([3, 5], np.uint8), tables)])


def test_more_escapes_than_bytes_are_refused(monkeypatch):
    monkeypatch.setattr(jit, "worth", lambda _: True)
    tables = Tables({1: Table(0, np.array([1, TOTAL - 1]))})
    whole = encode(np.full(9, 70), np.ones(9, np.uint8), tables)
    with pytest.raises(errors.CorruptError, match="escaped"):
        decode([Stream(whole[:-9], np.ones(9, np.uint8), tables)])
