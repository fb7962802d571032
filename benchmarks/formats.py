"""GGUF at equal file bytes: llama.cpp's recipes with an importance matrix against `bytecap fit --format gguf`.

Stock files hold the types that llama-quantize gives every tensor of a dense Llama with a tied embedding, encoded by
libgguf (ggml's own row quantizers) with the plain second moments of the same calibration text; the embedding has no
importance, as in llama.cpp. Ours get the size of the stock file as their cap. KL to the original is read back from both
files by text. Needs libgguf.
"""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import libgguf
import numpy as np

from bytecap.calibration.statistics import moments
from bytecap.job import Job
from bytecap.job.config import FitConfig
from bytecap.model.checkpoint import Model, load_checkpoint
from bytecap.model.sources import load_sets
from bytecap.pipeline.fit_gguf import fit_gguf
from bytecap.pipeline.quality import quality
from bytecap.pipeline.runtime_model import HELD_TOKENS, measure
from bytecap.pipeline.stages import choose_device
from bytecap.progress import Silent
from bytecap.runtimes.blocks.ggml import FORMATS
from bytecap.runtimes.gguf import file, library
from bytecap.runtimes.gguf.export import describer, importance, plain, values_of
from bytecap.runtimes.gguf.places import Layout, layout_of
from bytecap.system.cache import Store
from common import parser, record, texts

# what a type becomes where rows are no multiple of 256
NARROW = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}
NARROW |= dict.fromkeys(("IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS"), "IQ4_NL")
# types that the menu had before, for `--menu scalar`
SCALAR = (*(f.name for f in FORMATS.values() if not f.vector and f.high > 1 and not f.order), "F16", "BF16")
BASE = {
    "IQ2_XXS": "IQ2_XXS", "IQ2_XS": "IQ2_XS", "IQ2_S": "IQ2_XS", "IQ2_M": "IQ2_S", "IQ3_XXS": "IQ3_XXS",
    "IQ3_XS": "IQ3_S", "Q2_K": "Q2_K", "Q3_K_S": "Q3_K", "Q3_K_M": "Q3_K", "IQ3_S": "IQ3_S", "IQ3_M": "IQ3_S",
    "IQ4_XS": "IQ4_XS", "IQ4_NL": "IQ4_NL", "Q4_K_S": "Q4_K", "Q4_K_M": "Q4_K", "Q5_K_S": "Q5_K", "Q5_K_M": "Q5_K",
    "Q6_K": "Q6_K", "Q8_0": "Q8_0",
}  # fmt: skip


def recipe(name: str, layout: Layout, config: Any) -> dict[str, str]:
    """Type of every matrix under a recipe of llama-quantize with an importance matrix."""
    layers, share = config.num_hidden_layers, config.num_attention_heads // config.num_key_value_heads
    found = {}
    for p in layout.places:
        if p.matrix:
            block = int(p.name.split(".")[1]) if p.name.startswith("blk.") else 0
            kind = one_type(name, p.name, block, layers, share)
            found[p.name] = NARROW.get(kind, kind) if p.cols % 256 else kind
    return found


def one_type(name: str, tensor: str, i: int, layers: int, share: int) -> str:
    """Type of a tensor of block `i`; `share` heads use the same keys."""
    base = BASE[name]
    more = i < layers // 8 or i >= 7 * layers // 8 or (i - layers // 8) % 3 == 2
    if tensor.startswith(("token_embd", "output.")):
        return base if base == "Q8_0" else "Q5_K" if name[:3] == "IQ2" or name == "IQ3_XXS" else "Q6_K"
    if name[:3] == "IQ2":
        better = "Q2_K" if name[-1] == "S" and name != "IQ2_S" else "IQ3_S"
        two = {"attn_v": "Q4_K" if share >= 4 else better, "ffn_down": better if i < layers // 8 else base}
        two |= {"attn_output": better} if better == "IQ3_S" else {}
        return two.get(tensor.split(".")[2], base)
    middle = "IQ3_XXS" if layers // 8 <= i < 7 * layers // 8 else base
    rules: dict[str, dict[str, str]] = {
        "attn_v": {
            "Q2_K": "Q4_K" if share >= 4 else "Q3_K", "IQ3_M": "Q4_K", "Q3_K_M": "Q5_K" if i < 2 else "Q4_K",
            "IQ3_XXS": "Q4_K" if share >= 4 else base, "IQ3_XS": "Q4_K" if share >= 4 else base,
            "IQ4_XS": "Q5_K" if share >= 4 else base, "IQ4_NL": "Q5_K" if share >= 4 else base,
            "Q4_K_M": "Q6_K" if more else base, "Q5_K_M": "Q6_K" if more else base,
            "Q4_K_S": "Q5_K" if i < 4 else base,
        },
        "ffn_down": {
            "Q2_K": "Q3_K", "IQ3_M": "Q4_K" if i < layers // 8 else base,
            "Q3_K_M": "Q5_K" if i < layers // 16 else "Q4_K", "Q4_K_M": "Q6_K" if more else base,
            "Q5_K_M": "Q6_K" if more else base, "Q4_K_S": "Q5_K" if i < layers // 8 else base,
        },
        "attn_output": {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "IQ3_M": "Q4_K", "IQ3_XXS": "IQ3_S"},
        "attn_q": {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}, "attn_k": {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"},
        "ffn_gate": {"IQ3_XS": middle}, "ffn_up": {"IQ3_XS": middle},
    }  # fmt: skip
    part = tensor.split(".")[2] if tensor.startswith("blk.") else tensor
    return rules.get(part, {}).get(name, base)


def stock(model: Model, layout: Layout, types: dict[str, str], weights: dict[str, Any], path: Path) -> int:
    """Write a stock file; returns its bytes."""
    kinds = library().GGMLQuantizationType
    tensors = []
    for p in layout.places:
        if p.name not in types:
            tensors.append(plain(model, p))
            continue
        values = values_of(model, p)
        imatrix = None if p.name == "token_embd.weight" else weights[p.name]
        data = libgguf.quantize_rows(values, int(getattr(kinds, types[p.name])), imatrix)
        tensors.append(replace(plain(model, p), type=types[p.name], data=np.asarray(data).reshape(len(values), -1)))
    return file.write(path, layout.architecture, describer(model, layout, None), tensors)


def main() -> None:
    """Every model and recipe that the output does not hold yet."""
    p = parser(__doc__ or "")
    p.add_argument("--recipes", nargs="*", default=["Q2_K", "Q3_K_M", "IQ4_XS", "Q4_K_M", "Q5_K_M"])
    p.add_argument("--menu", choices=("all", "scalar"), default="all", help="types of ours: all, or one code a column")
    p.add_argument("--stock-only", action="store_true", help="recipes for the lower hull")
    p.add_argument("--held-tokens", type=int, default=HELD_TOKENS, help="tokens of the Hessian that judges")
    p.add_argument("--work", type=Path, help="directory for statistics kept between runs")
    args = p.parse_args()
    lines = args.output.read_text().splitlines() if args.output and args.output.exists() else []
    rows = {(r["model"], r["recipe"], r["method"]): r for r in map(json.loads, lines)}
    for name in args.model:
        ours = "bytecap" if args.menu == "all" else "bytecap scalar"
        left = [(r, m) for r in args.recipes for m in ("stock", ours) if (name, r, m) not in rows]
        left = [x for x in left if x[1] == "stock" or not args.stock_only]
        if left:
            run(args, name, left, rows)
    table(rows)


def run(args: Any, name: str, left: list[tuple[str, str]], rows: dict[tuple[str, str, str], dict[str, Any]]) -> None:
    """Measure what is left of a model."""
    model, quiet = load_checkpoint(args.models / name), Silent()
    model.name = name
    layout, device = layout_of(model), choose_device(args.device)
    model.module.to(device)
    calib, held = texts(args.texts, "calib"), texts(args.texts, "val")
    sets = load_sets(
        model, calib, held, tokens=args.tokens, evaluation_tokens=args.eval_tokens, correction_tokens=args.held_tokens,
        seed=args.seed, reporter=quiet,
    )  # fmt: skip
    job = Job(model, sets, 0, lambda *_: 0, device, quiet, FitConfig(0, seed=args.seed), store=Store(args.work))
    weights: dict[str, Any] = {}
    for r, method in left:
        if method == "stock":
            weights = weights or importance(model, layout, moments(job, guided=False))
            types = recipe(r, layout, model.module.config)
            with tempfile.TemporaryDirectory() as where:
                path = Path(where) / "stock.gguf"
                size = stock(model, layout, types, weights, path)
                parts = measure(model, file.read_units(path, layout, model.units), sets, device, quiet).parts
            row = {"model": name, "file_bytes": size, "bits_per_parameter": 8 * size / model.parameters}
            row |= quality(parts) | {"types": types}
        else:
            budget = rows[name, r, "stock"]["file_bytes"]
            found = fit_gguf(
                model, budget, calibration=calib, evaluation=held, device=device, seed=args.seed, tokens=args.tokens,
                evaluation_tokens=args.eval_tokens, types=SCALAR if args.menu == "scalar" else None,
                options={"held_tokens": args.held_tokens}, store=args.work, reporter=quiet,
            )  # fmt: skip
            row = {k: v for k, v in found.report.items() if k != "margin"}
        row = record(args, {"benchmark": "formats", "recipe": r, **row, "method": method})
        rows[name, r, method] = row
        print(f"{name} {r} {method}: {row['file_bytes']:,} bytes, KL {row['kl_nats']:.5f}", flush=True)


def table(rows: dict[tuple[str, str, str], dict[str, Any]]) -> None:
    """Ratios against the same recipe and against the lower hull of all stock recipes, in log KL."""
    print(
        f"{'model':10s} {'recipe':8s} {'bytes':>10s} {'stock':>9s} {'bytecap':>9s} {'ratio':>6s} {'±':>6s} {'hull':>6s}"
    )
    for (name, r, method), ours in rows.items():
        if method == "stock" or (name, r, "stock") not in rows:
            continue
        theirs = rows[name, r, "stock"]
        ratio = ours["kl_nats"] / theirs["kl_nats"]
        error = ratio * math.hypot(ours["kl_stderr"] / ours["kl_nats"], theirs["kl_stderr"] / theirs["kl_nats"])
        hull = [(x["file_bytes"], x["kl_nats"]) for (n, _, m), x in rows.items() if n == name and m == "stock"]
        print(
            f"{name:10s} {r:8s} {ours['file_bytes']:10,d} {theirs['kl_nats']:9.5f} {ours['kl_nats']:9.5f} {ratio:6.3f} "
            f"{error:6.3f} {ours['kl_nats'] / on_hull(hull, ours['file_bytes']):6.3f}"
        )


def on_hull(points: list[tuple[int, float]], size: int) -> float:
    """KL of the lower hull of (bytes, KL) at a size, straight in the logarithm of KL between its corners."""
    corners: list[tuple[float, float]] = []
    for b, kl in sorted(points):
        x, y = float(b), math.log(kl)
        if corners and y >= corners[-1][1]:
            continue
        while len(corners) > 1 and _slope(corners[-2], corners[-1]) >= _slope(corners[-1], (x, y)):
            corners.pop()
        corners.append((x, y))
    return math.exp(float(np.interp(size, *zip(*corners, strict=True))))


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


if __name__ == "__main__":
    main()
