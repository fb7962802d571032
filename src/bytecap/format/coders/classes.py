"""Classes of symbols, which are quarter octaves of a standard deviation, and the exact powers `2^(k/4)`.

>>> float(quarter(4)), float(quarter(-8))
(2.0, 0.25)
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

CLASSES = 64  # class 0 is the coder's padding
UNIT_CLASS = 20  # the class of standard deviation 1
OCTAVE = 4  # quarter octaves between a column's step and the fine grid of `bytecap.format.coders.trellis`
CENTRES = 17  # reconstruction offsets of |z| = 0..15 and of all larger ones

# 2^(0/4) .. 2^(3/4) as float32 literals: decoders multiply by these and by powers of two, nothing else
_QUARTERS = np.array([1.0, 1.1892071, 1.4142135, 1.6817929], np.float32)


def quarter(k: int | npt.ArrayLike) -> npt.NDArray[np.float32]:
    """Compute `2^(k/4)` in the format's exact float32 arithmetic."""
    whole = np.floor_divide(np.asarray(k, np.int32), 4)
    power: npt.NDArray[np.float32] = np.ldexp(_QUARTERS[np.asarray(k, np.int32) - 4 * whole], whole)
    return power
