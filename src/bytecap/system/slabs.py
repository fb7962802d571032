"""Cut large matrices into slabs of rows, so that what is computed of them never takes their memory again.

The embedding of a large vocabulary is the largest matrix of its model. Where an operation treats rows independently,
it is done slab by slab; matrices of up to 2^20 values are one slab. Slabs are whole multiples of 64 rows, so that
vector instructions treat every row as they do in the whole matrix, and sums have the same bits.

>>> list(slabs(100, 8)), [s.stop - s.start for s in slabs(20_000, 128)]
([slice(0, 100, None)], [8192, 8192, 3616])
"""

from __future__ import annotations

from collections.abc import Iterator

_VALUES = 2**20
_ROWS = 64


def slabs(rows: int, cols: int, share: int = 1) -> Iterator[slice]:
    """Yield slices of consecutive rows that together are a matrix of `rows` rows and `cols` columns.

    Args:
        rows: of the matrix.
        cols: of the matrix.
        share: makes slabs as many times smaller, for what takes many bytes a value.
    """
    high = max(1, _VALUES // share // max(1, cols) // _ROWS) * _ROWS
    for at in range(0, rows, high):
        yield slice(at, min(at + high, rows))
