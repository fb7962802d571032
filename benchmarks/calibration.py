"""KL against calibration tokens: the curve behind the default of `--tokens`."""

from __future__ import annotations

from bytecap.model.checkpoint import load_checkpoint
from bytecap.pipeline.fit import fit
from common import parser, record, texts


def main() -> None:
    """One fit for every number of tokens."""
    p = parser(__doc__ or "")
    p.add_argument("--bits", type=float, default=3.0)
    p.add_argument("--counts", nargs="*", type=int, default=[8192, 16384, 32768, 65536, 131072, 262144])
    args = p.parse_args()
    for name in args.model:
        for count in args.counts:
            model = load_checkpoint(args.models / name)
            model.name = name
            result = fit(
                model, int(args.bits * model.parameters / 8), calibration=texts(args.texts, "calib"),
                evaluation=texts(args.texts, "val"), device=args.device, seed=args.seed, tokens=count,
                evaluation_tokens=args.eval_tokens,
            )  # fmt: skip
            row = record(args, {"benchmark": "calibration", "bits": args.bits, "tokens": count, **result.report})
            print(f"{name} {count:8d} tokens: KL {row['kl_nats']:.4f} ± {row['kl_stderr']:.4f}", flush=True)


if __name__ == "__main__":
    main()
