"""Show the request and the outcome of a fit."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from bytecap.format.ledger import by_kind
from bytecap.report.fit import style
from bytecap.report.frame import cards, plus_minus
from bytecap.report.svg import bar, swatch

ORDER = 10


def section(found: Mapping[str, Any]) -> str:
    """Cards, and the budget as one bar."""
    r = found["report"]
    items = [
        ("asked", f"{r['budget_bytes']:,} bytes", f"method {r['method']}, seed {r['seed']}"),
        ("came out", f"{r['file_bytes']:,} bytes" if r["file_bytes"] else "dry run: nothing written",
         f"{r['slack_bytes']:,} bytes left; plan: {r['plan']}" if r["file_bytes"] else f"plan: {r['plan']}"),
        ("bits per parameter", f"{r['bits_per_parameter']:.3f}", f"{r['parameters']:,} unique parameters"),
    ]  # fmt: skip
    if r.get("kl_nats") is not None:
        items.append(("KL to the original", f"{r['kl_nats']:.4f}", f"± {r['kl_stderr'] or 0:.4f} nats per token"))
        items.append(("same top-1 token", f"{100 * r['same_top1']:.1f}%", f"of {r['evaluation_tokens']:,} tokens"))
    if r.get("measured_delta_nats") is not None:
        change = plus_minus(r["measured_delta_nats"], r["measured_delta_stderr"])
        items.append(
            ("loss", f"{r['nats_artifact']:.4f}", f"original {r['nats_original']:.4f}; change {change}, paired")
        )
    if r.get("bpb_artifact") is not None:
        items.append(("bits per byte", f"{r['bpb_artifact']:.4f}", f"original {r['bpb_original']:.4f}"))
    kinds = by_kind(found["ledger"])
    if not kinds:
        return cards(items)
    parts = [(style(k), float(n), f"{k}: {n:,} bytes, {100 * n / r['budget_bytes']:.2f}% of the budget")
             for k, n in kinds.items()]  # fmt: skip
    legend = "".join(swatch(style(k), f"{k} {n:,}") for k, n in kinds.items())
    drawn = bar(parts, max(r["budget_bytes"], r["file_bytes"]), "bytes of the file by kind, within the budget")
    shown = f"<p>{legend}</p><figure>{drawn}</figure><p class=dim>{escape(_left(r))}</p>"
    return f"{cards(items)}<h2>Every byte by kind</h2>{shown}"


def _left(report: Mapping[str, Any]) -> str:
    left, allowed = report["slack_bytes"], report["allowed_slack_bytes"]
    return f"The bar ends at the budget: {left:,} bytes are left, {allowed:,} may be."
