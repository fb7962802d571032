"""Wall time of `bytecap compare demo`: five methods at four budgets by default; at most five minutes on two cores.

Runs the command as a user does, in an empty directory, start-up included, and records how often statistics were
computed: one guided and one plain pass for each kind that methods ask for, however many methods and budgets share it.

    python benchmarks/compare.py --output results/speed.jsonl
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import parser, record

MOST = 300.0  # seconds


def main() -> int:
    """Time it, print and record; 1 where it took too long."""
    p = parser(__doc__ or "", models="demo", required=False)
    p.add_argument("--jobs", type=int, default=1, help="runs at a time")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        words = ["compare", *args.model, "-o", str(out), "--jobs", str(args.jobs), "--device", args.device]
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "bytecap", *words], check=True)
        seconds = time.perf_counter() - started
        lines = [json.loads(line) for line in (out / "runs.jsonl").read_text("utf-8").splitlines()]
        passes = len(list((out / "store").glob("*.npz")))
    runs = [r for r in lines if r["record"] == "run"]
    by_method: dict[str, float] = {}
    for r in runs:
        by_method[r["method"]] = round(by_method.get(r["method"], 0.0) + r.get("seconds", 0.0), 2)
    row = record(args, {
        "benchmark": "compare", "model": " ".join(args.model), "seconds": round(seconds, 1), "most": MOST,
        "runs": len(runs), "budgets": len({r["budget_bytes"] for r in runs}), "seconds_by_method": by_method,
        "statistics": passes, "jobs": args.jobs, "cores": os.cpu_count(), "load": os.getloadavg()[0],
    })  # fmt: skip
    print(f"{row['runs']} runs in {row['seconds']} s (at most {MOST:.0f}), statistics computed {passes} times, "
          f"by method {by_method}")  # fmt: skip
    return int(seconds > MOST)


if __name__ == "__main__":
    sys.exit(main())
