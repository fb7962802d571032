"""Copy between memory and a GPU through two page-locked buffers, of which one is filled while the other is sent.

A copy from ordinary memory goes through a buffer of the driver's, on one core, and a change of dtype on the way is made
on the processor: 2 GB/s where the bus has 50. Here values cross in the dtype they have, and change it on the GPU.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache

import numpy as np
import torch
from torch import Tensor

_PIECE = 2**25  # bytes of a buffer
_HERE = 2**23  # bytes of one where nothing is sent
_PART = 2**22  # bytes that a thread writes at once
_THREADS = 4
_LEAST = 2**18  # bytes below which a copy of its own is as fast
Fill = Callable[[Tensor, int], None]


class Transfers:
    """Two buffers that copies to and from one device go through, one copy at a time.

    Args:
        device: any; buffers are page-locked for a GPU.
        piece: bytes of a buffer, a multiple of 16.
    """

    def __init__(self, device: torch.device, piece: int = _PIECE) -> None:
        self._device, self._piece, self._lock = device, piece, threading.Lock()
        self._buffers = [_buffer(piece, device) for _ in range(2)]
        self._sent: list[torch.cuda.Event | None] = [None, None]
        self._next = 0
        self._pool: ThreadPoolExecutor | None = None

    def up(self, fill: Fill, dtype: torch.dtype, out: Tensor) -> None:
        """Fill a tensor on the device.

        Args:
            fill: given a part of a buffer, uint8, and a place, writes the bytes that come there; called by threads.
            dtype: of those bytes.
            out: flat and contiguous; other dtypes are converted on the device, float64 by way of float32.
        """
        with self._lock:
            for part, at, size in _pieces(out, dtype, self._piece):
                number, buffer = self._free()
                self._by_parts(fill, buffer[:size], at)
                _convert(buffer[:size].to(self._device, non_blocking=True), dtype, part)
                self._mark(number)

    def down(self, values: Tensor) -> Tensor:
        """Return a copy of a tensor in the machine's memory, contiguous."""
        out = unwritten(values.shape, values.dtype)
        source, flat = (t.contiguous().reshape(-1).view(torch.uint8) for t in (values, out))
        target, waiting = flat.numpy(), list[tuple[int, int, int]]()

        def copy(part: Tensor, at: int) -> None:
            np.copyto(target[at : at + len(part)], part.numpy())

        def finish() -> None:
            for number, at, size in waiting:
                self._wait(number)
                self._by_parts(copy, self._buffers[number][:size], at)
            waiting.clear()

        with self._lock:
            for at in range(0, len(source), self._piece):
                size = min(self._piece, len(source) - at)
                number, buffer = self._free()
                buffer[:size].copy_(source[at : at + size], non_blocking=True)
                self._mark(number)
                finish()  # the piece before, while this one is on its way
                waiting.append((number, at, size))
            finish()
        return out

    def _by_parts(self, work: Fill, piece: Tensor, at: int) -> None:
        """Work on the parts of a piece by threads, which stay: making them would take as long."""
        if len(piece) <= _PART:
            work(piece, at)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_THREADS)
        parts = zip(piece.split(_PART), range(at, at + len(piece), _PART), strict=True)
        begun = [self._pool.submit(work, part, there) for part, there in parts]
        wait(begun)  # all of them, also where one fails: nobody may write into a buffer that is used again
        for part in begun:
            part.result()

    def _free(self) -> tuple[int, Tensor]:
        """Return the buffer whose turn it is, once what was sent from it has arrived."""
        number, self._next = self._next, 1 - self._next
        self._wait(number)
        return number, self._buffers[number]

    def _mark(self, number: int) -> None:
        """Remember when what was last asked for has been done."""
        if self._device.type == "cuda":
            self._sent[number] = event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._device))

    def _wait(self, number: int) -> None:
        event, self._sent[number] = self._sent[number], None
        if event is not None:
            event.synchronize()


def unwritten(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a tensor without values in memory of numpy's, which asks the system for large pages as torch does not.

    Memory is handed out as it is first written: by pages of 4 kB one core wrote 0.9 GB/s, by large ones 5.9.
    """
    size = math.prod(shape) * torch.empty(0, dtype=dtype).element_size()
    if not size:
        return torch.empty(tuple(shape), dtype=dtype)
    return torch.from_numpy(np.empty(size, np.uint8)).view(dtype).reshape(tuple(shape))


def _pieces(out: Tensor, dtype: torch.dtype, most: int) -> Iterator[tuple[Tensor, int, int]]:
    """Yield parts of a flat tensor, with the place and the size of the bytes that they are made of, `most` at once."""
    width = torch.empty(0, dtype=dtype).element_size()
    for at, part in enumerate(out.split(most // width)):
        yield part, at * (most // width) * width, len(part) * width


def _convert(raw: Tensor, dtype: torch.dtype, out: Tensor) -> None:
    """Copy values, given as bytes, into a tensor of any dtype."""
    values = raw.view(dtype)
    out.copy_(values.float() if dtype == torch.float64 and out.dtype != dtype else values)


def _buffer(size: int, device: torch.device) -> Tensor:
    """Return a buffer, page-locked where that is of use and the system allows it."""
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    except RuntimeError:  # a limit on locked memory
        return torch.empty(size, dtype=torch.uint8)


@cache
def transfers(device: torch.device) -> Transfers:
    """Return the buffers of a device, which are made once."""
    return Transfers(device)


def fill(out: Tensor, dtype: torch.dtype, work: Fill) -> None:
    """Fill a tensor on any device with values that come as bytes; see `Transfers.up`.

    In the machine's memory bytes of the tensor's own dtype are written where they belong; others go through a buffer.
    """
    if out.device.type == "cuda":
        transfers(out.device).up(work, dtype, out)
    elif out.dtype == dtype:
        work(out.view(torch.uint8), 0)
    else:
        buffer = torch.empty(min(_HERE, 8 * len(out)), dtype=torch.uint8)
        for part, at, size in _pieces(out, dtype, _HERE):
            work(buffer[:size], at)
            _convert(buffer[:size], dtype, part)


def to_memory(values: Tensor) -> Tensor:
    """Return a tensor in the machine's memory: itself, or a copy of one on a GPU."""
    if values.device.type != "cuda" or values.numel() * values.element_size() < _LEAST:
        return values.cpu()
    return transfers(values.device).down(values)


def to_device(values: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor on a device: itself where it is there, else a copy, which may still be on its way.

    It arrives in the order of the stream in use.

    Args:
        values: to send.
        device: where to.
        dtype: of the result; that of the values by default.
    """
    target = torch.device(device)
    small = values.numel() * values.element_size() < _LEAST
    if target.type != "cuda" or values.device.type != "cpu" or small or not values.is_contiguous():
        return values.to(target, dtype)
    out = torch.empty(values.shape, dtype=dtype or values.dtype, device=target)
    raw = values.detach().reshape(-1).view(torch.uint8).numpy()

    def copy(part: Tensor, at: int) -> None:
        np.copyto(part.numpy(), raw[at : at + len(part)])

    transfers(out.device).up(copy, values.dtype, out.reshape(-1))
    return out
