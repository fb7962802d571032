"""Write files that appear whole or not at all.

Writing goes to a temporary name in the same directory and is renamed: a crash at any moment leaves the old file. Who
writes holds a lock on the temporary file, which the system drops when the process dies however it dies; so a later
writer can tell what a dead run left behind from what a living one is writing, and takes only the former away: regular
files of our own user whose names end in `.bytecap.tmp`, which nothing else writes. Where there are no such locks
(Windows, some network file systems) such leftovers stay.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from bytecap.errors import OutputError

try:
    import fcntl
except ImportError:  # pragma: no cover (Windows)
    fcntl = None  # type: ignore[assignment]

_MARK = ".bytecap.tmp"  # no other program gives its files such an end
_RANDOM = rf"[a-z0-9_]{{8}}{re.escape(_MARK)}"  # what `tempfile` puts behind our prefix


def make_directory(path: Path | str) -> Path:
    """Make a directory to write to; called before hours of work, not after.

    Raises:
        OutputError: it cannot be made.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise OutputError(f"cannot make the directory {path}: {exc.strerror}") from exc
    return Path(path)


def check_kind(path: Path) -> None:
    """Refuse a path that a file must not replace, such as a device, for which renaming would succeed.

    Raises:
        OutputError: there is something, and it is no file.
    """
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a directory")
    if path.exists() and not path.is_file():
        raise OutputError(f"cannot write {path}: it is a device, a pipe or a socket, not a file")


def write_atomically(data: bytes, path: Path) -> int:
    """Write bytes to a temporary name beside `path`, sync and rename; returns their number.

    Raises:
        OutputError: the directory is missing or not writable, or the disk is full; the old file stays intact.
    """
    with replacing(path) as f:
        f.write(data)
    return len(data)


@contextlib.contextmanager
def replacing(path: Path, *, sync: bool = True) -> Iterator[BinaryIO]:
    """Yield a file that replaces `path` when the block ends without an error.

    Args:
        path: final name.
        sync: wait until the disk has it; caches whose entries carry checksums need not.

    Raises:
        OutputError: see `write_atomically`.
    """
    check_kind(path)
    temporary = None
    try:
        sweep(path.parent, re.escape(path.name))
        f, temporary = _locked(path)
        with f:
            yield f
            f.flush()
            if sync:
                os.fsync(f.fileno())
            _open_to_others(temporary, 0o666)
            if fcntl is None:  # pragma: no cover (Windows renames no open file)
                f.close()
            temporary.replace(path)
            temporary = None
    except OSError as exc:
        raise OutputError(f"cannot write {path}: {exc.strerror}") from exc
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()


def _locked(path: Path) -> tuple[BinaryIO, Path]:
    """Open a temporary file beside `path` and lock it."""
    while True:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_MARK, dir=path.parent)
        f = os.fdopen(handle, "w+b")
        if fcntl is not None:
            with contextlib.suppress(OSError):  # without locks nobody sweeps either
                fcntl.flock(f, fcntl.LOCK_EX)
        if os.fstat(f.fileno()).st_nlink:
            return f, Path(name)
        f.close()  # swept between its birth and our lock


def check_directory(path: Path) -> None:
    """Refuse a place where a directory cannot be put, or must not take another one's place.

    A directory may be replaced if it is empty or holds a model (`config.json`).

    Raises:
        OutputError: there is a file, a directory of something else, or no writable directory around it.
    """
    if path.exists() and not path.is_dir():
        raise OutputError(f"cannot write {path}: there is a file; give the name of a directory")
    if path.is_dir() and any(path.iterdir()) and not (path / "config.json").is_file():
        raise OutputError(f"cannot write {path}: the directory holds other files; give a new or empty one")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"cannot write {path}: the directory {path.parent} does not exist")
    if not os.access(path.absolute().parent, os.W_OK):
        raise OutputError(f"cannot write {path}: the directory {path.parent} is not writable")


@contextlib.contextmanager
def replacing_directory(path: Path) -> Iterator[Path]:
    """A directory that takes the place of `path` when the block ends without an error.

    Files are written beside it, synced, and the directory is renamed; an old one is moved away first and removed last,
    so a crash leaves the old one or the new one whole, if need be under the name of its temporary place.

    Raises:
        OutputError: see `check_directory`; or the disk is full; the old directory stays intact.
    """
    check_directory(path)
    target = path.absolute()
    made = None
    try:
        made = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
        yield made
        for file in made.iterdir():
            with file.open("r+b") as f:
                os.fsync(f.fileno())
        mask = os.umask(0)
        os.umask(mask)
        made.chmod(0o777 & ~mask)
        made = _exchanged(made, target)
    except OSError as exc:
        raise OutputError(f"cannot write {path}: {exc.strerror}") from exc
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)


def _exchanged(made: Path, target: Path) -> Path | None:
    """Put a directory in the place of another one; returns where that is now, if there was one."""
    if not target.exists():
        made.replace(target)
        return None
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    target.replace(old)
    try:
        made.replace(target)
    except OSError:
        old.replace(target)
        raise
    return old


def sweep(directory: Path, names: str) -> None:
    """Remove the temporary files that dead runs left behind while they wrote files of certain names.

    Args:
        directory: to look through; may be missing.
        names: regular expression of the files' final names.
    """
    if fcntl is None:
        return
    pattern = re.compile(rf"\.(?:{names})\.{_RANDOM}")
    with contextlib.suppress(OSError):
        for entry in [e for e in os.scandir(directory) if pattern.fullmatch(e.name)]:
            with contextlib.suppress(OSError), open_regular(Path(entry.path), os.O_RDWR) as f:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails where the writer lives
                if os.fstat(f.fileno()).st_uid == os.geteuid():
                    Path(entry.path).unlink()


def open_regular(path: Path, flags: int, *, follow: bool = False) -> BinaryIO:
    """Open a regular file, without waiting for whoever writes into a pipe; through a link only to `follow` it.

    Raises:
        OSError: it cannot be opened, or is a link, a pipe, a device or a directory.
    """
    flags |= (0 if follow else getattr(os, "O_NOFOLLOW", 0)) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    handle = os.open(path, flags | getattr(os, "O_CLOEXEC", 0), 0o600)
    try:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            kind = "a directory" if stat.S_ISDIR(mode) else "a device, a pipe or a socket, not a file"
            raise OSError(errno.EINVAL, f"it is {kind}", str(path))  # noqa: TRY301 (the handle is closed below)
        return os.fdopen(handle, "rb" if flags & (os.O_RDWR | os.O_WRONLY) == 0 else "r+b")
    except BaseException:
        os.close(handle)
        raise


Content = bytes | Callable[[BinaryIO], None]


def write_directory(directory: Path, files: Mapping[str, Content]) -> None:
    """Files of a directory: all of them or none.

    A directory that is not there yet appears whole, by one rename. In one that is there, everything is written to a
    directory inside it first; then the files take their places one by one, and return to how they were
    if one of them cannot. Only a process killed between two of these renames leaves files of both kinds.

    Args:
        directory: made if missing; other files in it stay.
        files: contents by name, bytes or a function that writes them.

    Raises:
        OutputError: a file cannot be written; the directory is as it was.
    """
    missing = _missing(directory)
    stage = None
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise OutputError(f"cannot create {directory}: {exc.strerror}") from exc
    try:
        for name in files:
            check_kind(directory / name)
        fresh = directory in missing
        parent = directory.parent if fresh else directory
        stage = Path(tempfile.mkdtemp(prefix=f".{directory.name[:100]}.", suffix=_MARK, dir=parent))
        _write_all(stage, files)
        if fresh:
            _open_to_others(stage, 0o777)
            directory.rmdir()
            stage.rename(directory)
        else:
            _into_place(stage, directory, list(files))
    except OSError as exc:
        at = getattr(exc, "filename", None)
        where = directory / Path(at).name if at and stage is not None and str(stage) in str(at) else directory
        raise OutputError(f"cannot write {where}: {exc.strerror}") from exc
    finally:
        if stage is not None and stage.exists():
            shutil.rmtree(stage, ignore_errors=True)
        for made in missing:
            with contextlib.suppress(OSError):
                made.rmdir()  # where nothing was put into it


def _missing(directory: Path) -> list[Path]:
    """Directories that have to be made, the innermost first."""
    return [p for p in (directory, *directory.parents) if not p.exists()]


def _write_all(stage: Path, files: Mapping[str, Content]) -> None:
    for name, content in files.items():
        with (stage / name).open("xb") as f:
            if callable(content):
                content(f)
            else:
                f.write(content)
            f.flush()
            os.fsync(f.fileno())
        _open_to_others(stage / name, 0o666)


def _open_to_others(path: Path, mode: int) -> None:
    """The rights that a file or directory made in the usual way has."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(mode & ~mask)


def _into_place(stage: Path, directory: Path, names: Sequence[str]) -> None:
    """Move files over those of a directory; if one cannot be moved, all return."""
    old = Path(tempfile.mkdtemp(dir=stage))
    kept, placed = list[str](), list[str]()
    try:
        for name in names:
            if (directory / name).exists() or (directory / name).is_symlink():
                (directory / name).rename(old / name)
                kept.append(name)
            (stage / name).rename(directory / name)
            placed.append(name)
    except BaseException:
        for name in placed:
            (directory / name).unlink()
        for name in kept:
            (old / name).rename(directory / name)
        raise
