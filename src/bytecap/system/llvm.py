"""Write vectors in LLVM's language, for loops that numba compiles but does not turn into vectors by itself.

Here stands what such code shares: vectors in memory, and a number in all lanes.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir


def load(builder: Any, place: Any, kind: Any, align: int) -> Any:
    """Load a vector or number of type `kind` from a pointer to anything, or from an address.

    Args:
        builder: of the code.
        place: pointer or 64-bit address.
        align: bytes that the place is a multiple of.
        kind: type of what lies there.
    """
    return builder.load(_pointer(builder, place, kind), align=align)


def store(builder: Any, value: Any, place: Any, align: int) -> None:
    """Store a vector or number at a place; see `load`."""
    builder.store(value, _pointer(builder, place, value.type), align=align)


def spread(builder: Any, number: Any, lanes: int) -> Any:
    """Return a vector with `number` in each of its lanes."""
    index = ir.IntType(32)
    empty = ir.Constant(ir.VectorType(number.type, lanes), ir.Undefined)
    first = builder.insert_element(empty, number, ir.Constant(index, 0))
    return builder.shuffle_vector(first, empty, ir.Constant(ir.VectorType(index, lanes), [0] * lanes))


def _pointer(builder: Any, place: Any, kind: Any) -> Any:
    is_address = isinstance(place.type, ir.IntType)
    return (builder.inttoptr if is_address else builder.bitcast)(place, kind.as_pointer())
