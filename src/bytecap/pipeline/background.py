"""Pack large side files in processes of their own while the model is being built.

Whatever goes wrong there (no interpreter, no memory, an interrupt) is no error: the file is packed here then.

>>> packed("config.json", b"{}") == packing.pack("config.json", b"{}")
True
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from bytecap.format.sidefiles import packing

_WORTH = 1 << 15  # bytes from which a process is worth starting
_KEPT = 16  # files
_WORK = f"import sys; from {__name__} import work; work(sys.argv[1])"


class _Packing:
    """A process at work on a file."""

    def __init__(self, name: str, content: bytes) -> None:
        self.result = b""
        self.process = subprocess.Popen(  # noqa: S603 (this interpreter, this package)
            [sys.executable, "-c", _WORK, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        self.thread = threading.Thread(target=self._talk, args=(content,), daemon=True)
        self.thread.start()

    def _talk(self, content: bytes) -> None:
        out, _ = self.process.communicate(content)
        self.result = b"" if self.process.returncode else out

    def wait(self) -> bytes:
        """Wait for the packed file; returns no bytes if the process failed."""
        self.thread.join()
        return self.result


_begun: dict[tuple[str, bytes], _Packing] = {}
_finished: dict[tuple[str, bytes], bytes] = {}  # a few, so that a process packs the files of a model once


def start(files: Mapping[str, bytes]) -> None:
    """Begin to pack files that `packed` will be asked for later."""
    for name, content in files.items():
        known = (name, content) in _begun or (name, content) in _finished
        if len(content) >= _WORTH and sys.executable and not known:
            try:
                _begun[name, content] = _Packing(name, content)
            except OSError:
                return


def packed(name: str, content: bytes) -> bytes:
    """Return `packing.pack` of a file, from the process that was begun for it if there is one."""
    key = name, content
    if key not in _finished:
        begun = _begun.pop(key, None)
        while len(_finished) >= _KEPT:
            del _finished[next(iter(_finished))]
        _finished[key] = (begun.wait() if begun else b"") or packing.pack(name, content)
    return _finished[key]


def work(name: str) -> None:
    """Run as the process: read a file from standard input and write its packing to standard output."""
    sys.stdout.buffer.write(packing.pack(name, sys.stdin.buffer.read()))
