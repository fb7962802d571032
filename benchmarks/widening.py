"""Does little text of the user's gain from samples of the model and general text beside it, where it counts for them?

Text of one kind, few tokens of it: alone, and with other text of some share of all statistics (`self` samples of the
model, `general` the embedded text, `mix` three parts and one). Judged at equal file bytes on windows of the same text
that no statistic has seen, which are what a fit could decide by, and on held-out texts of all kinds. Correction factors
and drift targets are off, so that arms differ in their Hessians alone.

    python benchmarks/widening.py --models DIR --texts DIR --model smollm2 --user technical --user-tokens 4096 16384
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from bytecap.job.config import FitConfig
from bytecap.model.checkpoint import Model, load_checkpoint
from bytecap.model.evaluation import ByWindow, by_window
from bytecap.model.sources import load_sets
from bytecap.model.texts import TokenSets, Window, leading
from bytecap.model.uncertainty import ratio_stderr
from bytecap.pipeline.stages import choose_device, fit_sets
from bytecap.progress import Bars
from common import parser, record, texts

ARMS = ("user", "mix:0.25", "mix:0.5", "self:0.25", "general:0.25")
_HELD = 8192  # tokens of the user's that judge


def main() -> None:
    """Measure every arm at every number of tokens on every model."""
    p = parser(__doc__.split("\n")[0], models="smollm2")
    p.add_argument("--bits", type=float, default=2.5)
    p.add_argument("--effort", type=int, default=0)
    p.add_argument("--user", default="technical", help="kind of the user's text, the start of a file's name")
    p.add_argument("--user-tokens", nargs="*", type=int, default=[4096, 16_384, 65_536])
    p.add_argument("--arms", nargs="*", default=ARMS)
    args = p.parse_args()
    args.device = choose_device(args.device)
    for name in args.model:
        model = load_checkpoint(args.models / name)
        model.name = name
        for tokens in args.user_tokens:
            compare(args, model, tokens)


def compare(args: Any, model: Model, tokens: int) -> None:
    """Fit every arm, and judge it beside the first one, window by window."""
    user = [path for path in texts(args.texts, "calib") if path.name.startswith(args.user)]
    held = texts(args.texts, "val")
    load = partial(load_sets, model, seed=args.seed, device=args.device, reporter=Bars())
    sets = load(user, held, tokens=tokens, correction_tokens=_HELD, evaluation_tokens=args.eval_tokens)
    most = max((share(arm) for arm in args.arms), default=0.0)
    wanted = int(tokens * most / (1 - most)) + 512
    pools = {
        word: load([word], held, tokens=wanted, correction_tokens=512, evaluation_tokens=512).statistics
        for word in ("self", "general")
    }
    alone: ByWindow | None = None
    for arm in args.arms:
        found = judged(args, model, widened(sets, arm, tokens, pools), arm, tokens, alone)
        alone = alone or found


def share(arm: str) -> float:
    """Return the share of all statistics that is not the user's."""
    return float(arm.partition(":")[2] or 0)


def widened(sets: TokenSets, arm: str, tokens: int, pools: dict[str, Sequence[Window]]) -> TokenSets:
    """Return the sets with other text among the statistics."""
    kind, more = arm.partition(":")[0], tokens * share(arm) / (1 - share(arm))
    parts = {"user": {}, "mix": {"self": 0.75, "general": 0.25}}.get(kind, {kind: 1.0})
    extra = [w for word, part in parts.items() for w in leading(pools[word], part * more)]
    return replace(sets, statistics=(*sets.statistics, *extra))


def judged(args: Any, model: Model, sets: TokenSets, arm: str, tokens: int, alone: ByWindow | None) -> ByWindow:
    """Fit one arm, record it, and return what it came to on the windows that judge."""
    config = FitConfig(
        f"{args.bits}bpp", device=args.device, seed=args.seed, effort=args.effort, reporter=Bars(),
        options={"drift": 0.0, "correct": False},
    )  # fmt: skip
    result = fit_sets(model, sets, config)
    module = result.load_model().to(args.device)
    mine = by_window(model.module, module, {"": {}}, sets.correction, device=args.device)[""]
    kl = float(mine.kl.sum() / mine.tokens.sum())
    row = {
        "benchmark": "widening", "user": args.user, "user_tokens": tokens, "arm": arm, "bits": args.bits,
        "effort": args.effort, "held_kl": kl, "held_tokens": int(mine.tokens.sum()),
        **{k: result.report[k] for k in ("file_bytes", "statistics_tokens", "kl_nats", "kl_stderr", "seconds")},
        "texts": [(t["name"], t["kl_nats"]) for t in result.report["texts"]],
        "distance": result.report["text_distance"],
    }  # fmt: skip
    said = ""
    if alone is not None:
        row["held_change"] = kl - float(alone.kl.sum() / alone.tokens.sum())
        row["held_change_stderr"] = ratio_stderr(mine.kl - alone.kl, mine.tokens)
        said = f" ({row['held_change']:+.4f} ± {row['held_change_stderr']:.4f} to the user's alone)"
    record(args, {"model": model.name, **row})
    print(f"{model.name} {tokens:,} {arm}: KL {kl:.4f} on the user's held-out windows{said}, "
          f"{result.report['kl_nats']:.4f} ± {result.report['kl_stderr']:.4f} on all texts", flush=True)  # fmt: skip
    return mine


if __name__ == "__main__":
    main()
