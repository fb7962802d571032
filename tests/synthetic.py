"""Figures of made-up comparisons and curves, in the shape that commands write: pages can be drawn without fitting."""

import json
import math

import numpy as np

METHODS = {"bytecap": 1.0, "golf": 1.9, "owq:published": 5.0, "radio": 5.5, "uniform": 12.0}  # KL, relative
TEXTS = ("literature", "technical")
UNITS = [f"model.layers.{i}.{role}.weight" for i in range(6) for role in ("self_attn.q_proj", "mlp.down_proj")]


def comparison_lines(path, models=("models/small", "models/large"), seeds=2):
    """Write lines of every method at four budgets; the KL falls as sizes grow, and errors of windows are shared."""
    rng, lines = np.random.default_rng(0), []
    budgets, windows = (2_000_000, 2_500_000, 3_000_000, 3_500_000), 24
    for model in models:
        tokens = [int(n) for n in rng.integers(200, 500, windows)]
        original = (2.7 * np.array(tokens)).tolist()
        texts = [{"name": t, "tokens": tokens, "bytes": tokens, "original": original,
                  "documents": list(range(windows))} for t in TEXTS]  # fmt: skip
        lines.append({"record": "texts", "key": model, "model": model, "parameters": 7_000_000, "texts": texts})
        said = -1.5 + 0.1 * np.arange(40) / 40  # log likelihoods of the original's answers
        hard = rng.lognormal(0, 0.3, windows)
        for i, (method, budget, seed) in enumerate(
            (m, b, s) for m in METHODS for b in budgets for s in range(seeds) if not (m == "uniform" and b == 2_000_000)
        ):
            level = 0.02 * METHODS[method] * math.exp((3_000_000 - budget) / 6e5)
            right = (np.arange(40) > 40 * level).astype(float)
            kl = level * np.array(tokens) * hard * rng.lognormal(0, 0.05, windows)
            run = {"record": "run", "key": f"{model} {i}", "order": i, "model": model, "method": method,
                   "budget_bytes": budget, "seed": seed, "command": "bytecap compare models/small models/large -o out",
                   "host": "synthetic", "file_bytes": budget - 11, "bits_per_parameter": 8 * budget / 7e6,
                   "same_top1": 0.9, "cpu_seconds": 20.0, "texts_key": model,
                   "predicted_delta_nats": level if method == "bytecap" else None,
                   "texts": [{"name": t, "kl": kl.tolist(), "nats": (original + 0.8 * kl).tolist()} for t in TEXTS],
                   "tasks": {"cloze acc": right.tolist(), "cloze perplexity": (said - level).tolist()},
                   "tasks_original": {"cloze acc": [1.0] * 40, "cloze perplexity": said.tolist()},
                   }  # fmt: skip
            lines.append(run)
        lines += [
            {"record": "run", "key": f"{model} refused {s}", "order": 99, "model": model, "method": "uniform",
             "budget_bytes": 2_000_000, "seed": s, "command": "", "host": "synthetic", "refused": "too small",
             "floor_bytes": 2_100_000} for s in range(seeds)
        ]  # fmt: skip
    path.write_text("".join(json.dumps(x) + "\n" for x in lines), "utf-8")
    return path


def _point(size, gain, **more):
    return {"bytes": size, "side_bytes": size // 50, "units_share": 0.5, "weights_share": 0.1, "kl_recovered": gain,
            "kl_stderr": 0.1 * gain, "loss_recovered": 0.8 * gain, "loss_stderr": 0.3 * gain,
            "predicted_nats": 1.1 * gain, "nats_per_byte": gain / size, "bpb_per_kb": 0.5e3 * gain / size,
            **more}  # fmt: skip


def curves_figures(paths=("step", "channels", "columns", "groups", "lowrank", "outliers", "rows")):
    """The contents of `curves.json` for a model of twelve matrices."""
    agreement, found = {"points": 24, "spearman": 0.8, "ceiling": 0.9}, {}
    for i, name in enumerate(paths):
        gains = [(s, 0.06 / (1 + i) * (1 - math.exp(-s / 30_000))) for s in (4_000, 8_000, 15_000, 30_000, 60_000)]
        found[name] = {
            "verdict": "does not earn" if i else "yardstick", "advantage_nats": -0.01 * i if i else None,
            "advantage_stderr": 0.003, "advantage_bytes": 59_000, "skipped_units": i % 2,
            "ninety_percent_bytes": 40_000.0 + 2_000 * i, "whole": [_point(s, g) for s, g in gains],
            "units": [
                {"unit": u, "section_bytes": 20_000 + 7 * j,
                 "points": [{"bytes": s / 12, "predicted_nats": g * (1 + j) / 90, "on_hull": True} for s, g in gains]}
                for j, u in enumerate(UNITS)
            ],
            "sample": [_point(900 + j, 1e-4 * (1 + j), unit=u, setting="Amount(count=8)") for j, u in enumerate(UNITS)],
            "agreement": agreement,
        }  # fmt: skip
    base = {"name": "grid", "bytes": 590_000, "kl_nats": 0.21, "kl_stderr": 0.01, "bpb": 1.34, "bpb_original": 1.27}
    return {"model": "synthetic", "budget_bytes": 600_000, "base": base, "held_out_tokens": 4096,
            "lambda": {"nats_per_byte": 1.5e-6, "bpb_per_kb": 5e-4}, "paths": found,
            "agreement": agreement}  # fmt: skip
