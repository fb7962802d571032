"""Which layers should share a block: a loop, the greedy search and Dynamic Layer Tying, at equal time.

Both searches get the same seconds on the same tokens; what they find (and the loop) is then started from the original
and uptrained for the same moves over the same tokens in the same order. Reported: KL to the original of the uptrained
model on held-out tokens of the training texts that no search has seen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bytecap.job.effort import Effort
from bytecap.model.checkpoint import Model, load_checkpoint
from bytecap.model.texts import Window
from bytecap.pipeline.stages import choose_device
from bytecap.progress import Silent
from bytecap_lab.layer_tying import TyingPlan, decide, read, split
from bytecap_lab.layer_tying.start import tied
from bytecap_lab.layer_tying.uptrain import RATE, uptrain
from common import parser, record, texts


def main() -> None:
    """Every model, number of blocks and seed, searched in each way."""
    p = parser(__doc__ or "", required=False)
    p.add_argument("--train", nargs="*", type=Path, help="texts to train on; the calibration texts if none")
    p.add_argument("--blocks", nargs="*", type=int, default=[4, 6])
    p.add_argument("--search-steps", default="15s", help="moves or time of each search")
    p.add_argument("--steps", default="300", help="moves or time of uptraining")
    p.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    args = p.parse_args()
    args.device = choose_device(args.device)
    for name in args.model:
        model = load_checkpoint(name if name == "demo" else args.models / name)
        model.name = name
        model.module.to(args.device)
        found = args.train or (texts(args.texts, "calib") if args.texts else None)
        for seed in args.seeds:
            args.seed = seed
            pool = read(model, found, window=512, seed=seed, reporter=Silent())
            for blocks in args.blocks:
                for search in (None, "greedy", "dlt"):
                    one(args, model, pool, blocks, search)


def one(args: Any, model: Model, pool: list[Window], blocks: int, search: str | None) -> None:
    """One search and its uptraining, recorded."""
    depth = TyingPlan.of(model, 1, "average", 0, None).start
    if search is None and len(depth.sources) % blocks:
        return  # no loop has so many blocks
    windows, held, measured = split(pool, 2, args.device, "the training text")
    plan = TyingPlan.of(model, blocks, "average", 0, search)
    effort = Effort.parse(args.search_steps)
    tying, trace = decide(plan, model, windows, measured, effort, args.device, args.seed, RATE, Silent())
    found = uptrain(
        model.module, tied(model.module, tying), windows, held, Effort.parse(args.steps), device=args.device,
        seed=args.seed,
    )  # fmt: skip
    row = record(args, {
        "benchmark": "searches", "model": model.name, "blocks": blocks, "search": search or "loop",
        "sources": list(tying.sources), "search_steps": args.search_steps, "uptraining": dict(found.__dict__), **trace,
    })  # fmt: skip
    print(f"{model.name} {blocks} blocks seed {row['seed']} {row['search']:6s} {row['sources']}: KL "
          f"{found.kl_start:.4f} before, {found.kl:.4f} after", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
