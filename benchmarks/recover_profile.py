"""Where does the time of a recovery go: passes, checks, rounding, decoding, gradients of what is tuned, the optimizer?

Every part is timed with the device waited for, so that the sum is somewhat more than the same recovery takes alone.

    python benchmarks/recover_profile.py --models DIR --texts DIR --model smollm2 --recover 60s
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from bytecap.job.config import FitConfig
from bytecap.model.checkpoint import load_checkpoint
from bytecap.model.sources import load_sets
from bytecap.pipeline.stages import choose_device, fit_sets
from bytecap.progress import Bars
from bytecap.recovery import tuning
from bytecap.recovery.kl_passes import Passes
from bytecap.recovery.parameters import TunedParameters
from common import parser, record, texts

PARTS: dict[str, tuple[Any, str]] = {
    "forward and backward": (Passes, "gradients"), "checks": (Passes, "check"), "loading values": (Passes, "load"),
    "decoding values": (TunedParameters, "values"), "gradients of tuned tensors": (TunedParameters, "gradients"),
    "rounding": (TunedParameters, "code"), "optimizer": (torch.optim.Adam, "step"), "all": (tuning, "tune"),
}  # fmt: skip


def timed(seconds: Counter[str], calls: Counter[str], name: str, owner: Any, attribute: str, device: str) -> None:
    """Add up the seconds of a function, the device waited for before and after."""
    inner: Callable[..., Any] = getattr(owner, attribute)

    def wait() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @functools.wraps(inner)
    def run(*args: Any, **kwargs: Any) -> Any:
        started = wait()
        try:
            return inner(*args, **kwargs)
        finally:
            seconds[name] += wait() - started
            calls[name] += 1

    setattr(owner, attribute, run)


def main() -> None:
    """Recover every model once, and print its parts."""
    p = parser(__doc__.split("\n")[0])
    p.add_argument("--bits", type=float, default=2.5)
    p.add_argument("--effort", type=int, default=2)
    p.add_argument("--recover", default="60s")
    args = p.parse_args()
    args.device = choose_device(args.device)
    seconds: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for name, (owner, attribute) in PARTS.items():
        timed(seconds, calls, name, owner, attribute, args.device)
    for name in args.model:
        seconds.clear()
        calls.clear()
        model = load_checkpoint(args.models / name)
        sets = load_sets(
            model, texts(args.texts, "calib"), texts(args.texts, "val"), tokens=args.tokens,
            evaluation_tokens=args.eval_tokens, seed=args.seed, reporter=Bars(),
        )  # fmt: skip
        config = FitConfig(
            f"{args.bits}bpp", device=args.device, seed=args.seed, effort=args.effort, recover=args.recover,
            reporter=Bars(), options={"drift": 0.0, "correct": False, "allocate": False},
        )  # fmt: skip
        recovery = fit_sets(model, sets, config).report["recovery"]
        shares = {n: round(seconds[n] / seconds["all"], 4) for n in PARTS}
        found = {n: {"seconds": round(seconds[n], 2), "calls": calls[n], "share": shares[n]} for n in PARTS}
        record(args, {"benchmark": "recover_profile", "model": name, "parts": found, "curve": recovery["curve"]})
        for n, part in found.items():
            print(f"{name} {n}: {part['seconds']:.2f} s in {part['calls']} calls, {100 * part['share']:.1f}%")


if __name__ == "__main__":
    main()
