"""Keep tensors of a job that is larger than memory in files of its own, which vanish with it.

What a streamed fit needs again later (hidden states, factors, rounded integers, finished sections) is written once and
read when it is used. Files go as soon as nothing refers to them; the directory goes with the job, or with the process.
What a killed process has left is removed by the next job that makes work files in the same place: a living one holds a
lock, which the system drops however it dies.

>>> scratch = Scratch()
>>> kept = scratch.put(torch.arange(6.0).reshape(2, 3))
>>> kept.load().tolist(), kept.shape
([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]], (2, 3))
>>> scratch.put_bytes(b"section").read()
b'section'
>>> scratch.close()
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from bytecap.errors import OutputError
from bytecap.system.atomic import open_regular
from bytecap.system.transfers import to_device, to_memory

try:
    import fcntl
except ImportError:  # pragma: no cover (Windows)
    fcntl = None  # type: ignore[assignment]

_PREFIX, _LOCK = "bytecap-work-", "lock"
_CHUNK = 2**24  # bytes moved at once from a device


@dataclass(frozen=True, eq=False)
class KeptBytes:
    """Bytes in a file of their own, which is removed with this object."""

    path: Path
    length: int

    def read(self) -> bytes:
        """Return the bytes."""
        return self.path.read_bytes()


@dataclass(frozen=True, eq=False)
class KeptTensor:
    """A tensor in a file of its own, which is removed with this object.

    Attributes:
        path: raw values, row by row.
        shape, dtype: of the tensor.
        memory: the tensor itself, where it was small enough to stay.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    memory: Tensor | None = None

    def load(self, device: torch.device | str = "cpu", rows: slice | None = None) -> Tensor:
        """Return the tensor, or consecutive entries along its first axis, on a device; to be left as it is."""
        if self.memory is not None:
            return to_device(self.memory if rows is None else self.memory[rows], device)
        start, stop = (0, self.shape[0] if self.shape else 1) if rows is None else (rows.start, rows.stop)
        one = math.prod(self.shape[1:]) * torch.empty(0, dtype=self.dtype).element_size()
        raw = torch.from_numpy(np.fromfile(self.path, np.uint8, (stop - start) * one, offset=start * one))
        shape = self.shape if rows is None else (stop - start, *self.shape[1:])
        return to_device(raw.view(self.dtype).reshape(shape), device)


def _locked(place: Path) -> tuple[Path, BinaryIO]:
    """Make a directory with a locked file in it."""
    while True:
        directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
        f = (directory / _LOCK).open("wb")
        if fcntl is not None:
            with contextlib.suppress(OSError):  # without locks nobody sweeps either
                fcntl.flock(f, fcntl.LOCK_EX)
        if os.fstat(f.fileno()).st_nlink:
            return directory, f
        f.close()  # swept between its birth and our lock


def _remove(directory: Path, lock: BinaryIO) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    lock.close()


def sweep(place: Path) -> None:
    """Remove the work files that killed jobs of this user have left in a directory, which may be missing."""
    if fcntl is None:
        return
    with contextlib.suppress(OSError):
        for entry in [e for e in os.scandir(place) if e.name.startswith(_PREFIX)]:
            with contextlib.suppress(OSError), open_regular(Path(entry.path) / _LOCK, os.O_RDWR) as f:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails where its job lives
                if os.fstat(f.fileno()).st_uid == os.geteuid() and not entry.is_symlink():
                    shutil.rmtree(entry.path, ignore_errors=True)


class Scratch:
    """A directory of work files.

    Args:
        directory: where it is made; by default where the system keeps temporary files.
        memory: bytes of tensors that may stay in the machine's memory instead.
        device_memory: bytes of tensors that may stay on the device they are on.
    """

    def __init__(self, directory: Path | str | None = None, memory: int = 0, device_memory: int = 0) -> None:
        place = Path(directory or tempfile.gettempdir())
        sweep(place)
        try:
            self.directory, lock = _locked(place)
        except OSError as exc:
            raise OutputError(f"no work files can be made in {place}: {exc}") from exc
        self.close = weakref.finalize(self, _remove, self.directory, lock)
        self._numbers, self._left = count(), {"cpu": memory, "device": device_memory}

    def put(self, tensor: Tensor) -> KeptTensor:
        """Keep a tensor.

        Raises:
            OutputError: the disk is full.
        """
        tensor = tensor.detach().contiguous()
        shape, size = tuple(tensor.shape), tensor.numel() * tensor.element_size()
        path = self._path()
        for place in ("device", "cpu") if tensor.device.type != "cpu" else ("cpu",):
            if size <= self._left[place]:
                self._left[place] -= size
                kept = KeptTensor(path, shape, tensor.dtype, tensor if place == "device" else to_memory(tensor))
                weakref.finalize(kept, self._give_back, place, size)
                return kept
        flat = tensor.reshape(-1)
        step = max(1, _CHUNK // max(1, tensor.element_size()))
        self._write(path, (flat[i : i + step].cpu().view(torch.uint8).numpy() for i in range(0, len(flat), step)))
        kept = KeptTensor(path, shape, tensor.dtype)
        weakref.finalize(kept, path.unlink, missing_ok=True)
        return kept

    def put_bytes(self, data: bytes) -> KeptBytes:
        """Keep bytes.

        Raises:
            OutputError: the disk is full.
        """
        path = self._path()
        self._write(path, [data])
        kept = KeptBytes(path, len(data))
        weakref.finalize(kept, path.unlink, missing_ok=True)
        return kept

    def write(self, pieces: Iterable[bytes]) -> Path:
        """Write a file that stays as long as the directory; returns its path.

        Raises:
            OutputError: the disk is full.
        """
        path = self._path()
        self._write(path, pieces)
        return path

    def _path(self) -> Path:
        return self.directory / str(next(self._numbers))

    def _give_back(self, place: str, size: int) -> None:
        self._left[place] += size

    def _write(self, path: Path, parts: Iterable[Any]) -> None:
        try:
            with path.open("wb") as f:
                for part in parts:
                    f.write(part)
        except OSError as exc:
            path.unlink(missing_ok=True)
            raise OutputError(
                f"work files in {self.directory.parent} cannot be written ({exc.strerror or exc}): free some space, "
                "set TMPDIR to another disk, or raise --memory so that fewer are needed"
            ) from exc
