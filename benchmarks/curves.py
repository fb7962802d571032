"""Byte-return curves at one operating point: verdicts, and how well predictions rank what single units recover."""

from __future__ import annotations

import time
from typing import Any

from bytecap.curves import byte_returns, trial
from bytecap.model.checkpoint import load_model
from bytecap.progress import Silent
from common import parser, record, texts

_SAMPLE = ("unit", "setting", "bytes", "predicted_nats", "curvature_nats", "slope_nats", "kl_recovered", "kl_stderr")


class _Timed(Silent):
    """Says when each step is done."""

    def __init__(self) -> None:
        super().__init__()
        self.begin, self.steps = time.time(), []  # type: ignore[var-annotated]

    def step(self, name: str, total: int) -> Any:
        """One step: remembers what it took."""
        del total
        return _Step(self, name)


class _Step:
    def __init__(self, reporter: _Timed, name: str) -> None:
        self.reporter, self.name, self.begin = reporter, name, time.time()

    def __enter__(self) -> Any:
        return lambda _: None

    def __exit__(self, *_: object) -> None:
        took = round(time.time() - self.begin, 1)
        self.reporter.steps.append((self.name, took))
        print(f"{time.time() - self.reporter.begin:7.1f} s: {self.name} took {took} s", flush=True)


def main() -> None:
    """Every model, base and size."""
    p = parser(__doc__ or "")
    p.add_argument("--bits", nargs="*", type=float, default=[3.5])
    p.add_argument("--base", nargs="*", default=["grid", "golf"])
    p.add_argument("--paths", nargs="*", default=None)
    p.add_argument("--points", type=int, default=128)
    p.add_argument("--point-tokens", type=int, default=65_536)
    p.add_argument("--rungs", type=int, default=trial.RUNGS, help="settings of one path on one unit, at most")
    args = p.parse_args()
    trial.RUNGS = args.rungs
    for name in args.model:
        for bits in args.bits:
            for base in args.base:
                one(args, name, bits, base)


def one(args: Any, name: str, bits: float, base: str) -> None:
    """One operating point, measured and recorded."""
    model = load_model(name if name == "demo" else args.models / name)
    model.name = name
    reporter = _Timed()
    found = byte_returns(
        model, int(bits * model.parameters / 8), base=base, paths=args.paths, calibration=texts(args.texts, "calib"),
        evaluation=texts(args.texts, "val"), device=args.device, seed=args.seed, tokens=args.tokens,
        evaluation_tokens=args.eval_tokens, point_tokens=args.point_tokens, points=args.points, reporter=reporter,
    )  # fmt: skip
    paths = {
        n: {k: v for k, v in p.items() if k not in {"units", "sample", "whole"}}
        | {"sample": [{k: x[k] for k in _SAMPLE} for x in p["sample"]],
           "whole": [{k: v for k, v in x.items() if k != "units"} for x in p["whole"]]}
        for n, p in found["paths"].items()
    }  # fmt: skip
    record(
        args,
        {"benchmark": "curves", "bits": bits, "rungs": args.rungs, **found, "paths": paths, "seconds": reporter.steps},
    )
    for n, ranks in [("all paths", found["agreement"]), *((n, p["agreement"]) for n, p in found["paths"].items())]:
        print(f"{name} {bits} {base} {n:10s} {ranks['points']:4d} points, rank correlation {ranks['spearman']:.3f}, "
              f"ceiling {ranks['ceiling']:.3f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
