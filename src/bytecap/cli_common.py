"""What the command line's parts share."""

from __future__ import annotations

import json
import sys
from typing import Any

from bytecap.progress import Bars, Reporter, Silent
from bytecap.report.plain import finite


def progress(quiet: bool) -> Reporter:
    """Bars, or nothing beside `--json`."""
    return Silent() if quiet else Bars()


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on standard output; NaN and infinity become null."""
    sys.stdout.write(json.dumps(finite(value), allow_nan=False) + "\n")


def names(paths: list[str] | None) -> list[str] | None:
    """Names of paths, given by comma or repeated; None if there are none."""
    return [n.strip() for group in paths or () for n in group.split(",") if n.strip()] or None
