"""Make the page of a choice among models; every other file here is one of its sections."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from bytecap.report.frame import sections, shell


def names(found: Mapping[str, Any]) -> list[str]:
    """Return the models' names in the order in which they were given; a place in it is a model's style."""
    return list(dict.fromkeys(row["model"] for row in found["rows"]))


def outcome(row: Mapping[str, Any]) -> str:
    """Say in words how far a model came at a budget.

    >>> outcome({"whole": {}, "best": True}), outcome({"out": "its smallest file has 9 bytes"})
    ('best', 'out: its smallest file has 9 bytes')
    """
    if row.get("best"):
        return "best"
    if "whole_failed" in row:
        return "fitted short, since the whole fit failed"
    return f"out: {row['out']}" if "out" in row else "fitted whole"


def page(found: Mapping[str, Any]) -> str:
    """Return the page for the report of a `bytecap.pipeline.choose.Choice`."""
    return shell(f"The best model for {found['budget_bytes']:,} bytes", sections(sys.modules[__name__], found))
