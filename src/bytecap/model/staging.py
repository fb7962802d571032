"""Send many arrays to a device in a few large transfers.

Bytes go through two page-locked buffers: threads fill one while the other is on its way, so that no array is put
together on the processor, and nothing waits for a transfer of its own.

>>> parts = Parts(np.int16); parts.add(np.arange(3)), parts.add(np.arange(2))
(0, 3)
>>> sent([parts], torch.device("cpu"))[0][:-1].tolist()
[0, 1, 2, 0, 1]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bytecap.format.entropy import jit

_STAGE = 2**26  # bytes of a buffer
_LARGE = 2**17  # bytes that a thread of its own copies
_ALIGNED = 16
_KINDS = {
    np.dtype(np.uint8): torch.uint8, np.dtype(np.int16): torch.int16, np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64, np.dtype(np.float32): torch.float32,
}  # fmt: skip

Array = npt.NDArray[Any]


class Parts:
    """Arrays that are put behind one another in one tensor.

    Args:
        kind: numpy type of its elements.
    """

    def __init__(self, kind: Any) -> None:
        self.arrays, self.kind, self.size = list[Array](), np.dtype(kind), 0

    def add(self, array: Array) -> int:
        """Append an array; returns where it begins."""
        self.arrays.append(array.reshape(-1).astype(self.kind, copy=False))
        self.size += array.size
        return self.size - array.size


def sent(parts: Sequence[Parts], device: torch.device) -> list[Tensor]:
    """Return tensors of parts on a device, with one more element each, so that an address is never that of nothing."""
    sizes = [-(-(p.size + 1) * p.kind.itemsize // _ALIGNED) * _ALIGNED for p in parts]
    begun = np.cumsum([0, *sizes]).tolist()
    pieces = [piece for at, part in zip(begun, parts, strict=False) for piece in _pieces(part, at)]
    whole = torch.empty(begun[-1], dtype=torch.uint8, device=device)
    locked = device.type == "cuda"
    buffers = [torch.empty(min(_STAGE, len(whole)), dtype=torch.uint8, pin_memory=locked) for _ in range(2)]
    events: list[Any] = [None, None]
    with ThreadPoolExecutor(jit.cores()) as pool, torch.cuda.device_of(whole):
        for i, first in enumerate(range(0, len(whole), _STAGE)):
            own, last = i % 2, min(first + _STAGE, len(whole))
            if events[own] is not None:
                events[own].synchronize()
            _fill(pool, buffers[own].numpy()[: last - first], first, pieces)
            whole[first:last].copy_(buffers[own][: last - first], non_blocking=locked)
            if locked:
                events[own] = torch.cuda.Event()
                events[own].record()
    ends = [at + (p.size + 1) * p.kind.itemsize for at, p in zip(begun, parts, strict=False)]
    return [whole[at:end].view(_KINDS[p.kind]) for at, end, p in zip(begun, ends, parts, strict=False)]


def _pieces(part: Parts, at: int) -> Iterator[tuple[int, Array]]:
    """Yield the bytes of every array of a part, and where they belong."""
    for array in part.arrays:
        yield at, array.view(np.uint8)
        at += array.nbytes


def _fill(pool: ThreadPoolExecutor, buffer: Array, first: int, pieces: Sequence[tuple[int, Array]]) -> None:
    """Copy what belongs into the buffer, whose own place is `first`."""

    def copy(piece: tuple[int, Array]) -> None:
        at, data = piece
        begun, end = max(at, first), min(at + len(data), first + len(buffer))
        buffer[begun - first : end - first] = data[begun - at : end - at]

    own = [p for p in pieces if p[0] < first + len(buffer) and p[0] + len(p[1]) > first]
    copied = pool.map(copy, [p for p in own if len(p[1]) >= _LARGE])
    for piece in own:
        if len(piece[1]) < _LARGE:  # sooner done than handed over
            copy(piece)
    list(copied)
