"""Coders of `--method golf`: a tensor's integers take the smallest of three."""

from __future__ import annotations

import numpy as np

from bytecap.format.coders.bands import CODER as BANDS
from bytecap.format.coders.packed import BROTLI, CODER, Quantized
from bytecap.format.coders.stack import CODER as STACK
from bytecap.format.overlays.order import CODER as ORDER
from bytecap.format.overlays.order import by_likeness
from bytecap.job import Section
from bytecap.methods.baselines.uniform import Writer

_SORTED_ROWS = 16_384  # sorting takes time of the square


def with_brotli(matrix: Quantized) -> Section:
    """Return a `packed` section under brotli-11."""
    return Section(CODER.tag, CODER.encode(matrix, BROTLI))


def sorted_rows(matrix: Quantized) -> Section:
    """Return a `packed` section under brotli-11 with similar rows together, and the permutation back."""
    chain = by_likeness(matrix.codes)
    base = with_brotli(Quantized(matrix.codes[chain], matrix.scales[chain]))
    return Section(STACK.tag, STACK.encode((base.tag, base.data), [(ORDER.tag, ORDER.encode(np.argsort(chain)))]))


def smallest(matrix: Quantized) -> Section:
    """Return the smallest of `packed` under brotli-11, `bands`, and, where rows may be alike, sorted rows."""
    plain, banded = with_brotli(matrix), Section(BANDS.tag, BANDS.encode(matrix))
    found = [plain, banded]
    rows, cols = matrix.codes.shape
    if rows <= _SORTED_ROWS and (rows > 4 * cols or len(plain.data) <= len(banded.data)):
        found.append(sorted_rows(matrix))
    return min(found, key=lambda s: len(s.data))


WRITERS: dict[str, Writer] = {"best": smallest, "brotli": with_brotli}
