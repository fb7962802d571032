"""Every path by itself: predicted and measured on the whole model, and its points as a table."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from bytecap.report.curves import curve, line, ranks, sentence, styles
from bytecap.report.frame import identifier, plus_minus, table
from bytecap.report.svg import Mark, Series, chart, key

ORDER = 30
_HEAD = ("bytes", "side bytes", "matrices, %", "weights, %", "KL recovered", "predicted", "loss recovered",
         "nats/byte", "bits/byte per kB")  # fmt: skip


def section(found: Mapping[str, Any]) -> str:
    """A heading, a chart and a table for each."""
    return "\n".join(_path(found, n, p, styles(found)[n]) for n, p in found["paths"].items())


def _path(found: Mapping[str, Any], name: str, path: Mapping[str, Any], style: int) -> str:
    parts = [f"<h2>{escape(name)}</h2>", f"<p>{escape(name)}: {escape(sentence(path))}.</p>"]
    notes, ninety = [], path["ninety_percent_bytes"]
    if ninety is not None:
        notes.append(f"90% of the largest gain measured is there after {ninety:,.0f} bytes")
    if path["skipped_units"]:
        notes.append(f"it cannot apply to {path['skipped_units']} matrices")
    if path["whole"]:
        predicted = [(0.0, 0.0, 0.0), *((p["bytes"], p["predicted_nats"], 0.0) for p in path["whole"])]
        reach = max(at for at, _, _ in predicted)
        series = [
            line(found, reach), Series(f"{name} predicted", sorted(predicted), style + 1),
            curve(name, path, style),
        ]  # fmt: skip
        marks = [] if ninety is None else [Mark(ninety, f"90% of its gain after {ninety:,.0f} bytes", style)]
        title = f"{name}: predicted and measured"
        drawn = chart(series, title, "bytes spent", "nats per token", height=260, marks=marks)
        keys = key(style, "measured") + key(style + 1, "predicted") + key(-1, "lambda")
        parts.append(f"<p>{keys}</p>{drawn}{_table(name, path)}")
    notes.append(ranks(path["agreement"]))
    return "\n".join([*parts, f"<p>{'; '.join(notes)}.</p>"])


def _table(name: str, path: Mapping[str, Any]) -> str:
    rows = [
        [f"{p['bytes']:,}", f"{p['side_bytes']:,}", f"{100 * p['units_share']:.0f}", f"{100 * p['weights_share']:.2f}",
         plus_minus(p["kl_recovered"], p["kl_stderr"], 5), f"{p['predicted_nats']:.5f}",
         plus_minus(p["loss_recovered"], p["loss_stderr"], 5),
         "" if p["nats_per_byte"] is None else f"{p['nats_per_byte']:.2e}",
         "" if p["bpb_per_kb"] is None else f"{p['bpb_per_kb']:.2e}"]
        for p in path["whole"]
    ]  # fmt: skip
    return table(_HEAD, rows, f"{name}: measured on the whole model", name=identifier("whole", name))
