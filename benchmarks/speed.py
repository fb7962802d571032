"""Time and memory of the main job, each beside its partner in the same run.

`fit` against one forward + backward pass (float32 and the fast dtype) over the same calibration tokens; decoding to
float32 on one core by the main decoder and by the numpy-only reference; peak memory of `fit` against the float32 model.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bytecap import reference
from bytecap.format import container
from bytecap.format.decoder import decode_units
from bytecap.model.checkpoint import load_checkpoint
from bytecap.model.forward import batch_tokens, batches, fast_dtype, logits_of
from bytecap.model.sources import load_sets
from bytecap.pipeline.fit import fit
from bytecap.progress import Bars
from common import parser, record, texts


def main() -> None:
    """Time everything on each model."""
    p = parser(__doc__ or "", models="base-s1")
    p.add_argument("--bits", type=float, default=3.0)
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--artifact", type=Path, help="time the decoding of this file and nothing else")
    args = p.parse_args()
    if args.artifact:
        torch.set_num_threads(1)
        print(record(args, {"benchmark": "decoding", **decoding(args.artifact.read_bytes(), args.repeats)}))
        return
    for name in args.model:
        print(one(args, name))


def one(args: Any, name: str) -> dict[str, Any]:
    """All figures of one model."""
    model = load_checkpoint(args.models / name)
    calibration, evaluation = texts(args.texts, "calib"), texts(args.texts, "val")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    result = fit(
        model, int(args.bits * model.parameters / 8), calibration=calibration, evaluation=evaluation,
        device=args.device, seed=args.seed, tokens=args.tokens, evaluation_tokens=args.eval_tokens, reporter=Bars(),
    )  # fmt: skip
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sets = load_sets(model, calibration, evaluation, tokens=args.tokens, reporter=Bars())
    passes = {
        str(d): training_pass(model, sets.statistics, d) for d in (torch.float32, fast_dtype(torch.device("cpu")))
    }
    torch.set_num_threads(1)
    millions = model.parameters / 1e6
    return record(args, {
        "benchmark": "speed", "model": name, "tokens": result.report["statistics_tokens"], "fit_seconds": seconds,
        "pass_seconds": passes, "fit_over_pass": {d: seconds / s for d, s in passes.items()},
        **decoding(result.data, args.repeats),
        "peak_MB": peak / 1024, "before_fit_MB": before / 1024, "model_fp32_MB": 4 * millions,
        "peak_limit_MB": 16 * millions + 700,
    })  # fmt: skip


def decoding(data: bytes, repeats: int) -> dict[str, float]:
    """Millions of weights a second of both decoders, medians of runs taken in turns."""
    contents = container.parse(data)
    times = [
        (clock(lambda: decode_units(contents)), clock(lambda: reference.decode_file(data))) for _ in range(repeats)
    ]
    main_s, reference_s = (statistics.median(t) for t in zip(*times, strict=True))
    millions = sum(u.unit.parameters for u in contents.units) / 1e6
    return {"decode_main_M_per_s": millions / main_s, "decode_reference_M_per_s": millions / reference_s}


def training_pass(model: Any, windows: Any, dtype: torch.dtype) -> float:
    """Seconds of forward + backward (all weight gradients) over the windows, timed on an eighth of them."""
    module = model.module.to(dtype)
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    some = windows[: max(1, len(windows) // 8)]

    def run() -> None:
        for ids, mask in batches(some, batch_tokens(4096)):
            logits = logits_of(module(ids[:, :-1])).float()
            loss = torch.nn.functional.cross_entropy(logits[mask], ids[:, 1:][mask], reduction="sum")
            loss.backward()  # type: ignore[no-untyped-call]
            module.zero_grad()

    seconds = clock(run)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    module.to(torch.float32)
    return seconds * len(windows) / len(some)


def clock(work: Callable[[], Any]) -> float:
    """Wall seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
