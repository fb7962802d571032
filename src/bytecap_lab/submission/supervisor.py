"""Runs one command and leaves nothing of it behind: `python -I supervisor.py SECONDS STATUS COMMAND...`.

A script of its own, without imports of the library, because it has to be the parent of everything that the command
starts. On Linux it adopts whatever its descendants leave behind (a *subreaper*), so that processes which have left
their parent, their group and their session are found and ended too; elsewhere only the command's session is ended. If
its own parent dies, or it is told to end (SIGTERM), it ends them likewise.

Writes the command's exit code to the file STATUS, or `timeout`, or `cannot run: ...`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36  # of prctl(2)
_PATIENCE = 10.0  # seconds in which everything has to be gone


def adopt() -> None:
    """Become the parent of orphaned descendants, and end with our own parent. Linux alone knows how."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            prctl = ctypes.CDLL(None, use_errno=True).prctl
            prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            prctl(_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def children() -> list[int]:
    """Processes whose parent we are, adopted ones included; nothing where there is no /proc."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = (entry / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
            if int(fields[1]) == os.getpid():
                found.append(int(entry.name))
    return found


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
    seconds, status, command = float(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    signal.signal(signal.SIGTERM, _stop)
    adopt()
    try:
        child = subprocess.Popen(command, start_new_session=True, stdin=subprocess.DEVNULL)  # noqa: S603 (the user's)
    except OSError as exc:
        status.write_text(f"cannot run: {exc.strerror}", "utf-8")
        return
    said = "ended"
    try:
        said = str(child.wait(seconds))
    except subprocess.TimeoutExpired:
        said = "timeout"
    finally:
        end(child.pid)
        status.write_text(said, "utf-8")


if __name__ == "__main__":
    main()
