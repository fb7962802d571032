"""Measure what overlays chosen by the allocator are worth: KL at equal file bytes with and without a menu, by base.

`--model demo` (the default) is the embedded model with its own texts and needs neither `--models` nor `--texts`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bytecap.model.checkpoint import demo_directory, load_checkpoint
from bytecap.pipeline.fit import fit
from bytecap.progress import Silent
from bytecap.sizes import parse_size
from common import parser, record, texts

BASES: dict[str, dict[str, Any]] = {
    "strong": {},
    # one step for a whole matrix, scalar, to the nearest point: what a plain entropy-coded quantizer does
    "weak": {"feedback": False, "waterfill": False, "row_power": 0.0, "row_class": 0, "trellis": False},
}


def main() -> None:
    """Run all cells and print KL with and without paths."""
    p = parser(__doc__ or "", models="demo", required=False)
    p.add_argument("--budget", nargs="*", default=["600kB", "450kB"], help="sizes, or bits per parameter such as 3.5b")
    p.add_argument("--base", nargs="*", default=list(BASES), choices=list(BASES))
    p.add_argument("--paths", nargs="*", default=["all"])
    args = p.parse_args()
    torch.set_num_threads(1)
    for name in args.model:
        for base in args.base:
            for budget in args.budget:
                rows = [one(args, name, base, budget, menu) for menu in ((), tuple(args.paths))]
                without, with_paths = (r["kl_nats"] for r in rows)
                print(
                    f"{name} {base:6s} {budget}: KL {without:.4f} without, {with_paths:.4f} with paths "
                    f"({with_paths / without:.3f}); {rows[1]['plan']}; {rows[1]['paths'] or 'no path'}", flush=True,
                )  # fmt: skip


def one(args: Any, name: str, base: str, budget: str, menu: tuple[str, ...]) -> dict[str, Any]:
    """One fit, measured and recorded."""
    embedded = name == "demo"
    model = load_checkpoint(name if embedded else args.models / name)
    model.name = name
    directory: Path = demo_directory()
    limit = int(float(budget[:-1]) * model.parameters / 8) if budget.endswith("b") else parse_size(budget)
    reporter = Silent()
    result = fit(
        model, limit, paths=menu, options=BASES[base],
        calibration=directory / "calib.txt" if embedded else texts(args.texts, "calib"),
        evaluation=directory / "val.txt" if embedded else texts(args.texts, "val"), device=args.device,
        seed=args.seed, tokens=args.tokens, evaluation_tokens=args.eval_tokens, reporter=reporter,
    )  # fmt: skip
    notes = [n for n in reporter.notes if "path" in n]
    return record(args, {"benchmark": "paths", "base": base, "menu": list(menu), "notes": notes, **result.report})


if __name__ == "__main__":
    main()
