"""`fit --format mlx` and `--format compressed-tensors`: the best directory of at most so many bytes.

The job is that of `bytecap.pipeline.fit_gguf`; the cap is on the sum of the directory's files.
"""

from __future__ import annotations

import tempfile
import time
from collections import ChainMap, Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bytecap.allocation.allocate import allocate, floor_rate
from bytecap.errors import BudgetError
from bytecap.format.ledger import by_unit
from bytecap.job import Job
from bytecap.job.config import FitConfig, configured
from bytecap.model.checkpoint import Model
from bytecap.model.streamed_checkpoint import StreamedModel
from bytecap.pipeline.formats import format_of
from bytecap.pipeline.quality import Comparisons, quality, say_narrow
from bytecap.pipeline.runtime_model import RuntimeModel, calibrated, gain, job_of, measure, opened
from bytecap.progress import reporter_for
from bytecap.runtimes.blocks import Codes
from bytecap.runtimes.blocks.ggml import FORMATS
from bytecap.runtimes.directory import family
from bytecap.runtimes.directory.contents import CONFIG, PLAIN, WEIGHTS, Contents, contents_of, ledger, read_units
from bytecap.runtimes.directory.menu import coding_of
from bytecap.runtimes.directory.tensors import write
from bytecap.runtimes.gguf.menu import Item
from bytecap.runtimes.gguf.places import Layout
from bytecap.runtimes.gguf.solve import Found, figures, rounded_values, solve
from bytecap.runtimes.gguf.targets import follow_prefix
from bytecap.runtimes.gguf.tuning import tune_blocks
from bytecap.sizes import format_size, parse_budget
from bytecap.system.directories import check_directory, replacing_directory
from bytecap.types import Curve, Plan

_ATTEMPTS = 8  # at allocations whose own plan decides how long names and offsets are


def fit_directory_configs(model: Model | Path | str, configs: Sequence[FitConfig]) -> list[RuntimeModel]:
    """Fit a checkpoint to a directory for each config; they differ in their budgets."""
    with opened(model, configs) as loaded:
        return [_fit_one(loaded, c) for c in configs]


@configured
def fit_directory(model: Model | Path | str, config: FitConfig) -> RuntimeModel:
    """Put a model into a directory of at most `budget` bytes; raises a `BytecapError`, and writes nothing then.

    `options` may hold `held_tokens`, the most tokens for the Hessian that judges.

    Args:
        model: Hugging Face directory, hub id, `demo`, or a loaded `bytecap.model.checkpoint.Model`.
        config: the options, documented below.
    """
    return fit_directory_configs(model, [config])[0]


def _fit_one(loaded: Model, config: FitConfig) -> RuntimeModel:
    """Fit one directory."""
    format_of(config)
    started = time.perf_counter()
    output = config.output
    kind, reporter = family(str(config.format)), reporter_for(config.reporter, config.progress)
    if output is not None:
        check_directory(Path(output))
    cap = parse_budget(config.budget, loaded.parameters)
    contents, notes = contents_of(loaded, kind, config.types, pure=config.pure)
    for note in notes:
        reporter.note(note)
    floor = _check_floor(contents, cap)
    job, coding = job_of(loaded, config), coding_of(contents)
    items = calibrated(job, Layout("", contents.places), contents.types, coding)
    plain = solve(job, items, coding, lambda curves: _allocate(contents, curves, cap), contents.groups)
    if not config.dry_run:
        plain = follow_prefix(job, items, coding, plain)
    tuned = job.recover is not None and not config.dry_run
    found, record = plain, dict[str, Any]()
    if tuned:
        moving = contents.tuned(), items, coding, plain, contents.float_type, contents.tables()
        found, record = tune_blocks(job, *moving)
    result = _finish(
        job, contents, items, (found, plain), None if output is None or config.dry_run else Path(output)
    )  # fmt: skip
    result.report |= {"recovery": record} if record else {}
    result.report |= {"floor_bytes": floor, "kept_plain": notes, "seconds": round(time.perf_counter() - started, 3)}
    return result


def _check_floor(contents: Contents, cap: int) -> int:
    """Return the bytes of the smallest directory; refuse a cap below, naming what fills it and what goes lower."""
    least = _least(contents, contents.types)
    floor = contents.size(least)
    if floor <= cap:
        return floor
    held = {u.name: 2 * u.parameters for u in contents.model.units if u.linear and u.name not in least}
    top = sorted(held, key=lambda n: -held[n])[:2]
    plain = f"; kept in {contents.float_type.lower()} are {', '.join(f'{n} {held[n]:,}' for n in top)}" if top else ""
    free = {p.name: contents.fitting(p.cols) for p in contents.places}
    lowest = _least(contents, free)
    size, kinds = contents.size(lowest), ",".join(sorted(set(lowest.values())))
    lower = [f"--types {kinds} would go down to {size:,}"] if size < floor else []
    lower += ["--format gguf goes lower"] if _mostly_wide(contents) else []
    raise BudgetError(
        f"a budget of {cap:,} bytes is below the floor of {floor:,} of {contents.family.name}: tokenizer and other "
        f"files hold {sum(map(len, contents.side_files().values())):,}{plain}; "
        f"{'; '.join([*lower, 'a .bcap file goes lower'])}",
        floor,
    )


def _least(contents: Contents, types: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return the smallest scheme of every matrix, of those that all members of its group may take."""
    groups = contents.groups
    common: dict[str, set[str]] = {}
    for n, ts in types.items():
        group = common.setdefault(groups.get(n, n), set(ts))
        group &= set(ts)
    shapes = {p.name: (p.shape[0], p.shape[1]) for p in contents.places}
    return {
        n: min(sorted(common[groups.get(n, n)]), key=lambda t, n=n: contents.rate(n, t, shapes[n]))  # type: ignore[misc]
        for n in types
    }


def _mostly_wide(contents: Contents) -> bool:
    """Return whether GGUF's types of fewest bits hold most of the weights."""
    matrices = [u for u in contents.model.units if len(u.shape) == 2 and u.linear]
    block = min(FORMATS.values(), key=lambda f: f.bits).block
    wide = sum(u.parameters for u in matrices if u.matrix_shape[1] % block == 0)
    return 2 * wide > sum(u.parameters for u in matrices)


def _schemes(contents: Contents, plan: Plan) -> dict[str, str]:
    """Scheme of every matrix under a plan of groups."""
    names, groups = contents.settings(), contents.groups
    return {p.name: names[int(plan.choice[groups.get(p.name, p.name)].setting)] for p in contents.places}


def _allocate(contents: Contents, curves: Sequence[Curve], cap: int) -> tuple[Plan, float]:
    """A plan whose directory fits, and the bytes that the matrices could take.

    What is not the matrices' own (offsets in the header, the configuration) depends a little on the plan.
    """
    least = allocate(curves, floor_rate(curves))
    rest = contents.size(_schemes(contents, least)) - least.rate
    best, room = least, floor_rate(curves)
    for _ in range(_ATTEMPTS):
        if cap - rest < floor_rate(curves):
            break
        plan = allocate(curves, cap - rest)
        size = contents.size(_schemes(contents, plan))
        if size <= cap and plan.distortion <= best.distortion:
            best, room = plan, cap - rest
        new = size - plan.rate
        if new == rest or (size <= cap and cap - new <= room):
            break
        rest = max(new, rest + 1) if size > cap else new
    return best, room


def _finish(
    job: Job, contents: Contents, items: Sequence[Item], found: tuple[Found, Found], output: Path | None
) -> RuntimeModel:
    """Write the directory, read it back, measure it; the second plan is the one without recovery."""
    best, plain = found
    schemes = _schemes(contents, best.plan)
    size = contents.size(schemes)
    counts = Counter(schemes.values())
    report = {
        "format": contents.family.name, "types": schemes,
        "plan": ", ".join(f"{counts[n]} {n}" for n in contents.settings() if n in counts),
    } | figures(job, items, best, size)  # fmt: skip
    result = RuntimeModel(report, schemes)
    if job.dry_run:
        return result
    with tempfile.TemporaryDirectory() as name:
        path = output or Path(name) / "model"
        written, report["checked"] = write_directory(
            contents, schemes, best.codes(), path, _unquantized(job, schemes, items, best)
        )
        assert written == size <= job.budget  # noqa: S101 (planned to the byte)
        if output is not None:
            result.path = output
            job.reporter.note(f"wrote {output}: {format_size(size)}; {report['checked']}")
        result.entries = ledger(contents.family, path)
        measured = _measured(job, contents, path)
        if best is not plain:
            other = Path(name) / "plain"
            write_directory(contents, schemes, plain.codes(), other, _unquantized(job, schemes, items, plain))
            report["without_recovery"] = gain(measured.parts, _measured(job, contents, other).parts)
    report |= quality(measured.parts, measured.held)
    report["largest_units"] = [(x.unit, x.bytes) for x in by_unit(result.entries)[:5]]
    say_narrow(job, report)
    result.windows = measured.windows
    return result


def _unquantized(job: Job, schemes: Mapping[str, str], items: Sequence[Item], found: Found) -> Mapping[str, Any]:
    """Values of matrices in 16 bits, which targets behind the coded prefix may have moved, and tuned ones, by name."""
    kept = {n: r for n, r in found.rounded.items() if schemes[n] in PLAIN}
    return ChainMap(found.vectors, rounded_values(job.model, items, kept))  # type: ignore[arg-type]


def _measured(job: Job, contents: Contents, path: Path) -> Comparisons:
    """Scores of a directory on disk."""
    values = read_units(contents.family, path, job.model.units)
    return measure(job.model, values, job.sets, job.device, job.reporter)


def write_directory(
    contents: Contents, schemes: Mapping[str, str], codes: Mapping[str, Codes | None], path: Path,
    vectors: Mapping[str, Any] | None = None,
) -> tuple[int, str]:  # fmt: skip
    """Write a directory that appears whole or not at all; returns its bytes, and what its own program says of it.

    `vectors` take the place of the model's own, by name.

    Raises:
        OutputError: it cannot be written. CheckpointError: the family's own program cannot load it.
    """
    with replacing_directory(path) as made:
        with (made / WEIGHTS).open("wb") as f:
            write(f, contents.tensors(schemes, codes, vectors), contents.family.mark)
        (made / CONFIG).write_bytes(contents.config(schemes))
        for name, data in contents.side_files().items():
            (made / name).write_bytes(data)
        streamed = isinstance(contents.model, StreamedModel)
        said = "not checked: larger than memory" if streamed else contents.family.check(made)
    return sum(f.stat().st_size for f in path.iterdir()), said
