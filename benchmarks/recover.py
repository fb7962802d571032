"""Recovery at equal file bytes: KL and loss with and without `--recover`, beside plain fine-tuning on the same text.

One fit gives both files, since it keeps what it would have written without recovery. Fine-tuning trains the uncoded
original on the labels of the recovery text, with as many tokens as recovery read. What it gains in loss is extra
training, not compression: a recovered file's loss has to be read beside it.
"""

from __future__ import annotations

import random
import time
from typing import Any

import torch

from bytecap.job.config import FitConfig
from bytecap.model.checkpoint import Model, load_checkpoint
from bytecap.model.evaluation import compare_models
from bytecap.model.forward import batches
from bytecap.model.quantized_copy import copy_of
from bytecap.model.sources import load_sets, with_recovery
from bytecap.model.texts import TokenSets, Window
from bytecap.pipeline.quality import mean_comparison
from bytecap.pipeline.stages import choose_device, fit_sets
from bytecap.progress import Bars
from bytecap.recovery import tuning
from bytecap.recovery.kl_passes import tokens_of_iteration
from common import parser, record, texts


def main() -> None:
    """Every model at every budget, with and without."""
    p = parser(__doc__ or "")
    p.add_argument("--bits", nargs="*", type=float, default=[2.5, 3.5])
    p.add_argument("--recover", default="600", help="steps or time, as for fit")
    p.add_argument("--recover-text", nargs="*", help="self, or files; the calibration texts by default")
    p.add_argument("--tuning-steps", type=int, help="of plain fine-tuning; as many as recovery made by default, 0 none")
    p.add_argument("--tuning-rates", nargs="*", type=float, default=[1e-5, 3e-5, 1e-4])
    p.add_argument("--rate", type=float, default=tuning.RATE, help="first learning rate of shadows, in grid steps")
    p.add_argument("--values-rate", type=float, default=tuning.VALUES_RATE, help="of everything else")
    args = p.parse_args()
    tuning.RATE, tuning.VALUES_RATE = args.rate, args.values_rate
    args.device = choose_device(args.device)
    for name in args.model:
        model = load_checkpoint(name if name == "demo" else args.models / name)
        model.name = name
        sets = load_sets(
            model, texts(args.texts, "calib"), texts(args.texts, "val"), tokens=args.tokens,
            evaluation_tokens=args.eval_tokens, seed=args.seed, reporter=Bars(),
        )  # fmt: skip
        sets = with_recovery(
            model,
            sets,
            args.recover_text or texts(args.texts, "calib"),
            seed=args.seed,
            device=args.device,
            reporter=Bars(),
        )
        read = [one(args, model, sets, bits) for bits in args.bits]
        steps = args.tuning_steps
        if steps is None:
            steps = max(read, default=0) // tokens_of_iteration(args.device)
        if steps:
            tuned(args, model, sets, steps)


def one(args: Any, model: Model, sets: TokenSets, bits: float) -> int:
    """One fit, measured and recorded with what it would have been without recovery; tokens that recovery read."""
    budget = int(bits * model.parameters / 8)
    config = FitConfig(budget, device=args.device, seed=args.seed, recover=args.recover, reporter=Bars())
    result = fit_sets(model, sets, config)
    without = result.report["without_recovery"]
    ratios = {
        "kl_ratio": result.report["kl_nats"] / without["kl_nats"],
        "loss_ratio": result.report["measured_delta_nats"] / without["measured_delta_nats"],
    }
    row = record(args, {
        "benchmark": "recover", "bits": bits, "recover": args.recover, "rate": args.rate,
        "values_rate": args.values_rate,
        "text": "self" if args.recover_text == ["self"] else "given", **ratios, **result.report,
    })  # fmt: skip
    print(
        f"{model.name} {bits} recover {args.recover}: KL {without['kl_nats']:.4f} ± {without['kl_stderr']:.4f} to "
        f"{row['kl_nats']:.4f} ± {row['kl_stderr']:.4f} (ratio {row['kl_ratio']:.3f}), loss "
        f"{without['measured_delta_nats']:+.4f} to {row['measured_delta_nats']:+.4f} ± "
        f"{row['measured_delta_stderr']:.4f}, {row['file_bytes']:,} bytes, {row['seconds']:.0f} s", flush=True,
    )  # fmt: skip
    return int(row["recovery"].get("tokens", 0))


def tuned(args: Any, model: Model, sets: TokenSets, steps: int) -> None:
    """Plain fine-tuning of the original on the recovery text: as many tokens, several learning rates."""
    for rate in args.tuning_rates:
        started = time.perf_counter()
        quantized_copy = copy_of(model.module)
        with torch.no_grad():
            for p in quantized_copy.parameters():
                p.data = p.data.clone()
        model.module.to(args.device)
        quantized_copy.to(args.device)
        _train(quantized_copy, list(sets.recovery or sets.statistics), steps, rate, args)
        parts = [compare_models(model.module, quantized_copy, t, device=args.device) for t in sets.evaluation]
        mean = mean_comparison(parts)
        record(args, {
            "benchmark": "recover-fine-tuning", "model": model.name, "rate": rate, "steps": steps,
            "tokens": steps * tokens_of_iteration(args.device),
            "measured_delta_nats": mean.delta_nats, "measured_delta_stderr": mean.delta_stderr,
            "kl_nats": mean.kl_nats, "seconds": round(time.perf_counter() - started, 1),
        })  # fmt: skip
        print(f"{model.name} fine-tuned at {rate}: loss {mean.delta_nats:+.4f} ± {mean.delta_stderr:.4f}", flush=True)


def _train(quantized_copy: torch.nn.Module, windows: list[Window], steps: int, rate: float, args: Any) -> None:
    """AdamW on the labels, in moves of as many tokens as recovery makes."""
    parameters = [p.requires_grad_(True) for p in quantized_copy.parameters() if p.is_floating_point()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    rng = random.Random(args.seed)  # noqa: S311 (sampling, not cryptography)
    most = tokens_of_iteration(args.device)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - 0.9 * step / steps)
        chosen: list[Window] = []
        while sum(w.predicted for w in chosen) < most:
            chosen.append(rng.choice(windows))
        optimizer.zero_grad()
        for ids, mask in batches(chosen, most // 4):
            inside, real = ids[:, :-1].to(args.device), mask.to(args.device)
            labels = ids[:, 1:].to(args.device)[real]
            loss = torch.nn.functional.cross_entropy(quantized_copy(inside).logits[real], labels, reduction="sum")
            (loss / sum(w.predicted for w in chosen)).backward()
        optimizer.step()
    for p in parameters:
        p.requires_grad_(False)


if __name__ == "__main__":
    main()
