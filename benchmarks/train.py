"""Training for the file against coding afterwards: plain, `PQuantLinear`, and a plain model under `mu * rate(model)`.

All arms see the same tokens in the same order, start from the same weights and train side by side, so they take the
same time. Then the pQuant model's export is compared with the plain model fitted by bytecap into the same bytes, and
the regularised model with the plain one at the same bits per parameter: bits per byte on held-out texts, paired.

An arm is `plain`, `pquant` or `rate` with settings behind it: `pquant,lr=3e-3`, `rate,mu=2e-8,energies=1`,
`plain,phases=2` (pQuant's schedule).
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import multiprocessing
import os
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bytecap.job import Section
from bytecap.job.config import FitConfig
from bytecap.model.checkpoint import Model, find_units, freeze
from bytecap.model.fileset import read_side_files
from bytecap.model.sources import first_token, load_sets
from bytecap.pipeline.artifact import Artifact
from bytecap.pipeline.stages import choose_device, fit_sets, side_files
from bytecap.progress import Silent
from bytecap_lab import train
from bytecap_lab.compare.pairs import Figure, Sums, estimate
from common import parser, record, texts

SYNC = 10  # steps between two looks at the common clock
EVERY = 4  # steps of which one has the rate term, that many times over
REFRESH = 52  # steps between two searches for the rate term's step
WARM_UP = 100  # steps
KEPT = ("nats", "original", "bytes")  # sums by window


@dataclass(frozen=True)
class Arm:
    """One way to train, from its text."""

    text: str

    @property
    def kind(self) -> str:
        """`plain`, `pquant` or `rate`."""
        return self.text.split(",")[0]

    def get(self, name: str, default: float) -> float:
        """A setting."""
        return float(dict(part.split("=") for part in self.text.split(",")[1:]).get(name, default))

    def at(self, progress: float, step: int) -> tuple[float, float]:
        """(learning rate, weight decay) at a share of the training; `step` counts for the warm-up."""
        begin = min(1.0, (step + 1) / WARM_UP)
        if self.get("phases", 2 if self.kind == "pquant" else 1) == 2:
            rate, decay = train.schedule(min(int(progress * 10_000), 9_999), 10_000, peak=self.get("lr", 4e-3))
            return begin * rate, decay
        return begin * self.get("lr", 3e-3) * (0.05 + 0.475 * (1 + math.cos(math.pi * progress))), self.get("wd", 0.1)


@dataclass
class Clock:
    """Progress that all arms share, so that they stop after the same step: a barrier, begin, and the share done."""

    barrier: Any
    begin: Any
    done: Any
    seconds: float
    last: float = field(default=0.0)

    def progress(self) -> float:
        """The share of the time that has passed, the same for all arms."""
        try:
            if self.barrier.wait(90) == 0:
                now = time.monotonic()
                self.begin.value = self.begin.value or now
                self.done.value = (now - self.begin.value) / self.seconds
            self.barrier.wait(90)
            self.last = float(self.done.value)
        except threading.BrokenBarrierError:  # an arm is lost: go on by oneself
            self.begin.value = self.begin.value or time.monotonic()
            self.last = (time.monotonic() - self.begin.value) / self.seconds
        return self.last


def tokenize(directory: Path, files: dict[str, bytes], most: int) -> np.ndarray[Any, Any]:
    """Token ids of the texts `*.txt` and `*.txt.xz` in a directory, every document behind the first token."""
    from tokenizers import Tokenizer

    tokenizer, first, found, count = Tokenizer.from_str(files["tokenizer.json"].decode()), first_token(files), [], 0
    for path in sorted([*directory.glob("*.txt"), *directory.glob("*.txt.xz")]):
        raw = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        documents = [d for d in raw.decode("utf-8").replace("\f", "\0").split("\0") if d]
        for at in range(0, len(documents), 256):
            for encoding in tokenizer.encode_batch(documents[at : at + 256], add_special_tokens=False):
                found.append(np.array([first or 0, *encoding.ids], np.uint16))
                count += len(found[-1])
            if count >= most:
                return np.concatenate(found)
    return np.concatenate(found)


def build(args: argparse.Namespace, seed: int) -> tuple[nn.Module, dict[str, bytes]]:
    """An untrained model of the shape, and its side files."""
    import transformers

    directory = args.models / args.model[0]
    config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    for key, value in (part.split("=") for part in args.shape):
        setattr(config, key, int(value))
    config.use_cache = False
    torch.manual_seed(seed)
    module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return module, {**read_side_files(directory), "config.json": config.to_json_string().encode()}


def decouple(module: nn.Module, share: float) -> None:
    """Attention of 1 bit; a share of all linear weights, in whole hidden units, of 8 bits (pQuant's layout)."""
    linear = {n: m for n, m in module.named_modules() if type(m) is nn.Linear}
    inner = {n: m for n, m in linear.items() if ".mlp." in n}
    ratio = sum(m.weight.numel() for m in linear.values()) / sum(m.weight.numel() for m in inner.values())

    def choose(name: str, layer: nn.Linear) -> dict[str, Any] | None:
        if not name.startswith("model.layers"):
            return None
        if name not in inner:
            return {"wide": 0}
        reads = name.endswith("down_proj")
        return {"wide": round(share * ratio * (layer.in_features if reads else layer.out_features)),
                "axis": "in" if reads else "out"}  # fmt: skip

    train.replace(module, choose=choose)


def batch_loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Mean nats per token."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
        logits = model(ids[:, :-1]).logits
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


def learn(model: nn.Module, arm: Arm, tokens: np.ndarray[Any, Any], args: Any, seed: int, clock: Clock | None) -> dict:
    """Train in place; facts of the run."""
    device, started, step, last = next(model.parameters()).device, 0.0, 0, math.nan
    data = torch.from_numpy(tokens.astype(np.int32)).to(device)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=device.type == "cuda")
    order, inside = np.random.default_rng(seed), torch.arange(args.length + 1, device=device)
    mu, how = arm.get("mu", 2e-8) if arm.kind == "rate" else 0.0, {}
    progress = 0.0
    while True:
        if clock is not None and step % SYNC == 0:
            progress = clock.progress()
        elif clock is None:
            progress = step / args.steps
        started = started or time.monotonic()
        if progress >= 1:
            break
        rate, decay = arm.at(progress, step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.param_groups[0]["weight_decay"] = decay
        starts = torch.from_numpy(order.integers(len(data) - args.length - 1, size=args.batch)).to(device)
        loss = batch_loss(model, data[starts[:, None] + inside].long())
        total = loss
        if mu and step >= WARM_UP // 2 and step % EVERY == 0:
            if not how or step % REFRESH == 0:
                how = rate_settings(model, optimizer, arm, args.batch * args.length)
            total = loss + EVERY * mu * train.rate(model, **how)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % args.log_every == 0:
            last = float(loss.detach())
            print(f"{arm.text} seed {seed} step {step} {progress:.3f} loss {last:.4f}", flush=True)
        step += 1
    return {
        "steps": step, "training_tokens": step * args.batch * args.length, "training_loss": last,
        "training_seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip


def rate_settings(model: nn.Module, optimizer: Any, arm: Arm, tokens: int) -> dict[str, Any]:
    """Step, and energies if the arm wants them, for the next steps."""
    known = train.energies(optimizer, model, tokens) if arm.get("energies", 0) else None
    return {"step": train.step_for(model, arm.get("bits", 2.5), energies=known), "energies": known}


def branch_bytes(args: Any) -> int:
    """File size at which the pQuant export leaves `--rest-bits` to each weight outside its layers."""
    module, files = build(args, 0)
    decouple(module, args.share)
    given = train.sections(module)
    model = Model(module, find_units(train.inference(module)), files, "")
    rest = sum(u.parameters for u in model.units if u.name not in given)
    return int(sum(len(s.data) for s in given.values()) + rest * args.rest_bits / 8
               + sum(len(f.data) for f in side_files(model)))  # fmt: skip


def train_job(text: str, seed: int, args: Any, clock: Clock | None = None) -> None:
    """Train one arm and leave what is to be fitted: weights as the model runs, and sections that are coded already."""
    torch.set_num_threads(max(1, args.threads))
    module, _ = build(args, seed)
    if Arm(text).kind == "pquant":
        decouple(module, args.share)
    module.to(choose_device(args.device))
    facts = learn(module, Arm(text), np.load(args.work / "tokens.npy", mmap_mode="r"), args, seed, clock)
    given = train.sections(module) if Arm(text).kind == "pquant" else {}
    state = {n: t.cpu() for n, t in (train.inference(module) if given else module).state_dict().items()}
    torch.save({"state": state, "facts": facts, "given": given}, args.work / f"{text} {seed}.tmp")
    (args.work / f"{text} {seed}.tmp").rename(args.work / f"{text} {seed}.pt")


def fit_job(text: str, seed: int, label: str, args: Any) -> None:
    """Wait for an arm's weights, fit them to one size and record what was measured."""
    torch.set_num_threads(max(1, args.threads))
    path, arm, device = args.work / f"{text} {seed}.pt", Arm(text), choose_device(args.device)
    while not path.exists():
        time.sleep(0.2)
    found = torch.load(path, weights_only=False)  # written above
    module, files = build(args, seed)
    module.load_state_dict(found["state"])
    args.seed, model = seed, Model(freeze(module), find_units(module), files, args.model[0])
    sets = load_sets(
        model, texts(args.texts, "calib"), texts(args.texts, "val"), tokens=args.tokens,
        evaluation_tokens=args.eval_tokens, reporter=Silent(),
    )  # fmt: skip
    config = FitConfig(
        branch_bytes(args) if label == "pquant" else int(float(label) * model.parameters / 8), device=device,
        given=found["given"] or {}, store=args.work / f"{text} {seed}", reporter=Silent(),
        output=args.keep / f"{arm.kind}-s{seed}.bcap" if found["given"] and args.keep else None,
    )  # fmt: skip
    result = fit_sets(model, sets, config)
    keep(result, arm, label, args, found["facts"], found["given"])


def sizes(text: str, args: Any) -> list[str]:
    """Sizes at which an arm is fitted: the pQuant export's, and bits a parameter."""
    bits = [str(b) for b in args.bits]
    return {"plain": ["pquant", *bits], "pquant": ["pquant"], "rate": bits}[Arm(text).kind]


def keep(result: Artifact, arm: Arm, label: str, args: Any, facts: dict[str, Any], given: dict[str, Section]) -> None:
    """Record a fit and put its windows where the comparison finds them."""
    sums = [{k: v.round(6).tolist() for k, v in w.__dict__.items() if k in KEPT} for w in result.windows]
    line = json.dumps({"arm": arm.text, "seed": args.seed, "size": label, "texts": sums}) + "\n"
    with args.windows.open("ab", buffering=0) as f:  # one call: others write here too
        f.write(line.encode())
    row = record(args, {
        "benchmark": "train", "arm": arm.text, "size": label, "bytes": len(result.data),
        "branch_bytes": sum(len(s.data) for s in given.values()), "shape": args.shape, **facts, **result.report,
    })  # fmt: skip
    print(
        f"{arm.text} seed {args.seed} size {label}: {row['bytes']:,} bytes, {row['bpb_original']:.4f} bits per byte "
        f"trained, {row['bpb_artifact']:.4f} coded, fit {row['seconds']:.0f} s", flush=True,
    )  # fmt: skip


def known(figure: Figure) -> dict[str, float]:
    """The parts of a figure that exist: one seed says nothing of seeds."""
    return {k: v for k, v in figure.as_dict().items() if math.isfinite(v)}


def pair(args: Any, runs: list[dict[str, Any]], first: str, second: str, label: str, of: str) -> None:
    """Bits per byte of one arm less another's at one size, all seeds both have, paired by windows."""
    found = {
        arm: {r["seed"]: r["texts"] for r in runs if (r["arm"], r["size"]) == (arm, label)} for arm in (first, second)
    }
    seeds = sorted(set(found[first]) & set(found[second]))
    if not seeds:
        return
    one, two = ([found[arm][s] for s in seeds] for arm in (first, second))
    sums = []
    for i, text in enumerate(one[0]):
        values = [np.subtract(a[i][of], b[i][of]) for a, b in zip(one, two, strict=True)]
        sums.append(Sums(np.stack(values) / math.log(2), np.array(text["bytes"])))
    figure = estimate(sums)
    record(args, {
        "benchmark": "train-pair", "model": args.model[0], "first": first, "second": second, "size": label,
        "of": {"nats": "coded", "original": "trained"}[of], "seeds": seeds, "bpb_difference": known(figure),
        "texts": [known(estimate([s])) for s in sums],
    })  # fmt: skip
    print(f"{first} less {second} at {label}, {of}: {figure.mean:+.4f} ± {figure.stderr:.4f} bits per byte")


def compare(args: Any) -> None:
    """Every arm against the first plain one, at every size both have, as trained and as coded."""
    runs = [json.loads(line) for line in args.windows.read_text().splitlines()]
    plain = next((a for a in args.arms if Arm(a).kind == "plain"), None)
    for arm in args.arms:
        if plain is None or arm == plain:
            continue
        pair(args, runs, arm, plain, sizes(arm, args)[0], "original")
        for label in ["pquant", *map(str, args.bits)]:
            pair(args, runs, arm, plain, label, "nats")


def arguments() -> argparse.Namespace:
    """The command line."""
    p = parser(__doc__ or "")
    p.add_argument("--train", type=Path, required=True, help="directory of *.txt or *.txt.xz, documents ended by NUL")
    p.add_argument("--arms", nargs="*", default=["plain", "pquant", "rate"])
    p.add_argument("--seeds", nargs="*", type=int, default=[0])
    p.add_argument("--bits", nargs="*", type=float, default=[2.5, 3.5], help="of whole files, a parameter")
    p.add_argument("--share", type=float, default=0.05, help="of linear weights in the 8-bit branches")
    p.add_argument("--rest-bits", type=float, default=4.5, help="for weights outside PQuantLinear, in its budget")
    p.add_argument("--shape", nargs="*", default=[], help="changes of the config: hidden_size=64 ...")
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--length", type=int, default=512)
    p.add_argument("--steps", type=int, default=200, help="where no --seconds are given")
    p.add_argument("--seconds", type=float, help="of training; all arms and seeds run side by side")
    p.add_argument("--train-tokens", type=int, default=2**31)
    p.add_argument("--log-every", type=int, default=100)
    p.add_argument("--keep", type=Path, help="directory for the exported files")
    p.add_argument("--windows", type=Path, help="sums by window are appended here, for another comparison")
    p.add_argument("--compare", action="store_true", help="only compare what --windows holds")
    args = p.parse_args()
    args.threads = (os.cpu_count() or 1) // (len(args.arms) * len(args.seeds)) if args.seconds else os.cpu_count()
    return args


def main() -> None:
    """Tokens once, then every arm and seed, then the comparison."""
    args = arguments()
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        args.work = Path(directory)
        args.windows = args.windows or args.work / "windows.jsonl"
        if args.compare:
            return compare(args)
        started = time.monotonic()
        tokens = tokenize(args.train, read_side_files(args.models / args.model[0]), args.train_tokens)
        np.save(args.work / "tokens.npy", tokens)
        print(f"{len(tokens):,} tokens after {time.monotonic() - started:.0f} s", flush=True)
        jobs = [(arm, seed) for seed in args.seeds for arm in args.arms]
        if args.seconds:
            side_by_side(jobs, args)
        else:
            for arm, seed in jobs:
                train_job(arm, seed, args)
                for label in sizes(arm, args):
                    fit_job(arm, seed, label, args)
        return compare(args)


def side_by_side(jobs: list[tuple[str, int]], args: argparse.Namespace) -> None:
    """All jobs as processes that share a clock; those that fit are ready when the weights are."""
    spawn = multiprocessing.get_context("spawn")
    clock = Clock(spawn.Barrier(len(jobs)), spawn.Value("d", 0.0), spawn.Value("d", 0.0), args.seconds)
    learning = [spawn.Process(target=train_job, args=(*job, args, clock)) for job in jobs]
    fitting = {
        (*job, n): spawn.Process(target=fit_job, args=(*job, n, args)) for job in jobs for n in sizes(job[0], args)
    }
    for process in learning:
        process.start()
    time.sleep(min(45.0, args.seconds / 2))
    for process in fitting.values():
        process.start()
    for job, process in zip(jobs, learning, strict=True):
        process.join()
        if process.exitcode:  # nothing will come for these
            for key in (k for k in fitting if k[:2] == job):
                fitting[key].terminate()
    for process in fitting.values():
        process.join()


if __name__ == "__main__":
    main()
