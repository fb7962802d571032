"""Golden artifacts of the coder long_trellis: version 1.3."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bytecap.format.coders.long_trellis import CODER
from bytecap.format.coders.stack import CODER as STACK
from bytecap.format.overlays.outliers import CODER as OUTLIERS
from golden_overlays import halves
from golden_parts import one, pack, trellis, unit


def valid() -> Iterator[tuple[str, bytes]]:
    """Every memory, and the corners that `trellis` has goldens of."""
    layer = 34, OUTLIERS.encode(np.array([4, 8, 30, 31, 80]), halves(1, 5), 360)
    yield (
        "long_trellis",
        pack(
            *(unit(f"t{m}.weight", (24, 13), 15, trellis((24, 13), seed=m, memory=m)) for m in range(4, 9)),
            unit("groups", (21, 6), 15, trellis((21, 6), seed=2, groups=4, memory=6), linear=True),
            unit("all", (15, 9), 15, trellis((15, 9), seed=3, first=1, memory=8)),
            unit("none", (5, 9), 15, trellis((5, 9), seed=4, first=64, memory=5)),
            unit("short", (2, 9), 15, trellis((2, 9), seed=5, first=1, memory=8)),
            unit("one", (1, 4), 15, trellis((1, 4), seed=6, memory=7)),
            unit("beside", (12, 7), 9, trellis((12, 7), seed=7)),
            unit("turned", (9, 20), 15, trellis((20, 9), seed=8, memory=4), transposed=True),
        ),
    )
    yield "long_trellis_stack", pack(unit("a", (40, 9), 5, STACK.encode((15, trellis((40, 9), memory=8)), [layer])))


def invalid() -> Iterator[tuple[str, bytes]]:
    """Broken sections."""
    good, at = trellis((5, 3), first=1, memory=4), 13  # of `first`, behind groups, c and four pairs
    assert good[at : at + 2] == bytes([1, 4])
    for name, change in (("first", [0, 4]), ("first_high", [65, 4]), ("short", [1, 3]), ("long", [1, 9])):
        yield f"long_trellis_{name}", one(good[:at] + bytes(change) + good[at + 2 :], (5, 3), 15)
    yield "long_trellis_cut", one(good[:-1], (5, 3), 15)
    yield "long_trellis_left_over", one(good + b"\0", (5, 3), 15)
    yield "long_trellis_head", one(good[: at + 1], (5, 3), 15)
    yield "long_trellis_padding", one(padded(good), (5, 3), 15)


def padded(good: bytes) -> bytes:
    """A section whose path has a bit behind its last one."""
    _, path, payload = CODER._parse(good, (5, 3))
    at = len(good) - len(payload) - 1
    assert len(path) == 2
    assert not good[at] & 128
    return good[:at] + bytes([good[at] | 128]) + good[at + 1 :]
