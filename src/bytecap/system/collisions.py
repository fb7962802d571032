"""Refuse outputs that would take the place of an input or of one another, before any work.

Files are compared as the system sees them: through links, under other spellings, and by the file itself, so that a hard
link to the weights counts as the weights.

>>> import tempfile
>>> place = Path(tempfile.mkdtemp())
>>> refuse_collisions({"-o": place / "a.bcap", "--report": place / "a.html"}, {"--calib": [place / "a.txt"]})
>>> refuse_collisions({"-o": place / "a", "--report": place / "b" / ".." / "a"}, {})
Traceback (most recent call last):
bytecap.errors.OutputError: -o and --report both name ...a: give each its own file
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bytecap.errors import OutputError

Paths = Path | str | Iterable[Any] | None


def refuse_collisions(outputs: Mapping[str, Path | str | None], inputs: Mapping[str, Paths]) -> None:
    """Refuse outputs that name an input or one another.

    Args:
        outputs: paths that are written, by the user's word for them; None is not written.
        inputs: what is read, likewise: files, or directories, whose files all count (but not those of directories
            inside, nor `.bcap` files, which a model directory may well hold).

    Raises:
        OutputError: two of them are one file; both are named.
    """
    wanted = [(name, Path(path)) for name, path in outputs.items() if path is not None]
    for i, (name, path) in enumerate(wanted):
        for other, at in wanted[:i]:
            if _same(path, at):
                raise OutputError(f"{other} and {name} both name {path}: give each its own file")
    for called, given in inputs.items():
        for source in _files(given):
            for name, path in wanted:
                if _same(path, source):
                    raise OutputError(
                        f"{name} names {path}, which is {called}: it would be replaced; write to another file"
                    )


def refuse_pages(
    directory: Path | str | None, name: str, report: Path | str | None, store: Path | str | None,
    inputs: Mapping[str, Paths],
) -> None:  # fmt: skip
    """Refuse collisions of commands that write `NAME.jsonl`, `NAME.json` and a page into a directory.

    Args:
        directory: for the figures.
        name: of the files.
        report: where the page goes instead.
        store: directory of what is kept, if it is no part of `directory`.
        inputs: see `refuse_collisions`.
    """
    outputs: dict[str, Path | str | None] = {"--report": report, "--store": store}
    if directory is not None:
        outputs |= {f"{name}.{end} of -o": Path(directory) / f"{name}.{end}" for end in ("json", "html")}
    if report is not None:
        outputs.pop(f"{name}.html of -o", None)
    refuse_collisions(outputs, inputs)


def _files(given: Paths) -> Iterator[Path]:
    several = given if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    for path in (p for p in several if isinstance(p, str | Path)):
        yield Path(path)
        if Path(path).is_dir():
            yield from (p for p in Path(path).iterdir() if p.is_file() and p.suffix != ".bcap")


def _same(one: Path, other: Path) -> bool:
    """Return whether two names mean one file, or would once it is there."""
    try:
        return one.samefile(other)
    except (OSError, ValueError):  # one of them is not there yet
        return os.path.realpath(one) == os.path.realpath(other)
