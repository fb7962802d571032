"""Make values fit for JSON, and write figures as a JSON file with a page beside it.

>>> finite({"a": float("nan"), "b": (1.0, float("inf"))})
{'a': None, 'b': [1.0, None]}
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bytecap.system.atomic import write_atomically


def finite(value: Any) -> Any:
    """Replace NaN and infinity by None, since JSON has neither."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_figures(
    found: dict[str, Any], page: Callable[[dict[str, Any]], str], directory: Path | None, name: str,
    report: Path | str | None,
) -> list[Path]:  # fmt: skip
    """Write `NAME.json`, and the page beside it or at a given path; returns the paths written.

    Args:
        found: figures, as JSON can hold them.
        page: makes HTML of them.
        directory: for both; None writes no figures.
        name: of the files.
        report: where the page goes instead.

    Raises:
        OutputError: a file cannot be written.
    """
    written = []
    if directory is not None:
        written.append(directory / f"{name}.json")
        write_atomically((json.dumps(found, indent=1, allow_nan=False) + "\n").encode(), written[0])
    at = Path(report) if report is not None else directory and directory / f"{name}.html"
    if at is not None:
        write_atomically(page(found).encode(), at)
        written.append(at)
    return written
