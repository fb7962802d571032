"""Run the coder's inner loops in machine code where numba is installed, with the same bits as numpy.

Numba costs half a second to import, so small files are decoded without it. Nothing here is needed to read a file.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from bytecap.errors import CorruptError
from bytecap.format.entropy.frequencies import Tables

_WORTH = 2**22  # symbols or weights from which importing numba pays


def worth(count: int) -> bool:
    """Return whether `count` values are decoded sooner with numba; False where it is not installed.

    >>> worth(10) and "numba" not in sys.modules
    False
    """
    if "numba" in sys.modules:
        return True
    return count >= _WORTH and importlib.util.find_spec("numba") is not None


def cores() -> int:
    """Return the number of cores that this process may use.

    >>> cores() >= 1
    True
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def kernel(name: str) -> Any:
    """Return a compiled function of `bytecap.format.entropy.kernels`."""
    from bytecap.format.entropy import kernels

    return getattr(kernels, name)


def encoder(name: str) -> Any:
    """Return a compiled function of `bytecap.format.entropy.encode_kernels`."""
    from bytecap.format.entropy import encode_kernels

    return getattr(encode_kernels, name)


def run_lanes(
    states: npt.NDArray[np.uint32],
    words: npt.NDArray[np.uint16],
    classes: npt.NDArray[Any],
    tables: Tables,
    escapes: int,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64], int]:
    """Decode one stream; returns its symbols, the places of escapes, and the words used. Changes `states`.

    Args:
        states: (lanes,) first states.
        words: of the stream.
        classes: (n,) of every symbol, below 256.
        tables: of all classes.
        escapes: most escapes there can be.
    """
    symbols = np.empty(len(classes), np.int32)
    where = np.empty(escapes, np.int64)
    used, found = kernel("lanes")(
        states, words, np.ascontiguousarray(classes, np.uint8), *tables.compact, *tables.edges, symbols, where
    )
    if used < 0:
        raise CorruptError(f"class {found} has no table")
    if found > escapes:
        raise CorruptError("the escaped symbols of a stream are damaged")
    return symbols, where[:found], used


def encode_lanes(
    entries: npt.NDArray[Any], freq: npt.NDArray[Any], cum: npt.NDArray[Any], states: npt.NDArray[np.uint32]
) -> npt.NDArray[np.uint16]:
    """Encode one stream; returns its words. Changes `states`.

    Args:
        entries: (n,) of every symbol, into the tables.
        freq: frequency by entry.
        cum: cumulative frequency by entry.
        states: (lanes,) first states.
    """
    words = np.empty(len(entries), np.uint16)  # a symbol costs one at most
    found: npt.NDArray[np.uint16] = words[kernel("encode")(states, entries, freq, cum, words) :]
    return found
