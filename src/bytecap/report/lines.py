"""Files of JSON lines: read what is whole, append so that nothing is torn. Needs no torch."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bytecap.errors import BytecapError, OutputError
from bytecap.report.plain import finite
from bytecap.system.atomic import open_regular, read_regular

Record = dict[str, Any]


def read_lines(path: Path) -> list[Record]:
    """The records of a file; a line that was cut off counts as absent.

    Raises:
        OutputError: the file cannot be read.
    """
    try:
        text = read_regular(path).decode("utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as exc:
        raise OutputError(f"cannot read the runs in {path}: {exc}") from exc
    found = []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and "record" in record:
            found.append(record)
    return found


@contextlib.contextmanager
def blamed_lines(*paths: Path | None) -> Iterator[None]:
    """Turn failures of work on records of files into one line that names the files: anybody may have written them.

    Raises:
        OutputError: in place of errors that a record of another form leads to.
    """
    try:
        yield
    except Exception as exc:
        read = [str(p) for p in paths if p is not None and p.exists()]
        if not read or isinstance(exc, BytecapError | OSError):
            raise
        raise OutputError(
            f"{', '.join(read)} {'holds' if len(read) == 1 else 'hold'} a line that no run has written "
            f"({type(exc).__name__}: {exc}): remove that line"
        ) from exc


def append(path: Path | None, records: Sequence[Record]) -> None:
    """Add records to a file of lines; one that was cut off is left behind on a line of its own.

    Raises:
        OutputError: the file cannot be written, or is a link, a pipe or a device.
    """
    if path is None or not records:
        return
    try:
        with open_regular(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, mode=0o666) as f:
            end = f.seek(0, os.SEEK_END)
            f.seek(max(0, end - 1))
            torn = f.read(1) not in {b"", b"\n"}
            lines = "".join(json.dumps(finite(r), allow_nan=False) + "\n" for r in records)
            f.write(b"\n" * torn + lines.encode())
            f.flush()
            os.fsync(f.fileno())
    except OSError as exc:
        why = "it is a link, which may lead anywhere" if path.is_symlink() else exc.strerror
        raise OutputError(f"cannot write {path}: {why}") from exc
