"""Make the page of `fit --report`: the request, the outcome, and every byte; other files here are its sections.

A section gets `report`, the figures of the job, and `ledger`, the entries of the file.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from bytecap.format.ledger import Entry
from bytecap.report.frame import sections, shell
from bytecap.report.plain import finite

_ORDER = (
    "payload",
    "side",
    "table",
    "index",
    "config",
    "tokenizer",
    "header",
    "code",
)  # eight colours; padding is grey


def page(report: Mapping[str, Any], entries: Sequence[Entry]) -> str:
    """Return the page of a fit."""
    found = {"report": finite(dict(report)), "ledger": list(entries)}
    return shell(f"{report['model']} in {report['budget_bytes']:,} bytes", sections(sys.modules[__name__], found))


def style(kind: str) -> int:
    """Return the colour of a kind of bytes; an overlay's kinds have that of the plain ones."""
    plain = kind.rpartition(" ")[2]
    return -1 if plain == "padding" else _ORDER.index(plain)
