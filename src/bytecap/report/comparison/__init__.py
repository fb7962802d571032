"""Make `compare.html`, one page with the contents of `compare.json`; every other file here is one of its sections."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from bytecap.report.frame import sections, shell

NAMES = {"kl": "KL to the original", "loss": "loss increase"}


def styles(model: Mapping[str, Any]) -> dict[str, int]:
    """Return the colour and marker of every method, the same in all charts."""
    return {name: i for i, name in enumerate(model["methods"])}


def winner(win: Mapping[str, Any]) -> str:
    """Say which method is best, and which ones tie within one standard error."""
    ties: Sequence[str] = win["ties"]
    return str(win["best"]) + (f" (tie with {', '.join(ties)})" if ties else "")


def page(found: Mapping[str, Any]) -> str:
    """Return the page of a comparison."""
    names = ", ".join(m["model"].rstrip("/").rpartition("/")[2] for m in found["models"])
    return shell(f"Methods at equal bytes: {names}", sections(sys.modules[__name__], found))
