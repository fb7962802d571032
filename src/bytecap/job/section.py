"""Define `Section`, one unit as the file stores it.

>>> section = StoredSection(3, 5, lambda: b"bytes")
>>> section.tag, section.length, section.data
(3, 5, b'bytes')
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bytecap.format.contents import Elsewhere


@dataclass(frozen=True)
class Section:
    """One unit as stored: the coder's on-disk tag and its bytes."""

    tag: int
    data: bytes

    @property
    def length(self) -> int:
        """Return the number of bytes."""
        return len(self.data)


class StoredSection(Elsewhere, Section):
    """A section whose bytes are elsewhere.

    Args:
        tag: of the coder.
        length: number of bytes.
        read: gives them.
    """

    def __init__(self, tag: int, length: int, read: Callable[[], bytes]) -> None:
        vars(self).update(tag=tag, _length=length, read=read)
