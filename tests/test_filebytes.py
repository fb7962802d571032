"""Bytes of a file that are read when they are asked for."""

import zlib

import pytest

from bytecap.format import filebytes

pytestmark = pytest.mark.coverage


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("many", [0, 2**40])
def test_checksums_by_one_thread_or_several(many, opened, tmp_path, monkeypatch):
    monkeypatch.setattr(filebytes, "_MANY", many)
    monkeypatch.setattr(filebytes, "_PIECE", 7)
    raw = bytes(range(100))
    (tmp_path / "raw").write_bytes(raw)
    places = [(0, 0), (3, 90), (90, 100), (5, 6)]
    found = filebytes.checksums(filebytes.FileBytes(tmp_path / "raw") if opened else raw, places)
    assert found == [zlib.crc32(raw[a:b]) for a, b in places]


@pytest.mark.parametrize("most", [0, 2**30])
def test_slices_of_a_file(most, tmp_path, monkeypatch):
    """By one call of the system, or by moving to the place first, as large slices and other systems need it."""
    monkeypatch.setattr(filebytes, "_AT_ONCE", most)
    (tmp_path / "raw").write_bytes(b"abcdef")
    data = filebytes.FileBytes(tmp_path / "raw")
    assert (data[:], data[2:4], data[5:2], data[4:99]) == (b"abcdef", b"cd", b"", b"ef")
