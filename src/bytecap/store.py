"""A cache of measured results by content: what was measured on the same bytes is never measured again.

An entry's name is the hash of everything its value depends on, so there is nothing to invalidate: another model,
another text or another version of the library simply asks for other names. Every file carries a checksum; one that
does not fit it counts as absent. Files are written under a temporary name and renamed.

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
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bytecap import artifact
from bytecap.errors import OutputError

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

Arrays = Mapping[str, npt.NDArray[Any]]
_HASH = 16  # bytes


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_HASH).digest()


def digest(*parts: Any) -> str:
    """Hash of parts: bytes, arrays, or what JSON can hold (keys sorted)."""
    total = hashlib.blake2b(digest_size=_HASH)
    for part in parts:
        if isinstance(part, np.ndarray):
            data = repr((part.shape, part.dtype.str)).encode() + np.ascontiguousarray(part).tobytes()
        else:
            data = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode()
        total.update(len(data).to_bytes(8, "little"))
        total.update(data)
    return total.hexdigest()


@cache
def library(without: tuple[str, ...] = ()) -> str:
    """Version of this library and hash of its source: results of other code are other results.

    Args:
        without: beginnings of paths, relative to the package, that do not matter.
    """
    from bytecap import __version__

    root = Path(__file__).parent
    sources: Iterable[Path] = [
        p for p in sorted(root.rglob("*.py")) if not p.relative_to(root).as_posix().startswith(without)
    ]
    return f"{__version__} {digest([[str(p.relative_to(root)), p.read_text('utf-8')] for p in sources])}"


class Store:
    """Entries under a directory, which is made when the first one is written; without one, nothing is kept."""

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory
        self.found = 0  # entries that were there

    def _read(self, name: str) -> bytes | None:
        """Contents of a sound file."""
        if self.directory is None:
            return None
        try:
            data = (self.directory / name).read_bytes()
        except OSError:
            return None
        if data[:_HASH] != _hash(data[_HASH:]):
            return None
        self.found += 1
        return data[_HASH:]

    def _make(self) -> None:
        assert self.directory is not None  # noqa: S101 (callers look)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise OutputError(f"cannot make the directory {self.directory}: {exc.strerror}") from exc

    def _write(self, name: str, data: bytes) -> None:
        if self.directory is None:
            return
        self._make()
        artifact.write_atomically(_hash(data) + data, self.directory / name)

    @contextlib.contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Hold a key while its value is made; where files cannot be locked, two processes may make the same value."""
        if self.directory is None or fcntl is None:
            yield
            return
        self._make()
        with (self.directory / f"{key}.lock").open("w") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            yield

    def get(self, key: str) -> Any:
        """The JSON value of a key, or None."""
        data = self._read(f"{key}.json")
        return None if data is None else json.loads(data)

    def put(self, key: str, value: Any) -> None:
        """Keep a JSON value."""
        self._write(f"{key}.json", json.dumps(value).encode())

    def arrays(self, key: str) -> dict[str, npt.NDArray[Any]] | None:
        """The arrays of a key by name, or None."""
        data = self._read(f"{key}.npz")
        if data is None:
            return None
        with np.load(io.BytesIO(data), allow_pickle=False) as found:
            return {n: found[n] for n in found.files}

    def put_arrays(self, key: str, values: Arrays) -> None:
        """Keep arrays by name."""
        data = io.BytesIO()
        np.savez(data, **{n: np.asarray(v) for n, v in values.items()})  # type: ignore[arg-type]
        self._write(f"{key}.npz", data.getvalue())
