"""Train one model of model.py on shards of data.py for so many seconds, and score it.

    python train.py --factory baseline --data DIR --seconds 300 -o baseline.pt     # one H100-class GPU
    python train.py --factory mini --data DIR --seconds 60 -o mini.pt              # a CPU

Matrices of blocks go through Muon, everything else through AdamW; rates are constant, then fall linearly to zero
over the last part. Progress is wall-clock time, or steps with `--steps`, which is reproducible. Compilation and the
first step come before the clock starts.

Writes the state dict (`torch.save`, nothing but tensors) and beside it a `.json` with the score and the log.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import data
import model as models
from evaluate import evaluate, held_out


@dataclass(frozen=True)
class Recipe:
    """Training settings by model size; rates are peak values."""

    batch: int  # tokens a step
    micro: int  # tokens a forward pass
    length: int
    matrix_rate: float = 0.02
    embedding_rate: float = 0.02
    vector_rate: float = 0.02
    decay: float = 0.04  # weight decay of matrices
    falling: float = 0.5  # share of the run in which rates fall


FULL = Recipe(batch=131_072, micro=65_536, length=1024)
MINI = Recipe(batch=2_048, micro=2_048, length=256)


def windows(tokens: Tensor, length: int, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of shuffled windows (batch / length, length) and their next tokens, cut anew every epoch."""
    draw = torch.Generator().manual_seed(seed)
    reach = torch.arange(length + 1, device=tokens.device)
    rows = batch // length
    while True:
        shift = int(torch.randint(length, (), generator=draw))
        starts = torch.arange(shift, len(tokens) - length, length)
        starts = starts[torch.randperm(len(starts), generator=draw)].to(tokens.device)
        for chosen in starts[: len(starts) // rows * rows].split(rows):
            cut = tokens[chosen[:, None] + reach].long()
            yield cut[:, :-1], cut[:, 1:]


def products(device: torch.device) -> torch.dtype:
    """Type of products: bfloat16 on GPUs that have it, since others and many processors emulate it, far slower."""
    native = device.type == "cuda" and (torch.version.hip or torch.cuda.get_device_capability(device) >= (8, 0))
    return torch.bfloat16 if native else torch.float32


def orthogonal(matrix: Tensor) -> Tensor:
    """A matrix (rows, cols) with all singular values near 1, five steps of Newton and Schulz (Jordan et al., 2024)."""
    x = matrix.to(products(matrix.device))
    x = x.T if x.shape[0] > x.shape[1] else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.Optimizer):
    """Muon as `torch.optim` has it, but for the type of products on a processor."""

    def __init__(self, matrices: list[nn.Parameter], *, rate: float, decay: float, momentum: float = 0.95) -> None:
        """Parameters (rows, cols), their rate, weight decay a rate and share of the mean gradient that stays."""
        super().__init__(matrices, {"lr": rate, "weight_decay": decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        """Move all parameters that have gradients once."""
        for group in self.param_groups:
            rate, kept = group["lr"], group["momentum"]
            for p in (p for p in group["params"] if p.grad is not None):
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - kept)
                change = orthogonal(p.grad.lerp(mean, kept))
                p.mul_(1 - rate * group["weight_decay"])
                p.add_(change, alpha=-rate * max(1, p.shape[0] / p.shape[1]) ** 0.5)


def optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of blocks, AdamW for the embedding and for all vectors."""
    named = list(model.named_parameters())
    matrices = [p for n, p in named if n.startswith("blocks.") and n.endswith(".weight")]
    vectors = [p for n, p in named if not n.endswith(".weight")]
    embedding = [p for n, p in named if n == "tok_emb.weight"]
    groups = [
        {"params": embedding, "lr": recipe.embedding_rate},
        {"params": vectors, "lr": recipe.vector_rate},
    ]
    return [
        Muon(matrices, rate=recipe.matrix_rate, decay=recipe.decay),
        torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(
    model: nn.Module, tokens: Tensor, recipe: Recipe, *, seconds: float, steps: int | None, seed: int, compiled: bool
) -> list[dict[str, float]]:
    """Train in place until `seconds` or `steps` are over; returns the log."""
    device = tokens.device
    run = torch.compile(model) if compiled else model
    batches = windows(tokens, recipe.length, recipe.micro, seed)
    parts = max(1, recipe.batch // recipe.micro)
    chosen = optimizers(model, recipe)
    peak = [[group["lr"] for group in o.param_groups] for o in chosen]

    def gradients() -> float:
        total = torch.zeros((), device=device)
        for _ in range(parts):
            with torch.autocast(device.type, torch.bfloat16, enabled=products(device) is torch.bfloat16):
                loss = run(*next(batches)) / parts
            loss.backward()
            total += loss.detach()
        return total.item()

    gradients()  # compiles
    model.zero_grad()
    log: list[dict[str, float]] = []
    start, step = time.perf_counter(), 0
    while True:
        elapsed = time.perf_counter() - start
        done = step / steps if steps else elapsed / seconds
        if done >= 1:
            break
        share = min(1.0, (1 - done) / recipe.falling)
        for o, rates in zip(chosen, peak, strict=True):
            for group, rate in zip(o.param_groups, rates, strict=True):
                group["lr"] = rate * share
        loss = gradients()
        for o in chosen:
            o.step()
            o.zero_grad()
        step += 1
        if step % 50 == 1:
            log.append({"step": step, "seconds": round(elapsed, 2), "loss": round(loss, 4)})
            print(f"step {step:5}  {elapsed:6.1f} s  loss {loss:.4f}", flush=True)
    log.append({"step": step, "seconds": round(time.perf_counter() - start, 2), "loss": round(loss, 4)})
    return log


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train a model on token shards and score it.")
    parser.add_argument("--factory", default="baseline", help="function of model.py")
    parser.add_argument("--data", type=Path, required=True, help="folder that data.py wrote")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--steps", type=int, help="in place of --seconds: as many steps, whatever they take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, help="tokens a step")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--save", choices=["float32", "bfloat16"], default="float32", help="type of what is saved")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    recipe = MINI if args.factory.startswith("mini") else FULL
    if args.batch:
        recipe = Recipe(args.batch, min(args.batch, recipe.micro), recipe.length)
    model = getattr(models, args.factory)().to(args.device)
    tokens = torch.from_numpy(data.read_shards(args.data, "train").astype(np.int32)).to(args.device)
    log = train(
        model, tokens, recipe, seconds=args.seconds, steps=args.steps, seed=args.seed, compiled=args.compile
    )  # fmt: skip
    state = {n: t.detach().to(getattr(torch, args.save)).cpu() for n, t in model.state_dict().items()}
    torch.save(state, args.output)
    model.load_state_dict(state)
    torch.set_float32_matmul_precision("highest")
    score = evaluate(model.eval(), *held_out(args.data), recipe.length)
    facts = {"factory": args.factory, "seed": args.seed, "parameters": sum(p.numel() for p in model.parameters())}
    facts |= {"batch": recipe.batch, "steps": log[-1]["step"], "seconds": log[-1]["seconds"], **score}
    args.output.with_suffix(".json").write_text(json.dumps({**facts, "log": log}) + "\n")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
