"""`stack` stores a base coder's section and overlays that change its matrix one after the other.

A path is a *layer*: it is given the matrix decoded so far and changes it (protected columns replace, a low-rank
residual adds, group scales multiply). So every path composes with every base.

Section (format.md, 6.5): base tag u8 | layers u8 | LEB128 length, base section | for each layer: tag u8, LEB128
length, its bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from bytecap.errors import CorruptError
from bytecap.format.coders import (
    Continuous,
    Decoding,
    FloatArray,
    Shared,
    coder,
    leb,
    like,
    overlay_coder,
    read_leb,
    run,
)
from bytecap.format.overlays.lowrank import CODED
from bytecap.format.overlays.lowrank import CODER as LOW_RANK

_SINCE_3 = {15, 16, 41}  # long_trellis, base, difference
MAX_OVERLAYS = 16  # a few bytes of layer may ask for long work


class Stack:
    """Reader and writer of `stack` sections."""

    id: ClassVar[str] = "stack"
    tag: ClassVar[int] = 5

    def encode(self, base: tuple[int, bytes], overlays: Sequence[tuple[int, bytes]]) -> bytes:
        """Encode a section from (tag, bytes) of the base and of at least one overlay."""
        out = bytes([base[0], len(overlays)]) + leb(len(base[1])) + base[1]
        for tag, data in overlays:
            out += bytes([tag]) + leb(len(data)) + data
        return out

    def growth(self, base: float, overlay: bytes) -> int:
        """Return the bytes that one overlay adds to a base section of a given, perhaps estimated, length."""
        return 2 + len(leb(round(base))) + 1 + len(leb(len(overlay))) + len(overlay)

    def parts(self, data: bytes) -> list[tuple[int, int, bytes]]:
        """Split a section into (tag, bytes of tag and length, contents) of the base and its overlays."""
        if len(data) < 2:
            raise CorruptError(f"a stack of {len(data)} bytes is shorter than its header")
        tag, count, at = data[0], data[1], 2
        if not 1 <= count <= MAX_OVERLAYS or tag == self.tag:
            raise CorruptError(f"a stack has {count} layers over its base, or is its own base")
        parts = []
        start = 0
        for i in range(count + 1):
            if i:
                if at >= len(data):
                    raise CorruptError("a stack ends in front of a layer")
                tag, start, at = data[at], at, at + 1
            length, at = read_leb(data, at)
            if length > len(data) - at:
                raise CorruptError(f"a stack declares a part of {length} bytes, {len(data) - at} are left")
            parts.append((tag, at - start, data[at : at + length]))
            at += length
        if at != len(data):
            raise CorruptError(f"{len(data) - at} bytes are left over behind a stack's last layer")
        return parts

    def tags(self, data: bytes) -> list[int]:
        """Return the tags of the base and of its overlays."""
        return [tag for tag, _, _ in self.parts(data)]

    def minor(self, data: bytes) -> int:
        """Return the lowest minor version of the format that knows the base and the overlays of a section."""
        (base, _, _), *layers = self.parts(data)
        if base in _SINCE_3 or any(tag in _SINCE_3 for tag, _, _ in layers):
            return 3
        return 2 if any(tag == LOW_RANK.tag and part[2:3] == bytes([CODED]) for tag, _, part in layers) else 1

    def kinds(self, data: bytes, shape: tuple[int, int], dtype: str) -> tuple[tuple[str, int], ...]:
        """Return the kinds of the base, then those of every overlay with its id in front."""
        (tag, head, base), *rest = self.parts(data)
        found = [("header", head), *coder(tag).kinds(base, shape, dtype)]
        for tag, head, part in rest:
            path = overlay_coder(tag)
            found.append((f"{path.id} header", head))
            found += [(f"{path.id} {kind}", n) for kind, n in path.kinds(part, shape, dtype)]
        return tuple(found)

    def decode(self, data: bytes, shape: tuple[int, int], dtype: str, shared: Shared) -> Decoding:
        """Decode the base to float32 (rows, cols) and apply the overlays."""
        (tag, _, base), *rest = self.parts(data)
        decoded = yield from coder(tag).decode(base, shape, dtype, shared)
        with np.errstate(over="ignore", invalid="ignore"):
            matrix = np.array(decoded, np.float32, order="C")  # of its own: layers change it in place
        for tag, _, part in rest:
            matrix = yield from overlay_coder(tag).apply(part, matrix, shared)
        if not np.isfinite(matrix).all():
            raise CorruptError("a stack holds a value out of range")
        return matrix

    def continuous(self, data: bytes, shape: tuple[int, int], shared: Shared) -> Continuous:
        """Return the continuous arrays of the base, then those of its overlays."""
        parts = self.parts(data)
        tunable: dict[int, Continuous] = {}
        for at, (tag, _, part) in enumerate(parts):
            owner: Any = overlay_coder(tag) if at else coder(tag)
            if hasattr(owner, "continuous"):
                tunable[at] = owner.continuous(part, shape, shared)
        base = None if 0 in tunable else run([coder(parts[0][0]).decode(parts[0][2], shape, "F32", shared)])[0]

        def own(arrays: Mapping[str, Any], at: int) -> dict[str, Any]:
            return {k: arrays[f"{at} {k}"] for k in tunable[at].arrays}

        def matrix(arrays: Mapping[str, Any], _: Any) -> Any:
            values = None if base is None else like(next(iter(arrays.values())), base)
            for at, (tag, _, part) in enumerate(parts):
                if at in tunable:
                    values = tunable[at].matrix(own(arrays, at), values)
                elif at:
                    raise TypeError(f"layer {overlay_coder(tag).id} of {len(part)} bytes has nothing continuous")
            return values

        def encode(arrays: Mapping[str, FloatArray]) -> bytes:
            new = [
                (tag, tunable[at].encode(own(arrays, at)) if at in tunable else part)
                for at, (tag, _, part) in enumerate(parts)
            ]
            return self.encode(new[0], new[1:])

        found = {f"{at} {k}": v for at, c in tunable.items() for k, v in c.arrays.items()}
        return Continuous(found if all(at in tunable for at in range(1, len(parts))) else {}, matrix, encode)


CODER = Stack()
