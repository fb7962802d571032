"""Print tables on the terminal: the ledger, the outcome of a fit, scores, curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.measure import Measurement
from rich.table import Table

from bytecap.escape import console, shown, styled
from bytecap.format.ledger import Entry, by_kind, by_overlay, by_unit, total
from bytecap.report.curves import sentence
from bytecap.report.fit.predicted import distance
from bytecap.sizes import format_size
from bytecap.types import Score

_COLOURS = {
    "payload": "green", "side": "yellow", "table": "magenta", "tokenizer": "cyan", "config": "blue", "index": "red",
    "header": "bright_black", "code": "white", "padding": "bright_red",
}  # fmt: skip
_BAR = 72
_LONGEST = 400  # characters of a name that are shown


def print_ledger(entries: Sequence[Entry], name: str, *, most: int = 24) -> None:
    """Print a bar of kinds, then owners by falling size."""
    out = console()
    size = total(entries)
    kinds = by_kind(entries)
    out.print(styled((name, "bold"), f": {format_size(size)}"), highlight=False)
    out.print(styled(*[("█" * max(1, round(_BAR * n / size)), _COLOURS[k]) for k, n in kinds.items()]))
    out.print(
        styled(
            *[
                part
                for i, (k, n) in enumerate(kinds.items())
                for part in ("  " if i else "", ("■", _COLOURS[k]), f" {k} {n:,} ({100 * n / size:.2f}%)")
            ]
        ),
        highlight=False,
    )
    if paths := by_overlay(entries):
        out.print(f"overlays: {_paths(paths)}", highlight=False)
    table = Table(box=None, pad_edge=False)
    for title, justify in (
        ("owner", "left"),
        ("bytes", "right"),
        ("share", "right"),
        ("bits/parameter", "right"),
        ("side", "right"),
    ):
        table.add_column(title, justify=justify)  # type: ignore[arg-type]
    lines = by_unit(entries)
    for line in lines[:most]:
        side = sum(n for kind, n in line.kinds.items() if kind.rpartition(" ")[2] in {"header", "index", "side"})
        bits = f"{8 * line.bytes / line.parameters:.3f}" if line.parameters else ""
        share = f"{100 * side / line.bytes:.2f}%" if line.parameters and line.bytes else ""
        table.add_row(
            shown(line.unit, most=_LONGEST), f"{line.bytes:,}", f"{100 * line.bytes / size:.2f}%", bits, share
        )
    rest = lines[most:]
    if rest:
        table.add_row(f"({len(rest)} more)", f"{sum(line.bytes for line in rest):,}", "", "", "")
    needed = Measurement.get(out, out.options.update(max_width=1 << 12), table).maximum
    out.width = max(out.width, needed)  # names stay whole: who searches for one finds it
    out.print(table)


def print_fit(report: dict[str, Any]) -> None:
    """Print the outcome of a fit."""
    out = console()
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    size, kind = report["file_bytes"], "file" if report.get("format", "gguf") == "gguf" else "directory"
    if "bpb_artifact" in report:
        table.add_row(kind, f"{format_size(size)}; {report['slack_bytes']:,} bytes of the budget left")
        table.add_row(
            "bits per parameter", f"{report['bits_per_parameter']:.3f} over {report['parameters']:,} unique parameters"
        )
        if math.isfinite(report["bpb_artifact"]):  # somebody counted bytes
            table.add_row("bits per byte", _bpb(report))
        if math.isfinite(report["kl_nats"]):  # the loss holds predictions
            table.add_row("KL to the original", f"{report['kl_nats']:.4f} ± {report['kl_stderr']:.4f} nats per token")
            table.add_row("same top-1 token", f"{100 * report['same_top1']:.1f}%")
        table.add_row("loss", _loss(report))
        if apart := distance(report):
            table.add_row("text", apart)
    else:
        wrote = f"nothing but {shown(report['emitted'])} written" if "emitted" in report else "nothing written"
        table.add_row("dry run", f"{wrote}; {format_size(report['budget_bytes'])} budget")
        table.add_row("floor", f"{format_size(report['floor_bytes'])} is the smallest reachable {kind}")
        table.add_row("predicted KL", f"{report['predicted_delta_nats']:.4f} nats per token")
    if "source_quantization" in report:
        table.add_row("source", f"dequantized from {report['source_quantization']}: quality is against those values")
    if "code_files" in report:
        table.add_row(
            "code", f"{report['code_packed_bytes']:,} bytes packed, {report['code_raw_bytes']:,} raw; "
            f"the cap is met {report['code_accounting']}",
        )  # fmt: skip
    if math.isfinite(report["slope_nats_per_byte"] or math.nan):
        table.add_row("one more kilobyte", f"buys {1000 * report['slope_nats_per_byte']:.2e} nats per token")
    if report["paths"]:
        table.add_row("overlays", _paths(report["paths"]))
    table.add_row("plan", f"{report['method']}: {report['plan']}; {report['seconds']:.1f} s")
    out.print(table, highlight=False)


def _paths(found: dict[str, dict[str, int]]) -> str:
    return ", ".join(f"{n} on {x['units']} units, {x['bytes']:,} bytes" for n, x in found.items())


def _bpb(report: dict[str, Any]) -> str:
    change = report["bpb_artifact"] - report["bpb_original"]
    return (
        f"{report['bpb_original']:.4f} -> {report['bpb_artifact']:.4f} "
        f"({change:+.4f} ± {report['bpb_stderr']:.4f}, paired)"
    )


def _loss(report: dict[str, Any]) -> str:
    best = f"; the original at its best temperature {report['temperature']:.2f} has {report['nats_temperature']:.4f}"
    return (
        f"{report['nats_original']:.4f} -> {report['nats_artifact']:.4f} nats per token; predicted change "
        f"{report['predicted_delta_nats'] or math.nan:+.4f}, measured {report['measured_delta_nats']:+.4f}"
        f"{best if math.isfinite(report['temperature']) else ''}"
    )


def print_scores(scores: Sequence[Score]) -> None:
    """Print the bits per byte of every text."""
    table = Table(box=None, pad_edge=False)
    for title in ("text", "bits per byte", "nats per token", "tokens", "bytes"):
        table.add_column(title, justify="left" if title == "text" else "right")
    for s in scores:
        table.add_row(s.name, f"{s.bpb:.4f} ± {s.bpb_stderr:.4f}", f"{s.nats:.4f}", f"{s.tokens:,}", f"{s.bytes:,}")
    console().print(table)


def print_curves(found: dict[str, Any]) -> None:
    """Print the gain of every path at every amount, against finer steps."""
    out = console()
    base, slope = found["base"], found["lambda"]["nats_per_byte"] or math.nan
    out.print(
        f"base {base['name']}: {format_size(base['bytes'])} of matrices, KL {base['kl_nats']:.4f} nats per token, "
        f"{base['bpb']:.4f} bits per byte; finer steps buy {slope:.2e} nats per byte", highlight=False,
    )  # fmt: skip
    table = Table(box=None, pad_edge=False)
    for title in ("path", "bytes", "side", "weights", "KL recovered", "±", "nats/byte", "bpb/kB"):
        table.add_column(title, justify="left" if title == "path" else "right", no_wrap=True)
    for name, path in found["paths"].items():
        for i, p in enumerate(path["whole"]):
            table.add_row(
                "" if i else name, f"{p['bytes']:,}", f"{p['side_bytes']:,}", f"{100 * p['weights_share']:.2f}%",
                f"{p['kl_recovered']:.5f}", f"{p['kl_stderr'] or math.nan:.5f}",
                *("-" if p[k] is None else f"{p[k]:.1e}" for k in ("nats_per_byte", "bpb_per_kb")),
            )  # fmt: skip
    out.print(table, highlight=False)
    for name, path in found["paths"].items():
        extra = ""
        if path["ninety_percent_bytes"] is not None:
            extra = f"; 90% of its gain within {path['ninety_percent_bytes']:,.0f} bytes"
        out.print(styled((name, "bold"), f": {sentence(path)}{extra}"), highlight=False)
    ranks = found["agreement"]
    out.print(
        f"single units: rank correlation of predicted and measured gain {ranks['spearman'] or math.nan:.3f} over "
        f"{ranks['points']} points; noise allows {ranks['ceiling'] or math.nan:.3f}", highlight=False,
    )  # fmt: skip
