"""Wall time of `bytecap compare demo`: five methods at four budgets by default; at most five minutes on two cores.

Runs the command as a user does, in an empty directory, start-up included, and records how often statistics were
computed: once for each kind that methods ask for, however many methods and budgets share it.

    python benchmarks/compare.py --jobs 2 --output results/speed.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bytecap.system.cache import Store
from common import record

MOST = 300.0  # seconds


def main() -> int:
    """Time it, print and record; 1 where it took too long."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--jobs", type=int, default=1, help="runs at a time")
    p.add_argument("--methods", help="others than the default ones")
    p.add_argument("--budgets", help="others than the default ones")
    p.add_argument("--output", type=Path, help="JSON lines are appended here")
    p.set_defaults(models=None, texts=None, seed=0)
    args = p.parse_args()
    words = ["compare", "demo", "--jobs", str(args.jobs), "--device", "cpu"]
    words += [w for name in ("methods", "budgets") if (v := getattr(args, name)) for w in (f"--{name}", v)]
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "bytecap", *words, "-o", name], check=True)
        seconds = round(time.perf_counter() - started, 1)
        lines = [json.loads(line) for line in (out / "runs.jsonl").read_text("utf-8").splitlines()]
        store = Store(out / "store")
        passes = sum("tokens" in (store.arrays(p.stem) or {}) for p in (out / "store").glob("*.npz"))
    runs = [r for r in lines if r["record"] == "run"]
    by_method = {m: round(sum(r.get("seconds", 0.0) for r in runs if r["method"] == m), 1)
                 for m in dict.fromkeys(r["method"] for r in runs)}  # fmt: skip
    record(args, {
        "benchmark": "compare", "model": "demo", "seconds": seconds, "most": MOST, "runs": len(runs),
        "budgets": len({r["budget_bytes"] for r in runs}), "seconds_by_method": by_method, "statistics": passes,
        "jobs": args.jobs, "cores": os.cpu_count(), "load_before": round(os.getloadavg()[2], 2),
    })  # fmt: skip
    print(f"{len(runs)} runs in {seconds} s (at most {MOST:.0f}), statistics computed {passes} times, {by_method}")
    return int(seconds > MOST)


if __name__ == "__main__":
    sys.exit(main())
