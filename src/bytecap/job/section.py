"""Define `Section`, one unit as the file stores it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Section:
    """One unit as stored: the coder's on-disk tag and its bytes."""

    tag: int
    data: bytes
