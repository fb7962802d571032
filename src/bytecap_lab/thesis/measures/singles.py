"""Measure one matrix at a time: its most promising exception near 2% of its section, and a step 1/16 octave finer.

`rankings` prices the same exceptions anew under other statistics: of other calibration seeds, and of each text alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from bytecap.calibration.metric import metrics
from bytecap.methods.bytecap import calibrate
from bytecap.model.texts import TokenSets
from bytecap.quantization.options import Options
from bytecap.quantization.overlays import UnitProblem
from bytecap_lab.rd_curves.operating_point import OperatingPoint
from bytecap_lab.rd_curves.points import Pick
from bytecap_lab.rd_curves.trial import STEP, STEPS, OverlayCandidate
from bytecap_lab.thesis.bench import Bench, pick

_NEAR = (0.005, 0.08)  # of the unit's section
_FINER = 1 / 16  # octaves


def chosen(bench: Bench) -> dict[str, OverlayCandidate]:
    """The exception of every matrix that has one."""
    found: dict[str, OverlayCandidate] = {}
    for name in bench.units:
        size = len(bench.operating_point.sections[name].data)
        near = [o for p in bench.exceptions for o in bench.candidates[p][name]
                if _NEAR[0] * size <= o.bytes <= _NEAR[1] * size]  # fmt: skip
        if near:
            found[name] = max(near, key=lambda o: o.gain / o.bytes)
    return found


def singles(bench: Bench) -> dict[str, Any]:
    """Both changes of every matrix, measured alone."""
    picked = chosen(bench)
    step = (STEP, STEPS.index(_FINER))
    picks = [pick({n: o}) for n, o in picked.items()] + [Pick({n: step}) for n in bench.units]
    found = bench.measure(picks, "single units")
    pairs = zip(picked.items(), found, strict=False)
    finer = zip(bench.units, found[len(picked) :], strict=True)
    return {
        "exceptions": [{"unit": n, "path": o.path, "setting": o.setting, "bytes": m.bytes, "promised_bytes": o.bytes,
                        "promised_nats": o.gain, "kl": bench.recovered(m)} for (n, o), m in pairs],
        "steps": [{"unit": n, "bytes": m.bytes, "kl": bench.recovered(m)} for n, m in finer],
    }  # fmt: skip


def problems(bench: Bench, sets: TokenSets, seed: int) -> dict[str, UnitProblem]:
    """Every matrix under the statistics of other tokens."""
    job = bench.operating_point.job
    job = replace(job, sets=sets, config=replace(job.config, seed=seed), store=bench.store)
    found = calibrate(job, Options())
    known = bench.operating_point.base.problems
    return {
        n: UnitProblem(known[n].unit, known[n].weight, m.hessian.cpu(), m.rows.cpu())
        for n, m in metrics([p.unit for p in known.values()], found).items()
    }


def rankings(bench: Bench) -> dict[str, Any]:
    """Promised nats per byte of every single's exception: own, by calibration seed, by text."""
    operating_point, picked = bench.operating_point, chosen(bench)
    real = pick(picked).real(operating_point)
    grown = {n: max(1, len(r.section.data) - len(operating_point.sections[n].data)) for n, r in real.items()}
    after = {n: torch.from_numpy(r.values) for n, r in real.items()}
    others: dict[str, Mapping[str, UnitProblem]] = {"own": problems(bench, bench.sets(), 0)}
    with bench.reporter.step("rankings", bench.setting.seeds + len(bench.setting.calibration)) as advance:
        for seed in range(1, bench.setting.seeds):
            others[f"seed {seed}"] = problems(bench, bench.sets(seed), seed)
            advance(1)
        for path in bench.setting.calibration if len(bench.setting.calibration) > 1 else ():
            others[f"text {path.rpartition('/')[2]}"] = problems(bench, bench.sets(0, [path]), 0)
            advance(1)
    return {"rankings": {k: _promises(operating_point, p, after, grown) for k, p in others.items()}}


def _promises(
    operating_point: OperatingPoint,
    other: Mapping[str, UnitProblem],
    after: Mapping[str, torch.Tensor],
    grown: Mapping[str, int],
) -> dict[str, float]:
    found = {}
    for name, values in after.items():
        if name in other:
            gain = other[name].distortion(operating_point.base.units[name].values) - other[name].distortion(values)
            found[name] = float(f"{operating_point.base.kappa.get(name, 1.0) * gain / grown[name]:.7g}")
    return found


MEASURES = {"singles": singles, "rankings": rankings}
