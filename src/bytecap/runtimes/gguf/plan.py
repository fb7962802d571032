"""One slope for all tensors of a GGUF file; see `bytecap.runtimes.gguf.solve`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from bytecap.allocation.allocate import allocate
from bytecap.job import Job
from bytecap.runtimes.gguf import solve as slopes
from bytecap.runtimes.gguf.menu import WHOLE, Item, Rounded, curve, round_to

Found: TypeAlias = slopes.Found[Rounded]


def solve(job: Job, room: int, items: Sequence[Item]) -> Found:
    """The plan for `room` bytes and every tensor rounded by it."""
    return slopes.solve(
        job, items, curve=curve, round_to=lambda item, setting: round_to(item, WHOLE[int(setting)]),
        allocate=lambda curves: (allocate(curves, room), room),
    )  # fmt: skip
