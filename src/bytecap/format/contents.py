"""Define the contents of an artifact as its parts, still encoded.

>>> unit = StoredUnit(Unit("w", (2, 2), "F32"), 1, 4, lambda: b"1234")
>>> unit.length, unit.data
(4, b'1234')
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bytecap.types import Unit

FILE = 4  # kind of a side file's section


@dataclass(frozen=True)
class UnitSection:
    """A unit as stored."""

    unit: Unit
    tag: int
    data: bytes

    @property
    def length(self) -> int:
        """Number of bytes."""
        return len(self.data)


class Elsewhere:
    """Bytes that are elsewhere, and read whenever they are asked for; a base of sections that would hold `data`."""

    _length: int
    read: Callable[[], bytes]

    @property
    def length(self) -> int:
        """Number of bytes."""
        return self._length

    @property
    def data(self) -> bytes:
        """Read the bytes."""
        return self.read()


class StoredUnit(Elsewhere, UnitSection):
    """A unit whose bytes are elsewhere.

    Args:
        unit, tag: see `UnitSection`.
        length: number of bytes.
        read: gives them.
    """

    def __init__(self, unit: Unit, tag: int, length: int, read: Callable[[], bytes]) -> None:
        vars(self).update(unit=unit, tag=tag, _length=length, read=read)


@dataclass(frozen=True)
class FileSection:
    """A side file or code file as stored; `data` is packed, see `sidefiles.packing` and `codefiles`."""

    name: str
    data: bytes
    kind: int = FILE


@dataclass(frozen=True)
class Base:
    """The file that an update stands on.

    Attributes:
        sha256: of that file's bytes, 64 hexadecimal digits.
        dropped: its side and code files that the update leaves out.
        contents: what is in it, once it was found (`bytecap.format.updates`).
    """

    sha256: str
    dropped: tuple[str, ...] = ()
    contents: Contents | None = None


@dataclass(frozen=True)
class Contents:
    """Everything in an artifact, still encoded.

    Attributes:
        units: in state-dict order; of an update those that are not as in the base.
        tables: the shared tables section, may be empty.
        files: packed side files, and code files behind them.
        about: method, budget and other remarks; small and optional.
        padding: number of zero bytes at the end.
        objects: shared objects, which sections refer to by their place.
        base: the file that this one is an update of, or None.
    """

    units: tuple[UnitSection, ...]
    tables: bytes
    files: tuple[FileSection, ...]
    about: dict[str, Any]
    padding: int = 0
    objects: tuple[bytes, ...] = ()
    base: Base | None = None
