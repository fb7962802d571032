"""`fit --format mlx` and `--format compressed-tensors`: the best directory of at most so many bytes.

The job is that of `bytecap.pipeline.fit_gguf`; the cap is on the sum of the directory's files.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bytecap.allocation.allocate import allocate, floor_rate
from bytecap.calibration.statistics import moments
from bytecap.errors import BudgetError
from bytecap.format.ledger import Entry, by_unit
from bytecap.job import Job
from bytecap.job.config import FitConfig
from bytecap.model.checkpoint import Model, load_model
from bytecap.model.defaults import EVALUATION_TOKENS, TOKENS, WINDOW
from bytecap.model.evaluation import Comparison, compare
from bytecap.model.quantized_copy import copy_of, load_values
from bytecap.model.sources import Paths, as_paths, load_sets
from bytecap.model.texts import TokenSets
from bytecap.pipeline.fit_gguf import HELD_TOKENS
from bytecap.pipeline.stages import choose_device, quality
from bytecap.progress import Reporter, Silent, reporter_for
from bytecap.runtimes.blocks import Codes
from bytecap.runtimes.directory import Family, family
from bytecap.runtimes.directory.contents import CONFIG, WEIGHTS, Contents, contents_of, ledger, read_units
from bytecap.runtimes.directory.menu import Rounded, curve, round_to
from bytecap.runtimes.directory.tensors import write
from bytecap.runtimes.gguf.menu import Item, choose_shrinkage, items_of
from bytecap.runtimes.gguf.places import Layout
from bytecap.runtimes.gguf.solve import Found, figures, solve
from bytecap.sizes import check_budget, format_size, parse_budget
from bytecap.system.atomic import check_directory, replacing_directory
from bytecap.system.cache import Store
from bytecap.types import Curve, Plan

_ATTEMPTS = 8  # at allocations whose own plan decides how long names and offsets are


@dataclass
class DirectoryFit:
    """A finished directory.

    Attributes:
        report: every figure of the job, as `--json` prints it.
        types: scheme of every matrix by name.
        path: where it was written; None after a dry run or without an output.
        entries: owner and kind of every byte.
        windows: evaluation by window, one for each text.
    """

    report: dict[str, Any]
    types: dict[str, str]
    path: Path | None = None
    entries: list[Entry] = field(default_factory=list)
    windows: tuple[Any, ...] = ()

    def ledger(self) -> list[Entry]:
        """Owner and kind of every byte."""
        return self.entries


def fit_directory_configs(model: Model | Path | str, configs: Sequence[FitConfig]) -> list[DirectoryFit]:
    """Fit a checkpoint to a directory for each config; they differ in their budgets."""
    loaded = model if isinstance(model, Model) else load_model(model)
    return [
        fit_directory(
            loaded, c.budget, format=str(c.format), calibration=as_paths(c.calibration),
            evaluation=as_paths(c.evaluation), device=c.device, seed=c.seed, output=c.output, dry_run=c.dry_run,
            tokens=c.tokens, evaluation_tokens=c.evaluation_tokens, window=c.window, types=c.types, pure=c.pure,
            store=c.store, reporter=reporter_for(c.reporter, c.progress),
        )
        for c in configs
    ]  # fmt: skip


def fit_directory(
    model: Model | Path | str,
    budget: int | str,
    *,
    format: str,  # noqa: A002 (the word of the command line)
    calibration: Paths = None,
    evaluation: Paths = None,
    device: str = "auto",
    seed: int = 0,
    output: Path | str | None = None,
    dry_run: bool = False,
    tokens: int = TOKENS,
    evaluation_tokens: int = EVALUATION_TOKENS,
    window: int = WINDOW,
    types: Sequence[str] | None = None,
    pure: bool = False,
    held_tokens: int = HELD_TOKENS,
    store: Store | Path | str | None = None,
    reporter: Reporter | None = None,
) -> DirectoryFit:
    """Put a model into a directory of at most `budget` bytes; raises a `BytecapError`, and writes nothing then.

    Args:
        model: Hugging Face directory, hub id, `demo`, or a loaded `Model`.
        budget: bytes, or text such as `4GB` or `4.5bpp`.
        format: `mlx` or `compressed-tensors`.
        calibration: text files, documents separated by form feed; the embedded text if None.
        evaluation: text files nothing is fitted on; the embedded text if None.
        device: `auto`, `cpu` or `cuda`, for passes of the model.
        seed: of every random choice.
        output: directory to write; None keeps nothing.
        dry_run: predict, write and evaluate nothing.
        tokens: most tokens for statistics.
        evaluation_tokens: most tokens for evaluation.
        window: predicted tokens in a window.
        types: schemes to choose from, the family's menu by default.
        pure: refuse matrices that none of `types` can hold, instead of keeping them in 16 bits.
        held_tokens: most tokens for the Hessian that judges.
        store: directory in which statistics are kept.
        reporter: told about progress.
    """
    started = time.perf_counter()
    check_budget(budget)
    kind, reporter, target = family(format), reporter or Silent(), choose_device(device)
    if output is not None:
        check_directory(Path(output))
    loaded = model if isinstance(model, Model) else load_model(model)
    cap = parse_budget(budget, loaded.parameters)
    contents, notes = contents_of(loaded, kind, types, pure=pure)
    for note in notes:
        reporter.note(note)
    floor = _check_floor(contents, cap)
    sets = load_sets(
        loaded, calibration, evaluation, window=window, tokens=tokens, evaluation_tokens=evaluation_tokens,
        correction_tokens=held_tokens, seed=seed, reporter=reporter,
    )  # fmt: skip
    kept = store if isinstance(store, Store) else Store(store)
    config = FitConfig(budget, seed=seed, dry_run=dry_run)
    job = Job(loaded, sets, cap, lambda *_: 0, target, reporter, config, store=kept)
    loaded.module.to(target)
    items = _calibrated(job, contents)
    found = solve(
        job, items, curve=lambda i: curve(contents, i), round_to=lambda i, s: round_to(contents, i, s),
        allocate=lambda curves: _allocate(contents, curves, cap), groups=contents.groups,
    )  # fmt: skip
    result = _finish(job, contents, items, found, None if output is None or dry_run else Path(output))
    result.report |= {"floor_bytes": floor, "kept_plain": notes, "seconds": round(time.perf_counter() - started, 3)}
    return result


def _check_floor(contents: Contents, cap: int) -> int:
    """The smallest reachable directory; refuses a cap below it, naming who holds the floor."""
    shapes = {p.name: (p.shape[0], p.shape[1]) for p in contents.places}
    least = {n: min(ts, key=lambda t: contents.rate(n, t, shapes[n])) for n, ts in contents.types.items()}
    by_group: dict[str, set[str]] = {}
    for n, ts in contents.types.items():
        group = by_group.setdefault(contents.groups.get(n, n), set(ts))
        group &= set(ts)
    for n in least:
        common = by_group[contents.groups.get(n, n)]
        least[n] = min(sorted(common), key=lambda t: contents.rate(n, t, shapes[n]))
    floor = contents.size(least)
    if floor > cap:
        held = {u.name: 2 * u.parameters for u in contents.model.units if u.linear and u.name not in least}
        top = sorted(held, key=lambda n: -held[n])[:2]
        plain = (
            f"; kept in {contents.float_type.lower()} are {', '.join(f'{n} {held[n]:,}' for n in top)}" if top else ""
        )
        raise BudgetError(
            f"a budget of {cap:,} bytes is below the floor of {floor:,} of {contents.family.name}: tokenizer and other "
            f"files hold {sum(map(len, contents.side_files().values())):,}{plain}; --format gguf or a .bcap file go "
            "lower",
            floor,
        )
    return floor


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


def _calibrated(job: Job, contents: Contents) -> list[Item]:
    """Matrices with their metrics, and how far these are shrunk."""
    seen = moments(job)
    held = moments(replace(job, sets=replace(job.sets, statistics=job.sets.correction)))
    items = items_of(job.model, Layout("", contents.places), seen, held, contents.types)
    seen.uses.clear()
    held.uses.clear()
    with job.reporter.step("shrinkage of statistics", len({i.role for i in items})) as advance:
        return choose_shrinkage(items, advance)


def _finish(
    job: Job, contents: Contents, items: Sequence[Item], found: Found[Rounded], output: Path | None
) -> DirectoryFit:
    """Write the directory, read it back, measure it."""
    schemes = _schemes(contents, found.plan)
    size = contents.size(schemes)
    counts = Counter(schemes.values())
    report = {
        "format": contents.family.name, "types": schemes,
        "plan": ", ".join(f"{counts[n]} {n}" for n in contents.settings() if n in counts),
    } | figures(job, items, found, size)  # fmt: skip
    result = DirectoryFit(report, schemes)
    if job.dry_run:
        return result
    with tempfile.TemporaryDirectory() as name:
        path = output or Path(name) / "model"
        codes = {n: r.codes for n, r in found.rounded.items()}
        written, report["checked"] = write_directory(contents, schemes, codes, path)
        assert written == size <= job.budget  # noqa: S101 (planned to the byte)
        if output is not None:
            result.path = output
            job.reporter.note(f"wrote {output}: {format_size(size)}; {report['checked']}")
        result.entries = ledger(contents.family, path)
        parts = measure(job.model, contents.family, path, job.sets, job.device, job.reporter)
    report |= quality(parts) | {"largest_units": [(x.unit, x.bytes) for x in by_unit(result.entries)[:5]]}
    result.windows = tuple(p.windows for p in parts if p.windows is not None)
    return result


def write_directory(
    contents: Contents, schemes: Mapping[str, str], codes: Mapping[str, Codes | None], path: Path
) -> tuple[int, str]:
    """Write a directory that appears whole or not at all; returns its bytes, and what its own program says of it.

    Raises:
        OutputError: it cannot be written. CheckpointError: the family's own program cannot load it.
    """
    with replacing_directory(path) as made:
        with (made / WEIGHTS).open("wb") as f:
            write(f, contents.tensors(schemes, codes), contents.family.mark)
        (made / CONFIG).write_bytes(contents.config(schemes))
        for name, data in contents.side_files().items():
            (made / name).write_bytes(data)
        said = contents.family.check(made)
    return sum(f.stat().st_size for f in path.iterdir()), said


def measure(
    model: Model, kind: Family, path: Path, sets: TokenSets, device: str, reporter: Reporter
) -> list[Comparison]:
    """Scores of a directory read back from disk against the original."""
    quantized_copy = copy_of(model.module)
    load_values(quantized_copy, read_units(kind, path, model.units))
    with reporter.step("evaluation", sum(t.tokens for t in sets.evaluation)) as advance:
        return [compare(model.module, quantized_copy, t, device=device, progress=advance) for t in sets.evaluation]
