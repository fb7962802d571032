"""Watch the other ranks of a job, so that one that is lost ends all of them soon and with one line.

A rank may wait hours for another inside a library that answers nobody. So every rank has a thread that says through the
store of `torchrun` that it is alive, and looks whether the others do. Whoever meets an error, or finds a rank missing,
claims the right to speak, which one rank gets, prints the line, and tells all others to end in silence.

Who is gone is found out by their process numbers on the same host, and by their silence on others. `torchrun` itself
ends the ranks of its host by SIGTERM as soon as one of them has died: that is no reason, so it is looked for first.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from bytecap._version import __version__
from bytecap.errors import RankError
from bytecap.system.cache import library

_dist: Any = torch.distributed  # whose stores are there without being announced
Tell = Callable[[BaseException, str], int]
_LOOK = 0.5  # seconds between two looks
_BEAT = 10.0  # seconds between two signs of life
_SILENT = 300.0  # seconds without one after which a rank counts as lost
_GRACE = 5.0  # seconds that the main thread has to end by itself
_CODE = 2
_GO_ON = "; with --store the same command goes on from the steps that were finished"


def say(error: BaseException, where: str) -> int:
    """Print an error as one line; returns the exit code."""
    sys.stderr.write(f"error: {where}{' '.join(str(error).split()) or type(error).__name__}\n")
    return _CODE


class Watch:
    """The signs of life of all ranks of a job.

    Args:
        rank, size: of this process, and how many there are.
        tell: prints an error.
        patience: for all ranks to start.
    """

    def __init__(self, rank: int, size: int, tell: Tell, patience: timedelta) -> None:
        self.rank, self.size, self._tell = rank, size, tell
        self._lock, self._done, self._spoken = threading.Lock(), threading.Event(), threading.Event()
        self._ending = False
        self.last: list[Callable[[], Any]] = []  # what is done before the process is ended from here
        store = _dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
            wait_for_workers=False, timeout=patience,
        )  # fmt: skip
        self._store = _dist.PrefixStore(f"bytecap/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        own = {"host": socket.gethostname(), "pid": os.getpid(), "version": __version__, "library": library()}
        self._store.set(f"place/{rank}", json.dumps(own))
        self.places: list[dict[str, Any]] = [json.loads(self._store.get(f"place/{r}")) for r in range(size)]
        self._reader, self._writer = os.pipe()
        self._thread = threading.Thread(target=self._run, daemon=True, name="bytecap-watch")

    def told(self, what: str, value: str) -> list[str]:
        """Tell all ranks a value through the store, and return what they tell; before anything else connects them."""
        self._store.set(f"{what}/{self.rank}", value)
        return [self._store.get(f"{what}/{r}").decode() for r in range(self.size)]

    def who(self, rank: int) -> str:
        """Describe a rank."""
        return f"rank {rank} of {self.size} on {self.places[rank]['host']}"

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """End all ranks when an error leaves the `with` block, and tell it once.

        Raises:
            SystemExit: in place of the error. KeyboardInterrupt: passed on, on one rank.
        """
        before = self._listen()
        self._thread.start()
        try:
            yield
        except KeyboardInterrupt:
            self._ending = True
            if not self._claimed():
                self._go()
                raise SystemExit(130) from None
            self._announce()
            raise
        except SystemExit:
            self._spoken.wait(_GRACE)  # a signal: the thread speaks
            raise
        except RankError as exc:
            self._ending = True
            raise SystemExit(self._end(self._lost() or exc)) from None
        except BaseException as exc:
            self._ending = True
            raise SystemExit(self._end(exc)) from exc
        finally:
            self.over()
            self._listen(before)

    def over(self) -> None:
        """Stop watching: the work is done."""
        self._done.set()

    def _listen(self, before: tuple[Any, int] | None = None) -> tuple[Any, int] | None:
        """Have signals written into a pipe, which a thread hears even while the main thread is in a library."""
        if threading.current_thread() is not threading.main_thread():
            return None
        if before is not None:
            signal.set_wakeup_fd(before[1])
            signal.signal(signal.SIGTERM, before[0])
            return None
        os.set_blocking(self._writer, False)
        handler = signal.signal(signal.SIGTERM, self._leave)
        return handler, signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)

    def _leave(self, number: int, _frame: Any) -> None:
        """Unwind the main thread at a signal, unless it is about to say why it ends."""
        if not self._ending:
            raise SystemExit(128 + number)

    def _run(self) -> None:
        """Look after the others until the work is done."""
        seen: dict[int, tuple[bytes, float]] = {}
        beaten, beats = 0.0, 0
        try:
            while not self._done.is_set():
                heard = select.select([self._reader], [], [], _LOOK)[0]
                if heard and (number := os.read(self._reader, 1)[0]) in {signal.SIGTERM, signal.SIGINT}:
                    self._quit(self._lost() or _signalled(number))
                if self._store.check(["failed"]):
                    self._quit(None)
                if time.monotonic() - beaten >= _BEAT:
                    beaten, beats = time.monotonic(), beats + 1
                    self._store.set(f"alive/{self.rank}", str(beats))
                    self._look(seen)
        except (RuntimeError, OSError) as exc:  # the store is gone, and with it the host that had it
            if not self._done.is_set():
                silent = RankError(f"the store of torchrun does not answer ({' '.join(str(exc).split())[:200]})")
                self._quit(self._lost() or silent)

    def _look(self, seen: dict[int, tuple[bytes, float]]) -> None:
        """Find ranks that have not been heard of for long."""
        for rank in range(self.size):
            if rank == self.rank or not self._store.check([f"alive/{rank}"]):
                continue
            beat = bytes(self._store.get(f"alive/{rank}"))
            if rank not in seen or seen[rank][0] != beat:
                seen[rank] = beat, time.monotonic()
            elif time.monotonic() - seen[rank][1] > _SILENT:
                self._quit(RankError(f"{self.who(rank)} has not been heard of for {_SILENT:.0f} seconds{_GO_ON}"))

    def _lost(self) -> RankError | None:
        """Return an error that names a dead rank of this host, if there is one within a second."""
        host = self.places[self.rank]["host"]
        for _ in range(10):
            for rank, place in enumerate(self.places):
                if place["host"] == host and rank != self.rank and not _lives(place["pid"]):
                    return RankError(
                        f"{self.who(rank)} (process {place['pid']}) was killed or has crashed, perhaps for lack of "
                        f"memory: the job ends{_GO_ON}"
                    )
            time.sleep(0.1)
        return None

    def _claimed(self) -> bool:
        """Whether this rank is the one that speaks."""
        with contextlib.suppress(RuntimeError):
            return int(self._store.add("claimed", 1)) == 1
        host = self.places[self.rank]["host"]  # the store is gone: one on every host
        return self.rank == min(r for r, p in enumerate(self.places) if p["host"] == host and _lives(p["pid"]))

    def _announce(self) -> None:
        """Tell all other ranks to end, and wait a little for them: the store may end with this process."""
        with contextlib.suppress(RuntimeError):
            self._store.set("failed", str(self.rank))
            others = [f"gone/{r}" for r in range(self.size) if r != self.rank]
            end = time.monotonic() + _GRACE
            while time.monotonic() < end and not self._store.check(others):
                time.sleep(_LOOK / 10)

    def _go(self) -> None:
        """Say that this rank ends because another one has spoken."""
        with contextlib.suppress(RuntimeError):
            self._store.set(f"gone/{self.rank}", "")

    def _end(self, error: BaseException) -> int:
        """Tell an error if nobody has; returns the exit code."""
        with self._lock:
            code = _CODE
            if self._claimed():
                where = "" if self.rank == 0 or isinstance(error, RankError) else f"{self.who(self.rank)}: "
                code = self._tell(error, where)
                sys.stderr.flush()
                self._announce()
            else:
                self._go()
            self._spoken.set()
            return code

    def _quit(self, error: BaseException | None) -> None:
        """End this process from the watching thread, after the main thread had time to end by itself."""
        code = _CODE if error is None else self._end(error)
        if error is None:
            self._go()
        if self._done.wait(_GRACE if error is not None else _LOOK):
            return
        for call in self.last:
            with contextlib.suppress(Exception):
                call()
        os._exit(code)


def _signalled(number: int) -> RankError:
    return RankError(f"the job was told to end ({signal.Signals(number).name}){_GO_ON}")


def _lives(pid: int) -> bool:
    """Whether a process of this host still runs."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return False
    except OSError:  # another user's, or a system without /proc
        return True
    return state not in {"Z", "X"}
