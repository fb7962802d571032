"""One slope for all tensors of a GGUF file; see `bytecap.runtimes.gguf.solve`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from bytecap.allocation.allocate import allocate
from bytecap.job import Job
from bytecap.runtimes.blocks import BlockFormat, FloatArray
from bytecap.runtimes.blocks.ggml import FORMATS
from bytecap.runtimes.blocks.layout import pack
from bytecap.runtimes.gguf import solve as slopes
from bytecap.runtimes.gguf.file import decode, encode_plain, padded, type_bytes
from bytecap.runtimes.gguf.menu import SAMPLE, WHOLE, Item
from bytecap.runtimes.gguf.rounding import Coding, Rounded
from bytecap.runtimes.gguf.solve import Found
from bytecap.runtimes.gguf.targets import follow_prefix


def _layout(name: str, cols: int) -> BlockFormat | None:
    del cols
    return FORMATS.get(name)


def _plain(name: str, weight: FloatArray) -> FloatArray:
    return decode(name, encode_plain(name, weight), weight.shape[1])


def _rate(item: Item, name: str) -> int:
    return padded(type_bytes(name, *item.shape))


def data_of(name: str, found: Rounded) -> npt.NDArray[np.uint8]:
    """Bytes of a tensor in a type, uint8 (rows, row bytes)."""
    return pack(found.codes) if found.codes is not None else encode_plain(name, found.values)


CODING = Coding(WHOLE, _layout, _plain, _rate, SAMPLE)


def solve(job: Job, room: int, items: Sequence[Item]) -> Found:
    """The plan for `room` bytes and every tensor rounded by it."""
    found = slopes.solve(job, items, CODING, lambda curves: (allocate(curves, room), room))
    return found if job.dry_run else follow_prefix(job, items, CODING, found)
