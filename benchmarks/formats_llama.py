"""GGUF in llama.cpp itself: KL of its own logits, stock recipe with an importance matrix against `bytecap fit`.

llama.cpp rounds activations to 8 bits and keeps keys and values in float16, which adds to what the weights cost. So
both files of equal bytes are run by unmodified llama.cpp (one thread, its defaults), window by window on three
held-out texts, and their logits are compared with the original's in float32. `decoded` is the KL of the weights alone,
read back from the same file; `between` is the KL from that decoded model to llama.cpp, which is what running it costs.
Needs libgguf and llama-cpp-python.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch
from torch import Tensor, nn

import formats
from bytecap.calibration.statistics import moments
from bytecap.job import Job
from bytecap.job.config import FitConfig
from bytecap.model.checkpoint import Model, load_checkpoint
from bytecap.model.forward import logits_of
from bytecap.model.quantized_copy import copy_of, load_values
from bytecap.model.sources import load_sets
from bytecap.model.texts import TokenSets, Window
from bytecap.pipeline.fit_gguf import fit_gguf
from bytecap.pipeline.runtime_model import HELD_TOKENS
from bytecap.progress import Silent
from bytecap.runtimes.gguf import file
from bytecap.runtimes.gguf.export import importance
from bytecap.runtimes.gguf.places import Layout, layout_of
from bytecap.system.cache import Store
from common import parser, record, texts

FIGURES = ("llama", "decoded", "between")


def main() -> None:
    """Every model and recipe."""
    p = parser(__doc__ or "")
    p.add_argument("--recipes", nargs="*", default=["Q6_K"])
    p.add_argument("--menu", choices=("all", "scalar"), default="all", help="types of ours: all, or one code a column")
    p.add_argument("--held-tokens", type=int, default=HELD_TOKENS, help="tokens of the Hessian that judges")
    p.add_argument("--work", type=Path, help="directory for statistics kept between runs")
    args = p.parse_args()
    for name in args.model:
        run(args, name)


def run(args: Any, name: str) -> None:
    """Measure the recipes of a model."""
    model, quiet = load_checkpoint(args.models / name), Silent()
    model.name = name
    layout, calib, held = layout_of(model), texts(args.texts, "calib"), texts(args.texts, "val")
    sets = load_sets(
        model, calib, held, tokens=args.tokens, evaluation_tokens=args.eval_tokens, correction_tokens=args.held_tokens,
        seed=args.seed, reporter=quiet,
    )  # fmt: skip
    job = Job(model, sets, 0, lambda *_: 0, "cpu", quiet, FitConfig(0, seed=args.seed), store=Store(args.work))
    weights = importance(model, layout, moments(job, guided=False))
    for recipe in args.recipes:
        with tempfile.TemporaryDirectory() as where:
            stock, ours = Path(where) / "stock.gguf", Path(where) / "ours.gguf"
            types = formats.recipe(recipe, layout, model.module.config)
            size = formats.stock(model, layout, types, weights, stock)
            fit_gguf(
                model, size, calibration=calib, evaluation=held, device="cpu", seed=args.seed, tokens=args.tokens,
                evaluation_tokens=args.eval_tokens, types=formats.SCALAR if args.menu == "scalar" else None,
                options={"held_tokens": args.held_tokens}, store=args.work, output=ours, reporter=quiet,
            )  # fmt: skip
            sizes = {"stock_bytes": size, "file_bytes": ours.stat().st_size}
            row = compared(model, layout, sets, {"stock": stock, "bytecap": ours})
        row = {"benchmark": "formats_llama", "model": name, "recipe": recipe, "menu": args.menu, **sizes, **row}
        print(json.dumps(record(args, row)), flush=True)


def compared(model: Model, layout: Layout, sets: TokenSets, paths: dict[str, Path]) -> dict[str, Any]:
    """KL of both files: of llama.cpp's logits, decoded, and between these; ratios with paired standard errors."""
    found = {kind: measured(model, layout, sets, path) for kind, path in paths.items()}
    row: dict[str, Any] = {"tokens": int(sum(t.tokens for t in sets.evaluation))}
    for kind, by_figure in found.items():
        row |= {f"{kind}_{figure}": mean(windows)[0] for figure, windows in by_figure.items()}
    for figure in FIGURES[:2]:
        ours, theirs = (found[kind][figure] for kind in ("bytecap", "stock"))
        top, bottom = mean(ours)[0], mean(theirs)[0]
        ratio = top / bottom
        parts = [np.stack([a[:, 0] - ratio * b[:, 0], a[:, 1]], 1) for a, b in zip(ours, theirs, strict=True)]
        row |= {f"{figure}_ratio": ratio, f"{figure}_ratio_stderr": mean(parts)[1] / bottom}
    return row


def mean(parts: list[np.ndarray]) -> tuple[float, float]:
    """Mean over texts of sums over tokens, from (windows, 2) of each text, and its standard error over windows."""
    means, variance = [], 0.0
    for sums, tokens in (p.T for p in parts):
        value, n = sums.sum() / tokens.sum(), len(sums)
        means.append(value)
        variance += n / max(1, n - 1) * ((sums - value * tokens) ** 2).sum() / tokens.sum() ** 2
    return float(np.mean(means)), math.sqrt(variance) / len(parts)


@torch.no_grad()
def measured(model: Model, layout: Layout, sets: TokenSets, path: Path) -> dict[str, list[np.ndarray]]:
    """Sums of KL and tokens of every window, (windows, 2) for each text, by figure."""
    decoded = copy_of(model.module)
    load_values(decoded, file.read_units(path, layout, model.units))
    longest = max(len(w.tokens) for t in sets.evaluation for w in t.windows)
    runtime = llama_cpp.Llama(str(path), n_ctx=longest, logits_all=True, verbose=False, n_threads=1)
    found: dict[str, list[np.ndarray]] = {figure: [] for figure in FIGURES}
    for text in sets.evaluation:
        rows = list(windows_of(model.module, decoded, runtime, text.windows))
        for at, figure in enumerate(FIGURES):
            found[figure].append(np.array([(r[at], r[-1]) for r in rows]))
    return found


def windows_of(
    original: nn.Module, decoded: nn.Module, runtime: Any, windows: tuple[Window, ...]
) -> Iterator[tuple[float, float, float, int]]:  # fmt: skip
    """Sums of the three figures over the predicted tokens of every window, and their number."""
    for window in windows:
        ids = list(window.tokens)
        runtime.reset()
        runtime.eval(ids)
        theirs = torch.from_numpy(np.array(runtime.scores[: len(ids)])).log_softmax(-1)[:-1]
        one, other = (logits_of(m(torch.tensor([ids])))[0].float().log_softmax(-1)[:-1] for m in (original, decoded))
        yield divergence(one, theirs), divergence(one, other), divergence(other, theirs), window.predicted


def divergence(p: Tensor, q: Tensor) -> float:
    """Sum of KL over tokens, from logarithms of probabilities (tokens, vocabulary)."""
    return float((p.exp() * (p - q)).sum())


if __name__ == "__main__":
    main()
