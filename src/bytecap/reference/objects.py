"""Section 5.3: shared objects."""

from __future__ import annotations

from typing import Any

from bytecap.reference.codebook import numbers, table
from bytecap.reference.container import Reader, require
from bytecap.reference.latent import arrays
from bytecap.reference.layers import positions
from bytecap.reference.streams import Objects


def _object(reader: Reader) -> tuple[int, Any]:
    kind = reader.take(1)[0]
    value: Any = None
    if kind == 1:
        g, form = reader.fields("<BB")
        n = reader.leb()
        require(1 <= g <= 16 and form < 2 and 1 <= n <= 65536, f"form {form}, {n} codewords of {g}")
        value = numbers(reader, n * g, form).reshape(n, g)
    elif kind == 2:
        value = arrays(reader, 64)
    elif kind == 3:
        limit = reader.leb()
        require(limit <= 2**31, f"positions below {limit}")
        value = limit, positions(reader, limit, Objects())
    elif kind == 4:
        size = reader.leb()
        require(1 <= size <= 4096, f"a table of {size} symbols")
        value = size, table(reader, size)
    require(value is not None and not reader.rest(), f"an object of kind {kind} is unknown or has bytes left over")
    return kind, value


def read_objects(sections: list[bytes]) -> Objects:
    """5.3: all objects of a file."""
    return Objects([_object(Reader(section)) for section in sections])


def all_used(objects: Objects) -> bool:
    """5.3: whether every object is used."""
    return len(objects.used) == len(objects.items)
