"""Measure what shrinking Hessians to their diagonal, or to its mean, does to distortion on windows they never saw.

Every role's first, middle and last matrix is rounded to Q4_0 under every candidate. Figures are `held`, relative to no
shrinkage, and `held / seen`, the optimism of the fit.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bytecap.calibration.statistics import moments
from bytecap.job import Job
from bytecap.job.config import FitConfig
from bytecap.model.checkpoint import load_checkpoint
from bytecap.model.sources import load_sets
from bytecap.pipeline.stages import choose_device
from bytecap.progress import Silent
from bytecap.runtimes.blocks.encode import encode_all
from bytecap.runtimes.blocks.ggml import FORMATS
from bytecap.runtimes.gguf.menu import SHRINKAGES, Item, items_of
from bytecap.runtimes.gguf.places import layout_of
from bytecap.system.cache import Store
from common import parser, record, texts


def main() -> None:
    """Every model and role."""
    p = parser(__doc__ or "")
    p.add_argument("--held-tokens", type=int, default=16_384)
    p.add_argument("--work", type=Path, help="directory for statistics kept between runs")
    args = p.parse_args()
    device = choose_device(args.device)
    for name in args.model:
        model = load_checkpoint(args.models / name)
        sets = load_sets(
            model, texts(args.texts, "calib"), None, tokens=args.tokens, evaluation_tokens=64,
            correction_tokens=args.held_tokens, seed=args.seed, reporter=Silent(),
        )  # fmt: skip
        config = FitConfig(0, seed=args.seed)
        job = Job(model, sets, 0, lambda *_: 0, device, Silent(), config, store=Store(args.work))
        seen = moments(job)
        held = moments(replace(job, sets=replace(sets, statistics=sets.correction)))
        layout = layout_of(model)
        types = {q.name: ("Q4_0",) for q in layout.places if q.matrix and q.unit and q.name.startswith("blk.")}
        roles: dict[str, list[Item]] = {}
        for item in items_of(model, layout, seen, held, types, device):
            roles.setdefault(item.role, []).append(item)
        for role, members in roles.items():
            few = [members[i].sampled()[0] for i in sorted({0, len(members) // 2, len(members) - 1})]
            found = {}
            for by in SHRINKAGES:
                coded = encode_all([i.weight for i in few], [i.factors(by) for i in few], FORMATS["Q4_0"])
                lost = [i.lost(values) for i, (_, values) in zip(few, coded, strict=True)]
                found[by] = sum(s for s, _ in lost), sum(h for _, h in lost)
            base = found[SHRINKAGES[0]][1]
            row = {
                "benchmark": "shrinkage", "model": name, "role": role, "tokens": args.tokens,
                "held_tokens": args.held_tokens, "format": "Q4_0",
                "candidates": [
                    {**by._asdict(), "held": round(h / base, 3), "held_over_seen": round(h / s, 2)}
                    for by, (s, h) in found.items()
                ],
            }  # fmt: skip
            print(name, role, *(f"{c['held']} ({c['held_over_seen']})" for c in row["candidates"]), flush=True)  # type: ignore[attr-defined]
            record(args, row)


if __name__ == "__main__":
    main()
