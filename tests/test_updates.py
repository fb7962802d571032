"""Updates: files that hold what differs from another file, in both decoders."""

import json
import random
import struct
import tracemalloc
from dataclasses import replace

import brotli
import numpy as np
import pytest

import fuzz
import golden_parts
import golden_updates
import make_goldens
from bytecap import errors, load, reference
from bytecap.format import container, updates
from bytecap.format.coders.stack import CODER as STACK
from bytecap.format.decoder import decode_units
from bytecap.format.overlays import lowrank
from bytecap.model.from_artifact import load_into
from bytecap.pipeline.export import open_directory, unpack
from bytecap.reference import overlays

pytestmark = pytest.mark.coverage

DIRECTORY = make_goldens.DIRECTORY / "updates"
EXPECTED = json.loads((DIRECTORY / "expected.json").read_text("utf-8"))


def ours(data, bases):
    return decode_units(golden_updates.with_bases(data, bases))


def golden(name):
    return (DIRECTORY / f"{name}.bcap").read_bytes()


def outcome(decoder, data, bases):
    """Outcome of a decoder on a file and its bases: a digest, or the name of its error."""
    try:
        return make_goldens.digest(decoder(data, bases))
    except errors.ArtifactError as error:
        return type(error).__name__


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("decoder", [ours, reference.decode_file])
def test_both_decoders_read_or_refuse_a_golden_as_expected(name, decoder):
    bases, wanted = EXPECTED[name]
    assert outcome(decoder, golden(name), [golden(b) for b in bases]) == wanted


@pytest.mark.slow
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


@pytest.mark.parametrize("command", ["check", "ledger", "unpack", "eval", "generate"])
def test_every_command_refuses_another_base(command, refused, tmp_path):
    update, other = DIRECTORY / "all.bcap", DIRECTORY / "other.bcap"
    more = {"unpack": ("-o", tmp_path / "out"), "generate": ("a",)}.get(command, ())
    line = refused(command, update, *more, "--base", other)
    for data in (golden("base"), golden("other")):
        assert f"SHA-256 {golden_updates.sha256(data)}" in line
    assert not (tmp_path / "out").exists()


def test_side_files_of_the_base_are_kept_replaced_or_left_out():
    from bytecap.format.codefiles import files

    found = golden_updates.with_bases(golden("all"), [golden("base")])
    assert files(found, (container.FILE,)) == {"tokenizer.json": b"[1]", "config.json": b'{"a":1}', "new.json": b"2"}
    assert files(found) == {}
    assert updates.names_of(found) == ["tokenizer.json", "config.json", "new.json"]
    second = golden_updates.with_bases(golden("second"), [golden("base"), golden("all")])
    assert updates.names_of(second) == ["tokenizer.json", "config.json"]


def test_the_file_that_stands_on_all_others_is_found(tmp_path):
    names = ("base", "all", "second")
    for name in names:
        (tmp_path / f"{name}.bcap").write_bytes(golden(name))
    for order in (names, names[::-1], ("all", "second", "base")):
        name, sha256, contents = updates.last([tmp_path / f"{n}.bcap" for n in order])
        assert name.endswith("second.bcap")
        assert sha256 == golden_updates.sha256(golden("second"))
        assert [c.base is None for c in updates.chain(contents)] == [True, False, False]
    assert updates.last(updates.paths_of(str(tmp_path / "base.bcap")))[2].base is None


def test_what_unpack_writes_of_an_update(tmp_path):
    contents = golden_updates.with_bases(golden("all"), [golden("base")])
    opened = open_directory(contents)
    assert sorted(opened.files) == ["config.json", "new.json", "tokenizer.json"]
    assert json.loads(opened.files["config.json"])["a"] == 1
    for name in ("all", "base"):
        (tmp_path / f"{name}.bcap").write_bytes(golden(name))
    unpack(tmp_path / "all.bcap", tmp_path / "out", base=tmp_path / "base.bcap")
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 1000
    with pytest.raises(errors.BaseError):
        open_directory(container.parse(golden("all")))


def test_an_update_is_put_into_a_module(tmp_path):
    torch = pytest.importorskip("torch")
    for name in ("all", "base"):
        (tmp_path / f"{name}.bcap").write_bytes(golden(name))
    values = load(tmp_path / "all.bcap", tmp_path / "base.bcap")
    module = torch.nn.Module()
    for name in ("norm", "kept", "embed", "turned"):
        module.register_buffer(name, torch.zeros(values[name].shape))
    with pytest.raises(errors.ArtifactError, match="the module lacks"):
        load_into(tmp_path / "all.bcap", module, tmp_path / "base.bcap")
    with pytest.raises(errors.BaseError):
        load_into(tmp_path / "all.bcap", module)


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


def test_a_difference_needs_version_3_even_where_it_is_out_of_place():
    data = golden("bad_without_base")
    assert data[9] == 3
    assert golden("bad_bare_without_base")[9] == 3


@pytest.mark.slow
@pytest.mark.parametrize("count", [200, pytest.param(400, marks=pytest.mark.nightly)])
def test_both_decoders_agree_on_mutated_updates(count):
    rng, agreed = random.Random(5), 0  # noqa: S311 (no secret)
    names = [n for n, (_, wanted) in EXPECTED.items() if not wanted.endswith("Error")]
    sound = [golden(n) for n in names]
    for _ in range(count):
        name = rng.choice(names)
        bases = [golden(b) for b in EXPECTED[name][0]]
        data = fuzz.mutate(golden(name), rng, sound, "repaired")
        found = outcome(ours, data, bases)
        second = outcome(reference.decode_file, data, bases)
        assert found == second or {found, second} == {"BaseError", "CorruptError"}  # 4.1 leaves open which comes first
        agreed += not found.endswith("Error")
    assert agreed > count // 40


@pytest.mark.nightly
def test_both_decoders_agree_on_updates_of_mutated_bases():
    rng, agreed = random.Random(6), 0  # noqa: S311 (no secret)
    whole, update = golden("base"), golden("all")
    for _ in range(200):
        base = fuzz.mutate(whole, rng, [whole], "repaired")
        contents = container.parse(update)
        moved = container.serialize(replace(contents, base=replace(contents.base, sha256=golden_updates.sha256(base))))
        found = outcome(ours, moved, [base])
        assert found == outcome(reference.decode_file, moved, [base])
        agreed += not found.endswith(("Error", "NotAnArtifact"))
    assert agreed > 5


def test_the_work_of_an_update_is_bounded_by_its_own_length(monkeypatch):
    """Layers of nothing over units that the base declares cheaply."""
    shape, zeros = (4096, 2048), bytes([255, 2, 1]) + bytes(4 * 255) + brotli.compress(bytes(255 * (4096 + 2048)))
    base = golden_parts.pack(golden_parts.unit("w", shape, 2, struct.pack("<ffB", 0, 1, 0)), tables=False)
    layers = [(35, zeros)] * 3
    update = golden_updates.update(golden_parts.unit("w", shape, 5, STACK.encode((16, b""), layers)), on=base)
    monkeypatch.setattr(lowrank, "np", None)  # nothing may be decoded
    monkeypatch.setattr(overlays, "np", None)
    for decoder in (ours, reference.decode_file):
        with pytest.raises(errors.CorruptError, match=r"work"):
            decoder(update, [base])


def test_memory_does_not_grow_with_the_length_of_a_chain():
    shape = (1024, 512)
    files = [golden_parts.pack(golden_parts.unit("w", shape, 2, struct.pack("<ffB", 1, 1, 0)), tables=False)]
    for _ in range(6):
        added = golden_updates.difference((2, struct.pack("<ffB", 1, 1, 0)))
        files.append(golden_updates.update(golden_parts.unit("w", shape, 5, added), on=files[-1]))
    peaks = []
    for count in (2, 7):
        tracemalloc.start()
        try:
            values = ours(files[count - 1], files[: count - 1])["w"]
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        assert (values == count).all()
    assert peaks[1] < 1.2 * peaks[0]
