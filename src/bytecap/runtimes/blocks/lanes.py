"""Add products to a pair of rows, sixteen lanes at a time, as LLVM code.

Compilers do the loop over lanes well, but check in front of each that none of its ten rows are the same memory, and
turn every row into a view: at 64 lanes that takes as long as the products. Here the addresses are taken once. Sums
have the order and the rounding of the plain loop.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from bytecap.system import llvm

_WIDTH = 16
_EXACT = ("contract", "nsz")  # what `search.compiled` allows


def _add_eight(typing: Any, x: Any, y: Any, m: Any, n: Any, error: Any, lanes: Any) -> Any:
    """Add `sum_j m_j e_j` to `x`, and `sum_j n_j e_j` to `y`, over eight rows `e_j` of `error`.

    Args:
        typing: numba's.
        x: address of a row of float32.
        y: of another.
        m: address of eight factors.
        n: of eight others.
        error: address of eight rows, one after the other.
        lanes: numbers in a row, a constant and a multiple of 16.
    """
    del typing, x, y, m, n, error
    if not isinstance(lanes, types.IntegerLiteral):
        return None
    count = lanes.literal_value
    signature = types.void(*[types.uint64] * 5, lanes)
    return signature, lambda _context, builder, _signature, args: _code(builder, args[:5], count)


add_eight: Any = intrinsic(_add_eight)


def _code(builder: Any, args: Any, lanes: int) -> None:
    """Write the LLVM code of `add_eight`."""
    single, wide = ir.FloatType(), ir.VectorType(ir.FloatType(), _WIDTH)
    x, y, m, n, error = args

    def place(address: Any, number: int) -> Any:
        return builder.add(address, ir.Constant(ir.IntType(64), 4 * number))

    def load(address: Any, number: int, kind: Any) -> Any:
        return llvm.load(builder, place(address, number), kind, 4)

    factors = [[llvm.spread(builder, load(a, j, single), _WIDTH) for j in range(8)] for a in (m, n)]
    for first in range(0, lanes, _WIDTH):
        rows = [load(error, j * lanes + first, wide) for j in range(8)]
        for out, own in zip((x, y), factors, strict=True):
            total = builder.fmul(own[0], rows[0], flags=_EXACT)
            for factor, row in zip(own[1:], rows[1:], strict=True):
                total = builder.fadd(total, builder.fmul(factor, row, flags=_EXACT), flags=_EXACT)
            total = builder.fadd(load(out, first, wide), total, flags=_EXACT)
            llvm.store(builder, total, place(out, first), 4)
