"""Say how to make the page again."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

ORDER = 60


def section(found: Mapping[str, Any]) -> str:
    """Commands, machine, time."""
    commands = "\n".join(found["commands"]) or "bytecap.compare(...)"
    return (
        f"<h2>Again</h2><p>These commands made the runs ({found['cpu_seconds']:,.0f} CPU seconds on "
        f"{escape(', '.join(found['hosts']))}); runs.jsonl holds everything needed to repeat each of them, and "
        f"<code>bytecap compare --from runs.jsonl</code> makes this page from it.</p><pre>{escape(commands)}</pre>"
    )
