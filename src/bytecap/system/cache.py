"""Cache measured results by content, so that nothing is measured twice on the same bytes.

An entry's name is the hash of everything its value depends on, so there is nothing to invalidate: another model,
another text or another version of the library simply asks for other names. Every file carries a checksum of its name
and contents; one that does not fit it counts as absent. Files appear whole or not at all (`bytecap.system.atomic`).

>>> import tempfile
>>> store = Store(Path(tempfile.mkdtemp()))
>>> key = digest("a model", 3)
>>> store.get(key) is None, store.put(key, {"kl": 0.5}), store.get(key)
(True, None, {'kl': 0.5})
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from bytecap._version import __version__
from bytecap.errors import OutputError
from bytecap.system.allocator import is_shortage
from bytecap.system.atomic import make_directory, open_regular, replacing, sweep

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

Arrays = Mapping[str, npt.NDArray[Any]]
_HASH = 16  # bytes
_CHUNK = 2**20
# errors that values of another form than expected lead to
FAULTS = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError, AssertionError)
_read_last: dict[str, str] = {}  # the entry that was read last, by directory
_NAME = rf"[0-9a-f]{{{2 * _HASH}}}\.(?:json|npz)"


def _start(name: str) -> hashlib.blake2b:
    """Start a checksum that holds for one name only, so that an entry under another name counts as damaged."""
    return hashlib.blake2b(name.encode(), digest_size=_HASH)


class _Hashing:
    """A stream that is hashed as it is written, with just the methods that zip archives need."""

    def __init__(self, f: BinaryIO, name: str) -> None:
        self._f = f
        self.total = _start(name)

    def write(self, data: Any) -> int:
        """Hash and pass on."""
        self.total.update(data)
        return self._f.write(data)

    def flush(self) -> None:
        """Pass on."""
        self._f.flush()

    def read(self, _size: int = -1) -> bytes:
        """Return nothing; the method exists because numpy takes only readable objects for files."""
        raise io.UnsupportedOperation


def digest(*parts: Any) -> str:
    """Hash parts: bytes, arrays, or values that JSON can hold (keys sorted)."""
    return digest_each(parts)


def digest_each(parts: Iterable[Any]) -> str:
    """Hash parts as `digest` does, each of which is dropped before the next one is made."""
    total = hashlib.blake2b(digest_size=_HASH)
    for part in parts:
        if isinstance(part, np.ndarray):
            head = repr((part.shape, part.dtype.str)).encode()
            data = np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
        else:
            head = b""
            data = memoryview(part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode())
        total.update((len(head) + len(data)).to_bytes(8, "little"))
        total.update(head)
        total.update(data)
    return total.hexdigest()


def _read_arrays(f: BinaryIO) -> dict[str, npt.NDArray[Any]]:
    """The arrays of an archive that `numpy.savez` wrote: uncompressed, so that a small file holds no large array."""
    with np.load(f, allow_pickle=False) as found:
        if not hasattr(found, "zip"):
            raise ValueError("no archive")
        size = os.fstat(f.fileno()).st_size
        entries = found.zip.infolist()
        if any(e.compress_type != zipfile.ZIP_STORED for e in entries) or sum(e.file_size for e in entries) > size:
            raise ValueError("an archive that expands")
        arrays = {n: found[n] for n in found.files}
    if not all(isinstance(a, np.ndarray) for a in arrays.values()):
        raise ValueError("something that is no array")
    return arrays


_SHOWS_ONLY = re.compile(r"^SHOWS_ONLY = (.*)$", re.MULTILINE)
_SCOPES = {'"module"': False, '"package"': True}


def measuring_sources(root: Path) -> dict[str, str]:
    """Source texts by path below `root` of all modules that may decide a result.

    A module that judges and shows results, and measures nothing, says so by the line `SHOWS_ONLY = "module"`, a package
    for everything in it by `SHOWS_ONLY = "package"` in its `__init__.py`. Such modules are left out.

    Raises:
        ValueError: a line says neither; the message names the file.
    """
    texts = {
        p: p.read_text("utf-8") for p in sorted([*root.glob("bytecap/**/*.py"), *root.glob("bytecap_lab/**/*.py")])
    }
    left_out: list[Path] = []
    for path, text in texts.items():
        for scope in _SHOWS_ONLY.findall(text):
            if scope not in _SCOPES or (_SCOPES[scope] and path.name != "__init__.py"):
                raise ValueError(f"{path}: SHOWS_ONLY = {scope} is neither a module's nor a package's scope")
            left_out.append(path.parent if _SCOPES[scope] else path)
    return {
        str(p.relative_to(root)): text for p, text in texts.items()
        if not any(p.is_relative_to(x) for x in left_out)
    }  # fmt: skip


@cache
def library() -> str:
    """Return this library's version and the hash of its source, since other code gives other results."""
    return f"{__version__} {digest(list(map(list, measuring_sources(Path(__file__).parents[2]).items())))}"


@contextlib.contextmanager
def blamed(directory: Path | str | None) -> Iterator[None]:
    """Turn the failures of work that has read entries of a store into one line that names the last of them.

    A checksum is no signature: an entry may be sound and yet hold what no run has written. What its value runs into
    is whatever uses it, so the store is named as the likely cause, and the failure itself with it.

    Args:
        directory: of the store; None where nothing is kept.

    Raises:
        OutputError: in place of errors that a value of another form leads to.
    """
    _read_last.pop(str(directory), None)
    try:
        yield
    except FAULTS as exc:
        last = _read_last.get(str(directory))
        if last is None or is_shortage(exc):
            raise
        raise OutputError(
            f"the store {directory} seems to hold an entry that no run has written, the last one read was {last} "
            f"({type(exc).__name__}: {exc}); remove that file, or the directory, and start again"
        ) from exc


class Store:
    """A cache under a directory; without one, nothing is kept.

    Several runs may share a directory: entries appear whole under their names, and the last one written stays.

    Raises:
        OutputError: the directory cannot be made or written to.
    """

    def __init__(self, directory: Path | str | None = None) -> None:
        self.directory = Path(directory) if directory is not None else None
        self.found = 0  # entries that were there
        if self.directory is None:
            return
        make_directory(self.directory)
        if not os.access(self.directory, os.W_OK):
            raise OutputError(f"cannot keep anything in {self.directory}: the directory is not writable")
        sweep(self.directory, _NAME)

    def _sound(self, name: str) -> BinaryIO | None:
        """Open an entry whose checksum fits, at the beginning of its contents; None if there is none."""
        if self.directory is None:
            return None
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            f = stack.enter_context(open_regular(self.directory / name, os.O_RDONLY))
            total, kept = _start(name), f.read(_HASH)
            while data := f.read(_CHUNK):
                total.update(data)
            if kept == total.digest():
                f.seek(_HASH)
                stack.pop_all()
                self.found += 1
                _read_last[str(self.directory)] = name
                return f
        return None

    @contextlib.contextmanager
    def _write(self, directory: Path, name: str) -> Iterator[_Hashing]:
        """Yield the stream for an entry's contents; their checksum is put in front of them at the end."""
        with replacing(directory / name, sync=False) as f:
            f.write(bytes(_HASH))
            into = _Hashing(f, name)
            yield into
            f.seek(0)
            f.write(into.total.digest())

    @staticmethod
    def _open_lock(path: Path) -> BinaryIO:
        """A lock file; never what somebody has put in its place, and nothing is cut off."""
        try:
            return open_regular(path, os.O_RDWR | os.O_CREAT)
        except OSError as exc:
            raise OutputError(
                f"cannot lock {path}: it is a link or no regular file; remove it ({exc.strerror})"
            ) from exc

    @contextlib.contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Hold a key while its value is made; without file locks two processes may make the same value."""
        if self.directory is None or fcntl is None:
            yield
            return
        path = self.directory / f"{key}.lock"
        while True:
            with self._open_lock(path) as f:
                fcntl.flock(f, fcntl.LOCK_EX)
                if not (path.exists() and os.fstat(f.fileno()).st_ino == path.stat().st_ino):
                    continue  # who held it has removed it meanwhile
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return

    def get(self, key: str) -> Any:
        """Return the JSON value of a key, or None."""
        f = self._sound(f"{key}.json")
        if f is None:
            return None
        with f:
            try:
                return json.loads(f.read())
            except (ValueError, RecursionError):  # a checksum that fits says nothing about who wrote it
                self.found -= 1
                return None

    def put(self, key: str, value: Any) -> None:
        """Keep a JSON value."""
        if self.directory is not None:
            with self._write(self.directory, f"{key}.json") as f:
                f.write(json.dumps(value).encode())

    def arrays(self, key: str) -> dict[str, npt.NDArray[Any]] | None:
        """Return the arrays of a key by name, or None."""
        f = self._sound(f"{key}.npz")
        if f is None:
            return None
        with f:
            try:
                return _read_arrays(f)
            except Exception:  # noqa: BLE001 (a checksum that fits says nothing about who wrote it)
                self.found -= 1
                return None

    def own_arrays(self, key: str) -> dict[str, npt.NDArray[Any]] | None:
        """Return the arrays of a key as this process finds them, whoever shares the store."""
        return Store.arrays(self, key)

    def once(self, key: Callable[[], str], make: Callable[[], Arrays]) -> Arrays:
        """Return the arrays of a key; they are made and kept where they are missing, and by one process at a time.

        Args:
            key: makes the key, which is only asked for where there is a directory.
            make: makes the arrays.
        """
        if self.directory is None:
            return make()
        name = key()
        with self.lock(name):
            kept = self.arrays(name)
            if kept is not None:
                return kept
            made = make()
            self.put_arrays(name, made)
            return made

    def put_arrays(self, key: str, values: Arrays) -> None:
        """Keep arrays by name; they are written one after the other and never copied."""
        if self.directory is not None:
            with self._write(self.directory, f"{key}.npz") as f:
                np.savez(f, **{n: np.asarray(v) for n, v in values.items()})  # type: ignore[arg-type]
