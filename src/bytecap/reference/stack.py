"""Section 6.5: a base coder and layers over it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bytecap.reference.binary import binary
from bytecap.reference.codebook import codebook
from bytecap.reference.coders import Coder, exact, finite, grid, packed, vector
from bytecap.reference.container import Reader, Unit, require
from bytecap.reference.latent import latent
from bytecap.reference.streams import Array, Shared

CODERS: dict[int, Callable[[Unit, Reader, Shared], Coder]] = {1: grid, 2: vector, 3: exact, 4: packed}
LAYERS: dict[int, Callable[[Unit, Reader, Shared, Array], Coder]] = {}
CODERS[6] = codebook
CODERS[7] = latent
CODERS[8] = binary


def stack(unit: Unit, reader: Reader, shared: Shared) -> Coder:
    """A base's matrix, changed by one layer after the other."""
    base, count = reader.fields("<BB")
    parts: list[tuple[int, Reader]] = []
    for _ in range(count + 1):
        tag = base if not parts else reader.fields("<B")[0]
        parts.append((tag, Reader(reader.take(reader.leb()))))
    require(count >= 1 and not reader.rest(), "a stack has no layer, or bytes behind the last one")
    require(base in CODERS and base != 5, f"coder {base} is no base of a stack")
    matrix: Any = yield from CODERS[base](unit, parts[0][1], shared)
    for tag, part in parts[1:]:
        require(tag in LAYERS, f"there is no layer {tag}")
        matrix = yield from LAYERS[tag](unit, part, shared, matrix)
    return finite(matrix)


CODERS[5] = stack
