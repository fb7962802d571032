"""Decode artifacts a second way, written from `docs/format.md` alone; section numbers are the document's.

It shares nothing with the package but the names of the errors, so that a mistake in either decoder or in the document
shows up as a difference. It needs only numpy, and brotli where that is used. Omitted: side files; writing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import accumulate
from math import prod

import numpy as np

from bytecap.errors import BaseError
from bytecap.reference.container import Contents, Reader, Unit, contents, require
from bytecap.reference.objects import all_used, read_objects
from bytecap.reference.stack import CODERS, check_work
from bytecap.reference.streams import Array, Shared, decode_streams, read_tables


def decode_file(data: bytes, bases: Sequence[bytes] = ()) -> dict[str, Array]:
    """Decode an artifact's bytes; returns tensors by name, aliases included, in stored layout (errors: section 8).

    Args:
        data: of the file.
        bases: of the files that it is an update of (4.1), in any order.
    """
    parts, left = [_checked(data)], {hashlib.sha256(one).hexdigest(): one for one in bases}
    while parts[-1].base:
        wanted = parts[-1].base[0]
        if wanted not in left:
            raise BaseError(f"the base has SHA-256 {wanted}, given are {sorted(left)}")
        parts.append(_checked(left.pop(wanted)))
    if left:
        raise BaseError(f"files that are no base were given: {sorted(left)}")
    values: dict[str, Array] = {}
    units: dict[str, Unit] = {}
    files: set[str] = set()
    for part in reversed(parts):
        if part.base:
            require(files >= set(part.base[1]), "a file is left out that the base does not hold")
            require(all(_same_form(u, units.get(u.name)) for u in part.units), "a unit is not that of the base")
            files -= set(part.base[1])
        values |= _decode_part(part, values)
        units |= {u.name: u for u in part.units}
        files |= set(part.files)
    return values


def _checked(data: bytes) -> Contents:
    """Sections 2 to 4: the parts of a file, which may ask for the work that they ask for."""
    part = contents(data)
    check_work(part.units, part.bodies, len(data))
    return part


def _same_form(unit: Unit, base: Unit | None) -> bool:
    """4.1: a unit of an update has the shape, flags and aliases that it has in the base."""
    return base is not None and all(getattr(unit, k) == getattr(base, k) for k in ("shape", "flags", "aliases"))


def _decode_part(part: Contents, below: dict[str, Array]) -> dict[str, Array]:
    """Decode the units of one file, given all values of its base in stored layout."""
    units, tables, objects, bodies = part[:4]
    shared = read_tables(tables, read_objects(objects))
    if part.base:
        shared[2].below = {u.name: _matrix(u, below[u.name]) for u in units}
    batches: dict[int, list[tuple[Unit, bytes]]] = {}
    ends = accumulate(max(prod(u.shape), 2**16) for u in units)  # small units cost tables and places
    for unit, body, end in zip(units, bodies, ends, strict=True):
        batches.setdefault(end // 2**25, []).append((unit, body))  # values decoded together
    values: dict[str, Array] = {}
    for batch in batches.values():
        for (unit, _), matrix in zip(batch, _decode_batch(batch, shared), strict=True):
            array = np.ascontiguousarray(matrix.T if unit.flags & 1 else matrix).reshape(unit.shape)
            values |= dict.fromkeys((unit.name, *unit.aliases), array)
    require(all_used(shared[2]), "a shared object is not used")
    return values


def _matrix(unit: Unit, array: Array) -> Array:
    """Section 4: the matrix view of a tensor in stored layout."""
    rows, cols = unit.matrix()
    return array.reshape(cols, rows).T if unit.flags & 1 else array.reshape(rows, cols)


def _decode_batch(batch: list[tuple[Unit, bytes]], shared: Shared) -> list[Array]:
    """Section 6: decode the streams that coders wait for together, until every coder has returned its matrix."""
    running = [CODERS[unit.coder](unit, Reader(body), shared) for unit, body in batch]
    matrices: list[Array] = [np.zeros(0)] * len(batch)
    waiting: dict[int, list[Array] | None] = dict.fromkeys(range(len(batch)))
    while waiting:
        asked = {}
        for i, symbols in waiting.items():
            try:
                asked[i] = running[i].send(symbols)  # type: ignore[arg-type]
            except StopIteration as stop:
                matrices[i] = stop.value
        decoded = iter(decode_streams([stream for part in asked.values() for stream in part]))
        waiting = {i: [next(decoded) for _ in part] for i, part in asked.items()}
    return matrices
