"""All methods at equal file bytes: KL to the original, loss and real size of every method on the same tokens."""

from __future__ import annotations

from typing import Any

from bytecap.methods import METHODS
from bytecap.model.checkpoint import load_checkpoint
from bytecap.pipeline.fit import fit
from common import parser, record, texts

ACCOUNTINGS = dict.fromkeys(("owq", "radio", "cluscomp", "reallm"), ("coded", "published"))


def main() -> None:
    """Every method and accounting at every budget."""
    p = parser(__doc__ or "")
    p.add_argument("--bits", nargs="*", type=float, default=[2.5, 3.5])
    p.add_argument("--methods", nargs="*", default=list(METHODS))
    p.add_argument("--accounting", nargs="*", default=["coded", "published"])
    args = p.parse_args()
    for name in args.model:
        for bits in args.bits:
            for method in args.methods:
                for accounting in ACCOUNTINGS.get(method, ("",)):
                    if not accounting or accounting in args.accounting:
                        row = one(args, name, bits, method, accounting)
                        print(
                            f"{name} {bits} {method:8s} {accounting:9s} KL {row['kl_nats']:.4f} "
                            f"± {row['kl_stderr']:.4f} loss {row['measured_delta_nats']:+.4f} "
                            f"{row['file_bytes']:,} bytes", flush=True,
                        )  # fmt: skip


def one(args: Any, name: str, bits: float, method: str, accounting: str) -> dict[str, Any]:
    """One fit, measured and recorded."""
    model = load_checkpoint(name if name == "demo" else args.models / name)
    model.name = name
    result = fit(
        model, int(bits * model.parameters / 8), calibration=texts(args.texts, "calib"),
        evaluation=texts(args.texts, "val"), method=method, device=args.device, seed=args.seed, tokens=args.tokens,
        evaluation_tokens=args.eval_tokens, options={"accounting": accounting} if accounting else None,
    )  # fmt: skip
    return record(args, {"benchmark": "methods", "bits": bits, "accounting": accounting, **result.report})


if __name__ == "__main__":
    main()
