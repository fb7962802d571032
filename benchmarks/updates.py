"""Updates of a fine-tuned model: bytes for a KL, against a whole file, binary patches, and a low-rank adapter.

A model is fine-tuned for some steps (minutes on a processor) on the calibration text of one workload (AdamW, all
weights), and the receiver has the original as a `.bcap` file. All figures are KL to the fine-tuned model on the
workload's evaluation text, which nothing was trained on. Rows:

* `base`: what the receiver has, and nothing sent;
* `full`: the fine-tuned model as a whole file at the base's bits;
* `update`: `fit --base` at shares of the whole file's bytes. Its target is the fine-tuned model itself, or, in the rows
  `changes`, the base plus what fine-tuning has changed, which leaves the base's own error alone;
* `adapter`: the truncated singular value decomposition of what has changed, in 16-bit floats, added to the base;
* `update minus full`: the difference of both KLs, with the error of the difference, since the windows are the same;
* `bsdiff4`, `detools`, `zstd`: binary patches from the base's file to the whole file (the first two are no
  dependencies: put them on PYTHONPATH).

Stages are kept in `--work`, and made once.

    python benchmarks/updates.py --models MODELS --texts TEXTS --work WORK --output results/updates.jsonl
"""

from __future__ import annotations

import importlib
import io
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bytecap.format import updates
from bytecap.format.decoder import from_matrix
from bytecap.job.base import Installed
from bytecap.job.config import FitConfig
from bytecap.model.checkpoint import Model, load_checkpoint
from bytecap.model.evaluation import by_window, kl_to
from bytecap.model.quantized_copy import copy_of, load_values
from bytecap.model.sources import encoder, load_sets
from bytecap.model.texts import TokenSets, load_text
from bytecap.model.uncertainty import ratio_stderr
from bytecap.pipeline.stages import fit_sets
from bytecap.progress import Bars
from bytecap.types import as_matrix
from common import parser, record, texts

WINDOW, BATCH = 256, 8  # of fine-tuning
Values = dict[str, Any]


def fine_tuned(source: Path, text: Path, target: Path, *, steps: int, rate: float, seed: int) -> None:
    """Fine-tune every weight of a model directory on a text, with a rate that falls to 0; stored as bfloat16."""
    from transformers import AutoModelForCausalLM

    module: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    kept = load_checkpoint(source)
    read = load_text(text, encoder(kept.files), window=WINDOW)
    windows = [w.tokens for w in read.windows if len(w.tokens) == WINDOW + 1]
    optimizer = torch.optim.AdamW(module.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    order = random.Random(seed)  # noqa: S311 (sampling)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20) * (1 - step / steps)
        ids = torch.tensor(order.sample(windows, BATCH))
        logits = module(ids[:, :-1]).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
    module.to(torch.bfloat16).save_pretrained(target)
    for file in source.iterdir():
        if file.name != "model.safetensors":
            shutil.copy(file, target)


def fitted(model: Model, sets: TokenSets, config: FitConfig, file: Path) -> dict[str, Any]:
    """Fit once; the report is kept beside the file."""
    report = file.with_suffix(".json")
    if not report.exists():
        found = fit_sets(model, sets, replace(config, output=file)).report
        keys = ("file_bytes", "kl_nats", "kl_stderr", "bpb_artifact", "bpb_original", "plan", "seconds", "base")
        row = {k: found.get(k) for k in keys}
        if row["base"]:
            row["base"] = {**row["base"], "file": Path(row["base"]["file"]).name}
        report.write_text(json.dumps(row))
    kept: dict[str, Any] = json.loads(report.read_text())
    return kept


def installed(*paths: Path) -> Installed:
    """Return a file on those that it stands on."""
    return Installed(*updates.last(paths))


def kl_of(model: Model, sets: TokenSets, values: Values) -> dict[str, float]:
    """KL of a model with these values, on the evaluation text."""
    copy = copy_of(model.module)
    load_values(copy, values)
    kl, stderr = kl_to(model.module, copy, sets.evaluation[0].windows, device="cpu")
    return {"kl_nats": kl, "kl_stderr": stderr}


def difference(model: Model, sets: TokenSets, values: Values, other: Values) -> dict[str, float]:
    """KL with some values minus KL with others, and its error over the windows of the evaluation text."""
    variants, windows = {"here": values, "there": other}, sets.evaluation[0].windows
    found = by_window(model.module, copy_of(model.module), variants, windows, device="cpu")
    moved, tokens = found["here"].kl - found["there"].kl, found["here"].tokens
    return {"kl_difference": float(moved.sum() / tokens.sum()), "kl_stderr": ratio_stderr(moved, tokens)}


def changes(tuned: Model, original: Model) -> Values:
    """By how much fine-tuning has moved every unit, in stored layout."""
    return {u.name: (tuned.tensor(u) - original.tensor(u)).detach().float().numpy() for u in tuned.units}


def with_values(model: Model, values: Values) -> Model:
    """Return the model with other values."""
    module = copy_of(model.module)
    load_values(module, values)
    return replace(model, module=module)


def adapter(base: Installed, moved: Values, model: Model, rank: int) -> tuple[int, Values]:
    """Bytes of an adapter of a rank in 16-bit floats, vectors whole, and the base's values with it."""
    size, values = 0, {}
    for u in model.units:
        change = as_matrix(u, moved[u.name])
        if min(change.shape) > rank:
            left, s, right = np.linalg.svd(change, full_matrices=False)
            root = np.sqrt(s[:rank])
            a, b = (left[:, :rank] * root).astype(np.float16), (root[:, None] * right[:rank]).astype(np.float16)
            size += 2 * (a.size + b.size)
            change = a.astype(np.float32) @ b.astype(np.float32)
        else:
            size += 2 * change.size
            change = change.astype(np.float16).astype(np.float32)
        values[u.name] = base.values[u.name] + from_matrix(u, change)
    return size, values


def patches(old: bytes, new: bytes) -> dict[str, int]:
    """Bytes of binary patches, by the program that made them; those that are installed."""
    found: dict[str, int] = {}
    if (bsdiff := _module("bsdiff4")) is not None:
        found["bsdiff4"] = len(bsdiff.diff(old, new))
    if (detools := _module("detools")) is not None:
        out = io.BytesIO()
        detools.create_patch(io.BytesIO(old), io.BytesIO(new), out, compression="lzma")
        found["detools"] = len(out.getvalue())
    if (zstd := _module("zstandard")) is not None:
        known = zstd.ZstdCompressionDict(old, dict_type=zstd.DICT_TYPE_RAWCONTENT)
        options = zstd.ZstdCompressionParameters.from_level(22, window_log=27)
        found["zstd"] = len(zstd.ZstdCompressor(dict_data=known, compression_params=options).compress(new))
    return found


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def sets_of(args: Any, model: Model, calibration: list[Path]) -> TokenSets:
    """Tokens of a model."""
    return load_sets(
        model, calibration, [args.texts / f"{args.workload}.val.txt"], tokens=args.tokens,
        evaluation_tokens=args.eval_tokens, window=512, seed=args.seed, device="cpu", reporter=Bars(),
    )  # fmt: skip


def one(args: Any, name: str) -> None:
    """All rows of a model."""
    work, source = args.work / name, args.models / name
    work.mkdir(parents=True, exist_ok=True)
    tuned_directory, text = work / "tuned", args.texts / f"{args.workload}.calib.txt"
    if not tuned_directory.exists():
        fine_tuned(source, text, tuned_directory, steps=args.steps, rate=args.rate, seed=args.seed)
    original, tuned = load_checkpoint(source), load_checkpoint(tuned_directory)
    common = FitConfig(
        f"{args.bits}bpp", seed=args.seed, device="cpu", progress=False, store=work / "store", effort=args.effort
    )
    fitted(original, sets_of(args, original, texts(args.texts, "calib")), common, work / "base.bcap")
    base, sets = installed(work / "base.bcap"), sets_of(args, tuned, [text])
    about = {"model": name, "workload": args.workload, "bits": args.bits, "tokens": args.tokens,
             "eval_tokens": args.eval_tokens, "fine_tuning_steps": args.steps, "rate": args.rate,
             **({} if args.effort is None else {"effort": args.effort})}  # fmt: skip

    def line(kind: str, **row: Any) -> None:
        print(record(args, {**about, "row": kind, **row}))

    moved = changes(tuned, original)
    exact = {u.name: original.tensor(u).detach().float().numpy() for u in original.units}
    line("original", bytes=0, **kl_of(tuned, sets, exact))
    line("base", bytes=0, base_bytes=(work / "base.bcap").stat().st_size, **kl_of(tuned, sets, base.values))
    aimed = {n: base.values[n] + moved[n] for n in moved}
    line("base and changes", bytes=None, **kl_of(tuned, sets, aimed))
    for rank in args.ranks:
        size, values = adapter(base, moved, tuned, rank)
        line("adapter", rank=rank, bytes=size, **kl_of(tuned, sets, values))
    full = fitted(tuned, sets, common, work / "full.bcap")
    line("full", bytes=full["file_bytes"], **full)
    old, new = ((work / f"{n}.bcap").read_bytes() for n in ("base", "full"))
    for program, size in patches(old, new).items():
        line(program, bytes=size, kl_nats=full["kl_nats"], kl_stderr=full["kl_stderr"])
    for share in args.shares:
        config = replace(common, budget=round(share * len(new)), base=base)
        for recover in args.recover:
            found = fitted(tuned, sets, replace(config, recover=recover), work / f"update-{share}-{recover}.bcap")
            line("update", share=share, recover=recover, bytes=found["file_bytes"], **found)
            sent = installed(work / "base.bcap", work / f"update-{share}-{recover}.bcap").values
            line("update minus full", share=share, recover=recover,
                 **difference(tuned, sets, sent, installed(work / "full.bcap").values))  # fmt: skip
    if args.changes:
        other, share = with_values(tuned, aimed), args.changes
        found = fitted(other, sets, replace(common, budget=round(share * len(new)), base=base, store=None),
                       work / f"changes-{share}.bcap")  # fmt: skip
        values = installed(work / "base.bcap", work / f"changes-{share}.bcap").values
        line("changes", share=share, bytes=found["file_bytes"], **kl_of(tuned, sets, values))


def main() -> None:
    """Every model."""
    p = parser((__doc__ or "").splitlines()[0])
    p.add_argument("--work", type=Path, required=True, help="directory for the stages")
    p.add_argument("--workload", default="technical")
    p.add_argument("--bits", type=float, default=3.0)
    p.add_argument("--effort", type=int, help="of every fit, by default as of `bytecap fit`")
    p.add_argument("--steps", type=int, default=80, help="of fine-tuning, each of 2,048 tokens")
    p.add_argument("--rate", type=float, default=2e-4, help="of fine-tuning")
    p.add_argument("--ranks", nargs="*", type=int, default=[8])
    p.add_argument("--shares", nargs="*", type=float, default=[0.05, 0.1, 0.2])
    p.add_argument("--recover", nargs="*", type=lambda x: None if x == "none" else x, default=[None])
    p.add_argument("--changes", type=float, default=0.1, help="share of the whole file's bytes; 0 leaves the row out")
    args = p.parse_args()
    torch.manual_seed(args.seed)
    for name in args.model:
        one(args, name)


if __name__ == "__main__":
    main()
