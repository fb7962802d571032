"""Directories that are written whole or not at all: failures at every step, kills between any two, leftovers."""

import errno
import os
import shutil
import signal
from pathlib import Path

import pytest

from bytecap.errors import CheckpointError, OutputError
from bytecap.model.fileset import weight_files
from bytecap.system import atomic, directories
from bytecap.system.directories import interrupted, recover, replacing_directory, write_directory
from forks import child

fcntl = pytest.importorskip("fcntl")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="links, pipes and locks")

OLD = {"a": b"old a", "b": b"old b", "other": b"stays"}


def older(directory):
    """A directory with the old files."""
    directory.mkdir()
    for name, content in OLD.items():
        (directory / name).write_bytes(content)
    return directory


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
    target, calls = older(tmp_path / "out"), [0]
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


NEW = {"a": b"1", "b": b"2", "c": b"3"}


def killed(target, number, how):
    """Exit code of a process that writes to `target` and dies before a step."""

    def dying(real, left):
        def step(*given, **options):
            if not next(left, 0):
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*given, **options)

        return step

    def refusing(real):
        def step(self, to):
            if Path(to).name == "a" and "new" in str(self):
                raise OSError(errno.ENOSPC, "full")
            return real(self, to)

        return step

    def work():
        left = iter(range(number - 1, -1, -1))
        for name in ("rename", "replace", "unlink"):
            setattr(Path, name, dying(getattr(Path, name), left))
        if how == "undone":  # the last rename fails, and the process is killed as all return
            Path.rename = refusing(Path.rename)
        write_directory(target, NEW)

    return child(work)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["done", "undone"])
def test_a_kill_between_two_renames(tmp_path, how):
    """No moment leaves old and new files that pass for a whole; the next writer puts back what a dead one moved."""
    finished, mixed = 0, 0
    for number in range(1, 20):
        target = older(tmp_path / str(number))
        code = killed(target, number, how)
        left = {p.name: p.read_bytes() for p in target.iterdir() if p.is_file()}
        if code != -signal.SIGKILL:
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
