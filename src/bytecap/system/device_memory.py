"""Bound what torch's allocator keeps of a GPU, and say how much of it a process may take.

What is freed stays reserved, for the stream and the size it was made for, and more is asked for while none of it fits:
a fit that had 23 GB allocated had 69 reserved. Within a bound the allocator gives back what is unused and tries again
before it fails. It can give back a part of a segment only where segments grow by pages ("expandable"); otherwise a
small tensor that stays keeps all that it was cut from, and memory would end long before the bound. So nothing is
bounded where the driver has no such segments.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

_PROBE = 2**25  # bytes, for which a segment of its own is made
_OPTION = "expandable_segments"
_READ = "_accelerator_getAllocatorSettings"  # of newer versions; what it gives is set again


def allowed(device: torch.device) -> int:
    """Return the bytes of a GPU that this process may reserve: all of them, but where it is bounded."""
    fraction = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # from torch 2.6 on
    return int(torch.cuda.get_device_properties(device).total_memory * (1 if fraction is None else fraction(device)))


@contextlib.contextmanager
def bounded(most: int | None) -> Iterator[bool]:
    """Let torch reserve at most so many bytes of the current GPU, until the end of the context.

    The driver's own memory for the process, some 0.5 GB, comes on top.

    Args:
        most: bytes; None bounds nothing.

    Yields:
        Whether the bound holds: not without one, and not where segments cannot grow by pages or torch does not
        say which settings the user has made.
    """
    known = hasattr(torch.cuda, "get_per_process_memory_fraction") and hasattr(torch._C, _READ)  # noqa: SLF001
    if most is None or not known:
        yield False
        return
    with _growing() as grows:
        before = torch.cuda.get_per_process_memory_fraction()
        if grows:
            total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
            torch.cuda.empty_cache()  # of jobs before
            torch.cuda.set_per_process_memory_fraction(min(before, most / total))
        try:
            yield grows
        finally:
            torch.cuda.set_per_process_memory_fraction(before)


@contextlib.contextmanager
def _growing() -> Iterator[bool]:
    """Have new segments grow by pages, unless the user has decided; yields whether they do."""
    write, before = _settings()
    if _OPTION in before:
        yield _grow()
        return
    others = f"{before}," if before else ""  # what is left out would be reset
    write(f"{others}{_OPTION}:True")
    grows = _grow()
    if not grows:
        write(f"{others}{_OPTION}:False")
    try:
        yield grows
    finally:
        if grows:
            write(f"{others}{_OPTION}:False")


def _settings() -> tuple[Callable[[str], Any], str]:
    """Return what changes the settings of the allocator, by torch's name of the day, and the settings."""
    write = getattr(torch._C, "_accelerator_setAllocatorSettings", None)  # noqa: SLF001
    read: Callable[[], str] = getattr(torch._C, _READ)  # noqa: SLF001
    return write or torch.cuda.memory._set_allocator_settings, read()  # noqa: SLF001


def _grow() -> bool:
    """Whether a segment that is made now can grow."""
    torch.cuda.empty_cache()  # or an old one would do
    try:
        probe = torch.empty(_PROBE, dtype=torch.uint8, device="cuda")
    except RuntimeError:  # the driver refuses
        return False
    own = [s for s in torch.cuda.memory_snapshot() if s["address"] <= probe.data_ptr() < s["address"] + s["total_size"]]
    return any(s.get("is_expandable", False) for s in own)
