"""The source's own floats with fewer bits of mantissa: exact where that is wanted, as coarse as one bit.

Written with the `exact` coder, whose tables skip what never occurs.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bytecap.format.coders.exact import CODER as EXACT
from bytecap.format.coders.exact import from_bytes, to_bytes
from bytecap.job import Section

Array = npt.NDArray[np.float32]


def rounded(values: Array, bits: int, dtype: str) -> Array:
    """Values with `bits` mantissa bits, to nearest, towards zero where that would overflow `dtype`.

    >>> rounded(np.float32([1.3, -65504.0]), 2, "F16").tolist()
    [1.25, -57344.0]
    """
    drop = 23 - bits
    if drop <= 0:
        return values
    raw = np.ascontiguousarray(values, np.float32).view(np.uint32)
    low = raw & np.uint32(0xFFFFFFFF << drop & 0xFFFFFFFF)
    near = (raw + np.uint32(1 << (drop - 1))) & np.uint32(0xFFFFFFFF << drop & 0xFFFFFFFF)
    with np.errstate(over="ignore"):
        fits = np.isfinite(from_bytes(to_bytes(near.view(np.float32), dtype), dtype)).reshape(near.shape)
    return np.where(fits, near, low).view(np.float32)


def section(values: Array, dtype: str, bits: int, finer: int = 0) -> Section:
    """`exact` section of (rows, cols) values with `bits` mantissa bits, the first `finer` values with one more."""
    kept = rounded(values.reshape(-1), bits, dtype).copy()
    kept[:finer] = rounded(values.reshape(-1)[:finer], bits + 1, dtype)
    return Section(EXACT.tag, EXACT.encode(kept.reshape(values.shape), dtype))
