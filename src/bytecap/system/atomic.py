"""Write files that appear whole or not at all; `directories` does the same for directories.

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
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from bytecap.errors import OutputError

try:
    import fcntl
except ImportError:  # pragma: no cover (Windows)
    fcntl = None  # type: ignore[assignment]

MARK = ".bytecap.tmp"  # no other program gives its files such an end
_NOTHING_THERE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}  # a link that leads nowhere is replaced
_RANDOM = rf"[a-z0-9_]{{8}}{re.escape(MARK)}"  # what `tempfile` puts behind our prefix


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
        OutputError: there is something, and it is no file; or the system takes no such path.
    """
    try:
        mode = path.stat().st_mode
    except ValueError as exc:
        raise OutputError(f"cannot write {str(path)!r}: {exc}") from exc
    except OSError as exc:
        if exc.errno in _NOTHING_THERE:
            return
        raise OutputError(f"cannot write {path}: {exc.strerror}") from exc
    if stat.S_ISDIR(mode):
        raise OutputError(f"cannot write {path}: it is a directory")
    if not stat.S_ISREG(mode):
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
            open_to_others(temporary, 0o666)
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
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=MARK, dir=path.parent)
        f = os.fdopen(handle, "w+b")
        if fcntl is not None:
            with contextlib.suppress(OSError):  # without locks nobody sweeps either
                fcntl.flock(f, fcntl.LOCK_EX)
        if os.fstat(f.fileno()).st_nlink:
            return f, Path(name)
        f.close()  # swept between its birth and our lock


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


def open_regular(path: Path, flags: int, *, follow: bool = False, mode: int = 0o600) -> BinaryIO:
    """Open a regular file, without waiting for whoever writes into a pipe; through a link only to `follow` it.

    Raises:
        OSError: it cannot be opened, or is a link, a pipe, a device or a directory.
    """
    flags |= (0 if follow else getattr(os, "O_NOFOLLOW", 0)) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    handle = os.open(path, flags | getattr(os, "O_CLOEXEC", 0), mode)
    try:
        found = os.fstat(handle).st_mode
        if not stat.S_ISREG(found):
            kind = "a directory" if stat.S_ISDIR(found) else "a device, a pipe or a socket, not a file"
            raise OSError(errno.EINVAL, f"it is {kind}", str(path))  # noqa: TRY301 (the handle is closed below)
        return os.fdopen(handle, "rb" if flags & (os.O_RDWR | os.O_WRONLY) == 0 else "r+b")
    except BaseException:
        os.close(handle)
        raise


def read_regular(path: Path) -> bytes:
    """Read a file, also through links, but nothing that has no end or waits for a writer.

    Raises:
        OSError: it cannot be read, or is a pipe, a device or a directory.
    """
    with open_regular(path, os.O_RDONLY, follow=True) as f:
        return f.read()


def open_to_others(path: Path, mode: int) -> None:
    """The rights that a file or directory made in the usual way has."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(mode & ~mask)
