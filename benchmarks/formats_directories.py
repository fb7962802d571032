"""MLX and compressed-tensors at equal bytes: the tools that people use against `bytecap fit --format`.

MLX: `mlx_lm.convert -q` (rounding to nearest, group 64), mlx-lm's `dynamic_quant` and its DWQ, as `formats_mlx` says;
mlx decodes what they stored. compressed-tensors: GPTQ
of the same layout, written here after the paper (plain Hessian, 1% damping, blocks of 128 columns, min-max scales of
groups of 128, or 64 where 128 does not divide a row), and llm-compressor's own GPTQ, whose directory must be made in an
environment of its own (it pins transformers) from the windows that `--windows` writes, and given by `--llm-compressor`.
Ours get the bytes of their weights and configuration, and the same tokenizer, which both hold as compact JSON. Needs
mlx[cpu] and mlx-lm.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bytecap.calibration.metric import join
from bytecap.calibration.statistics import moments
from bytecap.job import Job
from bytecap.job.config import FitConfig
from bytecap.model.checkpoint import Model, load_checkpoint
from bytecap.model.evaluation import compare_models
from bytecap.model.quantized_copy import copy_of, load_values
from bytecap.model.sources import load_sets
from bytecap.model.texts import TokenSets
from bytecap.pipeline.fit_directory import fit_directory, write_directory
from bytecap.pipeline.quality import quality
from bytecap.pipeline.runtime_model import HELD_TOKENS, measure
from bytecap.pipeline.stages import choose_device
from bytecap.progress import Silent
from bytecap.runtimes.blocks import BlockFormat, Codes
from bytecap.runtimes.directory import family
from bytecap.runtimes.directory.contents import compact, contents_of, read_units
from bytecap.runtimes.directory.menu import plain_values
from bytecap.system.cache import Store
from common import parser, record, texts
from formats_mlx import mlx_values

# arm: family, and what is told to the tool
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "convert-3": ("mlx", {"bits": 3}),
    "convert-4": ("mlx", {"bits": 4}),
    "dynamic-3.5": ("mlx", {"target": 3.5, "low": 2, "high": 4}),
    "dynamic-4.5": ("mlx", {"target": 4.5, "low": 3, "high": 5}),
    "dwq-3.5": ("mlx", {"bits": 3, "distil": True}),
    "dwq-4.5": ("mlx", {"bits": 4, "distil": True}),
    "dwq-3.5-fast": ("mlx", {"bits": 3, "distil": True, "rate": 1e-5, "samples": 512}),
    "dwq-4.5-fast": ("mlx", {"bits": 4, "distil": True, "rate": 1e-5, "samples": 512}),
    "gptq-w4g128": ("compressed-tensors", {}),
    "llmc-w4g128": ("compressed-tensors", {}),
}
WRITTEN = " as written"  # behind an arm's name, with `--as-written`
OURS, TUNED = "bytecap", " recovered"  # methods: ours, and what stands behind it with `--recover`
Rows = dict[tuple[str, str, str], dict[str, Any]]


def main() -> None:
    """Every model and arm that the output does not hold yet."""
    p = parser(__doc__ or "")
    p.add_argument("--arms", nargs="*", default=list(ARMS))
    p.add_argument("--held-tokens", type=int, default=HELD_TOKENS, help="tokens of the Hessian that judges")
    p.add_argument("--work", type=Path, help="directory for statistics kept between runs")
    p.add_argument(
        "--as-written", action="store_true", help="stock's tokenizer counts as its tool leaves it, with white space"
    )
    p.add_argument("--windows", type=Path, help="JSON of the calibration windows to write")
    p.add_argument("--side", choices=["stock", "bytecap"], help="measure this side alone")
    p.add_argument(
        "--reuse", action="store_true", help="take what is at hand of ours and has no more bytes than theirs"
    )
    p.add_argument("--recover", help="tune scales and vectors of ours so long (see `bytecap fit`)")
    p.add_argument("--types", type=lambda s: s.split(","), help="schemes that ours may take, in place of its menu")
    p.add_argument("--llm-compressor", type=Path, help="directory that llm-compressor wrote")
    args = p.parse_args()
    lines = args.output.read_text().splitlines() if args.output and args.output.exists() else []
    rows = {(r["model"], r["recipe"], r["method"]): r for r in map(json.loads, lines)}
    for name in args.model:
        run(args, name, rows)
    table(rows)


def table(rows: Rows) -> None:
    """Print ours beside theirs."""
    print(f"{'model':10s} {'arm':24s} {'bytes':>10s} {'stock':>9s} {'bytecap':>9s} {'ratio':>6s} {'±':>6s}")
    for (name, arm, method), ours in rows.items():
        theirs = rows.get((name, arm, "stock"))
        if theirs is None or not method.startswith(OURS) or arm.removesuffix(WRITTEN) not in ARMS:
            continue
        ratio = ours["kl_nats"] / theirs["kl_nats"]
        error = ratio * math.hypot(*(r["kl_stderr"] / r["kl_nats"] for r in (ours, theirs)))
        print(
            f"{name:10s} {arm:24s} {ours['file_bytes']:10,d} {theirs['kl_nats']:9.5f} {ours['kl_nats']:9.5f} "
            f"{ratio:6.3f} {error:6.3f}{method.removeprefix(OURS)}"
        )


def at_hand(rows: Rows, theirs: dict[str, Any], method: str) -> dict[str, Any] | None:
    """The largest directory of ours of a model that has no more bytes than one of theirs; None if there is none."""
    ours = [r for (n, _, m), r in rows.items() if n == theirs["model"] and m == method]
    ours = [r for r in ours if r["format"] == theirs["format"] and r["file_bytes"] <= theirs["file_bytes"]]
    return max(ours, key=lambda r: r["file_bytes"], default=None)


def run(args: Any, name: str, rows: Rows) -> None:
    """Measure what is left of a model."""
    model, quiet, device = load_checkpoint(args.models / name), Silent(), choose_device(args.device)
    model.name = name
    calib, held = texts(args.texts, "calib"), texts(args.texts, "val")
    sets = load_sets(
        model, calib, held, tokens=args.tokens, evaluation_tokens=args.eval_tokens, correction_tokens=args.held_tokens,
        seed=args.seed, reporter=quiet,
    )  # fmt: skip
    config = FitConfig(1, seed=args.seed)
    job = Job(model, sets, 0, lambda *_: 0, device, quiet, config, store=Store(args.work))
    if args.windows:
        args.windows.write_text(json.dumps([[int(t) for t in w.tokens] for w in sets.statistics]))
    spaces = sum(len(f) - len(compact(n, f)) for n, f in model.files.items() if n != "config.json")
    for base in args.arms:
        kind, told = ARMS[base]
        arm = f"{base}{WRITTEN if args.as_written else ''}"
        if arm.startswith("llmc") and not args.llm_compressor and (name, arm, "stock") not in rows:
            continue
        if (name, arm, "stock") not in rows and args.side != "bytecap":
            if kind == "mlx":
                row = mlx_arm(args, job, args.models / name, **told)
            else:
                row = llm_compressor_arm(job, args.llm_compressor) if arm.startswith("llmc") else gptq_arm(job)
            row["file_bytes"] += spaces if args.as_written else 0
            row["bits_per_parameter"] = 8 * row["file_bytes"] / model.parameters
            rows[name, arm, "stock"] = keep(args, arm, "stock", {"model": name, "format": kind, **row})
        method = OURS + (TUNED if args.recover else "")
        known = at_hand(rows, rows[name, arm, "stock"], method) if args.reuse else None
        if (name, arm, method) not in rows and known is not None:
            rows[name, arm, method] = keep(args, arm, method, {**known, "fit_of": known["recipe"]})
        if (name, arm, method) not in rows and args.side != "stock":
            found = fit_directory(
                model, rows[name, arm, "stock"]["file_bytes"], format=kind, calibration=calib, evaluation=held,
                device=device, seed=args.seed, tokens=args.tokens, evaluation_tokens=args.eval_tokens,
                options={"held_tokens": args.held_tokens}, store=args.work, reporter=quiet, recover=args.recover,
                types=args.types,
            )  # fmt: skip
            row = {k: v for k, v in found.report.items() if k != "margin"}
            if "without_recovery" in row and (name, arm, OURS) not in rows:
                other = {"recovery", "without_recovery", "predicted_delta_nats", "seconds"}  # of the recovered one
                rest = {k: v for k, v in row.items() if k not in other}
                rows[name, arm, OURS] = keep(args, arm, OURS, {**rest, **row["without_recovery"]})
            rows[name, arm, method] = keep(args, arm, method, row)


def keep(args: Any, arm: str, method: str, row: dict[str, Any]) -> dict[str, Any]:
    """Record a row."""
    row = record(args, {"benchmark": "formats", **row, "recipe": arm, "method": method})
    print(f"{row['model']} {arm} {method}: {row['file_bytes']:,} bytes, KL {row['kl_nats']:.5f}", flush=True)
    return row


def scores(model: Model, values: dict[str, np.ndarray], sets: TokenSets, device: str) -> dict[str, Any]:
    """Quality of values of units."""
    quantized_copy = copy_of(model.module)
    load_values(quantized_copy, values)
    return quality([compare_models(model.module, quantized_copy, t, device=device) for t in sets.evaluation])


def mlx_arm(args: Any, job: Job, source: Path, **told: Any) -> dict[str, Any]:
    """A model by mlx-lm's own tools."""
    size, values = mlx_values(job, source, args.seed, **told)
    row = {"file_bytes": size, "bits_per_parameter": 8 * size / job.model.parameters, "told": told}
    return row | scores(job.model, values, job.sets, job.device)


def gptq_arm(job: Job) -> dict[str, Any]:
    """A model by GPTQ in the layout of W4A16, group 128."""
    kind, model = family("compressed-tensors"), job.model
    contents, _ = contents_of(model, kind, None, pure=False)
    found, codes, schemes = moments(job, guided=False), {}, {}
    units = {u.name: u for u in model.units}
    for p in contents.places:
        scheme = next(s for s in ("w4g128", "w4g64", "w4g32") if contents.layout(s, p.cols))
        schemes[p.name], form = scheme, contents.layout(scheme, p.cols)
        assert form is not None  # noqa: S101 (chosen because it fits)
        hessian = join(found.uses[p.unit], found.tokens).hessian.cpu()
        codes[p.name] = gptq(model.tensor(units[p.unit]).detach().double().cpu(), hessian, form)
    with tempfile.TemporaryDirectory() as where:
        path = Path(where) / "stock"
        size, _ = write_directory(contents, schemes, codes, path)
        parts = measure(model, read_units(kind, path, model.units), job.sets, job.device, job.reporter).parts
    return {"file_bytes": size, "bits_per_parameter": 8 * size / model.parameters, "types": schemes} | quality(parts)


def llm_compressor_arm(job: Job, directory: Path) -> dict[str, Any]:
    """A directory that llm-compressor wrote; its targets are patterns, which are spelled out for our reader."""
    model, kind = job.model, family("compressed-tensors")
    config = json.loads((directory / "config.json").read_text())
    size = sum((directory / n).stat().st_size for n in ("model.safetensors", "config.json"))
    size += sum(len(compact(n, f)) for n, f in model.files.items() if n != "config.json")
    names = [u.name.removesuffix(".weight") for u in model.units if u.linear and u.name not in model.embeddings()]
    schemes = {}
    for entry in config["quantization_config"]["config_groups"].values():
        scheme = f"w{entry['weights']['num_bits']}g{entry['weights']['group_size']}"
        patterns = [t.removeprefix("re:") for t in entry["targets"]]
        schemes |= {n: scheme for n in names if any(re.match(x, n) for x in patterns)}
    with tempfile.TemporaryDirectory() as where:
        target = Path(where)
        (target / "model.safetensors").write_bytes((directory / "model.safetensors").read_bytes())
        (target / "config.json").write_text(json.dumps(kind.config({}, schemes, [])))
        parts = measure(model, read_units(kind, target, model.units), job.sets, job.device, job.reporter).parts
    return {"file_bytes": size, "bits_per_parameter": 8 * size / model.parameters, "types": schemes} | quality(parts)


def gptq(weight: torch.Tensor, hessian: torch.Tensor, form: BlockFormat, damping: float = 0.01) -> Codes:
    """Codes (rows, cols) by GPTQ (Frantar et al., 2022), columns first to last, symmetric min-max scales."""
    w, h = weight.clone(), hessian.double().clone()
    rows, cols = w.shape
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1
    w[:, dead] = 0
    h.diagonal().add_(damping * h.diagonal().mean())
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    found = Codes.empty(form, rows, cols)
    scale = torch.ones(rows, dtype=w.dtype)
    for j in range(cols):
        if j % form.block == 0:
            peak = w[:, j : j + form.block].abs().amax(1)
            stored = plain_values((peak / ((form.high - form.low) / 2)).float().numpy()[:, None], form.float_type)
            found.scale[:, j // form.block] = stored[:, 0]
            scale = torch.from_numpy(stored[:, 0]).double().clamp(min=1e-30)
        code = torch.clamp(torch.round(w[:, j] / scale), form.low, form.high)
        found.codes[:, j] = code.numpy().astype(np.int8)
        error = (w[:, j] - code * scale) / factor[j, j]
        w[:, j + 1 :] -= error[:, None] * factor[j, j + 1 :][None]
    found.sub_scales[:] = 1
    return found


if __name__ == "__main__":
    main()
