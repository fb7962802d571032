"""The operating point, and the verdict on every path."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from bytecap.report.curves import sentence
from bytecap.report.frame import cards, plus_minus

ORDER = 10


def section(found: Mapping[str, Any]) -> str:
    """Cards and a list of verdicts."""
    base, slope = found["base"], found["lambda"]["nats_per_byte"]
    items = [
        ("base", str(base["name"]), f"{base['bytes']:,} bytes of matrices"),
        ("KL to the original", plus_minus(base["kl_nats"], base["kl_stderr"]), "nats per token"),
        ("bits per byte", f"{base['bpb']:.4f}", f"original {base['bpb_original']:.4f}"),
        ("lambda: a finer step buys", "-" if slope is None else f"{1000 * slope:.2e} nats", "per 1,000 bytes"),
    ]
    verdicts = "".join(
        f'<li><p class="verdict">{escape(n)}: {escape(sentence(p))}.</p></li>' for n, p in found["paths"].items()
    )
    return f"{cards(items)}<ul>{verdicts}</ul>"
