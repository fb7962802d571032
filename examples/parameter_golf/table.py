"""Tell what is lost between training and the file that is handed in: the challenge's export, golf and bytecap.

    python table.py --data DIR --states DIR -o table.jsonl                 # all cells that are not in the file yet
    python table.py --data DIR --states DIR -o table.jsonl --cell looped:8000000
    python table.py --data DIR --states DIR -o table.jsonl --seeds 1 2 3 4 5 --seconds 60
    python table.py --print table.jsonl

A cell is one trained model (`--states` holds FACTORY-SEED.pt of train.py) at one budget in bytes, or `3.5bits` a
parameter. All three exports are scored on the same held-out tokens, so differences are paired. Cells run in parallel,
each in a process of its own, spread over the GPUs there are.

`--seeds` trains `--factory` anew with every seed for `--seconds`, fits each at `--budget` and notes what is left.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch

import bytecap
import data
import model as models
from bytecap.model.evaluation import ratio_stderr
from evaluate import held_out
from roundtrip import Losses, documents, int8_export, int8_import, losses, sums
from tables import show
from train import FULL, MINI

BUDGETS = ("16000000", "8000000", "6000000", "3.5bits")
METHODS = ("golf", "bytecap")
_HERE = Path(__file__).resolve().parent


def budget_of(text: str, parameters: int) -> int:
    """Bytes of `6000000` or of `3.5bits` a parameter."""
    return int(float(text[:-4]) * parameters / 8) if text.endswith("bits") else int(text)


def calibration(directory: Path, length: int, seed: int, count: int) -> list[torch.Tensor]:
    """`count` training windows of `length` predictions, one batch each, spread evenly."""
    tokens = data.read_shards(directory, "train")
    starts = np.linspace(0, len(tokens) - length - 1, count, dtype=np.int64)
    order = np.random.default_rng(seed).permutation(len(starts))
    return [torch.from_numpy(tokens[None, at : at + length + 1].astype(np.int64)) for at in starts[order]]


def fit(args: argparse.Namespace, module: torch.nn.Module, length: int, budget: int, method: str) -> dict[str, Any]:
    """The exported values, and facts about the file and the fit."""
    windows = calibration(args.data, length, args.fit_seed, max(8, (args.tokens + 8192) // length + 9))
    start = time.perf_counter()
    artifact = bytecap.fit(
        module, budget=budget, calibration=windows[:-8], evaluation=windows[-8:], method=method, tokens=args.tokens,
        device=args.device, seed=args.fit_seed,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    report = artifact.report
    facts = {"bytes": len(artifact.data), "slack": report["slack_bytes"], "plan": report["plan"]}
    return {"values": artifact.tensors(), "facts": {**facts, "fits": True, "fit_seconds": round(seconds, 1)}}


def score(found: Losses, original: Losses, size: np.ndarray[Any, Any], group: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Bits per byte, and the gap to the original with its standard error over groups of tokens."""
    gap = sums(found.nats - original.nats, group) / math.log(2)
    each = sums(size, group)
    return {
        "bits_per_byte": float(found.nats.sum() / math.log(2) / size.sum()), "gap": float(gap.sum() / each.sum()),
        "gap_stderr": ratio_stderr(gap, each), "kl_nats": float(found.kl.mean()),
    }  # fmt: skip


def ratios(found: dict[str, Losses], group: np.ndarray[Any, Any]) -> dict[str, float]:
    """Gap and KL of bytecap over golf's, with standard errors over groups of tokens."""
    ours, theirs, original = (found[n] for n in ("bytecap", "golf", "original"))
    pairs = {"gap": (ours.nats - original.nats, theirs.nats - original.nats), "kl": (ours.kl, theirs.kl)}
    result = {}
    for name, (a, b) in pairs.items():
        result[f"{name}_ratio"] = float(a.sum() / b.sum())
        result[f"{name}_ratio_stderr"] = abs(ratio_stderr(sums(a, group), sums(b, group)))
    return result


def run_cell(args: argparse.Namespace, cell: str) -> dict[str, Any]:
    """Measure one cell."""
    factory, wanted = cell.split(":")
    state = torch.load(args.states / f"{factory}-{args.seed}.pt", weights_only=True)
    module = getattr(models, factory)().eval()
    module.load_state_dict(state)
    parameters = sum(p.numel() for p in module.parameters())
    budget = budget_of(wanted, parameters)
    length = (MINI if factory.startswith("mini") else FULL).length
    tokens, table = held_out(args.data)
    tokens = tokens[: args.eval_tokens + 1]
    blob = int8_export(state)
    facts: dict[str, dict[str, Any]] = {"int8+zlib": {"bytes": len(blob), "fits": len(blob) <= budget}}
    versions: dict[str, dict[str, Any]] = {"original": state, "int8+zlib": int8_import(blob)}
    for method in METHODS:
        made = fit(args, module, length, budget, method)
        versions[method], facts[method] = made["values"], made["facts"]
    found = losses(module.to(args.device), versions, tokens, length)
    size = table[0][tokens[1:]] + (table[1][tokens[1:]] & ~table[2][tokens[:-1]] & 1)
    group = np.arange(len(tokens) - 1) // length
    row: dict[str, Any] = {
        "benchmark": "golf", "model": factory, "seed": args.seed, "cell": wanted, "budget": budget,
        "parameters": parameters, "bits_per_parameter": 8 * budget / parameters,
        "tokens": len(tokens) - 1, "text_bytes": int(size.sum()), "calibration_tokens": args.tokens,
        "bits_per_byte": float(found["original"].nats.sum() / math.log(2) / size.sum()),
    }  # fmt: skip
    row["exports"] = {n: facts[n] | score(found[n], found["original"], size, group) for n in facts}
    row |= ratios(found, group)
    by_document = ratios(found, documents(tokens, table[2]))
    return row | {f"{n}_by_document": by_document[n] for n in ("gap_ratio_stderr", "kl_ratio_stderr")}


def run_seed(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train with a seed, fit at the budget, and say what is left."""
    args.states.mkdir(parents=True, exist_ok=True)
    path = args.states / f"{args.factory}-{args.seconds:g}s-{seed}.pt"
    words = ["--factory", args.factory, "--data", args.data, "--seconds", args.seconds, "--seed", seed, "-o", path]
    words += ["--device", args.device, "--save", "bfloat16"]
    subprocess.run([sys.executable, _HERE / "train.py", *map(str, words)], check=True, stdout=sys.stderr)
    trained = json.loads(path.with_suffix(".json").read_text())
    module = getattr(models, args.factory)()
    module.load_state_dict(torch.load(path, weights_only=True))
    module.eval()
    parameters = sum(p.numel() for p in module.parameters())
    budget = budget_of(args.budget, parameters)
    length = (MINI if args.factory.startswith("mini") else FULL).length
    facts = fit(args, module, length, budget, "bytecap")["facts"]
    return {
        "benchmark": "golf-seeds", "model": args.factory, "seed": seed, "cell": args.budget, "budget": budget,
        "parameters": parameters, "train_seconds": trained["seconds"], "steps": trained["steps"],
        "bits_per_byte": trained["bits_per_byte"], **facts,
    }  # fmt: skip


def host(device: str) -> str:
    """The kind of machine, for the record."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(0)
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def command(args: argparse.Namespace) -> str:
    """The command line without this machine's paths."""
    names = {str(args.data): "DATA", str(args.states): "STATES", str(args.output): "OUTPUT"}
    return " ".join(["python", "examples/parameter_golf/table.py", *(names.get(w, w) for w in sys.argv[1:])])


def write(args: argparse.Namespace, row: dict[str, Any]) -> None:
    """Append one line to the results."""
    row = {**row, "host": host(args.device), "date": time.strftime("%Y-%m-%d"), "command": command(args)}
    line = json.dumps(row) + "\n"
    if args.output:
        with args.output.open("a") as f:
            f.write(line)
    print(line, end="", flush=True)


def done(path: Path | None) -> set[tuple[str, str, int, str]]:
    """(benchmark, model, seed, cell) of every line there is."""
    if path is None or not path.exists():
        return set()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {(r["benchmark"], r["model"], r["seed"], r["cell"]) for r in rows}


def spread(args: argparse.Namespace, jobs: list[list[str]]) -> int:
    """Run this script once for every job, so many at once, over all GPUs; returns the number that failed."""
    gpus = torch.cuda.device_count() if args.device.startswith("cuda") else 0
    at_once = args.parallel or max(1, 2 * gpus)
    slots: SimpleQueue[int] = SimpleQueue()
    for n in range(at_once):
        slots.put(n)
    threads = max(1, (os.cpu_count() or 1) // max(1, min(at_once, len(jobs))))

    def one(words: list[str]) -> int:
        slot = slots.get()
        env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        if gpus:
            env["CUDA_VISIBLE_DEVICES"] = str(slot % gpus)
        try:
            return subprocess.run([sys.executable, __file__, *sys.argv[1:], *words], env=env, check=False).returncode
        finally:
            slots.put(slot)

    with ThreadPoolExecutor(at_once) as pool:
        return sum(code != 0 for code in pool.map(one, jobs))


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description="Bits per byte before and after export, at several budgets.")
    parser.add_argument("--data", type=Path, help="folder that data.py wrote")
    parser.add_argument("--states", type=Path, help="folder with FACTORY-SEED.pt of train.py; --seeds writes there")
    parser.add_argument("-o", "--output", type=Path, help="JSON lines; what is there already is not measured again")
    parser.add_argument("--models", nargs="+", default=["baseline", "looped"])
    parser.add_argument("--budgets", nargs="+", default=list(BUDGETS), help="bytes, or such as 3.5bits")
    parser.add_argument("--cell", help="MODEL:BUDGET, this one only, here and now")
    parser.add_argument("--seed", type=int, default=0, help="of the checkpoints")
    parser.add_argument("--fit-seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=131_072, help="calibration tokens")
    parser.add_argument("--eval-tokens", type=int, default=1 << 40)
    parser.add_argument("--parallel", type=int, help="processes at once; by default two a GPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seeds", type=int, nargs="+", help="train and fit these instead")
    parser.add_argument("--one-seed", type=int, help="train and fit this one, here and now")
    parser.add_argument("--seconds", type=float, default=60, help="of training, with --seeds")
    parser.add_argument("--factory", default="baseline", help="with --seeds")
    parser.add_argument("--budget", default="16000000", help="with --seeds")
    parser.add_argument("--print", type=Path, metavar="FILE", help="the tables of a results file, as Markdown")
    args = parser.parse_args()
    if args.print is None and (args.data is None or args.states is None):
        parser.error("--data and --states are needed")
    return args


def main() -> int:
    """Run what is asked for; the exit code is 1 if a cell failed."""
    args = arguments()
    if args.print:
        print(show([json.loads(line) for line in args.print.read_text().splitlines()]))
        return 0
    if args.cell:
        write(args, run_cell(args, args.cell))
        return 0
    if args.one_seed is not None:
        write(args, run_seed(args, args.one_seed))
        return 0
    there = done(args.output)
    if args.seeds:
        left = [s for s in args.seeds if ("golf-seeds", args.factory, s, args.budget) not in there]
        return int(spread(args, [["--one-seed", str(s)] for s in left]) > 0)
    cells = [(m, b) for b in args.budgets for m in args.models if ("golf", m, args.seed, b) not in there]
    return int(spread(args, [["--cell", f"{m}:{b}"] for m, b in cells]) > 0)


if __name__ == "__main__":
    sys.exit(main())
