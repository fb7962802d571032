"""What others plant where bytecap writes: links and pipes under names it opens, rubbish with a good checksum, files
that look like its own; and directories that are written whole or not at all."""

import errno
import io
import os
import shutil
import signal
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from bytecap.errors import CheckpointError, OutputError
from bytecap.model.fileset import weight_files
from bytecap.system import atomic, directories
from bytecap.system.atomic import write_atomically
from bytecap.system.cache import Store, _start, digest
from bytecap.system.directories import interrupted, recover, replacing_directory, write_directory

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


# ------------------------------------------------------------------------------------------------- whole directories

OLD = {"a": b"old a", "b": b"old b", "other": b"stays"}


def state(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir()} if directory.exists() else None


@pytest.fixture(params=["new", "nested", "empty", "old"])
def target(request, tmp_path):
    path = tmp_path / "x" / "y" / "out" if request.param == "nested" else tmp_path / "out"
    if request.param in {"empty", "old"}:
        path.mkdir()
    for name, content in OLD.items() if request.param == "old" else ():
        (path / name).write_bytes(content)
    return path


def test_all_files_appear(target):
    old = state(target) or {}
    write_directory(target, {"a": b"1", "b": lambda f: f.write(b"2"), "c": b""})
    assert state(target) == {**old, "a": b"1", "b": b"2", "c": b""}
    assert [p.name for p in target.parent.iterdir()] == [target.name]
    mask = os.umask(0)
    os.umask(mask)
    assert (target / "a").stat().st_mode & 0o777 == 0o666 & ~mask
    assert target.stat().st_mode & 0o777 == 0o777 & ~mask


def full(_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("number", range(6))
def test_none_if_any_step_fails(target, number, monkeypatch):
    """Whatever goes wrong, in whichever of the steps."""
    before, calls = state(target), [0]

    def failing(real):
        def step(*args, **more):
            calls[0] += 1
            if calls[0] == number:
                full(None)
            return real(*args, **more)

        return step

    files = {"a": b"1", "b": full if number == 0 else b"2", "c": b"3"}
    monkeypatch.setattr(type(target), "rename", failing(type(target).rename))
    monkeypatch.setattr(atomic.os, "fsync", failing(os.fsync))
    try:
        write_directory(target, files)
    except OutputError:
        assert state(target) == before
        assert [p.name for p in target.parent.iterdir()] == [target.name] if before is not None else True
        if before is None:
            assert not target.exists()
    else:
        assert calls[0] < number


@pytest.mark.parametrize("number", range(1, 9))
def test_renames_are_taken_back(tmp_path, number, monkeypatch):
    target, calls = tmp_path / "out", [0]
    target.mkdir()
    for name, content in OLD.items():
        (target / name).write_bytes(content)
    real = type(target).rename

    def rename(self, to):
        calls[0] += 1
        if calls[0] == number:
            full(None)
        return real(self, to)

    monkeypatch.setattr(type(target), "rename", rename)
    new = {"a": b"1", "b": b"2", "c": b"3"}
    try:
        write_directory(target, new)
    except OutputError:
        assert state(target) == OLD
    else:
        assert number > 5
        assert state(target) == OLD | new


KILLED = """
import os, signal, sys
from pathlib import Path
from bytecap.system import directories
calls, at, kept = 0, int(sys.argv[2]), {}

def dying(name):
    real = getattr(Path, name)
    def step(self, *more, **options):
        global calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, *more, **options)
    setattr(Path, name, step)

for name in ("rename", "replace", "unlink"):
    dying(name)
if sys.argv[3] == "undone":  # the last rename fails, and the process is killed as all return
    last = Path.rename
    def refuse(self, to):
        if Path(to).name == "a" and "new" in str(self):
            raise OSError(28, "full")
        return last(self, to)
    Path.rename = refuse
directories.write_directory(Path(sys.argv[1]), {"a": b"1", "b": b"2", "c": b"3"})
"""
NEW = {"a": b"1", "b": b"2", "c": b"3"}


@pytest.mark.parametrize("how", ["done", "undone"])
def test_a_kill_between_two_renames(tmp_path, how):
    """No moment leaves old and new files that pass for a whole; the next writer puts back what a dead one moved."""
    finished, mixed = 0, 0
    for number in range(1, 20):
        target = tmp_path / str(number)
        target.mkdir()
        for name, content in OLD.items():
            (target / name).write_bytes(content)
        done = subprocess.run([sys.executable, "-c", KILLED, str(target), str(number), how], check=False)  # noqa: S603
        left = {p.name: p.read_bytes() for p in target.iterdir() if p.is_file()}
        if done.returncode != -signal.SIGKILL:
            assert left == (OLD | NEW if how == "done" else OLD)
            assert len(list(target.iterdir())) == len(left)
            finished += 1
            continue
        if left not in (OLD, OLD | NEW):
            assert "a" not in left  # without which nobody reads the directory
            assert interrupted(target)
            mixed += 1
        again = tmp_path / f"{number} again"
        shutil.copytree(target, again)
        recover(again)
        assert state(again) == OLD
        write_directory(target, {"a": b"4"})
        assert state(target) == OLD | {"a": b"4"}
    assert finished
    assert mixed >= 3


def test_what_a_living_writer_has_moved_stays(tmp_path):
    """A second writer takes nothing from one that is at work, nor from a journal that is no journal."""
    living, strange = tmp_path / ".out.aaaaaaaa.bytecap.tmp", tmp_path / ".out.bbbbbbbb.bytecap.tmp"
    for place in (living, strange):
        (place / "old").mkdir(parents=True)
        (place / "old" / "a").write_bytes(b"mine")
    with (living / "journal").open("wb") as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        write_directory(tmp_path, {"b": b"1"})
        assert (living / "old" / "a").read_bytes() == b"mine"
    assert (strange / "old" / "a").read_bytes() == b"mine"  # it has no journal at all
    (tmp_path / "victim").write_bytes(b"precious")
    for content in (
        b'{"names": ["../victim"], "there": []}',
        b'{"names": [3], "there": []}',
        b"[",
        b"{}",
        b"[" * 10**5,
    ):
        inner, place = tmp_path / "d", tmp_path / "d" / ".out.cccccccc.bytecap.tmp"
        (place / "new").mkdir(parents=True)
        (place / "journal").write_bytes(content)
        recover(inner)
        assert (tmp_path / "victim").read_bytes() == b"precious"
        assert list(inner.iterdir()) == []
        inner.rmdir()
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / ".out.dddddddd.bytecap.tmp").symlink_to(strange)
    (strange / "journal").write_bytes(b'{"names": ["a"], "there": ["a"]}')
    recover(tmp_path / "d")
    assert (strange / "old" / "a").read_bytes() == b"mine"


def test_a_model_whose_writer_was_killed_says_so(tmp_path):
    place = tmp_path / ".out.aaaaaaaa.bytecap.tmp"
    place.mkdir()
    (place / "journal").write_bytes(b'{"names": ["model.safetensors"], "there": []}')
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="was being written when its writer was killed"):
        weight_files(tmp_path)


def test_directories_are_exchanged_in_one_step(tmp_path, monkeypatch):
    """Where the system can, there is no moment with neither the old directory nor the new one."""
    target = tmp_path / "out"
    for exchange in (True, False):
        if not exchange:
            monkeypatch.setattr(directories, "_swapped", lambda *_: False)
        with replacing_directory(target) as made:
            (made / "config.json").write_text(str(exchange))
        with replacing_directory(target) as made:
            (made / "config.json").write_text(f"{exchange} again")
        assert (target / "config.json").read_text() == f"{exchange} again"
        assert list(tmp_path.iterdir()) == [target]


def test_what_is_in_the_way(tmp_path):
    target = tmp_path / "out"
    (target / "b").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"cannot write .*b: it is a directory"):
        write_directory(target, {"a": b"1", "b": b"2"})
    assert [p.name for p in target.iterdir()] == ["b"]
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(OutputError, match=r"cannot create .*file"):
        write_directory(tmp_path / "file", {"a": b"1"})
    with pytest.raises(OutputError, match=r"cannot create .*out"):
        write_directory(tmp_path / "file" / "out", {"a": b"1"})


def test_links_in_a_directory_are_replaced_not_followed(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (tmp_path / "victim").write_bytes(b"precious")
    (target / "a").symlink_to(tmp_path / "victim")
    write_directory(target, {"a": b"1"})
    assert state(target) == {"a": b"1"}
    assert not (target / "a").is_symlink()
    assert (tmp_path / "victim").read_bytes() == b"precious"


OTHERS = [pytest.param(c, marks=pytest.mark.nightly) for c in (b"3", b'{"steps": {}}', b'"x"', b"null", b"[[1]]")]


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
