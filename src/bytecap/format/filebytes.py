"""Read a file as if it were bytes, a slice at a time."""

from __future__ import annotations

import os
import threading
import weakref
from pathlib import Path

from bytecap.errors import CorruptError
from bytecap.system.atomic import open_regular


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
        with self._lock:  # several threads read
            self._file.seek(start)
            found = self._file.read(max(0, stop - start))
        if len(found) < stop - start:
            raise CorruptError(f"{self._name} has become shorter while it was read")
        return found
