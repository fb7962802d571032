"""Show the best model, its size and its score on cards."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from bytecap.report.frame import cards

ORDER = 0


def section(found: Mapping[str, Any]) -> str:
    """Return the cards, and what was compared."""
    texts = ", ".join(found["evaluation"]) or "the embedded general text"
    models = len({row["model"] for row in found["rows"]})
    return cards(
        [
            ("best", found["best"], f"of {models} models"),
            ("bits per byte", f"{found['bpb']:.4f}", f"± {found['bpb_stderr']:.4f}"),
            ("bytes", f"{found['file_bytes']:,}", f"cap {found['budget_bytes']:,}"),
        ]
    ) + (
        f"<p>Every model was scored on the same {found['evaluation_bytes']:,} bytes of {escape(texts)}; bits per byte "
        "do not depend on the tokenizer. A model is out where its smallest file is above the cap, where its short fit "
        "is not among the best, or where its original scores worse than a file that is there already.</p>"
    )
