"""Runs one command within bounds, and leaves nothing of it behind.

    python -I supervisor.py SECONDS STATUS MEMORY DISK PROCESSES PLACE COMMAND...

A script of its own, without imports of the library, because it has to be the parent of everything that the command
starts. On Linux it adopts whatever its descendants leave behind (a *subreaper*), so that processes which have left
their parent, their group and their session are found and ended too; elsewhere only the command's session is ended. If
its own parent dies, or it is told to end (SIGTERM), it ends them likewise.

Bounds are kept in two ways. The system's own limits hold for each process: on private memory, on the size of a file,
on processor time, and on the number of processes of the user, which do not bind the superuser. On Linux the sums
over everything that the command has started are watched besides, several times a second: memory, processes with their
threads, and bytes on disk under PLACE; whoever exceeds one is ended.

Writes the command's exit code to the file STATUS, or `timeout`, `memory`, `disk`, `processes`, or `cannot run: ...`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

try:
    import resource
except ImportError:  # pragma: no cover (Windows)
    resource = None  # type: ignore[assignment]

_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36  # of prctl(2)
_PATIENCE = 10.0  # seconds in which everything has to be gone
_POLL, _DISK_POLL = 0.1, 1.0  # seconds between looks, at least
_SPARE_CPU = 60  # seconds of the processor beyond all that the time allows


@dataclass(frozen=True)
class Bounds:
    """Bounds on everything that a command starts.

    Attributes:
        seconds: on the clock.
        memory: bytes.
        disk: bytes under `place`, and of any one file.
        processes: threads included.
        place: directory that the command may well write to.
    """

    seconds: float
    memory: int
    disk: int
    processes: int
    place: Path

    def impose(self) -> None:
        """Set the system's limits for this process and all that it starts."""
        if resource is None:  # pragma: no cover (Windows)
            return
        wanted = {
            "RLIMIT_CORE": 0,
            "RLIMIT_FSIZE": self.disk,
            "RLIMIT_DATA": self.memory,
            "RLIMIT_CPU": int(self.seconds * (os.cpu_count() or 1)) + _SPARE_CPU,
        }
        if sys.platform == "linux":
            wanted["RLIMIT_NPROC"] = self.processes + sum(t for _, t, uid in table().values() if uid == os.getuid())
        for name, most in wanted.items():
            kind = getattr(resource, name, None)
            if kind is not None:
                with contextlib.suppress(OSError, ValueError):
                    hard = resource.getrlimit(kind)[1]
                    limit = most if hard == resource.RLIM_INFINITY else min(most, hard)
                    resource.setrlimit(kind, (limit, limit))


def adopt() -> None:
    """Become the parent of orphaned descendants, and end with our own parent. Linux alone knows how."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            prctl = ctypes.CDLL(None, use_errno=True).prctl
            prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            prctl(_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def table() -> dict[int, tuple[int, int, int]]:
    """Return (parent, threads, user) of every process; nothing where there is no /proc."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = (entry / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
            found[int(entry.name)] = int(fields[1]), int(fields[17]), entry.stat().st_uid
    return found


def children() -> list[int]:
    """Processes whose parent we are, adopted ones included; nothing where there is no /proc."""
    return [process for process, (parent, _, _) in table().items() if parent == os.getpid()]


def descendants() -> dict[int, int]:
    """Return the threads of every process that stems from us."""
    known, found = table(), {}
    inner: dict[int, list[int]] = {}
    for process, (parent, _, _) in known.items():
        inner.setdefault(parent, []).append(process)
    waiting = [os.getpid()]
    while waiting:
        for process in inner.get(waiting.pop(), ()):
            found[process] = known[process][1]
            waiting.append(process)
    return found


def memory_of(process: int) -> int:
    """Return the bytes of memory that a process takes; what several share counts in shares."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path(f"/proc/{process}/smaps_rollup").read_text("ascii").splitlines():
            if line.startswith("Pss:"):
                return 1024 * int(line.split()[1])
    with contextlib.suppress(OSError, ValueError, IndexError):
        resident, shared = Path(f"/proc/{process}/statm").read_text("ascii").split()[1:3]
        return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")
    return 0


def bytes_under(place: Path) -> int:
    """Return the bytes on disk of everything in a directory, links not followed."""
    total = 0
    for root, directories, files in os.walk(place):
        for name in (*directories, *files):
            with contextlib.suppress(OSError):
                total += os.lstat(Path(root) / name).st_blocks * 512
    return total


def exceeded(bounds: Bounds, *, disk: bool) -> str:
    """Return which bound the command exceeds now, if it exceeds one."""
    running = descendants()
    if sum(running.values()) > bounds.processes:
        return "processes"
    if sum(map(memory_of, running)) > bounds.memory:
        return "memory"
    return "disk" if disk and bytes_under(bounds.place) > bounds.disk else ""


def watch(child: subprocess.Popen[bytes], bounds: Bounds, look: Callable[..., str] = exceeded) -> str:
    """Wait for a command to end; returns its exit code, or which bound has ended it."""
    until, disk_at = time.monotonic() + bounds.seconds, 0.0
    pause = _POLL
    while (now := time.monotonic()) < until:
        try:
            return str(child.wait(min(pause, until - now)))
        except subprocess.TimeoutExpired:
            began = time.monotonic()
            said = look(bounds, disk=began >= disk_at)
            disk_at = began + _DISK_POLL if began >= disk_at else disk_at
            pause = max(_POLL, 5 * (time.monotonic() - began))  # looking takes a sixth of a processor at most
            if said:
                return said
    return "timeout"


def end(group: int) -> None:
    """End a session and all that it has left behind; each round makes orphans of the next generation ours."""
    with contextlib.suppress(OSError):
        os.killpg(group, signal.SIGKILL)
    until = time.monotonic() + _PATIENCE
    while (left := children()) and time.monotonic() < until:
        for process in left:
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
        with contextlib.suppress(OSError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.01)


def _stop(_number: int, _frame: object) -> None:
    raise SystemExit(143)


def main() -> None:
    """Run the command, end everything, say how it went."""
    status, command = Path(sys.argv[2]), sys.argv[7:]
    bounds = Bounds(float(sys.argv[1]), int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]), Path(sys.argv[6]))
    signal.signal(signal.SIGTERM, _stop)
    adopt()
    try:
        child = subprocess.Popen(  # noqa: S603 (the user's own)
            command, start_new_session=True, stdin=subprocess.DEVNULL, preexec_fn=bounds.impose,  # noqa: PLW1509
        )  # fmt: skip
    except OSError as exc:
        status.write_text(f"cannot run: {exc.strerror}", "utf-8")
        return
    said = "ended"
    try:
        said = watch(child, bounds)
    finally:
        end(child.pid)
        status.write_text(said, "utf-8")


if __name__ == "__main__":
    main()
