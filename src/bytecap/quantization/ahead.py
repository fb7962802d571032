"""Keep a GPU busy with several batches of matrices at a time.

A column of one matrix follows another, so a matrix takes one of a GPU's processors and much of its time. Batches hold
matrices of one shape, as many as memory allows, and those are fewer than a GPU has processors. So later batches are
begun on streams of their own before the results of the first are awaited.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar

import torch

from bytecap.system.device_memory import allowed

_Found = TypeVar("_Found")
_Item = TypeVar("_Item")
_SHARE = 12  # of a GPU's memory, one part for what is under way
_BOUNDED_SHARE = 6  # of what a process may take of it
_STREAMS: dict[torch.device, list[torch.cuda.Stream]] = {}  # few: memory that one has freed serves no other


def of_one_shape(items: Iterable[_Item], shape: Callable[[_Item], tuple[int, int]], most: int) -> list[list[_Item]]:
    """Return batches of matrices of one shape, each of at most so many weights and Hessian entries, or of one matrix.

    Args:
        items: matrices.
        shape: gives the shape (rows, cols) of one.
        most: see `entries`.

    >>> of_one_shape(["aa", "b", "cc", "dd"], lambda x: (len(x), 1), 6)
    [['aa', 'cc'], ['dd'], ['b']]
    """
    alike: dict[tuple[int, int], list[_Item]] = {}
    for item in items:
        alike.setdefault(shape(item), []).append(item)
    batches: list[list[_Item]] = []
    for (rows, cols), members in alike.items():
        size = max(1, most // max(1, entries(rows, cols)))
        batches += [members[at : at + size] for at in range(0, len(members), size)]
    return batches


def entries(rows: int, cols: int) -> int:
    """Return the number of weights and Hessian entries of a matrix."""
    return rows * cols + cols * cols


def _unused(device: torch.device, used: Sequence[torch.cuda.Stream]) -> torch.cuda.Stream:
    """Return the first stream that is not in use."""
    streams = _STREAMS.setdefault(device, [])
    for stream in streams:
        if all(stream is not other for other in used):
            return stream
    streams.append(torch.cuda.Stream(device))
    return streams[-1]


class Ahead(Generic[_Found]):
    """Batches that are begun ahead on a GPU; on a processor each is begun when it is taken.

    Args:
        begin: begins batch i, and returns what waits for its result.
        numbers: batches in the order they are taken in.
        sizes: bytes that every batch takes on its device, by number.
        device: where they are rounded.

    >>> ahead = Ahead(lambda i: lambda: i * i, [0, 2], [1, 1, 1], torch.device("cpu"))
    >>> with ahead.taken(2) as found:
    ...     found
    4
    """

    def __init__(
        self, begin: Callable[[int], Callable[[], _Found]], numbers: Sequence[int], sizes: Sequence[int],
        device: torch.device,
    ) -> None:  # fmt: skip
        self._begin, self._waiting, self._sizes, self._device = begin, list(numbers), sizes, device
        self._begun: dict[int, tuple[torch.cuda.Stream, Callable[[], _Found]]] = {}
        self._room = 0
        if device.type == "cuda":
            whole = torch.cuda.get_device_properties(device).total_memory
            self._room = min(whole // _SHARE, allowed(device) // _BOUNDED_SHARE)

    def _fill(self) -> None:
        """Begin the batches that there is room for."""
        while self._waiting:
            number = self._waiting[0]
            used = sum(self._sizes[i] for i in self._begun)
            if self._begun and used + self._sizes[number] > self._room:
                return
            stream = _unused(self._device, [s for s, _ in self._begun.values()])
            stream.wait_stream(torch.cuda.current_stream(self._device))
            try:
                with torch.cuda.stream(stream):
                    self._begun[number] = stream, self._begin(number)
            except torch.OutOfMemoryError:
                if not self._begun:
                    raise
                self._room = used // 2  # fewer at a time from now on, and room for what taking them needs
                return
            self._waiting.pop(0)

    @contextlib.contextmanager
    def taken(self, number: int) -> Iterator[_Found]:
        """Give the result of a batch; what is done with it there is done on the batch's stream, and awaited."""
        if self._device.type != "cuda":
            yield self._begin(number)()
            return
        self._fill()
        stream, finish = self._begun[number]
        with torch.cuda.stream(stream):
            yield finish()
        stream.synchronize()  # before its memory is used again
        del self._begun[number]
