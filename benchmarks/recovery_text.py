"""Does recovery that reads its text many times gain from samples of the model and general text beside it?

Calibration text is cut short, so that the iterations read it several times. Arms add text to it, each once: `self`
samples of the model, `general` the embedded text. Iterations, seed, statistics and file bytes are the same; arms are
compared with the first one on held-out text, window by window.

    python benchmarks/recovery_text.py --models DIR --texts DIR --recover 240 --text-tokens 49152 --extra-tokens 32768
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

from bytecap.job.config import FitConfig
from bytecap.model import calibration_text
from bytecap.model.checkpoint import Model, demo_directory, load_checkpoint
from bytecap.model.evaluation import ByWindow, by_window
from bytecap.model.sources import load_sets, with_recovery
from bytecap.model.texts import TokenSets, leading
from bytecap.model.uncertainty import ratio_stderr
from bytecap.pipeline.stages import choose_device, fit_sets
from bytecap.progress import Bars
from bytecap.recovery import kl_passes
from common import parser, record, texts

ARMS = ("text", "text+self", "text+self+general")


def main() -> None:
    """Measure every arm on every model."""
    p = parser(__doc__.split("\n")[0])
    p.add_argument("--bits", type=float, default=2.5)
    p.add_argument("--recover", default="240", help="a number of iterations, the same in all arms")
    p.add_argument("--text-tokens", type=int, default=49_152, help="of the calibration text that recovery reads")
    p.add_argument("--extra-tokens", type=int, default=32_768, help="of each text that arms add")
    p.add_argument("--iteration-tokens", type=int, help="of one iteration; as fit does by default")
    p.add_argument("--arms", nargs="*", default=ARMS)
    p.add_argument("--effort", type=int, default=0)
    p.add_argument("--store", help="keeps samples, statistics and plans")
    args = p.parse_args()
    args.device = choose_device(args.device)
    if args.iteration_tokens:
        kl_passes._TOKENS[args.device] = args.iteration_tokens  # noqa: SLF001 (no option of fit)
    for name in args.model:
        model = load_checkpoint(name if name == "demo" else args.models / name)
        model.name = name
        compare(args, model)


def compare(args: Any, model: Model) -> None:
    """Fit every arm on the same statistics, and hold it against the first one."""
    demo = model.name == "demo"
    calib = [demo_directory() / "calib.txt"] if demo else texts(args.texts, "calib")
    held = [demo_directory() / "val.txt"] if demo else texts(args.texts, "val")
    sets = load_sets(
        model, calib, held, tokens=args.tokens, evaluation_tokens=args.eval_tokens, seed=args.seed, device=args.device,
        reporter=Bars(),
    )  # fmt: skip
    calibration_text.SELF_MOST[args.device] = args.extra_tokens
    read = partial(with_recovery, model, sets, seed=args.seed, device=args.device, reporter=Bars())
    pools = {"text": leading(read(calib).recovery, args.text_tokens)}
    for word in {w for arm in args.arms for w in arm.split("+")} - {"text"}:
        pools[word] = leading(read([word]).recovery, args.extra_tokens)
    alone: list[ByWindow] | None = None
    for arm in args.arms:
        found = measured(args, model, sets, [w for part in arm.split("+") for w in pools[part]], arm, alone)
        alone = alone or found


def measured(
    args: Any, model: Model, sets: TokenSets, pool: list[Any], arm: str, alone: list[ByWindow] | None
) -> list[ByWindow]:
    """Fit with one recovery text; record it, and its difference to the first arm's."""
    config = FitConfig(
        int(args.bits * model.parameters / 8), device=args.device, seed=args.seed, recover=args.recover,
        effort=args.effort, store=args.store, reporter=Bars(),
    )  # fmt: skip
    artifact = fit_sets(model, replace(sets, recovery=tuple(pool)), config)
    values, module = artifact.tensors(), model.module
    found = [
        by_window(module, module, {"": values}, t.windows, device=args.device)[""] for t in sets.evaluation
    ]  # fmt: skip
    report = artifact.report
    row: dict[str, Any] = {
        "benchmark": "recovery_text", "model": model.name, "arm": arm, "bits": args.bits, "recover": args.recover,
        "pool_tokens": sum(w.predicted for w in pool), **{k: report[k] for k in ("file_bytes", "kl_nats", "kl_stderr")},
        "kl_without": report["without_recovery"]["kl_nats"], "recovery": report["recovery"],
        "kl_of_texts": [float(f.kl.sum() / f.tokens.sum()) for f in found],
    }  # fmt: skip
    said = f"{model.name} {arm}: KL {row['kl_without']:.4f} to {row['kl_nats']:.4f} ± {row['kl_stderr']:.4f}"
    if alone is not None:
        pairs = [(f.kl - a.kl, f.tokens) for f, a in zip(found, alone, strict=True)]
        row["difference"] = sum(float(d.sum() / n.sum()) for d, n in pairs) / len(pairs)
        row["difference_stderr"] = math.sqrt(sum(ratio_stderr(d, n) ** 2 for d, n in pairs)) / len(pairs)
        said += f", {row['difference']:+.5f} ± {row['difference_stderr']:.5f} to {args.arms[0]}"
    record(args, row)
    print(said, flush=True)
    return found


if __name__ == "__main__":
    main()
