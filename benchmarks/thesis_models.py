"""Train the models that the thesis' registration (docs/thesis.md) counts on, all of them at once on one device.

    python benchmarks/thesis_models.py --train DIR --small DIR --held-out FILE... --seconds 215 -o OUT

Recipes: `mini` (the embedded model's config and tokenizer), `small` (those of the directory given with --small),
`looped` (mini's stored tensors, the stack passed three times). Equal seeds of mini and looped begin with the same
weights and see the same windows. Every model is written as `OUT/RECIPE-SEED`: config.json, model.safetensors
(bfloat16), tokenizer, and training.json; with --tar directories are packed. A looped directory is
read through this file: `bytecap thesis benchmarks/thesis_models.py:looped:OUT/looped-0`.

Training stops at --steps or when --seconds since the start are over, whichever is first; the rate's schedule follows
whichever is nearer, and the steps made are in training.json. So a repetition on another machine is another sample of
the recipe.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import math
import shutil
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bytecap.model.forward import fast_dtype

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "src" / "bytecap" / "data" / "demo"
PASSES = 3  # of the looped recipe
RATES = {"mini": 3e-3, "looped": 2e-3, "small": 2e-3}
SEEDS = {"mini": 5, "small": 3, "looped": 3}
_LINE = 80  # characters of a line that two documents share only if one holds the other's text


def registration() -> str:
    """SHA-256 of docs/thesis.md up to its amendments."""
    text = (ROOT / "docs" / "thesis.md").read_text("utf-8").partition("\n## Amendments")[0]
    return hashlib.sha256(text.encode()).hexdigest()


def build(config: dict[str, Any]) -> nn.Module:
    """An untrained Llama of a config; with `stored_layers` the stored blocks are passed again and again."""
    from transformers import LlamaConfig, LlamaForCausalLM

    stored = config.get("stored_layers", config["num_hidden_layers"])
    module = LlamaForCausalLM(LlamaConfig(**{**config, "num_hidden_layers": stored, "dtype": "float32"}))
    blocks = list(module.model.layers)
    module.model.layers = nn.ModuleList(blocks * (config["num_hidden_layers"] // stored))
    module.config.num_hidden_layers = config["num_hidden_layers"]
    module.config.use_cache = False  # a block's keys are others in every pass
    return module


def looped(directory: str) -> nn.Module:
    """The untrained module of a looped directory, for `bytecap thesis FILE.py:looped:DIRECTORY`."""
    return build(json.loads((Path(directory) / "config.json").read_text("utf-8")))


def documents(files: Sequence[Path], held_out: Sequence[Path], limit: int) -> Iterator[str]:
    """Training documents, about `limit` characters, without those that share a long line with a held-out text."""
    lines = {s for p in held_out for line in p.read_text("utf-8").splitlines() if len(s := line.strip()) >= _LINE}
    dropped = 0
    for path in files:
        data = path.read_bytes()
        text = (lzma.decompress(data) if path.suffix == ".xz" else data).decode("utf-8")
        for document in text.split("\0"):
            if any(line.strip() in lines for line in document.splitlines() if len(line) >= _LINE):
                dropped += 1
                continue
            if limit <= 0:
                break
            limit -= len(document)
            yield document
    print(json.dumps({"dropped_documents": dropped}), flush=True)


def tokens(texts: Sequence[str], tokenizer: Path, first: int) -> npt.NDArray[np.uint16]:
    """All documents as one stream, each behind the first token."""
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(tokenizer))
    parts = []
    for i in range(0, len(texts), 2048):
        found = encoder.encode_batch(list(texts[i : i + 2048]), add_special_tokens=False)
        parts += [np.array([first, *f.ids], np.uint16) for f in found]
    return np.concatenate(parts)


def draw(stream: npt.NDArray[np.uint16], rng: np.random.Generator, count: int, window: int) -> Tensor:
    """Windows from random places, (count, window + 1)."""
    at = rng.integers(0, len(stream) - window - 1, count)
    return torch.from_numpy(np.stack([stream[a : a + window + 1] for a in at]).astype(np.int64))


def loss_of(module: nn.Module, ids: Tensor) -> Tensor:
    """Mean cross entropy of the next tokens of ids (batch, length)."""
    fast = fast_dtype(ids.device)
    with torch.autocast(ids.device.type, fast, enabled=fast is not torch.float32):
        logits = module(ids[:, :-1]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def schedule(progress: float) -> float:
    """Share of the top rate: a twentieth to warm up, then a cosine."""
    return min(1.0, 20 * progress) * (0.02 + 0.49 * (1 + math.cos(math.pi * progress)))


def train(recipe: str, seed: int, source: Path, stream: Path, args: argparse.Namespace, until: float) -> dict[str, Any]:
    """Train one model, write its directory, return its line."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    config = json.loads((source / "config.json").read_text("utf-8"))
    if recipe == "looped":
        config |= {
            "stored_layers": config["num_hidden_layers"],
            "num_hidden_layers": PASSES * config["num_hidden_layers"],
        }
    device = torch.device(args.device)
    module = build(config).to(device).train()
    found = np.load(stream, mmap_mode="r")
    cut = len(found) - max(20_000, len(found) // 200)
    rng = np.random.default_rng(seed)
    decayed = [p for p in module.parameters() if p.ndim > 1]
    groups = [{"params": decayed, "weight_decay": 0.1},
              {"params": [p for p in module.parameters() if p.ndim <= 1], "weight_decay": 0.0}]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=RATES[recipe], betas=(0.9, 0.95), fused=device.type == "cuda")
    started, step, loss = time.time(), 0, torch.tensor(math.nan)
    while (progress := max(step / args.steps, (time.time() - started) / max(until - started, 1e-9))) < 1:
        for group in optimizer.param_groups:
            group["lr"] = RATES[recipe] * schedule(progress)
        loss = loss_of(module, draw(found[:cut], rng, args.batch, args.window).to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            print(json.dumps({"model": f"{recipe}-{seed}", "step": step, "loss": round(float(loss), 4),
                              "seconds": round(time.time() - started, 1)}), flush=True)  # fmt: skip
    module.eval()
    with torch.no_grad():
        left = draw(found[cut:], np.random.default_rng(0), args.batch, args.window).to(device)
        held = float(loss_of(module, left))
    line = {
        "record": "training", "recipe": recipe, "seed": seed, "registration": registration(), "steps": step,
        "tokens": step * args.batch * args.window, "held_out_nats": held, "seconds": round(time.time() - started, 1),
        "rate": RATES[recipe], "batch": args.batch, "window": args.window, "training_tokens": cut,
        "device": torch.cuda.get_device_name(0) if device.type == "cuda" else "cpu", "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    write(module, config, source, line, args.output / f"{recipe}-{seed}")
    return line


def write(module: nn.Module, config: dict[str, Any], source: Path, line: dict[str, Any], target: Path) -> None:
    """A Hugging Face directory of a trained module; tied and repeated tensors are stored once."""
    from safetensors.torch import save_file

    target.mkdir(parents=True, exist_ok=True)
    kept: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        kept.setdefault(tensor.data_ptr(), (name, tensor))
    values = {n: t.detach().to("cpu", torch.bfloat16).contiguous() for n, t in kept.values()}
    save_file(values, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}, indent=2) + "\n", "utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, target / name)
    (target / "training.json").write_text(json.dumps(line, indent=1) + "\n", "utf-8")


def pack(output: Path, names: Sequence[str], archive: str) -> None:
    """Directories into one tar, which takes their place."""
    with tarfile.open(output / f"{archive}.tar", "w") as tar:
        for name in names:
            tar.add(output / name, name)
    for name in names:
        shutil.rmtree(output / name)


def archives(done: Sequence[tuple[str, int]]) -> dict[str, list[str]]:
    """Archives below 16 MB: models of the 7M recipe one by one, others together."""
    found: dict[str, list[str]] = {}
    for recipe, seed in done:
        found.setdefault(f"{recipe}-{seed}" if recipe == "small" else recipe, []).append(f"{recipe}-{seed}")
    return found


def main() -> None:
    """Read options, tokenize once for every tokenizer, train side by side."""
    started = time.time()
    args = options()
    args.output.mkdir(parents=True, exist_ok=True)
    wanted = [(r, int(s)) for m in args.models.split(",") for r, _, s in [m.partition(":")]]
    files = sorted(p for p in args.train.iterdir() if ".txt" in p.suffixes)
    texts = list(documents(files, args.held_out or [], int(1e6 * args.megabytes)))
    sources = {"mini": DEMO, "looped": DEMO, "small": args.small}
    with tempfile.TemporaryDirectory() as scratch:
        streams = {}
        for recipe in {r for r, _ in wanted}:
            path = Path(scratch) / f"{'small' if recipe == 'small' else 'mini'}.npy"
            if not path.exists():
                first = json.loads((sources[recipe] / "config.json").read_text("utf-8"))["bos_token_id"]
                np.save(path, tokens(texts, sources[recipe] / "tokenizer.json", first))
                print(json.dumps({"tokens": path.stem, "seconds": round(time.time() - started, 1)}), flush=True)
            streams[recipe] = path
        until = started + args.seconds
        with ProcessPoolExecutor(args.jobs or len(wanted), get_context("spawn")) as pool:
            runs = {w: pool.submit(train, *w, sources[w[0]], streams[w[0]], args, until) for w in wanted}
            done = []
            with (args.output / "training.jsonl").open("a", encoding="utf-8") as f:
                for w, run in runs.items():
                    try:
                        f.write(json.dumps(run.result()) + "\n")
                        done.append(w)
                    except Exception as exc:  # noqa: BLE001 (the others are still worth having)
                        f.write(json.dumps({"record": "failed", "model": list(w), "why": repr(exc)}) + "\n")
                    f.flush()
    if args.tar:
        for archive, names in archives(done).items():
            pack(args.output, names, archive)
    print(json.dumps({"trained": len(done), "seconds": round(time.time() - started, 1)}), flush=True)


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="directory of *.txt.xz, documents separated by NUL")
    parser.add_argument(
        "--held-out", type=Path, nargs="*", help="texts that no training document may share a line with"
    )
    parser.add_argument("--small", type=Path, help="directory with the config and tokenizer of the 7M recipe")
    parser.add_argument("--models", default=",".join(f"{r}:{s}" for r, n in SEEDS.items() for s in range(n)))
    parser.add_argument("--seconds", type=float, default=215, help="since the start of the script")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--megabytes", type=float, default=100, help="of training text")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=int, default=0, help="models at a time; all of them")
    parser.add_argument("--tar", action="store_true")
    parser.add_argument("-o", "--output", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
