"""Draw quality against bytes.

python benchmarks/figure.py results/targets.jsonl results/methods.jsonl docs/figures/quality.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt


def main() -> None:
    """One panel per model."""
    mpl.rcParams["svg.hashsalt"] = "bytecap"
    *sources, target = sys.argv[1:]
    rows = [json.loads(line) for source in sources for line in Path(source).read_text().splitlines()]
    rows = [r for r in rows if r["benchmark"] in {"targets", "methods"}]
    models = sorted({r["model"] for r in rows}, key=lambda m: (m.startswith("base"), m))
    figure, axes = plt.subplots(1, len(models), figsize=(3.4 * len(models), 3), sharey=True)
    for axis, model in zip(axes, models, strict=True):
        for method, colour, marker in (("golf", "#c44e52", "s"), ("bytecap", "#2a6f97", "o")):
            mine = sorted(
                (r for r in rows if (r["model"], r["method"]) == (model, method)), key=lambda r: r["file_bytes"]
            )
            x, y = [r["file_bytes"] / 1e6 for r in mine], [r["kl_nats"] for r in mine]
            axis.errorbar(x, y, [2 * r["kl_stderr"] for r in mine], color=colour, marker=marker, label=method)
        axis.set_yscale("log")
        axis.set_title(model)
        axis.set_xlabel("file size, MB (everything counted)")
        axis.grid(which="both", alpha=0.2)
    axes[0].set_ylabel("KL to the original, nats per token")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    main()
