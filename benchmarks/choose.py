"""Which model is best at which size: `bytecap choose` at one cap after the other, one line a model and cap.

Caps share statistics through the store, and a run that is ended keeps the caps that it has finished.

python benchmarks/choose.py --models MODELS --texts TEXTS --model demo small-s0 base-s1 --other DIR
    --budgets 600kB,1.2MB,2.5MB,5MB,10MB,20MB,40MB,60MB --output results/choose.jsonl
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import bytecap
from bytecap.progress import Bars
from bytecap.sizes import split_budgets
from common import parser, record, texts


def main() -> None:
    """Choose at every cap and record its rows."""
    p = parser(__doc__.split("\n")[0], models="demo,small-s0,base-s1")
    p.add_argument("--other", type=Path, help="another model directory")
    p.add_argument("--budgets", default="600kB,1.2MB,2.5MB,5MB,10MB,20MB,40MB,60MB")
    p.add_argument("--eval-bytes", type=int, default=98_304)
    p.add_argument("--short-tokens", type=int, default=8_192)
    p.add_argument("--finalists", type=int, default=2)
    p.add_argument("--effort", type=int, help="of whole fits")
    p.add_argument("--method", default="bytecap", help="of all fits; a baseline bounds what a slow fit would reach")
    p.add_argument("--store", type=Path, help="directory of finished steps")
    args = p.parse_args()
    models = [m if m == "demo" else args.models / m for m in args.model] + ([args.other] if args.other else [])
    store = args.store or Path(tempfile.mkdtemp(prefix="bytecap-"))
    for budget in split_budgets(args.budgets):
        found = bytecap.choose(
            models, budget, evaluation=texts(args.texts, "val"), calibration=texts(args.texts, "calib"),
            tokens=args.tokens, evaluation_bytes=args.eval_bytes, short_tokens=args.short_tokens,
            finalists=args.finalists, method=args.method, effort=args.effort, device=args.device, seed=args.seed,
            store=store, reporter=Bars(),
        )  # fmt: skip
        for row in found.report["rows"]:
            about = {"benchmark": "choose", "evaluation_bytes": found.report["evaluation_bytes"]}
            record(args, {**about, **({} if args.method == "bytecap" else {"method": args.method}), **row})
        print(json.dumps(found.report["envelope"]), flush=True)


if __name__ == "__main__":
    main()
