"""Renormalise sixteen lanes at once where the processor has AVX-512, which compilers do not find by themselves.

Which lanes need a word is a mask; the next words are loaded side by side and spread to the lanes of the mask. The
results are those of the plain loop, word by word. The instruction is reached through numba, as LLVM code.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding
import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import config, types
from numba.extending import intrinsic

_NAME = "llvm.x86.avx512.mask.expand.v16i32"


def available() -> bool:
    """Return whether this processor has the instruction, and numba is not told to do without it."""
    told = any(getattr(config, name) for name in ("CPU_NAME", "CPU_FEATURES", "DISABLE_JIT"))
    return not told and bool(llvmlite.binding.get_host_cpu_features().get("avx512f"))


def _sixteen(typing: Any, states: Any, words: Any) -> Any:
    """Renormalise sixteen states from the words at an address; returns how many words were used.

    Args:
        typing: numba's.
        states: address of sixteen 32-bit states, which change.
        words: address of sixteen 16-bit words that may be read.
    """
    del typing, states, words
    return types.uint64(types.uint64, types.uint64), _code


sixteen: Any = intrinsic(_sixteen)


def _code(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
    """Write the LLVM code of `sixteen`."""
    wide, narrow, mask = (ir.VectorType(ir.IntType(n), 16) for n in (32, 16, 1))
    place, source = (builder.inttoptr(a, v.as_pointer()) for a, v in zip(args, (wide, narrow), strict=True))
    state, word = builder.load(place), builder.load(source)
    state.align, word.align = 4, 2
    need = builder.icmp_unsigned("<", state, _same(wide, 1 << 16))
    kind = ir.FunctionType(wide, [wide, wide, mask])
    expand = builder.module.globals.get(_NAME) or ir.Function(builder.module, kind, _NAME)
    spread = builder.call(expand, [builder.zext(word, wide), _same(wide, 0), need])
    longer = builder.or_(builder.shl(state, _same(wide, 16)), spread)
    builder.store(builder.select(need, longer, state), place).align = 4
    used = builder.ctpop(builder.bitcast(need, ir.IntType(16)))
    return builder.zext(used, ir.IntType(64))


def _same(kind: Any, value: int) -> Any:
    return ir.Constant(kind, [value] * 16)


def _lane_by_lane(states: npt.NDArray[np.uint32], words: npt.NDArray[np.uint16], used: int, first: int = 0) -> int:
    """Give every lane from `first` on that needs one a word; returns the number of words used."""
    at = np.uint64(used)
    for j in range(np.uint64(first), np.uint64(len(states))):
        x = states[j]
        need = x < np.uint32(0x10000)
        longer = np.uint32(x << np.uint32(16)) | np.uint32(words[at])
        at += np.uint64(need)
        states[j] = longer if need else x
    return int(at)


lane_by_lane: Any = numba.njit(nogil=True, cache=True, inline="always")(_lane_by_lane)


def _renormalise(states: npt.NDArray[np.uint32], words: npt.NDArray[np.uint16], used: int) -> int:
    """Do the same from the first lane on, sixteen at a time; as many words as there are states may be read."""
    at, whole = np.uint64(used), np.uint64(len(states) // 16)
    state, word = np.uint64(states.ctypes.data), np.uint64(words.ctypes.data)
    for j in range(whole):
        at += sixteen(state + np.uint64(64) * j, word + np.uint64(2) * at)
    return int(lane_by_lane(states, words, at, np.uint64(16) * whole))


renormalise: Any = numba.njit(nogil=True, cache=True)(_renormalise) if available() else lane_by_lane
