"""The target table: `bytecap` against `golf` at equal file bytes, on several models and budgets.

Prints, for every cell, the ratio of KL to the original, the difference of loss with its standard error, and the
bytes `golf` needs for the KL that `bytecap` reaches (interpolated in log KL between golf's own budgets).
"""

from __future__ import annotations

import json
import math
from typing import Any

from bytecap.model.checkpoint import load_checkpoint
from bytecap.pipeline.fit import fit
from common import parser, record, texts


def main() -> None:
    """Run every cell and print the table."""
    p = parser(__doc__ or "", models="small-s0,small-s1,base-s1")
    p.add_argument("--bits", nargs="*", type=float, default=[3.5, 2.5], help="bits per parameter")
    p.add_argument("--more-golf-bits", nargs="*", type=float, default=[4.25])
    p.add_argument("--methods", nargs="*", default=["golf", "bytecap"])
    args = p.parse_args()
    rows = finished(args)
    for name in args.model:
        for method in args.methods:
            for bits in [*args.bits, *(args.more_golf_bits if method == "golf" else [])]:
                row = rows.get((name, bits, method)) or one(args, name, bits, method)
                rows[name, bits, method] = row
                print(
                    f"{name} {bits} {method}: KL {row['kl_nats']:.4f} loss {row['measured_delta_nats']:+.4f}",
                    flush=True,
                )
    ratios(args, rows)


def finished(args: Any) -> dict[tuple[str, float, str], dict[str, Any]]:
    """Cells that the output file already holds: an interrupted run goes on where it stopped."""
    lines = args.output.read_text().splitlines() if args.output and args.output.exists() else []
    rows = [json.loads(line) for line in lines]
    return {(r["model"], r["bits"], r["method"]): r for r in rows if r["benchmark"] == "targets"}


def one(args: Any, name: str, bits: float, method: str) -> dict[str, Any]:
    """One fit, measured and recorded."""
    model = load_checkpoint(args.models / name)
    model.name = name
    budget = int(bits * model.parameters / 8)
    result = fit(
        model, budget, calibration=texts(args.texts, "calib"), evaluation=texts(args.texts, "val"), method=method,
        device=args.device, seed=args.seed, tokens=args.tokens, evaluation_tokens=args.eval_tokens,
    )  # fmt: skip
    return record(args, {"benchmark": "targets", "bits": bits, **result.report})


def ratios(args: Any, rows: dict[tuple[str, float, str], dict[str, Any]]) -> None:
    """Ratios within this run."""
    print(
        f"{'model':10s} {'bits':>4s} {'KL ratio':>9s} {'loss difference':>20s} {'loss ratio':>10s} {'bytes ratio':>11s}"
    )
    found = []
    for (name, bits, method), ours in rows.items():
        golf = rows.get((name, bits, "golf"))
        if method != "bytecap" or golf is None:
            continue
        error = math.hypot(ours["measured_delta_stderr"], golf["measured_delta_stderr"])
        kl = ours["kl_nats"] / golf["kl_nats"]
        size = ours["file_bytes"] / bytes_at(rows, name, ours["kl_nats"])
        found.append((kl, size))
        change = ours["measured_delta_nats"] - golf["measured_delta_nats"]
        loss = ours["measured_delta_nats"] / golf["measured_delta_nats"]
        print(f"{name:10s} {bits:4.1f} {kl:9.3f} {change:+12.4f} ± {error:.4f} {loss:10.3f} {size:11.3f}")
    if found:
        kl, size = (sum(x) / len(found) for x in zip(*found, strict=True))
        print(f"mean KL ratio {kl:.3f}, worst {max(x[0] for x in found):.3f}; mean bytes ratio {size:.3f}")
        record(
            args,
            {"benchmark": "targets-summary", "kl_ratio": kl, "worst": max(x[0] for x in found), "bytes_ratio": size},
        )


def bytes_at(rows: dict[tuple[str, float, str], dict[str, Any]], name: str, kl: float) -> float:
    """Bytes golf needs for a KL: piecewise linear in log KL, the end pieces prolonged."""
    points = sorted(
        (math.log(r["kl_nats"]), r["file_bytes"]) for (n, _, m), r in rows.items() if n == name and m == "golf"
    )
    x = math.log(kl)
    i = max(0, min(len(points) - 2, sum(p[0] < x for p in points) - 1))
    (x0, y0), (x1, y1) = points[i : i + 2]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


if __name__ == "__main__":
    main()
