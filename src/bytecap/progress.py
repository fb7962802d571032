"""Report progress and warnings of long work: bars on a terminal and in a notebook, silence elsewhere.

>>> with Silent().step("statistics", 10) as advance:
...     advance(10)
"""

from __future__ import annotations

import contextlib
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from bytecap.errors import BytecapWarning
from bytecap.escape import console, shown

Advance = Callable[[float], None]
_ROOTS = tuple(str(Path(__file__).parents[1] / n) for n in ("bytecap", "bytecap_lab"))


class Reporter(Protocol):
    """The interface through which the pipeline reports its progress.

    A reporter may have a third method `warn(text)`, which is then told of warnings; otherwise they go through
    Python's `warnings`.
    """

    def step(self, name: str, total: int) -> AbstractContextManager[Advance]:
        """Report a long step of `total` units of work.

        What it gives is called with units that are done; less than none where work has to begin anew.
        """
        ...

    def note(self, text: str) -> None:
        """Report one line."""
        ...


class Silent:
    """A reporter that prints nothing and keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    @contextlib.contextmanager
    def step(self, name: str, total: int) -> Iterator[Advance]:
        """Show no bar."""
        del name, total
        yield lambda _: None

    def note(self, text: str) -> None:
        """Keep the line for the report."""
        self.notes.append(text)


class Bars:
    """A reporter of bars with time left, on standard error."""

    def __init__(self) -> None:
        self.console = console(stderr=True)
        self.notes: list[str] = []

    @contextlib.contextmanager
    def step(self, name: str, total: int) -> Iterator[Advance]:
        """Show a bar that becomes one line when the step is done."""
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description:<28}", markup=False), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(shown(name, most=200), total=max(1, total))
            yield lambda done: progress.advance(task, done)
            progress.update(task, completed=max(1, total))

    def note(self, text: str) -> None:
        """Print the line."""
        self.notes.append(text)
        self.console.print(text, highlight=False)


class TextBars:
    """A reporter of plain bars on one line that is written over, for notebooks, where no cursor can be moved."""

    _EVERY = 0.2  # seconds between two drawings
    _WIDTH = 30

    def __init__(self, stream: Any = None) -> None:
        self._stream = stream or sys.stderr
        self.notes: list[str] = []

    @contextlib.contextmanager
    def step(self, name: str, total: int) -> Iterator[Advance]:
        """Show a bar, a share, and the seconds so far."""
        begun, drawn, done = time.monotonic(), 0.0, 0.0

        def draw(share: float, end: str = "") -> None:
            full = round(self._WIDTH * share)
            bar = "#" * full + "." * (self._WIDTH - full)
            line = f"\r{name:<28} [{bar}] {100 * share:>3.0f}% {time.monotonic() - begun:.0f} s{end}"
            self._stream.write(line)
            self._stream.flush()

        def advance(more: float) -> None:
            nonlocal drawn, done
            done += more
            if time.monotonic() - drawn >= self._EVERY:
                drawn = time.monotonic()
                draw(min(1.0, done / max(1, total)))

        yield advance
        draw(1.0, "\n")

    def note(self, text: str) -> None:
        """Write the line."""
        self.notes.append(text)
        self._stream.write(text + "\n")


class Recorder:
    """A reporter that passes everything on to another and keeps the warnings of one job."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self.warnings: list[str] = []

    def step(self, name: str, total: int) -> AbstractContextManager[Advance]:
        """Pass the step on."""
        return self._reporter.step(name, total)

    def note(self, text: str) -> None:
        """Pass the note on."""
        self._reporter.note(text)

    def warn(self, text: str) -> None:
        """Keep the warning and pass it on."""
        self.warnings.append(text)
        warn(self._reporter, text)


def warn(reporter: Reporter, text: str) -> None:
    """Warn through the reporter where it takes warnings, else through `warnings`."""
    own = getattr(reporter, "warn", None)
    if own is not None:
        own(text)
    else:
        warnings.warn(text, BytecapWarning, stacklevel=_outside())


def _outside() -> int:
    """Return the stack level, for `warn` as the caller, of the first frame outside this library."""
    frame, level = sys._getframe(1), 1  # noqa: SLF001 (there is no other way before Python 3.12)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_ROOTS):
        frame, level = frame.f_back, level + 1
    return level


def reporter_for(reporter: Reporter | None = None, progress: bool | None = None) -> Reporter:
    """Return the reporter of a job.

    Args:
        reporter: one of the caller's own, which is taken as it is.
        progress: whether to show bars; by default where somebody looks on, in a terminal or a notebook.
    """
    if reporter is not None:
        return reporter
    notebook = "ipykernel" in sys.modules
    if progress is None:
        progress = notebook or (sys.stderr is not None and sys.stderr.isatty())
    if not progress:
        return Silent()
    return TextBars() if notebook else Bars()
