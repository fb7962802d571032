"""Seconds and GPU memory of `fit`, step by step: a model directory, or a random Llama shape of 24M or 1.1B parameters.

The first fit of a process compiles kernels and starts the device; `--fits 2` shows one without that. `--format gguf`
fits a random shape from its directory to the measured file.
`same_bytes` says whether all fits of the process gave the same file.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import bytecap
from bytecap.model.checkpoint import resolve
from bytecap.model.fileset import check_safetensors, weight_files
from common import parser, record, texts

SHAPES = {
    "llama-24m": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8,
                  "num_key_value_heads": 4, "vocab_size": 4096, "tie_word_embeddings": True},
    "llama-1.1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
                   "num_key_value_heads": 4, "vocab_size": 32000, "tie_word_embeddings": False},
}  # fmt: skip
LENGTH, ROWS = 512, 4


class Steps:
    """A reporter that notes what every step took."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}

    @contextlib.contextmanager
    def step(self, label: str, total: float) -> Iterator[Callable[[int], None]]:
        """Time one step."""
        del total
        began = time.perf_counter()
        yield lambda _: None
        finish()
        self.found[label] = round(time.perf_counter() - began, 2)
        print(f"  {label} {self.found[label]} s", flush=True)

    def note(self, *_: Any) -> None:
        """Nothing is said."""


def finish() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def stored(directory: Path) -> int:
    """Parameters in a directory's files: building the model here would spare the first fit its imports."""
    entries = [e for path in weight_files(directory) for e in check_safetensors(path).values()]
    return sum(math.prod(e["shape"]) for e in entries)


def random_llama(name: str, tokens: int, device: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A random model and arguments of `fit` with random text."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        module = LlamaForCausalLM(LlamaConfig(max_position_embeddings=LENGTH, **SHAPES[name])).eval()
    count = (tokens + 12_288) // LENGTH // ROWS
    ids = torch.randint(0, SHAPES[name]["vocab_size"], (count, ROWS, LENGTH + 1))
    return module, {"calibration": list(ids[:-2]), "evaluation": list(ids[-2:]), "tokens": tokens}


def saved_llama(name: str, where: Path, device: str) -> Path:
    """A random model as a directory with the tokenizer of the embedded one, for formats that hold a tokenizer."""
    module, _ = random_llama(name, 0, device)
    module.to(torch.bfloat16).save_pretrained(where)  # type: ignore[operator]
    for path in resolve("demo").glob("token*"):
        shutil.copy(path, where / path.name)
    return where


def gguf(args: Any, name: str, device: str) -> None:
    """Fit a random shape to a GGUF file, from its directory to the measured file."""
    with tempfile.TemporaryDirectory() as temporary:
        directory = saved_llama(name, Path(temporary) / "model", device)
        parameters = stored(directory)
        steps, began = Steps(), time.perf_counter()
        found = bytecap.fit(
            str(directory), budget=int(args.bits * parameters / 8), device=device, seed=args.seed, reporter=steps,
            tokens=args.tokens, evaluation_tokens=args.eval_tokens, calibration=texts(args.texts, "calib"),
            evaluation=texts(args.texts, "val"), format="gguf", output=Path(temporary) / "model.gguf",
            types=args.types,
        )  # fmt: skip
        finish()
        row = {
            "benchmark": "device", "model": name, "format": "gguf", "parameters": parameters, "tokens": args.tokens,
            "seconds": round(time.perf_counter() - began, 1), "steps": steps.found,
            "file_bytes": found.report["file_bytes"], "slack_bytes": found.report["slack_bytes"],
            "plan": found.report["plan"], "kl_nats": found.report["kl_nats"],
            "gpu_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if device == "cuda" else None,
            "threads": torch.get_num_threads(), "weights": "random",
        }  # fmt: skip
        print({k: row[k] for k in ("model", "seconds", "gpu_gb")}, flush=True)
        record(args, row)


def main() -> None:
    """Some fits of every model."""
    p = parser(__doc__ or "", required=False)
    p.add_argument("--bits", type=float, default=3.5)
    p.add_argument("--fits", type=int, default=1)
    p.add_argument("--format", default="bcap", help="gguf: random shapes only")
    p.add_argument("--types", nargs="*", help="types of gguf")
    args = p.parse_args()
    device = "cuda" if args.device == "auto" and torch.cuda.is_available() else args.device.replace("auto", "cpu")
    for name in args.model:
        if args.format == "gguf":
            gguf(args, name, device)
            continue
        if name in SHAPES:
            model, options = random_llama(name, args.tokens, device)
            parameters = sum(q.numel() for q in model.parameters())
        else:
            model = name if name == "demo" else str(args.models / name)
            options = {"tokens": args.tokens, "evaluation_tokens": args.eval_tokens}
            if args.texts:
                options |= {"calibration": texts(args.texts, "calib"), "evaluation": texts(args.texts, "val")}
            parameters = stored(resolve(model))
        seen: list[str] = []
        for number in range(args.fits):
            steps, began = Steps(), time.perf_counter()
            budget = int(args.bits * parameters / 8)
            result = bytecap.fit(model, budget=budget, device=device, seed=args.seed, reporter=steps, **options)
            finish()
            seen.append(hashlib.sha256(result.data).hexdigest())
            report = result.report
            row = {
                "benchmark": "device", "model": name, "fit": number + 1, "parameters": report["parameters"],
                "tokens": args.tokens, "seconds": round(time.perf_counter() - began, 1), "steps": steps.found,
                "file_bytes": len(result.data), "slack_bytes": report["slack_bytes"],
                "gpu_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if device == "cuda" else None,
                "threads": torch.get_num_threads(), "weights": "random" if name in SHAPES else "trained",
                "same_bytes": len(set(seen)) == 1,
            }  # fmt: skip
            print({k: row[k] for k in ("model", "fit", "seconds", "gpu_gb", "same_bytes")}, flush=True)
            record(args, row)


if __name__ == "__main__":
    main()
