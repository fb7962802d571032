"""Make `thesis.html`, one page with the contents of `thesis.json`; every other file here is one of its sections."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from bytecap.report.frame import sections, shell

SIGNS = {"supported": "✓ supported", "falsified": "✗ falsified", "undecided": "? undecided"}
STYLES = {"supported": 2, "falsified": 1, "undecided": 7}  # colours and markers, the same in all charts


def short(model: str) -> str:
    """Return a model's name without its path."""
    return model.rstrip("/").rpartition("/")[2]


def interval(effect: Mapping[str, Any]) -> str:
    """Format an effect and its interval as `0.123 [0.1, 0.2]`."""
    return f"{effect['effect']:.3f} [{effect['low']:.3f}, {effect['high']:.3f}]"


def page(found: Mapping[str, Any]) -> str:
    """Return the page of a test."""
    return shell("The thesis put to the test", sections(sys.modules[__name__], found))
