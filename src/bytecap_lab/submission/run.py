"""A submission's evaluation, run in a copy of its directory and bounded in time, memory, disk, processes and output.

This runs code that the user has named, as the user: it is no sandbox (SECURITY.md says exactly what it is). The copy
holds contents alone: times, attributes and rights of the files, in which bytes could be hidden, are made alike. The
caller's environment, where secrets live, stays outside but for a short list of names. Output is read without end and
kept only in its last part. When the command ends, or its time is over, everything that it has started is ended
(`supervisor`).
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from bytecap.errors import CodeError

SECONDS = 600.0  # what the challenge allows an evaluation
DISK, PROCESSES = 16_000_000_000, 4096
_FIGURE = re.compile(
    r"(?:bpb|bits[ _]per[ _]byte)\W{0,4}([0-9]{1,9}\.?[0-9]{0,40}(?:e[-+]?[0-9]{1,3})?)", re.IGNORECASE
)
_KEPT = 1 << 20  # bytes of output, of its end
_PASSED = (
    "PATH", "LANG", "LANGUAGE", "TZ", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CUDA_HOME",
    "LD_LIBRARY_PATH", "SYSTEMROOT", "COMSPEC", "PATHEXT",
)  # fmt: skip  # names of the environment that an evaluation sees, and those that begin with LC_


def most_memory() -> int:
    """Return three quarters of the machine's memory, in bytes; 64 GiB where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 3 // 4
    except (AttributeError, ValueError, OSError):  # pragma: no cover (Windows)
        return 1 << 36


def evaluate(
    directory: Path | str, command: str, *, data: Collection[str] = (), seconds: float = SECONDS,
    memory: int | None = None, disk: int = DISK, processes: int = PROCESSES,
) -> dict[str, Any]:  # fmt: skip
    """Run a submission's evaluation in a copy of its directory, and read the figure it prints.

    Args:
        directory: of the submission.
        command: as on a command line; `python` is the interpreter of this process.
        data: public data files, linked instead of copied.
        seconds: after which it is ended, with everything it has started.
        memory: bytes that it may take; three quarters of the machine's by default.
        disk: bytes that it may write to its own directories.
        processes: most of them at once, threads included.

    Returns:
        `bpb`, the last figure behind "bpb" or "bits per byte" in its output, and `line`, where it stands.

    Raises:
        CodeError: it fails, takes too long or too much, or prints no figure.
    """
    words = _words(command)
    most = {"memory": most_memory() if memory is None else memory, "disk": disk, "processes": processes}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        place = Path(temporary)
        for name in ("home", "tmp"):
            (place / name).mkdir()
        copy_contents(Path(directory), place / "submission", set(data))
        code, out, err = _supervised(words, place, seconds, most)
    if code == "timeout":
        raise CodeError(f"the evaluation was ended after {seconds:g} seconds: {command}")
    if code in most:
        unit = "processes and threads" if code == "processes" else f"bytes of {code}"
        raise CodeError(f"the evaluation was ended: it took more than {most[code]:,} {unit} (--{code}): {command}")
    if code.startswith("cannot run"):
        raise CodeError(f"cannot run {words[0]}{code.removeprefix('cannot run')}")
    if code != "0":
        last = ([line for line in err.splitlines() if line.strip()] or ["(no message)"])[-1]
        raise CodeError(f"the evaluation failed with exit code {code or 'unknown'}: {last}")
    for line in reversed(out.splitlines()):
        if found := _FIGURE.findall(line):
            return {"bpb": float(found[-1]), "line": line.strip()}
    raise CodeError('the evaluation printed no figure behind "bpb" or "bits per byte"')


def _words(command: str) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError as exc:
        raise CodeError(f"cannot read the command {command!r}: {exc}") from exc
    if not words or any("\0" in w for w in words):
        raise CodeError("the command of the evaluation is empty, or holds U+0000")
    return [sys.executable if words[0] in {"python", "python3"} else words[0], *words[1:]]


def copy_contents(source: Path, target: Path, data: Collection[str]) -> None:
    """Copy a directory's contents and names, and nothing else of its files; public data is linked.

    Raises:
        CodeError: there is something that is neither file nor directory, or a file cannot be read.
    """
    target.mkdir()
    try:
        for path in sorted(source.rglob("*")):
            name = path.relative_to(source)
            if name.as_posix() in data:
                (target / name).symlink_to(path.resolve())
            elif path.is_dir() and not path.is_symlink():
                (target / name).mkdir()
            elif path.is_file() and not path.is_symlink():
                shutil.copyfile(path, target / name)
                (target / name).chmod(0o755)
            else:
                raise CodeError(f"{path} is neither a file nor a directory, so it is not counted")
        for path in (target, *target.rglob("*")):
            os.utime(path, (0, 0), follow_symlinks=os.utime not in os.supports_follow_symlinks)
    except OSError as exc:
        raise CodeError(f"cannot copy {source}: {exc.filename}: {exc.strerror}") from exc


def environment(place: Path) -> dict[str, str]:
    """The environment of an evaluation: the few names of ours that it needs, a home and a place for temporary files."""
    kept = {k: v for k, v in os.environ.items() if k.upper() in _PASSED or k.startswith("LC_")}
    own = {"HOME": str(place / "home"), "USERPROFILE": str(place / "home"), "PYTHONDONTWRITEBYTECODE": "1"}
    return kept | own | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(place / "tmp"))


class _Tail(threading.Thread):
    """Reads a pipe to its end and keeps the last part."""

    def __init__(self, pipe: IO[bytes]) -> None:
        super().__init__(daemon=True)
        self._pipe, self._kept = pipe, bytearray()

    def run(self) -> None:
        """Read on."""
        with suppress(OSError, ValueError):
            while data := self._pipe.read(1 << 16):
                self._kept += data
                if len(self._kept) > 2 * _KEPT:
                    del self._kept[:-_KEPT]

    def text(self) -> str:
        """Return the output that was kept, as far as it was read in time."""
        self.join(10)
        return bytes(self._kept[-_KEPT:]).decode("utf-8", "replace")


def _supervised(words: list[str], place: Path, seconds: float, most: Mapping[str, int]) -> tuple[str, str, str]:
    """(exit code or what happened instead, end of the output, end of the errors) of a command."""
    supervisor, status = Path(__file__).with_name("supervisor.py"), place / "status"
    script = [sys.executable, "-I", str(supervisor), str(seconds), str(status), *map(str, most.values()), str(place)]
    process = subprocess.Popen(  # noqa: S603 (the user's own command)
        [*script, *words], cwd=place / "submission", env=environment(place), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True, bufsize=0,
    )  # fmt: skip
    if process.stdout is None or process.stderr is None:
        raise AssertionError("pipes were asked for")
    tails = [_Tail(process.stdout), _Tail(process.stderr)]
    for tail in tails:
        tail.start()
    try:
        process.wait(seconds + 30)
    except subprocess.TimeoutExpired:
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
    except BaseException:  # an interrupt: the supervisor's end takes the command along
        process.terminate()
        raise
    found = [tail.text() for tail in tails]
    process.stdout.close()
    process.stderr.close()
    code = status.read_text("utf-8") if status.is_file() else ("timeout" if process.poll() is None else "")
    process.wait()
    return code, found[0], found[1]
