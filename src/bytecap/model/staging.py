"""Send many arrays to a device in a few large transfers.

Threads fill the buffers of `bytecap.system.transfers`, so that no array is put together on the processor, and nothing
waits for a transfer of its own.

>>> parts = Parts(np.int16); parts.add(np.arange(3)), parts.add(np.arange(2))
(0, 3)
>>> sent([parts], torch.device("cpu"))[0][:-1].tolist()
[0, 1, 2, 0, 1]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bytecap.format.entropy import jit
from bytecap.system.transfers import Transfers, transfers

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


def sent(parts: Sequence[Parts], device: torch.device, through: Transfers | None = None) -> list[Tensor]:
    """Return tensors of parts on a device, with one more element each, so that an address is never that of nothing.

    Args:
        parts: what is sent, in this order.
        device: where it goes.
        through: buffers; those of the device by default.
    """
    sizes = [-(-(p.size + 1) * p.kind.itemsize // _ALIGNED) * _ALIGNED for p in parts]
    begun = np.cumsum([0, *sizes]).tolist()
    pieces = [piece for at, part in zip(begun, parts, strict=False) for piece in _pieces(part, at)]
    whole = torch.empty(begun[-1], dtype=torch.uint8, device=device)
    with ThreadPoolExecutor(jit.cores()) as pool, torch.cuda.device_of(whole):
        fill = partial(_fill, pool, pieces)
        (through or transfers(whole.device)).up(fill, torch.uint8, whole)
    ends = [at + (p.size + 1) * p.kind.itemsize for at, p in zip(begun, parts, strict=False)]
    return [whole[at:end].view(_KINDS[p.kind]) for at, end, p in zip(begun, ends, parts, strict=False)]


def _pieces(part: Parts, at: int) -> Iterator[tuple[int, Array]]:
    """Yield the bytes of every array of a part, and where they belong."""
    for array in part.arrays:
        yield at, array.view(np.uint8)
        at += array.nbytes


def _fill(pool: ThreadPoolExecutor, pieces: Sequence[tuple[int, Array]], out: Tensor, first: int) -> None:
    """Copy what belongs into a buffer, whose own place is `first`."""
    buffer: Array = out.numpy()

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
