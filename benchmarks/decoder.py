"""Measure what ReALLM's shared decoder alone buys at equal bytes, against VQ and low rank and shared codewords."""

from __future__ import annotations

from typing import Any

from bytecap.model.checkpoint import load_checkpoint
from bytecap.pipeline.fit import fit
from bytecap.progress import Silent
from common import parser, record, texts

ARMS: dict[str, dict[str, Any]] = {
    "plain VQ + low rank": {"decoder": False, "shared": False},
    "and shared codewords": {"decoder": False},
    "and a shared decoder": {"decoder": "shared"},
}


def main() -> None:
    """Every arm at every budget; `demo` with its own texts if none are given."""
    p = parser(__doc__ or "", required=False)
    p.add_argument("--bits", nargs="*", type=float, default=[3.5])
    p.add_argument("--recover", type=int, default=40, help="steps of recovery")
    args = p.parse_args()
    for name in args.model:
        for bits in args.bits:
            for arm in ARMS:
                one(args, name, bits, arm)


def one(args: Any, name: str, bits: float, arm: str) -> None:
    """One fit, measured and recorded."""
    model = load_checkpoint(name if name == "demo" else args.models / name)
    model.name, reporter = name, Silent()
    files = {
        k: texts(args.texts, t) if args.texts else None for k, t in (("calibration", "calib"), ("evaluation", "val"))
    }
    result = fit(
        model, int(bits * model.parameters / 8), method="reallm", device=args.device, seed=args.seed,
        tokens=args.tokens, evaluation_tokens=args.eval_tokens, options={**ARMS[arm], "recover": args.recover},
        reporter=reporter, **files,
    )  # fmt: skip
    notes = [n for n in reporter.notes if "nats per token without" in n]
    row = {"benchmark": "decoder", "bits": bits, "arm": arm, "solved": notes, **result.report}
    record(args, row)
    print(f"{name} {bits} {arm:22s} KL {row['kl_nats']:.4f} ± {row['kl_stderr']:.4f}, {row['file_bytes']:,} bytes, "
          f"{row['plan']}; {'; '.join(notes)}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
