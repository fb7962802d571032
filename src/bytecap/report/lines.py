"""Files of JSON lines: read what is whole, append so that nothing is torn. Needs no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bytecap.errors import OutputError
from bytecap.report.plain import finite

Record = dict[str, Any]


def read_lines(path: Path) -> list[Record]:
    """The records of a file; a line that was cut off counts as absent.

    Raises:
        OutputError: the file cannot be read.
    """
    try:
        text = path.read_text("utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as exc:
        raise OutputError(f"cannot read the runs in {path}: {exc}") from exc
    found = []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "record" in record:
            found.append(record)
    return found


def append(path: Path | None, records: Sequence[Record]) -> None:
    """Add records to a file of lines; one that was cut off is left behind on a line of its own."""
    if path is None or not records:
        return
    try:
        torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        with path.open("a", encoding="utf-8") as f:
            f.write("\n" * torn + "".join(json.dumps(finite(r), allow_nan=False) + "\n" for r in records))
            f.flush()
            os.fsync(f.fileno())
    except OSError as exc:
        raise OutputError(f"cannot write {path}: {exc.strerror}") from exc
