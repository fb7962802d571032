"""Write directories whose files appear all together or not at all.

A directory that is not there yet appears by one rename. One that holds other files cannot: its new files take their
places one by one. So they are first written whole to a directory inside it, with a *journal* that says what was there
before. The file that comes first in the list, without which the others are of no use, leaves first and arrives last: a
process that is killed in between leaves a directory without it, never one of old and new files that somebody reads as
a whole. The next write to the directory finds the journal of the dead and puts everything back first.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from bytecap.errors import OutputError
from bytecap.system.atomic import MARK, check_kind, open_regular, open_to_others

try:
    import fcntl
except ImportError:  # pragma: no cover (Windows)
    fcntl = None  # type: ignore[assignment]

_JOURNAL, _NEW, _OLD = "journal", "new", "old"  # in a directory that files are written to first
_MOST_JOURNAL = 1 << 20
_EXCHANGE, _HERE = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of renameat2(2)

Content = bytes | Callable[[BinaryIO], None]


def check_directory(path: Path, ours: Sequence[str] = ("config.json",)) -> None:
    """Refuse a place where a directory cannot be put, or must not take another one's place.

    A directory may be replaced if it is empty or holds all the files `ours`, by default those of a model.

    Raises:
        OutputError: there is a file, a directory of something else, or no writable directory around it.
    """
    if path.exists() and not path.is_dir():
        raise OutputError(f"cannot write {path}: there is a file; give the name of a directory")
    if path.is_dir() and any(path.iterdir()) and not all((path / n).is_file() for n in ours):
        raise OutputError(f"cannot write {path}: the directory holds other files; give a new or empty one")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"cannot write {path}: the directory {path.parent} does not exist")
    if not os.access(path.absolute().parent, os.W_OK):
        raise OutputError(f"cannot write {path}: the directory {path.parent} is not writable")


@contextlib.contextmanager
def replacing_directory(path: Path, ours: Sequence[str] = ("config.json",)) -> Iterator[Path]:
    """A directory that takes the place of `path` when the block ends without an error.

    Files are written beside it, synced, and the directory is renamed; an old one is moved away first and removed last,
    so a crash leaves the old one or the new one whole, if need be under the name of its temporary place.

    Raises:
        OutputError: see `check_directory`; or the disk is full; the old directory stays intact.
    """
    check_directory(path, ours)
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
    """Put a directory in the place of another one, or of a link; returns where that is now, if there was one."""
    if not os.path.lexists(target):
        made.replace(target)
        return None
    if not target.is_symlink() and _swapped(made, target):
        return made
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    target.replace(old / _OLD)
    try:
        made.replace(target)
    except OSError:
        (old / _OLD).replace(target)
        old.rmdir()
        raise
    return old


def _swapped(one: Path, other: Path) -> bool:
    """Exchange two names in one step, so that there is no moment with neither; Linux alone knows how."""
    if not sys.platform.startswith("linux"):
        return False
    with contextlib.suppress(OSError, AttributeError):
        return bool(
            ctypes.CDLL(None).renameat2(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0
        )  # fmt: skip
    return False


def write_directory(directory: Path, files: Mapping[str, Content]) -> None:
    """Write files of a directory: all of them or none.

    Args:
        directory: made if missing; other files in it stay.
        files: contents by name, bytes or a function that writes them; first what the others are of no use without.

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
        fresh = directory in missing
        parent = directory.parent if fresh else directory
        recover(parent)
        for name in files:
            check_kind(directory / name)
        stage = Path(tempfile.mkdtemp(prefix=f".{directory.name[:100]}.", suffix=MARK, dir=parent))
        with _journal(stage) as journal:
            for inner in (_NEW, _OLD):
                (stage / inner).mkdir()
            _write_all(stage / _NEW, files)
            if fresh:
                open_to_others(stage / _NEW, 0o777)
                directory.rmdir()
                (stage / _NEW).rename(directory)
            else:
                _into_place(stage, directory, list(files), journal)
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


@contextlib.contextmanager
def _journal(stage: Path) -> Iterator[BinaryIO]:
    """Open the journal of a directory that files are written to first; its lock says that its writer lives."""
    with (stage / _JOURNAL).open("xb") as journal:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # without locks nobody recovers either
                fcntl.flock(journal, fcntl.LOCK_EX)
        yield journal


def _write_all(into: Path, files: Mapping[str, Content]) -> None:
    for name, content in files.items():
        try:
            with (into / name).open("xb") as f:
                if callable(content):
                    content(f)
                else:
                    f.write(content)
                f.flush()
                os.fsync(f.fileno())
            open_to_others(into / name, 0o666)
        except OSError as exc:
            exc.filename = exc.filename or str(into / name)  # writing to an open file does not say to which
            raise


def _into_place(stage: Path, directory: Path, names: Sequence[str], journal: BinaryIO) -> None:
    """Move files over those of a directory; if one cannot be moved, all return."""
    there = [name for name in names if os.path.lexists(directory / name)]
    journal.write(json.dumps({"names": list(names), "there": there}).encode())
    journal.flush()
    os.fsync(journal.fileno())
    try:
        for name in there:
            (directory / name).rename(stage / _OLD / name)
        for name in [*names[1:], *names[:1]]:
            (stage / _NEW / name).rename(directory / name)
    except BaseException:
        _put_back(stage, directory, names, there)
        raise
    journal.truncate(0)  # nothing is to be put back any more


def _put_back(stage: Path, directory: Path, names: Sequence[str], there: Sequence[str]) -> None:
    """Undo what `_into_place` has done so far; the first file returns last."""
    for name in [*names[1:], *names[:1]]:
        if name in there and os.path.lexists(stage / _OLD / name):
            (stage / _OLD / name).replace(directory / name)
        elif name not in there and not os.path.lexists(stage / _NEW / name):
            (directory / name).unlink(missing_ok=True)


def recover(directory: Path) -> None:
    """Put back what dead writers of a directory have moved, and remove what they have left behind in it."""
    for stage, journal in _left_behind(directory):
        with journal:
            moved = _moved(journal)
            if moved is not None:
                _put_back(stage, directory, *moved)
            shutil.rmtree(stage, ignore_errors=True)


def interrupted(directory: Path) -> bool:
    """Return whether a writer died while it moved files of a directory into place."""
    found = False
    for _, journal in _left_behind(directory):
        with journal:
            found = found or _moved(journal) is not None
    return found


def _left_behind(directory: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """Yield the places of dead writers, ours alone, with their journals open and locked."""
    if fcntl is None:  # pragma: no cover (Windows)
        return
    pattern = re.compile(rf"\..*\.[a-z0-9_]{{8}}{re.escape(MARK)}")
    try:
        found = [Path(e.path) for e in os.scandir(directory) if pattern.fullmatch(e.name)]
    except OSError:
        return
    for stage in found:
        with contextlib.suppress(OSError):
            if stage.is_symlink() or stage.stat().st_uid != os.geteuid():
                continue
            journal = open_regular(stage / _JOURNAL, os.O_RDWR)
            try:
                fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails where the writer lives
            except OSError:
                journal.close()
                continue
            yield stage, journal


def _moved(journal: BinaryIO) -> tuple[list[str], list[str]] | None:
    """Return the names in a journal and those that were there before; None where nothing was moved."""
    try:
        content = json.loads(journal.read(_MOST_JOURNAL))
        names, there = content["names"], content["there"]
        plain = all(isinstance(n, str) and n not in {"", ".", ".."} and Path(n).name == n for n in (*names, *there))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return (list(names), list(there)) if plain and set(there) <= set(names) else None
