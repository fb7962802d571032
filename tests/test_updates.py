"""Updates: files that hold what differs from another file, in both decoders."""

import json

import numpy as np
import pytest

import golden_updates
import make_goldens
from bytecap import errors, load, reference
from bytecap.format import container, updates
from bytecap.format.decoder import decode_units
from stranger.basics import FormatError
from stranger.reader import read as stranger

pytestmark = pytest.mark.coverage

DIRECTORY = make_goldens.DIRECTORY / "updates"
EXPECTED = json.loads((DIRECTORY / "expected.json").read_text("utf-8"))


def ours(data, bases):
    return decode_units(golden_updates.with_bases(data, bases))


def golden(name):
    return (DIRECTORY / f"{name}.bcap").read_bytes()


def outcome(decoder, data, bases):
    """What a decoder makes of a file and its bases: a digest, or the name of its error."""
    try:
        return make_goldens.digest(decoder(data, bases))
    except errors.ArtifactError as error:
        return type(error).__name__


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("decoder", [ours, reference.decode_file])
def test_both_decoders_read_or_refuse_a_golden_as_expected(name, decoder):
    bases, wanted = EXPECTED[name]
    assert outcome(decoder, golden(name), [golden(b) for b in bases]) == wanted


def test_both_decoders_give_the_same_names_in_the_same_order():
    for name, (bases, wanted) in EXPECTED.items():
        if not wanted.endswith("Error"):
            files = golden(name), [golden(b) for b in bases]
            assert list(ours(*files)) == list(reference.decode_file(*files)) == list(ours(golden("base"), []))


def test_an_update_changes_what_it_lists_and_nothing_else():
    below, above = ours(golden("base"), []), ours(golden("all"), [golden("base")])
    alone = container.parse(golden("all"))
    added = {
        name: decode_units(container.parse(golden_updates.pack(golden_updates.unit(name, shape, tag, section))))[name]
        for name, shape, tag, section in (
            ("a.weight", (24, 40), 9, golden_updates.trellis((24, 40), seed=3)),
            ("norm", (40,), 2, golden_updates.vector(np.arange(40) / 4)),
        )
    }
    np.testing.assert_array_equal(above["a.weight"], below["a.weight"] + added["a.weight"])
    np.testing.assert_array_equal(above["norm"], added["norm"])
    np.testing.assert_array_equal(above["kept"], below["kept"])
    assert "kept" not in {u.unit.name for u in alone.units}
    assert above["count"] == 8
    assert above["head"] is above["embed"]


@pytest.mark.parametrize("name", ["all", "second", "nothing"])
def test_a_reader_that_knows_no_updates_refuses_them(name):
    with pytest.raises(FormatError):
        stranger(golden(name))


def test_every_flipped_bit_of_an_update_is_noticed():
    data, base = golden("on_empty"), [golden("base"), golden("nothing")]
    for place in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        for decoder in (ours, reference.decode_file):
            assert outcome(decoder, bytes(flipped), base).endswith(("Error", "NotAnArtifact"))


def test_an_update_says_which_base_it_needs(tmp_path):
    for name in ("all", "base", "other"):
        (tmp_path / f"{name}.bcap").write_bytes(golden(name))
    right, wrong = (golden_updates.sha256(golden(n)) for n in ("base", "other"))
    with pytest.raises(errors.BaseError, match=f"all.bcap is an update of .* {right}: give that file .*--base FILE"):
        load(tmp_path / "all.bcap")
    with pytest.raises(errors.BaseError, match=f"{right}, and .*other.bcap has SHA-256 {wrong}"):
        load(tmp_path / "all.bcap", tmp_path / "other.bcap")
    with pytest.raises(errors.BaseError, match=r"base.bcap is no update.*other.bcap"):
        load(tmp_path / "base.bcap", [tmp_path / "other.bcap"])
    assert list(load(tmp_path / "all.bcap", tmp_path / "base.bcap")) == list(load(tmp_path / "base.bcap"))


def test_side_files_of_the_base_are_kept_replaced_or_left_out():
    from bytecap.format.codefiles import files

    found = golden_updates.with_bases(golden("all"), [golden("base")])
    assert files(found, (container.FILE,)) == {"tokenizer.json": b"[1]", "config.json": b'{"a":1}', "new.json": b"2"}
    assert files(found) == {}
    assert updates.names_of(found) == ["tokenizer.json", "config.json", "new.json"]
    second = golden_updates.with_bases(golden("second"), [golden("base"), golden("all")])
    assert updates.names_of(second) == ["tokenizer.json", "config.json"]


def test_an_update_is_decoded_in_groups_like_any_file():
    from bytecap.format.decoder import decode_each

    contents = golden_updates.with_bases(golden("second"), [golden("base"), golden("all")])
    whole = decode_units(contents)
    for values in (1, 2**17, 2**25):
        for threads in (1, 2):
            found = list(decode_each(contents, values=values, threads=threads))
            assert [u.name for u, _ in found] == [u.name for u in updates.units_of(contents)]
            for unit, array in found:
                np.testing.assert_array_equal(array, whole[unit.name])


def test_an_update_round_trips_through_the_writer():
    for name in ("all", "nothing", "second"):
        assert container.serialize(container.parse(golden(name))) == golden(name)
        assert golden(name)[9] == 3
