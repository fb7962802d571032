"""Draw the README's pictures from results.

python benchmarks/figure.py quality results/targets.jsonl docs/figures/quality.svg
python benchmarks/figure.py formats results/formats.jsonl results/targets.jsonl docs/figures/formats.svg
python benchmarks/figure.py returns results/curves.jsonl results/paths.jsonl docs/figures/returns.svg
python benchmarks/figure.py choose results/choose.jsonl docs/figures/choose.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

Rows = list[dict[str, Any]]
BLUE, RED, GREY = "#2a6f97", "#c44e52", "#8a8a8a"
COLOURS = {"rows": "#c44e52", "channels": "#dd8452", "lowrank": "#55a868", "groups": "#937860", "columns": "#8172b3",
           "outliers": "#8a8a8a"}  # fmt: skip


def quality(rows: Rows) -> Any:
    """KL against bytes, one panel per model."""
    rows = [r for r in rows if r["benchmark"] in {"targets", "methods"}]
    models = sorted({r["model"] for r in rows}, key=lambda m: (m.startswith("base"), m))
    figure, axes = plt.subplots(1, len(models), figsize=(3.4 * len(models), 3), sharey=True)
    for axis, model in zip(axes, models, strict=True):
        for method, colour, marker in (("golf", RED, "s"), ("bytecap", BLUE, "o")):
            mine = {r["bits"]: r for r in rows if (r["model"], r["method"]) == (model, method)}
            found = sorted(mine.values(), key=lambda r: r["file_bytes"])
            x, y = [r["file_bytes"] / 1e6 for r in found], [r["kl_nats"] for r in found]
            axis.errorbar(x, y, [2 * r["kl_stderr"] for r in found], color=colour, marker=marker, label=method)
        axis.set_yscale("log")
        axis.set_title(model)
        axis.set_xlabel("file size, MB (everything counted)")
        axis.grid(which="both", alpha=0.2)
    axes[0].set_ylabel("KL to the original, nats per token")
    axes[0].legend()
    return figure


def formats(rows: Rows) -> Any:
    """KL against bytes of GGUF files: stock recipes, ours at their sizes, and the same model as .bcap."""
    rows = [r for r in rows if r["benchmark"] != "formats" or r.get("format", "gguf") == "gguf"]
    found = [r for r in rows if r["benchmark"] == "formats"]
    models = sorted({r["model"] for r in found}, key=lambda m: (m.startswith("base"), m))
    figure, axes = plt.subplots(1, len(models), figsize=(1.4 + 4.2 * len(models), 3.4), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        kinds = (
            ("formats", "stock", GREY, "s", "llama.cpp's recipes"),
            ("formats", "bytecap", BLUE, "o", "bytecap, GGUF"),
            ("targets", "bytecap", RED, "^", "bytecap, .bcap"),
        )
        for benchmark, method, colour, marker, label in kinds:
            key = (benchmark, model, method)
            mine = [r for r in rows if tuple(r.get(k) for k in ("benchmark", "model", "method")) == key]
            mine = list({r.get("recipe", r["file_bytes"]): r for r in mine}.values())  # of a recipe the latest
            mine.sort(key=lambda r: r["file_bytes"])
            x, y = [r["file_bytes"] / 1e6 for r in mine], [r["kl_nats"] for r in mine]
            line = "" if method == "stock" else "-"
            axis.errorbar(
                x, y, [2 * r["kl_stderr"] for r in mine], color=colour, marker=marker, ls=line, ms=4, label=label
            )  # fmt: skip
            if method == "stock":
                for r in mine:
                    at = (r["file_bytes"] / 1e6, r["kl_nats"])
                    axis.annotate(r["recipe"], at, xytext=(4, 4), textcoords="offset points", fontsize=6)
        axis.set_yscale("log")
        axis.set_title(model)
        axis.set_xlabel("file size, MB (everything counted)")
        axis.grid(which="both", alpha=0.2)
    axes[0][0].set_ylabel("KL to the original, nats per token")
    axes[0][0].legend(fontsize=8)
    return figure


def returns(rows: Rows) -> Any:
    """Draw what bytes buy on every path over the default base, and what paths do at equal bytes over two bases."""
    whole = next(r for r in rows if "lambda" in r and r["model"] == "small-s0")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=[3, 2])
    for name, path in sorted(whole["paths"].items(), key=lambda p: -p[1]["whole"][-1]["kl_recovered"]):
        points = path["whole"]
        x = [0.0, *(p["bytes"] / 1e3 for p in points)]
        y = [0.0, *(1e3 * p["kl_recovered"] for p in points)]
        error = [0.0, *(2e3 * p["kl_stderr"] for p in points)]
        strong = name == "step"
        label = "finer steps everywhere" if strong else name
        left.errorbar(x, y, error, color=BLUE if strong else COLOURS[name], lw=2.5 if strong else 1.2, label=label)
    left.set_title("small-s0 at 3.5 bits: no path beats finer steps", fontsize=10)
    left.set_xlabel("kB spent, side information counted")
    left.set_ylabel("KL recovered, 10⁻³ nats per token")
    left.grid(alpha=0.2)
    left.legend(fontsize=8)
    bars = [r for r in rows if r["benchmark"] == "paths"]
    cells = [(base, budget) for base in ("strong", "weak") for budget in (600_000, 450_000)]
    for i, (base, budget) in enumerate(cells):
        mine = {bool(r["menu"]): r for r in bars if r["base"] == base and r["budget_bytes"] == budget}
        for offset, menu, colour in ((-0.2, False, GREY), (0.2, True, BLUE)):
            r = mine[menu]
            label = ("all paths allowed" if menu else "steps alone") if i == 0 else None
            right.bar(i + offset, r["kl_nats"], 0.38, yerr=2 * r["kl_stderr"], color=colour, label=label)
    names = [f"{'default' if b == 'strong' else 'weak'} base\n{n // 1000} kB" for b, n in cells]
    right.set_xticks(range(len(cells)), names, fontsize=8)
    right.set_title("embedded model at equal bytes", fontsize=10)
    right.set_ylabel("KL, nats per token")
    right.legend(fontsize=8)
    return figure


def choose(rows: Rows) -> Any:
    """Bits per byte against bytes, a curve for each model, and the envelope of the best."""
    found = [r for r in rows if r["benchmark"] == "choose" and r["command"].startswith("python benchmarks/choose.py")]
    figure, axis = plt.subplots(figsize=(7, 3.6))
    best: dict[int, float] = {}
    models, styles = dict.fromkeys(r["model"] for r in found), ((GREY, "s"), (BLUE, "o"), (RED, "d"), ("#55a868", "^"))
    for model, (colour, marker) in zip(models, styles, strict=False):
        fits = {r["budget_bytes"]: r.get("whole") or r.get("short", {}) for r in found if r["model"] == model}
        points = sorted((b / 1e6, f["bpb"], f["bpb_stderr"]) for b, f in fits.items() if "bpb" in f)
        x, y, error = zip(*points, strict=True)
        methods = {r.get("method", "bytecap") for r in found if r["model"] == model}
        label = model if "bytecap" in methods else f"{model}, {', '.join(methods)}"
        axis.errorbar(x, y, [2 * e for e in error], color=colour, marker=marker, ms=4, label=label)
        original = next(f["bpb_original"] for f in fits.values() if "bpb_original" in f)
        axis.axhline(original, color=colour, ls=":", lw=0.8)
        best |= {b: min(f["bpb"], best.get(b, f["bpb"])) for b, f in fits.items() if "bpb" in f}
    x, y = zip(*sorted((b / 1e6, v) for b, v in best.items()), strict=True)
    axis.plot(x, y, color="black", lw=5, alpha=0.15, zorder=0, label="the best")
    axis.set_xscale("log")
    axis.set_xticks(x, [f"{v:g}" for v in x])
    axis.minorticks_off()
    axis.set_xlabel("cap, MB (everything counted); dotted: the originals")
    axis.set_ylabel("bits per byte")
    axis.grid(alpha=0.2)
    axis.legend(fontsize=8)
    return figure


def main() -> None:
    """The picture that is named first."""
    mpl.rcParams["svg.hashsalt"] = "bytecap"
    picture, *sources, target = sys.argv[1:]
    rows = [json.loads(line) for source in sources for line in Path(source).read_text().splitlines()]
    figure = {"quality": quality, "returns": returns, "formats": formats, "choose": choose}[picture](rows)
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    main()
