"""Show what recovery did: KL against its seconds."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from bytecap.report.svg import Series, chart, key

ORDER = 45


def section(found: Mapping[str, Any]) -> str:
    """KL on the correction tokens against seconds; between two checks that of the tokens which are tuned on."""
    record = found["report"].get("recovery") or {}
    curve = [p for p in record.get("curve", ()) if p[2] is not None]
    if len(curve) < 2:
        return ""
    tuned = [p for s in record["stages"] for p in s.get("on_tuned_tokens", ()) if p[2] is not None]
    series = [
        Series("correction tokens", [(s, kl, 0.0) for s, _, kl in curve], 0,
               tips=[f"{s:,.1f} s, {i:,} iterations: KL {kl:.4f}" for s, i, kl in curve]),
        *([Series("tokens tuned on", [(s, kl, 0.0) for s, _, kl in tuned], -1)] if tuned else ()),
    ]  # fmt: skip
    title = "KL to the original against the seconds of recovery"
    best = min(kl for _, _, kl in curve)
    words = f"KL {curve[0][2]:.4f} before, {best:.4f} at best, on the correction tokens, which are never tuned on."
    keys = key(0, "correction tokens") + (key(-1, "tokens tuned on, not all coded yet") if tuned else "")
    drawn = chart(series, title, "seconds of recovery", "KL, nats per token", height=300)
    return f"<h2>Recovery</h2><p>{escape(words)} {keys}</p>{drawn}"
