"""Section 6.5: a base coder and layers over it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bytecap.reference.bands import bands
from bytecap.reference.binary import binary
from bytecap.reference.codebook import codebook
from bytecap.reference.coders import Coder, exact, finite, grid, packed, vector
from bytecap.reference.container import Reader, Unit, require
from bytecap.reference.fixed import companded, fixed
from bytecap.reference.latent import latent
from bytecap.reference.layers import LAYERS
from bytecap.reference.streams import Array, Shared
from bytecap.reference.trellis import trellis

CODERS: dict[int, Callable[[Unit, Reader, Shared], Coder]] = {1: grid, 2: vector, 3: exact, 4: packed}
CODERS |= {6: codebook, 7: latent, 8: binary, 9: trellis, 10: fixed, 11: companded, 14: bands}


def stack(unit: Unit, reader: Reader, shared: Shared) -> Coder:
    """6.5: `stack`, a base's matrix changed by one layer after the other."""
    base, count = reader.fields("<BB")
    require(1 <= count <= 16, f"a stack has {count} layers")
    parts: list[tuple[int, Reader]] = []
    for _ in range(count + 1):
        tag = base if not parts else reader.fields("<B")[0]
        parts.append((tag, Reader(reader.take(reader.leb()))))
    require(not reader.rest(), "a stack has bytes behind the last layer")
    require(base in CODERS and base != 5, f"coder {base} is no base of a stack")
    require(all(tag in LAYERS for tag, _ in parts[1:]), "there is no such layer")
    matrix = yield from CODERS[base](unit, parts[0][1], shared)
    with np.errstate(over="ignore", invalid="ignore"):
        values: Array = np.array(matrix, np.float32, order="C")
        for tag, part in parts[1:]:
            values = yield from LAYERS[tag](part, values, shared[2])
    return finite(values)


CODERS[5] = stack
