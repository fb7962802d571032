"""Read a file as if it were bytes, a slice at a time and by several threads at once."""

from __future__ import annotations

import os
import threading
import weakref
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bytecap.errors import CorruptError
from bytecap.format.entropy import jit
from bytecap.system.atomic import open_regular

_PIECE = 2**20  # bytes read for a checksum at a time
_AT_ONCE = 2**30  # bytes that a system call surely reads at once
_MANY = 2**24  # bytes that several threads go through sooner


class FileBytes:
    """The bytes of an open file, each slice of which is read when it is taken.

    Args:
        path: of the file.

    Raises:
        OSError, ValueError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._file, self._name = open_regular(path, os.O_RDONLY, follow=True), str(path)
        self._lock = threading.Lock()
        weakref.finalize(self, self._file.close)
        self._length = os.fstat(self._file.fileno()).st_size

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice) -> bytes:
        """Read a slice.

        Raises:
            CorruptError: the file has become shorter.
        """
        start, stop, _ = part.indices(self._length)
        found = self._read(start, max(0, stop - start))
        if len(found) < stop - start:
            raise CorruptError(f"{self._name} has become shorter while it was read")
        return found

    def _read(self, start: int, count: int) -> bytes:
        if hasattr(os, "pread") and count <= _AT_ONCE:
            return os.pread(self._file.fileno(), count, start)
        with self._lock:  # several threads read
            self._file.seek(start)
            return self._file.read(count)


def checksums(data: bytes | FileBytes, places: Sequence[tuple[int, int]]) -> list[int]:
    """Return the CRC-32 of each slice of bytes, given where it starts and where it stops.

    >>> checksums(b"abc", [(0, 3), (1, 1)]) == [zlib.crc32(b"abc"), 0]
    True
    """

    def checksum(place: tuple[int, int]) -> int:
        found, (start, stop) = 0, place
        for at in range(start, stop, _PIECE):
            found = zlib.crc32(data[at : min(at + _PIECE, stop)], found)
        return found

    if sum(stop - start for start, stop in places) < _MANY:
        return list(map(checksum, places))
    with ThreadPoolExecutor(jit.cores()) as pool:
        return list(pool.map(checksum, places))
