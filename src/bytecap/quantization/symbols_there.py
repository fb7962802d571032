"""Leave a rounded matrix's integers on the GPU that found them until somebody reads them.

Most roundings of a fit are only priced, which takes counts, or decoded where they are. The integers of all matrices are
a byte a weight, and to bring them to the processor each time takes longer than to find them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bytecap.format.coders.grid import GridCode, IntArray


class GridCodeThere(GridCode):
    """A grid code whose symbols are on another device; read from it when they are asked for.

    Args:
        symbols: (rows, cols), int8, int16 or int32; an array where one was put in place of them.
        others: as of any grid code.
    """

    def __init__(self, symbols: Tensor | IntArray, **others: Any) -> None:
        object.__setattr__(self, "there", symbols if isinstance(symbols, Tensor) else torch.from_numpy(symbols))
        for name, value in others.items():
            object.__setattr__(self, name, value)

    there: Tensor


def _symbols(self: GridCodeThere) -> IntArray:
    """Copy the symbols (rows, cols); every time, so whoever needs them twice keeps them."""
    found: IntArray = self.there.cpu().numpy()
    return found


setattr(GridCodeThere, "symbols", property(_symbols))  # noqa: B010 (a property in place of a field)


def symbols_anywhere(code: GridCode) -> Tensor:
    """Return the symbols (rows, cols) where they are."""
    return code.there if isinstance(code, GridCodeThere) else torch.from_numpy(np.ascontiguousarray(code.symbols))
