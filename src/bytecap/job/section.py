"""Define `Section`, one unit as the file stores it.

>>> section = StoredSection(3, 5, lambda: b"bytes")
>>> section.tag, section.length, section.data
(3, 5, b'bytes')
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Section:
    """One unit as stored: the coder's on-disk tag and its bytes."""

    tag: int
    data: bytes

    @property
    def length(self) -> int:
        """Return the number of bytes."""
        return len(self.data)


class StoredSection(Section):
    """A section whose bytes are elsewhere, and read whenever they are asked for.

    Args:
        tag: of the coder.
        length: number of bytes.
        read: gives them.
    """

    def __init__(self, tag: int, length: int, read: Callable[[], bytes]) -> None:
        for name, value in (("tag", tag), ("_length", length), ("read", read)):
            object.__setattr__(self, name, value)

    _length: int
    read: Callable[[], bytes]

    @property
    def length(self) -> int:
        """Return the number of bytes."""
        return self._length

    @property
    def data(self) -> bytes:
        """Read the bytes."""
        return self.read()
