"""Measure byte-return curves: the gain of the next byte on each overlay at one budget's operating point.

Every path starts from the same base (`bytecap_lab.rd_curves.base`), promises bytes and nats for every unit
(`rd_curves.trial`), is given amounts of bytes to spend over the whole model (`rd_curves.plans`), and is measured on
real sections that were decoded again (`rd_curves.points`). Finer steps of whole tensors are the yardstick.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bytecap.job import Job
from bytecap.model.evaluation import ByWindow
from bytecap.model.texts import Window, leading
from bytecap.progress import Reporter, reporter_for
from bytecap.sizes import check_budget, parse_budget
from bytecap.system.atomic import make_directory
from bytecap.system.cache import Store, blamed
from bytecap.system.collisions import refuse_pages
from bytecap_lab.rd_curves.choose import hull
from bytecap_lab.rd_curves.operating_point import OperatingPoint, build, check_base, make_job
from bytecap_lab.rd_curves.paths import recodings
from bytecap_lab.rd_curves.plans import BRIEF, FULL, Effort, OverlayCandidates, Plan, planned, sample, tried_units
from bytecap_lab.rd_curves.points import MeasuredPick, Pick, at_base, measure
from bytecap_lab.rd_curves.report import agreement, base_figures, lead, ninety, point, verdict, yardstick
from bytecap_lab.rd_curves.trial import COARSER, STEP, OverlayCandidate, candidates, known

if TYPE_CHECKING:
    from bytecap.model.checkpoint import Model
    from bytecap.model.sources import Paths

SCHEMA = 1
TOKENS, EVALUATION_TOKENS, POINT_TOKENS, POINTS = 32_768, 8_192, 4_096, 64
ALL = "all"


def byte_returns(
    model: Model | Path | str,
    budget: int | str,
    output: Path | str | None = None,
    *,
    base: str = "grid",
    paths: Sequence[str] | None = None,
    calibration: Paths = None,
    evaluation: Paths = None,
    device: str = "auto",
    seed: int = 0,
    tokens: int = TOKENS,
    evaluation_tokens: int = EVALUATION_TOKENS,
    point_tokens: int = POINT_TOKENS,
    points: int = POINTS,
    units: int | None = None,
    window: int = 512,
    store: Path | str | None = None,
    report: Path | str | None = None,
    progress: bool | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Measure the byte-return curves of every path at a budget; docs/curves.md describes the result.

    Args:
        model: Hugging Face directory, hub id, `demo`, or a loaded `Model`.
        budget: bytes, or text such as `3MB` or `3.5bpp` (bits per parameter).
        output: directory for `curves.json` and `curves.html`, or None.
        base: `grid` (the default method's plan) or `golf`.
        paths: their names or `all`; by default all, with few points of those that recode units. `step` is always there.
        calibration: text files for statistics and single-unit points; the embedded text if None.
        evaluation: text files for whole-model points; the embedded text if None.
        device: `auto`, `cpu` or `cuda`.
        seed: of every random choice.
        tokens: most tokens for statistics.
        evaluation_tokens: most tokens of whole-model points.
        point_tokens: most tokens of single-unit points.
        points: single-unit points to measure.
        units: matrices of a role that paths act on, evenly spread over the blocks; all by default.
        window: predicted tokens in one.
        store: directory of measured points; `output`/store by default.
        report: page to write; `output`/curves.html by default.
        progress: show progress bars; by default on a terminal and in a notebook.
        reporter: told about progress in place of the bars.

    Raises:
        BytecapError: an unknown name, or a budget that is too small or holds the model losslessly.
    """
    from bytecap.pipeline.stages import choose_device

    _refuse_inputs(output, report, store, model, calibration, evaluation)
    check_budget(budget)
    names, base = known(None if paths is None or ALL in paths else paths), check_base(base)
    directory, reporter = make_directory(output) if output is not None else None, reporter_for(reporter, progress)
    amounts = _Amounts(tokens, evaluation_tokens, point_tokens, window)
    job = _job(model, budget, calibration, evaluation, amounts, choose_device(device), seed, reporter)
    cache = Store(store if store is not None else directory and directory / "store")
    with blamed(cache.directory):
        measured = _measured(job, base, names, BRIEF if paths is None else FULL, units, point_tokens, points, cache)
        return _written(measured, directory, report, reporter)


class _Amounts(NamedTuple):
    """How many tokens there are of each kind, and in a window."""

    tokens: int
    evaluation_tokens: int
    point_tokens: int
    window: int


def _refuse_inputs(
    output: Path | str | None, report: Path | str | None, store: Path | str | None, model: Model | Path | str,
    calibration: Paths, evaluation: Paths,
) -> None:  # fmt: skip
    """Refuse pages and stores that are inputs."""
    texts = {"a calibration text": calibration, "an evaluation text": evaluation}
    refuse_pages(output, "curves", report, store, {"the model": _path_of(model), **texts})


def _path_of(model: Model | Path | str) -> Path | str | None:
    """Return where a model is read from; None if it is loaded already."""
    return model if isinstance(model, Path | str) else None


def _job(
    model: Model | Path | str, budget: int | str, calibration: Paths, evaluation: Paths, amounts: _Amounts,
    device: str, seed: int, reporter: Reporter,
) -> Job:  # fmt: skip
    """Read model and token sets and return the job whose operating point is the base."""
    from bytecap.model.checkpoint import load_checkpoint
    from bytecap.model.sources import CORRECTION_TOKENS, load_sets

    loaded = load_checkpoint(model) if isinstance(model, Path | str) else model
    limit = parse_budget(budget, loaded.parameters)
    sets = load_sets(
        loaded, calibration, evaluation, tokens=amounts.tokens, evaluation_tokens=amounts.evaluation_tokens,
        correction_tokens=max(amounts.point_tokens, CORRECTION_TOKENS), window=amounts.window, seed=seed,
        device=device, reporter=reporter,
    )  # fmt: skip
    loaded.module.to(device)
    return make_job(loaded, sets, limit, device, seed, reporter)


def _measured(
    job: Job, base: str, names: Sequence[str], effort: Effort, units: int | None, point_tokens: int, points: int,
    cache: Store,
) -> dict[str, Any]:  # fmt: skip
    """Return the figures of all paths at the operating point of a job."""
    operating_point, held = build(job, base, cache), leading(job.sets.correction, point_tokens)
    found = _curves(operating_point, names, effort, tried_units(operating_point, units), held, points, cache)
    found = {"schema": SCHEMA, "model": job.model.name, "budget_bytes": job.budget, "seed": job.seed, **found}
    found["base"] = {"name": base, "bytes": operating_point.bytes, "hash": operating_point.key, **found["base"]}
    return found


def _written(
    found: dict[str, Any], directory: Path | None, report: Path | str | None, reporter: Reporter
) -> dict[str, Any]:  # fmt: skip
    """Write the figures, and the page beside them or at a given path; returns the figures."""
    from bytecap.report.curves import page
    from bytecap.report.plain import finite, write_figures

    files = write_figures(finite(found), page, directory, "curves", report)
    if files:
        reporter.note(f"wrote {' and '.join(map(str, files))}")
    return found


def _curves(
    operating_point: OperatingPoint, names: Sequence[str], effort: Effort, units: Sequence[str],
    held: Sequence[Window], points: int, store: Store,
) -> dict[str, Any]:  # fmt: skip
    """Return everything measured, as plain dictionaries."""
    reporter, seed = operating_point.job.reporter, operating_point.job.seed
    texts = [w for t in operating_point.job.sets.evaluation for w in t.windows]
    refused = {n: _refusal(operating_point, n) for n in names}
    promised = _promised(operating_point, refused, effort, units, store)
    flat = [(n, p) for n in names for p in planned(operating_point, promised, n, effort)]
    on_texts, on_held = at_base(operating_point, texts, store), at_base(operating_point, held, store)
    with reporter.step("whole model", max(1, len(flat))) as advance:
        measured = measure(operating_point, [_pick(p.values()) for _, p in flat], texts, store, advance)
    whole: dict[str, list[tuple[Plan, MeasuredPick]]] = {n: [] for n in names}
    for (n, p), m in zip(flat, measured, strict=True):
        whole[n].append((p, m))
    drawn = sample(promised, points, seed)
    with reporter.step("single units", max(1, len(drawn))) as advance:
        singles = measure(operating_point, [_pick([o]) for o in drawn], held, store, advance)
    steps = [m for n in (STEP, COARSER) for _, m in whole.get(n, ())]
    return {
        "base": base_figures(on_texts) | {"kl_held_out": base_figures(on_held)["kl_nats"]},
        "lambda": yardstick([m for _, m in whole[STEP]], on_texts),
        "units_tried": list(units),
        "paths": {
            n: _path(n, operating_point, promised[n], whole[n], steps, on_texts)
            | ({} if whole[n] else {"reason": refused[n] or _nothing(promised[n])})
            | _singles(n, drawn, singles, on_held, len(operating_point.base.problems), seed)
            for n in names
        },
        "agreement": agreement(drawn, singles, on_held, seed),
        "held_out_tokens": int(on_held.tokens.sum()),
    }  # fmt: skip


def _nothing(promised: Mapping[str, Sequence[OverlayCandidate]]) -> str:
    """Return why a path that could act on the base was not measured."""
    return (
        "no setting promises a gain on any matrix" if any(promised.values()) else "no matrix of this model can hold it"
    )


def _refusal(operating_point: OperatingPoint, path: str) -> str:
    """Return why a path cannot act on the base, empty if it can."""
    return recodings()[path].refusal(operating_point.base) if path in recodings() else ""


def _promised(
    operating_point: OperatingPoint, refused: Mapping[str, str], effort: Effort, units: Sequence[str], store: Store
) -> OverlayCandidates:
    """Predict every path on every unit, and say where one cannot apply."""
    reporter, found = operating_point.job.reporter, OverlayCandidates()
    with reporter.step("predicted curves", len(refused) * len(units)) as advance:
        for name, reason in refused.items():
            most_settings = recodings()[name].brief if effort.brief and name in recodings() else None
            tried = [] if reason else units
            found[name] = candidates(operating_point, name, store, advance, tried, most_settings)
            found[name] |= {n: [] for n in units if reason}
    for name, reason in refused.items():
        skipped = sum(not o for o in found[name].values())
        if reason:
            reporter.note(f"path {name} cannot act on this base: {reason}")
        elif skipped:
            reporter.note(f"overlay {name} cannot apply to {skipped} of {len(units)} matrices")
    return found


def _pick(chosen: Iterable[OverlayCandidate]) -> Pick:
    return Pick({o.unit: (o.path, o.index) for o in chosen})


def _path(
    path: str,
    operating_point: OperatingPoint,
    promised: Mapping[str, Sequence[OverlayCandidate]],
    whole: Sequence[tuple[Mapping[str, OverlayCandidate], MeasuredPick]],
    steps: Sequence[MeasuredPick],
    base: ByWindow,
) -> dict[str, Any]:
    """Return a path's whole-model points, its verdict, and its predicted curve on every unit's hull."""
    count = len(operating_point.base.problems)
    points = [
        point(m, base, sum(o.gain for o in p.values()), count)
        | dict(zip(("lead_nats", "lead_stderr"), lead(m, steps, base), strict=True))
        for p, m in whole
    ]
    return {
        **verdict(path, [m for _, m in whole], steps, base), "kind": _kind(path),
        "skipped_units": sum(not o for o in promised.values()),
        "ninety_percent_bytes": ninety(points) if path == STEP or _kind(path) == "overlay" else None,
        "whole": points,
        "units": [
            {
                "unit": n, "section_bytes": len(operating_point.sections[n].data),
                "points": [
                    {"setting": o.setting, "bytes": o.bytes, "predicted_nats": o.gain, "side_bytes": o.side,
                     "weights_share": o.share, "on_hull": o in corner} for o in mine
                ],
            }
            for n, mine in promised.items() if mine for corner in [hull(mine)]
        ],
    }  # fmt: skip


def _kind(path: str) -> str:
    """Return `step`, `recoding` or `overlay`."""
    return "step" if path in (STEP, COARSER) else "recoding" if path in recodings() else "overlay"


def _singles(
    path: str,
    sample: Sequence[OverlayCandidate],
    measured: Sequence[MeasuredPick],
    base: ByWindow,
    count: int,
    seed: int,
) -> dict[str, Any]:
    """Return the measured single-unit points of a path."""
    mine = [(o, m) for o, m in zip(sample, measured, strict=True) if o.path == path]
    return {
        "sample": [
            {"unit": o.unit, "setting": o.setting, "predicted_bytes": o.bytes, "curvature_nats": o.gain,
             "slope_nats": o.slope}
            | {k: v for k, v in point(m, base, o.alone, count).items() if k != "units"}
            for o, m in mine
        ],
        "agreement": agreement([o for o, _ in mine], [m for _, m in mine], base, seed),
    }  # fmt: skip
