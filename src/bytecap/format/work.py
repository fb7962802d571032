"""Work that an artifact may ask of its reader: so much for every byte of the file, and no more.

Most of what a reader does is a few operations for every value, and a file may declare only so many values (format.md,
4). Three things multiply that: the layers of a stack, the ranks of a low-rank layer, and the decoder and the ranks of
`latent`. Their bytes may be next to nothing (zeros under brotli), so they are counted before anything is decoded.

A unit's work is its declared size times its *steps* (format.md, 4): multiply-adds, roughly, for each of its values.

>>> steps(2, bytes(9), (1, 1)), steps(5, bytes([2, 1, 9]) + bytes(9) + bytes([35, 7, 20, 8, 0, 0, 0, 0, 0]), (64, 64))
(1, 21)
"""

from __future__ import annotations

from bytecap.errors import CorruptError
from bytecap.format.coders import coder, overlay_coder
from bytecap.format.contents import UnitSection

SPARE, PER_BYTE = 1 << 28, 1 << 14  # steps of all values together: for nothing, and for every byte of the file


def steps(tag: int, data: bytes, shape: tuple[int, int]) -> int:
    """Steps for each value of a section of a coder, from its header alone; at least 1.

    Args:
        tag: of the coder.
        data: the section.
        shape: (rows, cols).

    Raises:
        CorruptError: there is no such coder or layer, or the header is damaged.
    """
    owner = coder(tag)
    if hasattr(owner, "parts"):
        (base, _, section), *rest = owner.parts(data)
        return steps(base, section, shape) + sum(_layer_steps(tag, part) for tag, _, part in rest)
    return int(owner.steps(data, shape)) if hasattr(owner, "steps") else 1


def _layer_steps(tag: int, data: bytes) -> int:
    owner = overlay_coder(tag)
    return int(owner.steps(data)) if hasattr(owner, "steps") else 1


def most(size: int) -> int:
    """Steps that a file of so many bytes may ask for."""
    return SPARE + PER_BYTE * size


class Meter:
    """Steps left of a file's."""

    def __init__(self, size: int) -> None:
        self.left = most(size)

    def take(self, section: UnitSection, size: int) -> None:
        """Account for one unit of a declared size; the section is read only where its steps are more than one.

        Raises:
            CorruptError: more work than the file may ask for; the message names the unit.
        """
        name = section.unit.name
        try:
            owner = coder(section.tag)
            many = hasattr(owner, "parts") or hasattr(owner, "steps")
            self.left -= size * (steps(section.tag, section.data, section.unit.matrix_shape) if many else 1)
        except CorruptError as exc:
            raise CorruptError(f"units {name}: {exc}") from exc
        if self.left < 0:
            raise CorruptError(
                f"unit {name} asks for more work than so small a file may: {-self.left:,} steps too many"
            )
