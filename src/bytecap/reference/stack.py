"""Section 6.5: a base coder and layers over it; 6.22 and 6.23: the values of a base, and what is added to them."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import numpy as np

from bytecap.reference.bands import bands
from bytecap.reference.binary import binary
from bytecap.reference.codebook import codebook
from bytecap.reference.coders import Coder, exact, finite, grid, packed, vector
from bytecap.reference.container import Reader, Unit, require
from bytecap.reference.fixed import companded, fixed
from bytecap.reference.latent import latent
from bytecap.reference.overlays import OVERLAYS
from bytecap.reference.streams import Array, Shared
from bytecap.reference.trellis import long_trellis, trellis

CODERS: dict[int, Callable[[Unit, Reader, Shared], Coder]] = {1: grid, 2: vector, 3: exact, 4: packed}
CODERS |= {6: codebook, 7: latent, 8: binary, 9: trellis, 10: fixed, 11: companded, 14: bands, 15: long_trellis}


def base(unit: Unit, reader: Reader, shared: Shared) -> Coder:
    """6.22: `base`, the unit as the base of an update has it."""
    yield from ()
    require(not reader.rest() and unit.name in shared[2].below, "a section without bytes refers to a base")
    return shared[2].below[unit.name]


def difference(unit: Unit, reader: Reader, shared: Shared, values: Array) -> Coder:
    """6.23: `difference`, a layer that adds what another coder decodes."""
    inner = reader.take(1)[0]
    require(inner in {1, 2, 9, 15}, f"a difference of coder {inner}")
    added = yield from CODERS[inner](unit, reader, shared)
    return np.asarray(values + added)


def stack(unit: Unit, reader: Reader, shared: Shared) -> Coder:
    """6.5: `stack`, a base's matrix changed by one layer after the other."""
    below, count = reader.fields("<BB")
    require(1 <= count <= 16, f"a stack has {count} layers")
    parts: list[tuple[int, Reader]] = []
    for _ in range(count + 1):
        tag = below if not parts else reader.fields("<B")[0]
        parts.append((tag, Reader(reader.take(reader.leb()))))
    require(not reader.rest(), "a stack has bytes behind the last layer")
    require(below in CODERS and below != 5, f"coder {below} is no base of a stack")
    require(all(tag in OVERLAYS or tag == 41 for tag, _ in parts[1:]), "there is no such layer")
    matrix = yield from CODERS[below](unit, parts[0][1], shared)
    with np.errstate(over="ignore", invalid="ignore"):
        values: Array = np.array(matrix, np.float32, order="C")
        for tag, part in parts[1:]:
            if tag == 41:
                values = yield from difference(unit, part, shared, values)
            else:
                values = yield from OVERLAYS[tag](part, values, shared[2])
    return finite(values)


CODERS |= {5: stack, 16: base}


def check_work(units: list[Unit], bodies: list[bytes], size: int) -> None:
    """Section 4: no more work than a file of that size may ask for."""
    sizes = (prod(max(n, 1) for n in u.shape) for u in units)
    work = sum(n * steps(u.coder, body) for n, u, body in zip(sizes, units, bodies, strict=True))
    require(work <= 2**28 + 2**14 * size, f"{work} steps of work for {size} bytes")


def steps(coder: int, body: bytes) -> int:
    """Section 4: the steps for each value of a unit."""
    require(coder in CODERS, f"coder {coder} does not exist")
    reader = Reader(body)
    if coder == 7:
        form = reader.fields("<BB")[0]
        reader.leb()
        return int(1 + reader.leb() + (192 if form & 2 else 0))
    if coder != 5:
        return 1
    (base, count), total = reader.fields("<BB"), 0
    require(1 <= count <= 16 and base != 5, f"a stack has {count} layers over coder {base}")
    for i in range(count + 1):
        tag = reader.take(1)[0] if i else base
        part = reader.take(reader.leb())
        total += steps(tag, part) if not i else Reader(part).take(1)[0] if tag == 35 else 1
    return total
