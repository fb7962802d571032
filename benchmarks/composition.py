"""Does sharing blocks pay at a given file size? Full depth, fewer layers and tied layers, paired on the same tokens.

Arms, all made from one trained model and all measured against it:

a            full depth, at the size
a-trained    full depth after the same extra training as the others, at the size
b            fewer layers, at the rate (bits per parameter) of a: a smaller file
b-reinvested fewer layers, at the size
c            tied layers, at the rate of a: a smaller file
d            tied layers, at the size: the freed bytes go where the slope sends them
e            tied layers with low-rank parts of every layer's own, at the size
f, g         as d and e, but the greedy search says which layers share a block, not the loop

Training sees the same tokens in the same order in all arms of a seed, with the same loss: half KL to the original, half
next tokens. The seed is that of training and of calibration. `--summary FILE` makes the differences of an earlier
`--output` again, and with `--output` writes its lines without their windows. A run that was cut off goes on where the
same `--output` stops.
`--model demo` is the embedded model with its own texts and needs neither `--models` nor `--texts`.
"""

from __future__ import annotations

import argparse
import copy
import json
import lzma
import re
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bytecap.format.decoder import decode_units
from bytecap.job.config import FitConfig
from bytecap.job.effort import Effort
from bytecap.model.checkpoint import Model, demo_directory, load_checkpoint
from bytecap.model.evaluation import compare_models
from bytecap.model.forward import longest_first
from bytecap.model.quantized_copy import load_values
from bytecap.model.sources import load_sets
from bytecap.model.texts import Text, TokenSets, Window
from bytecap.model.tying import FILE, Tying, find_blocks
from bytecap.pipeline.quality import mean_comparison
from bytecap.pipeline.stages import choose_device, fit_sets
from bytecap.progress import Silent
from bytecap.sizes import parse_size
from bytecap_lab.compare import pairs
from bytecap_lab.layer_tying import TyingPlan, decide, shuffled, windows_of, write
from bytecap_lab.layer_tying.start import tied
from bytecap_lab.layer_tying.uptrain import split, uptrain
from common import parser, record, texts

TRAINED = {"a": None, "a-trained": "a", "b": "b", "b-reinvested": "b", "c": "d", **{x: x for x in "defg"}}  # -> student
AT_RATE = ("b", "c")  # arms at the rate of a
RELAXED, SEARCHED = ("e", "g"), ("f", "g")  # arms with low-rank parts, and those whose tying was searched for
ASKED = ("model", "train", "texts", "blocks", "lora_rank", "steps", "search_steps", "rate", "full_rate", "labels")
AGAINST = [(x, y) for x in "defg" for y in ("a", "a-trained", "b-reinvested")]
AGAINST += [("c", "b"), ("e", "d"), ("f", "d"), ("g", "e"), ("g", "f")]


def main() -> None:
    """Train every student, fit every arm as soon as its student is there, print paired differences."""
    p = parser(__doc__ or "", required=False)
    p.add_argument("--train", nargs="*", type=Path, help="texts to train on (.xz too); the calibration texts if none")
    p.add_argument("--sizes", nargs="*", default=["2.0MB", "2.5MB", "3.0MB"])
    p.add_argument("--blocks", type=int, default=4)
    p.add_argument("--lora-rank", type=int, default=8)
    p.add_argument("--steps", default="600", help="moves or time of training")
    p.add_argument("--search-steps", default="10s", help="moves or time of the greedy search")
    p.add_argument("--rate", type=float, default=1e-3, help="first learning rate of students")
    p.add_argument("--full-rate", type=float, default=1e-4, help="first learning rate of the full depth")
    p.add_argument("--labels", type=float, default=0.5)
    p.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    p.add_argument("--arms", nargs="*", default=list(TRAINED), choices=list(TRAINED))
    p.add_argument("--work", type=Path, default=Path("build/composition"), help="directory of students")
    p.add_argument("--jobs", type=int, default=1, help="fits at a time")
    p.add_argument("--trainings", type=int, default=1, help="trainings at a time")
    p.add_argument("--summary", type=Path, help="only the differences of an earlier --output")
    args = p.parse_args()
    if args.summary is not None:
        rows = [json.loads(x) for x in args.summary.read_text().splitlines()]
        if args.output:
            args.output.write_text("".join(json.dumps({k: r[k] for k in r if k != "texts"}) + "\n" for r in rows))
        summarise(args, rows)
        return
    args.device = choose_device(args.device)
    rows = list(run(args))
    summarise(args, rows)


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows as they are finished: several trainings and several fits at a time."""
    done = {(r["size"], r["arm"], r["seed"]): r for r in _rows(args.output) if r["model"] == args.model[0]}
    wanted = [(s, x, n) for s in args.sizes for x in args.arms for n in args.seeds]
    yield from (done[c] for c in wanted if c in done)
    cells = [c for c in wanted if c not in done]
    students = [(n, k) for n, k in dict.fromkeys((c[2], TRAINED[c[1]]) for c in cells) if k]
    context = get_context("spawn")
    with ProcessPoolExecutor(args.trainings, context) as trainers, ProcessPoolExecutor(args.jobs, context) as fitters:
        waiting: dict[Future[Any], Any] = {trainers.submit(train, args, n, k): (n, k) for n, k in students}
        name = args.model[0]
        ready = {(n, None): "demo" if name == "demo" else args.models / name for n in args.seeds}
        facts: dict[Any, Any] = {}
        while waiting or cells:
            for cell in [c for c in cells if (c[2], TRAINED[c[1]]) in ready]:
                cells.remove(cell)
                size, arm, n = cell
                waiting[fitters.submit(one, args, size, arm, n, str(ready[n, TRAINED[arm]]))] = cell
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                what, found = waiting.pop(future), future.result()
                if len(what) == 2:
                    ready[what], facts[what] = args.work / f"{what[1]}-{what[0]}", found
                    print(f"seed {what[0]} {what[1]} trained: {found}", flush=True)
                    continue
                known = {"training": facts.get((what[2], TRAINED[what[1]]))}
                row = record(argparse.Namespace(**{**vars(args), "seed": what[2]}), {**found, **known})
                print(
                    f"{row['size']} {row['arm']:12s} seed {row['seed']}: {row['file_bytes']:,} bytes, KL "
                    f"{row['kl_nats']:.4f}, loss {row['delta_nats']:+.4f}, {row['seconds']:.0f} s", flush=True,
                )  # fmt: skip
                yield row


def _rows(path: Path | None) -> list[dict[str, Any]]:
    """Rows of an earlier run that was cut off."""
    if path is None or not path.exists():
        return []
    return [r for r in map(json.loads, path.read_text().splitlines()) if r["benchmark"] == "composition"]


@lru_cache(maxsize=1)
def original(args_models: str, name: str) -> Model:
    """The trained model that all arms come from."""
    model = load_checkpoint(name if name == "demo" else Path(args_models) / name)
    model.name = name
    return model


def _original(args: argparse.Namespace) -> Model:
    return original(str(args.models), args.model[0])


@lru_cache(maxsize=1)
def _pool(models: str, name: str, paths: tuple[Path, ...]) -> list[Window]:
    return windows_of(original(models, name), paths, 512)


def _texts(args: argparse.Namespace, kind: str) -> list[Path]:
    return [demo_directory() / f"{kind}.txt"] if args.model[0] == "demo" else texts(args.texts, kind)


def _plain(path: Path, work: Path) -> Path:
    """A text whose documents are separated by form feed, unpacked where it is not one."""
    if path.suffix != ".xz":
        return path
    target = work / path.stem
    if not target.exists():
        content = lzma.decompress(path.read_bytes()).replace(b"\0", b"\f")
        fresh = target.with_suffix(f".{time.time_ns()}")
        fresh.write_bytes(content)
        fresh.replace(target)
    return target


def train(args: argparse.Namespace, seed: int, kind: str) -> dict[str, Any]:
    """Write one student's directory, unless a run with the same arguments wrote it."""
    directory = args.work / f"{kind}-{seed}"
    asked = {k: str(getattr(args, k)) for k in ASKED}
    if (notes := directory / "training.json").exists() and (kept := json.loads(notes.read_text()))["asked"] == asked:
        return dict(kept["found"])
    model = _original(args)
    model.module.to(args.device)
    args.work.mkdir(parents=True, exist_ok=True)
    paths = tuple(_plain(x, args.work) for x in args.train or _texts(args, "calib"))
    pool = shuffled(_pool(str(args.models), args.model[0], paths), seed)
    windows, held = split(pool, 1, args.device, "the training text")
    tying, trace = share(args, model, kind, windows, held, seed)
    student, files = make(model, kind, args.blocks, tying)
    found = uptrain(
        model.module, student, windows, held, Effort.parse(args.steps), device=args.device, seed=seed,
        rate=args.full_rate if kind == "a" else args.rate, labels=args.labels,
    )  # fmt: skip
    directory.mkdir(exist_ok=True)
    write(student, files, model, directory)
    done = {**found.__dict__, **trace}
    notes.write_text(json.dumps({"asked": asked, "found": done}))
    return done


def share(
    args: argparse.Namespace, model: Model, kind: str, windows: list[Window], held: list[Window], seed: int
) -> tuple[Tying | None, dict[str, Any]]:
    """Which layers of a student share a block, None where none do; and how long the search for it took."""
    if kind in ("a", "b"):
        return None, {}
    plan = TyingPlan.of(
        model, args.blocks, "average", args.lora_rank if kind in RELAXED else 0, "greedy" if kind in SEARCHED else None
    )
    began, effort = time.perf_counter(), Effort.parse(args.search_steps)
    tying, _ = decide(plan, model, windows, held, effort, args.device, seed, args.rate, Silent())
    return tying, {"sources": list(tying.sources), "search_seconds": round(time.perf_counter() - began, 1)}


def make(model: Model, kind: str, blocks: int, tying: Tying | None) -> tuple[nn.Module, dict[str, bytes]]:
    """An untrained student and its side files."""
    if tying is not None:
        return tied(model.module, tying), {**model.files, FILE: tying.dump()}
    return (copy.deepcopy(model.module), model.files) if kind == "a" else fewer(model, blocks)


def fewer(model: Model, blocks: int) -> tuple[nn.Module, dict[str, bytes]]:
    """The model with evenly spaced layers left, the first and the last among them."""
    path, layers = find_blocks(model.module)
    kept = [round(i * (len(layers) - 1) / max(1, blocks - 1)) for i in range(blocks)]
    module, config = copy.deepcopy(model.module), model.config()
    owner, _, leaf = path.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.ModuleList(find_blocks(module)[1][i] for i in kept))
    module.config.num_hidden_layers = config["num_hidden_layers"] = blocks
    return module, {**model.files, "config.json": json.dumps(config).encode()}


@lru_cache(maxsize=3)
def _sets(arguments: str, seed: int) -> TokenSets:
    args = argparse.Namespace(**json.loads(arguments))
    args.texts = Path(args.texts) if args.texts else None
    return load_sets(
        original(args.models, args.model[0]), _texts(args, "calib"), _texts(args, "val"), tokens=args.tokens,
        evaluation_tokens=args.eval_tokens, seed=seed, reporter=Silent(),
    )  # fmt: skip


def one(args: argparse.Namespace, size: str, arm: str, seed: int, directory: str) -> dict[str, Any]:
    """One fit, its decoded file measured against the original."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    first, model = _original(args), load_checkpoint(directory)
    key = {k: getattr(args, k) for k in ("model", "tokens", "eval_tokens")}
    key |= {"models": str(args.models), "texts": str(args.texts) if args.texts else None}
    sets = _sets(json.dumps(key), seed)
    budget = parse_size(size)
    if arm in AT_RATE:
        budget = budget * model.parameters // first.parameters
    brief = tuple(Text(t.name, t.windows[:1]) for t in sets.evaluation)  # the report's own figures are not used
    config = FitConfig(budget, device=args.device, seed=seed, reporter=Silent())
    result = fit_sets(model, replace(sets, evaluation=brief), config)
    load_values(model.module, decode_units(result.contents, aliases=False))
    first.module.to(args.device)
    found = [compare_models(first.module, model.module, t, device=args.device) for t in sets.evaluation]
    mean = mean_comparison(found)
    return {
        "benchmark": "composition", "model": first.name, "arm": arm, "size": size, "budget_bytes": budget,
        "file_bytes": len(result.data), "parameters": model.parameters,
        "bits_per_parameter": 8 * len(result.data) / model.parameters, "bits_by_uses": bits(result, model),
        "kl_nats": mean.kl_nats, "kl_stderr": mean.kl_stderr, "delta_nats": mean.delta_nats,
        "delta_stderr": mean.delta_stderr, "nats_original": mean.nats_original, "bpb": mean.bpb_artifact,
        "seconds": round(time.perf_counter() - began, 1),
        "texts": [{
            "name": t.name, "kl": c.windows.kl.tolist(), "nats": c.windows.nats.tolist(),
            "original": c.windows.original.tolist(), "tokens": c.windows.tokens.tolist(),
            "documents": [w.document for w in longest_first(t.windows)],
        } for t, c in zip(sets.evaluation, found, strict=True)],
    }  # fmt: skip


def bits(result: Any, model: Model) -> dict[str, float]:
    """Bits per weight of matrices, by what they are."""
    sizes = {u.unit.name: len(u.data) for u in result.contents.units}
    total: dict[str, list[int]] = {}
    for u in model.units:
        if len(u.shape) < 2:
            continue
        low = re.search(r"\.(up|down)\.weight$", u.name)
        kind = (
            "low-rank" if low else "embedding" if u.name in model.embeddings() else f"used {1 + len(u.aliases)} times"
        )
        part = total.setdefault(kind, [0, 0])
        part[0] += 8 * sizes[u.name]
        part[1] += u.parameters
    return {k: round(b / n, 3) for k, (b, n) in total.items()}


def summarise(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Means and paired differences, printed and recorded; rows again without their windows."""
    rows = [r for r in rows if r["benchmark"] == "composition"]
    for name, size in dict.fromkeys((r["model"], r["size"]) for r in rows):
        mine = [{**r, "method": r["arm"]} for r in rows if (r["model"], r["size"]) == (name, size)]
        about, arms = {"model": name, "size": size}, dict.fromkeys(r["arm"] for r in mine)
        entries = {arm: pairs.entry([r for r in mine if r["arm"] == arm], mine[0]) for arm in arms}
        for arm, found in entries.items():
            figures = {m: pairs.figure(found, m, found.texts).as_dict() for m in pairs.METRICS}
            say(args, {**about, "arm": arm, "seeds": len(found.seeds), "file_bytes": found.bytes, **figures})
        for one_, other in AGAINST:
            if one_ in entries and other in entries:
                a, b = entries[one_], entries[other]
                figures = {m: pairs.difference(a, b, m, a.texts).as_dict() for m in pairs.METRICS}
                say(args, {**about, "arm": one_, "against": other, **figures})


def say(args: argparse.Namespace, row: dict[str, Any]) -> None:
    """Print and record one line of the summary."""
    what = f"{row['arm']} - {row['against']}" if "against" in row else row["arm"]
    figures = ", ".join(f"{m} {row[m]['mean']:+.4f} ± {row[m]['stderr']:.4f}" for m in pairs.METRICS)
    print(f"{row['model']} {row['size']} {what:20s} {figures}", flush=True)
    record(args, {"benchmark": "composition-summary", **row})


if __name__ == "__main__":
    main()
