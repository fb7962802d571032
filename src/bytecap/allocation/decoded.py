"""Decode what was rounded, as a reader would, before it is written."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bytecap.format.coders import Shared, overlay_coder, run
from bytecap.format.coders.base import CODER as BASE
from bytecap.format.coders.classes import CLASSES
from bytecap.format.coders.grid import CODER as GRID
from bytecap.format.coders.grid import Grid, GridCode, dequantize, weight_classes
from bytecap.format.coders.long_trellis import CODER as LONG_TRELLIS
from bytecap.format.coders.stack import CODER as STACK
from bytecap.format.coders.trellis import CODER as TRELLIS
from bytecap.format.coders.trellis import SHORT, Trellis
from bytecap.format.overlays.difference import CODER as DIFFERENCE
from bytecap.quantization.quantizer import Coded
from bytecap.system.slabs import slabs

FloatArray = npt.NDArray[np.float32]


def on_base(section: tuple[int, bytes], *overlays: tuple[int, bytes]) -> tuple[int, bytes]:
    """The stack that adds the values of a section to those of the base of an update, and overlays to the sum."""
    return STACK.tag, STACK.encode((BASE.tag, b""), [(DIFFERENCE.tag, DIFFERENCE.encode(section)), *overlays])


def coder_of(code: GridCode) -> Grid | Trellis:
    """Return the coder that writes a code."""
    if code.first == CLASSES:
        return GRID
    return TRELLIS if code.memory == SHORT else LONG_TRELLIS


def decode_grid(code: GridCode, shared: Shared) -> FloatArray:
    """Decode a grid code, its rows in one group, to float32 values (rows, cols)."""
    symbols, rows, row_step = code.symbols, code.row_class, code.row_step
    columns, steps, fine = code.column_class, code.column_step, code.fine
    out = np.empty(symbols.shape, np.float32)
    for part in slabs(*symbols.shape):
        classes = weight_classes(columns, rows[part], fine)
        out[part] = dequantize(
            symbols[part].astype(np.int32), classes, np.float32(code.step), steps, row_step[part], shared.offset, fine
        )  # fmt: skip
    return out


def decode_coded(coded: Coded, shared: Shared) -> FloatArray:
    """Decode a unit to float32 values (rows, cols), its overlay included."""
    values = decode_grid(coded.code, shared)
    if coded.below is not None:
        values = coded.below + values
    if coded.overlay is None:
        return values
    tag, data = coded.overlay
    overlaid: FloatArray = run([overlay_coder(tag).apply(data, np.array(values, np.float32, order="C"), shared)])[0]
    return overlaid
