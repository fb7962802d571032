"""Seconds and peak memory of whole fits of random Llama shapes, each from a checkpoint on disk in a fresh process.

The checkpoint is written block by block, so that no model is ever in memory here. Every fit is `bytecap.fit` on that
directory with the embedded general text; `--memory` is passed on. `--gpus 1,2,4` fits once with each number of ranks,
which torchrun starts, says how much faster that was than the first, and whether the bytes are the same.

    python benchmarks/scale.py llama-1.1b llama-8b --device cuda --tokens 32768 --bits 3 --work /big/disk
    python benchmarks/scale.py llama-8b --device cuda --gpus 1,2,4 --work /big/disk --out results/scale.jsonl
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from common import host
from device import Steps

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden": 64, "inner": 160, "blocks": 4, "heads": 4, "groups": 2, "vocabulary": 8192},
    "h256-12": {"hidden": 256, "inner": 704, "blocks": 12, "heads": 4, "groups": 2, "vocabulary": 4096},
    "h256-24": {"hidden": 256, "inner": 704, "blocks": 24, "heads": 4, "groups": 2, "vocabulary": 4096},
    "h256-48": {"hidden": 256, "inner": 704, "blocks": 48, "heads": 4, "groups": 2, "vocabulary": 4096},
    "h256-64k": {"hidden": 256, "inner": 704, "blocks": 2, "heads": 4, "groups": 2, "vocabulary": 65536},
    "h512-12": {"hidden": 512, "inner": 1408, "blocks": 12, "heads": 8, "groups": 4, "vocabulary": 8192},
    "h512-24": {"hidden": 512, "inner": 1408, "blocks": 24, "heads": 8, "groups": 4, "vocabulary": 8192},
    "h512-48": {"hidden": 512, "inner": 1408, "blocks": 48, "heads": 8, "groups": 4, "vocabulary": 8192},
    "h512-24-32k": {"hidden": 512, "inner": 1408, "blocks": 24, "heads": 8, "groups": 4, "vocabulary": 32000},
    "h512-48-32k": {"hidden": 512, "inner": 1408, "blocks": 48, "heads": 8, "groups": 4, "vocabulary": 32000},
    "h1024-6": {"hidden": 1024, "inner": 2816, "blocks": 6, "heads": 16, "groups": 4, "vocabulary": 8192},
    "h1024-12": {"hidden": 1024, "inner": 2816, "blocks": 12, "heads": 16, "groups": 4, "vocabulary": 8192},
    "h1024-24": {"hidden": 1024, "inner": 2816, "blocks": 24, "heads": 16, "groups": 4, "vocabulary": 8192},
    "h1024-48": {"hidden": 1024, "inner": 2816, "blocks": 48, "heads": 16, "groups": 4, "vocabulary": 8192},
    "llama-1.1b": {"hidden": 2048, "inner": 5632, "blocks": 22, "heads": 32, "groups": 4, "vocabulary": 32000},
    "llama-3.2b": {"hidden": 3072, "inner": 8192, "blocks": 28, "heads": 24, "groups": 8, "vocabulary": 32000},
    "llama-8b": {"hidden": 4096, "inner": 14336, "blocks": 32, "heads": 32, "groups": 8, "vocabulary": 128256},
    "llama-70b-4": {"hidden": 8192, "inner": 28672, "blocks": 4, "heads": 64, "groups": 8, "vocabulary": 128256},
}  # fmt: skip


def _restart_peak() -> float:
    """The largest resident memory since the last call, in GB."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        found = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, StopIteration):
        return float("nan")
    return round(found / 1e6, 3)


class Noted(Steps):
    """Steps, and what a job says."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []
        self.peaks: dict[str, float] = {}

    @contextlib.contextmanager
    def step(self, label: str, total: float) -> Iterator[Callable[[int], None]]:
        """Time one step, and note the largest resident memory in it (GB, where Linux says it)."""
        before = _restart_peak()
        with super().step(label, total) as advance:
            yield advance
        self.peaks[label] = max(self.peaks.get(label, 0.0), _restart_peak())  # some steps come twice
        self.peaks["before"] = max(self.peaks.get("before", 0.0), before)

    def note(self, message: str, *_: Any) -> None:
        """Keep it, and show it on standard error."""
        self.notes.append(message)
        print(message, file=sys.stderr, flush=True)


def config_of(shape: dict[str, int], dtype: torch.dtype) -> dict[str, Any]:
    """The config.json of a shape."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": shape["hidden"],
        "intermediate_size": shape["inner"], "num_hidden_layers": shape["blocks"], "bos_token_id": 0,
        "eos_token_id": 0, "num_attention_heads": shape["heads"], "num_key_value_heads": shape["groups"],
        "vocab_size": shape["vocabulary"], "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, "hidden_act": "silu", "torch_dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip


def write_checkpoint(directory: Path, shape: dict[str, int], dtype: torch.dtype) -> int:
    """Write a random checkpoint, one shard a block; returns its parameters."""
    from bytecap.model.checkpoint import demo_directory

    h, inner, vocabulary = shape["hidden"], shape["inner"], shape["vocabulary"]
    narrow = h // shape["heads"] * shape["groups"]
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config_of(shape, dtype)))
    shutil.copy(demo_directory() / "tokenizer.json", directory)
    places: dict[str, str] = {}
    sizes: list[int] = []
    for number in range(-1, shape["blocks"]):
        generator = torch.Generator().manual_seed(number + 1)
        sizes_of = {
            "self_attn.q_proj": (h, h), "self_attn.k_proj": (narrow, h), "self_attn.v_proj": (narrow, h),
            "self_attn.o_proj": (h, h), "mlp.gate_proj": (inner, h), "mlp.up_proj": (inner, h),
            "mlp.down_proj": (h, inner), "input_layernorm": (h,), "post_attention_layernorm": (h,),
        }  # fmt: skip
        wanted: dict[str, tuple[int, ...]] = {f"model.layers.{number}.{n}.weight": s for n, s in sizes_of.items()}
        if number < 0:
            table = (vocabulary, h)
            wanted = {"model.embed_tokens.weight": table, "model.norm.weight": (h,), "lm_head.weight": table}
        file = f"model-{number + 1:05d}.safetensors"
        _write(directory / file, wanted, generator, dtype)
        places |= dict.fromkeys(wanted, file)
        sizes += [torch.Size(s).numel() for s in wanted.values()]
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return sum(sizes)


def _write(path: Path, wanted: dict[str, tuple[int, ...]], generator: torch.Generator, dtype: torch.dtype) -> None:
    from safetensors.torch import save_file

    spread = 0.02
    tensors = {
        n: torch.ones(s, dtype=dtype) if len(s) == 1
        else torch.randn(s, generator=generator).mul_(spread).to(dtype)
        for n, s in wanted.items()
    }  # fmt: skip
    save_file(tensors, path, metadata={"format": "pt"})


def child(args: argparse.Namespace) -> None:
    """One fit, whose figures the first rank prints as a line of JSON."""
    from bytecap.system.distributed import joined

    with joined(args.device) as ranks:
        _fit(args, ranks)


def _fit(args: argparse.Namespace, ranks: Any) -> None:
    import bytecap

    steps, began = Noted(), time.perf_counter()
    text: dict[str, Any] = {"calibration": "general"} if args.calib is None else {"calibration": args.calib}
    output = args.child / {"gguf": "out.gguf", "bcap": "out.bcap"}.get(args.format, "out")
    text |= {"ranks": ranks} if args.format == "bcap" else {"types": args.types.split(",") if args.types else None}
    result = bytecap.fit(
        str(args.child), f"{args.bits}bpp", output=output, device=args.device, tokens=args.tokens, format=args.format,
        evaluation_tokens=args.eval_tokens, memory=args.memory, seed=args.seed, effort=args.effort, reporter=steps,
        **text,
    )  # fmt: skip
    cuda = torch.cuda.is_available() and args.device != "cpu"
    host_gb = ranks.all(max([*steps.peaks.values(), _restart_peak()]))
    gpu_gb = ranks.all(round(torch.cuda.max_memory_allocated() / 1e9, 2) if cuda else None)
    reserved = ranks.all(round(torch.cuda.max_memory_reserved() / 1e9, 2) if cuda else None)
    if not ranks.first:
        return
    print(json.dumps({
        "seconds": round(time.perf_counter() - began, 1), "steps": steps.found, "peaks_gb": steps.peaks,
        "file_bytes": result.report["file_bytes"],
        "slack_bytes": result.report["slack_bytes"], "parameters": result.report["parameters"],
        "kl_nats": result.report["kl_nats"], "streamed": any("is streamed" in n for n in steps.notes),
        "host_gb": max(host_gb), "gpu_gb": max(gpu_gb) if cuda else None,
        "gpu_reserved_gb": max(reserved) if cuda else None,
        "sha256": _digest(output), "threads": torch.get_num_threads(),
    }))  # fmt: skip


def _digest(output: Path) -> str:
    """SHA-256 of a file, or of a directory's files in the order of their names."""
    found = hashlib.sha256()
    for path in sorted(output.iterdir()) if output.is_dir() else [output]:
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def _command(args: argparse.Namespace) -> str:
    """The command line, without names of this machine."""
    own = {str(args.work): "WORK", str(args.out): "OUT", str(args.calib): "CALIB"}
    return " ".join(["python", "benchmarks/scale.py", *(own.get(word, word) for word in sys.argv[1:])])


def one(name: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One shape in processes of its own, with every number of ranks."""
    dtype = getattr(torch, args.dtype)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        directory = Path(work) / name
        write_checkpoint(directory, SHAPES[name], dtype)
        for gpus in args.gpus:
            began = time.perf_counter()
            found = _started(name, directory, gpus, args)
            row = {"benchmark": "scale", "model": name, "gpus": gpus, "process_seconds": round(
                time.perf_counter() - began, 1), **found, "bits": args.bits, "tokens": args.tokens, "seed": args.seed,
                "memory": args.memory, "effort": args.effort, "dtype": args.dtype, "format": args.format,
                "types": args.types, "host": host(), "date": time.strftime("%Y-%m-%d"),
                "command": _command(args)}  # fmt: skip
            if rows:
                row["speed_up"] = round(rows[0]["seconds"] / row["seconds"], 2)
                row["same_bytes"] = rows[0]["sha256"] == row["sha256"]
            rows.append(row)
            yield row


def _started(name: str, directory: Path, gpus: int, args: argparse.Namespace) -> dict[str, Any]:
    """Start a fit; returns what it has printed."""
    start, environment = [sys.executable], dict(os.environ)
    if gpus > 1:
        start += ["-m", "torch.distributed.run", "--nproc-per-node", str(gpus)]
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // gpus)))  # torchrun would set 1
    options = [f"--{n}={getattr(args, n)}" for n in ("bits", "tokens", "device", "seed")]
    options += [f"--eval-tokens={args.eval_tokens}", f"--format={args.format}"]
    options += [f"--{n}={v}" for n in ("memory", "calib", "effort", "types") if (v := getattr(args, n)) is not None]
    done = subprocess.run(
        [*start, __file__, f"--child={directory}", *options], stdout=subprocess.PIPE, text=True, check=False,
        env=environment,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{name} with {gpus} ranks: the fit ended with {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def main() -> None:
    """Every shape once."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("shapes", nargs="*", metavar="SHAPE", help=", ".join(SHAPES))
    p.add_argument("--bits", type=float, default=3.0)
    p.add_argument("--tokens", type=int, default=32_768)
    p.add_argument("--eval-tokens", type=int, default=4096)
    p.add_argument("--device", default="auto")
    p.add_argument("--memory")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--effort", type=int, help="of the fit")
    p.add_argument("--format", default="bcap", choices=["bcap", "gguf", "mlx", "compressed-tensors"])
    p.add_argument("--types", help="of formats of other programs, by comma")
    p.add_argument("--gpus", type=_numbers, default=[1], help="numbers of ranks, by comma")
    p.add_argument("--dtype", default="bfloat16", help="of the checkpoint on disk")
    p.add_argument("--calib", help="calibration text instead of the embedded general one")
    p.add_argument("--work", type=Path, help="where checkpoints are written; the system's place by default")
    p.add_argument("--out", type=Path, help="JSON lines to append to")
    p.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.child is not None:
        child(args)
        return
    if args.format != "bcap" and max(args.gpus) > 1:
        p.error(f"--gpus: only the package's own format is divided among ranks, not {args.format}")
    for name in args.shapes:
        for row in one(name, args):
            print(json.dumps(row), flush=True)
            if args.out is not None:
                with args.out.open("a") as f:
                    f.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
