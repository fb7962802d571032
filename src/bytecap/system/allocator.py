"""Give freed memory back to the system.

The C allocator keeps freed blocks for reuse, in one arena for every thread that ever allocated: after a pass over a
24M-parameter model that was 500 MB nobody used. One arena, and handing back what is free between the steps of a job,
costs little on two cores. Many threads would wait for one another: with twelve, tokenizing took 5 s in place of 1. A
job on a GPU, whose host has memory enough, leaves the allocator as it is. Nothing is done where the C library is not
glibc.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from bytecap.errors import ShortageError

_SIGNS = ("allocate memory", "out of memory", "std::bad_alloc", "can't start new thread", "STATUS_ALLOC_FAILED",
          "calling `cublasCreate", "calling `cusolverDnCreate")  # fmt: skip
# what oneDNN, llvmlite and C extensions say when a limit on memory is met: they give no other reason
_UNDER_LIMITS = ("could not create a primitive", "find/load shared object", "failed to map", "without exception set")
BOUND = "a fit needs 4 x the model's float32 size + 700 MB, see docs/trust.md"
_ARENA_MAX, _MMAP_THRESHOLD, _TRIM_THRESHOLD = -8, -3, -1  # malloc.h
_SMALL, _LARGE = 1 << 17, 1 << 25  # the largest threshold glibc reaches by itself
_sparing, _within = True, list[int]()


@cache
def _library() -> Any:
    """Return the C library if it is glibc, else None."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") and hasattr(library, "mallopt") else None


def spare(device: str) -> None:
    """Save memory from now on if work is done on the processor: new threads share the main arena."""
    global _sparing  # noqa: PLW0603 (one allocator a process)
    _sparing = device == "cpu"
    if _library() is not None:
        _library().mallopt(_ARENA_MAX, int(_sparing))  # 0 is no limit


@contextlib.contextmanager
def no_holes(least: int = _SMALL) -> Iterator[None]:
    """Give blocks of `least` bytes and more pages of their own, which go back to the system as soon as they are freed.

    For work that keeps many blocks of changing size alive: 13% slower passes, but no holes between blocks. Passes with
    gradients are 40% slower so, and as fast as before with blocks of a MiB and more.
    """
    wanted = _sparing and _library() is not None
    if wanted:
        _within.append(least)
        _thresholds(least, least)
    try:
        yield
    finally:
        if wanted:
            _within.remove(least)
            _thresholds(*([_within[-1]] * 2 if _within else (_LARGE, 2 * _LARGE)))


def _thresholds(own_pages: int, trim: int) -> None:
    """Set the bytes from which a block has pages of its own, and from which free ones at the end go back."""
    _library().mallopt(_MMAP_THRESHOLD, own_pages)
    _library().mallopt(_TRIM_THRESHOLD, trim)


def release() -> None:
    """Hand free memory back to the system, unless a job runs on a GPU."""
    if _sparing and _library() is not None:
        _library().malloc_trim(0)


def available(root: Path = Path("/")) -> int | None:
    """Return the bytes that a process could have, by what Linux and its control groups say; None elsewhere."""
    found = []
    try:
        lines = dict(line.split(":") for line in (root / "proc/meminfo").read_text().splitlines())
        found.append(1024 * int(lines["MemAvailable"].split()[0]))
    except (OSError, ValueError, KeyError, IndexError):
        return None
    try:
        most, now = ((root / f"sys/fs/cgroup/memory.{n}").read_text().strip() for n in ("max", "current"))
        if most != "max":
            found.append(max(0, int(most) - int(now)))
    except (OSError, ValueError):
        pass  # no limit that could be read
    return min(found)


def bound(parameters: int) -> int:
    """Return the memory bound of `fit` in bytes: four times the float32 model, and 700 MB.

    >>> bound(1_000_000)
    716000000
    """
    return 16 * parameters + 700_000_000


def is_shortage(exc: BaseException) -> bool:
    """Return whether an error says that memory ran out, in the words of Python, numpy, torch or the dynamic loader."""
    signs = _SIGNS + (_UNDER_LIMITS if _limits() else ())
    return isinstance(exc, MemoryError) or (
        isinstance(exc, RuntimeError | OSError | ImportError | SystemError) and any(s in str(exc) for s in signs)
    )


@contextlib.contextmanager
def stated(parameters: int, *, streamed: bool = False) -> Iterator[None]:
    """Turn an out-of-memory error into one line that says how much a job needs.

    Args:
        parameters: of the model.
        streamed: only a block of it is in memory at once.

    Raises:
        ShortageError: memory ran out.
    """
    try:
        yield
    except Exception as exc:
        if not is_shortage(exc):
            raise
        if streamed:
            raise ShortageError(
                "out of memory with one block of the model in memory: fewer work files stay there with a smaller "
                f"--memory, and shorter passes take less with a smaller --window{_limits()}"
            ) from exc
        raise ShortageError(
            f"out of memory: a fit of {parameters:,} parameters needs {bound(parameters) / 1e6:,.0f} MB "
            f"(4 x the float32 model + 700 MB, see docs/trust.md); with less, --memory SIZE streams it{_limits()}"
        ) from exc


def _limits() -> str:
    """Describe the process's own memory limits, if there are any."""
    try:
        import resource
    except ImportError:  # pragma: no cover (Windows)
        return ""
    found = [
        f"{name} {limit / 1e6:,.0f} MB"
        for name, limit in (("RLIMIT_AS", resource.getrlimit(resource.RLIMIT_AS)[0]),
                            ("RLIMIT_DATA", resource.getrlimit(resource.RLIMIT_DATA)[0]))
        if limit != resource.RLIM_INFINITY
    ]  # fmt: skip
    return f"; this process is limited to {', '.join(found)}" if found else ""
