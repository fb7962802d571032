"""Others plant things where bytecap writes: links and pipes under names it opens, rubbish with a good checksum, files
that look like its own; and directories that are written whole or not at all."""

import io
import os
import zipfile

import numpy as np
import pytest

from bytecap.errors import OutputError
from bytecap.system import atomic
from bytecap.system.atomic import write_atomically
from bytecap.system.cache import Store, _start, digest

fcntl = pytest.importorskip("fcntl")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="links, pipes and locks")
KEY = digest("a")


# ------------------------------------------------------------------------------------------------------------- store


def test_a_lock_that_is_a_link_is_not_opened(tmp_path):
    victim, store = tmp_path / "victim", Store(tmp_path / "store")
    victim.write_bytes(b"precious")
    (tmp_path / "store" / f"{KEY}.lock").symlink_to(victim)
    said = r"cannot lock .*\.lock: it is a link or no regular file; remove it"
    with pytest.raises(OutputError, match=said), store.lock(KEY):
        pass
    assert victim.read_bytes() == b"precious"


@pytest.mark.parametrize("kind", ["pipe", "directory", "contents"])
def test_other_things_in_the_place_of_a_lock(tmp_path, kind):
    store, path = Store(tmp_path), tmp_path / f"{KEY}.lock"
    if kind == "contents":
        path.hardlink_to(tmp_path / "victim") if (tmp_path / "victim").write_bytes(b"precious") else None
        with store.lock(KEY):
            pass
        assert (tmp_path / "victim").read_bytes() == b"precious"
        return
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    with pytest.raises(OutputError, match="cannot lock"), store.lock(KEY):
        pass


def plant(directory, name, content):
    """An entry whose checksum is right: it needs no secret."""
    total = _start(name)
    total.update(content)
    (directory / name).write_bytes(total.digest() + content)


def archive(method=zipfile.ZIP_STORED, **members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as z:
        for name, content in members.items():
            z.writestr(f"{name}.npy", content)
    return out.getvalue()


def array(value):
    out = io.BytesIO()
    np.save(out, value, allow_pickle=True)
    return out.getvalue()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b"nan", b"9" * 10_000])
def test_rubbish_values_count_as_absent(tmp_path, content):
    store = Store(tmp_path)
    plant(tmp_path, f"{KEY}.json", content)
    found = store.get(KEY)
    assert found is None
    assert store.found == 0
    store.put(KEY, [1])
    assert store.get(KEY) == [1]


RUBBISH = {
    "nothing": b"",
    "text": b"rubbish",
    "an array": array(np.zeros(3)),
    "an archive cut short": archive(a=array(np.zeros(99)))[:200],
    "no array inside": archive(a=b"text"),
    "a pickle": archive(a=array(np.array([{}], object))),
    "empty inside": archive(a=b""),
    "a header": archive(a=b"\x93NUMPY\x01\x00\x10\x00{'descr': '<f8', "),
    "a pickle alone": b"\x80\x04N.",
    "a shape": archive(a=array(np.zeros(1)).replace(b"(1,)", b"(9,)")),
    "a shape beyond": archive(a=array(np.zeros(1)).replace(b"(1,), }   ", b"(1<<60,)} ")),
    "a bomb": archive(zipfile.ZIP_DEFLATED, a=array(np.zeros(1 << 20))),
}


@pytest.mark.parametrize("kind", RUBBISH)
def test_rubbish_arrays_count_as_absent(tmp_path, kind):
    store = Store(tmp_path)
    plant(tmp_path, f"{KEY}.npz", RUBBISH[kind])
    assert store.arrays(KEY) is None
    assert store.found == 0
    store.put_arrays(KEY, {"a": np.arange(3)})
    assert store.arrays(KEY)["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("kind", ["pipe", "link", "directory"])
def test_entries_that_are_no_files(tmp_path, kind):
    store, path = Store(tmp_path / "store"), tmp_path / "store" / f"{KEY}.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        plant(tmp_path, f"{KEY}.json", b"3")
        path.symlink_to(tmp_path / f"{KEY}.json")
    else:
        path.mkdir()
    assert store.get(KEY) is None  # and at once


# ------------------------------------------------------------------------------------------------------------- sweep


STRANGERS = [".a.12345678.tmp", ".a.abcdefgh.tmp", ".a.12345678.bytecap", ".a.1234567.bytecap.tmp"]


@pytest.mark.parametrize("name", STRANGERS)
def test_a_strangers_file_stays(tmp_path, name):
    (tmp_path / name).write_bytes(b"precious")
    write_atomically(b"x", tmp_path / "a")
    assert (tmp_path / name).read_bytes() == b"precious"


def test_links_and_files_of_others_stay(tmp_path, monkeypatch):
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / ".a.12345678.bytecap.tmp").symlink_to(tmp_path / "victim")
    (tmp_path / ".a.abcdefgh.bytecap.tmp").write_bytes(b"theirs")
    os.mkfifo(tmp_path / ".a.pipepipe.bytecap.tmp")
    with monkeypatch.context() as m:
        m.setattr(atomic.os, "geteuid", lambda: 12345)
        write_atomically(b"x", tmp_path / "a")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".a")) == [
        ".a.12345678.bytecap.tmp", ".a.abcdefgh.bytecap.tmp", ".a.pipepipe.bytecap.tmp",
    ]  # fmt: skip
    write_atomically(b"x", tmp_path / "a")  # what is our own goes
    assert not (tmp_path / ".a.abcdefgh.bytecap.tmp").exists()
    assert (tmp_path / "victim").read_bytes() == b"precious"
    assert (tmp_path / ".a.12345678.bytecap.tmp").is_symlink()


OTHERS = [pytest.param(c, marks=pytest.mark.nightly) for c in (b"3", b'{"steps": {}}', b'"x"', b"null", b"[[1]]")]


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"[]", *OTHERS])
def test_values_that_no_run_has_written(job, run, tmp_path, content):
    """Every entry of a finished fit replaced by rubbish with a good checksum: a line, or the same file again."""
    words = [*job(), "--store", tmp_path / "store", "--method", "bytecap"]
    assert run(*words)[0] == 0
    whole = (tmp_path / "out.bcap").read_bytes()
    for path in sorted((tmp_path / "store").glob("*.*")):
        kept = path.read_bytes()
        plant(tmp_path / "store", path.name, content if path.suffix == ".json" else archive(a=array(np.zeros(3))))
        code, _, err = run(*words, "--json")
        assert code in {0, 2}
        assert "unexpected" not in err
        assert code == 0 or f"the store {tmp_path / 'store'} seems to hold" in err or err.startswith("error: ")
        path.write_bytes(kept)
    assert run(*words)[0] == 0
    assert (tmp_path / "out.bcap").read_bytes() == whole
