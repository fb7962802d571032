"""`--recover` of block formats: KL with tuned scales and vectors over the KL without, at the same codes and bytes."""

from __future__ import annotations

from bytecap.pipeline.fit_directory import fit_directory
from bytecap.pipeline.fit_gguf import fit_gguf
from bytecap.progress import Silent
from common import parser, record, texts


def main() -> None:
    """Every model and budget."""
    p = parser(__doc__ or "")
    p.add_argument("--format", default="gguf", help="gguf, mlx or compressed-tensors")
    p.add_argument("--budget", nargs="*", default=["4025472"])
    p.add_argument("--recover", default="120s")
    p.add_argument("--work", help="directory for statistics kept between runs")
    args = p.parse_args()
    for name in args.model:
        for budget in args.budget:
            fit = fit_gguf if args.format == "gguf" else fit_directory
            report = fit(
                args.models / name, budget, format=args.format, calibration=texts(args.texts, "calib"),
                evaluation=texts(args.texts, "val"), device=args.device, seed=args.seed, tokens=args.tokens,
                evaluation_tokens=args.eval_tokens, recover=args.recover, store=args.work, reporter=Silent(),
            ).report  # fmt: skip
            before = report.get("without_recovery", {"kl_nats": report["kl_nats"]})
            row = {
                "benchmark": "formats_recover", "format": args.format, "model": name, "recover": args.recover,
                "file_bytes": report["file_bytes"], "kl_nats": report["kl_nats"], "kl_without": before["kl_nats"],
                "ratio": round(report["kl_nats"] / before["kl_nats"], 4),
                "kl_difference_stderr": before.get("kl_difference_stderr"), "recovery": report["recovery"],
                "tokens": report["statistics_tokens"], "seconds": report["seconds"],
            }  # fmt: skip
            print({k: row[k] for k in ("model", "file_bytes", "kl_without", "kl_nats", "ratio")}, flush=True)
            record(args, row)


if __name__ == "__main__":
    main()
