"""Decode artifacts a second way, written from `docs/format.md` alone; section numbers are the document's.

It shares nothing with the package but the names of the errors, so that a mistake in either decoder or in the document
shows up as a difference. It needs only numpy, and brotli where that is used. Omitted: side files; writing.
"""

from __future__ import annotations

from itertools import accumulate
from math import prod

import numpy as np

from bytecap.reference.container import Reader, Unit, contents, require
from bytecap.reference.objects import all_used, read_objects
from bytecap.reference.stack import CODERS
from bytecap.reference.streams import Array, Shared, decode_streams, read_tables


def decode_file(data: bytes) -> dict[str, Array]:
    """Decode an artifact's bytes; returns tensors by name, aliases included, in stored layout (errors: section 8)."""
    units, tables, objects, bodies = contents(data)
    shared = read_tables(tables, read_objects(objects))
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


def _decode_batch(batch: list[tuple[Unit, bytes]], shared: Shared) -> list[Array]:
    """Section 6: decode the streams that coders wait for together, until every coder has returned its matrix."""
    require(all(unit.coder in CODERS for unit, _ in batch), "a unit names a coder that does not exist")
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
