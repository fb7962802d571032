"""docs/format.md is enough: a reader written from it alone agrees with the goldens."""

import json
from pathlib import Path

import pytest

from make_goldens import digest
from stranger.basics import FormatError
from stranger.reader import read

DIRECTORY = Path(__file__).parent / "goldens"
EXPECTED = json.loads((DIRECTORY / "expected.json").read_text("utf-8"))
UPDATES = json.loads((DIRECTORY / "updates" / "expected.json").read_text("utf-8"))


@pytest.mark.parametrize("name", sorted(EXPECTED["valid"]))
def test_valid(name):
    found = read((DIRECTORY / name).read_bytes())
    assert digest(found.tensors) == EXPECTED["valid"][name]


@pytest.mark.parametrize("name", sorted(UPDATES))
def test_update(name):
    bases, wanted = UPDATES[name]
    data, *below = ((DIRECTORY / "updates" / f"{n}.bcap").read_bytes() for n in (name, *bases))
    if wanted.endswith("Error"):
        with pytest.raises(FormatError) as caught:
            read(data, below)
        assert type(caught.value).__name__ == wanted
    else:
        assert digest(read(data, below).tensors) == wanted


@pytest.mark.parametrize("name", sorted(EXPECTED["invalid"]))
def test_invalid(name):
    with pytest.raises(FormatError) as caught:
        read((DIRECTORY / name).read_bytes())
    assert type(caught.value).__name__ == EXPECTED["invalid"][name]
