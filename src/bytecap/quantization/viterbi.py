"""Search the path of least squared error down a column by Viterbi's algorithm, in vector instructions.

A state is the last `memory` bits of the path. State `i` and state `i + half` lead to the same two states, `2i` and
`2i + 1`, with the two subsets swapped, so a row of the search is `half` butterflies that do not depend on each other.
They are written as vectors in LLVM's language, eight butterflies at a time, because loops over them are not turned
into vectors by themselves; 256 states then cost less than twice of what eight cost in a plain loop. Every operation is
a float32 sum or comparison of its own, so all processors find the same path.

Distances are to the points, not to the centroids: centroids would pull the grid together at every refit.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from bytecap.format.coders.trellis import MASKS
from bytecap.system import llvm

_Array = npt.NDArray[Any]
_FAR = np.float32(1e30)
_ONE, _HALF, _QUARTER, _FOUR = np.float32(1), np.float32(0.5), np.float32(0.25), np.float32(4)
_SETTLE = 16  # rows between subtractions of the least cost


@cache
def masks_of(memory: int) -> _Array:
    """Return both bits of the subset to which bit 0 leads from the lower half of the states, uint8 (2, states / 2)."""
    states = range(1 << (memory - 1))
    return np.array([[(2 * s & m).bit_count() & 1 for s in states] for m in MASKS[memory]], np.uint8)


def decisions(rows: int, memory: int) -> _Array:
    """Return room for a search: a bit for every row and state."""
    return np.empty((rows, 2, max(1, (1 << memory) // 16)), np.uint8)


def _plain(cost: _Array, new: _Array, masks: _Array, came: _Array, row: int, branch: _Array) -> None:
    """Go one row further: costs (states,) from `cost` to `new`, and into `came[row]` the predecessors, by bit.

    Args:
        cost: of the best path to every state.
        new: gets those one row further.
        masks: of `masks_of`.
        came: gets a 1 where the predecessor lies in the upper half.
        row: of `came`.
        branch: cost (4,) of every subset.
    """
    half = masks.shape[1]
    subset = masks[0] + 2 * masks[1]
    for bit in (0, 1):
        one, two = cost[:half] + branch[subset ^ 2 * bit], cost[half:] + branch[subset ^ 2 - 2 * bit]
        new[bit::2] = np.where(two < one, two, one)
        came[row, bit] = np.packbits(two < one, bitorder="little")


class _Vectors:
    """Build vector code: `width` butterflies at a time."""

    def __init__(self, builder: Any, width: int) -> None:
        self.builder, self.width = builder, width
        self.floats, self.bytes = (ir.VectorType(t, width) for t in (ir.FloatType(), ir.IntType(8)))

    def shuffle(self, one: Any, two: Any, places: list[int]) -> Any:
        """Pick lanes of two vectors."""
        index = ir.Constant(ir.VectorType(ir.IntType(32), len(places)), places)
        return self.builder.shuffle_vector(one, two, index)

    def load(self, base: Any, offset: Any, kind: Any) -> Any:
        """Load a vector that begins with element `offset` of an array."""
        return llvm.load(self.builder, self.builder.gep(base, [offset]), kind, 1)

    def store(self, value: Any, base: Any, offset: Any) -> None:
        """Store a vector into an array."""
        llvm.store(self.builder, value, self.builder.gep(base, [offset]), 1)

    def everywhere(self, base: Any, index: int) -> Any:
        """Load one element into all lanes."""
        place = self.builder.gep(base, [ir.Constant(ir.IntType(64), index)])
        return llvm.spread(self.builder, self.builder.load(place), self.width)

    def is_set(self, base: Any, offset: Any) -> Any:
        """Load bytes as truth values."""
        return self.builder.icmp_unsigned(
            "!=", self.load(base, offset, self.bytes), ir.Constant(self.bytes, [0] * self.width)
        )

    def best(self, one: Any, two: Any) -> tuple[Any, Any]:
        """Return the smaller of two costs, and a byte that says where that is the second."""
        lower = self.builder.fcmp_ordered("<", two, one)
        bits = self.builder.bitcast(lower, ir.IntType(self.width))
        byte = bits if self.width == 8 else self.builder.zext(bits, ir.IntType(8))
        return self.builder.select(lower, two, one), byte


def _butterflies(width: int) -> Any:
    """Make `_plain` in vectors of `width` butterflies; `width` must divide half the states."""

    @intrinsic
    def advance(typing: Any, cost: Any, new: Any, masks: Any, came: Any, row: Any, branch: Any) -> Any:
        del typing

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            arrays = [
                context.make_array(kind)(context, builder, value) if isinstance(kind, types.Array) else value
                for kind, value in zip(signature.args, args, strict=True)
            ]
            number = context.cast(builder, args[4], signature.args[4], types.intp)
            half = builder.extract_value(arrays[2].shape, 1)
            _emit(_Vectors(builder, width), [a.data for a in (*arrays[:4], arrays[5])], number, half)
            return context.get_dummy_value()

        return types.void(cost, new, masks, came, row, branch), generate

    return advance


def _emit(v: _Vectors, data: list[Any], row: Any, half: Any) -> None:
    """Write the loop over a row's butterflies; `data` points to costs, new costs, masks, decisions, branches."""
    cost, new, masks, came, branch = data
    b, width = v.builder, ir.Constant(half.type, v.width)
    near = [v.everywhere(branch, d) for d in range(4)]
    per_bit = b.udiv(half, width)
    here = b.mul(row, b.mul(per_bit, ir.Constant(half.type, 2)))
    with cgutils.for_range_slice(b, ir.Constant(half.type, 0), half, width, half.type) as (i, _):
        upper = b.add(i, half)
        low, high = v.is_set(masks, i), v.is_set(masks, upper)
        even, odd = b.select(low, near[1], near[0]), b.select(low, near[3], near[2])
        zero, one = b.select(high, odd, even), b.select(high, even, odd)  # branches of bit 0 and 1 from the lower half
        x, y = v.load(cost, i, v.floats), v.load(cost, upper, v.floats)
        place, found = b.add(here, b.udiv(i, width)), []
        for bit, (own, other) in enumerate([(zero, one), (one, zero)]):
            least, byte = v.best(b.fadd(x, own), b.fadd(y, other))
            b.store(byte, b.gep(came, [b.add(place, per_bit) if bit else place]))
            found.append(least)
        both = v.shuffle(found[0], found[1], [k // 2 + k % 2 * v.width for k in range(2 * v.width)])
        v.store(both, new, b.add(i, i))


_four, _eight = (_plain, _plain) if vars(numba.config)["DISABLE_JIT"] else (_butterflies(4), _butterflies(8))


def _search(u: _Array, row_weight: _Array, masks: _Array, came: _Array, v: _Array) -> None:
    """Write the points (rows,) of the best path for `u`, in steps of the fine grid, into `v`.

    Args:
        u: what to approximate, float32 (rows,).
        row_weight: weight of every row's squared error, float32 (rows,).
        masks: of `masks_of`.
        came: room of `decisions`.
        v: int32 (rows,).
    """
    rows, half = len(u), masks.shape[1]
    cost, new = np.full(2 * half, _FAR), np.empty(2 * half, np.float32)
    cost[0] = 0
    branch = np.empty(4, np.float32)
    for r in range(rows):
        for d in range(4):
            subset = np.float32(d)
            e = u[r] - (subset + _FOUR * np.floor((u[r] - subset) * _QUARTER + _HALF))
            branch[d] = e * e * row_weight[r]
        if half < 8:
            _four(cost, new, masks, came, r, branch)
        else:
            _eight(cost, new, masks, came, r, branch)
        cost, new = new, cost
        if r % _SETTLE == 0:
            cost -= cost.min()
    t = np.argmin(cost)
    for r in range(rows - 1, -1, -1):
        i, b = t >> 1, t & 1
        upper = came[r, b, i >> 3] >> (i & 7) & 1
        d = masks[0, i] + 2 * (masks[1, i] ^ b ^ upper)
        v[r] = d + 4 * int(np.floor((u[r] - np.float32(d)) * _QUARTER + _HALF))
        t = i + half * upper


search: Any = numba.njit(nogil=True, cache=True)(_search)
