"""Say how to make the page again."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

ORDER = 40


def section(found: Mapping[str, Any]) -> str:
    """Commands, machine, time."""
    commands = "\n".join(found["commands"]) or "bytecap.thesis(...)"
    return (
        f"<h2>Again</h2><p>These commands measured ({found['cpu_seconds']:,.0f} CPU seconds on "
        f"{escape(', '.join(found['hosts']))}); <code>bytecap thesis --from thesis.jsonl -o DIR</code> makes this page "
        f"from the lines alone. Registration: SHA-256 {escape(found['registration'])}.</p><pre>{escape(commands)}</pre>"
    )
