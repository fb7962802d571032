"""Progress of long work: silent in Python, bars with time left on a terminal.

>>> with Silent().step("statistics", 10) as advance:
...     advance(10)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

from bytecap.escape import console, shown

Advance = Callable[[float], None]


class Reporter(Protocol):
    """Where the pipeline tells what it is doing."""

    def step(self, name: str, total: int) -> AbstractContextManager[Advance]:
        """A long step of `total` units of work."""
        ...

    def note(self, text: str) -> None:
        """One line for the reader."""
        ...


class Silent:
    """Says nothing; keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    @contextlib.contextmanager
    def step(self, name: str, total: int) -> Iterator[Advance]:
        """No bar."""
        del name, total
        yield lambda _: None

    def note(self, text: str) -> None:
        """Keep the line for the report."""
        self.notes.append(text)


class Bars:
    """Bars with time left, on standard error."""

    def __init__(self) -> None:
        self.console = console(stderr=True)
        self.notes: list[str] = []

    @contextlib.contextmanager
    def step(self, name: str, total: int) -> Iterator[Advance]:
        """A bar that disappears into one line when the step is done."""
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
