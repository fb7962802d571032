"""Names that some system gives another meaning: devices, aliases, links, letters of another case, too many letters."""

import contextlib
import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import bytecap
from bytecap.errors import ArtifactError, BytecapError, OutputError, UsageError
from bytecap.format import container, decoder
from bytecap.format.container import FileSection
from bytecap.format.sidefiles import names, packing
from bytecap.model.fileset import INDEX, WEIGHTS, check_safetensors, read_headers
from bytecap.pipeline import export
from bytecap.pipeline.pack_code import pack
from bytecap.report import lines
from bytecap.runtimes import hub
from bytecap.system import directories
from bytecap.system.cache import Store
from test_hostile import VECTOR, index, made, unit

POSIX = pytest.mark.skipif(os.name != "posix", reason="links and pipes")
ODD = ["CON", "nul.txt", "a:b", "trailing. ", "x" * 300, "a|b?*<>", "\u202ea", "COM\u00b9", "..\\x", "[red]x[/]"]


# ------------------------------------------------------------------------------------------------------- side files


@pytest.mark.parametrize("name", ["MODEL~1.SAF", "confi~12.jso", "TOKENI~2", "a~1.b", "x~1.py"])
def test_short_aliases_of_windows(name):
    """A file system that makes short names calls a longer file beside it so."""
    assert names.fault(name) == "may be the short name of another file on Windows"


@pytest.mark.parametrize(
    "name", ["a~.txt", "~1.txt", "backup~1.jsonl", "longername~1.txt", "a~1.b.c", "tokenizer~1.json"]
)
def test_names_that_are_no_short_aliases(name):
    assert names.fault(name) is None


@pytest.mark.parametrize("name", ["model.bcap", "MODEL.BCAP", "other.bcap"])
def test_a_second_model_is_no_side_file(name):
    assert names.fault(name) == "would stand for the weights"


def with_file(contents, *added):
    """Contents with more side files."""
    more = tuple(FileSection(n, packing.pack(n, b"x")) for n in added)
    return replace(contents, files=(*contents.files, *more))


@pytest.mark.parametrize("added", [
    ("model.bcap",), ("model.safetensors",), ("aux.txt",), ("Tokenizer.json",), ("CONFIG.JSON",), ("readme.md",),
    ("MODEL~1.BCA",), (hub.SHARDS,),
])  # fmt: skip
def test_directories_for_hubs(fitted, added):
    """Names of a stranger's artifact take no file's place in a directory that is sent to a hub."""
    contents = with_file(container.read(fitted("rotary")[1]), *added)
    with pytest.raises(ArtifactError, match=r"must not have the name|are one file"):
        hub.layout(contents, decoder.side_files(contents))


@pytest.mark.parametrize("added", ["aux.py", "con.txt", "x .py.", "a:b.py", "A~1.PY", "y" * 300 + ".py", "train.ckpt"])
def test_code_that_could_not_be_unpacked_is_refused_when_it_is_packed(tmp_path, added):
    (tmp_path / added[:200]).write_text("x = 1\n", "utf-8")
    path = tmp_path / added[:200] if len(added) < 200 else tmp_path / added
    with pytest.raises(UsageError if len(added) < 200 else BytecapError):
        pack([path])


def test_code_of_two_spellings(tmp_path):
    for at, name in (("one", "Train.py"), ("two", "train.py")):
        (tmp_path / at).mkdir()
        (tmp_path / at / name).write_text("x = 1\n", "utf-8")
    with pytest.raises(UsageError, match=r"Train\.py.*train\.py.* one file where case does not count"):
        pack([tmp_path / "one" / "Train.py", tmp_path / "two" / "train.py"])


@pytest.mark.slow
def test_code_beside_a_side_file_of_its_name(copied, texts, tmp_path):
    """Sound files are written, or none: what a fit writes, `unpack` takes."""
    (tmp_path / "Config.json").write_text("{}", "utf-8")
    with pytest.raises(UsageError, match=r"Config\.json"):
        bytecap.fit(
            copied, 60_000, calibration=texts["calib"], evaluation=texts["val"], code=[tmp_path / "Config.json"],
            method="uniform", output=tmp_path / "a.bcap", tokens=2000, evaluation_tokens=1000,
        )  # fmt: skip
    assert not (tmp_path / "a.bcap").exists()


# ----------------------------------------------------------------------------------------------------------- tensors


def test_tensors_of_odd_names(run, tmp_path):
    """A tensor's name is never a file's: it goes through a file and a directory as it is, also beside its twin."""
    path, listed = tmp_path / "a.bcap", [*ODD, "w", "W", "..", "/etc/passwd", "~1"]
    path.write_bytes(made((1, index([unit(n) for n in listed])), *[(3, VECTOR)] * len(listed)))
    assert run("check", path)[0] == 0
    assert set(bytecap.load(path)) == set(listed)
    assert run("unpack", path, "-o", tmp_path / "out")[0] == 0
    assert set(load_file(tmp_path / "out" / WEIGHTS)) == set(listed)
    assert [p.name for p in (tmp_path / "out").iterdir()] == [WEIGHTS]
    for command in ("ledger", "inspect"):
        code, out, err = run(command, path)
        assert (code, err) == (0, "")
        assert "\u202e" not in out


def test_checkpoints_with_tensors_of_odd_names(tmp_path):
    directory = tmp_path / "m"
    directory.mkdir()
    save_file({n: torch.ones(2, 2) for n in (*ODD, "w", "W")}, directory / WEIGHTS)
    (directory / "config.json").write_text("{}", "utf-8")
    headers, _ = read_headers(directory)
    assert set(headers[directory / WEIGHTS]) == {*ODD, "w", "W"}


# ------------------------------------------------------------------------------------------------------------ shards


def sharded(directory, source, first, second):
    """The tensors of a directory in two files, half of them in each."""
    found = load_file(source / WEIGHTS)
    halves = sorted(found)[: len(found) // 2], sorted(found)[len(found) // 2 :]
    (directory / WEIGHTS).unlink()
    for name, half in zip((first, second), halves, strict=True):
        save_file({n: found[n] for n in half}, directory / name[:200], metadata={"format": "pt"})
    weight_map = {n: s for s, half in zip((first, second), halves, strict=True) for n in half}
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), "utf-8")
    return directory


@pytest.mark.parametrize(
    "name", ["x" * 300 + ".safetensors", "..", ".", "", "a/b", "a\0b", "\ud800.safetensors", "x" * 10**6]
)
@pytest.mark.parametrize("where", ["index", "config"])
def test_names_of_shards_that_no_file_has(copied, edited_config, refused, where, name):
    if where == "index":
        weight_map = dict.fromkeys(check_safetensors(copied / WEIGHTS), name)
        (copied / WEIGHTS).unlink()
        (copied / INDEX).write_text(json.dumps({"weight_map": weight_map}), "utf-8")
    else:
        edited_config(copied, transformers_weights=name)
    line = refused("inspect", copied)
    assert len(line) < 600
    assert str(copied) in line


@POSIX
@pytest.mark.parametrize("way", ["link", "hard link"])
def test_shards_that_are_one_file(copied, refused, way):
    """As on a file system that ignores case, where two names of an index may mean one file."""
    (copied / WEIGHTS).rename(copied / "A.safetensors")
    other = copied / "a.safetensors"
    other.symlink_to(copied / "A.safetensors") if way == "link" else other.hardlink_to(copied / "A.safetensors")
    listed = sorted(check_safetensors(other))
    weight_map = {n: f"{'aA'[i % 2]}.safetensors" for i, n in enumerate(listed)}
    (copied / INDEX).write_text(json.dumps({"weight_map": weight_map}), "utf-8")
    assert f"both hold tensor {listed[0]}" in refused("inspect", copied)


@pytest.mark.slow
def test_shards_that_differ_in_case(copied, model_directory, run):
    source = model_directory("rotary")
    sharded(copied, source, "Part.safetensors", "part.safetensors")
    if len(list(copied.glob("*art.safetensors"))) < 2:
        pytest.skip("a file system that ignores case")
    code, _, err = run("inspect", copied, "--json")
    assert code == 0, err


# ------------------------------------------------------------------------------------- outputs: links, pipes, lengths


@POSIX
@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "device", "directory"])
def test_records_are_never_added_through_what_was_planted(tmp_path, kind):
    path, victim = tmp_path / "compare.jsonl", tmp_path / "victim"
    victim.write_bytes(b"precious")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to({"link": victim, "dangling": tmp_path / "none", "device": "/dev/full"}[kind])
    with pytest.raises(OutputError, match=r"cannot write .*compare\.jsonl"):
        lines.append(path, [{"record": "run"}])
    assert victim.read_bytes() == b"precious"
    assert not (tmp_path / "none").exists()


def test_records_behind_a_torn_line(tmp_path):
    path = tmp_path / "a.jsonl"
    for content, torn in ((None, b""), (b"", b""), (b'{"rec', b'{"rec\n'), (b"{}\n", b"{}\n")):
        if content is not None:
            path.write_bytes(content)
        lines.append(path, [{"record": "a"}, {"record": "b"}])
        assert path.read_bytes() == torn + b'{"record": "a"}\n{"record": "b"}\n'
        path.unlink()


@pytest.mark.parametrize("option", ["-o", "--report", "--store"])
def test_outputs_of_too_many_letters(refused, job, tmp_path, option):
    long = tmp_path / ("x" * 300)
    words = job(output=long) if option == "-o" else [*job(), option, long]
    assert "x" * 30 in refused(*words)


@pytest.mark.parametrize("kind", ["json", "npz", "lock"])
@POSIX
def test_store_entries_that_are_hard_links(tmp_path, kind):
    """Entries are replaced, never written into: what else a name leads to stays as it is."""
    store, victim, key = Store(tmp_path / "store"), tmp_path / "victim", "0" * 32
    victim.write_bytes(b"precious")
    (tmp_path / "store" / f"{key}.{kind}").hardlink_to(victim)
    with store.lock(key):
        store.put(key, [1])
        store.put_arrays(key, {"a": torch.ones(3).numpy()})
    assert store.get(key) == [1]
    assert victim.read_bytes() == b"precious"


@POSIX
@pytest.mark.parametrize("kind", ["directory", "pipe", "device"])
def test_store_entries_that_cannot_be_written(tmp_path, kind):
    store, key = Store(tmp_path / "store"), "0" * 32
    path = tmp_path / "store" / f"{key}.json"
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/full")
    with pytest.raises(OutputError, match=rf"cannot write .*{key}\.json"):
        store.put(key, [1])


@POSIX
def test_unpack_replaces_links_and_writes_into_nothing_else(fitted, run, tmp_path):
    out, victim, other = tmp_path / "out", tmp_path / "victim", tmp_path / "other"
    out.mkdir()
    for path in (victim, other):
        path.write_bytes(b"precious")
    (out / WEIGHTS).symlink_to(victim)
    (out / "tokenizer.json").hardlink_to(other)
    (out / "config.json").symlink_to(tmp_path / "none")
    code, _, err = run("unpack", fitted("rotary")[1], "-o", out)
    assert code == 0, err
    assert victim.read_bytes() == other.read_bytes() == b"precious"
    assert not (tmp_path / "none").exists()
    assert not any(p.is_symlink() for p in out.iterdir())


@POSIX
def test_unpack_into_a_place_that_changes(fitted, tmp_path, monkeypatch):
    """A link that is planted between the look and the write is replaced, not followed."""
    out, victim = tmp_path / "out", tmp_path / "victim"
    out.mkdir()
    victim.write_bytes(b"precious")
    real = directories._into_place

    def late(stage, directory, *rest):
        (directory / WEIGHTS).symlink_to(victim)
        real(stage, directory, *rest)

    monkeypatch.setattr(directories, "_into_place", late)
    export.unpack(fitted("rotary")[1], out)
    assert victim.read_bytes() == b"precious"
    assert not (out / WEIGHTS).is_symlink()


@POSIX
@pytest.mark.parametrize("kind", ["link", "link to nothing", "link to a file", "link to others"])
@pytest.mark.parametrize("exchange", [True, False])
def test_a_directory_in_place_of_a_link(tmp_path, monkeypatch, kind, exchange):
    """The link is replaced; what it leads to stays, and nothing is left beside it."""
    place, real = tmp_path / "place", tmp_path / "real"
    place.mkdir()
    real.mkdir()
    (real / "config.json").write_bytes(b"precious")
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "x").write_bytes(b"precious")
    leads = {"link": real, "link to nothing": tmp_path / "none", "link to a file": real / "config.json"}
    (place / "out").symlink_to(leads.get(kind, tmp_path / "others"))
    if not exchange:
        monkeypatch.setattr(directories, "_swapped", lambda *_: False)
    refused = kind in {"link to a file", "link to others"}
    said = pytest.raises(OutputError) if refused else contextlib.nullcontext()
    with said, directories.replacing_directory(place / "out") as made:
        (made / "config.json").write_bytes(b"new")
    assert [p.name for p in place.iterdir()] == ["out"]
    assert (place / "out").is_symlink() == refused
    assert refused or (place / "out" / "config.json").read_bytes() == b"new"
    assert (real / "config.json").read_bytes() == (tmp_path / "others" / "x").read_bytes() == b"precious"
    assert not (tmp_path / "none").exists()
