"""Byte-return curves at one operating point: verdicts, and how well predictions rank what single units recover."""

from __future__ import annotations

import json
import random
import time
from typing import Any

from bytecap.allocation.correction import role_name
from bytecap.model.checkpoint import load_model
from bytecap.model.sources import load_sets
from bytecap.model.texts import leading
from bytecap.pipeline.stages import choose_device
from bytecap.progress import Silent
from bytecap.system.cache import Store
from bytecap_lab.rd_curves import byte_returns, trial
from bytecap_lab.rd_curves.operating_point import RUNGS, Ground, lay, make_job
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
    p.add_argument("--rungs", type=int, default=RUNGS, help="single units: settings of a path on a unit, at most")
    p.add_argument("--singles", action="store_true", help="single units only, and only these are predicted")
    p.add_argument("--seconds", type=float, default=1e9, help="single units: no new dozen after so long")
    args = p.parse_args()
    for name in args.model:
        for bits in args.bits:
            for base in args.base:
                (singles if args.singles else one)(args, name, bits, base)


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
        {"benchmark": "curves", "bits": bits, "rungs": RUNGS, **found, "paths": paths, "seconds": reporter.steps},
    )
    _say(name, bits, base, found["agreement"], {n: p["agreement"] for n, p in found["paths"].items()})


def _say(name: str, bits: float, base: str, every: dict[str, Any], paths: dict[str, dict[str, Any]]) -> None:
    for n, ranks in [("all paths", every), *paths.items()]:
        print(f"{name} {bits} {base} {n:10s} {ranks['points']:4d} points, rank correlation {ranks['spearman']:.3f}, "
              f"ceiling {ranks['ceiling']:.3f}", flush=True)  # fmt: skip


def _drawn(ground: Ground, names: list[str], points: int, seed: int) -> list[tuple[str, str, int]]:
    """(path, unit, index of a setting) from the upper halves of all ladders, every path and role in turn."""
    rng, cells = random.Random(f"singles {seed}"), {}  # type: ignore[var-annotated]  # noqa: S311
    for n in names:
        for unit in ground.base.problems:
            count = len(trial.ladder(n, ground.base, unit, ground.rungs))
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
    model = load_model(name if name == "demo" else args.models / name)
    model.name, reporter, device = name, _Timed(), choose_device(args.device)
    sets = load_sets(
        model, texts(args.texts, "calib"), texts(args.texts, "val"), tokens=args.tokens, evaluation_tokens=1024,
        correction_tokens=args.point_tokens, seed=args.seed, reporter=reporter,
    )  # fmt: skip
    model.module.to(device)
    budget, store = int(bits * model.parameters / 8), Store(None)
    ground = lay(make_job(model, sets, budget, device, args.seed, reporter), base, store, args.rungs)
    held, offers, measured = leading(sets.correction, args.point_tokens), [], []  # type: ignore[var-annotated]
    on_held = at_base(ground, held, store)
    with reporter.step("curvatures along new errors", 1):
        again = _along_new_errors(ground)
    with reporter.step("drawing", 1):
        drawn = _drawn(ground, trial.known(args.paths), args.points, args.seed)
    for at in range(0, len(drawn), 12):
        if time.time() - reporter.begin > args.seconds:
            break
        with reporter.step(f"points from {at}", 1):
            group = [trial.promise(ground, *d) for d in drawn[at : at + 12]]
            measured += measure(ground, [Pick({o.unit: (o.path, o.index)}) for o in group], held, store, lambda _: None)
            offers += group
        if args.output:
            rows = [_row(o, m, on_held, ground) for o, m in zip(offers, measured, strict=True)][-len(group) :]
            with args.output.with_suffix(".partial").open("a") as f:
                f.writelines(json.dumps(r) + "\n" for r in rows)
    by_path = {
        n: agreement([o for o in offers if o.path == n], [m for o, m in zip(offers, measured, strict=True)
                                                           if o.path == n], on_held, args.seed)
        for n in dict.fromkeys(o.path for o in offers)
    }  # fmt: skip
    every = agreement(offers, measured, on_held, args.seed)
    sample = [
        _row(o, m, on_held, ground) | {"factor_along_new_errors": again[o.unit]}
        for o, m in zip(offers, measured, strict=True)
    ]
    figures = {"name": base, "bytes": ground.bytes, "budget_bytes": budget, **base_figures(on_held)}
    record(args, {"benchmark": "curves", "model": name, "bits": bits, "rungs": args.rungs, "base": figures,
                  "agreement": every, "paths": by_path, "sample": sample, "seconds": reporter.steps})  # fmt: skip
    _say(name, bits, base, every, by_path)


def _along_new_errors(ground: Ground) -> dict[str, float]:
    """Factors from what coding every unit anew, a 64th of an octave finer, really changes; a random sign a unit."""
    base, rng = ground.base, random.Random("signs")  # noqa: S311
    fresh = base.round(list(base.problems.values()), 1 / 64)
    moves = {
        n: rng.choice((-1, 1)) * (r.values - base.units[n].values) for n, r in zip(base.problems, fresh, strict=True)
    }
    return factors_along(ground.job, base, ground.twin, ground.job.sets.statistics, moves)


def _row(offer: trial.Offer, measured: Any, base: Any, ground: Ground) -> dict[str, Any]:
    found = point(measured, base, offer.alone, len(ground.base.problems))
    return {"path": offer.path, "curvature_nats": offer.gain, "slope_nats": offer.slope, "setting": offer.setting,
            "unit": offer.unit, "factor": ground.slopes.factors[offer.unit],
            **{k: found[k] for k in ("bytes", "predicted_nats", "kl_recovered", "kl_stderr")}}  # fmt: skip


if __name__ == "__main__":
    main()
