"""Measure what calibration text is worth on a model that strangers trained (make it with benchmarks/real.py).

Arms are words and files of `--calib`, measured on the workloads' held-out texts at equal file bytes. Targets that
follow the coded prefix are off unless `--drift` says how strong they are, so that arms differ in their text alone.

    python benchmarks/default_text.py --models DIR --texts DIR --model smollm2 --arms default self general workloads
"""

from __future__ import annotations

from typing import Any

import bytecap
from bytecap.model.checkpoint import demo_directory
from common import parser, record, texts

ARMS = ("sqlite", "default", "self", "general", "self:3 general", "workloads", "workloads self")


def sources(arm: str, args: Any) -> list[str] | None:
    """The value of `--calib` in an arm; None for the default."""
    if arm == "default":
        return None
    found: list[str] = []
    for word in arm.split():
        if word == "workloads":
            found += map(str, texts(args.texts, "calib"))
        else:
            found.append(str(demo_directory() / "calib.txt") if word == "sqlite" else word)
    return found


def main() -> None:
    """Measure every arm on every model."""
    p = parser(__doc__.split("\n")[0], models="smollm2")
    p.add_argument("--bits", type=float, default=2.5)
    p.add_argument("--drift", type=float, default=0.0)
    p.add_argument("--arms", nargs="*", default=ARMS)
    args = p.parse_args()
    for name in args.model:
        for arm in args.arms:
            report = bytecap.fit(
                args.models / name, f"{args.bits}bpp", calibration=sources(arm, args),
                evaluation=texts(args.texts, "val"), device=args.device, seed=args.seed, tokens=args.tokens,
                evaluation_tokens=args.eval_tokens, options={"drift": args.drift}, progress=False,
            ).report  # fmt: skip
            keys = ("file_bytes", "kl_nats", "kl_stderr", "predicted_delta_nats", "calibration_texts", "seconds")
            row = {"benchmark": "default_text", "model": name, "arm": arm, "bits": args.bits, "drift": args.drift}
            row |= {k: report[k] for k in keys} | {"texts": [(t["name"], t["kl_nats"]) for t in report["texts"]]}
            record(args, row)
            print(f"{name} {arm}: KL {report['kl_nats']:.4f} ± {report['kl_stderr']:.4f}", flush=True)


if __name__ == "__main__":
    main()
