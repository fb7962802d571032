"""Byte-return curves at one operating point: verdicts, and how well predictions rank what single units recover."""

from __future__ import annotations

import json
import random
import time
from typing import Any

from bytecap.allocation.correction import role_name
from bytecap.model.checkpoint import load_checkpoint
from bytecap.model.sources import load_sets
from bytecap.model.texts import leading
from bytecap.pipeline.stages import choose_device
from bytecap.progress import Silent
from bytecap.system.cache import Store
from bytecap_lab.rd_curves import byte_returns, trial
from bytecap_lab.rd_curves.operating_point import MOST_SETTINGS, OperatingPoint, build, make_job
from bytecap_lab.rd_curves.points import Pick, at_base, measure
from bytecap_lab.rd_curves.report import agreement, base_figures, point
from bytecap_lab.rd_curves.slopes import factors_along
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
    p.add_argument(
        "--rungs", type=int, default=MOST_SETTINGS, help="single units: settings of a path on a unit, at most"
    )
    p.add_argument("--singles", action="store_true", help="single units only, and only these are predicted")
    p.add_argument("--seconds", type=float, default=1e9, help="single units: no new dozen after so long")
    args = p.parse_args()
    for name in args.model:
        for bits in args.bits:
            for base in args.base:
                (singles if args.singles else one)(args, name, bits, base)


def one(args: Any, name: str, bits: float, base: str) -> None:
    """One operating point, measured and recorded."""
    model = load_checkpoint(name if name == "demo" else args.models / name)
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
        {
            "benchmark": "curves",
            "bits": bits,
            "rungs": MOST_SETTINGS,
            **found,
            "paths": paths,
            "seconds": reporter.steps,
        },
    )
    _say(name, bits, base, found["agreement"], {n: p["agreement"] for n, p in found["paths"].items()})


def _say(name: str, bits: float, base: str, every: dict[str, Any], paths: dict[str, dict[str, Any]]) -> None:
    for n, ranks in [("all paths", every), *paths.items()]:
        print(f"{name} {bits} {base} {n:10s} {ranks['points']:4d} points, rank correlation {ranks['spearman']:.3f}, "
              f"ceiling {ranks['ceiling']:.3f}", flush=True)  # fmt: skip


def _drawn(operating_point: OperatingPoint, names: list[str], points: int, seed: int) -> list[tuple[str, str, int]]:
    """(path, unit, index of a setting) from the upper halves of all ladders, every path and role in turn."""
    rng, cells = random.Random(f"singles {seed}"), {}  # type: ignore[var-annotated]  # noqa: S311
    for n in names:
        for unit in operating_point.base.problems:
            count = len(trial.ladder(n, operating_point.base, unit, operating_point.most_settings))
            cells.setdefault((role_name(unit), n), []).extend((n, unit, i) for i in range(count // 2, count))
    for cell in cells.values():
        rng.shuffle(cell)
    taken: list[tuple[str, str, int]] = []
    order = sorted(cells)
    while len(taken) < points and any(cells.values()):
        rng.shuffle(order)
        taken += [cells[k].pop() for k in order if cells[k]]
    return taken[:points]


def singles(args: Any, name: str, bits: float, base: str) -> None:
    """Single units alone, recorded after every dozen; the last row holds them all."""
    model = load_checkpoint(name if name == "demo" else args.models / name)
    model.name, reporter, device = name, _Timed(), choose_device(args.device)
    sets = load_sets(
        model, texts(args.texts, "calib"), texts(args.texts, "val"), tokens=args.tokens, evaluation_tokens=1024,
        correction_tokens=args.point_tokens, seed=args.seed, reporter=reporter,
    )  # fmt: skip
    model.module.to(device)
    budget, store = int(bits * model.parameters / 8), Store(None)
    operating_point = build(make_job(model, sets, budget, device, args.seed, reporter), base, store, args.rungs)
    held, candidates, measured = leading(sets.correction, args.point_tokens), [], []  # type: ignore[var-annotated]
    on_held = at_base(operating_point, held, store)
    with reporter.step("curvatures along new errors", 1):
        again = _along_new_errors(operating_point)
    with reporter.step("drawing", 1):
        drawn = _drawn(operating_point, trial.known(args.paths), args.points, args.seed)
    for at in range(0, len(drawn), 12):
        if time.time() - reporter.begin > args.seconds:
            break
        with reporter.step(f"points from {at}", 1):
            group = [trial.promise(operating_point, *d) for d in drawn[at : at + 12]]
            measured += measure(
                operating_point, [Pick({o.unit: (o.path, o.index)}) for o in group], held, store, lambda _: None
            )
            candidates += group
        if args.output:
            rows = [_row(o, m, on_held, operating_point) for o, m in zip(candidates, measured, strict=True)][
                -len(group) :
            ]
            with args.output.with_suffix(".partial").open("a") as f:
                f.writelines(json.dumps(r) + "\n" for r in rows)
    by_overlay = {
        n: agreement([o for o in candidates if o.path == n], [m for o, m in zip(candidates, measured, strict=True)
                                                           if o.path == n], on_held, args.seed)
        for n in dict.fromkeys(o.path for o in candidates)
    }  # fmt: skip
    every = agreement(candidates, measured, on_held, args.seed)
    sample = [
        _row(o, m, on_held, operating_point) | {"factor_along_new_errors": again[o.unit]}
        for o, m in zip(candidates, measured, strict=True)
    ]
    figures = {"name": base, "bytes": operating_point.bytes, "budget_bytes": budget, **base_figures(on_held)}
    record(args, {"benchmark": "curves", "model": name, "bits": bits, "rungs": args.rungs, "base": figures,
                  "agreement": every, "paths": by_overlay, "sample": sample, "seconds": reporter.steps})  # fmt: skip
    _say(name, bits, base, every, by_overlay)


def _along_new_errors(operating_point: OperatingPoint) -> dict[str, float]:
    """Factors from what coding every unit anew, a 64th of an octave finer, really changes; a random sign a unit."""
    base, rng = operating_point.base, random.Random("signs")  # noqa: S311
    fresh = base.round(list(base.problems.values()), 1 / 64)
    moves = {
        n: rng.choice((-1, 1)) * (r.values - base.units[n].values) for n, r in zip(base.problems, fresh, strict=True)
    }
    return factors_along(
        operating_point.job, base, operating_point.quantized_copy, operating_point.job.sets.statistics, moves
    )


def _row(
    candidate: trial.OverlayCandidate, measured: Any, base: Any, operating_point: OperatingPoint
) -> dict[str, Any]:
    found = point(measured, base, candidate.alone, len(operating_point.base.problems))
    return {"path": candidate.path, "curvature_nats": candidate.gain, "slope_nats": candidate.slope,
            "setting": candidate.setting,
            "unit": candidate.unit, "factor": operating_point.slopes.factors[candidate.unit],
            **{k: found[k] for k in ("bytes", "predicted_nats", "kl_recovered", "kl_stderr")}}  # fmt: skip


if __name__ == "__main__":
    main()
