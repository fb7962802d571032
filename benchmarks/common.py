"""Share among all benchmarks models and texts from `--models` and `--texts`, results as JSON lines.

A models directory holds Hugging Face directories; a texts directory holds `NAME.calib.txt` and `NAME.val.txt`.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

WORKLOADS = ("literature", "technical", "general")


def parser(description: str, *, models: str = "small-s0", required: bool = True) -> argparse.ArgumentParser:
    """Options every benchmark has; `required`: it cannot do without directories."""
    p = argparse.ArgumentParser(description=description)
    p.add_argument("--models", type=Path, required=required, help="directory that holds the model directories")
    p.add_argument("--texts", type=Path, required=required, help="directory that holds NAME.calib.txt and NAME.val.txt")
    p.add_argument("--model", nargs="*", default=models.split(","), help="model directories to use")
    p.add_argument("--device", default="auto")
    p.add_argument("--tokens", type=int, default=131_072)
    p.add_argument("--eval-tokens", type=int, default=98_304)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--output", type=Path, help="JSON lines are appended here")
    return p


def texts(directory: Path, kind: str) -> list[Path]:
    """The workloads' calibration or evaluation texts."""
    return [directory / f"{name}.{kind}.txt" for name in WORKLOADS]


def host() -> str:
    """The kind of machine, for the record."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def record(args: argparse.Namespace, row: dict[str, Any]) -> dict[str, Any]:
    """Append one result with everything needed to repeat it."""
    names = {str(args.models): "MODELS", str(args.texts): "TEXTS", str(args.output): "OUTPUT"}
    names |= {
        str(getattr(args, k, None)): k.upper()
        for k in ("artifact", "keep", "summary", "windows", "work", "llm_compressor", "other", "store")
    }
    train = getattr(args, "train", None) or ()
    names |= {str(path): "TRAIN" for path in (train if isinstance(train, list | tuple) else [train])}
    words = [names.get(word, word) for word in sys.argv[1:]]
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])
    row = {**row, "seed": args.seed, "host": host(), "date": time.strftime("%Y-%m-%d"), "command": command}
    if args.output:
        with args.output.open("a") as f:
            f.write(json.dumps(row) + "\n")
    return row
