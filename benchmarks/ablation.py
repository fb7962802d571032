"""Measure the worth of ingredients of the default coder: KL and loss at equal bytes, one switched off at a time."""

from __future__ import annotations

from typing import Any

from bytecap.model.checkpoint import load_checkpoint
from bytecap.pipeline.fit import fit
from common import parser, record, texts

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "no trellis (scalar grid)": {"trellis": False},
    "8 states": {"states": 8},
    "32 states": {"states": 32},
    "256 states": {"states": 256},
    "8 states, plain plan": {"states": 8, "allocate": False, "correct": False, "drift": 0.0},
    "32 states, plain plan": {"states": 32, "allocate": False, "correct": False, "drift": 0.0},
    "256 states, plain plan": {"states": 256, "allocate": False, "correct": False, "drift": 0.0},
    "no error feedback": {"feedback": False},
    "one step per row (no waterfilling)": {"waterfill": False},
    "columns in stored order": {"order": False},
    "no row steps": {"row_power": 0.0},
    "row steps tempered (power 0.5)": {"row_power": 0.5},
    "no row classes": {"row_class": 0},
    "no centroid shrink": {"shrink": False},
    "plain Hessian (not guided)": {"guided": False},
    "damping 1e-2": {"damping": 1e-2},
    "damping 1e-4": {"damping": 1e-4},
    "no correction factors": {"correct": False},
    "plain plan (one slope by theory)": {"allocate": False},
    "no drift targets": {"drift": 0.0},
    "drift targets at full strength": {"drift": 1.0},
    "drift targets from 4k tokens": {"drift_tokens": 4096},
    "drift targets from 8k tokens": {"drift_tokens": 8192},
}


def main() -> None:
    """Run all variants and print the table."""
    p = parser(__doc__ or "")
    p.add_argument("--bits", nargs="*", type=float, default=[3.5, 2.5])
    p.add_argument("--only", nargs="*", help="run these variants only; ratios are to the first")
    args = p.parse_args()
    for name in args.model:
        for bits in args.bits:
            base = None
            for label, options in VARIANTS.items():
                if args.only and label not in args.only:
                    continue
                row = one(args, name, bits, label, options)
                base = base or row["kl_nats"]
                print(
                    f"{name} {bits} {label:38s} KL {row['kl_nats']:.4f} ({row['kl_nats'] / base:.3f}) "
                    f"loss {row['measured_delta_nats']:+.4f} {row['file_bytes']:,} bytes", flush=True,
                )  # fmt: skip


def one(args: Any, name: str, bits: float, label: str, options: dict[str, Any]) -> dict[str, Any]:
    """One variant, measured and recorded."""
    model = load_checkpoint(args.models / name)
    model.name = name
    result = fit(
        model, int(bits * model.parameters / 8), calibration=texts(args.texts, "calib"),
        evaluation=texts(args.texts, "val"), device=args.device, seed=args.seed, tokens=args.tokens,
        evaluation_tokens=args.eval_tokens, options=options,
    )  # fmt: skip
    return record(args, {"benchmark": "ablation", "variant": label, "bits": bits, **result.report})


if __name__ == "__main__":
    main()
